"""Weights as sums of seeded directions: a function of w0 and the steps alone, however one came there.

With lr = 2^-10 and Rademacher noise (SIGMA 1) one quantum is a slope of 2^-16: 2^-26 = lr 2^-16 / SIGMA, so k = 26.
With normal noise (SIGMA 2) k = 27, and the quantum is 2 * 2^-27 / 2^-10 = 2^-16 again.
"""

import math

import numpy as np
import pytest
import torch
from directions import values
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtune.core.errors import ConfigError, DivergedError
from fedtune.random_directions.hash_noise import SIGMA, coefficient
from fedtune.random_directions.weights import SeededWeights, Space, pool, steps_record

SHAPES = {"a.weight": (5, 7), "b": (3,), "c.weight": (40, 51)}
KINDS = sorted(SIGMA)
records = st.dictionaries(st.integers(0, 12), st.integers(-(2**18), 2**18), max_size=6)


def start(dtype=torch.float32):
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def weights(dtype=torch.float32):
    given = start(dtype)
    return SeededWeights({name: nn.Parameter(tensor.clone()) for name, tensor in given.items()}, given)


def now(held):
    return {name: tensor.detach().clone() for name, tensor in held.live.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def from_formula(space, record, dtype=torch.float32):
    """w0 - lr sum_s g_s z_s in float64, g_s = n_s quanta."""
    moved = {}
    for name, tensor in start(dtype).items():
        total = tensor.double()
        for seed, count in record.items():
            z = values(seed, name, tensor.shape, space.noise).double()
            total = total - space.lr * count * space.quantum * z
        moved[name] = total
    return moved


@pytest.mark.parametrize(("noise", "exponent"), [("rademacher", 26), ("normal", 27)])
def test_the_quantum_by_hand(noise, exponent):
    space = Space(2.0**-10, noise)
    assert space.exponent == exponent
    assert space.quantum == 2.0**-16
    assert space.counts(np.array([1.0, -2.0, 2.0**-17 * 1.01])).tolist() == [65536, -131072, 1]
    assert Space(3e-7).quantum <= 2.0**-16 < 2 * Space(3e-7).quantum


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_one_by_one_are_the_formula_and_the_replay(noise, dtype):
    """Within 1e-10 in float64 and 1e-5 in float32; in bfloat16 within its own rounding, 2^-9."""
    space, held, replayed = Space(1e-3, noise), weights(dtype), weights(dtype)
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 9, 40).tolist()
    counts = space.counts(rng.normal(0, 3, 40)).tolist()
    held.move_to(space, {})
    for seed, count in zip(seeds, counts, strict=True):
        held.step({seed: count})
    held.render()
    record = steps_record(seeds, counts)
    replayed.move_to(space, record)
    assert same(now(held), now(replayed))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    for name, expected in from_formula(space, record, dtype).items():
        off = (held.live[name].double() - expected).abs().max() / expected.abs().max()
        assert off < tolerance


def test_the_mean_of_clients_is_the_replay_of_their_mean_slopes():
    """Three clients with weights 1/6, 2/6 and 3/6: sum_k p_k w_k against the replay of sum_k p_k g_k."""
    space, shares = Space(1e-3), [1 / 6, 2 / 6, 3 / 6]
    rng = np.random.default_rng(1)
    clients = [dict(enumerate(space.counts(rng.normal(0, 3, 6)).tolist())) for _ in shares]
    mean: dict[str, torch.Tensor] = {}
    for share, record in zip(shares, clients, strict=True):
        held = weights(torch.float64)
        held.move_to(space, record)
        for name, tensor in now(held).items():
            mean[name] = mean.get(name, 0) + share * tensor
    summed = {
        seed: round(sum(p * record[seed] for p, record in zip(shares, clients, strict=True))) for seed in range(6)
    }
    together = weights(torch.float64)
    together.move_to(space, summed)
    for name, tensor in now(together).items():
        moved = (mean[name] - start(torch.float64)[name]).norm()
        assert (tensor - mean[name]).norm() < 1e-5 * moved


@pytest.mark.slow
@given(st.lists(records, min_size=1, max_size=4), st.sampled_from(KINDS))
def test_it_does_not_matter_how_one_came_there(path, noise):
    space, wandered, straight = Space(1e-3, noise), weights(torch.bfloat16), weights(torch.bfloat16)
    for record in path:
        wandered.move_to(space, record)
        wandered.step({3: 17, 99: -5})  # a turn's own steps, which the next move takes back
        wandered.render(7, 0.1)
    wandered.move_to(space, path[-1])
    straight.move_to(space, path[-1])
    assert same(now(wandered), now(straight))
    assert same(wandered.totals(), straight.totals())


def test_the_shorter_way_is_taken():
    """From 10 directions to 11: one is added. From 11 to 2 others: 2 from the base, not 13 of difference."""
    space, held = Space(1e-3), weights()
    held.move_to(space, dict.fromkeys(range(10), 5))
    assert held.passes == 10
    held.move_to(space, dict.fromkeys(range(11), 5))
    assert held.passes == 11
    held.move_to(space, {50: 1, 51: 1})
    assert held.passes == 13
    held.move_to(space, {50: 1, 51: 1})
    assert held.passes == 13


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_perturbations_leave_no_drift(dtype):
    """The textbook way, w + eps z, - 2 eps z, + eps z, does in 16 bits: it is measured here too."""
    held, before = weights(dtype), start(dtype)
    held.move_to(Space(1e-3), {})
    assert same(now(held), before)
    textbook = before["c.weight"].clone()
    for seed in range(500):
        held.render(seed, 1e-3)
        held.render(seed, -1e-3)
        z = values(seed, "c.weight", textbook.shape)
        for c in (1e-3, -2e-3, 1e-3):
            textbook = (textbook.float() + c * z).to(dtype)
    held.render()
    assert same(now(held), before)
    assert not torch.equal(textbook, before["c.weight"])


def test_a_perturbation_is_c_z():
    held = weights(torch.float64)
    held.move_to(Space(1e-3), {1: 1000})
    plain = now(held)
    held.render(4, 0.25)
    for name, tensor in now(held).items():
        expected = plain[name] + coefficient(0.25) * values(4, name, tensor.shape).double()
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("sparsity", [0.25, 0.75, 0.999])
def test_the_largest_weights_stay_bit_for_bit(sparsity):
    held, before = weights(torch.bfloat16), start(torch.bfloat16)
    held.move_to(Space(1.0, sparsity=sparsity), {seed: 2**18 + 31 * seed for seed in range(8)})
    for name, tensor in now(held).items():
        size = tensor.numel()
        masked = math.floor(sparsity * size)
        bound = before[name].abs().flatten().sort().values[size - masked - 1]
        held_back = before[name].abs() > bound
        assert torch.equal(tensor[held_back], before[name][held_back])
        assert (tensor != before[name])[~held_back].float().mean() > 0.8
        assert held_back.sum() <= masked


def test_no_sparsity_is_no_mask():
    one, other = weights(), weights()
    one.move_to(Space(1e-2), {1: 2**18})
    other.move_to(Space(1e-2, sparsity=0.0), {1: 2**18})
    assert same(now(one), now(other))


def test_a_sum_that_might_not_fit_is_refused():
    """T's elements have standard deviation 2 |n|, and 8 of these have to fit 2^31: |n| < 2^27."""
    space, held = Space(1e-3), weights()
    held.move_to(space, {0: 2**27 - 1})
    with pytest.raises(DivergedError, match=r"length of .* at lr=0.001 there is room for .*lower lr"):
        held.move_to(space, {0: 2**27})
    with pytest.raises(DivergedError):
        space.check(np.full(4, 2**26))


@pytest.mark.parametrize("words", [{"lr": 0}, {"lr": math.nan}, {"lr": 1, "sparsity": 1}, {"lr": 1, "noise": "x"}])
def test_what_makes_no_sense_is_refused(words):
    with pytest.raises(ConfigError, match="expected"):
        Space(**words)


def test_a_pool_is_a_function_of_its_seed():
    assert pool(0, 3) == pool(0, 5)[:3]
    assert len({*pool(0, 4096), *pool(1, 4096)}) == 8192
