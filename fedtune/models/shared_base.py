"""What the runs of one process have in common: the loaded base and the tokenised data.

Nothing is shared unless asked for, within `sharing()`: a process with one run has no use for a second copy of anything.
"""

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from fedtune.config.schema import ModelSpec
from fedtune.models.base import Base, load_base

Made = TypeVar("Made")

_kept: dict[Hashable, object] | None = None


@contextmanager
def sharing() -> Iterator[None]:
    """Within this, what is loaded is kept for the next run of this process."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def once(key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` returns, or what it returned before under this key."""
    if _kept is None:
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]  # type: ignore[return-value]


def base_for(spec: ModelSpec, device: torch.device, changes: bool) -> Base:
    """The base that `spec` names, to put adapters on. Where bases are shared its modules are its own, and its weights
    are everybody's unless `changes`: then it has a copy, for a run that trains or rounds the base's own numbers.

    Raises:
        ModelError: as load_base.
    """
    if _kept is None:
        return load_base(spec, device)
    base = once(("base", replace(spec, merge="residual"), device), lambda: load_base(spec, device))
    # deepcopy takes whatever its memo names for copied already
    memo = {} if changes else {id(weight): _twin(weight) for weight in base.model.parameters()}
    return replace(base, model=copy.deepcopy(base.model, memo))


def _twin(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Another parameter with the same numbers in the same place. One object for all wouldn't do: bitsandbytes' int8
    layers take from theirs what they need when they are first used, and leave nothing for a second layer."""
    twin = torch.Tensor._make_subclass(type(weight), weight.data, weight.requires_grad)
    twin.__dict__.update(weight.__dict__)
    return twin
