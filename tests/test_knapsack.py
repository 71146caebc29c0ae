"""Selections against every choice that there is, or an integer program where these are too many, and what a list that
had to be thinned still promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from fedtune.core.costs import Weight
from fedtune.core.errors import ConfigError
from fedtune.planning import knapsack
from fedtune.planning.knapsack import _unbeaten, selections

RANKS = [1, 2, 4, 8, 16]
SIDES = [(8, 8), (4, 8), (16, 8), (8, 16)]


def base(blocks, per_block=4):
    return [Weight(f"{block}.{i}", block, *SIDES[i % 4]) for block in range(blocks) for i in range(per_block)]


def worths(weights, ranks=RANKS, seed=0):
    rng = np.random.default_rng(seed)
    return rng.exponential(size=(len(weights), len(ranks))).cumsum(axis=1)


def taken(weights, ranks, values, chosen):
    """l, P, T and value, from the ranks by module."""
    by_name = {weight.module: (weight, value) for weight, value in zip(weights, values, strict=True)}
    of = [(*by_name[module], rank) for module, rank in chosen.items()]
    return (
        min(weight.block for weight, _, _ in of),
        sum(rank * (weight.rows + weight.columns) for weight, _, rank in of),
        sum(4.0 * weight.columns + 4.0 * rank for weight, _, rank in of),
        sum(value[ranks.index(rank)] for _, value, rank in of),
    )


def every(weights, ranks):
    """The ranks by module of every choice but to adapt nothing."""
    for choice in itertools.product([0, *ranks], repeat=len(weights)):
        if any(choice):
            yield {weight.module: rank for weight, rank in zip(weights, choice, strict=True) if rank}


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_beats_all_of_a_short_list(seed):
    weights, ranks = base(2, 2), RANKS[:4]
    values = np.round(worths(weights, ranks, seed))  # whole, so that there are equals
    made = selections(weights, ranks, values)
    listed = np.stack([-made.block, made.parameters, made.per_token_bytes, -made.value])  # less is better
    for chosen in every(weights, ranks):
        block, parameters, per_token, value = taken(weights, ranks, values.tolist(), chosen)
        assert (listed <= np.array([[-block], [parameters], [per_token], [-value]])).all(axis=0).any(), chosen
    assert all(run.ladder < 0 for run in made.runs)


def by_milp(weights, values, parameters, per_token, block):
    """The largest value within these P and T that adapts no block below that, from HiGHS: a variable in 0 and 1 for
    each weight and rank."""
    takes = [
        [[rank * (weight.rows + weight.columns) for rank in RANKS] for weight in weights],
        [[4.0 * weight.columns + 4.0 * rank for rank in RANKS] for weight in weights],
    ]
    one_rank_each = np.kron(np.eye(len(weights)), np.ones(len(RANKS)))
    found = milp(
        -values.ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, np.repeat([float(weight.block >= block) for weight in weights], len(RANKS))),
        constraints=[
            LinearConstraint(np.reshape(takes, (2, -1)), ub=[parameters, per_token]),
            LinearConstraint(one_rank_each, ub=1),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.success, found.message
    return -found.fun


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "per_block", "whole", "least"), [(3, 4, True, 1), (8, 7, False, 0.97)])
@pytest.mark.parametrize("seed", range(2))
def test_a_device_gets_what_an_integer_program_finds(blocks, per_block, whole, least, seed, monkeypatch):
    """Of 6^12 choices the best whatever the device, as long as the list is whole; of 6^56, in a list that was thinned,
    one of nearly its value."""
    if whole:
        monkeypatch.setattr(knapsack, "LIMIT", 10**9)
    weights = base(blocks, per_block)
    made = selections(weights, RANKS, worths(weights, seed=seed))
    assert all(run.ladder < 0 for run in made.runs) == whole
    draw = np.random.default_rng(seed)
    for _ in range(5):
        parameters = draw.uniform(0.02, 1) * made.parameters.max()
        per_token = draw.uniform(0.02, 1) * made.per_token_bytes.max()
        block = draw.integers(blocks)
        fits = (made.parameters <= parameters) & (made.per_token_bytes <= per_token) & (made.block >= block)
        best = by_milp(weights, made.values, parameters, per_token, block)
        assert least * best * (1 - 1e-12) <= made.value[fits].max(initial=0) <= best * (1 + 1e-12)


@pytest.mark.parametrize(("blocks", "limit"), [(2, 2048), (6, 64)])
def test_a_selection_takes_what_its_ranks_take(blocks, limit, monkeypatch):
    monkeypatch.setattr(knapsack, "LIMIT", limit)
    monkeypatch.setattr(knapsack, "CELLS", 6)
    weights = base(blocks)
    values = worths(weights)
    made = selections(weights, RANKS, values)
    order = [weight.module for weight in weights]
    for i in range(0, len(made.value), max(1, len(made.value) // 500)):
        chosen = made.ranks_of(i)
        told = (made.block[i], made.parameters[i], made.per_token_bytes[i], made.value[i])
        assert told == pytest.approx(taken(weights, RANKS, values.tolist(), chosen), rel=1e-12)
        assert list(chosen) == sorted(chosen, key=order.index)
        assert all(isinstance(rank, int) for rank in chosen.values())


@pytest.mark.slow
def test_what_takes_least_and_what_gives_most_are_there_however_short_the_list(monkeypatch):
    monkeypatch.setattr(knapsack, "LIMIT", 20)
    monkeypatch.setattr(knapsack, "CELLS", 3)
    weights = base(5)
    values = worths(weights)
    made = selections(weights, RANKS, values)
    chosen = [made.ranks_of(i) for i in range(len(made.value))]
    for weight in weights:
        assert {weight.module: 1} in chosen
    assert dict.fromkeys([weight.module for weight in weights], 16) in chosen


@pytest.mark.slow
def test_ladders_rise_and_reach_their_block():
    weights = base(12)
    made = selections(weights, RANKS, worths(weights))
    ladders = [run for run in made.runs if run.ladder >= 0]
    assert len(ladders) == 12 * knapsack.PRICES
    for run in ladders:
        part = slice(run.start, run.stop)
        for of in (made.parameters, made.per_token_bytes, made.value):
            assert (np.diff(of[part]) >= 0).all()
        assert {min(int(name.split(".")[0]) for name in made.ranks_of(run.start))} == {run.block}
    for run in made.runs:
        if run.ladder < 0:
            assert (np.diff(made.value[run.start : run.stop]) <= 0).all()
    assert made.runs[-1].stop == len(made.value)


@given(
    st.lists(st.tuples(*[st.integers(0, 6).map(float)] * 3), min_size=1, max_size=60),
    st.sampled_from([1, 3, 256]),
)
def test_the_unbeaten_are_those_that_no_other_beats(states, chunk):
    """In pairs, one by one; of equals one stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "CHUNK", chunk)
        kept = _unbeaten(*(np.array(column) for column in zip(*states, strict=True)))
    meant = {
        one
        for one in states
        if not any(
            other != one and other[0] <= one[0] and other[1] <= one[1] and other[2] >= one[2] for other in states
        )
    }
    assert sorted(states[i] for i in kept) == sorted(meant)


def test_sums_of_equal_values_are_equal_in_any_order():
    """0.1, 0.2 and 0.3 in floating point add up to two different sums; rounded to 53 bits of their sum, to one."""
    weights = [Weight(name, block, 2, 2) for block, name in enumerate("abc")]
    values = np.array([[0.1], [0.2], [0.3]])
    made = selections(weights, [1], values)
    backward = selections(weights, [1], values[::-1])
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
    assert made.value.max() == backward.value.max() == pytest.approx(0.6, rel=1e-15)
    assert len(made.worth(made.value.max())) == 1


def test_what_is_worth_nothing_can_still_be_selected():
    made = selections(base(2, 1), [1, 2], np.zeros((2, 2)))
    assert made.ranks_of(0) == {"1.0": 1}
    assert made.value.tolist() == [0]


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(1e-300, 1e300))
def test_values_of_any_size_will_do(seed, size):
    weights = base(2, 2)
    values = worths(weights, RANKS, seed)
    made, plain = (selections(weights, RANKS, each) for each in (values * size, values))
    assert made.value.max() == pytest.approx(plain.value.max() * size, rel=1e-9)


def test_fewer_ranks_are_selections_of_their_own():
    weights = base(2, 2)
    made = selections(weights, RANKS, worths(weights))
    assert made.within(16) is made.within(float("inf")) is made
    assert made.within(0.5) is None
    few = made.within(3)
    assert few.ranks == (1, 2)
    assert max(max(few.ranks_of(i).values()) for i in range(len(few.value))) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": []}, "at least one"),
        ({"weights": [Weight("a", 0, 2, 2)] * 2}, "'a' is there 2 times"),
        ({"weights": [Weight("a", 0, 2, 2), Weight("b", -1, 2, 2)]}, "a block from 0"),
        ({"weights": [Weight("a", 0, 2, 2), Weight("b", 0, 0, 2)]}, "at least one row"),
        ({"ranks": [2, 1]}, r"ascending and at least one, got \[2, 1\]"),
        ({"ranks": [1, 1]}, "ascending"),
        ({"ranks": [0, 1]}, "above 0"),
        ({"ranks": [1.5, 2]}, "whole numbers"),
        ({"ranks": []}, "at least one"),
        ({"values": np.ones((2, 3))}, r"\(2, 2\) weights and ranks, got shape \(2, 3\)"),
        ({"values": np.array([[0, 1], [-1, 1]])}, "non-negative.*at weight 'b'"),
        ({"values": np.array([[0, 1], [1, np.nan]])}, "at weight 'b'"),
        ({"values": np.array([[0, 1], [1, np.inf]])}, "finite"),
        ({"values": np.full((2, 2), 1e308)}, "a finite sum"),
        ({"values": np.array([[0, 1], [2, 1]])}, r"'b' should never be less at a higher rank, got \[2.0, 1.0\]"),
        ({"input_bytes": -1.0}, "input_bytes should be"),
        ({"inner_bytes": float("inf")}, "inner_bytes should be"),
    ],
)
def test_what_makes_no_sense_is_refused(change, told):
    good = {"weights": [Weight("a", 0, 2, 2), Weight("b", 1, 2, 2)], "ranks": [1, 2], "values": np.ones((2, 2))}
    with pytest.raises(ConfigError, match=told):
        selections(**{**good, **change})
