"""SCAFFOLD: a turn against numpy, the server by hand, and the two things that it promises.

The server, N = 4 clients of which two replied with 1 and 3 examples, on A:

    x+ = 1/4 [4, 0, 8] + 3/4 [0, 4, 4]          = [1, 3, 5]
    c+ = [1, 1, 1] + 1/4 ([2, 0, 4] + [6, 4, 0]) = [3, 2, 2]        2/4 of the plain mean

What it promises: c is the mean of the c_i whoever takes part, and clients with unlike data agree on the minimum of the
mean of their losses. With loss_i = 1/2 sum h_i (w - at_i)^2 that is sum_i h_i at_i / sum_i h_i, while averaging after
many local steps ends near the mean of the at_i.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, run_on, summary_of
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from toy import SHAPES, A, B, Endless, Toy, drawn, quadratic

from clients.scaffold import Scaffold as ScaffoldClient
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Slot, Update
from fedtune.core.seeds import derive_seed
from fedtune.lowrank.residual import VERSION
from fedtune.runtime.app import make_client_app, make_server_app
from fedtune.runtime.local import LocalGrid, server_context
from fedtune.server.round_loop import RoundLoop
from fedtune.training.control_variates import CHANGE, CONTROL, settle, tag
from fedtune.training.first_order import loss_of
from fedtune.training.gradients import finished
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.scaffold import Scaffold, State

RUN = "0" * 16


def layout(start):
    tensors = {name: torch.tensor(value) for name, value in start.items()}
    return Layout(
        tuple(Slot(n, tuple(t.shape), "float64", n.split(".")[1], "layer", 2.0) for n, t in tensors.items()), tensors
    )


def a(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def test_the_server_by_hand():
    b = torch.zeros(2, 1, dtype=torch.float64)
    state = State({A: a(9, 9, 9), B: b}, {A: a(1, 1, 1), B: b})
    replies = [
        (ClientInfo(1, 1), Update({A: a(4, 0, 8), B: b, CHANGE + A: a(2, 0, 4), CHANGE + B: b}, 1)),
        (ClientInfo(3, 3), Update({A: a(0, 4, 4), B: b, CHANGE + A: a(6, 4, 0), CHANGE + B: b}, 3)),
    ]
    after = Scaffold(clients=4).aggregate(state, 7, replies)
    assert after.adapter[A].tolist() == [[1, 3, 5]]
    assert after.control[A].tolist() == [[3, 2, 2]]
    assert after.counted == {"1": 7, "3": 7}


def test_a_turn_is_the_papers_and_leaves_the_mean_gradient(monkeypatch):
    h, at, x, c, mine = drawn(1, 0.5, 2.0), drawn(2), drawn(3), drawn(4), drawn(5)
    quadratic(monkeypatch, h, at)
    client, lr, steps = ScaffoldClient(lr=0.05, steps=6), 0.05, 6
    model, memory = Toy(drawn(6)), tag(CONTROL, {name: torch.tensor(value) for name, value in mine.items()})
    sent = {**x, **{CONTROL + name: value for name, value in c.items()}}
    instruction = Instruction({name: torch.tensor(value) for name, value in sent.items()})
    client.receive(model, instruction, memory)
    update = finished(client.train(model, Endless(5), instruction, memory, key=0))
    assert update.examples == 5
    for name in SHAPES:
        y, met = x[name].copy(), []
        for _ in range(steps):
            met.append(h[name] * (y - at[name]))
            y -= lr * (met[-1] - mine[name] + c[name])
        new = mine[name] - c[name] + (x[name] - y) / (steps * lr)
        assert np.allclose(update.tensors[name].numpy(), y, rtol=0, atol=1e-12)
        assert np.allclose(update.tensors[CHANGE + name].numpy(), new - mine[name], rtol=0, atol=1e-12)
        assert np.allclose(new, np.mean(met, 0), rtol=0, atol=1e-12)
    settle(Instruction({}), memory)
    for name in SHAPES:
        kept = update.tensors[CHANGE + name].numpy() + mine[name]
        assert np.allclose(memory[CONTROL + name].numpy(), kept, rtol=0, atol=1e-12)


class Federation:
    """Clients with quadratics of their own, each with its memory, and the server, without wires between them."""

    def __init__(self, monkeypatch, count, steps=10, lr=0.1):
        self.patch = monkeypatch
        self.data = [(drawn(10 + i, 0.5, 2.0), drawn(20 + i, -3, 3)) for i in range(count)]
        self.client = ScaffoldClient(lr=lr, steps=steps)
        self.method = Scaffold(clients=count)
        self.state = self.method.init(layout(drawn(0)))
        self.memories = [{} for _ in range(count)]
        self.peers = [ClientInfo(index, 1) for index in range(count)]

    def play(self, round, cohort, lost=(), examples=lambda index: 1):
        replies = []
        for index in cohort:
            told = self.method.configure(self.state, round, self.peers[index])
            quadratic(self.patch, *self.data[index])
            model = Toy(drawn(0))
            self.client.receive(model, told, self.memories[index])
            update = finished(self.client.train(model, Endless(examples(index)), told, self.memories[index], 0))
            assert set(update.tensors) == {*SHAPES, *tag(CHANGE, SHAPES)}
            ok = index not in lost
            self.peers[index] = replace(self.peers[index], base_version=told.settings[VERSION] if ok else 0)
            if ok:
                self.method.validate(self.state, round, self.peers[index], update)
                replies.append((self.peers[index], update))
        self.state = self.method.aggregate(self.state, round, replies)

    def own(self, name, index):
        """What client `index` would take as its c_i in its next turn."""
        memory = dict(self.memories[index])
        settle(self.method.configure(self.state, 99, self.peers[index]), memory)
        return memory.get(CONTROL + name, torch.zeros(SHAPES[name], dtype=torch.float64))

    def check_mean(self):
        for name in SHAPES:
            mean = sum(self.own(name, index) for index in range(len(self.peers))) / len(self.peers)
            assert torch.allclose(self.state.control[name], mean, rtol=0, atol=1e-12)


def test_c_is_the_mean_of_the_c_i_whoever_takes_part(monkeypatch):
    federation = Federation(monkeypatch, 5)
    for round, cohort in enumerate([(0, 1, 2, 3, 4), (1, 3), (0, 3, 4), (2,), (0, 1, 2, 3, 4)], 1):
        federation.play(round, cohort, examples=lambda index: index + 1)
        federation.check_mean()
    assert federation.state.control[A].abs().max() > 0.01


@pytest.mark.parametrize("lost", [{1: (0,)}, {2: (0, 1)}, {1: (2,), 2: (2,), 3: (2,)}])
def test_a_turn_whose_reply_got_lost_never_happened(monkeypatch, lost):
    """Its first, a later one, or several in a row: c stays the mean of the c_i."""
    federation = Federation(monkeypatch, 3)
    for round in range(1, 6):
        federation.play(round, (0, 1, 2), lost.get(round, ()))
        federation.check_mean()


def test_a_client_that_failed_before_it_kept_anything_goes_on_from_its_last_turn_that_counted(monkeypatch):
    federation = Federation(monkeypatch, 3)
    federation.play(1, (0, 1, 2))
    federation.peers[1] = replace(federation.peers[1], base_version=0)  # its round 2 raised
    federation.play(2, (0, 2))
    assert federation.memories[1][CHANGE + A].abs().max() > 0
    federation.check_mean()
    federation.play(3, (0, 1, 2))
    federation.check_mean()


def test_a_device_that_comes_without_its_memory_begins_again(monkeypatch):
    federation = Federation(monkeypatch, 3)
    federation.play(1, (0, 1, 2))
    federation.memories[1], federation.peers[1] = {}, ClientInfo(1, 1)
    federation.play(2, (0, 1, 2))
    assert federation.state.counted == {"0": 2, "1": 2, "2": 2}


@pytest.mark.slow
def test_clients_with_unlike_data_agree_on_the_minimum_of_their_mean_loss(monkeypatch):
    federation = Federation(monkeypatch, 4, steps=10)
    for round in range(1, 80):
        federation.play(round, (0, 1, 2, 3))
    for name in SHAPES:
        h, at = (np.stack([data[place][name] for data in federation.data]) for place in (0, 1))
        optimum, drifted = (h * at).sum(0) / h.sum(0), at.mean(0)
        got = federation.state.adapter[name].numpy()
        assert np.allclose(got, optimum, rtol=0, atol=1e-6)
        assert np.abs(drifted - optimum).max() > 0.1  # an example in which plain averaging would be elsewhere


def test_peers_that_hold_what_counted_are_sent_the_very_same(monkeypatch):
    federation = Federation(monkeypatch, 3)
    federation.play(1, (0, 1, 2))
    one, other = (federation.method.configure(federation.state, 2, federation.peers[i]) for i in (0, 1))
    assert one.settings == other.settings
    assert all(tensor is other.tensors[name] for name, tensor in one.tensors.items())


def test_clipping_takes_the_corrected_gradient_as_one(monkeypatch):
    h, at, x, c = drawn(1, 0.5, 2.0), drawn(2), drawn(3), drawn(4)
    quadratic(monkeypatch, h, at)
    sent = {**x, **{CONTROL + name: value for name, value in c.items()}}
    instruction = Instruction({name: torch.tensor(value) for name, value in sent.items()})
    model = Toy(x)
    update = finished(ScaffoldClient(lr=0.1, steps=1, max_grad_norm=0.01).train(model, Endless(), instruction, {}, 0))
    step = {name: (torch.tensor(x[name]) - update.tensors[name]) / 0.1 for name in x}
    assert sum(float(s.square().sum()) for s in step.values()) ** 0.5 == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(CHANGE + B), "'dc/layer.lora_B.weight' is missing"),
        (lambda t: t.update({CONTROL + A: a(1, 1, 1)}), "'c/layer.lora_A.weight' was not asked for"),
        (lambda t: t.update({CHANGE + A: a(1, 1)}), "expected float64 (1, 3), got float64 (1, 2)"),
    ],
)
def test_an_update_of_another_form_is_refused_by_name(change, said):
    method = Scaffold(clients=2)
    state = method.init(layout(drawn(0)))
    tensors = {**state.adapter, **tag(CHANGE, state.control)}
    change(tensors)
    with pytest.raises(WireError) as caught:
        method.validate(state, 1, ClientInfo(0, 1), Update(tensors, 1))
    assert said in str(caught.value)


@pytest.mark.slow
def test_on_a_real_model_one_steps_c_i_is_the_gradient():
    workspace = Workspace(compose([*SMALL, "method=scaffold", "train.steps=1"]))
    state = workspace.strategy.init(workspace.model.layout)
    told = workspace.strategy.configure(state, 1, ClientInfo(2, 1))
    update = local_update(workspace, RUN, 2, 1, told)
    workspace.install(told, {})
    batch = next(iter(workspace.data.batches(2, workspace.experiment.train.batch_size, derive_seed(0, "train", 1, 2))))
    gradients = torch.autograd.grad(loss_of(workspace.model.module, batch), workspace.model.parameters())
    assert max(float(g.abs().max()) for g in gradients) > 1e-3
    for name, gradient in zip(state.adapter, gradients, strict=True):
        assert torch.allclose(update.tensors[CHANGE + name], gradient, rtol=0, atol=2e-6)
        assert torch.allclose(update.tensors[name], state.adapter[name] - 0.1 * gradient, rtol=0, atol=1e-7)


def losing_app(lost):
    """The real ClientApp, whose replies get lost in the (round, client) pairs of `lost`, after the client's part."""
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))

    @app.train()
    def train(message, context):
        reply = inner(message, context)
        if (int(message.metadata.group_id), context.node_config["partition-id"]) in lost:
            raise ConnectionError("lost on the way")
        return reply

    return app


LOST = {(1, 1), (2, 0), (3, 0)}
WORDS = ("method=scaffold", "population.cohort=4")


def test_after_a_real_run_with_losses_c_is_the_mean_of_what_the_clients_hold(tmp_path, monkeypatch):
    states = {}
    finish = RoundLoop._finish

    def finish_and_keep(self, played):
        states[played.number] = self.known.strategy_state
        finish(self, played)

    monkeypatch.setattr(RoundLoop, "_finish", finish_and_keep)
    run_on(LocalGrid, losing_app(LOST), tmp_path / "run", *WORDS, "rounds=4")
    state, total = states[4], None
    for index in range(4):
        (file,) = tmp_path.glob(f"run/clients/*/{index}/4.safetensors")
        memory = load_file(file)
        settle(Instruction({}, {"counted": state.counted[str(index)]}), memory)
        own = {name: memory[CONTROL + name].double() for name in state.control}
        total = own if total is None else {name: total[name] + own[name] for name in own}
    biggest = max(float(t.abs().max()) for t in state.control.values())
    assert biggest > 1e-3
    for name, c in state.control.items():
        assert torch.allclose(c.double(), total[name] / 4, rtol=0, atol=1e-6 * biggest)


def test_resume_equals_uninterrupted_with_losses(tmp_path):
    run_on(LocalGrid, losing_app(LOST), tmp_path / "whole", *WORDS, "rounds=4")
    run_on(LocalGrid, losing_app(LOST), tmp_path / "parts", *WORDS, "rounds=2")
    # Client 0's reply was lost in round 2, so it holds a change that does not count when the run goes on
    words = [*SMALL, *WORDS, "rounds=4", f"out={tmp_path / 'parts'}"]
    config = {"config": compose(words).text()}
    make_server_app(resume=str(tmp_path / "parts"))(
        grid=LocalGrid(losing_app(LOST), 4, config), context=server_context(config)
    )
    assert summary_of(tmp_path / "whole")["state_sha256"] == summary_of(tmp_path / "parts")["state_sha256"]


def test_a_run_measures_its_exactness_and_moves_twice_what_fedit_does(small_run):
    mine, fedit = small_run("method=scaffold", name="scaffold"), small_run("method=fedit", name="fedit")
    lines = (mine / "metrics.csv").read_text().splitlines()
    errors = [dict(zip(lines[0].split(","), line.split(","), strict=True))["aggregation_error"] for line in lines[2:]]
    assert all(0 < float(error) < 0.1 for error in errors)
    scalars = 4 * summary_of(fedit)["adapter"]["trainable_parameters"]
    totals, plain = summary_of(mine)["totals"], summary_of(fedit)["totals"]
    for way in ("up_payload_bytes", "down_payload_bytes"):
        added = totals[way] - plain[way] - 2 * 3 * scalars  # rounds, clients
        assert 0 < added < 2 * 3 * 8 * 200  # the header of 8 more tensors


def test_how_many_clients_there_are_comes_from_the_population():
    assert Workspace(compose(["model=tiny", "method=scaffold", "population.clients=7"])).strategy.clients == 7
    with pytest.raises(ConfigError, match="clients=0 is too small"):
        Scaffold(clients=0)


def test_what_a_client_keeps_is_its_own(small_run):
    folder = small_run("method=scaffold", "population.cohort=4", rounds=1)
    kept = [load_file(file) for file in sorted(folder.glob("clients/*/*/1.safetensors"))]
    assert len(kept) == 4
    name = next(name for name in kept[0] if name.startswith(CHANGE) and "lora_B" in name)
    assert len({tuple(memory[name].flatten().tolist()) for memory in kept}) == 4
