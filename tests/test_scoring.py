"""The score of a layer, AdaLoRA's, from the gradients of A and B alone.

    I = |w dloss/dw|        Ibar <- b1 Ibar + (1 - b1) I        Ubar <- b2 Ubar + (1 - b2) |I - Ibar|
    s = Ibar Ubar           S_j = s(L_j) + mean_i s(P_ij) + mean_k s(Q_jk)        score = sum_j S_j

By hand, r = 1, B = [2], A = [3], b1 = b2 = 1/2, gradients dB = 1, dA = 4 and then dB = -3, dA = 0:

    P, L: I = 2, Ibar = 1, Ubar = 1/2; then I = 6, Ibar = 7/2, Ubar = 1/4 + 5/4 = 3/2        s = 21/4
    Q:    I = 12, Ibar = 6, Ubar = 3; then I = 0, Ibar = 3, Ubar = 3/2 + 3/2 = 3             s = 9

and the score is 21/4 + 21/4 + 9 = 19.5.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import A, B, Endless, Toy, drawn, quadratic

import fedtune.training.gradients
from clients.scoring import Scoring, Sensitivity
from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.protocol import Batch, Instruction
from fedtune.lowrank.algebra import lora_factors, name_of
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base, pick_device
from fedtune.training.apply_instruction import SCORE, SCORE_BYTES, SCORES
from fedtune.training.gradients import finished


def parameters(**shapes):
    """A and B of each layer, (out, r, in), and gradients to be set."""
    made, draw = {}, torch.Generator().manual_seed(0)
    for module, (out, rank, width) in shapes.items():
        for role, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
            tensor = torch.randn(shape, generator=draw, dtype=torch.float64)
            made[name_of(module, role)] = torch.nn.Parameter(tensor)
    return made


def test_two_steps_by_hand():
    live = {
        "one.lora_A.weight": torch.nn.Parameter(torch.tensor([[3.0]])),
        "one.lora_B.weight": torch.nn.Parameter(torch.tensor([[2.0]])),
    }
    sensitivity = Sensitivity(live, 0.5, 0.5)
    for down, up in ((4.0, 1.0), (0.0, -3.0)):
        live["one.lora_A.weight"].grad, live["one.lora_B.weight"].grad = torch.tensor([[down]]), torch.tensor([[up]])
        sensitivity.watch()
    assert sensitivity.scores().tolist() == [19.5]


def by_numpy(steps, b1, b2):
    """The score of one layer from the B, A, dB, dA of each step, entry by entry."""
    out, rank = steps[0][0].shape
    width = steps[0][1].shape[1]

    def followed(values):
        mean = off = 0.0
        for value in values:
            mean = b1 * mean + (1 - b1) * abs(value)
            off = b2 * off + (1 - b2) * abs(abs(value) - mean)
        return mean * off

    score = 0.0
    for j in range(rank):
        line = followed([sum(b[i, j] * db[i, j] for i in range(out)) for b, _, db, _ in steps])
        left = [followed([b[i, j] * db[i, j] for b, _, db, _ in steps]) for i in range(out)]
        right = [followed([a[j, k] * da[j, k] for _, a, _, da in steps]) for k in range(width)]
        score += line + sum(left) / out + sum(right) / width
    return score


@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from([(0.85, 0.85), (0.5, 0.9), (0.0, 0.0)]))
def test_scores_are_those_of_numpy(count, seed, betas):
    live = parameters(zeta=(4, 2, 3), alpha=(2, 3, 5))
    rng = np.random.default_rng(seed)
    sensitivity = Sensitivity(live, *betas)
    seen = {module: [] for module in ("alpha", "zeta")}
    for _ in range(count):
        for parameter in live.values():
            parameter.grad = torch.from_numpy(rng.normal(size=parameter.shape))
        sensitivity.watch()
        for module, layer in lora_factors(live).items():
            arrays = (layer.b.detach(), layer.a.detach(), layer.b.grad, layer.a.grad)
            seen[module].append([array.numpy().copy() for array in arrays])
        with torch.no_grad():
            for parameter in live.values():
                parameter -= 0.1 * parameter.grad
    expected = [by_numpy(steps, *betas) for _, steps in sorted(seen.items())]
    scores = sensitivity.scores()
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-12)


@given(st.integers(0, 999))
def test_it_is_as_if_the_layer_were_p_l_q(seed):
    """loss = |W X - Y|^2 of W = P L Q, the explicit SVD, differentiated by P, L and Q; and of W = B A for two ways to
    divide L among B and A: w dloss/dw of P, L and Q comes from B and A alike."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((5, 2), (2, 4)))
    x, y = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 7), (5, 7)))
    u, values, v = torch.linalg.svd(left @ right, full_matrices=False)
    p, lines, q = (part.clone().requires_grad_() for part in (u[:, :2], values[:2], v[:2]))
    ((p * lines) @ q @ x - y).square().sum().backward()
    wanted = [(part * part.grad).detach() for part in (p, lines, q)]
    for power in (0.0, 0.3, 1.0):
        b = (p * lines**power).detach().requires_grad_()
        a = (lines[:, None] ** (1 - power) * q).detach().requires_grad_()
        (b @ a @ x - y).square().sum().backward()
        found = [b * b.grad, (b * b.grad).sum(0), a * a.grad]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine.detach(), theirs, rtol=1e-9, atol=1e-9)


def test_a_clients_scores_follow_its_own_steps(monkeypatch):
    """Three SGD steps on a quadratic, by numpy; the gradients are as they were before the norm was cut."""
    start, h, at = (drawn(seed, 0.2) for seed in (1, 2, 3))
    quadratic(monkeypatch, h, at)
    model = Toy(start)
    client = Scoring(lr=0.1, steps=3, optimizer="sgd", max_grad_norm=0.01)
    told = Instruction({}, {SCORE: True})
    update = finished(client.train(model, Endless(), told, {}, 0))
    now, steps = {name: value.copy() for name, value in start.items()}, []
    for _ in range(3):
        slope = {name: h[name] * (now[name] - at[name]) for name in now}
        steps.append((now[B].copy(), now[A].copy(), slope[B], slope[A]))
        size = sum((g**2).sum() for g in slope.values()) ** 0.5
        for name in now:
            now[name] -= 0.1 * slope[name] * min(1, 0.01 / (size + 1e-6))
    np.testing.assert_allclose(update.tensors[SCORES], [by_numpy(steps, 0.85, 0.85)], rtol=1e-5)
    np.testing.assert_allclose(update.tensors[A], now[A], rtol=1e-6)


@pytest.fixture
def model():
    return LocalModel(load_base(ModelSpec(name="tiny", dtype="float32"), pick_device("cpu")), AdapterSpec(), 0)


class Fixed(Endless):
    def __iter__(self):
        while True:
            yield Batch(torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.bool))


@pytest.mark.parametrize("asked", [True, False])
def test_a_score_costs_no_pass(model, monkeypatch, asked):
    """As many passes with scores as without, both ways, the same adapter in the end, and one number a layer."""
    passes = []
    backward, losses = torch.autograd.backward, fedtune.training.gradients.packed_losses
    monkeypatch.setattr(torch.autograd, "backward", lambda *words: (passes.append("back"), backward(*words))[1])
    monkeypatch.setattr(
        fedtune.training.gradients, "packed_losses", lambda *words: (passes.append("forth"), losses(*words))[1]
    )
    client, plain = Scoring(steps=3), {}
    for settings in ({}, {SCORE: asked}):
        passes.clear()
        model.reset()
        told = Instruction(dict(model.layout.initial), settings)
        client.receive(model, told, {})
        update = finished(client.train(model, Fixed(), told, {}, 0))
        assert passes == ["forth", "back"] * 3
        scores = update.tensors.pop(SCORES, None)
        plain = plain or update.tensors
        assert all(torch.equal(plain[name], tensor) for name, tensor in update.tensors.items())
        assert (scores is not None) == bool(settings.get(SCORE))
    assert scores is None or (scores.shape == (4,) and (scores > 0).all())


def test_scores_of_some_layers_come_in_the_order_of_their_names(model):
    """Alone, a layer that is last in the model is first."""
    client = Scoring(steps=2)
    chosen = sorted(lora_factors(model.layout.initial))[2:]
    told = Instruction({n: t for n, t in model.layout.initial.items() if n.startswith(tuple(chosen))}, {SCORE: True})
    client.receive(model, told, {})
    assert finished(client.train(model, Fixed(), told, {}, 0)).tensors[SCORES].shape == (2,)


def test_it_installs_its_own_answer_to_try_codecs(model):
    """Which has scores beside the layers."""
    told = {name: tensor + 1 for name, tensor in model.layout.initial.items()}
    Scoring().receive(model, Instruction({**told, SCORES: torch.ones(4)}), {})
    assert all(torch.equal(model.read()[name], tensor) for name, tensor in told.items())


def test_the_running_means_are_part_of_what_a_step_takes():
    client = Scoring(steps=5)
    assert client.work({}).state_bytes == 16
    assert client.work({SCORE: True}).state_bytes == 16 + SCORE_BYTES
    assert client.work({SCORE: True}).steps == 5
