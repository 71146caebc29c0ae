"""Whether seeded noise is as good as drawn: what fair draws show in less than one of a million tests, it doesn't show.

Every test looks at many figures that are about normal for fair draws, and holds the largest against the bound that one
of so many passes by chance in 10^-6 of all cases (Bonferroni). Seeds are fixed, so each test passes or fails for good;
`by_ones` is the hash with its words counted by ones instead of in steps of STEP, which has to fail.
"""

import itertools

import numpy as np
import pytest
import torch
from directions import values
from scipy import fft
from scipy.stats import chi2, norm

from fedtune.random_directions import hash_noise as noise
from fedtune.random_directions import kernels

COUNT = 1 << 21  # words, of two elements each
LAGS = 4096  # words
SEEDS = (0, 2**40 + 7)
each_seed = pytest.mark.parametrize("seed", SEEDS)


def bound(figures):
    """That the largest of so many standard normal figures is above, on either side, in one of a million cases."""
    return norm.isf(1e-6 / figures / 2)


def words(seed, count=COUNT, name="layers.0.weight"):
    table = noise.Table({name: 2 * count})
    made = kernels.words(noise._places(table.device), table.spread(table.keys([seed])[0]), table.word)
    return made.flatten().numpy().view(np.uint32)[:count]


def by_ones(seed, count=COUNT, name="layers.0.weight"):
    key = noise.Table({name: 2}).keys([seed])[0]
    return (
        kernels.words(torch.arange(count, dtype=torch.int32), key, torch.zeros(1, 1, dtype=torch.int32))
        .view(-1)
        .numpy()
        .view(np.uint32)
    )


def halves(made, kind):
    """The values that words are made into, of mean 0 and variance 1: those of even and of odd elements."""
    found = []
    for half in (made & 0xFFFF, made >> 16):
        signs, counts = 1.0 - 2.0 * (half >> 15), (np.bitwise_count(half.astype(np.uint16)) - 8.0) / 2
        found.append((signs if kind == "rademacher" else counts).astype(np.float32))
    return found


def over_lags(values, lags):
    """sum_i one_i other_i+l / sqrt(terms) at lags l = 1 ... `lags`, by a Fourier transform: standard normal, if fair.
    For every one and other of `values`, be they the same."""
    size = fft.next_fast_len(len(values[0]) + lags, real=True)
    waves = [fft.rfft(some, size) for some in values]
    terms = np.sqrt(len(values[0]) - np.arange(1, lags + 1))
    pairs = itertools.combinations_with_replacement(waves, 2)
    return np.concatenate([fft.irfft(np.conj(one) * other, size)[1 : lags + 1] / terms for one, other in pairs])


def bytes_apart(made):
    """Chi-squared of how often each value comes: of the four bytes with 255 degrees of freedom, as standard normal."""
    found = []
    for place in range(4):
        seen = np.bincount((made >> (8 * place)) & 255, minlength=256)
        p = chi2.sf(((seen - len(made) / 256) ** 2).sum() / (len(made) / 256), 255)
        found.append(norm.isf(np.clip(p, 1e-300, 1 - 1e-16)))
    return np.array(found)


def test_the_words_are_those_that_values_are_made_of():
    for kind in noise.SIGMA:
        even, odd = halves(words(5, 500), kind)
        expected = values(5, "layers.0.weight", (1000,), kind).numpy()
        assert np.array_equal(np.stack([even, odd], 1).reshape(-1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", noise.SIGMA)
@each_seed
def test_no_two_words_at_any_lag_are_alike(seed, kind):
    assert np.abs(over_lags(halves(words(seed), kind), LAGS)).max() < bound(3 * LAGS * len(SEEDS))


@each_seed
def test_every_byte_has_every_value_as_often(seed):
    assert np.abs(bytes_apart(words(seed))).max() < bound(4 * len(SEEDS))


@each_seed
def test_bits_are_balanced_and_no_two_of_a_word_are_alike(seed):
    made = words(seed, 1 << 18)
    bits = 1 - 2 * ((made[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float32)
    assert np.abs(bits.sum(0, dtype=np.float64)).max() / len(made) ** 0.5 < bound(32 * len(SEEDS))
    pairs = np.triu(bits.T @ bits, 1) / len(made) ** 0.5
    assert np.abs(pairs).max() < bound(496 * len(SEEDS))


@pytest.mark.parametrize("kind", noise.SIGMA)
def test_seeds_and_names_that_are_near_one_another_give_unlike_directions(kind):
    """Place by place, 96 directions of 2^15 values; and four of 2^17 at any lag, as one might be another put off."""
    near = [*range(32), *(1 << bit for bit in range(5, 64))]
    made = [np.concatenate(halves(words(seed, 1 << 14), kind)) for seed in near]
    made += [np.concatenate(halves(words(0, 1 << 14, name), kind)) for name in ("a", "b", "layers.1.weight", "")]
    apart = np.triu(np.array(made) @ np.array(made).T, 1) / len(made[0]) ** 0.5
    assert np.abs(apart).max() < bound(len(made) * (len(made) - 1) / 2)
    apart = [halves(words(seed, 1 << 17), kind)[0] for seed in (0, 1, 1 << 32, 1 << 63)]
    assert np.abs(over_lags(apart, 1 << 16)).max() < bound(10 << 16)


@each_seed
def test_what_is_looked_for_is_found_in_words_that_are_counted_by_ones(seed):
    made = by_ones(seed)
    assert np.abs(over_lags(halves(made, "rademacher")[:1], LAGS)).max() > bound(3 * LAGS * len(SEEDS))
    assert np.abs(bytes_apart(made)).max() > bound(4 * len(SEEDS))
