"""Noise against an implementation in Python's own integers, against its moments, and against itself on other paths.

One word makes two elements: the even one of its low half, and the odd one of its high half.
"""

import hashlib
from math import comb, erf, sqrt

import numpy as np
import pytest
import torch
from directions import KURTOSIS, moved, values
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.errors import ConfigError
from fedtune.random_directions import hash_noise as noise
from fedtune.random_directions import kernels

# A kernel for each kind and type is compiled, which takes minutes
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled")]
KINDS = sorted(noise.SIGMA)
each_kind = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASK32, MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
# More than a kernel is compiled for
SIZE = 7 * 512 + 3
SIZES = [SIZE, 8 * 512]  # with a padded copy, and without


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def by_hand(seed, name, size, kind):
    """The definition in noise.py's docstring, a number at a time."""
    named = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    key = mix((mix(seed & MASK64) + named) & MASK64)
    k0, k1 = key & MASK32, key >> 32
    found = []
    for element in range(size):
        x = ((element // 2 * 0x9E3779B1) & MASK32) ^ k0
        x = ((x ^ x >> 16) * 0x7FEB352D) & MASK32
        x = (((x ^ x >> 15) + k1) * 0x846CA68B) & MASK32
        x ^= x >> 16
        bits = x >> 16 if element % 2 else x & 0xFFFF
        found.append((1 if bits >> 15 == 0 else -1) if kind == "rademacher" else (bits.bit_count() - 8) / 2)
    return found


@pytest.fixture
def eager(monkeypatch):
    """Run what follows without a compiler, in pieces of this many rows."""

    def piecewise(rows):
        monkeypatch.setattr(noise, "_compiled", lambda *arguments: None)
        monkeypatch.setattr(noise, "EAGER", rows)

    return piecewise


@each_kind
@pytest.mark.parametrize("size", [0, 1, 7, 257, 512, 1300])
def test_values_are_the_definitions(kind, size):
    expected = by_hand(12345, "layers.0.weight", size, kind)
    assert values(12345, "layers.0.weight", (size,), kind).tolist() == expected


def test_golden():
    """These never change: a stored model is nothing without them."""
    assert values(1, "w", (8,)).tolist() == GOLDEN["normal"]
    assert values(1, "w", (8,), "rademacher").tolist() == GOLDEN["rademacher"]
    for kind in KINDS:
        many = values(2**63 + 5, "model.embed_tokens.weight", (333, 101), kind)
        assert hashlib.sha256(many.numpy().tobytes()).hexdigest()[:16] == GOLDEN[kind + " sha256"]


GOLDEN = {
    "normal": [-1.5, 0.0, 0.0, -1.0, 2.0, 0.5, -1.0, 0.0],
    "rademacher": [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0],
    "normal sha256": "8dc61d64f3b78af7",
    "rademacher sha256": "6239f149e376be76",
}


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_fused_sum_has_the_same_bits_compiled_and_in_any_pieces(kind, dtype, size, eager):
    torch.manual_seed(0)
    start = torch.randn(size).to(dtype)
    compiled = moved(start, 9, "w", 0.0371, kind)
    assert not torch.equal(compiled, start)
    for rows in (1, 3, 10**9):
        eager(rows)
        assert torch.equal(moved(start, 9, "w", 0.0371, kind), compiled)


@each_kind
@pytest.mark.parametrize("size", SIZES)
def test_the_fused_sum_is_that_of_numpy(kind, size):
    """w + c z in float32 with one rounding, for c z is exact; bfloat16 then rounds once more."""
    torch.manual_seed(0)
    c = noise.coefficient(0.0371)
    w, z = torch.randn(size), values(3, "w", (size,), kind)
    exact = w.double() + c * z.double()
    expected = exact.float()
    narrow = w.bfloat16()
    wanted = (narrow.double() + c * z.double()).float().bfloat16()
    assert torch.equal(moved(w, 3, "w", 0.0371, kind), expected)
    assert torch.equal(moved(narrow, 3, "w", 0.0371, kind), wanted)


@pytest.mark.skipif(not noise._compiler("cpu"), reason="no C++ compiler here")
def test_where_there_is_a_compiler_it_is_used(caplog):
    """Otherwise the tests above compare eager with eager."""
    assert noise._compiled(kernels.render, "cpu") is not None
    moved(torch.zeros(SIZE), 1, "w", 1.0)
    assert "uncompiled" not in caplog.text


def test_a_compiler_that_fails_is_no_harm(monkeypatch, caplog):
    def broken(*arguments, **options):
        def fail(*arguments):
            raise RuntimeError("no such header\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(noise, "_compiled", noise._compiled.__wrapped__)
    expected = noise.coefficient(0.5) * values(1, "w", (SIZE,))
    assert torch.equal(moved(torch.zeros(SIZE), 1, "w", 0.5), expected)
    assert "no such header" in caplog.text


@each_kind
def test_moments(kind):
    """2^22 draws: the mean within 4.5 / sqrt(N) of 0, the variance within 4.5 sqrt((kappa - 1) / N) of 1, and so on."""
    count = 1 << 22
    z = values(7, "w", (count,), kind).double()
    one = 4.5 / count**0.5
    kurtosis = KURTOSIS[kind]
    assert abs(z.mean()) < one
    assert abs(z.square().mean() - 1) < 4.5 * ((kurtosis - 1) / count) ** 0.5 + 1e-12
    assert abs((z**3).mean()) < 4.5 * (float((z**6).mean()) / count) ** 0.5
    assert abs((z**4).mean() - kurtosis) < 4.5 * (float((z**8).mean() - kurtosis**2) / count) ** 0.5 + 1e-12


def test_the_normal_kind_is_binomial():
    """Frequencies of 16 fair bits, chi-squared with 16 degrees of freedom: above 45 in 1 of 7,000 cases."""
    count = 1 << 22
    z = values(11, "w", (count,))
    seen = np.bincount((z.numpy() * 2 + 8).astype(int), minlength=17)
    expected = np.array([comb(16, k) / 2**16 for k in range(17)]) * count
    assert ((seen - expected) ** 2 / expected).sum() < 45
    below = np.cumsum(expected / count)
    normal = np.array([(1 + erf((k - 8) / 2 / sqrt(2))) / 2 for k in range(17)])
    assert max(np.abs(below - normal).max(), np.abs(below[:-1] - normal[1:]).max()) == pytest.approx(0.0982, abs=1e-4)


@each_kind
def test_directions_are_uncorrelated(kind):
    """Between seeds that differ by 1 or by one high bit, names, neighbours and halves: |mean z z'| < 5 / sqrt(N)."""
    count = 1 << 18
    z = values(0, "layers.0", (count,), kind).double()
    others = [(1, "layers.0"), (2, "layers.0"), (1 << 40, "layers.0"), (0, "layers.1"), (0, "")]
    for seed, name in others:
        assert abs((z * values(seed, name, (count,), kind)).mean()) < 5 / count**0.5
    for lag in (1, 2, 64, 576, 1 << 10, 1 << 17):  # 2^17: the two halves of one word
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / (count - lag) ** 0.5
    sums = torch.stack([values(seed, "w", (1024,), kind).sum() / 32 for seed in range(256)])
    assert sums.var() == pytest.approx(1, abs=5 * (2 / 256) ** 0.5)  # the sums of 256 seeds differ as they should


TABLE = {"a": 700, "b": 1, "c": 512, "d": 1025}


def summed(table, seeds, counts, kind="normal", names=None):
    sums = table.sums()
    noise.accumulate_(table, sums, seeds, counts, kind, names)
    return {name: table.total(sums, name).tolist() for name in table.sizes}


def by_values(table, seeds, counts, kind="normal"):
    """sum_s n_s SIGMA z_s from the directions themselves, modulo 2^32."""
    found = {}
    for name, size in table.sizes.items():
        whole = sum(
            n * (values(s, name, (size,), kind) * noise.SIGMA[kind]).long() for s, n in zip(seeds, counts, strict=True)
        )
        found[name] = ((whole + 2**31) % 2**32 - 2**31).tolist()
    return found


@each_kind
@settings(max_examples=25)
@given(counts=st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=6), data=st.data())
def test_sums_are_exact_in_any_order(kind, counts, data):
    table, seeds = noise.Table(TABLE), list(range(len(counts)))
    order = data.draw(st.permutations(seeds))
    expected = by_values(table, seeds, counts, kind)
    assert summed(table, seeds, counts, kind) == expected
    assert summed(table, order, [counts[place] for place in order], kind) == expected


def test_sums_by_blocks_have_the_bits_of_sums_at_once(monkeypatch, eager):
    table, counts = noise.Table(TABLE), [3, 0, -7, 2**20, 1]
    whole = summed(table, range(5), counts)
    for block in (1, 2, 3):
        monkeypatch.setattr(noise, "BLOCK", block)
        assert summed(table, range(5), counts) == whole
    eager(1)
    assert summed(table, range(5), counts) == whole


def test_sums_of_some_parameters_leave_the_others():
    table = noise.Table(TABLE)
    some, whole = summed(table, [4], [9], names=["d", "b"]), summed(table, [4], [9])
    assert some == {"a": [0] * 700, "b": whole["b"], "c": [0] * 512, "d": whole["d"]}


def test_sums_wrap_around_as_32_bits_do():
    table = noise.Table({"w": 6})
    assert summed(table, [0, 0, 0], [2**31 - 1, 5, 2**30], "rademacher") == by_values(
        table, [0, 0, 0], [2**31 - 1, 5, 2**30], "rademacher"
    )


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_rendering(kind, dtype, eager):
    """w0 + 2^-20 T + c z below the threshold and w0 itself above it, compiled and in pieces."""
    torch.manual_seed(0)
    table, c = noise.Table(TABLE), noise.coefficient(0.013)
    start, sums = table.zeros(dtype), table.sums()
    start.copy_(torch.randn(start.shape))
    for half in sums:
        half.copy_(torch.randint(-(2**20), 2**20, half.shape))
    total = torch.stack(sums, 2).flatten(1)
    bound = table.spread(torch.tensor([[0.75], [0.0], [1.5], [float("inf")]], dtype=torch.float64))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    moved = (start.double() + total.double() * 2.0**-20).to(wide)
    z = table.zeros(torch.float64)
    for name, size in TABLE.items():
        table.part(z, name).copy_(values(4, name, (size,), kind))
    noisy = (moved.double() + c * z).to(wide).to(dtype)
    for seed, expected in ((None, moved.to(dtype)), (4, noisy)):
        wanted = torch.where(start.double().abs() > bound, start, expected)
        for pieces in (None, 1, 2):
            with pytest.MonkeyPatch.context() as patch:
                if pieces:
                    patch.setattr(noise, "_compiled", lambda *arguments: None)
                    patch.setattr(noise, "EAGER", pieces)
                out = table.zeros(dtype)
                noise.render_(table, out, start, sums, 2.0**-20, seed, c, kind, bound)
            for name in TABLE:
                assert torch.equal(table.part(out, name), table.part(wanted, name)), (name, pieces)


@each_kind
def test_projections(kind):
    vector = torch.linspace(-1, 2, SIZE)
    expected = [float(values(seed, "w", (SIZE,), kind).double() @ vector.double()) for seed in range(3)]
    assert noise.project(vector, range(3), "w", kind).tolist() == pytest.approx(expected, rel=1e-4)
    assert noise.project(vector.double(), range(3), "w", kind).tolist() == pytest.approx(expected, rel=1e-12)


@given(st.floats(-1e30, 1e30).filter(lambda c: c == 0 or abs(c) > 1e-30))
def test_coefficients_have_20_bits(c):
    taken = noise.coefficient(c)
    assert abs(taken - c) <= 2.0**-20 * abs(c)
    for number in range(-8, 9):  # exact in float32, so that a fused multiplication rounds no less
        assert float(np.float32(taken) * np.float32(number)) == taken * number
    assert noise.coefficient(taken) == taken


def test_one_sha256_whatever_the_threads_and_the_compiler(monkeypatch):
    """By kernels for one thread and for two, and without a compiler. In other processes it is GOLDEN's."""
    from torch._dynamo.utils import counters  # with the compiler, which other files need not import

    def found():
        table = noise.Table({"w": 300_001})
        sums, out = table.sums(), table.zeros(torch.bfloat16)
        noise.render_(table, out, torch.ones_like(out), sums, 1.0, 5, 0.01)
        noise.accumulate_(table, sums, range(4), [1, -2, 3, 9])
        content = out.view(torch.int16).numpy().tobytes() + table.total(sums, "w").numpy().tobytes()
        return hashlib.sha256(content).hexdigest()

    threads, hashes, made = torch.get_num_threads(), set(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            before = counters["stats"]["unique_graphs"]
            hashes.add(found())
            made.append(counters["stats"]["unique_graphs"] - before)
    finally:
        torch.set_num_threads(threads)
    assert made[1] == 2 or not noise._compiler("cpu"), "each of both kernels, for two threads"
    monkeypatch.setenv("FEDTUNE_COMPILE", "0")
    noise._compiled.cache_clear()
    hashes.add(found())
    noise._compiled.cache_clear()
    assert len(hashes) == 1


def test_an_unknown_distribution_is_named():
    with pytest.raises(ConfigError, match="noise=cauchy is not known: expected normal or rademacher"):
        moved(torch.zeros(3), 0, "w", 1.0, "cauchy")
