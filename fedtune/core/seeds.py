"""Keys: every random draw is a function of the seed and of what the draw is for.

There is no generator that several callers advance, so reordering or dropping clients changes nothing for the others,
and a resumed run needs no saved random state. Draws come from the raw 64-bit output of numpy's Philox, whose stream is
fixed by its definition (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), not from numpy's
distributions, whose streams may change between releases.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive the key of one draw from the run's seed and the names of the draw.

    Returns:
        An integer in [0, 2**63), equal on every machine. Different paths give unrelated keys, and ("a", "bc") is not
        ("ab", "c").
    """
    words = repr((int(seed), *path)).encode()  # repr keeps 1 and "1" apart, and where each word ends
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1


def bits(key: int, count: int) -> np.ndarray:
    """`count` independent uint64 values."""
    return np.random.Philox(key=key).random_raw(count)


def permutation(key: int, count: int) -> np.ndarray:
    """A uniformly random order of range(count), int64."""
    return np.argsort(bits(key, count), kind="stable")


def uniform(key: int, shape: Sequence[int], bound: float) -> Tensor:
    """A float32 tensor drawn uniformly from [-bound, bound), with the same bits everywhere."""
    unit = (bits(key, int(np.prod(shape))) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy((unit * np.float32(2) - np.float32(1)) * np.float32(bound)).reshape(tuple(shape))
