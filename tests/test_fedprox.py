"""FedProx: the gradient of its proximal term by hand, and what the term does to a client's steps.

With theta = [[3, 1, -2]], theta_t = [[1, 1, 2]] and mu = 0.5 (in B: [[4], [0]] against [[0], [0]]):

    d/dtheta (mu / 2) |theta - theta_t|^2 = mu (theta - theta_t) = [[1, 0, -2]], and [[2], [0]] for B
    the term itself = 0.25 (4 + 0 + 16 + 16) = 9

Plain steps on a quadratic, loss h/2 (w - at)^2, from theta_t:

    w <- w - lr (h (w - at) + mu (w - theta_t))        which goes to (h at + mu theta_t) / (h + mu)
"""

import numpy as np
import pytest
import torch
from conftest import SMALL, summary_of
from toy import SHAPES, A, B, Endless, Toy, drawn, quadratic

from clients.first_order import FirstOrder, proximal
from fedtune.config.compose import compose
from fedtune.core.protocol import ClientInfo, Instruction, Update
from fedtune.runs.checkpoint import state_sha256
from fedtune.training.gradients import finished
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.fedit import FedIT
from strategies.fedit import State as FedITState
from strategies.fedprox import FedProx, State

RUN = "0" * 16


def turn(*words):
    workspace = Workspace(compose([*SMALL, *words]))
    state = workspace.strategy.init(workspace.model.layout)
    return state, local_update(workspace, RUN, 0, 1, workspace.strategy.configure(state, 1, ClientInfo(0, 1)))


def distance(state, update):
    return sum(float((update.tensors[n] - t).square().sum()) for n, t in state.adapter.items()) ** 0.5


def test_the_terms_gradient_is_mu_times_the_way_from_where_the_round_began():
    model = Toy({A: [[1.0, 1.0, 2.0]], B: [[0.0], [0.0]]})
    penalty = proximal(model, 0.5)
    model.install({A: torch.tensor([[3.0, 1.0, -2.0]]), B: torch.tensor([[4.0], [0.0]])})
    term = penalty()
    assert term.item() == 9
    term.backward()  # computed on .data it would have nothing to go back to
    assert model.live[A].grad.tolist() == [[1, 0, -2]]
    assert model.live[B].grad.tolist() == [[2], [0]]


@pytest.mark.parametrize("mu", [0.0, 0.3, 4.0])
def test_steps_on_a_quadratic_follow_the_equation(monkeypatch, mu):
    h, at, start = drawn(1, 0.5, 2.0), drawn(2), drawn(3)
    quadratic(monkeypatch, h, at)
    client = FirstOrder(lr=0.1, steps=7, optimizer="sgd", max_grad_norm=0.0, mu=mu)
    model = Toy(start)
    update = finished(client.train(model, Endless(5), Instruction({}), {}, key=0))
    for name in SHAPES:
        w = start[name].copy()
        for _ in range(7):
            w -= 0.1 * (h[name] * (w - at[name]) + mu * (w - start[name]))
        assert np.allclose(update.tensors[name].numpy(), w, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_they_end_between_the_clients_own_optimum_and_where_the_round_began(monkeypatch):
    h, at, start = drawn(1, 0.5, 2.0), drawn(2), drawn(3)
    quadratic(monkeypatch, h, at)
    client = FirstOrder(lr=0.1, steps=600, optimizer="sgd", max_grad_norm=0.0, mu=3.0)
    update = finished(client.train(Toy(start), Endless(), Instruction({}), {}, key=0))
    for name in SHAPES:
        expected = (h[name] * at[name] + 3 * start[name]) / (h[name] + 3)
        assert np.allclose(update.tensors[name].numpy(), expected, rtol=0, atol=1e-12)


def test_without_the_term_it_is_fedit_to_the_last_bit(small_run):
    fedit = small_run("method=fedit", name="fedit")
    fedprox = small_run("method=fedprox", "method.client.mu=0", name="fedprox")
    assert summary_of(fedit)["state_sha256"] == summary_of(fedprox)["state_sha256"]


@pytest.mark.slow
def test_the_term_reaches_the_steps_of_a_real_model():
    """A term without a gradient, as one computed on .data, would leave the update as it is without."""
    _, plain = turn("method=fedprox", "method.client.mu=0", "train.steps=4")
    _, held = turn("method=fedprox", "method.client.mu=1", "train.steps=4")
    assert state_sha256(Update(held.tensors, 1)) != state_sha256(Update(plain.tensors, 1))


@pytest.mark.slow
def test_a_large_mu_keeps_a_real_model_near_where_the_round_began():
    """Plain steps: with lr mu = 1 each step undoes all earlier ones, so 8 steps get about as far as one."""
    words = ("method=fedprox", "train.optimizer=sgd", "train.lr=0.05", "train.max_grad_norm=0", "train.steps=8")
    state, free = turn(*words, "method.client.mu=0")
    _, held = turn(*words, "method.client.mu=20")
    _, one = turn(*words[:-1], "train.steps=1", "method.client.mu=0")
    assert distance(state, held) < 2 * distance(state, one) < distance(state, free)


def test_the_term_composes_with_another_method():
    _, plain = turn("method=krum")
    _, held = turn("method=krum", "method.client.mu=1")
    assert state_sha256(Update(held.tensors, 1)) != state_sha256(Update(plain.tensors, 1))


def test_the_server_is_fedits():
    rng = np.random.default_rng(0)

    def adapter():
        return {name: torch.from_numpy(rng.standard_normal(shape)).float() for name, shape in SHAPES.items()}

    start = adapter()
    replies = [(ClientInfo(index, n), Update(adapter(), n)) for index, n in enumerate((1, 7, 2))]
    mine = FedProx().aggregate(State(start), 1, replies)
    theirs = FedIT().aggregate(FedITState(start), 1, replies)
    assert state_sha256(mine) == state_sha256(theirs)
