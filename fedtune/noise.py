"""Seeded noise: directions that every device regenerates alike from a seed, and arithmetic that never holds one.

A direction z has one value for every element of every parameter. Element i of a parameter with n elements is made from
word j = i mod h, h = (n + 1) // 2, of a counter-based hash keyed by the seed and the parameter's name, so that it
depends on nothing else: not on the device, its generator, the number of threads, or how the work is cut up.

    x = j ^ k0;  x = (x ^ x >> 16) * 0x7feb352d;  x = ((x ^ x >> 15) + k1) * 0x846ca68b;  x = x ^ x >> 16

in 32 bits, (k0, k1) = mix(mix(seed) + hash(name)). Two elements share a word, one its low half and one its high, which
halves the cost of what is otherwise bound by arithmetic. The mixing is that of `lowbias32` (https://nullprogram.com/blog/2018/07/31/)
with half of the key put in between, as without it two seeds would give the same values in another order; mix is the
finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

Values are small whole numbers times 1 / SIGMA, of mean 0 and variance 1:

    rademacher   the half's top bit: -1 or 1                                    kurtosis 1
    normal       (bits set in the half - 8) / 2, -4 ... 4: Binomial(16, 1/2)      kurtosis 2.875; at most 0.098 from the
                 distribution function of N(0, 1), for it has steps of 1/2; odd moments 0

So c z is exact in float32 for a c of 20 bits (`coefficient` rounds to that, by 2^-21 at most), w + c z is rounded once,
and whether a device fuses multiplication and addition changes nothing. Sums of directions are kept in int32, where
they are exact and in no order: fedtune/seeded.py.

One source serves all: torch.compile makes a fused kernel of it, on a CPU by a C++ compiler and on CUDA by Triton.
Where there is none, or with FEDTUNE_COMPILE=0, the same lines run eagerly in pieces that fit the cache: the same bits,
but slowly (docs/benchmarks.md has the figures).
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune import kernels
from fedtune.errors import ConfigError

SIGMA = {"normal": 2.0, "rademacher": 1.0}  # the standard deviation of the whole numbers that z is made of
LARGEST = {"normal": 8, "rademacher": 1}  # the largest of these numbers
KURTOSIS = {"normal": 2.875, "rademacher": 1.0}

EAGER = 1 << 15  # words at a time without a compiler: a few arrays of that length stay in the cache
BLOCK = 1 << 19  # words at a time where many directions are added up: read from memory once for all of them
COMPILED = 1 << 7  # words below which a kernel isn't worth compiling


def check_kind(kind: str) -> str:
    """Raises:
    ConfigError: if there is no such distribution.
    """
    if kind not in SIGMA:
        raise ConfigError(f"noise={kind} is not known: expected {' or '.join(SIGMA)}")
    return kind


def stream_keys(seeds: Sequence[int], name: str) -> Tensor:
    """What the hash is keyed by, (seeds, 3) int32, for the parameter `name`: k0, k1 and the first word, which is 0.

    Args:
        seeds: whole numbers of which the lowest 64 bits count.
    """
    return keys_of(seeds, (name,))[0]


def keys_of(seeds: Sequence[int], names: tuple[str, ...]) -> Tensor:
    """`stream_keys` of several parameters at once, (names, seeds, 3) int32."""
    given = np.array([int(seed) & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    mixed = _mix(_mix(given) + _hashes(names)[:, None])
    made = np.zeros((*mixed.shape, 3), dtype=np.int32)
    made[..., :2] = mixed.astype("<u8").view("<i4").reshape(*mixed.shape, 2)
    return torch.from_numpy(made)


@lru_cache(maxsize=1 << 10)
def _hashes(names: tuple[str, ...]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def coefficient(value: float) -> float:
    """`value` to 20 significant bits, so that its product with any value of z is exact in float32."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 20)), exponent - 20)


def values(seed: int, name: str, shape: Sequence[int], kind: str = "normal") -> Tensor:
    """A direction itself, float32, for those who need to see it."""
    total = torch.zeros(tuple(shape), dtype=torch.int32)
    accumulate_(total, stream_keys([seed], name), torch.ones(1, dtype=torch.int32), kind)
    return total.float() / SIGMA[kind]


@torch.no_grad()
def add_(weight: Tensor, seed: int, name: str, c: float, kind: str = "normal") -> None:
    """weight += c z, in place.

    Args:
        weight: contiguous, of any shape; sums run in float32, or in float64 if that is what it is.
        c: taken to 20 bits (`coefficient`).
    """
    step = _scalar(coefficient(c) / SIGMA[check_kind(kind)])
    kernel, tensors = (
        (kernels.add_words, kernels.in_words(weight)) if kernels.has_words(weight) else (kernels.add, [weight])
    )
    _each(kernel, kind, tensors, stream_keys([seed], name)[0], step)


@torch.no_grad()
def accumulate_(total: Tensor, keys: Tensor, counts: Tensor, kind: str = "normal") -> None:
    """total += sum_s counts[s] SIGMA z_s, in place and exact modulo 2^32. One pass over memory for all seeds.

    Args:
        total: int32, contiguous.
        keys: (S, 3), of `stream_keys` for this parameter.
        counts: (S,) int32.
    """
    check_kind(kind)
    flat = total.view(-1)
    todo = [(key, count) for key, count in zip(keys, counts, strict=True) if count]
    # A block goes through all seeds before the next is read
    words = (flat.numel() + 1) // 2
    for start in range(0, words, BLOCK):
        for key, count in todo:
            _each(kernels.accumulate, kind, [flat], key, count, span=(start, min(start + BLOCK, words)))


@torch.no_grad()
def render_(
    out: Tensor,
    start: Tensor,
    total: Tensor,
    scale: float,
    key: Tensor | None = None,
    c: float = 0.0,
    kind: str = "normal",
    threshold: float = math.inf,
) -> None:
    """out = start + scale total + c z where |start| <= threshold, and start elsewhere.

    Args:
        out: in any floating dtype; rounded to it once, at the end, from float32 (or from float64, if `start` is).
        total: int32.
        scale: a power of two or its negative, so that nothing is rounded by it.
        key: (3,), of the direction; None leaves the last term out.
        c: exact to 20 bits already.
    """
    factor, bound, step = _scalar(scale), _scalar(threshold), _scalar(c / SIGMA[check_kind(kind)])
    words = kernels.has_words(out) and kernels.has_words(start)
    tensors = kernels.in_words(out, start, total) if words else [out, start, total]
    if key is None:
        _each(
            kernels.settle_words if words else kernels.settle,
            kind,
            tensors,
            torch.zeros(3, dtype=torch.int32),
            factor,
            bound,
        )
    else:
        _each(kernels.render_words if words else kernels.render, kind, tensors, key, factor, bound, step)


@torch.no_grad()
def project(vector: Tensor, keys: Tensor, kind: str = "normal") -> Tensor:
    """<z_s, vector> for every seed, (S,) float64. Sums run in float32 by blocks, so its last bits are a device's own.

    Args:
        vector: floating, contiguous.
        keys: (S, 3), of `stream_keys` for this parameter.
    """
    check_kind(kind)
    found = torch.zeros(len(keys), dtype=torch.float64)
    flat = vector.view(-1)
    words = (flat.numel() + 1) // 2
    for start in range(0, words, BLOCK):
        for place, key in enumerate(keys):
            span = (start, min(start + BLOCK, words))
            found[place] += sum(float(part) for part in _each(kernels.dot, kind, [flat], key, span=span))
    return found / SIGMA[kind]


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, of uint64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _each(
    kernel: Callable[..., Any],
    kind: str,
    tensors: Sequence[Tensor],
    key: Tensor,
    *scalars: Tensor,
    span: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Run a kernel over all words, or those in `span`, of tensors of one size; what it returned, in order."""
    device = tensors[0].device
    flat = [tensor.view(-1) for tensor in tensors]
    size = flat[0].numel()
    pairs, half = size // 2, (size + 1) // 2
    first, last = span or (0, half)
    if device.type != "cpu":
        key, scalars = key.to(device), tuple(scalar.to(device) for scalar in scalars)
    whole = min(last, pairs)
    fast = _compiled(kernel, kind, device.type) if whole - first >= COMPILED else None
    step = max(1, whole - first) if fast or device.type != "cpu" else EAGER
    found: list[Tensor] = []
    run: Callable[..., Any] = fast or kernel
    for start in range(first, whole, step):
        stop = min(start + step, whole)
        low = [tensor[start:stop] for tensor in flat]
        high = [tensor[half + start : half + stop] for tensor in flat]
        found.extend(run(kind, low, high, _starting(key, start), *scalars) or ())
    if last > pairs:  # an odd one out has a word to itself
        alone = [tensor[pairs:half] for tensor in flat]
        nobody = [tensor.clone() for tensor in alone]
        found.extend((kernel(kind, alone, nobody, _starting(key, pairs), *scalars) or ())[:1])
    return found


def _starting(key: Tensor, word: int) -> Tensor:
    """The key with another first word."""
    if word:
        key = key.clone()
        key[2] = word
    return key


@lru_cache(maxsize=1 << 10)
def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@cache
def _compiled(kernel: Callable[..., Any], kind: str, device: str) -> Callable[..., Any] | None:
    """The kernel as machine code; None where nothing can make it."""
    if os.environ.get("FEDTUNE_COMPILE") == "0" or not _compiler(device):
        return None
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, 64)  # a version for each kind and dtype; 8 would be allowed
    made = torch.compile(kernel, dynamic=True, fullgraph=True)
    failed = False

    def run(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return made(*arguments)
            except Exception as error:  # whatever a compiler can fail with; it does before anything was computed
                failed = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logging.getLogger("fedtune").warning("noise runs uncompiled, slowly: %s", reason)
        return kernel(*arguments)

    return run


def _compiler(device: str) -> bool:
    if device == "cuda":
        import importlib.util

        return importlib.util.find_spec("triton") is not None
    named = os.environ.get("CXX")
    return device == "cpu" and any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"]))
