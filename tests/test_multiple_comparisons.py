"""Whether a difference from the best is more than noise: by tables, by hand, and as often wrong as is said."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from fedtune.report.intervals import paired_p
from fedtune.report.multiple_comparisons import common_noise, range_p, step_down

TABLES = 4000


@pytest.mark.parametrize(
    ("count", "freedom", "five", "one"),
    [(2, 2, 6.085, 14.04), (3, 2, 8.331, 19.02), (3, 4, 5.040, 8.120), (5, 8, 4.886, 6.625), (10, 18, 5.071, 6.201),
     (3, 10, 3.877, 5.270), (10, 120, 4.560, 5.299)],
)  # fmt: skip
def test_the_studentized_range_is_that_of_the_tables(count, freedom, five, one):
    """Its upper points of 5 and 1 %, as textbooks have them."""
    assert range_p(five, count, freedom) == pytest.approx(0.05, abs=1e-4)
    assert range_p(one, count, freedom) == pytest.approx(0.01, abs=3e-5)
    assert range_p(0.0, count, freedom) == pytest.approx(1)
    assert range_p(math.inf, count, freedom) == 0


def test_common_noise_by_hand():
    """0 0 / 0 4: means of entries 0 and 2, of seeds 0 and 2, of all 1; what is left is 1 -1 / -1 1, with one degree of
    freedom: sqrt(4 / 1) = 2. A seed with one entry alone says nothing of noise."""
    assert common_noise(np.array([[0, 0], [0, 4.0]])) == pytest.approx((2, 1))
    assert common_noise(np.array([[0, 0], [0, 4.0], [7, np.nan]])) == pytest.approx((2, 1))


def test_noise_with_seeds_missing_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(5, 6)) + 10 * rng.normal(size=(5, 1))
    losses[[0, 1, 4, 4], [1, 1, 3, 5]] = np.nan
    seed, entry = np.nonzero(np.isfinite(losses))
    design = np.concatenate([np.eye(5)[seed], np.eye(6)[entry]], axis=1)
    _, (rest,), rank, _ = np.linalg.lstsq(design[:, 1:], losses[seed, entry], rcond=None)
    noise, freedom = common_noise(losses)
    assert freedom == len(seed) - rank
    assert noise == pytest.approx(math.sqrt(rest / freedom))


def test_p_by_hand():
    """Seeds in rows: 0 1 3 / 0 2 3.5 / 0 0 4; means of entries 0, 1, 3.5. What is left over, in sixths: 1 1 -2 /
    -2 4 -2 / 1 -5 4, squares 72 / 36 = 2, over 4 degrees of freedom 1/2. The third is 3.5 behind and out first, with a
    range of 3.5 sqrt(3) / sqrt(1/2) = 8.573 of three: p = 0.0082, doubled 0.016. (Of its own t, 12.1, p is 0.0067: six
    times that, three pairs and two tests, is no less, and 0.016 not below it.) Then two are left: the second is 1, 2, 0
    behind, t = sqrt(3), and its p that of the paired t, doubled."""
    found = step_down(np.array([[0, 1, 3], [0, 2, 3.5], [0, 0, 4.0]]), 0)
    assert math.isnan(found[0])
    assert found[2] == pytest.approx(2 * stats.studentized_range.sf(3.5 * math.sqrt(6), 3, 4), abs=1e-6)
    assert found[2] == pytest.approx(2 * 0.0082, abs=1e-4)
    assert found[1] == pytest.approx(2 * (1 - math.sqrt(3) / math.sqrt(2 + 3)))


def test_fewer_than_two_common_seeds_say_nothing():
    nan = math.nan
    losses = np.array([[1, 2, nan, 4], [1, 2.5, nan, nan], [2, 3, 5, nan], [nan, 1, 5, 2]])
    assert np.isnan(step_down(losses, 0)).tolist() == [True, False, True, True]
    assert step_down(losses, 0)[1] == pytest.approx(paired_p([1, 1.5, 1]))
    assert np.isnan(step_down(np.ones((1, 3)), 1)).all()


def test_what_is_equal_to_the_last_bit():
    """No noise at all: a difference is one, and none is none."""
    base = np.array([[1.1], [2.2], [0.7]])
    found = step_down(base + np.array([[0, 0, 1, 1]]), 0)
    assert found[1:] == pytest.approx([1, 0, 0])


@given(
    losses=arrays.arrays(
        np.float64, st.tuples(st.integers(2, 5), st.integers(2, 6)), elements=st.integers(-8, 8).map(lambda n: n / 8)
    ),
    order=st.randoms(use_true_random=False),
)
def test_p_does_not_depend_on_the_order_and_a_seed_may_move_all(losses, order):
    """Nor is any below its own paired t."""
    p = step_down(losses, 0)
    columns = [0, *order.sample(range(1, losses.shape[1]), losses.shape[1] - 1)]
    moved = losses[::-1][:, columns] + np.arange(len(losses))[:, None]
    again = step_down(moved, 0)
    own = [paired_p(column - losses[:, 0]) for column in losses.T[1:]]
    assert (p[1:] >= np.array(own) - 1e-9).all()
    if len({*np.abs((losses - losses[:, [0]]).mean(0)[1:]).tolist()}) == losses.shape[1] - 1:  # no ties
        np.testing.assert_allclose(again, p[columns], atol=1e-7)


def found_worse(losses):
    """Of (tables, seeds, entries): the p of each table in which any entry may be told from the best, as (places, p).

    The others are told by the first steps of both tests, for all tables at once; a few of them are looked at too."""
    _, seeds, entries = losses.shape
    best = losses.mean(1).argmin(1)
    means = losses.mean(1, keepdims=True)
    left = losses - means - losses.mean(2, keepdims=True) + means.mean(2, keepdims=True)
    noise = np.sqrt((left**2).sum((1, 2)) / ((seeds - 1) * (entries - 1)))
    widths = np.ptp(means[:, 0], axis=1) * math.sqrt(seeds) / noise
    apart = losses - np.take_along_axis(losses, best[:, None, None], 2)
    deviation = apart.std(1, ddof=1)
    t = apart.mean(1) / np.where(deviation > 0, deviation, np.inf) * math.sqrt(seeds)
    alone = 2 * stats.t.sf(t.max(1), seeds - 1)
    wide = widths > stats.studentized_range.isf(0.03, entries, (seeds - 1) * (entries - 1))
    may = (alone <= 0.05) & (wide | (alone * entries * (entries - 1) <= 0.06))
    p = {int(place): step_down(losses[place], int(best[place])) for place in np.flatnonzero(may)}
    for place in np.flatnonzero(~may)[:20]:
        assert not (step_down(losses[place], int(best[place])) <= 0.05).any()
    return p


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("entries", [3, 5, 10])
def test_equal_entries_are_called_worse_in_no_more_than_5_percent_of_tables(entries, seeds):
    """Of 4000 tables 5 % are 200, and three standard deviations of that count 41. Holm over paired t, which isn't made
    for the best of several, comes to 6, 7 and 9 % with three seeds and 6, 8 and 11 % with five."""
    rng = np.random.default_rng([seeds, entries])
    losses = rng.normal(size=(TABLES, seeds, entries)) + 3 * rng.normal(size=(TABLES, seeds, 1))
    wrong = sum((p <= 0.05).any() for p in found_worse(losses).values())
    assert 0.01 * TABLES < wrong <= 0.05 * TABLES + 3 * math.sqrt(TABLES * 0.05 * 0.95)


@pytest.mark.slow
@pytest.mark.parametrize(("entries", "seeds"), [(3, 3), (10, 3), (10, 5)])
def test_an_entry_that_is_worse_by_five_deviations_is_found(entries, seeds):
    """And the equal ones are called worse no more often for it. With three seeds what hides it is the paired t alone:
    it misses one of noncentrality 5 sqrt(3 / 2) in 13 % of tables, and Holm over ten entries misses it in 81 %."""
    rng = np.random.default_rng([seeds, entries, 5])
    losses = rng.normal(size=(150, seeds, entries)) + 3 * rng.normal(size=(150, seeds, 1))
    losses[:, :, -1] += 5
    p = found_worse(losses)
    assert sum(one[-1] <= 0.05 for one in p.values()) > 0.75 * 150
    assert sum((one[:-1] <= 0.05).any() for one in p.values()) <= 0.05 * 150 + 3 * math.sqrt(150 * 0.05 * 0.95)


@pytest.mark.slow
def test_entries_that_scatter_unlike_are_seldom_told_apart():
    """Equal means, half of eight entries five times as noisy: a little over 5 %, where the range alone has 14 %."""
    rng = np.random.default_rng(8)
    losses = rng.normal(size=(2000, 3, 8)) * np.repeat([1, 5], 4)
    assert sum((p <= 0.05).any() for p in found_worse(losses).values()) <= 0.08 * 2000
