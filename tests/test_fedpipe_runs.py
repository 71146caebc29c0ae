"""FedPipe on the engine: devices of which some have room for a few layers only, what crosses the wire, and resuming."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import rows, run_on, small, summary_of
from flwr.clientapp import ClientApp

from fedtune.codecs.raw import Raw
from fedtune.config.devices import read_devices, write_devices
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import SERVER, ClientInfo, DeviceProfile, Instruction
from fedtune.lowrank.algebra import lora_factors, name_of
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.training.apply_instruction import SCORES
from fedtune.training.gradients import finished
from fedtune.wire import messages as wire
from fedtune.wire.delta_coding import decode, starts_of
from fedtune.workspace.client_handler import Assignment, local_update, take_turn
from fedtune.workspace.uplink import Uplink
from fedtune.workspace.workspace import Workspace

RUN = "0" * 16
WORDS = ("method=fedpipe", "method.strategy.refresh=2", "population.cohort=4", "evaluate.exactness=true")


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """A file of four devices: without limits; slow; with room for a layer of the last block; and in between."""
    folder = tmp_path_factory.mktemp("devices")
    costs = Workspace(small(*WORDS, out=folder / "unused")).costs
    least = costs.base_bytes["32"] + costs.fixed_bytes

    def with_room(block, numbers):
        kept = costs.saved_bytes[block] + costs.head_bytes + costs.tokens * costs.input_bytes * (48 + 8)
        return DeviceProfile(memory_bytes=least + kept + 24 * numbers)

    some = [
        DeviceProfile(device="server"),
        DeviceProfile(device="slow", flop_per_s=5e6, up_bytes_per_s=1e4, down_bytes_per_s=1e4),
        replace(with_room(1, 200), device="small"),
        replace(with_room(0, 3000), device="middling"),
    ]
    write_devices(folder / "devices.csv", some)
    return folder / "devices.csv"


def peers(workspace, devices):
    return [ClientInfo(k, workspace.samples(k), can) for k, can in enumerate(read_devices(devices))]


@pytest.fixture(scope="module")
def played(devices, tmp_path_factory):
    """Four rounds on these."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = (*WORDS, f"population.devices={devices}", "population.deadline=8", "population.straggler=drop")
    run_local(small(*words, "rounds=4", out=folder))
    return words, folder


def payload(folder, number, direction):
    found = rows(folder, "ledger.csv")
    return {
        int(r["client"]): int(r["payload_bytes"])
        for r in found
        if (r["round"], r["part"], r["direction"]) == (str(number), "train", direction)
    }


def test_devices_take_what_they_have_room_for(played):
    _, folder = played
    assert summary_of(folder)["status"] == "finished"
    assert not rows(folder, "failures.csv")
    turns = [row for row in rows(folder, "clock.csv") if row["round"] == "1"]
    layers = {row["device"]: int(row["layers"]) for row in turns}
    assert layers["server"] == 4
    assert layers["small"] == 1
    assert {row["device"]: int(row["batch_size"]) for row in turns}["slow"] < 4
    assert all(float(row["memory_bytes"]) <= float(row["limit_bytes"] or "inf") for row in rows(folder, "clock.csv"))
    for row in rows(folder, "clock.csv"):  # with what messages really weigh
        assert sum(float(row[f"{part}_seconds"]) for part in ("download", "compute", "upload")) <= 8


def test_bytes_are_those_of_the_layers_and_of_the_scores(played, devices, tmp_path):
    """4 sum_j r_j (in + out), 4 more a layer in a scoring round, and safetensors' own header."""
    words, folder = played
    workspace = Workspace(small(*words, out=tmp_path))
    state = workspace.strategy.init(workspace.layout)
    for peer in peers(workspace, devices):
        told = workspace.strategy.configure(state, 1, peer).tensors
        layers = lora_factors(told)
        numbers = sum(layer.rank * (layer.b.shape[0] + layer.a.shape[1]) for layer in layers.values())
        assert payload(folder, 1, "down")[peer.index] == 4 * numbers + header(told)
        answer = {**told, SCORES: torch.zeros(len(layers))}
        assert payload(folder, 1, "up")[peer.index] == 4 * numbers + 4 * len(layers) + header(answer)
    assert payload(folder, 2, "up") == payload(folder, 2, "down")
    for index, size in payload(folder, 3, "up").items():
        assert size > payload(folder, 3, "down")[index]


def header(tensors):
    return len(Raw().encode(tensors, 0)) - sum(tensor.nbytes for tensor in tensors.values())


def test_resume_equals_uninterrupted(played, tmp_path):
    """With scores and shares, from within a stretch between two refreshes."""
    words, folder = played
    run_local(small(*words, "rounds=2", out=tmp_path / "parts"))
    run_local(small(*words, "rounds=4", out=tmp_path / "parts"), resume=str(tmp_path / "parts"))
    assert summary_of(tmp_path / "parts")["state_sha256"] == summary_of(folder)["state_sha256"]
    assert rows(folder, "clock.csv") == rows(tmp_path / "parts", "clock.csv")
    for number in range(1, 5):
        assert payload(folder, number, "up") == payload(tmp_path / "parts", number, "up")


def test_it_is_exact_where_the_ranks_add_up_to_no_more(tmp_path):
    """Two clients of rank 4 at most, and a global rank of 8: in float32, to rounding."""
    write_devices(tmp_path / "devices.csv", [DeviceProfile(max_rank=4.0, memory_bytes=2e8)])
    words = (*WORDS, f"population.devices={tmp_path / 'devices.csv'}", "population.clients=2", "population.cohort=2")
    run_local(small(*words, "rounds=3", out=tmp_path / "run"))
    errors = [float(row["aggregation_error"]) for row in rows(tmp_path / "run", "metrics.csv")[1:]]
    assert len(errors) == 3
    assert max(errors) < 1e-6
    run_local(small(*WORDS, "adapter.rank=1", "adapter.alpha=2", "rounds=1", out=tmp_path / "narrow"))
    assert float(rows(tmp_path / "narrow", "metrics.csv")[1]["aggregation_error"]) > 1e-3


def test_without_limits_everybody_has_everything(small_run):
    """In each of six rounds, past two refreshes: as many bytes to everybody as in the first."""
    folder = small_run(*WORDS, rounds=6)
    sizes = {size for number in range(1, 7) for size in payload(folder, number, "down").values()}
    assert len(sizes) == 1


def test_a_first_round_of_one_step_leaves_nothing_out(small_run):
    """B is zero until its first step, and so is every score: that says nothing of any layer."""
    folder = small_run(*WORDS, "train.steps=1", rounds=3)
    assert len(set(payload(folder, 3, "down").values()) | set(payload(folder, 1, "down").values())) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("adapter.rank=6",),
        ("adapter=rslora",),
        ("adapter.targets=[all-linear]",),
        ("adapter.dropout=0.3",),
        ("train.optimizer=sgd", "train.lr=0.1"),
        ("evaluate.clients=true", "data.client_heldout=0.2"),
        ("evaluate.similarity=true",),
        ("codec_down=int8", "codec_down.feedback=true", "codec_up=topk", "codec_up.density=0.1"),
        ("codec=compeft", "codec_up.feedback=true"),
        ("codec_up=compeft", "codec_up.alpha=[1,3]", "data.client_heldout=0.3"),
        ("codec_up=packed", "codec_down=bf16"),
        ("codec=nf4", "evaluate.similarity=true"),
        ("codec=stc",),
    ],
    ids=lambda words: " ".join(words),
)
def test_it_goes_with_what_else_there_is(words, devices, tmp_path):
    """Among clients of unequal layers, in scoring rounds and others."""
    run_local(small(*WORDS, f"population.devices={devices}", *words, "rounds=3", out=tmp_path / "run"))
    assert summary_of(tmp_path / "run")["status"] == "finished"
    assert not rows(tmp_path / "run", "failures.csv")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=pissa"], "take adapter=lora or adapter=rslora"),
        (["method.strategy.bits=[4]"], "can't be held in 4 bits; it can in 32"),
        (["method.strategy.ranks=[2,4]"], "the largest should be adapter.rank, which is 8"),
        (["adapter=ia3"], "works on B A"),
        (["population.ranks=[8,4]"], "leave out population.ranks"),
    ],
)
def test_what_does_not_fit_is_said_at_the_start(words, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run_local(small(*WORDS, *words, out=tmp_path / "run"))


@pytest.mark.slow
def test_what_a_message_leaves_out_waits_for_one_that_has_the_layer(tmp_path):
    """Turn 1 trains two layers, turn 2 one of them, turn 3 both: what was left out of the other in turn 1 is in what
    turn 3 means to send. What was left out of a score, nothing, is kept nowhere."""
    words = ("method=fedpipe", "codec_up=topk", "codec_up.density=0.05", "codec_up.feedback=true")
    workspace = Workspace(small(*words, out=tmp_path / "run"))
    state = workspace.strategy.init(workspace.layout)
    whole = workspace.strategy.configure(state, 1, ClientInfo(0, 9))
    one, other = sorted(lora_factors(state.adapter))[:2]

    def turn(number, *modules):
        tensors = {name: tensor for name, tensor in whole.tensors.items() if name.startswith(modules)}
        told = Instruction(tensors, whole.settings)
        meant = local_update(workspace, RUN, 0, number, told)
        content = finished(take_turn(workspace, Assignment(RUN, 0, number, told))).content
        sent = decode(workspace.codec_up, wire.blob_of(content), Uplink(workspace).known(told))
        return meant.tensors, sent, workspace.residuals.load(RUN, 0, number + 1)

    meant, sent, first = turn(1, one, other)
    name = name_of(other, "lora_B")
    assert first.keys() == starts_of(meant, Uplink(workspace).known(whole)).keys()
    torch.testing.assert_close(first[name], meant[name] - sent[name])
    assert first[name].any()
    _, _, second = turn(2, one)
    assert all(torch.equal(second[n], tensor) for n, tensor in first.items() if other in n)
    assert not torch.equal(second[name_of(one, "lora_B")], first[name_of(one, "lora_B")])
    meant, sent, third = turn(3, one, other)
    torch.testing.assert_close(third[name], meant[name] + second[name] - sent[name])


@pytest.mark.slow
def test_a_rank_that_changes_starts_anew(tmp_path):
    """What was left out of components that are no longer the same has no place to go."""
    words = ("method=fedpipe", "codec_up=topk", "codec_up.density=0.05", "codec_up.feedback=true")
    workspace = Workspace(small(*words, out=tmp_path / "run"))
    state = workspace.strategy.init(workspace.layout)
    for number, rank in ((1, 8), (2, 2), (3, 8)):
        told = workspace.strategy.configure(state, number, ClientInfo(0, 9, DeviceProfile(max_rank=float(rank))))
        finished(take_turn(workspace, Assignment(RUN, 0, number, told)))
        kept = lora_factors(workspace.residuals.load(RUN, 0, number + 1))
        assert {product.rank for product in kept.values()} == {rank}


def lying(change):
    """The real ClientApp, of which client 1 changes the tensors that it answers."""
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))

    @app.train()
    def train(message, context):
        reply = inner(message, context)
        if context.node_config["partition-id"] == 1:
            update = wire.unpack_update(reply.content, wire.blob_of(reply.content), Raw())
            reply.content = wire.pack_update(replace(update, tensors=change(dict(update.tensors))), Raw(), 0)
        return reply

    return app


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if n != SCORES}, "'scores' is missing"),
        (lambda t: t | {SCORES: -t[SCORES]}, "its scores should be numbers from 0 up"),
        (lambda t: t | {SCORES: t[SCORES] * float("nan")}, "'scores' has values that are not finite"),
        (lambda t: t | {SCORES: t[SCORES].repeat(1000)}, r"'scores': expected float32 \(4,\), got float32 \(4000,\)"),
        (lambda t: t | {"x.lora_A.weight": torch.zeros(1, 1)}, "'x.lora_A.weight' was not asked for"),
        (lambda t: {n: v[:1] if "lora_A" in n else v for n, v in t.items()}, r"got float32 \(1, 48\)"),
    ],
    ids=["no scores", "negative", "nan", "thousands", "another layer", "another rank"],
)
def test_a_lying_client_is_a_row_and_changes_nothing(change, said, tmp_path):
    run_on(LocalGrid, lying(change), tmp_path / "run", *WORDS, "rounds=1")
    (failure,) = rows(tmp_path / "run", "failures.csv")
    assert failure["client"] == "1"
    assert re.search(said, failure["error"])
    assert summary_of(tmp_path / "run")["status"] == "finished"


@pytest.mark.slow
def test_the_server_evaluates_all_layers(tmp_path):
    """After a turn of one layer at one rank the server's model has them all, at the largest."""
    workspace = Workspace(small("method=fedpipe", out=tmp_path / "run"))
    state = workspace.strategy.init(workspace.layout)
    tight = DeviceProfile(memory_bytes=workspace.costs.base_bytes["32"] + workspace.costs.fixed_bytes + 2.2e5)
    told = workspace.strategy.configure(state, 1, ClientInfo(0, 9, tight))
    assert 0 < len(lora_factors(told.tensors)) < 4
    local_update(workspace, RUN, 0, 1, told)
    moved = {name: tensor + 0.1 for name, tensor in state.adapter.items()}
    workspace.install(workspace.strategy.configure(replace(state, adapter=moved), 2, ClientInfo(SERVER, 1)), {})
    assert all(torch.equal(workspace.model.adapter()[name], tensor) for name, tensor in moved.items())
    score = workspace.evaluate()
    fresh = Workspace(small("method=fedpipe", out=tmp_path / "run"))
    fresh.model.install(moved)
    assert fresh.evaluate() == score
