"""Our strategies in a Flower ServerApp, over real messages, with a ClientApp as Flower's own users write them.

Client k holds the number k + 1 and that many examples, and adds the number to every tensor it is sent. With three
clients and FedIT, each round adds

    1/6 * 1 + 2/6 * 2 + 3/6 * 3 = 14/6 = 7/3

and the clients' metric "loss", their own number, averages to 7/3 as well.
"""

import logging
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import SMALL
from fedtune.workspace.workspace import Party
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedtune.codecs.raw import Raw
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, QuorumError, WireError
from fedtune.core.protocol import Instruction, Layout, Slot, Update
from fedtune.core.seeds import derive_seed
from fedtune.runtime.local import LocalGrid, run_local, server_context
from fedtune.server.flower_strategy import as_flower_strategy
from fedtune.wire import messages as wire
from strategies.fedit import FedIT, State
from strategies.krum import Krum

START = {"A": torch.tensor([[0.0, 1.0]]), "B": torch.tensor(2.0)}


def state_dict_app(tamper=lambda index, reply: reply, index_in_metrics=True):
    """Nothing in here knows of fedtune."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = context.node_config["partition-id"]
        assert message.content["config"]["server-round"] >= 1
        adapter = message.content["arrays"].to_torch_state_dict()
        trained = {name: tensor + (index + 1) for name, tensor in adapter.items()}
        metrics = {"num-examples": index + 1, "loss": float(index + 1), "per-layer": [1.0, 2.0]}
        if index_in_metrics:
            metrics["partition-id"] = index
        content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord(metrics)})
        return tamper(index, Message(content, reply_to=message))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        index = context.node_config["partition-id"]
        level = message.content["arrays"].to_torch_state_dict()["B"].item()
        content = RecordDict({"metrics": MetricRecord({"num-examples": index + 1, "level": level})})
        return tamper(index, Message(content, reply_to=message))

    return app


def start(strategy: Strategy, app: ClientApp, clients=3, arrays=None, grid_class=LocalGrid, **options):
    """Run it as a user would, in a ServerApp's main; returns Flower's Result."""
    server, results = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(START) if arrays is None else arrays
        results.append(strategy.start(grid=grid, initial_arrays=initial, **{"num_rounds": 2, **options}))

    server(grid=grid_class(app, clients, {}), context=server_context({}))
    return results[0]


def level(result) -> float:
    """How far the tensors have risen; the same for all of them."""
    tensors = result.arrays.to_torch_state_dict()
    assert list(tensors) == ["A", "B"]
    assert torch.allclose(tensors["A"], START["A"] + (tensors["B"] - START["B"]))
    return (tensors["B"] - START["B"]).item()


def test_a_state_dict_client_app_works_as_it_is():
    strategy = as_flower_strategy(FedIT())
    assert isinstance(strategy, Strategy)
    result = start(strategy, state_dict_app(), num_rounds=3)
    assert level(result) == pytest.approx(7)
    assert dict(result.train_metrics_clientapp[3]) == {"loss": pytest.approx(7 / 3)}
    assert dict(result.evaluate_metrics_clientapp[1]) == {"level": pytest.approx(2 + 7 / 3)}
    assert strategy.failures == []
    assert sorted(peer.index for peer in strategy.peers.values()) == [0, 1, 2]


def test_it_gives_what_flowers_own_fedavg_gives():
    ours = start(as_flower_strategy(FedIT()), state_dict_app())
    theirs = start(FedAvg(), state_dict_app())
    for name, array in theirs.arrays.items():
        assert np.allclose(ours.arrays[name].numpy(), array.numpy(), rtol=1e-6)
    assert ours.train_metrics_clientapp[2]["loss"] == pytest.approx(theirs.train_metrics_clientapp[2]["loss"])
    assert dict(ours.evaluate_metrics_clientapp[2]) == pytest.approx(dict(theirs.evaluate_metrics_clientapp[2]))


def test_a_robust_method_works_too():
    """Krum takes one of the honest levels 1, 2 and 3, not the 1e6 of client 3."""

    def lie(index, reply):
        if index == 3 and "arrays" in reply.content:
            reply.content["arrays"] = ArrayRecord({n: torch.full_like(t, 1e6) for n, t in START.items()})
        return reply

    assert level(start(as_flower_strategy(Krum()), state_dict_app(lie), clients=4, num_rounds=1)) in (1, 2, 3)


def app_and_workspace(words):
    """fedtune's own clients, one message at a time, as the docstring of `as_flower_strategy` shows."""
    app, workspace = ClientApp(), Party(compose(words))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index, round = context.node_config["partition-id"], message.content["config"]["server-round"]
        update = workspace.turn(
            "0" * 16, index, round, wire.unpack_instruction(message.content, workspace.codec_down)[0]
        )
        update = replace(update, metrics={**update.metrics, "partition-id": index})
        return Message(
            wire.pack_update(update, workspace.codec_up, derive_seed(0, "up", round, index)), reply_to=message
        )

    return app, workspace


def test_with_a_codec_it_is_our_own_engine_to_the_last_bit(tmp_path):
    words = [*SMALL, "population.cohort=4", "rounds=2"]
    run_local(compose([*words, f"out={tmp_path / 'run'}"]))
    expected = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    app, workspace = app_and_workspace(words)
    layout = workspace.model.layout
    strategy = as_flower_strategy(FedIT(), Raw(), layout=layout, fraction_evaluate=0.0)
    result = start(strategy, app, clients=4, arrays=ArrayRecord(layout.initial))
    got = result.arrays.to_torch_state_dict()
    assert {name: tensor.tolist() for name, tensor in got.items()} == {n: t.tolist() for n, t in expected.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(payload=ArrayRecord(START)), "should hold one array 'blob'"),
        (
            lambda content: content["payload"].update(blob=Array("uint8", (4,), "fedtune", b"\1\2\3\4")),
            "not a raw blob",
        ),
        (lambda content: content["metrics"].update(examples=10**9), "it claims 1000000000 examples"),
        (lambda content: content["metrics"].update({"partition-id": 0.5}), "whole number from 0 up, got 0.5"),
    ],
)
def test_with_a_codec_a_lying_client_is_left_out_too(change, said):
    """As above: without client 1, each round adds 2.5."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = context.node_config["partition-id"]
        adapter = wire.unpack_instruction(message.content, Raw())[0].tensors
        trained = {name: tensor + (index + 1) for name, tensor in adapter.items()}
        content = wire.pack_update(Update(trained, index + 1, {"partition-id": index}), Raw(), 0)
        if index == 1:
            change(content)
        return Message(content, reply_to=message)

    strategy = as_flower_strategy(FedIT(), Raw(), max_examples=100, fraction_evaluate=0.0)
    assert level(start(strategy, app)) == 5
    assert [(number, said in reason) for number, _, reason in strategy.failures] == [(1, True), (2, True)]


class LastFirst(LocalGrid):
    """Replies in the opposite order."""

    def send_and_receive(self, messages, *, timeout=None):
        return list(super().send_and_receive(messages, timeout=timeout))[::-1]


@pytest.mark.parametrize("index_in_metrics", [True, False])
def test_who_comes_first_makes_no_difference(index_in_metrics):
    app = state_dict_app(index_in_metrics=index_in_metrics)
    one = start(as_flower_strategy(FedIT()), app)
    other = start(as_flower_strategy(FedIT()), app, grid_class=LastFirst)
    assert dict(one.arrays) == dict(other.arrays)


def fail(index, reply):
    if index == 1:
        raise ConnectionError("the battery is flat")
    return reply


def metric(name, value):
    def lie(index, reply):
        if index == 1:
            next(iter(reply.content.metric_records.values()))[name] = value
        return reply

    return lie


def arrays(change):
    def lie(index, reply):
        if index == 1 and "arrays" in reply.content:
            change(reply.content["arrays"])
        return reply

    return lie


def without(record):
    def lie(index, reply):
        if index == 1 and record in reply.content:
            del reply.content[record]
        return reply

    return lie


HUGE = Array(np.zeros(2, np.float32)).data.replace(b"(2,), }" + b" " * 12, b"(2000000000000,), }")


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (fail, "the battery is flat"),
        (metric("num-examples", 10**9), "it claims 1000000000 examples; max_examples=100"),
        (metric("num-examples", 0), "positive whole number, got 0"),
        (metric("num-examples", 1.5), "positive whole number, got 1.5"),
        (metric("num-examples", [1]), "positive whole number"),
        (metric("loss", float("nan")), "metric 'loss' should be finite"),
        (metric("partition-id", -1), "whole number from 0 up"),
        (arrays(lambda record: record.pop("A")), "'A' is missing"),
        (arrays(lambda record: record.update(B=Array(np.float32([1])))), "'B': expected float32 (), got float32 (1,)"),
        (arrays(lambda record: record.update(B=Array(np.array(1.0)))), "got float64 ()"),
        (arrays(lambda record: record.update(B=Array(np.array(np.inf, np.float32)))), "not finite"),
        (arrays(lambda record: record.update(B=Array(np.array("text")))), "array 'B' (<U4) can't be read"),
        (arrays(lambda record: record.update(B=Array("float32", (), "numpy.ndarray", b"PK\3\4"))), "can't be read"),
        (arrays(lambda record: record.update(B=Array("float32", (), "other", record["B"].data))), "can't be read"),
        (arrays(lambda record: record.update(A=Array("float32", (2,), "numpy.ndarray", HUGE))), "2000000000000"),
        (without("arrays"), "exactly one ArrayRecord, got 0"),
        (without("metrics"), "exactly one MetricRecord, got 0"),
    ],
)
def test_a_bad_client_is_left_out_by_name_and_the_round_goes_on(lie, said, caplog):
    """Without client 1, each round adds 1/4 * 1 + 3/4 * 3 = 2.5."""
    strategy = as_flower_strategy(FedIT(), max_examples=100, fraction_evaluate=0.0)
    with caplog.at_level(logging.WARNING, "flwr.fedtune"):
        result = start(strategy, state_dict_app(lie))
    assert level(result) == 5
    assert [number for number, _, _ in strategy.failures] == [1, 2]
    assert said in strategy.failures[0][2]
    assert said in caplog.text
    assert f"node {strategy.failures[0][1]} is left out" in caplog.text


def test_an_index_that_two_nodes_claim_is_neithers():
    """Refusing the later of the two would make the result depend on who came first. Client 2 alone adds 3."""
    strategy = as_flower_strategy(FedIT(), quorum=0.3, fraction_evaluate=0.0)
    assert level(start(strategy, state_dict_app(metric("partition-id", 0)))) == 6
    assert {reason for _, _, reason in strategy.failures} == {
        "it says it is client 0, and so does another node: give each its own partition-id"
    }


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [(1, 7, "it says it is client 7, and was 1 before"), (None, 0, "it says it is client 0, which node")],
)
def test_an_index_once_told_stays(first, second, said):
    """Client 1 tells `first` in round 1 and `second` in round 2, which then goes on without it."""

    def change(index, reply):
        if index == 1:
            del reply.content["metrics"]["partition-id"]
            told = first if reply.metadata.group_id == "1" else second
            if told is not None:
                reply.content["metrics"]["partition-id"] = told
        return reply

    strategy = as_flower_strategy(FedIT(), fraction_evaluate=0.0)
    assert level(start(strategy, state_dict_app(change))) == pytest.approx(7 / 3 + 2.5)
    assert [(number, said in reason) for number, _, reason in strategy.failures] == [(2, True)]


@given(st.integers(0, 127), st.binary(min_size=1, max_size=8))
def test_no_header_breaks_the_reader(place, noise):
    good = Array(np.zeros((2, 3), np.float32)).data
    bad = good[:place] + noise + good[place + len(noise) :]
    try:
        tensor = wire.unpack_arrays({"w": Array("float32", (2, 3), "numpy.ndarray", bad)})["w"]
    except WireError:
        return
    assert tensor.numel() * tensor.element_size() == 24


def test_a_client_that_never_answers_is_a_failure():
    class Deaf(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return list(super().send_and_receive(messages, timeout=timeout))[1:]

    strategy = as_flower_strategy(FedIT())
    start(strategy, state_dict_app(), grid_class=Deaf, num_rounds=1)
    assert [reason for _, _, reason in strategy.failures] == ["no reply within the timeout"] * 2


def test_an_answer_given_twice_counts_once():
    class Echo(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            return [*replies, replies[0]]

    strategy = as_flower_strategy(FedIT())
    assert level(start(strategy, state_dict_app(), grid_class=Echo, num_rounds=1)) == pytest.approx(7 / 3)
    assert {reason for _, _, reason in strategy.failures} == {"it was not asked, or has answered already"}


def test_everything_failing_is_an_error_not_silence():
    def all_fail(index, reply):
        raise ConnectionError("no network")

    with pytest.raises(QuorumError, match=r"round 1: 0 of 3 clients gave a usable update.*ConnectionError: no network"):
        start(as_flower_strategy(FedIT(), quorum=0.0), state_dict_app(all_fail))
    with pytest.raises(QuorumError, match=r"round 1: 2 of 3 .* quorum=0.9 asks for 3"):
        start(as_flower_strategy(FedIT(), quorum=0.9), state_dict_app(fail))


def test_evaluation_without_answers_stops_nothing():
    def only_train(index, reply):
        if "arrays" not in reply.content:
            raise ConnectionError("no test data")
        return reply

    result = start(as_flower_strategy(FedIT()), state_dict_app(only_train))
    assert level(result) == pytest.approx(14 / 3)
    assert result.evaluate_metrics_clientapp == {}


def test_key_names_and_metric_functions_are_the_users():
    app, seen = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(dict(message.content["settings-for-you"]))
        content = {"any-name": message.content["weights"], "m": MetricRecord({"n": 2.0, "loss": 3})}
        return Message(RecordDict(content), reply_to=message)

    strategy = as_flower_strategy(
        FedIT(),
        weighted_by_key="n",
        arrayrecord_key="weights",
        configrecord_key="settings-for-you",
        fraction_evaluate=0.0,
        train_metrics_aggr_fn=lambda contents, key: MetricRecord(
            {"sum": sum(c["metrics"]["loss"] * c["metrics"][key] for c in contents)}
        ),
    )
    result = start(strategy, app, num_rounds=1, train_config=ConfigRecord({"lr": 0.1}))
    assert level(result) == 0
    assert seen == [{"lr": 0.1, "server-round": 1}] * 3
    assert dict(result.train_metrics_clientapp[1]) == {"sum": 18.0}


def test_a_seed_draws_the_same_clients():
    def drawn(seed):
        counts = Counter()
        strategy = as_flower_strategy(FedIT(), seed=seed, fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.0)
        start(strategy, state_dict_app(lambda i, reply: counts.update([i]) or reply), clients=8, num_rounds=4)
        assert counts.total() == 16
        return counts

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_it_waits_for_enough_nodes(monkeypatch):
    class Late(LocalGrid):
        def get_node_ids(self):
            self.looks = getattr(self, "looks", 0) + 1
            return list(super().get_node_ids())[: self.looks]

    monkeypatch.setattr("fedtune.server.flower_strategy.POLL_SECONDS", 0)
    strategy = as_flower_strategy(FedIT(), min_available_nodes=3, fraction_evaluate=0.0)
    assert level(start(strategy, state_dict_app(), grid_class=Late, num_rounds=1)) == pytest.approx(7 / 3)


@dataclass(frozen=True)
class Needy(FedIT):
    """Looks at what only a layout tells."""

    def init(self, layout):
        assert [slot.shape for slot in layout.slots] == [(1, 2), ()]
        self.told.append([(slot.role, slot.scaling) for slot in layout.slots])
        return super().init(layout)

    told = []  # noqa: RUF012


def test_roles_come_from_a_layout_and_are_never_guessed():
    with pytest.raises(ConfigError, match=r"asks for the role of 'A'.*layout="):
        start(as_flower_strategy(Needy()), state_dict_app())
    slots = (Slot("A", (1, 2), "float32", "lora_A", "m", 2.0), Slot("B", (), "float32", "lora_B", "m", 2.0))
    start(as_flower_strategy(Needy(), layout=Layout(slots, {})), state_dict_app())
    assert Needy.told == [[("lora_A", 2.0), ("lora_B", 2.0)]]
    wrong = Layout((replace(slots[0], dtype="bfloat16"), slots[1]), {})
    with pytest.raises(
        ConfigError, match=r"initial_arrays: tensor 'A': expected bfloat16 \(1, 2\), got float32 \(1, 2\)"
    ):
        start(as_flower_strategy(Needy(), layout=wrong), state_dict_app())


@dataclass(frozen=True)
class Sending(FedIT):
    """Sends what the test says."""

    instruction: Instruction = Instruction({})

    def configure(self, state, round, peer):
        return self.instruction


def test_bfloat16_is_refused_by_name():
    strategy = as_flower_strategy(Sending(Instruction({"A": torch.zeros(1, dtype=torch.bfloat16)})))
    with pytest.raises(ConfigError, match="tensor 'A' is bfloat16, which Flower's Array can't hold: use float32"):
        start(strategy, state_dict_app())
    by_hand = ArrayRecord({"A": Array("bfloat16", (1,), "raw", b"\0\0")})
    with pytest.raises(ConfigError, match=r"initial_arrays: array 'A' \(bfloat16\) can't be read"):
        start(as_flower_strategy(FedIT()), state_dict_app(), arrays=by_hand)


def test_a_users_setting_can_not_hide_the_strategys():
    strategy = as_flower_strategy(Sending(Instruction(START, {"lr": 0.1})))
    with pytest.raises(ConfigError, match="train_config: 'lr' is a setting of Sending"):
        start(strategy, state_dict_app(), train_config=ConfigRecord({"lr": 0.5}))


def private(strategy):
    return DifferentialPrivacyServerSideFixedClipping(
        strategy, noise_multiplier=1, clipping_norm=1e3, num_sampled_clients=3
    )


def test_flowers_differential_privacy_wraps_it():
    """Noise with a standard deviation of 1e3 / 3 goes onto each round's arrays, and the next round starts from them."""
    received = []

    def note(index, reply):
        if index == 0 and "arrays" in reply.content:
            received.append(reply.content["arrays"]["B"].numpy().item() - 1)
        return reply

    result = start(private(as_flower_strategy(FedIT())), state_dict_app(note))
    assert received[0] == 2
    assert received[1] == pytest.approx(result.evaluate_metrics_clientapp[1]["level"])
    assert abs(received[1] - (2 + 7 / 3)) > 1e-3
    assert abs(result.arrays["B"].numpy() - (received[1] + 7 / 3)) > 1e-3


def test_noise_that_a_strategy_would_forget_is_an_error():
    @dataclass(frozen=True)
    class Counted(State):
        rounds: int = 0

    @dataclass(frozen=True)
    class Counting(FedIT):
        def init(self, layout):
            return Counted(super().init(layout).adapter)

        def aggregate(self, state, round, replies):
            return Counted(super().aggregate(state, round, replies).adapter, state.rounds + 1)

    with pytest.raises(ConfigError, match="Counting can't go on from changed ones"):
        start(private(as_flower_strategy(Counting())), state_dict_app())


@pytest.mark.parametrize("options", [{"fraction_train": 0}, {"fraction_train": 1.1}, {"quorum": -1}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        as_flower_strategy(FedIT(), **options)
