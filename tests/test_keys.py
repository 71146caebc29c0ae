"""Keys: golden values, so that a machine or a numpy that draws otherwise is noticed."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.seeds import bits, derive_seed, permutation, uniform


def test_golden_values():
    assert derive_seed(0, "train", 1, 2) == 1398820550491826134
    assert bits(7, 3).tolist() == [16086915834549238692, 5448529601018347655, 7749434361382612120]
    assert permutation(7, 6).tolist() == [4, 1, 3, 2, 5, 0]
    # The upper 24 bits as a fraction, stretched from [0, 1) to [-1, 1): exact in float32
    assert uniform(7, (2, 1), 1.0).flatten().tolist() == [
        (16086915834549238692 >> 40) / 2**23 - 1,
        (5448529601018347655 >> 40) / 2**23 - 1,
    ]


def test_paths_that_differ_only_in_where_words_end_have_different_keys():
    keys = {
        derive_seed(0, "a", "bc"),
        derive_seed(0, "ab", "c"),
        derive_seed(0, "abc"),
        derive_seed(0, 1),
        derive_seed(0, "1"),
        derive_seed(1, 0),
        derive_seed(10),
    }
    assert len(keys) == 7


@given(st.integers(0, 2**63 - 1), st.integers(1, 200))
def test_a_permutation_holds_each_number_once(key, count):
    assert sorted(permutation(key, count).tolist()) == list(range(count))


def test_uniform_fills_its_interval_evenly():
    drawn = uniform(3, (100, 1000), 2.0)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= -2
    assert drawn.max() < 2
    # standard error of the mean of 1e5 values from U(-2, 2): (4 / sqrt(12)) / sqrt(1e5) = 0.0037
    assert abs(drawn.mean().item()) < 4 * 0.0037
    counts = np.histogram(drawn.numpy(), bins=10, range=(-2, 2))[0]
    assert abs(counts - 10_000).max() < 5 * np.sqrt(10_000)
