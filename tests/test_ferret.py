"""Ferret: what K coordinates rebuild, and that all who know them hold the same bits.

One direction z, of d independent elements with mean 0, variance 1 and fourth moment kappa, rebuilds D as z z^T D:

    E (z^T D)^2 = |D|^2        Var (z^T D)^2 = 2 |D|^4 + (kappa - 3) sum_i D_i^4
    E |z z^T D|^2 = sum_i E (z^T D)^2 z_i^2 = sum_i (|D|^2 + (kappa - 1) D_i^2) = (d + kappa - 1) |D|^2

and K of them, averaged, D itself in the mean, with an error of (d - 2 + kappa) / K of |D|^2. For d = 50 and K = 20:

    normal: Binomial(16, 1/2) has kappa = 3 - 2 / 16 = 2.875        (50 - 2 + 2.875) / 20 = 2.54375
    rademacher: kappa = 1                                           (50 - 2 + 1) / 20     = 2.45
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, rows, summary_of
from directions import KURTOSIS, values
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtune.config.compose import compose
from fedtune.core.errors import ClientError, ConfigError, DivergedError, WireError
from fedtune.core.protocol import SERVER, ClientInfo, Layout, Slot, Update
from fedtune.lowrank.residual import FROM, VERSION, base_version
from fedtune.random_directions.weights import SeededWeights
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.local import run_local
from fedtune.training.projection import (
    BUDGET,
    SLOPES,
    TURN,
    Projection,
    blocks_of,
    budget_of,
    coordinates,
    records_of,
    seeds_of,
)
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.ferret import SHARE, Ferret, State

pytestmark = pytest.mark.slow

RUN = "0" * 16
WORDS = ("method=ferret", "adapter=lora", "method.strategy.rules.directions=256")
TWO = [("a",), ("b", "c")]
SHAPES = {"a": (4, 3), "b": (5,), "c": (3, 2)}


def layout(sizes):
    shapes = {f"p{place}": (size,) for place, size in enumerate(sizes)}
    return Layout(tuple(Slot(name, shape, "float32", "w", name, 1.0) for name, shape in shapes.items()), {})


def weights(dtype=torch.float32):
    start = {name: torch.linspace(-1, 1, math.prod(s)).reshape(s).to(dtype) for name, s in SHAPES.items()}
    return SeededWeights({name: nn.Parameter(value.clone()) for name, value in start.items()}, start)


def answer(budget, slopes, client=0):
    tensors = {BUDGET: torch.tensor(budget, dtype=torch.int32), SLOPES: torch.tensor(slopes, dtype=torch.int32)}
    return ClientInfo(client, 9), Update(tensors, 1)


def blank(blocks=2, directions=5):
    return State(*(torch.zeros(0, width, dtype=torch.int32) for width in (2, blocks, directions)))


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        # The median of 3 3 4 4 50 100 100 100 is 27, so a block has at most int(24.3) = 24
        ([4, 4, 100, 100, 3, 3, 100, 50], [[0, 1], [2], [3], [4, 5], [6], [7]]),
        ([10, 10, 6, 3, 10], [[0], [1], [2, 3], [4]]),  # 6 + 3 = 9 doesn't exceed 0.9 * 10
        ([10, 10, 6, 4, 10], [[0], [1], [2], [3], [4]]),
        ([7], [[0]]),
    ],
)
def test_a_block_is_closed_before_it_exceeds_nine_tenths_of_the_median(sizes, blocks):
    assert blocks_of(layout(sizes)) == [tuple(f"p{place}" for place in block) for block in blocks]


@pytest.mark.parametrize(
    ("norms", "directions", "budget"),
    [
        ([3, 1], 12, [9, 3]),
        ([3, 1, 0], 12, [8, 2, 2]),  # 2 for the third; 7.5 and 2.5 of the others' 10, the earlier rounded up
        ([100, 1, 1], 10, [6, 2, 2]),
        ([0, 0, 0], 8, [3, 3, 2]),
        ([1e300, 1e300], 5, [3, 2]),
        ([1, 2], 4, [2, 2]),
    ],
)
def test_budgets_go_with_the_norms(norms, directions, budget):
    assert budget_of(norms, directions).tolist() == budget


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=40), st.integers(0, 5000))
def test_budgets_are_at_least_two_and_add_up(norms, more):
    budget = budget_of(norms, 2 * len(norms) + more)
    assert budget.min() >= 2
    assert budget.sum() == 2 * len(norms) + more


def rebuilt(rules, delta, trials, share=1.0):
    """Delta from its coordinates along the directions of `trials` clients, float64 (trials, d), through all of the way:
    quanta, T and float32 weights, which start at zero."""
    start = {name: torch.zeros_like(value) for name, value in delta.items()}
    blocks = [tuple(delta)]
    held = SeededWeights({name: nn.Parameter(value.clone()) for name, value in start.items()}, start)
    found = []
    for client in range(trials):
        seeds = seeds_of(rules, 0, client)
        sent = coordinates(delta, start, blocks, rules, seeds, share)
        history = {TURN: torch.tensor([[0, client]]), **{name: tensor[None] for name, tensor in sent.items()}}
        held.move_blocks(rules.space, records_of(history, blocks, rules))
        found.append(torch.cat([-live.detach().flatten() for live in held.live.values()]).double())
    return torch.stack(found).numpy()


@pytest.mark.parametrize(("noise", "expected"), [("normal", 2.54375), ("rademacher", 2.45)])
def test_what_is_rebuilt_is_right_in_the_mean_and_as_far_off_as_derived(noise, expected):
    draw = torch.Generator().manual_seed(0)
    delta = {"a": torch.randn(4, 5, generator=draw) * 1e-3, "b": torch.randn(30, generator=draw) * 1e-3}
    whole = torch.cat([value.flatten() for value in delta.values()]).double().numpy()
    rules, trials = Projection(20, noise=noise, finest=2.0**-34), 150
    found = rebuilt(rules, delta, trials)
    square = whole @ whole
    along = found @ whole / square
    spread = 2 + (KURTOSIS[noise] - 3) * (whole**4).sum() / square**2
    assert abs(along.mean() - 1) < 3 * math.sqrt(spread / (20 * trials))
    off = ((found - whole) ** 2).sum(1) / square
    assert expected == pytest.approx((50 - 2 + KURTOSIS[noise]) / 20)
    assert abs(off.mean() - expected) < 3 * off.std() / math.sqrt(trials)
    third = rebuilt(rules, delta, 20, SHARE["official"])
    assert np.abs(third - found[:20] / 3).max() < 1e-4 * np.abs(found).max()


def test_directions_of_a_block_move_nothing_else():
    held = weights()
    held.move_blocks(Projection().space, {("a",): {5: 3}, ("b", "c"): {}})
    assert held.totals()["a"].any()
    assert not held.totals()["b"].any()
    assert torch.equal(held.live["c"].data, held.start["c"])
    held.move_to(Projection().space, {5: 3})
    assert held.totals()["b"].any()


def test_the_mean_of_two_clients_by_hand():
    """K = 5, blocks {a} and {b, c}, server_lr 2. A count is 2^-28 of a coordinate, and so moves weights by 2 2^-28 z.
    Halves are rounded to even:

        client 0    (100, -40 | 7, 9, -3) / 2 = (50, -20 | 4, 4, -2)        3.5, 4.5 and -1.5
        client 3    (8, 2, 6 | 1, -200) / 2   = (4, 1, 3 | 0, -100)
    """
    rules = Projection(5, server_lr=2.0, pool_seed=7)
    replies = [answer([2, 3], [100, -40, 7, 9, -3]), answer([3, 2], [8, 2, 6, 1, -200], client=3)]
    state = Ferret(rules).aggregate(blank(), 1, replies)
    assert state.turn.tolist() == [[0, 0], [0, 3]]
    assert state.budget.tolist() == [[2, 3], [3, 2]]
    assert state.slopes.tolist() == [[50, -20, 4, 4, -2], [4, 1, 3, 0, -100]]
    held = weights()
    held.move_blocks(rules.space, records_of(vars(state), TWO, rules))
    assert rules.server_lr * rules.space.quantum == 2.0**-27
    first, second = seeds_of(rules, 0, 0), seeds_of(rules, 0, 3)
    on_a = [(first[0], 50), (first[1], -20), (second[0], 4), (second[1], 1), (second[2], 3)]
    on_b_and_c = [(first[2], 4), (first[3], 4), (first[4], -2), (second[3], 0), (second[4], -100)]
    for name, shape in SHAPES.items():
        along = on_a if name == "a" else on_b_and_c
        total = sum(n * values(seed, name, shape).double().numpy() for seed, n in along)
        assert np.array_equal(held.totals()[name].numpy(), 2 * total)
        assert np.array_equal(
            held.live[name].detach().numpy(), (held.start[name].double().numpy() - 2.0**-27 * total).astype(np.float32)
        )


def test_a_round_more_adds_to_what_was_there():
    method = Ferret(Projection(5))
    once = method.aggregate(blank(), 1, [answer([2, 3], [1, 2, 3, 4, 5]), answer([3, 2], [2, 4, 6, 8, 10], client=1)])
    twice = method.aggregate(once, 2, [answer([2, 3], [9, 9, 9, 9, 9])])
    assert twice.turn.tolist() == [[0, 0], [0, 1], [2, 0]]
    assert torch.equal(twice.slopes[:2], once.slopes)


def test_a_difference_below_the_weights_precision_is_still_projected():
    """In bfloat16, 1 + 2^-7 is the next number after 1: the difference is exact in float32."""
    old = {"a": torch.ones(64, dtype=torch.bfloat16)}
    new = {"a": old["a"] + 2.0**-7}
    rules = Projection(8)
    sent = coordinates(old, new, [("a",)], rules, seeds_of(rules, 0, 0))
    hand = [-(2.0**-7) * float(values(seed, "a", (64,)).sum()) / 8 for seed in seeds_of(rules, 0, 0)]
    assert rules.space.slopes(sent[SLOPES].numpy()) == pytest.approx(hand, abs=rules.finest)


def test_an_update_that_cannot_be_written_down_is_the_clients_error():
    rules = Projection(4)
    still = {"a": torch.zeros(8)}
    for bad, why in ((math.nan, "no finite numbers"), (1e3, r"too large: .*larger rules.finest")):
        with pytest.raises(ClientError, match=why):
            coordinates({"a": torch.full((8,), bad)}, still, [("a",)], rules, seeds_of(rules, 0, 0))


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({}, r"expected the tensors 'budget' and 'slopes', got \[\]"),
        ({"seeds": torch.zeros(1)}, "expected the tensors 'budget' and 'slopes', got"),
        ({BUDGET: torch.tensor([2, 3])}, r"'budget': expected int32 \(2,\), got int64"),
        ({BUDGET: torch.tensor([5], dtype=torch.int32)}, r"'budget': expected int32 \(2,\)"),
        ({BUDGET: torch.tensor([[2, 3]], dtype=torch.int32)}, r"'budget': expected int32 \(2,\)"),
        ({BUDGET: torch.tensor([1, 4], dtype=torch.int32)}, "at least 2 directions a block, got 1"),
        ({BUDGET: torch.tensor([-7, 12], dtype=torch.int32)}, "at least 2 directions a block, got -7"),
        ({BUDGET: torch.tensor([2, 4], dtype=torch.int32)}, "expected 5 directions in all, got 6"),
        ({BUDGET: torch.tensor([2**31 - 1, 2**31 - 1], dtype=torch.int32)}, "5 directions in all, got 4294967294"),
        ({SLOPES: torch.zeros(5)}, r"'slopes': expected int32 \(5,\), got float32"),
        ({SLOPES: torch.zeros(4, dtype=torch.int32)}, r"'slopes': expected int32 \(5,\)"),
        ({SLOPES: torch.full((5,), -(2**31), dtype=torch.int32)}, "'slopes': a slope of -2147483648 quanta is out of"),
        ({SLOPES: torch.full((5,), 2**27, dtype=torch.int32)}, "'slopes': block 0: "),
    ],
)
def test_a_hostile_answer_is_refused_by_name(tensors, why):
    _, good = answer([2, 3], [1, 2, 3, 4, 5])
    method = Ferret(Projection(5))
    method.validate(blank(), 1, ClientInfo(0, 9), good)
    given = tensors and ({**good.tensors, **tensors} if "seeds" not in tensors else tensors)
    with pytest.raises(WireError, match=why):
        method.validate(blank(), 1, ClientInfo(0, 9), Update(given, 1))


def test_a_sum_that_might_not_fit_ends_the_run():
    """There is room for a length of 2^31 / (8 sigma) = 2^27: for five rounds of sqrt(3) 2^25, not for six."""
    method, state = Ferret(Projection(5)), blank()
    replies = [answer([2, 3], [0, 0, 2**25, 2**25, 2**25])]
    for number in range(1, 6):
        state = method.aggregate(state, number, replies)
    with pytest.raises(DivergedError, match=r"block 1: .*larger rules.finest"):
        method.aggregate(state, 6, replies)


def test_wrong_settings_are_named():
    for wrong, why in (
        ({"directions": 1}, "rules.directions=1 is too small"),
        ({"server_lr": 0.0}, "rules.server_lr=0.0"),
        ({"finest": 0.0}, "finest=0.0"),
        ({"noise": "cauchy"}, "noise=cauchy"),
    ):
        with pytest.raises(ConfigError, match=why):
            Projection(**wrong)
    with pytest.raises(ConfigError, match=r"method\.strategy\.scaling=fair is not known"):
        Ferret(Projection(), "fair")
    with pytest.raises(ConfigError, match=r"rules\.directions=5 is too small: expected at least 6"):
        Ferret(Projection(5)).init(layout([4, 4, 4]))


def workspace(tmp_path, *words):
    return Workspace(compose([*SMALL, *WORDS, f"out={tmp_path}", *words]))


def play(one, rounds, cohort):
    """The states after each round, in which the clients that `cohort` tells take turns on one model."""
    method, versions = one.strategy, {}
    states = [method.init(one.model.layout)]
    for number in range(1, rounds + 1):
        replies = []
        for index in cohort(number):
            peer = ClientInfo(index, one.samples(index), base_version=versions.get(index, 0))
            told = method.configure(states[-1], number, peer)
            update = local_update(one, RUN, index, number, told)
            method.validate(states[-1], number, peer, update)
            versions[index] = int(told.settings[VERSION])
            replies.append((peer, update))
        states.append(method.aggregate(states[-1], number, replies))
    return states


def held(one):
    seeded = one.model.seeded
    return {name: (total.clone(), seeded.live[name].detach().clone()) for name, total in seeded.totals().items()}


def same(one, other):
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def test_who_was_away_holds_the_same_bits_as_who_was_there(tmp_path):
    """Client 0 takes part in all of three rounds, client 1 in the first alone; then both are told of all, as is the
    server, which remembers nothing. A process of its own holds the same."""
    one = workspace(tmp_path / "one")
    states = play(one, 3, lambda number: (0, 1) if number == 1 else (0, 2))
    method = one.strategy
    assert [len(state.turn) for state in states] == [0, 2, 4, 6]
    found = []
    for index, known in ((0, 4), (1, 0), (1, 0)):
        process = one if len(found) < 2 else workspace(tmp_path / "other")
        memory = one.client_states.load(RUN, index, 9)
        assert base_version(memory) == known
        told = method.configure(states[3], 4, ClientInfo(index, 1, base_version=known))
        assert (told.settings[FROM], len(told.tensors[SLOPES])) == (known, 6 - known)
        process.install(told, memory)
        assert base_version(memory) == 6
        found.append(held(process))
    one.install(method.configure(states[3], 4, ClientInfo(SERVER, 1)), {})
    assert all(same(found[0], other) for other in [*found[1:], held(one)])
    assert found[0].keys() == {slot.name for slot in one.model.layout.slots}
    assert any(total.any() for total, _ in found[0].values())


def test_a_turn_leaves_nothing_behind(tmp_path):
    """What clients answer doesn't depend on whose steps the model has taken before."""
    one, other = workspace(tmp_path / "one"), workspace(tmp_path / "other")
    state = play(one, 1, lambda number: (0, 1))[-1]
    told = [one.strategy.configure(state, 2, ClientInfo(index, 1)) for index in (2, 3)]
    local_update(one, RUN, 2, 2, told[0])
    after, alone = local_update(one, RUN, 3, 2, told[1]), local_update(other, RUN, 3, 2, told[1])
    assert state_sha256(after.tensors) == state_sha256(alone.tensors)
    assert after.metrics == alone.metrics


def test_bytes_each_way(tmp_path):
    """Up 4 (K + L); down 4 (K + L + 2) for each answer that is new. K = 256, and L = 8 by the rule on blocks."""
    one = workspace(tmp_path)
    states = play(one, 1, lambda number: (0, 1))
    update = local_update(one, RUN, 2, 2, one.strategy.configure(states[1], 2, ClientInfo(2, 1)))
    assert sum(tensor.nbytes for tensor in update.tensors.values()) == 4 * (256 + 8)
    told = one.strategy.configure(states[1], 2, ClientInfo(2, 1))
    assert sum(tensor.nbytes for tensor in told.tensors.values()) == 2 * 4 * (256 + 8 + 2)


def test_a_client_that_is_told_of_the_wrong_rounds_says_so(tmp_path):
    one = workspace(tmp_path)
    model = SimpleNamespace(layout=one.model.layout, seeded=one.model.seeded)
    state = State(*(torch.cat([tensor] * 2) for tensor in vars(one_answer(one)).values()))
    told = one.strategy.configure(state, 2, ClientInfo(0, 1, base_version=1))
    with pytest.raises(ClientError, match="go on from number 1; this client knows 0"):
        one.client.receive(model, told, {})
    told.tensors[BUDGET] = told.tensors[BUDGET][:0]
    memory = {VERSION: torch.tensor(1), **vars(one_answer(one))}
    with pytest.raises(ClientError, match="'budget' is of 1 answers, expected 2"):
        one.client.receive(model, told, memory)
    del told.settings["noise"]
    with pytest.raises(ClientError, match="'noise' is missing"):
        one.client.receive(model, told, {})


def one_answer(one):
    blocks = len(blocks_of(one.model.layout))
    budget = torch.from_numpy(budget_of([1.0] * blocks, 256)).int()[None]
    return State(torch.zeros(1, 2, dtype=torch.int32), budget, torch.ones(1, 256, dtype=torch.int32))


def test_a_run_learns_and_resumes_to_the_same_state(small_run):
    words = [*WORDS, "train.lr=3e-3"]
    whole = small_run(*words, name="whole", rounds=2)
    parts = small_run(*words, name="parts", rounds=1)
    run_local(compose([*SMALL, *words, "rounds=2", f"out={parts}"]), resume=str(parts))
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"]
    losses = [float(row["eval_loss"]) for row in rows(whole, "metrics.csv")]
    assert losses[-1] < losses[0] - 0.1, losses
