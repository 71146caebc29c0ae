"""Rows of several owners end to end, as one padded tensor and back: what a GPU takes in one kernel.

    (T, width)   the owners' rows one after the other, and filling behind them
    (C, L, width)   an owner's rows each, filled up to the longest's

Neither way adds two numbers, so gradients have the same bits each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Where the rows of each owner are.

    Attributes:
        places: (C, L) int64, the row of each place; where an owner has no more, its last row.
        back: (rows,) int64, the place of each row that has an owner.
    """

    places: Tensor
    back: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int]) -> "Grouping":
        """That of owners with so many rows each, one at least."""
        size = torch.tensor(sizes)
        longest = int(size.max())
        at = torch.arange(longest).expand(len(sizes), longest)
        starts = (size.cumsum(0) - size)[:, None]
        places = starts + torch.minimum(at, size[:, None] - 1)
        back = (at < size[:, None]).flatten().nonzero()[:, 0]
        return cls(places, back)

    def to(self, device: torch.device) -> "Grouping":
        """The same on that device."""
        return Grouping(self.places.to(device), self.back.to(device))

    def spread(self, rows: Tensor) -> Tensor:
        """Rows (T, ...) as (C, L, ...)."""
        spread: Tensor = _Spread.apply(rows, self)  # type: ignore[no-untyped-call]
        return spread

    def gather(self, spread: Tensor, rows: int) -> Tensor:
        """What was spread, (C, L, ...), as rows (T, ...): so many, and zero behind those that have an owner."""
        gathered: Tensor = _Gather.apply(spread, self, rows)  # type: ignore[no-untyped-call]
        return gathered


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, grouping: Grouping) -> Tensor:
        context.grouping, context.rows = grouping, len(rows)
        return rows[grouping.places]

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _joined(gradient, context.grouping, context.rows), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, spread: Tensor, grouping: Grouping, rows: int) -> Tensor:
        context.grouping, context.shape = grouping, spread.shape
        return _joined(spread, grouping, rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        back = context.grouping.back
        shape = context.shape
        found = gradient.new_zeros((shape[0] * shape[1], *shape[2:]))
        found[back] = gradient[: len(back)]
        return found.view(shape), None, None


def _joined(spread: Tensor, grouping: Grouping, rows: int) -> Tensor:
    own = spread.flatten(0, 1)[grouping.back]
    return torch.cat([own, own.new_zeros((rows - len(own), *own.shape[1:]))])
