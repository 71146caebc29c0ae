"""The meter against dense numpy: what a server's update is off from sum_k p_k s_k B_k A_k, over all layers together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import RANK, SCALING, dense, distance, factors, ideal, layout, reply

from fedtune.core.protocol import SERVER, ClientInfo, Update
from fedtune.lowrank.algebra import lora_factors
from fedtune.lowrank.residual import from_residual
from fedtune.server.aggregation_error import aggregation_error
from strategies.fedex_lora import FedExLoRA
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.flora import FLoRA
from strategies.florist import FLoRIST
from strategies.full_delta import FullDelta

CLIENTS = st.lists(st.tuples(st.integers(1, RANK), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 99)), min_size=1)
ME = ClientInfo(SERVER, 1, rank=RANK, scaling=SCALING)


def meter(method, rounds, start=None):
    """The error of the last round, and the states around it."""
    start = start or layout()
    before = after = method.init(start)
    error = None
    for number, replies in enumerate(rounds, 1):
        before, after = after, method.aggregate(after, number, replies)
        error = aggregation_error(start, method, number, before, after, replies, ME)
    return error, before, after


def equal(count, seed=0):
    """Clients of one rank and one scaling, 1, 2, ... examples."""
    return [reply(k, examples=1 + k, seed=seed + k) for k in range(count)]


@given(st.integers(2, 6))
def test_fedits_error_is_the_spread_of_the_factors(count):
    """s sum p_k (B_k - B)(A_k - A), dense, over dW*."""
    replies = equal(count)
    error, _, _ = meter(FedIT(), [replies])
    p = np.arange(1, count + 1) / (count * (count + 1) / 2)
    lost = size = 0.0
    for module in ideal(replies):
        held = [lora_factors(update.tensors)[module] for _, update in replies]
        a = sum(w * h.a.numpy() for w, h in zip(p, held, strict=True))
        b = sum(w * h.b.numpy() for w, h in zip(p, held, strict=True))
        missed = sum(w * (h.b.numpy() - b) @ (h.a.numpy() - a) for w, h in zip(p, held, strict=True))
        lost += (SCALING * missed**2).sum() * SCALING
        size += (ideal(replies)[module].numpy() ** 2).sum()
    assert error == pytest.approx((lost / size) ** 0.5, rel=1e-10)


@pytest.mark.slow
@given(CLIENTS)
def test_flexloras_error_is_that_of_its_dense_product(clients):
    replies = [reply(k, rank, scaling, n) for k, (rank, scaling, n) in enumerate(clients)]
    error, _, after = meter(FlexLoRA(), [replies])
    assert error == pytest.approx(distance(dense(after.adapter, SCALING), ideal(replies)), abs=1e-12)


@pytest.mark.parametrize(
    "method", [FLoRA(), FLoRIST(energy=1.0), FedExLoRA()], ids=["flora", "florist at energy 1", "fedex_lora"]
)
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_exact_methods_are_exact_in_every_round(method, rounds):
    error, _, _ = meter(method, [equal(3, seed=10 * number) for number in range(rounds)])
    assert error < 1e-6


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_control_is_exact_in_every_round(rounds):
    """A dense change is what the base has in all; the round's own is the difference."""
    made = []
    for number in range(rounds):
        matrices = [(peer, dense(update.tensors, SCALING), update.examples) for peer, update in equal(3, 10 * number)]
        made.append([(p, Update({f"{m}.delta": d.float() for m, d in ds.items()}, n)) for p, ds, n in matrices])
    error, _, _ = meter(FullDelta(), made)
    assert error < 1e-6


def test_mixed_ranks_and_scalings_count_as_they_are():
    replies = [reply(0, 1, 8.0, 1), reply(1, 3, 2.0, 3)]
    assert meter(FLoRA(), [replies])[0] < 1e-6
    wrong = [(peer, Update(update.tensors, update.examples)) for peer, update in replies]
    wrong[0] = (ClientInfo(0, 1, rank=1, scaling=4.0), wrong[0][1])
    method = FLoRA()
    before = method.init(layout())
    after = method.aggregate(before, 1, wrong)
    assert aggregation_error(layout(), method, 1, before, after, replies, ME) == pytest.approx(
        distance(ideal(wrong), ideal(replies)), rel=1e-5
    )


def test_what_a_cut_loses_is_in_the_error():
    """limit 1, three rounds of rank 6 and more: the base is not what the rounds add up to."""
    rounds = [equal(2, seed=10 * number) for number in range(3)]
    method = FLoRA(residual_rank=1)
    error, before, after = meter(method, rounds)
    server = {m: held(after)[m] - held(before)[m] for m in held(after)}
    assert error == pytest.approx(distance(server, ideal(rounds[-1])), rel=1e-5)
    assert error > 0.1
    assert after.merged.error > 0.1


def held(state):
    return {m: p.b.double() @ p.a.double() for m, p in from_residual(state.merged.total).items()}


def test_what_started_with_a_product_counts_from_there():
    """PiSSA's B A is not what the client changed, but where it began."""
    start = layout()
    for name, tensor in start.initial.items():
        if "lora_B" in name:
            tensor += 0.3
    moved = {name: tensor + ("lora_B" in name) for name, tensor in start.initial.items()}
    error, before, after = meter(FedIT(), [[(ClientInfo(0, 1), Update(moved, 1))]], start)
    assert error < 1e-12
    changed = {m: dense(after.adapter)[m] - matrix for m, matrix in dense(before.adapter).items()}
    nothing = aggregation_error(start, FedIT(), 1, before, before, [(ClientInfo(0, 1), Update(moved, 1))], ME)
    assert nothing == pytest.approx(1, rel=1e-10)  # all of the change is missing, and no more
    assert all(matrix.norm() > 1 for matrix in changed.values())


def test_no_change_has_no_error():
    zeros = factors(RANK, 1) | {name: torch.zeros_like(t) for name, t in factors(RANK, 1).items() if "lora_B" in name}
    assert meter(FedIT(), [[(ClientInfo(0, 1), Update(zeros, 1))]])[0] is None
