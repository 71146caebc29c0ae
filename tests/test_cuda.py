"""What only a GPU can show: `pytest -m cuda`, or `python -m simulations.gpu` with what else there is to measure.

The same runs are on the CPU elsewhere; here everything meets on a device that tensors have to be moved to, with kernels
of its own. FEDTUNE_CUDA_TESTS_ON=cpu tries the tests themselves where there is no GPU.
"""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import of_each_kind, rows, run_on, small, summary_of
from test_contract import METHODS, of, without_times
from test_precisions import base as base  # a random Llama whose layers can be quantized
from transformers import AutoModelForCausalLM

import fedtune as library
from fedtune.config.compose import choices
from fedtune.core.protocol import SERVER, ClientInfo, Instruction
from fedtune.export.model_folder import export
from fedtune.lowrank.algebra import LowRank
from fedtune.lowrank.residual import as_residual
from fedtune.models.base import pick_device
from fedtune.models.base_delta import BaseChange
from fedtune.models.requantize import dequantized
from fedtune.random_directions import hash_noise as noise
from fedtune.random_directions.hash_noise import Table, accumulate_, project, render_
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace

DEVICE = os.environ.get("FEDTUNE_CUDA_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU here"
    ),
]
RUN = "0" * 16
HERE = f"runtime.device={DEVICE}"
FORMS = {
    "float32": ("model.dtype=float32",),
    "bfloat16": ("model.dtype=bfloat16",),
    "float16": ("model.dtype=float16",),
    "int8": ("model.dtype=bfloat16", "model.quantization=int8"),
    "int8 float16": ("model.dtype=float16", "model.quantization=int8"),
    "nf4": ("model.dtype=bfloat16", "model.quantization=nf4"),
    "nf4 float16": ("model.dtype=float16", "model.quantization=nf4"),
}
each_form = pytest.mark.parametrize("form", FORMS)


def on_base(base, form, *more):
    return ("model=custom", f"model.path={base}", HERE, *FORMS[form], *more)


def workspace_of(out, *words):
    found = Workspace(small(*words, out=out))
    assert found.model.device.type == DEVICE
    return found


def hash_of(model):
    """Of all that is not trained, to the bit."""
    own = {id(tensor) for tensor in model.parameters()}
    digest = hashlib.sha256()
    for name, tensor in model.module.named_parameters():
        if id(tensor) not in own:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finished(folder):
    assert summary_of(folder)["status"] == "finished"
    assert not rows(folder, "failures.csv")
    return rows(folder, "metrics.csv")


def test_cuda_is_the_device_and_has_a_number():
    device = pick_device("auto" if DEVICE == "cuda" else DEVICE)
    assert device.type == DEVICE
    if DEVICE == "cuda":
        assert device.index is not None
        assert pick_device("cuda") == device
        assert torch.are_deterministic_algorithms_enabled()
        pick_device("cuda", deterministic=False)
        assert not torch.are_deterministic_algorithms_enabled()
        pick_device("cuda")


@each_form
def test_a_turn_trains_and_leaves_the_base_as_it_was(form, base, tmp_path):
    workspace = workspace_of(tmp_path, *on_base(base, form, "train.steps=8", "train.lr=1e-2"))
    model, held = workspace.model, workspace.data.train[0]
    start = model.read()
    before, first = hash_of(model), workspace.score(held, model).loss
    update = local_update(workspace, RUN, 0, 1, Instruction(start))
    assert hash_of(model) == before
    assert all(tensor.device.type == "cpu" for tensor in update.tensors.values())
    assert all(not torch.equal(tensor, start[name]) for name, tensor in update.tensors.items())
    workspace.install(Instruction(update.tensors), {})
    assert workspace.score(held, model).loss < first - 0.05
    again = local_update(workspace, RUN, 0, 1, Instruction(start))
    assert state_sha256(again) == state_sha256(update)


@each_form
def test_activations_computed_anew_give_the_same_update(form, base, tmp_path):
    answers = []
    for checkpoint in (False, True):
        words = on_base(base, form, f"train.checkpoint_activations={checkpoint}", "adapter.dropout=0.1")
        workspace = workspace_of(tmp_path, *words)
        answers.append(local_update(workspace, RUN, 0, 1, Instruction(workspace.model.read())))
    assert state_sha256(answers[0]) == state_sha256(answers[1])


def test_a_turn_comes_near_that_of_the_cpu(tmp_path):
    """In float32, where only the order of sums differs: the way that the adapter goes, to a thousandth of it."""
    answers = []
    for device in (DEVICE, "cpu"):
        workspace = Workspace(small(f"runtime.device={device}", "train.optimizer=sgd", "train.lr=0.1", out=tmp_path))
        start = workspace.model.read()
        answers.append(local_update(workspace, RUN, 0, 1, Instruction(start)).tensors)
    apart = sum(float((answers[0][name] - answers[1][name]).square().sum()) for name in start) ** 0.5
    way = sum(float((answers[1][name] - start[name]).square().sum()) for name in start) ** 0.5
    assert way > 0
    assert apart < 1e-3 * way


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "florist", "full_delta"])
@pytest.mark.parametrize("form", ["nf4", "bfloat16"])
def test_exact_methods_are_exact_over_a_base_on_the_gpu(form, method, base, tmp_path):
    """The server's change is the mean of the clients' products, to what their own tests ask for."""
    energy = ["method.strategy.energy=1.0"] if method == "florist" else []
    run_on(
        LocalGrid, make_client_app(), tmp_path / "run", *on_base(base, form, f"method={method}", "rounds=2", *energy)
    )
    metrics = finished(tmp_path / "run")
    assert all(float(row["aggregation_error"]) < 1e-6 for row in metrics[1:])
    assert float(metrics[-1]["eval_loss"]) < float(metrics[0]["eval_loss"])


def layers():
    import bitsandbytes

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        four = bitsandbytes.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        four.support_avx512bf16_for_cpu = False
        eight = bitsandbytes.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
        plain = torch.nn.Linear(64, 96, bias=False).bfloat16()
    return {"nf4": four, "int8": eight, "bfloat16": plain}


@pytest.mark.parametrize("kind", ["nf4", "int8", "bfloat16"])
@pytest.mark.parametrize("requantize", [False, True])
def test_a_changed_base_computes_with_the_change(kind, requantize):
    layer = layers()[kind].to(DEVICE).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    product = LowRank(torch.randn(96, 4, generator=generator) / 20, torch.randn(4, 64, generator=generator) / 2)
    x = torch.randn(5, 64, generator=generator).to(DEVICE, torch.float32 if kind == "nf4" else torch.bfloat16)
    weight, before = dequantized(layer).clone(), layer(x)
    change = (product.b @ product.a).to(DEVICE)
    base = BaseChange(lambda _: layer, requantize=requantize)
    base.set(as_residual({"layer": product}))
    after = layer(x)
    base.clear()
    assert torch.equal(layer(x), before)
    assert torch.equal(dequantized(layer), weight)
    wanted = before.float() + x.float() @ change.T
    assert (after.float() - wanted).norm() < (0.2 if requantize else 0.01) * wanted.norm()


def noisy(device, kind, dtype):
    """Sums, weights and dot products of directions over two parameters, as bytes."""
    sizes = {"a.weight": 7 * 512 + 3, "b": 8 * 512}
    table = Table(sizes, device)
    generator = torch.Generator().manual_seed(0)
    start, out = table.zeros(dtype), table.zeros(dtype)
    start.copy_(torch.randn(start.shape, generator=generator).to(dtype))
    sums = table.sums()
    seeds, counts = list(range(11)), [(-1) ** n * 1000 * n for n in range(11)]
    accumulate_(table, sums, seeds, counts, kind)
    found = [torch.cat([table.total(sums, name) for name in sizes]).cpu()]
    for bound in (None, torch.full((table.rows, 1), 1.0, dtype=torch.float64, device=device)):
        render_(table, out, start, sums, -(2.0**-24), 2**63 + 5, 0.0371, kind, bound)
        found.append(out.cpu().clone())
        render_(table, out, start, sums, -(2.0**-24), kind=kind, bound=bound)
        found.append(out.cpu().clone())
    return found, project(start.float().view(-1), seeds, "a.weight", kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", sorted(noise.SIGMA))
def test_seeded_noise_has_the_cpus_bits(kind, dtype):
    ours, cpus = noisy(DEVICE, kind, dtype), noisy("cpu", kind, dtype)
    assert all(torch.equal(one, other) for one, other in zip(ours[0], cpus[0], strict=True))
    torch.testing.assert_close(ours[1], cpus[1], rtol=1e-4, atol=1e-3)  # sums in float32: the last bits are a device's


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_have_the_cpus_bits(dtype, monkeypatch, caplog):
    ours = noisy(DEVICE, "normal", dtype)
    assert "uncompiled" not in caplog.text
    monkeypatch.setenv("FEDTUNE_COMPILE", "0")
    noise._compiled.cache_clear()
    cpus = noisy("cpu", "normal", dtype)
    assert all(torch.equal(one, other) for one, other in zip(ours[0], cpus[0], strict=True))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_seeded_weights_of_a_model_are_the_cpus(sparsity, tmp_path):
    held = {}
    for device in (DEVICE, "cpu"):
        words = (f"runtime.device={device}", "adapter=none", *of("fedkseed"))
        workspace = Workspace(small(*words, f"method.strategy.rules.sparsity={sparsity}", out=tmp_path))
        state = workspace.strategy.init(workspace.layout)
        slopes = (torch.arange(64) * 37 - 900).double()
        told = workspace.strategy.configure(type(state)(slopes), 1, ClientInfo(SERVER, 1))
        held[device] = workspace.install(told, {}).read()
        assert any(not torch.equal(held[device][n], t) for n, t in workspace.model.layout.initial.items())
    assert held[DEVICE].keys() == held["cpu"].keys()
    assert all(torch.equal(tensor, held["cpu"][name]) for name, tensor in held[DEVICE].items())


@pytest.mark.parametrize("method", of_each_kind(METHODS))
def test_each_kind_of_method_learns_and_goes_on_to_the_same_bits(method, tmp_path):
    """Two rounds and a third after it, against three at once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_local(small(HERE, *of(method), "rounds=3", out=whole))
    run_local(small(HERE, *of(method), "rounds=2", out=parts))
    metrics = finished(parts)
    assert float(metrics[2]["eval_loss"]) < float(metrics[0]["eval_loss"])
    run_local(small(HERE, *of(method), "rounds=3", out=parts), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]
    assert without_times(rows(whole, "metrics.csv")) == without_times(rows(parts, "metrics.csv"))


@each_form
def test_a_run_on_every_form_of_base_has_one_result(form, base, tmp_path):
    more = ("evaluate.generate=2", "evaluate.max_new_tokens=4", "evaluate.clients=true")
    hashes = set()
    for name in ("one", "other"):
        run_local(small(*on_base(base, form, *more, "rounds=2"), out=tmp_path / name))
        finished(tmp_path / name)
        hashes.add(summary_of(tmp_path / name)["state_sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize("adapter", choices("adapter"))
@pytest.mark.parametrize("form", ["float32", "nf4"])
def test_every_kind_of_adapter_trains(form, adapter, base, tmp_path):
    if adapter == "none" and form != "float32":
        pytest.skip("codes can't be trained")
    run_local(small(*on_base(base, form, f"adapter={adapter}", "rounds=1"), out=tmp_path / "run"))
    metrics = finished(tmp_path / "run")
    assert metrics[1]["failed"] == "0"
    assert float(metrics[1]["train_loss"]) < 20


@pytest.mark.parametrize("codec", choices("codec"))
def test_every_codec_takes_what_a_gpu_made(codec, tmp_path):
    run_local(small(HERE, f"codec={codec}", "rounds=1", out=tmp_path / "run"))
    finished(tmp_path / "run")


def test_requantizing_on_the_gpu(base, tmp_path):
    words = on_base(base, "nf4", "model.merge=requantize", "method=flora", "rounds=2")
    run_local(small(*words, out=tmp_path / "run"))
    assert float(finished(tmp_path / "run")[2]["requantization_error"]) > 0


def test_costs_are_measured_there(base, tmp_path):
    kept = {}
    for checkpoint in (False, True):
        words = on_base(base, "nf4", f"train.checkpoint_activations={checkpoint}")
        kept[checkpoint] = workspace_of(tmp_path, *words).costs.saved_bytes
    assert all(bytes_of > 0 for bytes_of in (*kept[False], *kept[True]))


def test_an_export_is_the_runs_model(tmp_path):
    run = tmp_path / "run"
    run_local(small(HERE, "rounds=1", "train.lr=1e-2", out=run))
    written = export(str(run), str(tmp_path / "merged"))
    read = AutoModelForCausalLM.from_pretrained(written.path, dtype="auto").to(DEVICE).eval()
    model, _ = library.load_run(run).load_model()
    tokens = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model(tokens.to(next(model.parameters()).device)).logits.float().cpu()
        theirs = read(tokens.to(DEVICE)).logits.float().cpu()
    assert (ours - theirs).norm() < 1e-3 * (ours - ours.mean(-1, keepdim=True)).norm()


def test_the_model_of_a_run_on_the_gpu_is_made_again_from_its_file(tmp_path):
    run = tmp_path / "run"
    run_local(small(HERE, *of("fedkseed"), "adapter=none", "rounds=1", out=run))
    file = shutil.copy(run / "model.fedtune", tmp_path / "tuned.fedtune")
    written = export(str(file), str(tmp_path / "whole"))
    assert (Path(written.path) / "config.json").is_file()
