"""Fed-SB: exact, r^2 numbers a layer, and a model that shows no trace of how it was trained.

W = W0 + s B0 R A0, so with G = dL/dW the gradient of R is s B0^T G A0^T, and a step of plain gradient descent from R
moves W by -lr s^2 B0 B0^T G A0^T A0.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, SHAPES, dense, distance, layout

from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import SERVER, ClientInfo, Instruction, Layout, Update
from fedtune.core.seeds import bits, derive_seed
from fedtune.lowrank.algebra import lora_factors, name_of
from fedtune.models.base import load_base, pick_device
from fedtune.runs.checkpoint import state_sha256
from fedtune.training.first_order import loss_of
from fedtune.training.frozen_basis import expanded, left_basis, training_core, zero_core
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.fed_sb import FedSB

RUN = "0" * 16
FEW = f"data.path={Path(__file__).with_name('pairs.jsonl')}"  # few and short examples
GOLDEN = [-0.138051972, 0.672917306, -0.605895519]


def test_golden_values():
    """The upper 24 bits of each draw as a fraction, stretched to +-sqrt(3 / out), in float32."""
    drawn = left_basis(layout(dtype=torch.float32), 7)
    for module, (out, _) in SHAPES.items():
        basis = drawn[name_of(module, "lora_B")]
        raw = bits(derive_seed(7, "left basis", name_of(module, "lora_B")), 2)
        expected = [((int(word) >> 40) / 2**23 - 1) * (3 / out) ** 0.5 for word in raw]
        assert basis.flatten()[:2].tolist() == pytest.approx(expected, rel=1e-6)
    assert drawn["one.lora_B.weight"].flatten()[:3].tolist() == pytest.approx(GOLDEN, rel=1e-6)


def test_the_left_basis_is_nearly_orthonormal_and_differs_from_layer_to_layer():
    """Each entry of B0^T B0 has the variance 1 / out at most, so at out = 2000 and r = 8 none is off by 0.2."""
    shapes = {"one": (2000, 3), "two": (2000, 5)}
    drawn = left_basis(layout(8, shapes=shapes), 0)
    for basis in drawn.values():
        assert (basis.T @ basis - torch.eye(8, dtype=torch.float64)).abs().max() < 0.2
        assert basis.square().mean() == pytest.approx(1 / 2000, rel=0.05)
    one, two = drawn.values()
    assert not torch.equal(one, two)
    assert not torch.equal(one, left_basis(layout(8, shapes=shapes), 1)["one.lora_B.weight"])


def core_reply(index, examples, seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(t.shape, generator=draw, dtype=t.dtype) for name, t in zero_core(layout()).items()}
    return ClientInfo(index, examples), Update(tensors, examples)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=5))
def test_it_is_exact(examples):
    replies = [core_reply(index, n, index) for index, n in enumerate(examples)]
    method, start = FedSB(basis_seed=3), layout()
    state = method.aggregate(method.init(start), 1, replies)
    told = method.configure(state, 2, ClientInfo(SERVER, 1))
    found = dense(expanded(told.tensors, told.settings, start), SCALING)
    wanted = {}
    for _, update in replies:
        for module, matrix in dense(expanded(update.tensors, told.settings, start)).items():
            wanted[module] = wanted.get(module, 0) + SCALING * update.examples / sum(examples) * matrix
    assert distance(found, wanted) < 1e-12


def test_bytes_are_r_squared_a_layer_however_wide_it_is():
    method = FedSB()
    state = method.init(layout())
    peer, update = core_reply(0, 1, 0)
    told = method.configure(state, 1, peer)
    assert sum(t.numel() for t in told.tensors.values()) == sum(t.numel() for t in update.tensors.values()) == 2 * 16
    assert told.tensors.keys() == {"one.lora_R.weight", "two.lora_R.weight"}
    method.validate(state, 1, peer, update)
    with pytest.raises(WireError, match=r"'one.lora_R.weight' is missing"):
        method.validate(state, 1, peer, Update({}, 1))


def test_a_base_that_needs_its_b_and_a_is_refused():
    """PiSSA's W0 is the weight less s B A."""
    start = layout()
    moved = Layout(start.slots, {name: t + 1 for name, t in start.initial.items()})
    with pytest.raises(ConfigError, match="B has to start at zero"):
        FedSB().init(moved)


def workspace_with(*overrides):
    return Workspace(compose([*SMALL, "method=fed_sb", FEW, *overrides]))


def some_core(workspace, scale=0.05):
    draw = torch.Generator().manual_seed(1)
    return {name: scale * torch.randn(t.shape, generator=draw) for name, t in zero_core(workspace.model.layout).items()}


@pytest.mark.slow
def test_a_step_of_gradient_descent_is_that_of_the_paper():
    """Against plain LoRA on the same batch, where autograd knows nothing of R: with lora_B = B0 and lora_A = R A0,
    dL/dlora_A = s B0^T G, whence dL/dR = dL/dlora_A A0^T."""
    lr = 0.5
    workspace = workspace_with("train.optimizer=sgd", f"train.lr={lr}", "train.max_grad_norm=0", "train.steps=1")
    model, core = workspace.model, some_core(workspace)
    told = FedSB().configure(FedSB().init(model.layout), 1, ClientInfo(0, 1))
    told = Instruction(core, told.settings)
    update = local_update(workspace, RUN, 0, 1, told)
    after = update.tensors
    workspace.install(told, {})
    batch = next(iter(workspace.data.batches(0, workspace.experiment.train.batch_size, derive_seed(0, "train", 1, 0))))
    loss_of(model.module, batch).backward()
    for module, product in lora_factors(model.layout.initial).items():
        name = name_of(module, "lora_A")
        gradient = model.trained()[name].grad @ product.a.T
        name = name_of(module, "lora_R")
        torch.testing.assert_close(core[name] - after[name], lr * gradient, rtol=1e-3, atol=1e-6)
        assert (core[name] - after[name]).abs().max() > 1e-5


def test_r_leaves_zero_in_the_first_round():
    workspace = workspace_with()
    told = workspace.strategy.configure(workspace.strategy.init(workspace.model.layout), 1, ClientInfo(0, 1))
    assert not any(tensor.any() for tensor in told.tensors.values())
    update = local_update(workspace, RUN, 0, 1, told)
    assert all(tensor.any() for tensor in update.tensors.values())


def held_by(workspace):
    """Everything that a turn could leave behind."""
    model = workspace.model
    layers = [model.module.get_submodule(slot.module).lora_A["default"] for slot in model.layout.slots]
    return (
        state_sha256(model.adapter()),
        [len(layer._forward_pre_hooks) for layer in layers],
        [type(layer) for layer in layers],
        [name for name, p in model.module.named_parameters() if p.requires_grad],
        model.scaling,
    )


@pytest.mark.slow
@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left_on_the_model_after_a_turn(raises, monkeypatch):
    workspace = workspace_with()
    fresh = held_by(workspace)
    told = workspace.strategy.configure(workspace.strategy.init(workspace.model.layout), 1, ClientInfo(0, 1))
    told = Instruction(some_core(workspace), told.settings)
    if raises:
        monkeypatch.setattr("clients.first_order.fit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            local_update(workspace, RUN, 0, 1, told)
    else:
        local_update(workspace, RUN, 0, 1, told)
    assert held_by(workspace)[1] == fresh[1]
    workspace.model.reset()
    assert held_by(workspace) == fresh
    workspace.model.install(workspace.model.layout.initial)
    assert workspace.model.read().keys() == workspace.model.layout.initial.keys()


def test_a_core_that_is_not_whole_leaves_nothing_behind_either():
    workspace = workspace_with()
    fresh, core = held_by(workspace), some_core(workspace)
    core.pop(sorted(core)[-1])
    with pytest.raises(KeyError), training_core(workspace.model, core):
        pass
    workspace.model.reset()
    assert held_by(workspace) == fresh


def test_after_training_the_model_is_the_plain_adapter_of_the_core_that_was_trained():
    workspace = workspace_with()
    told = workspace.strategy.configure(workspace.strategy.init(workspace.model.layout), 1, ClientInfo(0, 1))
    update = local_update(workspace, RUN, 0, 1, told)
    after = workspace.model.adapter()
    workspace.install(Instruction(update.tensors, told.settings), {})
    torch.testing.assert_close(after, workspace.model.adapter(), rtol=1e-5, atol=1e-7)


def test_the_exported_adapter_is_a_plain_lora_with_the_evaluated_weights(small_run):
    """Loaded by PEFT alone onto the base alone, it scores as the run's last round did."""
    from peft import PeftModel

    folder = small_run("method=fed_sb", FEW, "train.lr=1e-2")
    workspace = workspace_with("train.lr=1e-2")
    plain = load_base(workspace.experiment.model, pick_device("cpu")).model
    module = PeftModel.from_pretrained(plain, str(folder / "adapter")).eval()
    workspace.model.module = module
    last = (folder / "metrics.csv").read_text().splitlines()
    loss = float(last[-1].split(",")[last[0].split(",").index("eval_loss")])
    assert workspace.evaluate().loss == pytest.approx(loss, rel=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert loss < summary["first_eval_loss"]


def test_the_runs_own_meter_says_exact(small_run):
    lines = (small_run("method=fed_sb", FEW, rounds=3) / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("aggregation_error")
    assert all(float(line.split(",")[place]) < 1e-6 for line in lines[2:])
