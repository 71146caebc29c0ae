"""ComPEFT: the signs of the largest values, and one magnitude (Yadav et al. 2023, arXiv:2311.13171).

Of an update tau, the `density` largest values by magnitude become alpha std(tau) times their sign, std over all of tau
(scale "global", as the authors have it) or over each tensor's own values ("per_tensor", closer where A and B move by
different amounts); the others become zero. Without an alpha it is 1 / sqrt(density), with which what is sent is as long
as tau; of several, clients choose as the authors do, by loss on data that they don't train on.

Bytes: one bit of sign and the position for each value sent, 4 a magnitude, and a head of up to 24: at 5 % density 0.34
bits a value of tau, 47 times less than bfloat16, at 20 % 0.94 (fedtune/codecs/positions.py has the positions' lengths).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np

from fedtune.codecs import sparse
from fedtune.codecs.sparse import Array, Shapes
from fedtune.errors import ConfigError
from fedtune.protocol import Tensors

MAGIC = b"fc"
SCALES = ("global", "per_tensor")


@dataclass(frozen=True)
class ComPEFT:
    """
    Args:
        alpha: a number, several to choose from, or None.

    Raises:
        ConfigError: naming the setting that is out of range.
    """

    lossless: ClassVar[bool] = False
    density: float = 0.2
    alpha: float | Sequence[float] | None = None
    scale: str = "per_tensor"
    coder: str = "golomb"

    def __post_init__(self) -> None:
        sparse.check(self.density, self.coder)
        alphas = self.alpha if isinstance(self.alpha, Sequence) else [self.alpha]
        if self.alpha is not None and not (alphas and all(map(_is_alpha, alphas))):
            raise ConfigError(f"codec.alpha={self.alpha}: expected a number above 0, or several")
        if isinstance(self.alpha, Sequence):
            object.__setattr__(self, "alpha", tuple(self.alpha))
        if self.scale not in SCALES:
            raise ConfigError(f"codec.scale={self.scale} is not known: expected {' or '.join(SCALES)}")

    @property
    def grid(self) -> Sequence["ComPEFT"]:
        """One for each alpha, where there are several."""
        return [replace(self, alpha=alpha) for alpha in self.alpha] if isinstance(self.alpha, Sequence) else ()

    def encode(self, tensors: Tensors, key: int) -> bytes:
        """Raises:
        ConfigError: if alpha isn't chosen yet.
        """
        if isinstance(self.alpha, Sequence):
            raise ConfigError(f"codec.alpha={list(self.alpha)}: one of these has to be chosen first")
        alpha = 1 / math.sqrt(self.density) if self.alpha is None else self.alpha
        flat = sparse.flattened(tensors)
        chosen = sparse.largest(flat, self.density)
        shapes = sparse.shapes_of(tensors)
        ends = self._ends(shapes)
        magnitudes = [alpha * sparse.deviation(flat[start:end]) for start, end in pairwise([0, *ends])]
        values = np.asarray(magnitudes, "<f4").tobytes() + sparse.signs_of(flat[chosen])
        return sparse.encode(MAGIC, self.coder, chosen, sparse.ends_of(shapes), values)

    def decode(self, blob: bytes, shapes: Shapes) -> Tensors:
        ends = self._ends(shapes)
        head = 4 * len(ends)
        flat, chosen, values = sparse.decode(MAGIC, blob, shapes, lambda count: head + (count + 7) // 8)
        magnitudes = sparse.scales(values[:head], "a magnitude")
        signs = sparse.read_signs(values[head:], len(chosen))
        counts = np.diff(np.searchsorted(chosen, ends), prepend=0)
        flat[chosen] = signs * np.repeat(magnitudes, counts)
        return sparse.restored(flat, shapes)

    def _ends(self, shapes: Shapes) -> Array:
        """Where each part with a magnitude of its own ends."""
        ends = sparse.ends_of(shapes)
        return ends if self.scale == "per_tensor" else np.array([ends[-1] if len(ends) else 0])


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
