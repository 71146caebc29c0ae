"""FedPipe: layers of unequal ranks are summed over those who trained them, and the scores make the next plan's values.

`one` is a layer of 5 x 3 in block 0, `two` one of 4 x 7 in block 1 (tests/layers.py), the global rank 4.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from hypothesis import given
from hypothesis import strategies as st
from layers import RANK, SCALING, SHAPES, dense, factors, layout

import fedtune.planning.plan_cache
from fedtune.core.costs import Costs, Weight
from fedtune.core.errors import CapacityError, ConfigError, WireError
from fedtune.core.protocol import SERVER, ClientInfo, DeviceProfile, Instruction, Update
from fedtune.lowrank.algebra import lora_factors, name_of
from fedtune.lowrank.averaging import parts
from fedtune.runs.checkpoint import flatten, state_sha256, unflatten
from fedtune.server.aggregation_error import aggregation_error
from fedtune.server.flower_strategy import as_flower_strategy
from fedtune.training.apply_instruction import BATCH, BITS, SCORE, SCORES
from strategies.fedpipe import LEAST, FedPipe, halves

WEIGHTS = (Weight("one", 0, 5, 3), Weight("two", 1, 4, 7))
COSTS = Costs(
    base_bytes={"4": 1000.0, "16": 4000.0},
    slowdown={"4": 1.5, "16": 1.0},
    tokens=10.0,
    typical_tokens=5.0,
    forward_flop=1000.0,
    backward_flop=[2000.0, 1200.0],
    read_bytes=[0.0, 0.0],
    saved_bytes=[400.0, 150.0],
    head_bytes=100.0,
    fixed_bytes=50.0,
)
LAYOUT = replace(layout(), costs=COSTS, weights=WEIGHTS)
SCORED = 1  # a round in which scores are asked for


def fedpipe(**settings):
    return FedPipe(**{"steps": 2, "batch_size": 4} | settings)


def reply(index, ranks, examples=1, scores=None, seed=None):
    """A client that trained these layers at these ranks."""
    drawn = factors(RANK, index if seed is None else seed)
    sent = {}
    for module, rank in ranks.items():
        sent[name_of(module, "lora_A")] = drawn[name_of(module, "lora_A")][:rank]
        sent[name_of(module, "lora_B")] = drawn[name_of(module, "lora_B")][:, :rank]
    if scores is not None:
        sent[SCORES] = torch.tensor(scores, dtype=torch.float32)
    return ClientInfo(index, examples), Update(sent, examples)


def aggregate(replies, number=2, method=None):
    method = method or fedpipe()
    return method.aggregate(method.init(LAYOUT), number, replies)


RANKS = st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, RANK), min_size=1)
CLIENTS = st.lists(st.tuples(RANKS, st.integers(1, 99)), min_size=1, max_size=6)


def wanted(clients):
    """s sum_k p_k B_k A_k of each layer over those who trained it, p renormalised, in float64; by numpy alone."""
    found = {}
    for module in {module for ranks, _ in clients for module in ranks}:
        total = sum(n for ranks, n in clients if module in ranks)
        found[module] = np.zeros(SHAPES[module])
        for index, (ranks, n) in enumerate(clients):
            if module in ranks:
                drawn, r = factors(RANK, index), ranks[module]
                b, a = (drawn[name_of(module, role)].numpy() for role in ("lora_B", "lora_A"))
                found[module] += n / total * SCALING * b[:, :r] @ a[:r]
    return found


@given(CLIENTS)
def test_each_layer_is_the_sum_over_those_who_trained_it_but_for_what_its_rank_cuts_off(clients):
    """|dW_j - s B A|^2 = sum_{i>r} S_i^2; a layer that nobody trained keeps its very tensors."""
    state = aggregate([reply(k, ranks, n) for k, (ranks, n) in enumerate(clients)])
    found, sums = dense(state.adapter, SCALING), wanted(clients)
    for module in SHAPES:
        if module not in sums:
            assert all(state.adapter[name] is LAYOUT.initial[name] for name in LAYOUT.initial if module in name)
            continue
        values = np.linalg.svd(sums[module], compute_uv=False)
        apart = float(((found[module].numpy() - sums[module]) ** 2).sum())
        assert apart == pytest.approx(float((values[RANK:] ** 2).sum()), abs=1e-12 * float((values**2).sum()))


@pytest.mark.slow
@given(CLIENTS, st.integers(1, RANK))
def test_a_clients_first_components_are_the_best_of_that_rank(clients, rank):
    state = aggregate([reply(k, ranks, n) for k, (ranks, n) in enumerate(clients)])
    for module, matrix in wanted(clients).items():
        held = lora_factors(state.adapter)[module]
        found = SCALING * held.b[:, :rank].numpy() @ held.a[:rank].numpy()
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        np.testing.assert_allclose(found, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-9 * s[0])


@pytest.mark.slow
@given(CLIENTS)
def test_the_meter_weighs_a_layer_by_those_who_trained_it(clients):
    """The error that the run reports is what is off over all trained layers together, by numpy."""
    method, replies = fedpipe(), [reply(k, ranks, n) for k, (ranks, n) in enumerate(clients)]
    before = method.init(LAYOUT)
    after = method.aggregate(before, 2, replies)
    told = {k: ranks for k, (ranks, _) in enumerate(clients)}
    plans = [ClientInfo(k, n, DeviceProfile(memory_bytes=1.0 + k)) for k, (_, n) in enumerate(clients)]

    class Told(FedPipe):
        """What these clients were told, without the planning."""

        def configure(self, state, round, peer):
            return super().configure(state, round, ClientInfo(SERVER, 1)) if peer.index == SERVER else _told(told, peer)

    error = aggregation_error(
        LAYOUT,
        Told(2, 4),
        2,
        before,
        after,
        [(peer, update) for peer, (_, update) in zip(plans, replies, strict=True)],
        ClientInfo(SERVER, 1),
    )
    sums, found = wanted(clients), dense(after.adapter, SCALING)
    lost = sum(float(((found[m].numpy() - sums[m]) ** 2).sum()) for m in sums)
    size = sum(float((matrix**2).sum()) for matrix in sums.values())
    assert error == pytest.approx((lost / size) ** 0.5, abs=1e-12)


def _told(told, peer):
    return Instruction(parts(LAYOUT.initial, told[peer.index]))


def test_components_that_nobody_trained_can_still_be_trained():
    state = aggregate([reply(0, {"two": 1})])
    held = lora_factors(state.adapter)["two"]
    assert not held.b[:, 1:].any()
    assert (held.a.norm(dim=1) > 0.1).all()


@pytest.mark.slow
@given(st.permutations(range(4)))
def test_the_order_of_clients_changes_nothing_but_rounding(order):
    replies = [reply(k, {"one": 1 + k, "two": 4 - k}, 1 + k, [1.0 + k, 2.0]) for k in range(4)]
    one, other = aggregate(replies, SCORED), aggregate([replies[place] for place in order], SCORED)
    for module, matrix in dense(one.adapter).items():
        torch.testing.assert_close(dense(other.adapter)[module], matrix, rtol=0, atol=1e-12)
    assert other.scores == pytest.approx(one.scores)


def test_scores_are_means_by_examples_over_those_who_trained_the_layer():
    """one: (1 * 2 + 3 * 6) / 4 = 5; two, of the second client alone: 7."""
    whole = {"one": RANK, "two": RANK}
    state = aggregate([reply(0, {"one": RANK}, 1, [2.0]), reply(1, whole, 3, [6.0, 7.0])], SCORED)
    assert state.scores == pytest.approx({"one": 5.0, "two": 7.0})
    values = np.linalg.svd(wanted([({"one": RANK}, 1), (whole, 3)])["one"], compute_uv=False)
    np.testing.assert_allclose(state.shares["one"], [*values, values[-1]])  # 5 x 3 has no fourth
    assert aggregate([reply(0, whole, 1)], 2).scores == {}


def diagonal(sizes, score, module="two"):
    """A client with s B A = diag(sizes), a component each."""
    a, b = torch.zeros(len(sizes), 7, dtype=torch.float64), torch.zeros(4, len(sizes), dtype=torch.float64)
    for place, size in enumerate(sizes):
        a[place, place], b[place, place] = 1, size / SCALING
    tensors = {name_of(module, "lora_A"): a, name_of(module, "lora_B"): b, SCORES: torch.tensor([score])}
    return Update(tensors, 1)


def test_a_score_of_few_components_counts_as_that_of_as_many():
    """Client 0: diag(6, 2), score 4 of two components. Client 1: diag(6), score 2 of one. The mean is diag(6, 1), and
    nobody trained a third: S = 6, 1, 1, 1. c(1) = 6/9, c(2) = 7/9; (4 + 2) / (7/9 + 6/9) = 54/13."""
    replies = [(ClientInfo(0, 1), diagonal([6.0, 2.0], 4.0)), (ClientInfo(1, 1), diagonal([6.0], 2.0))]
    state = aggregate(replies, SCORED)
    assert state.shares["two"] == pytest.approx([6, 1, 1, 1])
    assert state.scores == pytest.approx({"two": 54 / 13})


def test_values_by_hand():
    """one: score 6, S = 3, 2, 1, 0 -> 6 * 3/6, 6 * 5/6, 6. Of two nothing is known: it counts as the mean, 6, spread
    evenly over 4. At the start everything is worth 1, evenly."""
    method = fedpipe()
    state = method.init(LAYOUT)
    assert method.values(state, [1, 2, 4]).tolist() == [[0.25, 0.5, 1], [0.25, 0.5, 1]]
    state = replace(state, scores={"one": 6.0}, shares={"one": [3.0, 2.0, 1.0, 0.0]})
    np.testing.assert_allclose(method.values(state, [1, 2, 4]), [[3, 5, 6], [1.5, 3, 6]])
    state = replace(state, scores={"one": 0.0, "two": 8.0})
    np.testing.assert_allclose(method.values(state, [4]), [[LEAST * 4], [8]])
    state = replace(state, scores={"one": 0.0, "two": 0.0}, shares={})
    np.testing.assert_allclose(method.values(state, [1, 4]), [[LEAST / 4, LEAST]] * 2)


@given(CLIENTS)
def test_values_rise_with_the_rank(clients):
    """However few components were trained: else a layer could never have more."""
    replies = [reply(k, ranks, n, [1.0] * len(ranks)) for k, (ranks, n) in enumerate(clients)]
    method = fedpipe()
    assert (np.diff(method.values(aggregate(replies, SCORED), [1, 2, 3, 4])) > 0).all()


def test_what_costs_nothing_is_done_whatever_is_known():
    """No limits: everything to everybody, at first, after scores of zero, and after one client of rank 1."""
    method = fedpipe()
    whole = {"one": RANK, "two": RANK}
    for state in (
        method.init(LAYOUT),
        aggregate([reply(0, whole, 1, [0.0, 0.0])], SCORED),
        aggregate([reply(0, {"two": 1}, 1, [5.0])], SCORED),
        aggregate([reply(0, whole, 1, [0.0, 3e38])], SCORED),
        aggregate([(ClientInfo(0, 1), diagonal([0.0, 0.0], 0.0))], SCORED),
    ):
        told = method.configure(state, 7, ClientInfo(0, 1))
        assert {module: product.rank for module, product in lora_factors(told.tensors).items()} == whole
        assert told.settings == {BATCH: 4, BITS: 16, SCORE: False}
        assert all(told.tensors[name] is state.adapter[name] for name in told.tensors)


def test_scores_are_asked_for_in_every_refresh():
    method = fedpipe(refresh=3)
    assert [number for number in range(1, 9) if method.scores_in(number)] == [1, 4, 7]
    state = method.init(LAYOUT)
    assert [method.configure(state, number, ClientInfo(0, 1)).settings[SCORE] for number in (1, 2, 4)] == [
        True,
        False,
        True,
    ]


DEVICES = st.builds(
    DeviceProfile,
    memory_bytes=st.floats(1000, 12000),
    flop_per_s=st.floats(100, 1e5),
    up_bytes_per_s=st.floats(1e3, 1e6),
    down_bytes_per_s=st.floats(1e3, 1e6),
    max_rank=st.integers(1, 9).map(float),
    device=st.sampled_from(["", "phone"]),
)


@pytest.mark.slow
@given(DEVICES)
def test_a_plan_keeps_to_its_device(device):
    """Memory and seconds of what a client is told, by the formulas of fedtune/core/costs.py written out once more.
    Beside a
    step's 16 bytes a number there are 8 for its scores; beside 4 bytes a number, what a message has around them."""
    method = fedpipe(deadline=20.0)
    state = method.init(LAYOUT)
    plan = method.plan(state, device)
    if isinstance(plan, str):
        assert "memory" in plan or "deadline" in plan
        return
    told = method.configure(state, 1, ClientInfo(0, 9, device))
    batch, bits = told.settings[BATCH], told.settings[BITS]
    ranks = {module: product.rank for module, product in lora_factors(told.tensors).items()}
    numbers = sum(r * sum(SHAPES[m]) for m, r in ranks.items())
    block = 0 if "one" in ranks else 1
    per_token = sum(4 * SHAPES[m][1] + 4 * r for m, r in ranks.items())
    kept = COSTS.saved_bytes[block] + 100 + 10 * per_token
    assert COSTS.base_bytes[str(bits)] + 50 + batch * kept + 24 * numbers <= device.memory_bytes
    flop = 2 * batch * (1000 + COSTS.backward_flop[block] + 6 * 5 * numbers) * COSTS.slowdown[str(bits)]
    link = 1 / device.up_bytes_per_s + 1 / device.down_bytes_per_s
    seconds = flop / device.flop_per_s + (4 * numbers + 4096) * link
    assert seconds <= 20 * (1 + 1e-12)
    assert max(ranks.values()) <= device.max_rank


@pytest.mark.slow
@given(st.lists(DEVICES, min_size=1, max_size=5))
def test_a_plan_is_the_same_alone_and_among_others(devices):
    method = fedpipe(deadline=20.0)
    states = [method.init(LAYOUT) for _ in range(2)]
    method.plan_for_all(states[0], devices)
    assert [method.plan(states[0], d) for d in devices] == [method.plan(states[1], d) for d in reversed(devices)][::-1]


@pytest.mark.slow
def test_plans_are_made_once_and_not_kept_for_ever():
    method = fedpipe()
    state = method.init(LAYOUT)
    device = DeviceProfile(memory_bytes=1e5)
    first = method.plan(state, device)
    assert method.plan(replace(state, adapter=dict(state.adapter)), device) is first
    scored = replace(state, scores={"one": 1e6, "two": 1e-6})
    assert method.plan(scored, device) is not first
    assert method.plan(state, device) is first  # a round's replies are checked after the next state is there
    for number in range(10):
        method.plan(replace(state, scores={"one": 1.0 + number}), device)
    assert len(fedtune.planning.plan_cache._kept) <= 2


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (DeviceProfile(memory_bytes=500.0), "memory"),
        (DeviceProfile(flop_per_s=1.0), "deadline"),
        (DeviceProfile(up_bytes_per_s=1.0), "needs at least .* s .* and the deadline is 20 s"),
        (DeviceProfile(backprop=False), "gradients"),
        (DeviceProfile(max_rank=0.5), "ranks"),
    ],
)
def test_a_device_that_can_take_no_part_says_why(device, said):
    method = fedpipe(deadline=20.0)
    with pytest.raises(CapacityError, match=said):
        method.configure(method.init(LAYOUT), 1, ClientInfo(0, 1, device))


def tensors_with(change):
    """What a client of everything answers in a scoring round, after `change`."""
    tensors = dict(reply(0, {"one": RANK, "two": RANK}, 1, [1.0, 2.0])[1].tensors)
    change(tensors)
    return tensors


A, B = name_of("one", "lora_A"), name_of("two", "lora_B")
HOSTILE = {
    "a layer too few": (lambda t: t.pop(A), "'one.lora_A.weight' is missing"),
    "a layer too many": (lambda t: t.update({"three.lora_A.weight": torch.zeros(4, 3)}), "was not asked for"),
    "another rank": (
        lambda t: t.update({A: torch.zeros(2, 3, dtype=torch.float64)}),
        r"\(4, 3\), got float64 \(2, 3\)",
    ),
    "another dtype": (lambda t: t.update({B: t[B].float()}), r"expected float64 \(4, 4\), got float32"),
    "no scores": (lambda t: t.pop(SCORES), "'scores' is missing"),
    "too few scores": (lambda t: t.update({SCORES: torch.ones(1)}), r"'scores': expected float32 \(2,\), got"),
    "too many scores": (lambda t: t.update({SCORES: torch.ones(3)}), r"'scores': expected float32 \(2,\), got"),
    "a table of scores": (lambda t: t.update({SCORES: torch.ones(2, 1)}), "'scores': expected"),
    "whole numbers": (lambda t: t.update({SCORES: torch.ones(2, dtype=torch.int64)}), "'scores': expected float32"),
    "below zero": (lambda t: t.update({SCORES: torch.tensor([1.0, -1e-9])}), "numbers from 0 up, got -1e-09 to 1"),
    "not a number": (lambda t: t.update({SCORES: torch.tensor([1.0, math.nan])}), "numbers from 0 up"),
    "infinite": (lambda t: t.update({SCORES: torch.tensor([1.0, math.inf])}), "numbers from 0 up, got 1 to inf"),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_replies_that_were_not_asked_for_are_refused(change, said):
    method = fedpipe()
    state = method.init(LAYOUT)
    method.validate(state, SCORED, ClientInfo(0, 1), Update(tensors_with(lambda tensors: None), 1))
    with pytest.raises(WireError, match=said):
        method.validate(state, SCORED, ClientInfo(0, 1), Update(tensors_with(change), 1))


def test_scores_that_were_not_asked_for_are_refused():
    method = fedpipe()
    with pytest.raises(WireError, match="'scores' was not asked for"):
        method.validate(method.init(LAYOUT), 2, ClientInfo(0, 1), Update(tensors_with(lambda tensors: None), 1))


def test_a_client_may_send_the_layers_of_its_own_plan_alone():
    method = fedpipe()
    state, small = method.init(LAYOUT), ClientInfo(0, 1, DeviceProfile(memory_bytes=1900.0))
    asked = {
        module: product.rank for module, product in lora_factors(method.configure(state, 2, small).tensors).items()
    }
    assert asked.keys() == {"two"}  # of block 1: it saves least
    method.validate(state, 2, small, reply(0, asked)[1])
    with pytest.raises(WireError, match="was not asked for"):
        method.validate(state, 2, small, reply(0, {**asked, "one": 1})[1])


def test_the_server_takes_all_and_a_checkpoint_holds_all():
    method = fedpipe()
    state = aggregate([reply(0, {"one": 2, "two": 1}, 1, [1.5, 2.5])], SCORED)
    assert method.configure(state, 2, ClientInfo(SERVER, 1)).tensors is state.adapter
    tree, tensors = flatten(state)
    again = unflatten(tree, tensors, method.init(LAYOUT))
    assert state_sha256(again) == state_sha256(state)
    assert (again.scores, again.shares, again.costs) == (state.scores, state.shares, state.costs)
    device = DeviceProfile(memory_bytes=2600.0)
    assert method.plan(again, device) == method.plan(state, device)


def test_equal_clients_are_sent_the_same_tensors():
    method = fedpipe()
    state, device = method.init(LAYOUT), DeviceProfile(memory_bytes=2600.0)
    one, other = (method.configure(state, 1, ClientInfo(k, 1 + k, device)).tensors for k in range(2))
    assert one.keys() == other.keys()
    assert all(other[name] is tensor for name, tensor in one.items())


def test_what_it_says_of_itself():
    traits = FedPipe.traits
    assert traits.plans
    assert traits.partial
    assert traits.needs_low_rank
    assert traits.lossy_up
    assert traits.lossy_down
    assert not any((traits.mixed_ranks, traits.averages, traits.personal, traits.asynchronous))


@pytest.mark.parametrize(("largest", "found"), [(8, [1, 2, 4, 8]), (12, [1, 3, 6, 12]), (1, [1]), (7, [1, 3, 7])])
def test_halves(largest, found):
    assert halves(largest) == found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"refresh": 0}, "method.strategy.refresh"),
        ({"ranks": []}, "adapter.rank, which is 4"),
        ({"ranks": [1, 2]}, "adapter.rank, which is 4"),
        ({"ranks": [4, 8]}, r"ranks=\[4, 8\]: adapter.rank is 4"),
        ({"ranks": [0, 4]}, r"ranks=\[0, 4\]: expected whole numbers above 0"),
        ({"ranks": ["x", 4]}, "expected whole numbers above 0"),
        ({"bits": []}, r"bits=\[\]: expected whole numbers above 0, or null"),
        ({"bits": [8]}, "can't be held in 8 bits; it can in 4, 16"),
        ({"steps": 0}, "steps"),
        ({"deadline": -1.0}, "deadline"),
    ],
)
def test_settings_out_of_range_are_named_at_the_start(settings, said):
    with pytest.raises(ConfigError, match=said):
        fedpipe(**settings).init(LAYOUT)


def test_ranks_and_bits_of_ones_own():
    method = fedpipe(ranks=[4, 3, 3], bits=[4])
    state = method.init(LAYOUT)
    rules = method.rules(state)
    assert (rules.ranks, rules.bits, rules.batches, rules.state_bytes) == ([3, 4], [4], [1, 2, 4], 24)
    assert fedpipe(optimizer="sgd").rules(state).state_bytes == 16
    assert method.configure(state, 1, ClientInfo(0, 1)).settings[BITS] == 4


def test_a_layout_that_says_nothing_of_costs_is_refused():
    for bare in (layout(), replace(LAYOUT, weights=())):
        with pytest.raises(ConfigError, match="run it with fedtune run"):
            fedpipe().init(bare)


def test_an_adapter_that_does_not_start_at_zero_is_refused():
    start = {name: tensor + 1 for name, tensor in LAYOUT.initial.items()}
    with pytest.raises(ConfigError, match="take adapter=lora or adapter=rslora"):
        fedpipe().init(replace(LAYOUT, initial=start))


@pytest.mark.parametrize("given", [None, LAYOUT])
def test_in_a_flower_app_of_ones_own_it_says_what_it_needs(given):
    arrays = ArrayRecord({name: tensor.float() for name, tensor in LAYOUT.initial.items()})
    slots = tuple(replace(slot, dtype="float32") for slot in LAYOUT.slots)
    strategy = as_flower_strategy(fedpipe(), layout=given and replace(given, slots=slots))
    with pytest.raises(ConfigError, match="method=fedpipe plans by what training costs"):
        strategy.configure_train(1, arrays, ConfigRecord(), None)
