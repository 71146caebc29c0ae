"""How much the signs of clients' updates agree: similarity.csv in the run folder (evaluate.similarity=true).

An update is what a client's tensors became less what it was sent. With a lossy codec it is what is on the wire, so of
ComPEFT, STC and top-k only the values sent count; with a lossless one, every value that changed does. Where clients
answer with what is no update of what they were sent (Traits.lossy_up is false), the signs are those of what they send.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch

from fedtune.core.protocol import Codec, Tensors, is_lossless
from fedtune.server.sign_masks import Masks, cosine, masks_of
from fedtune.wire.delta_coding import decode, starts_of, wide


@dataclass(frozen=True)
class Signs:
    """The signs of one client's update, 2 bits a value, and whose values they are."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # by name
    masks: Masks


def signs_of(tensors: Tensors, blob: bytes, codec: Codec, told: Tensors | None, known: Tensors) -> Signs:
    """The signs of an update.

    Args:
        tensors: what came of `blob`, decoded with `known`.
        told: what the client was sent, of which tensors that `tensors` lacks don't count, nor the other way round;
            None: `tensors` are no update of it. Whole numbers don't count: they are places, counts or keys.
    """
    if told is None:
        moved = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        return Signs(_shapes(moved), masks_of(moved))
    start = starts_of(tensors, told)
    if is_lossless(codec):
        return Signs(_shapes(start), masks_of({name: tensors[name] for name in start}, start))
    # Decoded with zeros as what is known, a blob is the update itself: added to large values, small ones would vanish.
    # One zero that is looked at often takes no memory
    zeros = {
        name: torch.zeros((), dtype=wide(tensor) if tensor.is_floating_point() else tensor.dtype).expand(tensor.shape)
        for name, tensor in known.items()
    }
    sent = decode(codec, blob, zeros)
    return Signs(_shapes(start), masks_of({name: sent[name] for name in start}))


def every_two(signs: Mapping[int, Signs]) -> Iterator[tuple[int, int, float | None]]:
    """Every two clients by index, the lower first, and their updates' cosine; None where the updates have different
    tensors or shapes, or no values at all."""
    for one, other in combinations(sorted(signs), 2):
        mine, theirs = signs[one], signs[other]
        alike = mine.shapes == theirs.shapes and mine.masks.size > 0
        yield one, other, cosine(mine.masks, theirs.masks) if alike else None


def _shapes(tensors: Tensors) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors))
