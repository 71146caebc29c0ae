"""Slopes and steps from forward passes alone, against quadratics whose slopes are known.

On f(x) = x^T H x / 2 the two-sided slope is ((x + eps z)^T H (x + eps z) - (x - eps z)^T H (x - eps z)) / (4 eps)
= z^T H x, for any eps; the one-sided one is that plus eps z^T H z / 2.
"""

import math
from itertools import repeat

import numpy as np
import pytest
import torch
from directions import values
from torch import nn

from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.errors import ClientError, ConfigError, WireError
from fedtune.core.protocol import Batch
from fedtune.core.settings import told
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.random_directions.hash_noise import coefficient
from fedtune.random_directions.weights import SeededWeights, Space
from fedtune.training.first_order import fit, loss_of
from fedtune.training.gradients import finished
from fedtune.training.zeroth_order import Rules, check_counts, descend, rules_of, slopes_along

RULES = Rules(lr=1e-3, local_steps=4, eps=1e-2)
TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))


def quadratic():
    torch.manual_seed(0)
    x, root = torch.randn(9, dtype=torch.float64), torch.randn(9, 9, dtype=torch.float64)
    h, live = root @ root.T, nn.Parameter(x.clone())
    held = SeededWeights({"x": live}, {"x": x})
    held.move_to(Space(1e-3), {})
    return held, live, x, h


@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0, 30.0])
def test_two_sided_slopes_of_a_quadratic_are_exact_for_any_eps(eps):
    held, live, x, h = quadratic()
    slopes, _, _ = slopes_along(held, lambda: float(live.detach() @ h @ live.detach()) / 2, [3, 4], eps)
    for seed, slope in zip((3, 4), slopes, strict=True):
        z = values(seed, "x", (9,)).double()
        assert slope == pytest.approx(float(z @ h @ x), rel=1e-8)


def test_one_sided_slopes_of_a_quadratic_are_off_by_the_curvature():
    held, live, x, h = quadratic()
    calls = []

    def loss():
        calls.append(0)
        return float(live.detach() @ h @ live.detach()) / 2

    eps = 0.25
    slopes, _, _ = slopes_along(held, loss, [3, 4], eps, two_sided=False)
    assert len(calls) == 3  # one for the point that both directions start from
    for seed, slope in zip((3, 4), slopes, strict=True):
        z = values(seed, "x", (9,)).double()
        assert slope == pytest.approx(float(z @ h @ x + eps * (z @ h @ z) / 2), rel=1e-8)


def local(**adapter):
    return LocalModel(
        load_base(ModelSpec(name="tiny", dtype="float32"), torch.device("cpu")), AdapterSpec(**adapter), 0
    )


def batch():
    return Batch(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))


def ready(rules):
    """A LoRA adapter off its start, where A's gradient is zero."""
    model = local()
    batches = [batch()] * 3
    finished(fit(model, batches, steps=3, lr=0.05, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, key=0))
    moved = {name: tensor.clone() for name, tensor in model.read().items()}
    held = SeededWeights(dict(model.trained()), moved)
    model.__dict__["seeded"] = held
    held.move_to(rules.space, {})
    return model, moved


@pytest.mark.slow
def test_a_slope_is_the_directional_derivative():
    rules = Rules(lr=1e-3, local_steps=1, eps=1e-3)
    model, moved = ready(rules)
    loss_of(model.module, batch()).backward()
    gradient = {name: live.grad.clone() for name, live in model.trained().items()}
    expected = sum(float((gradient[name] * values(5, name, gradient[name].shape)).sum()) for name in moved)
    with torch.no_grad():
        slopes, _, _ = slopes_along(model.seeded, lambda: float(loss_of(model.module, batch())), [5], rules.eps)
    assert slopes[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_steps_are_the_papers():
    """Each step by the textbook: perturb, two losses, w <- w - lr g z, in float32 beside ours."""
    rules = Rules(lr=1e-3, local_steps=3, eps=1e-2)
    model, moved = ready(rules)
    steps = descend(model, repeat(batch()), rules, [[1], [2], [3]])
    model.seeded.render()
    got = {name: live.detach().clone() for name, live in model.trained().items()}

    def loss(tensors):
        model.install(tensors)
        with torch.inference_mode():
            return float(loss_of(model.module, batch()))

    for number, seed in enumerate((1, 2, 3)):
        z = {name: values(seed, name, tensor.shape) for name, tensor in moved.items()}
        above = loss({name: moved[name] + rules.eps * z[name] for name in moved})
        below = loss({name: moved[name] - rules.eps * z[name] for name in moved})
        slope = (above - below) / (2 * rules.eps)
        assert steps.counts[number, 0] * rules.space.quantum == pytest.approx(slope, rel=1e-3, abs=1e-3)
        moved = {name: moved[name] - rules.lr * slope * z[name] for name in moved}
    for name, tensor in moved.items():
        assert torch.allclose(got[name], tensor, rtol=0, atol=2e-6)
    assert steps.skipped == 0


@pytest.mark.slow
def test_several_perturbations_share_a_step():
    """Two directions at one point: each slope counts half."""
    rules, double = Rules(lr=1e-3, local_steps=1, eps=1e-2), Rules(lr=1e-3, local_steps=1, eps=1e-2, perturbations=2)
    one, _ = ready(rules)
    first = descend(one, [batch()], rules, [[1]]).counts
    one.seeded.restore()
    second = descend(one, [batch()], rules, [[2]]).counts
    one.seeded.restore()
    both = descend(one, [batch()], double, [[1, 2]]).counts
    expected = np.concatenate([first, second], axis=1) / 2
    assert np.abs(both - expected).max() <= 1


@pytest.mark.slow
def test_steps_lower_the_loss():
    rules = Rules(lr=3e-3, local_steps=60, eps=1e-2)
    model, _ = ready(rules)
    before = float(loss_of(model.module, batch()).detach())
    descend(model, repeat(batch()), rules, [[seed] for seed in range(60)])
    model.seeded.render()
    assert float(loss_of(model.module, batch()).detach()) < before - 0.05


def test_a_loss_that_is_not_finite_or_jumps_costs_its_step(monkeypatch):
    model, _ = ready(RULES)
    losses = iter([math.nan, 1.0, 5.0, 5.2, 9.0, 1.0, math.inf, 2.0])
    monkeypatch.setattr("fedtune.training.zeroth_order._loss", lambda *arguments: next(losses))
    steps = descend(model, repeat(batch()), RULES, [[1], [2], [3], [4]], clip=1.0)
    assert steps.skipped == 3
    assert (steps.counts[:, 0] != 0).tolist() == [False, True, False, False]
    slope = (5.0 - 5.2) / (2 * coefficient(RULES.eps))
    assert steps.counts[1, 0] == RULES.space.counts(np.array([slope]))[0]
    assert steps.loss == pytest.approx(5.1)
    monkeypatch.setattr("fedtune.training.zeroth_order._loss", lambda *arguments: math.nan)
    with pytest.raises(ClientError, match="all 2 steps were skipped: the loss isn't finite"):
        descend(model, repeat(batch()), RULES, [[1], [2]])


def test_a_slope_beyond_what_can_be_written_down_says_what_to_lower(monkeypatch):
    model, _ = ready(RULES)
    losses = iter([1e8, 1.0])
    monkeypatch.setattr("fedtune.training.zeroth_order._loss", lambda *arguments: next(losses))
    with pytest.raises(ClientError, match=r"the slope became 5e\+09 at step 1 of 1: lower method.strategy.rules.lr"):
        descend(model, repeat(batch()), RULES, [[1]])


def test_rules_travel_as_settings():
    rules = Rules(3e-7, 200, 5e-4, 2, False, "rademacher", 0.75, 9)
    assert rules_of(told(rules)) == rules
    with pytest.raises(ClientError, match="no seeded method's: 'lr' is missing"):
        rules_of({"eps": 1.0})


@pytest.mark.parametrize(
    "words", [{"lr": 0.0}, {"eps": 0.0}, {"local_steps": 0}, {"perturbations": 0}, {"noise": "x"}, {"sparsity": 1.0}]
)
def test_rules_that_make_no_sense_are_refused(words):
    with pytest.raises(ConfigError, match="expected"):
        Rules(**{"lr": 1e-3, "local_steps": 1, "eps": 1e-3, **words})


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (torch.zeros(3), r"expected int32 \(3,\), got float32 \(3,\)"),
        (torch.tensor([math.nan] * 3), "expected int32"),
        (torch.zeros(4, dtype=torch.int32), r"got int32 \(4,\)"),
        (torch.tensor([1, -(2**31), 0], dtype=torch.int32), r"a slope of -2147483648 quanta is out of range"),
    ],
)
def test_counts_from_a_stranger(counts, told):
    with pytest.raises(WireError, match=told):
        check_counts("slopes", counts, (3,), RULES.space)
