"""Raw: every bit of every tensor, in the safetensors format.

Bytes: the tensors' own, and a header of about 110 bytes a tensor with name, dtype, shape and place. A plain, checked
format (https://github.com/huggingface/safetensors) that carries bfloat16 and no code.
"""

from dataclasses import dataclass
from typing import ClassVar

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedtune.core.errors import WireError
from fedtune.core.protocol import Tensors


@dataclass(frozen=True)
class Raw:
    """Lossless; the default in both directions."""

    lossless: ClassVar[bool] = True

    def encode(self, tensors: Tensors, key: int) -> bytes:
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def decode(self, blob: bytes) -> Tensors:
        try:
            # safetensors hands them out in another order each time, and sums keep the order in their last bits
            return dict(sorted(load(blob).items()))
        except (SafetensorError, ValueError, KeyError, OverflowError) as error:
            raise WireError(f"not a raw blob ({len(blob)} bytes): {error}") from error
