"""What the server believes of valid updates: how far one may be from the others, how much it may count, and whether
what came of them is a state to go on with.

An update may be well formed and finite and still be a lie: values of 3e38 in float32 are numbers, and the sum of two is
none. So an update whose norm is out of all proportion to the round's is left out, by name, before a method sees it.
This is no robust aggregation, which is about lies that look like updates (docs/methods.md: krum and its kin); it is
what keeps one broken or hostile device from ending everybody's run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from fedtune.core.errors import DivergedError
from fedtune.core.protocol import ClientInfo, Strategy, Tensors, Update
from fedtune.runs.checkpoint import flatten
from fedtune.runs.update_store import UpdateSequence
from fedtune.wire.delta_coding import starts_of, wide

ENOUGH = 3  # updates that changed anything, below which their median says nothing
BY_FAR = 10  # times what the others' median is
FINE = 1 << 20  # steps of an example in which weights are cut


def norm_of_change(tensors: Tensors, told: Tensors) -> float:
    """How far a client went: ||theta_k - theta||_2 over all tensors, of those that it was not sent ||theta_k||_2.

    It is inf where squares are no numbers any more.

    Args:
        told: what the client was sent, as far as its answer is a change of it.
    """
    starts = starts_of(tensors, told)
    return math.hypot(*(_norm(tensor, starts.get(name)) for name, tensor in tensors.items()))


def _norm(tensor: Tensor, start: Tensor | None = None) -> float:
    values = tensor.to(wide(tensor)) if start is None else tensor.to(wide(tensor)) - start.to(tensor.device)
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def out_of_proportion(norms: Mapping[int, float], told: Mapping[int, Tensors], most: float | None) -> dict[int, str]:
    """Why which updates are left out, by client.

    Compared is with the median of those that changed anything, of an even number the lower one, so that half of them
    can't hide among themselves. Where these are fewer than three a median says nothing, and an update is compared with
    what its client was sent, by the ratio's square.

    Args:
        norms: of the round's updates, by client.
        told: what each was sent.
        most: population.max_norm_ratio; None leaves nobody out.
    """
    moved = [norm for norm in norms.values() if norm > 0]
    if most is None or not moved:
        return {}
    if len(moved) >= ENOUGH:
        usual = median_low(moved)
        against = dict.fromkeys(norms, usual)
        what, ratio = "the median of the round", most
    else:
        against = {index: math.hypot(*map(_norm, told.get(index, {}).values())) for index in norms}
        what, ratio = "that of what it was sent", most * most
    return {
        index: f"the norm of its update, {norm:.3g}, is out of all proportion to {what}, {against[index]:.3g}: over "
        f"{ratio:g} times as much (population.max_norm_ratio={most:g})"
        for index, norm in norms.items()
        if 0 < against[index] < norm / ratio
    }


def outlier(norms: Mapping[int, float]) -> int | None:
    """The client whose update is larger than the others' by far; None if there is no such one, or no other."""
    if len(norms) < 2:
        return None
    index = max(norms, key=lambda index: norms[index])
    return index if norms[index] > BY_FAR * _median_without(norms, index) else None


def _median_without(norms: Mapping[int, float], index: int) -> float:
    return median_low(norm for other, norm in norms.items() if other != index)


def blame(norms: Mapping[int, float], advice: str) -> str:
    """Whose update was the largest, where that says something, and what to do.

    Args:
        advice: but for its first letter, an s.
    """
    if (index := outlier(norms)) is not None:
        return (
            f"Client {index} sent an update of norm {norms[index]:.3g}, where the others' median is "
            f"{_median_without(norms, index):.3g}. If it is broken or not to be trusted, go on without its node; else "
            f"s{advice}"
        )
    only = "".join(f"The only update, of norm {norm:.3g}, is client {index}'s. " for index, norm in norms.items())
    return (only if len(norms) == 1 else "") + f"S{advice}"


def heavy_of(examples: Sequence[tuple[int, int]], counted: Sequence[int]) -> tuple[int, float] | None:
    """The client with more than half of a round's weight, and its share; None if nobody has that, or at most two are
    left.

    Args:
        examples: clients and their numbers of examples.
        counted: what these count for.
    """
    if len(counted) < ENOUGH or 2 * max(counted) <= sum(counted):
        return None
    place = counted.index(max(counted))
    return examples[place][0], counted[place] / sum(counted)


def attempt(
    strategy: Strategy[Any], state: Any, number: int, replies: Sequence[tuple[ClientInfo, Update]]
) -> tuple[Any, str]:
    """What `strategy.aggregate` makes of the replies, and what is wrong with it; nothing if that is empty.

    Raises:
        FedtuneError: for other reasons than numbers that went out of range.
    """
    try:
        after = strategy.aggregate(state, number, replies)
    except (DivergedError, ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        return None, str(error) or type(error).__name__
    wrong = sorted(not_finite(after) - not_finite(state))
    return after, f"{len(wrong)} of the state's numbers and tensors, as '{wrong[0]}', are not finite" if wrong else ""


def not_finite(state: Any) -> set[str]:
    """Where a state has NaN or an infinity, as a checkpoint names it."""
    tree, tensors = flatten(state)
    found = {name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            found.add(path)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value if type(value) is list else ()):
            walk(item, f"{path}/{key}")

    walk(tree, "")
    return found


def effective_examples(examples: Sequence[int], weights: str, most: float) -> list[int]:
    """What each update counts for in place of its number of examples: whole numbers in the proportions of the weights.

    Args:
        weights: population.weights, samples or equal.
        most: population.max_weight, the largest share that one may have. Where they are so few that one has to have
            more, all are equal.
    """
    if weights == "equal":
        return [1] * len(examples)
    total = sum(examples)
    if most >= 1 or not examples or max(examples) <= most * total:
        return list(examples)
    if most * len(examples) <= 1 + 1e-9:
        return [1] * len(examples)
    # The largest m are cut to c, so that c = most (m c + the rest's sum)
    ordered, rest, limit = sorted(examples, reverse=True), total, 0.0
    for cut in range(1, len(ordered)):
        rest -= ordered[cut - 1]
        limit = most * rest / (1 - cut * most)
        if ordered[cut] <= limit * (1 + 1e-9):
            break
    return [min(n * FINE, max(1, math.floor(limit * FINE))) for n in examples]


class Weighed(UpdateSequence):
    """Replies whose updates count for other numbers of examples; nothing else about them changes.

    Args:
        examples: by place.
    """

    def __init__(self, replies: Sequence[tuple[ClientInfo, Update]], examples: Sequence[int]):
        self._replies = replies
        self._examples = examples

    def __len__(self) -> int:
        return len(self._replies)

    def at(self, place: int) -> tuple[ClientInfo, Update]:
        """The client and its update, with the number of examples that it counts for."""
        peer, update = self._replies[place]
        return peer, replace(update, examples=self._examples[place])
