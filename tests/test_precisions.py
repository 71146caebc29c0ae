"""One round of clients on bases in several precisions, in one process."""

import pytest
import torch
from conftest import rows, run_on, small, summary_of
from safetensors.torch import load_file
from test_probe import llama

import fedtune.models.shared_base
from fedtune.config.devices import write_devices
from fedtune.core.errors import ModelError
from fedtune.core.protocol import SERVER, ClientInfo, DeviceProfile, Instruction
from fedtune.lowrank.algebra import lora_factors
from fedtune.models.base import load_base
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid
from fedtune.training.apply_instruction import BATCH, BITS, SCORES
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace

pytestmark = pytest.mark.slow

RUN = "0" * 16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(folder)
    return folder


def words(base, *more):
    return ("model=custom", f"model.path={base}", "model.dtype=bfloat16", "method=fedpipe", *more)


def party_of(base, out, *more):
    return Workspace(small(*words(base, *more), out=out))


def told(workspace, state, bits, modules=None):
    """What a client without limits is told, in these bits, as far as these layers go."""
    whole = workspace.strategy.configure(state, 1, ClientInfo(0, 9))
    tensors = {name: tensor for name, tensor in whole.tensors.items() if not modules or name.startswith(tuple(modules))}
    return Instruction(tensors, {**whole.settings, BITS: bits})


@pytest.fixture
def loaded(monkeypatch):
    """The precisions of the bases that were loaded, in turn."""
    found = []

    def load(spec, device):
        found.append(spec.quantization)
        return load_base(spec, device)

    monkeypatch.setattr(fedtune.models.shared_base, "load_base", load)
    return found


def test_each_precision_is_loaded_once_and_shared(base, tmp_path, loaded):
    workspace = party_of(base, tmp_path)
    state = workspace.strategy.init(workspace.layout)
    turns = [(0, 16), (1, 4), (2, 8), (3, 16), (0, 4), (1, 8)]
    models = [workspace.model_for(told(workspace, state, bits)) for _, bits in turns]
    assert loaded == ["none", "nf4", "int8"]
    assert models[0] is models[3] is workspace.model
    assert models[1] is models[4]
    assert models[2] is models[5]
    assert len({id(model) for model in models}) == 3
    assert models[1].module.get_base_model().is_loaded_in_4bit
    assert models[2].module.get_base_model().is_loaded_in_8bit
    assert len({model.layout.sha256 for model in models}) == 1
    for model in models[1:]:
        assert all(torch.equal(model.layout.initial[n], t) for n, t in workspace.model.layout.initial.items())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_right_layers_move_on_a_base_in_any_bits(base, tmp_path, bits):
    """The answer has these layers alone, all of them other than they were; the run's own model is as it was."""
    workspace = party_of(base, tmp_path)
    state = workspace.strategy.init(workspace.layout)
    chosen = sorted(lora_factors(state.adapter))[1:3]
    instruction = told(workspace, state, bits, chosen)
    update = local_update(workspace, RUN, 0, 1, instruction)
    assert sorted(lora_factors(update.tensors)) == chosen
    for module, product in lora_factors(update.tensors).items():
        assert product.b.any(), module
    assert (update.tensors[SCORES] > 0).all()
    assert update.tensors[SCORES].shape == (2,)
    again = local_update(workspace, RUN, 0, 1, instruction)
    assert state_sha256(again) == state_sha256(update)
    other = local_update(party_of(base, tmp_path), RUN, 0, 1, instruction)
    assert state_sha256(other) == state_sha256(update)


def test_the_base_in_other_bits_is_another_base(base, tmp_path):
    workspace = party_of(base, tmp_path)
    state = workspace.strategy.init(workspace.layout)
    found = {state_sha256(local_update(workspace, RUN, 0, 1, told(workspace, state, bits))) for bits in (4, 8, 16)}
    assert len(found) == 3


def test_what_is_evaluated_is_on_the_runs_own_base(base, tmp_path):
    """After a turn in 4 bits, the server's model is in 16; with model.quantization=nf4 it is in 4."""
    for quantization, own in (("none", 16), ("nf4", 4)):
        workspace = party_of(base, tmp_path, f"model.quantization={quantization}")
        assert workspace.bits == own
        state = workspace.strategy.init(workspace.layout)
        local_update(workspace, RUN, 0, 1, told(workspace, state, 4))
        local_update(workspace, RUN, 0, 1, told(workspace, state, 16))
        heard = workspace.strategy.configure(state, 2, ClientInfo(SERVER, 1))
        assert workspace.install(heard, {}) is workspace.model
        assert workspace.model_for(told(workspace, state, own)) is workspace.model
        assert bool(getattr(workspace.model.module.get_base_model(), "is_loaded_in_4bit", False)) == (own == 4)
        assert sorted(workspace.costs.base_bytes, key=int) == ["4", "8", "16"]


def test_bits_that_a_base_has_not_got_are_refused(base, tmp_path):
    workspace = party_of(base, tmp_path)
    with pytest.raises(ModelError, match="can't be held in 3 bits; it can in 4, 8, 16"):
        workspace.model_for(Instruction({}, {BITS: 3}))
    tiny = Workspace(small("method=fedpipe", out=tmp_path))
    assert tiny.bits == 32
    with pytest.raises(ModelError, match="can't be held in 4 bits; it can in 32"):
        tiny.model_for(Instruction({}, {BITS: 4}))


def test_a_turn_is_in_batches_and_steps_of_its_own(base, tmp_path, monkeypatch):
    workspace = Workspace(small("method=fedpipe", "train.batch_size=4", out=tmp_path))
    sizes = []
    batches = workspace.data.__class__.batches
    monkeypatch.setattr(
        workspace.data.__class__, "batches", lambda *given: (sizes.append(given[2]), batches(*given))[1]
    )
    state = workspace.strategy.init(workspace.layout)
    instruction = told(workspace, state, 32)
    local_update(workspace, RUN, 0, 1, Instruction(instruction.tensors, {**instruction.settings, BATCH: 2}))
    assert sizes == [2]


def test_one_round_in_three_precisions(base, tmp_path):
    """Devices with just the room for all layers at a batch of one, on a base in 16, in 8 and in 4 bits; in the first of
    them the batch of two that another base would make room for doesn't fit. Played twice, it is the same to the last
    bit, and what is exported has all layers."""
    workspace = party_of(base, tmp_path / "unused")
    costs, weights = workspace.costs, workspace.weights
    numbers = sum(8 * (weight.rows + weight.columns) for weight in weights)
    per_token = sum(costs.input_bytes * weight.columns + costs.inner_bytes * 8 for weight in weights)
    limits = [float(costs.memory(1, bits, 0, numbers, per_token, 24)) for bits in (16, 8, 4)]
    write_devices(tmp_path / "devices.csv", [DeviceProfile(memory_bytes=limit) for limit in limits])
    results = set()
    for name in ("one", "other"):
        more = (f"population.devices={tmp_path / 'devices.csv'}", "rounds=1", "population.cohort=4")
        run_on(LocalGrid, make_client_app(), tmp_path / name, *words(base, *more))
        assert not rows(tmp_path / name, "failures.csv")
        turns = rows(tmp_path / name, "clock.csv")
        assert [(row["bits"], row["batch_size"], row["layers"]) for row in turns] == [
            (bits, "1", "4") for bits in ("16", "8", "4", "16")
        ]
        assert all(float(row["memory_bytes"]) <= float(row["limit_bytes"]) for row in turns)
        results.add(summary_of(tmp_path / name)["state_sha256"])
    assert len(results) == 1
    assert len(lora_factors(load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors"))) == len(weights)
