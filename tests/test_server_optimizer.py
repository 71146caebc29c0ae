"""Server optimizers, against three rounds worked out by hand for each.

The clients' average is put delta away from the adapter; what is checked is how far the server goes.

FedAvgM, lr 1/2, momentum 1/2: m = m/2 + delta, step = m/2

    delta    4    4   -2
    m        4    6    1
    step     2    3   1/2

FedAdam, lr 2, beta1 1/2, beta2 3/4, tau 1: m = m/2 + delta/2, v = 3v/4 + delta^2/4, v before the first round 1

    delta    1     11/4             13/8
    m        1/2   13/8             13/8
    v        1     (13/8)^2         (13/8)^2
    step     1/2   2 13/8 / (13/8 + 1) = 26/21 twice           with bias correction the first would be 2

FedYogi, the same rates: v = v - sign(v - delta^2) delta^2/4

    delta    1     3/2              7/10
    m        1/2   1                17/20
    v        1     25/16 (up)       36/25 (down)
    step     1/2   2 / (9/4) = 8/9  1.7 / 2.2 = 17/22

FedAdagrad, lr 2, beta1 0, tau 3: v = v + delta^2, from 9

    delta    4     12               -84
    v        25    169              7225
    step     8/8   24/16 = 3/2      -168/88 = -21/11
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, many, of_each_kind, summary_of, traits_of_method
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flwr_strategies
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.compose import build, choices, compose
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Layout, Slot, Traits, Update
from fedtune.runs.checkpoint import flatten, state_sha256, unflatten
from fedtune.runtime.local import run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.fedadagrad import FedAdagrad
from strategies.fedadam import FedAdam
from strategies.fedavgm import FedAvgM
from strategies.fedit import FedIT
from strategies.fedyogi import FedYogi
from strategies.krum import Krum

A, B = "layer.lora_A.weight", "layer.lora_B.weight"  # (1, 3) and (2, 1)
OPTIMIZERS = [name for name in choices("server_optimizer") if name != "none"]
PLAIN = ("server_optimizer=fedavgm", "server_optimizer.momentum=0", "server_optimizer.lr=1")


def layout(dtype=torch.float64, start=1.0):
    tensors = {A: torch.full((1, 3), start, dtype=dtype), B: torch.zeros(2, 1, dtype=dtype)}
    name = str(dtype).removeprefix("torch.")
    return Layout(
        tuple(Slot(n, tuple(t.shape), name, n.split(".")[1], "layer", 2.0) for n, t in tensors.items()), tensors
    )


def reply(index, tensors, examples=1):
    return ClientInfo(index, examples), Update(tensors, examples)


def averages():
    return [method for method in choices("method") if traits_of_method(method).averages]


@pytest.mark.parametrize(
    ("method", "deltas", "steps"),
    [
        (FedAvgM(FedIT(), 0.5, 0.5), (4, 4, -2), (2, 3, 1 / 2)),
        (FedAdam(FedIT(), 2.0, 0.5, 0.75, 1.0), (1, 11 / 4, 13 / 8), (1 / 2, 26 / 21, 26 / 21)),
        (FedYogi(FedIT(), 2.0, 0.5, 0.75, 1.0), (1, 3 / 2, 7 / 10), (1 / 2, 8 / 9, 17 / 22)),
        (FedAdagrad(FedIT(), 2.0, 0.0, 3.0), (4, 12, -84), (1, 3 / 2, -21 / 11)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_three_rounds_by_hand(method, deltas, steps):
    state = method.init(layout())
    signs = {A: torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64), B: torch.tensor([[1.0], [-1.0]]).double()}
    expected = {name: tensor.clone() for name, tensor in state.base.adapter.items()}
    for number, (delta, step) in enumerate(zip(deltas, steps, strict=True), 1):
        sent = method.configure(state, number, ClientInfo(0, 1)).tensors
        # Weights 1/4 and 3/4: the first client is three times as far off, on the other side
        replies = [
            reply(0, {n: t + signs[n] * (delta + 3) for n, t in sent.items()}, 1),
            reply(1, {n: t + signs[n] * (delta - 1) for n, t in sent.items()}, 3),
        ]
        state = method.aggregate(state, number, replies)
        for name in expected:
            expected[name] += signs[name] * step
            assert torch.allclose(state.base.adapter[name], expected[name], rtol=0, atol=1e-12)


def flowers(strategy, sent, replies, number):
    """What Flower's own strategy makes of a round: arrays by name."""
    grid = SimpleNamespace(get_node_ids=lambda: range(1, len(replies) + 1))
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in sent.items()})
    questions = strategy.configure_train(number, arrays, ConfigRecord(), grid)
    answers = []
    for question, (_, update) in zip(questions, replies, strict=True):
        mine = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in update.tensors.items()})
        metrics = MetricRecord({"num-examples": update.examples})
        answers.append(Message(RecordDict({"arrays": mine, "metrics": metrics}), reply_to=question))
    found, _ = strategy.aggregate_train(number, answers)
    return {name: torch.from_numpy(array.numpy()) for name, array in found.items()}


@pytest.mark.parametrize(
    ("cls", "theirs", "rates"),
    [
        (FedAdam, flwr_strategies.FedAdam, {"lr": 0.1}),
        (FedAdam, flwr_strategies.FedAdam, {"lr": 0.02, "beta1": 0.5, "beta2": 0.75, "tau": 0.1}),
        (FedYogi, flwr_strategies.FedYogi, {}),
        (FedYogi, flwr_strategies.FedYogi, {"lr": 0.1, "beta1": 0.5, "beta2": 0.75, "tau": 0.1}),
        (FedAdagrad, flwr_strategies.FedAdagrad, {"lr": 0.1}),
        (FedAdagrad, flwr_strategies.FedAdagrad, {"lr": 0.02, "tau": 0.1}),
    ],
)
def test_flowers_form_is_flowers_own_over_several_rounds(cls, theirs, rates, monkeypatch):
    """And with the rates alike the paper's is another: by up to lr a round, which is Adam's whole step."""
    for name in ("_task_id", "_run_id", "_node_id"):  # without which Flower makes no message
        monkeypatch.setattr(TaskIdentity, name, 1)
    named = {"lr": "eta", "beta1": "beta_1", "beta2": "beta_2", "tau": "tau"}
    oracle = theirs(**{named[name]: value for name, value in rates.items()})
    method, paper = cls(FedIT(), form="flower", **rates), cls(FedIT(), **rates)
    draw = torch.Generator().manual_seed(0)
    states, apart = (method.init(layout()), paper.init(layout())), 0.0
    for number in range(1, 7):
        moved = [
            {name: torch.randn(t.shape, generator=draw).double() / 100 for name, t in layout().initial.items()}
            for _ in range(3)
        ]
        after = []
        for each, state in zip((method, paper), states, strict=True):
            sent = each.configure(state, number, ClientInfo(0, 1)).tensors
            replies = [
                reply(index, {name: sent[name] + step for name, step in moves.items()}, index + 1)
                for index, moves in enumerate(moved)
            ]
            after.append(each.aggregate(state, number, replies))
            if each is method:
                expected = flowers(oracle, sent, replies, number)
        states = tuple(after)
        for name, tensor in expected.items():
            assert torch.allclose(states[0].base.adapter[name], tensor, rtol=0, atol=1e-12)
            apart = max(apart, float((states[1].base.adapter[name] - tensor).abs().max()))
    assert apart > 1e-3


@pytest.mark.slow
@many()
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_a_step_of_all_the_way_ends_at_the_average_to_the_last_bit(start, sent):
    """x + (average - x), computed like that, misses the average's bits where x is much the larger."""
    begin = layout(torch.float32)
    begin.initial[A].copy_(torch.tensor([start]))
    replies = [reply(i, {A: torch.tensor([a]), B: torch.ones(2, 1)}, i + 1) for i, a in enumerate(sent)]
    method = FedAvgM(FedIT(), lr=1.0, momentum=0.0)
    stepped = method.aggregate(method.init(begin), 1, replies).base
    assert state_sha256(stepped) == state_sha256(FedIT().aggregate(FedIT().init(begin), 1, replies))


@pytest.mark.parametrize("method", of_each_kind(averages()))
def test_with_neither_momentum_nor_rate_a_run_is_the_methods_own_to_the_last_bit(method, small_run):
    own = small_run(f"method={method}", name="own")
    stepped = small_run(f"method={method}", *PLAIN, name="stepped")
    file = "adapter/adapter_model.safetensors"
    assert (own / file).read_bytes() == (stepped / file).read_bytes()
    both = summary_of(own)["totals"], summary_of(stepped)["totals"]
    assert both[0] == both[1]
    assert summary_of(stepped)["server_optimizer"] == "fedavgm"


@pytest.mark.parametrize("cls", [FedAvgM, FedAdam, partial(FedAdam, form="flower"), FedYogi, FedAdagrad])
def test_a_tensor_that_nobody_trained_stays_to_the_last_bit_and_keeps_its_momentum(cls):
    method = cls(FedIT())
    state = method.init(layout(torch.float32))
    state = method.aggregate(state, 1, [reply(0, {A: torch.full((1, 3), 0.7), B: torch.ones(2, 1)})])
    frozen = {A: state.base.adapter[A], B: torch.full((2, 1), 3.0)}
    after = method.aggregate(state, 2, [reply(0, frozen), reply(1, frozen)])
    assert torch.equal(after.base.adapter[A], state.base.adapter[A])
    assert state_sha256(after.moments[A]) == state_sha256(state.moments[A])
    assert not torch.equal(after.base.adapter[B], state.base.adapter[B])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rolora_s_frozen_factor_stays_to_the_last_bit(name):
    workspace = Workspace(compose([*SMALL, "method=rolora", f"server_optimizer={name}", "population.cohort=4"]))
    state = workspace.strategy.init(workspace.model.layout)
    for round in range(1, 5):
        peers = [ClientInfo(index, workspace.samples(index)) for index in range(2)]
        replies = [
            (
                peer,
                local_update(workspace, "0" * 16, peer.index, round, workspace.strategy.configure(state, round, peer)),
            )
            for peer in peers
        ]
        before, state = state, workspace.strategy.aggregate(state, round, replies)
        for tensor_name, tensor in state.base.adapter.items():
            trained = ("lora_B" if round % 2 else "lora_A") in tensor_name
            assert torch.equal(tensor, before.base.adapter[tensor_name]) is not trained


@pytest.mark.parametrize("cls", [FedAvgM, FedAdam, FedYogi, FedAdagrad])
def test_the_order_of_clients_changes_nothing_but_rounding(cls):
    method = cls(FedIT())
    rng = torch.Generator().manual_seed(0)

    def drawn():
        return {A: torch.randn(1, 3, generator=rng).double(), B: torch.randn(2, 1, generator=rng).double()}

    replies = [reply(index, drawn(), index + 1) for index in range(5)]
    one = method.aggregate(method.init(layout()), 1, replies).base.adapter
    other = method.aggregate(method.init(layout()), 1, replies[::-1]).base.adapter
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-12) for name in one)


@pytest.mark.parametrize("cls", [FedAvgM, FedAdam, partial(FedAdam, form="flower"), FedYogi, FedAdagrad])
def test_what_is_remembered_survives_a_checkpoint_and_is_float64(cls):
    method = cls(FedIT())
    begun = method.init(layout(torch.float32))
    state = method.aggregate(begun, 1, [reply(0, {A: torch.zeros(1, 3), B: torch.ones(2, 1)})])
    tree, tensors = flatten(state)
    back = unflatten(tree, tensors, begun)
    assert state_sha256(back) == state_sha256(state)
    assert {t.dtype for moments in back.moments.values() for t in moments.values()} == {torch.float64}
    assert {t.dtype for t in back.base.adapter.values()} == {torch.float32}


@dataclasses.dataclass(frozen=True)
class Richer:
    """A state with more than an adapter: how often it was aggregated, and what was merged."""

    adapter: dict
    rounds: int = 0
    merged: str = "something"


@dataclasses.dataclass(frozen=True)
class Inside(FedIT):
    traits = Traits(averages=True, mixed_ranks=True, needs_low_rank=True, personal=True)

    def init(self, layout):
        return Richer(dict(layout.initial))

    def aggregate(self, state, round, replies):
        return Richer(super().aggregate(state, round, replies).adapter, state.rounds + 1)


def test_the_rest_of_the_state_and_the_traits_are_those_of_the_method_inside():
    method = FedAvgM(Inside())
    state = method.init(layout(torch.float32))
    state = method.aggregate(state, 1, [reply(0, {A: torch.ones(1, 3), B: torch.ones(2, 1)})])
    assert (state.base.rounds, state.merged) == (1, "something")
    inside = Traits(averages=False, mixed_ranks=True, needs_low_rank=True, personal=True)
    assert method.traits == dataclasses.replace(inside, title="FedAvgM")
    one, other = (method.configure(state, 2, ClientInfo(index, 1)).tensors for index in (0, 1))
    assert one is other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=local_only", "server_optimizer=fedadam"], ["server_optimizer=fedadam", "method=local_only"]),
        (["method=fedadam", "server_optimizer=fedyogi"], ["server_optimizer=fedyogi", "method=fedadam"]),
        (["server_optimizer=fedadam", "server_optimizer.tau=0"], ["fedadam's tau=0 must be above 0"]),
        (["server_optimizer=fedyogi", "server_optimizer.beta2=1"], ["fedyogi's beta2=1 must be a fraction"]),
        (["method=fedyogi", "method.strategy.form=flwr"], ["fedyogi's form=flwr is not known: expected paper, flower"]),
        (["method=fedavgm", "method.strategy.lr=-1"], ["fedavgm's lr=-1 must be above 0"]),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(words, said):
    with pytest.raises(ConfigError) as caught:
        Workspace(compose(["model=tiny", *words]))
    assert all(part in str(caught.value) for part in said)


def test_a_step_towards_no_average_is_refused_by_the_strategy_too():
    with pytest.raises(ConfigError, match="server_optimizer=fedadam steps towards the average"):
        FedAdam(FedAdam(FedIT()))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_ways_to_it_are_one(name):
    """method=fedadam is FedIT with server_optimizer=fedadam, down to the hyper-parameters."""
    whole, added = compose([f"method={name}"]), compose([f"server_optimizer={name}"])
    assert build(whole.strategy, name) == build(added.strategy, name)
    assert whole.method.client == added.method.client
    assert build(compose([f"server_optimizer={name}", "method=krum"]).strategy, name).base == Krum()


def test_a_resumed_run_goes_on_with_what_was_remembered(small_run):
    words = ("method=krum", "server_optimizer=fedadam", "server_optimizer.lr=0.02")
    whole = small_run(*words, name="whole", rounds=4)
    parts = small_run(*words, name="parts", rounds=2)
    run_local(compose([*SMALL, *words, "rounds=4", f"out={parts}"]), resume=str(parts))
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"]
