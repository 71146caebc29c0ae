"""Turns of several clients side by side: each goes its own way between gradients, which are computed for all at once.

A turn (fedtune/core/protocol.py, InSteps) yields what it wants a gradient of and is handed the loss. Here the requests
of a step are put together, those on one base that holds the same change in one pass. A turn that ends drops out, one
that fails fails alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fedtune.core.errors import CapacityError
from fedtune.core.protocol import GradientReply, GradientRequest, InSteps, Tensors
from fedtune.training.gradients import gradients

Result = TypeVar("Result")


def together(turns: Sequence[InSteps[Result]], say: Callable[[str], None]) -> list[Result | Exception]:
    """What each turn comes to, in their order; an exception where it raised one.

    Args:
        turns: of clients whose bases have no `obstacle`.
        say: told when memory is too short for all of them at once.
    """
    results: dict[int, Result | Exception] = {}
    asking: dict[int, GradientRequest] = {}
    changes: list[Tensors] = []
    passes = _Passes(len(turns), say)

    def go_on(place: int, reply: GradientReply | None) -> None:
        try:
            # The first is next(): nobody waits for an answer yet
            request = next(turns[place]) if reply is None else turns[place].send(reply)
            if reply is None:
                request.model.base_delta.tensors = _known(request.model.base_delta.tensors, changes)
            asking[place] = request
        except StopIteration as end:
            results[place] = end.value
        except Exception as error:  # its own; the others go on
            results[place] = error

    try:
        for place in range(len(turns)):
            go_on(place, None)
        while asking:
            step = dict(asking)
            groups: dict[tuple[int, int], list[int]] = {}
            asking.clear()
            for place, request in step.items():
                groups.setdefault((id(request.model.root), id(request.model.base_delta.tensors)), []).append(place)
            for places in groups.values():
                for place, answer in zip(places, passes.gradients([step[place] for place in places]), strict=True):
                    if isinstance(answer, Exception):
                        turns[place].close()
                        results[place] = answer
                    else:
                        go_on(place, answer)
    finally:
        for turn in turns:
            turn.close()
    return [results[place] for place in range(len(turns))]


def _known(tensors: Tensors, changes: list[Tensors]) -> Tensors:
    """One object for all that hold the same change of the base, which is then compared once a turn."""
    for known in changes:
        if known.keys() == tensors.keys() and all(torch.equal(known[name], own) for name, own in tensors.items()):
            return known
    changes.append(tensors)
    return tensors


@dataclass
class _Passes:
    """Passes over a base for as many at once as memory has room for.

    Attributes:
        most: how many that is, as far as was seen.
    """

    most: int
    say: Callable[[str], None]

    def gradients(self, requests: list[GradientRequest]) -> list[GradientReply | Exception]:
        found: list[GradientReply | Exception] = []
        while rest := requests[len(found) :]:
            found += self._pass(rest[: self.most])
        return found

    def _pass(self, requests: list[GradientRequest]) -> list[GradientReply | Exception]:
        """The gradients of all; in halves where memory is too short for all, or where somebody's can't be computed, so
        that whoever it is fails alone."""
        try:
            return [*gradients(requests)]
        except Exception as error:
            failed = error
        for request in requests:
            for parameter in request.model.parameters():
                parameter.grad = None
        memory, count = _is_memory(failed), len(requests)
        if count == 1:
            short = "there is too little memory for a step of this client: lower train.micro_batch_size"
            return [CapacityError(short) if memory else failed]
        if memory:
            self.most = count // 2
            self.say(f"too little memory for {count} clients at once: in two parts")
        return [*self._pass(requests[: count // 2]), *self._pass(requests[count // 2 :])]


def _is_memory(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in said or "alloc" in said
