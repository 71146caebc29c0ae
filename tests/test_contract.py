"""What every method promises, on the real engine: a new file in conf/method is taken up here by itself."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, rows, run_on, summary_of
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto

from fedtune import wire
from fedtune.base_change import DENSE
from fedtune.checkpoint import state_sha256
from fedtune.config import choices, compose
from fedtune.errors import QuorumError
from fedtune.lowrank import pairs
from fedtune.merging import from_residual
from fedtune.party import Party
from fedtune.protocol import SERVER, Peer, Update
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.traits import traits_of

METHODS = choices("method")
PAIRS = Path(__file__).with_name("pairs.jsonl")
pytestmark = pytest.mark.parametrize("method", METHODS)


def of(method):
    """The words for a method, on few and short examples: most of a small run is tokenising."""
    return f"method={method}", f"data.path={PAIRS}", *SEEDED.get(method, ())


# Few and large steps, for two rounds of which the tiny model has to learn something
_STEPS = ("method.strategy.rules.local_steps=4", "method.strategy.rules.lr=3e-4", "method.strategy.rules.eps=1e-3")
SEEDED = {
    "fedkseed": (*_STEPS, "method.strategy.directions=64"),
    "fedkseed_pro": (*_STEPS, "method.strategy.directions=64"),
    "decomfl": (*_STEPS, "method.strategy.rules.perturbations=2"),
    "mezo": _STEPS,
    "ferret": ("method.strategy.rules.directions=256",),
}


def among_several(method):
    if compose(["model=tiny", *of(method)]).method.pooled:
        pytest.skip("one client has all the data: there is nobody to be left with")


def personal(method):
    return traits_of(Party(compose(["model=tiny", *of(method)])).strategy).personal


def without_times(table):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in table]


def test_two_rounds_learn_and_leave_a_whole_folder(method, small_run):
    folder = small_run(*of(method))
    metrics = rows(folder, "metrics.csv")
    assert [row["round"] for row in metrics] == ["0", "1", "2"]
    assert float(metrics[2]["eval_loss"]) < float(metrics[0]["eval_loss"])
    assert summary_of(folder)["status"] == "finished"
    result = "model.fedtune" if method in SEEDED else "adapter"
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "metrics.csv", "ledger.csv", "summary.json", "checkpoint", result,
    }  # fmt: skip


def test_one_seed_has_one_result(method, small_run):
    one, again = small_run(*of(method), name="one"), small_run(*of(method), name="again")
    assert summary_of(one)["state_sha256"] == summary_of(again)["state_sha256"]
    assert without_times(rows(one, "metrics.csv")) == without_times(rows(again, "metrics.csv"))
    assert without_times(rows(one, "ledger.csv")) == without_times(rows(again, "ledger.csv"))
    other = small_run(*of(method), "seed=1", name="other")
    assert summary_of(other)["state_sha256"] != summary_of(one)["state_sha256"]


def test_resume_equals_uninterrupted(method, tmp_path, small_run):
    whole = small_run(*of(method), name="whole", rounds=4)
    parts = small_run(*of(method), name="parts", rounds=2)
    run_local(compose([*SMALL, "rounds=4", *of(method), f"out={parts}"]), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]
    assert without_times(rows(whole, "metrics.csv")) == without_times(rows(parts, "metrics.csv"))
    result = "checkpoint/state.safetensors" if method in SEEDED else "adapter/adapter_model.safetensors"
    if method not in SEEDED:
        assert (whole / result).read_bytes() == (parts / result).read_bytes()


class CapturingGrid(LocalGrid):
    """The real Grid, keeping what crosses it in serialised form."""

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


def test_the_ledger_is_what_crossed_the_grid(method, tmp_path):
    among_several(method)
    grid = run_on(CapturingGrid, make_client_app(), tmp_path / "run", *of(method), "rounds=3")
    booked = [
        (int(r["round"]), int(r["peer"]), r["direction"], int(r["wire_bytes"]), int(r["payload_bytes"]))
        for r in rows(tmp_path / "run", "ledger.csv")
    ]
    assert sorted(booked) == sorted(grid.captured)
    looks = 2 * 4 * 4 if personal(method) else 0  # all four are asked after each round, and before the first
    assert len(booked) == 2 * 4 + 2 * 3 * 3 + looks  # a handshake with all four, and three rounds with three of them
    totals = summary_of(tmp_path / "run")["totals"]
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


def test_a_round_goes_on_without_a_client_that_drops_out(method, tmp_path):
    among_several(method)

    def drop_the_first(index, reply):
        if index == 0:
            raise ConnectionError("the battery is flat")
        return reply

    overrides = [*of(method), "rounds=2", "population.cohort=4"]
    run_on(LocalGrid, tampering_app(drop_the_first), tmp_path / "run", *overrides)
    failures = rows(tmp_path / "run", "failures.csv")
    assert [(r["round"], r["peer"]) for r in failures] == [("1", "0"), ("2", "0")]
    assert "the battery is flat" in failures[0]["error"]
    failed = [r for r in rows(tmp_path / "run", "ledger.csv") if r["part"] == "failed"]
    assert [(r["round"], r["peer"], r["direction"], r["payload_bytes"]) for r in failed] == [
        ("1", "0", "up", "0"),
        ("2", "0", "up", "0"),
    ]
    assert [r["failed"] for r in rows(tmp_path / "run", "metrics.csv")] == ["0", "1", "1"]


def something(update):
    """The update's tensors, or one where there should be none."""
    return update.tensors or {"": torch.zeros(1)}


def lies():
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

    return [not_finite, too_many_examples, renamed, nothing]


RUN = "0" * 16


@pytest.mark.parametrize("lie", lies(), ids=lambda lie: lie.__name__)
def test_a_lying_client_changes_nothing(method, lie, tmp_path):
    """The result is the one without that client, to the last bit."""
    among_several(method)
    codec = Party(compose(["model=tiny", *of(method)])).codec_up

    def tamper(index, reply):
        if index == 1:
            reply.content = lie(reply.content, codec)
        return reply

    def drop(index, reply):
        if index == 1:
            raise ConnectionError("gone")
        return reply

    overrides = [*of(method), "rounds=1", "population.cohort=4"]
    run_on(LocalGrid, tampering_app(tamper), tmp_path / "lied", *overrides)
    run_on(LocalGrid, tampering_app(drop), tmp_path / "dropped", *overrides)
    lied, dropped = summary_of(tmp_path / "lied"), summary_of(tmp_path / "dropped")
    assert lied["totals"]["failed"] == 1
    assert lied["state_sha256"] == dropped["state_sha256"]


def test_fewer_replies_than_the_quorum_stop_the_run_and_keep_what_was_done(method, tmp_path):
    among_several(method)
    done = []

    def fail_in_round_two(index, reply):
        if reply.metadata.group_id == "2" and index != 3:
            raise ConnectionError("gone")
        done.append(index)
        return reply

    with pytest.raises(
        QuorumError, match=r"round 2: 1 of 4 clients gave a usable update, population.quorum asks for 2"
    ):
        run_on(
            LocalGrid,
            tampering_app(fail_in_round_two),
            tmp_path / "run",
            *of(method),
            "rounds=3",
            "population.cohort=4",
        )
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["rounds"]) == ("failed", 1)
    assert [r["round"] for r in rows(tmp_path / "run", "metrics.csv")] == ["0", "1"]
    assert len(rows(tmp_path / "run", "failures.csv")) == 3
    run_local(
        compose([*SMALL, *of(method), "rounds=3", "population.cohort=4", f"out={tmp_path / 'run'}"]),
        str(tmp_path / "run"),
    )
    run_local(compose([*SMALL, *of(method), "rounds=3", "population.cohort=4", f"out={tmp_path / 'never'}"]))
    assert summary_of(tmp_path / "run")["state_sha256"] == summary_of(tmp_path / "never")["state_sha256"]


def first_updates(method):
    party = Party(compose([*SMALL, *of(method)]))
    state = party.strategy.init(party.model.layout)
    peers = [Peer(index, party.samples(index)) for index in range(party.experiment.population.clients)]
    updates = [party.turn(RUN, peer.index, 1, party.strategy.configure(state, 1, peer)) for peer in peers]
    return party.strategy, state, list(zip(peers, updates, strict=True))


def test_identical_clients_are_a_fixed_point(method):
    if method == "ferret":
        pytest.skip("each client has directions of its own, so that equal coordinates are no equal updates")
    strategy, state, replies = first_updates(method)
    peer, update = replies[0]
    alone = strategy.aggregate(state, 1, [(peer, update)])
    together = strategy.aggregate(state, 1, [(Peer(index, peer.samples), update) for index in range(7)])
    if traits_of(strategy).averages:
        assert state_sha256(alone.adapter) == state_sha256(together.adapter)
    party = Party(compose([*SMALL, *of(method)]))
    one, seven = (change_of(party, strategy.configure(after, 2, Peer(SERVER, 1))) for after in (alone, together))
    assert one.keys() == seven.keys()
    for module, matrix in one.items():
        torch.testing.assert_close(seven[module], matrix, rtol=0, atol=1e-6 * float(matrix.abs().max()) + 1e-12)


def change_of(party, instruction):
    """What a client that installs this adds to the base, layer by layer, as whole matrices."""
    party.install(instruction, {})
    model = party.model
    if not model.layout.is_low_rank:
        return {name: tensor.double() - model.layout.initial[name].double() for name, tensor in model.adapter().items()}
    change = {module: model.scaling * p.b.double() @ p.a.double() for module, p in pairs(model.adapter()).items()}
    for module, product in from_residual(model.base_change.tensors).items():
        change[module] = change[module] + product.b.double() @ product.a.double()
    for name, matrix in model.base_change.tensors.items():
        if name.endswith(DENSE):
            change[name.removesuffix(DENSE)] += matrix.double()
    return change


def test_aggregating_changes_neither_the_old_state_nor_the_updates(method):
    strategy, state, replies = first_updates(method)
    before = state_sha256(state), [state_sha256(update) for _, update in replies]
    strategy.aggregate(state, 1, replies)
    assert before == (state_sha256(state), [state_sha256(update) for _, update in replies])


def test_a_turn_leaves_no_trace_in_the_next(method):
    """A client's update is the same whether it goes first or after all others."""
    _, _, forward = first_updates(method)
    party = Party(compose([*SMALL, *of(method)]))
    state = party.strategy.init(party.model.layout)
    backward = {
        index: party.turn(RUN, index, 1, party.strategy.configure(state, 1, Peer(index, 1)))
        for index in reversed(range(party.experiment.population.clients))
    }
    assert all(state_sha256(update) == state_sha256(backward[peer.index]) for peer, update in forward)
