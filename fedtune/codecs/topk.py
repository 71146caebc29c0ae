"""Top-k: the largest values by magnitude, and zero elsewhere (Aji and Heafield 2017, arXiv:1704.05021).

Bytes: 2 a value sent (bfloat16) or 4 (float32), its position (fedtune/codecs/positions.py), and a head of up to 20.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.codecs import sparse
from fedtune.codecs.bytes import Format
from fedtune.codecs.sparse import Shapes
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import Tensors

FORMAT = Format(b"fk")
VALUES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class TopK:
    """The largest values by magnitude, and where they are.

    Raises:
        ConfigError: naming the setting that is out of range.
    """

    lossless: ClassVar[bool] = False
    contracts: ClassVar[bool] = True
    density: float = 0.05
    values: str = "bfloat16"
    coder: str = "golomb"

    def __post_init__(self) -> None:
        sparse.check(self.density, self.coder)
        if self.values not in VALUES:
            raise ConfigError(f"codec.values={self.values} is not known: expected {' or '.join(VALUES)}")

    def encode(self, tensors: Tensors, key: int) -> bytes:
        flat = sparse.flattened(tensors)
        chosen = sparse.largest(flat, self.density)
        sent = torch.from_numpy(flat[chosen])
        if self.values == "bfloat16":
            sent = sent.clamp(-LARGEST, LARGEST)  # what would be rounded to infinity
        ends = sparse.ends_of(sparse.shapes_of(tensors))
        return sparse.encode(FORMAT, self.coder, chosen, ends, _bytes(sent.to(VALUES[self.values])))

    def decode(self, blob: bytes, shapes: Shapes) -> Tensors:
        dtype = VALUES[self.values]
        flat, chosen, values = sparse.decode(FORMAT, blob, shapes, lambda count: count * dtype.itemsize)
        kept = torch.frombuffer(bytearray(values), dtype=dtype).float() if values else torch.zeros(0)
        if not torch.isfinite(kept).all():
            raise WireError("a value is not finite")
        flat[chosen] = kept.numpy()
        return sparse.restored(flat, shapes)


def _bytes(values: torch.Tensor) -> bytes:
    integers = values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32).numpy()
    return integers.astype(integers.dtype.newbyteorder("<"), copy=False).tobytes()
