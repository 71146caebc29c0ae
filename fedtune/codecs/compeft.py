"""ComPEFT: the signs of the largest values, and one magnitude (Yadav et al. 2023, arXiv:2311.13171).

Of an update tau, the `density` largest values by magnitude become a magnitude m times their sign; the others become
zero. One m is for all of tau (scale "global", as the authors have it) or one for each tensor ("per_tensor", closer
where A and B move by different amounts). With mean_g the mean magnitude of the values of part g that are sent,

    alpha          m_g = alpha std(tau_g), over all values of the part, as the authors have it; of several alphas
                   clients choose as they do, by loss on data that they don't train on
    no alpha       m_g = c mean_g, c = |tau| / sqrt(sum_g count_g mean_g^2): what is sent is as long as tau
    with feedback  m_g = mean_g: what is left out is the least that these signs allow

Error feedback needs a contraction, |tau - sent|^2 <= (1 - delta) |tau|^2 with delta above 0, or what is left out grows
without end. Here |tau - sent|^2 = |tau|^2 - sum_g count_g m_g (2 mean_g - m_g). With m_g = mean_g that is one; as long
as tau, it is 2 (1 - 1 / c) |tau|^2, more than |tau|^2 once c > 2, as at small densities; and alpha std(tau) may be
more than twice the mean, or 0 for a tensor whose values are all equal, which is then never sent.

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
from fedtune.codecs.bytes import Format
from fedtune.codecs.sparse import Array, Shapes
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import Tensors

FORMAT = Format(b"fc")
LARGEST = np.finfo(np.float32).max
SCALES = ("global", "per_tensor")


@dataclass(frozen=True)
class ComPEFT:
    """Signs of the largest values, times one magnitude for each tensor or for all.

    Args:
        alpha: a number, several to choose from, or None.
        feedback: whether what is left out is sent later.

    Raises:
        ConfigError: naming the setting that is out of range.
    """

    lossless: ClassVar[bool] = False
    density: float = 0.2
    alpha: float | Sequence[float] | None = None
    scale: str = "per_tensor"
    coder: str = "golomb"
    feedback: bool = False

    def __post_init__(self) -> None:
        sparse.check(self.density, self.coder)
        alphas = self.alpha if isinstance(self.alpha, Sequence) else [self.alpha]
        if self.alpha is not None and not (alphas and all(map(_is_alpha, alphas))):
            raise ConfigError(f"codec.alpha={self.alpha}: expected a number above 0, or several")
        if isinstance(self.alpha, Sequence):
            object.__setattr__(self, "alpha", tuple(self.alpha))
        if self.feedback and self.alpha is not None:
            raise ConfigError(
                f"codec.alpha={self.alpha} with feedback: what is left out can grow without end, as alpha times the "
                "standard deviation may be more than twice what is sent comes to, or 0. Leave alpha out, which sends "
                "the mean magnitude, or set feedback=false"
            )
        if self.scale not in SCALES:
            raise ConfigError(f"codec.scale={self.scale} is not known: expected {' or '.join(SCALES)}")

    @property
    def contracts(self) -> bool:
        return self.feedback

    @property
    def grid(self) -> Sequence["ComPEFT"]:
        """One for each alpha, where there are several."""
        return [replace(self, alpha=alpha) for alpha in self.alpha] if isinstance(self.alpha, Sequence) else ()

    def encode(self, tensors: Tensors, key: int) -> bytes:
        """Keep the `density` largest values of all tensors together, as signs, positions and magnitudes.

        Raises:
            ConfigError: if alpha isn't chosen yet.
        """
        if isinstance(self.alpha, Sequence):
            raise ConfigError(f"codec.alpha={list(self.alpha)}: one of these has to be chosen first")
        flat = sparse.flattened(tensors)
        chosen = sparse.largest(flat, self.density)
        shapes = sparse.shapes_of(tensors)
        values = self._magnitudes(flat, chosen, self._ends(shapes)).astype("<f4").tobytes()
        return sparse.encode(FORMAT, self.coder, chosen, sparse.ends_of(shapes), values + sparse.signs_of(flat[chosen]))

    def decode(self, blob: bytes, shapes: Shapes) -> Tensors:
        ends = self._ends(shapes)
        head = 4 * len(ends)
        flat, chosen, values = sparse.decode(FORMAT, blob, shapes, lambda count: head + (count + 7) // 8)
        magnitudes = sparse.scales(values[:head], "a magnitude")
        signs = sparse.read_signs(values[head:], len(chosen))
        counts = np.diff(np.searchsorted(chosen, ends), prepend=0)
        flat[chosen] = signs * np.repeat(magnitudes, counts)
        return sparse.restored(flat, shapes)

    def _magnitudes(self, flat: Array, chosen: Array, ends: Array) -> Array:
        """Of each part, float64."""
        if self.alpha is not None:
            assert not isinstance(self.alpha, Sequence)
            deviations = [sparse.deviation(flat[start:end]) for start, end in pairwise([0, *ends])]
            return self.alpha * np.array(deviations)
        sent = np.split(np.abs(flat[chosen]), np.searchsorted(chosen, ends[:-1]))[: len(ends)]
        means = np.array([part.mean(dtype=np.float64) if len(part) else 0.0 for part in sent])
        coming = math.sqrt(math.fsum(len(part) * mean**2 for part, mean in zip(sent, means, strict=True)))
        return means if self.feedback or not coming else np.minimum(means * (sparse.length(flat) / coming), LARGEST)

    def _ends(self, shapes: Shapes) -> Array:
        """Where each part with a magnitude of its own ends."""
        ends = sparse.ends_of(shapes)
        return ends if self.scale == "per_tensor" else np.array([ends[-1] if len(ends) else 0])


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
