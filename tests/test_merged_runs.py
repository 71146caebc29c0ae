"""Methods that change the base, on the real engine: who was away lacks nothing, and the ledger shows what that costs.

Ranks 1 and 2 keep the residuals narrower than the tiny model's layers, 48 -> 48 and 48 -> 24, two of each: a residual
of rank R takes R (96 + 72) 2 = 336 R numbers. Two of four clients take part in a round, so most of them miss some.
"""

import json

import pytest
import torch
from conftest import rows, run_on, small, summary_of
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from layers import distance
from peft import PeftModel
from safetensors.torch import load, load_file

from fedtune.core.protocol import SERVER, ClientInfo
from fedtune.lowrank.residual import FROM, VERSION, base_version, from_residual, size_of
from fedtune.models.tiny import tiny_model
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.wire import messages as wire
from fedtune.workspace.workspace import Workspace
from strategies.fedex_lora import FedExLoRA
from strategies.flora import FLoRA

FEW = ("adapter.rank=2", "population.cohort=2")
MERGING = ["flora", "florist", "fedex_lora"]
NUMBERS = 336  # of a residual of rank 1


class Listening(LocalGrid):
    """The real Grid, keeping what goes down: (round, client) -> settings, blob."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sent = {}
        self.index = {node: context.node_config["partition-id"] for node, context in self._contexts.items()}

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                place = int(message.metadata.group_id), self.index[message.metadata.dst_node_id]
                self.sent[place] = dict(message.content["settings"]), wire.blob_of(message.content)
        return super().push_messages(messages)


@pytest.fixture
def states(monkeypatch):
    """The states that the server came to, one a round."""
    made = []
    for method in (FLoRA, FedExLoRA):

        def aggregate(self, *arguments, inner=method.aggregate):
            made.append(inner(self, *arguments))
            return made[-1]

        monkeypatch.setattr(method, "aggregate", aggregate)
    return made


def kept_by(folder, index, round):
    (path,) = folder.glob(f"clients/*/{index}/{round}.safetensors")
    return load_file(path)


def header_of(blob):
    return 8 + int.from_bytes(blob[:8], "little")


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_who_was_away_is_sent_what_it_lacks_and_holds_the_servers_bits(method, states, tmp_path):
    """Down in round t, to a client that was last there in round l: the residuals of rounds l ... t - 1, each of rank
    sum r_k = 4 (FLoRA) or (N - 1) r = 2 (FedEx), four bytes a number; FedEx's adapter of rank 2 besides. The header of
    the safetensors format, which a codec adds, is read off the blob, as docs/bytes.md counts it."""
    folder = tmp_path / "run"
    grid = run_on(Listening, make_client_app(), folder, f"method={method}", "rounds=7", *FEW)
    width, always = (4, 0) if method == "flora" else (2, 2)
    seen, lacking = {}, []
    booked = {
        (int(r["round"]), int(r["client"])): int(r["payload_bytes"])
        for r in rows(folder, "ledger.csv")
        if (r["direction"], r["part"]) == ("down", "train")
    }
    assert booked.keys() == grid.sent.keys()
    for (number, index), (settings, blob) in sorted(grid.sent.items()):
        missed = number - seen.get(index, 1)
        lacking.append(missed)
        assert (settings[FROM], settings[VERSION]) == (max(0, seen.get(index, 1) - 1), number - 1)
        assert booked[number, index] == len(blob) == 4 * NUMBERS * (missed * width + always) + header_of(blob)
        assert header_of(blob) <= 130 * len(load(blob)) + 16
        seen[index] = number
    assert max(lacking) >= 3  # somebody was away for long, ...
    assert lacking.count(1) >= 2  # ... and somebody wasn't
    for index, number in seen.items():
        memory = kept_by(folder, index, number)
        assert base_version(memory) == number - 1
        there = states[number - 2].merged.total
        assert memory.keys() == {"version", *there}
        assert all(torch.equal(memory[name], tensor) for name, tensor in there.items())


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_after_a_turn_that_failed_everything_is_sent_again(method, states, tmp_path):
    """Client 0, known to hold version 1, answers rubbish in round 3, having kept what it was sent: nobody but itself
    knows that."""
    inner, app = make_client_app(), ClientApp()
    app.query()(lambda message, context: inner(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if context.node_config["partition-id"] == 0 and message.metadata.group_id == "3":
            del reply.content["metrics"]
        return reply

    folder = tmp_path / "run"
    words = [f"method={method}", "rounds=5", "adapter.rank=1", "population.cohort=4"]
    grid = run_on(Listening, app, folder, *words)
    assert [(r["round"], r["client"]) for r in rows(folder, "failures.csv")] == [("3", "0")]
    built_on = {place: settings[FROM] for place, (settings, _) in grid.sent.items()}
    assert [built_on[number, 0] for number in range(1, 6)] == [0, 0, 1, 0, 3]
    assert [built_on[number, 1] for number in range(1, 6)] == [0, 0, 1, 2, 3]
    whole, last = (load(grid.sent[4, index][1]) for index in (0, 1))
    assert size_of(whole) > size_of(last)
    memory = kept_by(folder, 0, 5)
    assert all(torch.equal(memory[name], tensor) for name, tensor in states[3].merged.total.items())


@pytest.mark.parametrize(("method", "limit"), [(MERGING[0], 256), *((method, 3) for method in MERGING)])
def test_resumed_in_the_middle_it_ends_the_same(method, limit, tmp_path):
    """With room for all merges, and with so little that they are cut back on the way."""
    words = [*FEW, f"method={method}", f"method.strategy.residual_rank={limit}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_local(small(*words, "rounds=4", out=whole))
    run_local(small(*words, "rounds=2", out=parts))
    run_local(small(*words, "rounds=4", out=parts), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]

    def sent(folder):
        named = ("round", "client", "direction", "part", "payload_bytes")
        return [[row[name] for name in named] for row in rows(folder, "ledger.csv") if row["part"] == "train"]

    assert sent(whole) == sent(parts)
    cut = [float(row["merge_error"]) > 1e-4 for row in rows(whole, "metrics.csv")]
    assert any(cut) == (limit == 3)


@pytest.mark.parametrize(
    "ranks",
    [(), ("population.ranks=[4,2,1]",), ("population.ranks=[4,2,1]", "population.scaling=per_rank")],
    ids=["equal", "mixed", "mixed scalings"],
)
def test_flora_is_the_full_delta_oracle(ranks, tmp_path):
    """The same seeds: after four rounds, what FLoRA merged is what the dense control added up.

    By plain steps: AdamW's first is the gradient's sign, in which a rounding of the round before can be all there is.
    """
    sgd = ("train.optimizer=sgd", "train.lr=0.5")
    found = {}
    for method in ("flora", "full_delta"):
        folder = tmp_path / method
        experiment = small("rounds=4", f"method={method}", *sgd, *ranks, out=folder)
        run_local(experiment)
        workspace = Workspace(experiment)
        template = workspace.strategy.init(workspace.model.layout)
        state = load_checkpoint(folder / "checkpoint/state.safetensors", template).state
        if method == "flora":
            found[method] = {m: p.b.double() @ p.a.double() for m, p in from_residual(state.merged.total).items()}
        else:
            found[method] = {name.removesuffix(".delta"): matrix.double() for name, matrix in state.change.items()}
        errors = [float(row["aggregation_error"]) for row in rows(folder, "metrics.csv")[1:]]
        assert max(errors) < 1e-5
    assert distance(found["flora"], found["full_delta"]) < 1e-5


@pytest.mark.parametrize("method", ["flora", "florist", "flexlora", "full_delta"])
def test_mixed_ranks_run(method, tmp_path):
    folder = tmp_path / "run"
    words = ["rounds=2", f"method={method}", "population.ranks=[4,2,1]", "population.scaling=per_rank"]
    run_local(small(*words, out=folder))
    metrics = rows(folder, "metrics.csv")
    assert float(metrics[2]["eval_loss"]) < float(metrics[0]["eval_loss"])
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["r"] >= 1


def test_the_exported_adapter_is_the_model_that_was_scored(tmp_path):
    """What was merged into the base is part of it."""
    folder = tmp_path / "run"
    experiment = small("rounds=3", "method=fedex_lora", out=folder)
    run_local(experiment)
    workspace = Workspace(experiment)
    template = workspace.strategy.init(workspace.model.layout)
    state = load_checkpoint(folder / "checkpoint/state.safetensors", template).state
    workspace.install(workspace.strategy.configure(state, 4, ClientInfo(SERVER, 1)), {})
    exported = PeftModel.from_pretrained(tiny_model(), folder / "adapter")
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            exported(input_ids=tokens).logits, workspace.model.module(input_ids=tokens).logits, rtol=1e-4, atol=1e-5
        )
