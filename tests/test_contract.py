"""What every method promises, on the real engine: a new file in conf/method is taken up here by itself.

Each method plays two plain rounds, and its algebra is tried on tensors. One method of each kind, of the same traits and
the same class of clients, plays a whole run of three rounds and the third of the two again, and is sent and sends in
few bits. What the engine does with whoever lies, drops out or stays away is tried where a method changes how: with one
that averages, stacks, goes along seeded directions, is personal, or asynchronous.
"""

import dataclasses
import importlib
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import of_each_kind, rows, run_on, small, summary_of, traits_of_method
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto

from fedtune.config.compatibility import traits_of
from fedtune.config.compose import build, choices, load
from fedtune.core.errors import QuorumError, WireError
from fedtune.core.protocol import SERVER, ClientInfo, Update
from fedtune.lowrank.algebra import lora_factors
from fedtune.lowrank.residual import from_residual
from fedtune.models.base_delta import DENSE
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.wire import messages as wire
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace

METHODS = choices("method")
# One whose server averages, one that stacks, one along seeded directions, a personal one and an asynchronous one
ENGINES = ("fedit", "flora", "fedkseed", "fedsa_lora", "fedbuff")
each_engine = pytest.mark.parametrize("method", ENGINES)
KINDS = of_each_kind(METHODS)
# While one works, one of each kind will do
each_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in METHODS]
)
each_kind = pytest.mark.parametrize("method", KINDS)


def of(method):
    return f"method={method}", *SEEDED.get(method, ())


# Few and large steps, for two rounds of which the tiny model has to learn something
_STEPS = ("method.strategy.rules.local_steps=4", "method.strategy.rules.lr=3e-4", "method.strategy.rules.eps=1e-3")
SEEDED = {
    "fedkseed": (*_STEPS, "method.strategy.directions=64"),
    "fedkseed_pro": (*_STEPS, "method.strategy.directions=64"),
    "decomfl": (*_STEPS, "method.strategy.rules.perturbations=2"),
    "mezo": _STEPS,
    "ferret": ("method.strategy.rules.directions=256",),
}


def party_of(method, out=Path("unused")):
    """Args:
    out: what its clients remember goes there; without turns, nothing does.
    """
    return Workspace(small(*of(method), "rounds=2", out=out))


def among_several(method):
    if small(*of(method), out=Path("unused")).method.pooled:
        pytest.skip("one client has all the data: there is nobody to be left with")


def without_times(table):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in table]


@pytest.fixture
def two_rounds(method, shared_run):
    """The folder of the method's plain run."""
    return shared_run(*of(method))


@each_method
@pytest.mark.quick
def test_two_rounds_learn_and_leave_a_whole_folder(method, two_rounds):
    metrics = rows(two_rounds, "metrics.csv")
    assert [row["round"] for row in metrics] == ["0", "1", "2"]
    assert float(metrics[2]["eval_loss"]) < float(metrics[0]["eval_loss"])
    assert summary_of(two_rounds)["status"] == "finished"
    result = "model.fedtune" if method in SEEDED else "adapter"
    assert {path.name for path in two_rounds.iterdir()} >= {
        "config.yaml", "metrics.csv", "ledger.csv", "summary.json", "checkpoint", result,
    }  # fmt: skip


@each_method
def test_its_settings_are_read_back(method):
    experiment = small(*of(method), out=Path("unused"))
    assert load(experiment.text()) == experiment


@each_method
def test_its_yaml_lists_all_hyper_parameters_and_builds(method):
    composed = small(*of(method), out=Path("unused")).method
    for side in (composed.strategy, composed.client):
        module, _, cls = side["_target_"].rpartition(".")
        fields = dataclasses.fields(getattr(importlib.import_module(module), cls))
        assert {item.name for item in fields if "by_engine" not in item.metadata} == side.keys() - {"_target_"}
        assert dataclasses.is_dataclass(build(side, method, allowed=()))  # as another's


@each_kind
@pytest.mark.slow
def test_resume_equals_uninterrupted_and_one_seed_has_one_result(method, tmp_path, two_rounds, captured):
    """The first two rounds of both are the same ones, played twice: by clients that are trained one by one, on a Grid
    that knows no other way, and by as many at once as there are in a round."""
    whole, parts = captured(method).folder, tmp_path / "parts"
    shutil.copytree(two_rounds, parts)
    run_local(small(*of(method), "rounds=3", out=parts), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]
    assert without_times(rows(whole, "metrics.csv")) == without_times(rows(parts, "metrics.csv"))
    ledgers = [[row for row in rows(of, "ledger.csv") if row["part"] != "handshake"] for of in (whole, parts)]
    assert without_times(ledgers[0]) == without_times(ledgers[1])  # whoever goes on asks anew who is there
    result = "model.fedtune" if method in SEEDED else "adapter/adapter_model.safetensors"
    assert (whole / result).read_bytes() == (parts / result).read_bytes()


@each_engine
@pytest.mark.slow
def test_another_seed_has_another_result(method, two_rounds, small_run):
    other = small_run(*of(method), "seed=1", name="other", rounds=1)
    assert rows(other, "metrics.csv")[1]["train_loss"] != rows(two_rounds, "metrics.csv")[1]["train_loss"]


def sent(folder, direction):
    return sum(int(row["payload_bytes"]) for row in rows(folder, "ledger.csv") if row["direction"] == direction)


# Where what is sent has, in part, no start that the other end was told, and goes whole: it saves less than half
PARTLY = {("fed_sb", "down"), ("scaffold", "up"), ("scaffold", "down")}


@each_kind
@pytest.mark.slow
def test_lossy_codecs_where_the_method_takes_them_save_bytes(method, two_rounds, small_run):
    """int8 in each direction that the method's traits allow, against the same run with raw."""
    allowed = {"up": traits_of_method(method).lossy_up, "down": traits_of_method(method).lossy_down}
    if not any(allowed.values()):
        pytest.skip("what it sends has to come as it is")
    codecs = [f"codec_{direction}={'int8' if fits else 'raw'}" for direction, fits in allowed.items()]
    folder = small_run(*of(method), *codecs, name="int8")
    assert summary_of(folder)["status"] == "finished"
    assert not rows(folder, "failures.csv")
    assert [row["failed"] for row in rows(folder, "metrics.csv")] == ["0", "0", "0"]
    if method == "local_only":
        return  # it sends no tensor either way
    for direction, fits in allowed.items():
        mine, raw = sent(folder, direction), sent(two_rounds, direction)
        if not fits:
            assert mine == raw
        elif (method, direction) in PARTLY:
            assert raw / 2 < mine < raw
        else:
            assert 0 < mine < raw / 2


class CapturingGrid(LocalGrid):
    """The real Grid, measuring what crosses it in serialised form."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.captured = []  # (round, client, direction, bytes of the message, bytes of its blob)
        self.index = {node: context.node_config["partition-id"] for node, context in self._contexts.items()}

    def keep(self, message, direction, node):
        blob = wire.payload_bytes(message.content) if message.has_content() and "payload" in message.content else 0
        size = len(message_to_proto(message).SerializeToString())
        self.captured.append((int(message.metadata.group_id), self.index[node], direction, size, blob))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            self.keep(message, "down", message.metadata.dst_node_id)
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self.keep(reply, "up", reply.metadata.src_node_id)
        return replies


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A method's run of three rounds on a CapturingGrid, played once; its folder is the grid's `folder`."""

    @cache
    def play(method):
        folder = tmp_path_factory.mktemp("captured") / "run"
        grid = run_on(CapturingGrid, make_client_app(), folder, *of(method), "rounds=3")
        grid.folder = folder
        return grid

    return play


@each_kind
@pytest.mark.slow
def test_the_ledger_is_what_crossed_the_grid(method, captured):
    among_several(method)
    grid = captured(method)
    booked = [
        (int(r["round"]), int(r["client"]), r["direction"], int(r["wire_bytes"]), int(r["payload_bytes"]))
        for r in rows(grid.folder, "ledger.csv")
    ]
    assert sorted(booked) == sorted(grid.captured)
    looks = (
        2 * 4 * 4 if traits_of_method(method).personal else 0
    )  # all four are asked after each round, and before the first
    assert len(booked) == 2 * 4 + 2 * 3 * 3 + looks  # a handshake with all four, and three rounds with three of them
    totals = summary_of(grid.folder)["totals"]
    for direction in ("up", "down"):
        assert totals[f"{direction}_wire_bytes"] == sum(
            size for _, _, way, size, _ in grid.captured if way == direction
        )


def tampering_app(tamper):
    """The real ClientApp, whose replies to train messages pass through `tamper(index, reply)`."""
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))
    app.evaluate()(lambda message, context: inner(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return tamper(context.node_config["partition-id"], inner(message, context))

    return app


@pytest.fixture(scope="module")
def tampered(tmp_path_factory):
    """A method's run of four rounds with all four clients, played once for each way to tamper with replies."""

    @cache
    def play(method, tamper):
        folder = tmp_path_factory.mktemp("tampered") / "run"
        how = partial(tamper, party_of(method).codec_up)
        run_on(LocalGrid, tampering_app(how), folder, *of(method), "rounds=4", "population.cohort=4")
        return folder

    return play


def without_client_one(codec, index, reply):
    if index == 1:
        raise ConnectionError("the battery is flat")
    return reply


@each_engine
@pytest.mark.slow
def test_a_round_goes_on_without_a_client_that_drops_out(method, tampered):
    folder = tampered(method, without_client_one)
    failures = rows(folder, "failures.csv")
    assert [(r["round"], r["client"]) for r in failures] == [(number, "1") for number in "1234"]
    assert "the battery is flat" in failures[0]["error"]
    failed = [r for r in rows(folder, "ledger.csv") if r["part"] == "failed"]
    assert [(r["round"], r["client"], r["direction"], r["payload_bytes"]) for r in failed] == [
        (number, "1", "up", "0") for number in "1234"
    ]
    assert [r["failed"] for r in rows(folder, "metrics.csv")] == ["0", "1", "1", "1", "1"]


def something(update):
    """The update's tensors, or one where there should be none."""
    return update.tensors or {"": torch.zeros(1)}


def not_finite(content, codec):
    update = wire.unpack_update(content, wire.blob_of(content), codec)
    broken = {name: torch.full(tensor.shape, float("nan")) for name, tensor in something(update).items()}
    return wire.pack_update(Update(broken, update.examples, update.metrics), codec, 0)


def too_many_examples(content, codec):
    update = wire.unpack_update(content, wire.blob_of(content), codec)
    return wire.pack_update(Update(update.tensors, 10**12, update.metrics), codec, 0)


def renamed(content, codec):
    update = wire.unpack_update(content, wire.blob_of(content), codec)
    return wire.pack_update(Update({f"x{n}": t for n, t in something(update).items()}, update.examples), codec, 0)


def nothing(content, codec):
    return RecordDict()


LIES = {"1": not_finite, "2": too_many_examples, "3": renamed, "4": nothing}  # by round


def client_one_lies(codec, index, reply):
    if index == 1:
        reply.content = LIES[reply.metadata.group_id](reply.content, codec)
    return reply


@each_engine
@pytest.mark.slow
@pytest.mark.parametrize("number", LIES, ids=lambda number: LIES[number].__name__)
def test_a_lying_client_changes_nothing(method, number, tampered):
    """The result is the one without that client, to the last bit: the loss after the round of this lie, and the state
    at the end."""
    lied, dropped = tampered(method, client_one_lies), tampered(method, without_client_one)
    one, other = (rows(folder, "metrics.csv")[int(number)] for folder in (lied, dropped))
    assert (one["clients"], one["failed"]) == ("3", "1")
    assert one["eval_loss"] == other["eval_loss"]
    assert summary_of(lied)["totals"]["failed"] == 4
    assert summary_of(lied)["state_sha256"] == summary_of(dropped)["state_sha256"]


@each_engine
@pytest.mark.slow
def test_fewer_replies_than_the_quorum_stop_the_run_and_keep_what_was_done(method, tmp_path, captured):
    asked = []

    def fail_in_round_two(index, reply):
        if reply.metadata.group_id == "2":
            asked.append(index)
            if len(asked) > 1:
                raise ConnectionError("gone")
        return reply

    words, folder = (*of(method), "rounds=3"), tmp_path / "run"
    with pytest.raises(
        QuorumError, match=r"round 2: 1 of 3 clients gave a usable update, population.quorum asks for 2"
    ):
        run_on(LocalGrid, tampering_app(fail_in_round_two), folder, *words)
    summary = summary_of(folder)
    assert (summary["status"], summary["rounds"]) == ("failed", 1)
    assert [r["round"] for r in rows(folder, "metrics.csv")] == ["0", "1"]
    assert len(rows(folder, "failures.csv")) == 2
    run_local(small(*words, out=folder), str(folder))
    assert summary_of(folder)["state_sha256"] == summary_of(captured(method).folder)["state_sha256"]


RUN = "0" * 16


@pytest.fixture(scope="module")
def first_updates(tmp_path_factory):
    """A method's strategy, its first state, what all clients answer to it, and the hashes of both, made once."""

    @cache
    def make(method):
        workspace = party_of(method, tmp_path_factory.mktemp("first"))
        state = workspace.strategy.init(workspace.layout)
        peers = [
            ClientInfo(index, workspace.samples(index)) for index in range(workspace.experiment.population.clients)
        ]
        updates = [
            local_update(workspace, RUN, peer.index, 1, workspace.strategy.configure(state, 1, peer)) for peer in peers
        ]
        replies = list(zip(peers, updates, strict=True))
        return workspace.strategy, state, replies, hashes(state, replies)

    return make


def hashes(state, replies):
    return state_sha256(state), [state_sha256(update) for _, update in replies]


@pytest.mark.slow
@each_method
def test_identical_clients_are_a_fixed_point(method, first_updates):
    if method == "ferret":
        pytest.skip("each client has directions of its own, so that equal coordinates are no equal updates")
    strategy, state, replies, _ = first_updates(method)
    peer, update = replies[0]
    alone = strategy.aggregate(state, 1, [(peer, update)])
    together = strategy.aggregate(state, 1, [(ClientInfo(index, peer.samples), update) for index in range(7)])
    if traits_of(strategy).averages:
        assert state_sha256(alone.adapter) == state_sha256(together.adapter)
    workspace = party_of(method)
    one, seven = (
        change_of(workspace, strategy.configure(after, 2, ClientInfo(SERVER, 1))) for after in (alone, together)
    )
    assert one.keys() == seven.keys()
    for module, matrix in one.items():
        torch.testing.assert_close(seven[module], matrix, rtol=0, atol=1e-6 * float(matrix.abs().max()) + 1e-12)


def change_of(workspace, instruction):
    """What a client that installs this adds to the base, layer by layer, as whole matrices."""
    workspace.install(instruction, {})
    model = workspace.model
    if not model.layout.is_low_rank:
        return {name: tensor.double() - model.layout.initial[name].double() for name, tensor in model.adapter().items()}
    change = {
        module: model.scaling * p.b.double() @ p.a.double() for module, p in lora_factors(model.adapter()).items()
    }
    for module, product in from_residual(model.base_delta.tensors).items():
        change[module] = change[module] + product.b.double() @ product.a.double()
    for name, matrix in model.base_delta.tensors.items():
        if name.endswith(DENSE):
            change[name.removesuffix(DENSE)] += matrix.double()
    return change


@pytest.mark.slow
@each_method
def test_an_update_with_tensors_of_other_names_is_refused(method, first_updates):
    strategy, state, replies, _ = first_updates(method)
    peer, update = replies[0]
    strategy.validate(state, 1, peer, update)
    other = replace(update, tensors={f"x{name}": tensor for name, tensor in something(update).items()})
    with pytest.raises(WireError):
        strategy.validate(state, 1, peer, other)


@each_method
def test_aggregating_changes_neither_the_old_state_nor_the_updates(method, first_updates):
    strategy, state, replies, before = first_updates(method)
    strategy.aggregate(state, 1, replies)
    assert before == hashes(state, replies)


@pytest.mark.slow
@each_kind
def test_a_turn_leaves_no_trace_in_the_next(method, first_updates, tmp_path):
    """A client's update is the same whether it goes first or after all others."""
    _, _, forward, _ = first_updates(method)
    workspace = party_of(method, tmp_path)
    state = workspace.strategy.init(workspace.layout)
    backward = {
        index: local_update(workspace, RUN, index, 1, workspace.strategy.configure(state, 1, ClientInfo(index, 1)))
        for index in reversed(range(workspace.experiment.population.clients))
    }
    assert all(state_sha256(update) == state_sha256(backward[peer.index]) for peer, update in forward)
