"""Sparse ternary compression: the signs of the largest values, times the mean of their magnitudes (Sattler et al. 2019,
arXiv:1903.02891). Its authors use it both ways and with error feedback (`codec_up.feedback=true`).

Bytes: as ComPEFT's with one magnitude (fedtune/codecs/compeft.py).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.codecs import sparse
from fedtune.codecs.bytes import Format
from fedtune.codecs.sparse import Shapes
from fedtune.core.protocol import Tensors

FORMAT = Format(b"ft")


@dataclass(frozen=True)
class STC:
    """Sparse ternary compression: signs of the largest values, times their mean magnitude.

    Raises:
        ConfigError: naming the setting that is out of range.
    """

    lossless: ClassVar[bool] = False
    contracts: ClassVar[bool] = True
    density: float = 0.05
    coder: str = "golomb"

    def __post_init__(self) -> None:
        sparse.check(self.density, self.coder)

    def encode(self, tensors: Tensors, key: int) -> bytes:
        flat = sparse.flattened(tensors)
        chosen = sparse.largest(flat, self.density)
        sent = flat[chosen]
        mean = np.abs(sent).mean(dtype=np.float64) if len(sent) else 0.0
        ends = sparse.ends_of(sparse.shapes_of(tensors))
        return sparse.encode(FORMAT, self.coder, chosen, ends, np.float32(mean).tobytes() + sparse.signs_of(sent))

    def decode(self, blob: bytes, shapes: Shapes) -> Tensors:
        flat, chosen, values = sparse.decode(FORMAT, blob, shapes, lambda count: 4 + (count + 7) // 8)
        mean = sparse.scales(values[:4], "the mean magnitude")
        flat[chosen] = sparse.read_signs(values[4:], len(chosen)) * mean[0]
        return sparse.restored(flat, shapes)
