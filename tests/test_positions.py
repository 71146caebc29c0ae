"""Positions: both codes bit by bit, their sizes against the entropy, and nothing for a hostile blob to gain."""

import hashlib
import math
import random
import tracemalloc
from itertools import pairwise

import constriction
import numpy as np
import pytest
from conftest import many
from hypothesis import given
from hypothesis import strategies as st

from fedtune.codecs.positions import (
    MAX_SIZE,
    MAX_SYMBOL,
    golomb_decode,
    golomb_encode,
    golomb_parameter,
    range_decode,
    range_encode,
)
from fedtune.core.errors import WireError

CODES = {"golomb": (golomb_encode, golomb_decode), "range": (range_encode, range_decode)}
NAMES = {"golomb": "Golomb", "range": "range"}
BOTH = pytest.mark.parametrize("code", CODES)


def drawn(density, size, seed=0):
    return np.flatnonzero(np.random.default_rng(seed).random(size) < density)


def some(*positions):
    return np.array(positions, np.int64)


def entropy(density):
    """Bits a parameter of iid positions."""
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density)


def expect_lossless(code, positions, size):
    encode, decode = CODES[code]
    blob = encode(positions, size)
    decoded = decode(blob, size, len(positions))
    assert decoded.dtype == np.int64
    assert np.array_equal(decoded, positions)
    assert encode(positions, size) == blob
    return blob


def test_the_parameter_of_published_densities():
    assert [golomb_parameter(p) for p in (0.01, 0.05, 0.1, 0.2, 0.5, 1)] == [6, 4, 3, 2, 0, 0]


@pytest.mark.parametrize("density", [0, -0.1])
def test_a_density_of_nothing_has_no_parameter(density):
    with pytest.raises(ValueError, match="above 0"):
        golomb_parameter(density)


def test_the_parameter_is_the_papers_formula():
    phi = (1 + math.sqrt(5)) / 2
    for exponent in np.linspace(-14, math.log10(0.999), 5000):
        density = 10**exponent
        formula = max(0, 1 + math.floor(math.log2(math.log(phi - 1) / math.log1p(-density))))
        assert golomb_parameter(density) == formula, density


@pytest.mark.parametrize("density", [0.003, 0.01, 0.04, 0.05, 0.1, 0.15, 0.2, 0.3, 0.37, 0.39, 0.5])
def test_no_other_parameter_would_be_shorter(density):
    def bits(parameter):
        return parameter + 1 / (1 - (1 - density) ** (1 << parameter))

    assert min(range(12), key=bits) == golomb_parameter(density)


def test_golomb_bits_by_hand():
    """1, 2 and 11 of 16: density 3 / 16 has b = 2, gaps are 1, 0, 8.

    remainders 1, 0, 0    lowest bits 1 0 0, the others 0 0 0
    quotients  0, 0, 2    1, 1, 001
    From the lowest bit: 1000 0011 is c1, 001 is 04
    """
    assert golomb_encode(some(1, 2, 11), 16) == bytes.fromhex("c1 04")
    assert golomb_decode(bytes.fromhex("c1 04"), 16, 3).tolist() == [1, 2, 11]
    others = np.delete(np.arange(16), [1, 2, 11])
    assert golomb_encode(others, 16) == bytes.fromhex("c1 04")
    assert golomb_decode(bytes.fromhex("c1 04"), 16, 13).tolist() == others.tolist()


def range_by_hand(positions, size):
    """The range coder of constriction in long integers, with the chances of the module docstring."""
    n = len(positions)
    last = min(12 * size // n, size, 16383)
    tails = [(2**24 - last - 1) << 38]
    for _ in range(last):
        tails.append(tails[-1] * (size - n) // size)
    chances = [(one >> 38) - (other >> 38) + 1 for one, other in pairwise(tails)]
    chances.append((tails[-1] >> 38) + 1)
    assert sum(chances) == 2**24
    below = [0]
    for chance in chances:
        below.append(below[-1] + chance)
    gaps = [int(b) - int(a) - 1 for a, b in zip([-1, *positions[:-1]], positions, strict=True)]
    steps = [(below[min(gap, last)], chances[min(gap, last)]) for gap in gaps]
    excesses = [gap - last for gap in gaps if gap >= last]
    lengths = [max(1, (excess.bit_length() + 7) // 8) for excess in excesses]
    steps += [(length - 1 << 21, 1 << 21) for length in lengths]
    for excess, length in zip(excesses, lengths, strict=True):
        steps += [(byte << 16, 1 << 16) for byte in excess.to_bytes(length, "little")]
    low, width, words = 0, 2**64 - 1, 1
    for left, chance in steps:
        low += (width >> 24) * left
        width = (width >> 24) * chance
        if width < 2**32:
            low, width, words = low << 32, width << 32, words + 1
    point = low + 2**32 - 1 >> 32
    found = list(point.to_bytes(4 * words, "big"))
    if low + width >> 32 == point:
        found += [0] * 4
    return np.array(found, np.uint8).view(">u4").astype("<u4").tobytes()


@pytest.mark.parametrize(
    ("positions", "size"),
    [
        (some(5), 16),
        (some(0), 2),
        (some(1, 2, 11), 16),
        (drawn(0.5, 999)[:499], 999),
        (drawn(0.2, 5000), 5000),
        (drawn(0.05, 20000), 20000),
        (drawn(0.01, 50000), 50000),
        (np.arange(2000), 4000),
        (np.concatenate([np.arange(100), [225, 352, 477], np.arange(1987, 2084)]), 2084),  # M = 125: M, M + 1, M - 1
        (np.arange(2000, 4000), 4000),
        (some(17, 70000, 70001, 5 * 10**9, 10**11), 10**11 + 1),
        (some(MAX_SIZE - 1), MAX_SIZE),
    ],
    ids=str,
)
def test_range_bytes_are_those_of_long_integers(positions, size):
    """So constriction's floats hold the chances that the format has, whatever machine they are on."""
    assert expect_lossless("range", positions, size) == range_by_hand(positions, size)


@BOTH
def test_bytes_stay_what_they_are(code):
    """The first 16 hex digits; a change of them is a change of the format."""
    found = hashlib.sha256()
    for density in (0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.8):
        positions = np.flatnonzero(np.arange(60_000) ** 2 % 65537 < density * 65537)
        found.update(expect_lossless(code, positions, 60_000))
    assert found.hexdigest()[:16] == {"golomb": "2867d30306c99593", "range": "096bcbd6ecbd8209"}[code]


@BOTH
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 64])
def test_none_one_all_but_one_and_all(code, size):
    whole = np.arange(size)
    assert expect_lossless(code, whole[:0], size) == expect_lossless(code, whole, size) == b""
    for position in range(size):
        alone = expect_lossless(code, whole[position : position + 1], size)
        assert alone == expect_lossless(code, np.delete(whole, position), size) or size == 2


@BOTH
def test_every_set_of_a_few(code):
    blobs = set()
    for chosen in range(1 << 9):
        positions = np.flatnonzero([chosen >> bit & 1 for bit in range(9)])
        blobs.add((len(positions), expect_lossless(code, positions, 9)))
    assert len(blobs) == 1 << 9


@pytest.mark.slow
@BOTH
@many()
@given(st.data())
def test_any_set_comes_back(code, data):
    size = data.draw(st.one_of(st.integers(1, 400), st.integers(1, MAX_SIZE)))
    chosen = data.draw(st.sets(st.integers(0, size - 1), max_size=min(size, 60)))
    expect_lossless(code, np.array(sorted(chosen), np.int64), size)


@BOTH
@pytest.mark.parametrize("density", [1e-6, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.2, 0.38, 0.5, 0.6, 0.99])
def test_any_density_comes_back(code, density):
    for size in (4096, 1_000_003):
        expect_lossless(code, drawn(density, size), size)
        # As far from iid as it gets
        count = int(density * size)
        expect_lossless(code, np.arange(count), size)
        expect_lossless(code, np.arange(size - count, size), size)


@pytest.mark.parametrize(("density", "published"), [(0.01, 0.0911), (0.05, 0.3393), (0.1, 0.5756), (0.2, 0.9388)])
def test_golomb_with_a_sign_each_is_as_long_as_published(density, published):
    """Bits a parameter of STC: its parameter's expected length, and a sign bit."""
    size = 2_000_000
    positions = np.sort(np.random.default_rng(3).choice(size, int(density * size), replace=False))
    bits = 8 * len(golomb_encode(positions, size)) / size + density
    assert bits == pytest.approx(published, rel=0.001)


def test_golomb_of_half_is_a_bit_each():
    positions = drawn(0.5, 100_000)
    assert len(golomb_encode(positions, 100_000)) == pytest.approx(12500, abs=2)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.38, 0.5, 0.7, 0.95])
def test_sizes_against_the_entropy(density):
    size = 1_000_000
    positions = drawn(density, size)
    bits = size * entropy(len(positions) / size)
    assert 8 * len(golomb_encode(positions, size)) <= 1.043 * bits + 512
    assert 8 * len(range_encode(positions, size)) <= 1.001 * bits + 64


def test_escapes_cost_their_bytes():
    """At a density where most gaps are excesses, of three bytes: 27 bits each, and what it takes to say so."""
    size = 2**30
    positions = np.sort(np.random.default_rng(1).choice(size, 1000, replace=False))
    gaps = np.diff(positions, prepend=-1) - 1
    assert (gaps >= MAX_SYMBOL).sum() > 900
    assert len(expect_lossless("range", positions, size)) < 1000 * 3.5


def test_clustered_positions_cost_no_more_than_spread_ones():
    """Ten parts of unlike densities: Golomb's one parameter costs over the entropy of positions that are spread, the
    range code comes below it."""
    size, densities = 200_000, [0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.05, 0.08, 0.1, 0.15]
    parts = [drawn(density, size, seed) + seed * size for seed, density in enumerate(densities)]
    positions = np.concatenate(parts)
    bits = 10 * size * entropy(len(positions) / (10 * size))
    assert 8 * len(expect_lossless("range", positions, 10 * size)) < bits
    assert 8 * len(expect_lossless("golomb", positions, 10 * size)) > 1.01 * bits


@BOTH
@pytest.mark.parametrize(
    ("positions", "size", "said"),
    [
        (some(0, 1), 1, "2 positions of 1"),
        (some(), -1, "0 positions of -1"),
        (some(3), MAX_SIZE + 1, "<= size <= 281474976710656"),
        (some(3, 3), 9, "sorted, unique and in range(9)"),
        (some(4, 3), 9, "sorted, unique"),
        (some(-1, 3), 9, "sorted, unique"),
        (some(3, 9), 9, "sorted, unique"),
        (some(5, -(2**63)), 9, "sorted, unique"),
        (np.array([1, 2], np.int32), 9, "should be int64 in one dimension, got int32 (2,)"),
        (some(1, 2)[None], 9, "got int64 (1, 2)"),
    ],
)
def test_what_is_no_set_of_positions_is_refused_when_sent(code, positions, size, said):
    with pytest.raises(WireError) as caught:
        CODES[code][0](positions, size)
    assert said in str(caught.value)


TERA = 1 << 40


@pytest.mark.parametrize(
    ("code", "blob", "size", "count", "said"),
    [
        ("golomb", b"", 16, 17, "17 positions of 16: expected 0 <= count"),
        ("golomb", b"", 16, -1, "-1 positions of 16"),
        ("golomb", b"", 2 * MAX_SIZE, 3, "3 positions of"),
        ("golomb", b"\x00", 16, 0, "no bytes expected"),
        ("golomb", b"\x00", 16, 16, "no bytes expected"),
        ("golomb", b"\x00", 0, 0, "no bytes expected"),
        ("golomb", b"\xc1", 16, 3, "at least 2 bytes expected"),
        ("golomb", b"\xc1\x04\x00", 16, 3, "at most 2 bytes expected"),
        ("golomb", b"\xc1\x00", 16, 3, "it has 2 quotients, 3 expected"),
        ("golomb", b"\xc1\x84", 16, 3, "it has 4 quotients, 3 expected"),
        ("golomb", b"\xc1\x20", 16, 3, "its last position is not below 16"),
        ("golomb", b"\x38\x00", 10, 3, "it goes on after its last quotient"),
        ("golomb", b"", TERA, TERA // 3, "at least"),
        ("golomb", b"\xff" * 20, TERA, TERA // 3, "at least"),
        ("golomb", bytes(9999), MAX_SIZE, 1, "at most"),
        ("range", b"", 16, 17, "17 positions of 16: expected 0 <= count"),
        ("range", b"", 16, -1, "-1 positions of 16"),
        ("range", b"", 2 * MAX_SIZE, 3, "3 positions of"),
        ("range", b"\x00" * 4, 16, 0, "no bytes expected"),
        ("range", b"\x00" * 4, 16, 16, "no bytes expected"),
        ("range", b"", 16, 3, "another code"),
        ("range", b"\x00" * 3, 16, 3, "a multiple of 4 bytes expected"),
        ("range", b"\x00" * 8, 16, 3, "another code"),
        ("range", b"\xff" * 8, 16, 3, "no symbols have its bytes"),
        ("range", b"\xbc\xb8\x12\x87", 28, 23, "its last position is not below 28"),
        ("range", b"", TERA, TERA // 3, "at least"),
        ("range", b"\xff" * 20, TERA, TERA // 3, "at least"),
    ],
)
def test_a_hostile_blob_is_refused_by_name_and_costs_nothing(code, blob, size, count, said):
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            CODES[code][1](blob, size, count)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"not the {NAMES[code]} code of {count} positions of {size} (")
    assert f" ({len(blob)} bytes): " in str(caught.value)
    assert said in str(caught.value)


def one_of_two(code, blob, size, count):
    """Whether the blob decoded; then it must be the one blob of what came out. Anything but WireError is a failure."""
    encode, decode = CODES[code]
    try:
        decoded = decode(blob, size, count)
    except WireError:
        return False
    assert len(decoded) == count
    assert encode(decoded, size) == blob
    return True


def test_as_many_golomb_blobs_as_sets():
    """No blob of a byte is left over: each is refused or has a set of its own."""
    for size in range(8):
        for count in range(size + 1):
            blobs = [b"", *(bytes([byte]) for byte in range(256))]
            assert sum(one_of_two("golomb", blob, size, count) for blob in blobs) == math.comb(size, count)


@BOTH
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
def test_no_cut_and_no_flipped_bit_gets_past_the_decoder(code, density):
    size = 400
    positions = drawn(density, size)
    count = len(positions)
    blob = CODES[code][0](positions, size)
    assert one_of_two(code, blob, size, count)
    assert not any(one_of_two(code, blob + more, size, count) for more in (b"\x00", b"\xff", b"\x00" * 4, blob))
    # The decoder sees a cut only as another set
    passed = sum(one_of_two(code, blob[:length], size, count) for length in range(len(blob)))
    assert passed <= (code == "range")
    for place in range(len(blob)):
        for bit in range(8):
            flipped = bytearray(blob)
            flipped[place] ^= 1 << bit
            passed += one_of_two(code, bytes(flipped), size, count)
    assert passed < 8 * len(blob)
    for other in range(size + 2):
        one_of_two(code, blob, size, other)
        one_of_two(code, blob, other, count)


def mutate(source, blob):
    blob = bytearray(blob)
    for _ in range(source.randint(1, 3)):
        place, length = source.randrange(len(blob) + 1), source.choice([1, 2, 4, 8])
        kind = source.randrange(4)
        if kind == 0 and place < len(blob):
            blob[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            del blob[place : place + length]
        elif kind == 2:
            blob[place:place] = source.randbytes(length)
        else:
            blob[place : place + length] = source.choice([b"\x00", b"\xff"]) * length
    return bytes(blob)


@pytest.mark.slow
@BOTH
def test_two_thousand_damaged_and_made_up_blobs(code):
    source = random.Random(7)
    seeds = []
    for size, density in ((300, 0.1), (2000, 0.02), (150, 0.5), (90, 0.8), (MAX_SIZE, 0)):
        positions = drawn(density, size) if density else some(3, 10**6, 10**14)
        seeds.append((CODES[code][0](positions, size), size, len(positions)))
    passed = 0
    for _ in range(1000):
        blob, size, count = source.choice(seeds)
        passed += one_of_two(code, mutate(source, blob), size, count)
        size = source.choice([source.randint(1, 30), MAX_SIZE])
        count = source.randint(0, min(size, 30))
        blob = bytes(byte & source.randrange(256) for byte in source.randbytes(source.choice([1, 2, 3, 4, 8, 12])))
        passed += one_of_two(code, blob, size, count)
    # Both outcomes are seen, so the fuzz reaches past the lengths. What the range coder ends in is nearly a checksum
    assert 0 < passed < 1950


@pytest.mark.slow
@BOTH
@many()
@given(st.data())
def test_anything_is_a_set_or_an_error(code, data):
    size = data.draw(st.one_of(st.integers(0, 60), st.integers(0, MAX_SIZE)))
    count = data.draw(st.integers(0, min(size, 50)))
    one_of_two(code, data.draw(st.binary(max_size=80)), size, count)


@BOTH
@pytest.mark.parametrize("fill", [b"\x00", b"\xff", b"\x55", b"\xfe"])
def test_memory_is_a_few_times_the_blob_and_the_positions(code, fill):
    """Wherever the decoder finds out: at the most bytes there may be for a count and at the fewest."""
    for count in (100, 100_000):
        for length in (count // 8, count // 2, count, 10 * count):
            blob = fill * (length - length % 4)
            tracemalloc.start()
            one_of_two(code, blob, 100 * count, count)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < (2 << 20) + 20 * len(blob) + 80 * count


@BOTH
def test_memory_is_a_few_times_the_positions(code):
    positions = drawn(0.05, 4_000_000)
    tracemalloc.start()
    blob = expect_lossless(code, positions, 4_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(blob) < len(positions)
    assert peak < 8 * positions.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("positions", [np.arange(50_000), np.arange(0, 100_000, 2), np.arange(50_000, 100_000)])
def test_no_range_blob_is_below_a_bit_a_position(positions):
    """Or its decoder would refuse it for its length. Here all gaps, or all but one, are the likeliest there is."""
    for count in range(1, 200):
        expect_lossless("range", positions[:count], 2 * count + int(positions[count - 1]))
    expect_lossless("range", positions, 100_000)


def test_a_panic_is_a_wire_error_and_an_interrupt_is_not(monkeypatch):
    class PanicException(BaseException):
        """As pyo3 names it."""

    def raising(error):
        def decoder(words):
            raise error

        return decoder

    queue = constriction.stream.queue
    monkeypatch.setattr(queue, "RangeDecoder", raising(PanicException("index out of bounds")))
    with pytest.raises(WireError, match="no symbols have its bytes"):
        range_decode(b"\x00" * 4, 16, 3)
    monkeypatch.setattr(queue, "RangeDecoder", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        range_decode(b"\x00" * 4, 16, 3)
