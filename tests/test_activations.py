"""Activations computed anew, and a float16 base with a scaled loss: the same training with less, held against plain."""

from contextlib import contextmanager

import pytest
import torch
from conftest import rows, small, summary_of
from test_precisions import base as base

import fedtune.training.first_order as first_order
import fedtune.training.gradients as gradients
from fedtune.core.errors import ClientError, ConfigError, ModelError
from fedtune.core.protocol import Instruction
from fedtune.planning.cost_probe import ALLOCATOR
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.local import run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace

RUN = "0" * 16
ANEW = "train.checkpoint_activations=true"


def trained(out, *words):
    """A workspace, and the update of its first client's turn."""
    workspace = Workspace(small(*words, out=out))
    return workspace, local_update(workspace, RUN, 0, 1, Instruction(workspace.model.read()))


def way(update, start):
    return torch.cat([(update.tensors[name] - tensor).flatten() for name, tensor in start.items()])


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("adapter.dropout=0.3",),
        ("model.dtype=bfloat16",),
        ("adapter=none", "model.dtype=float32"),
        ("adapter=dora",),
        ("adapter=prompt_tuning",),
        ("adapter=adaption_prompt",),
        ("method=fed_sb",),
        ("method=scaffold",),
    ],
    ids=" ".join,
)
def test_the_update_has_the_same_bits(words, tmp_path):
    """Dropout is drawn again as it was; on a CPU no sum has another order."""
    if words and words[0].startswith("method="):
        for name, more in (("plain", ()), ("anew", (ANEW,))):
            run_local(small(*words, *more, "rounds=2", out=tmp_path / name))
        assert summary_of(tmp_path / "plain")["state_sha256"] == summary_of(tmp_path / "anew")["state_sha256"]
        return
    plain, anew = trained(tmp_path, *words)[1], trained(tmp_path, *words, ANEW)[1]
    assert state_sha256(plain) == state_sha256(anew)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_also_over_a_quantized_base(quantization, base, tmp_path):
    words = ("model=custom", f"model.path={base}", f"model.quantization={quantization}", "model.dtype=float32")
    (first, plain), (second, anew) = trained(tmp_path, *words), trained(tmp_path, *words, ANEW)
    assert state_sha256(plain) == state_sha256(anew)
    assert not first.model.checkpoints
    assert second.model.checkpoints


def test_a_merged_base_change_is_computed_anew_as_well(tmp_path):
    for name, more in (("plain", ()), ("anew", (ANEW,))):
        run_local(small("method=flora", "rounds=3", *more, out=tmp_path / name))
        assert not rows(tmp_path / name, "failures.csv")
    assert summary_of(tmp_path / "plain")["state_sha256"] == summary_of(tmp_path / "anew")["state_sha256"]


def saved(workspace):
    """Bytes that autograd holds at the end of a forward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (*workspace.model.module.parameters(),)}
    held = {}

    def keep(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            held[place] = tensor  # alive, so that no place comes twice
        return tensor

    workspace.model.module.train()
    batch = next(iter(workspace.data.batches(0, 4, 0)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        first_order.loss_of(workspace.model.module, batch)
    workspace.model.module.eval()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_less_is_kept_and_the_model_of_memory_knows(tmp_path):
    """Of the tiny Llama's two blocks: with what is computed anew the borders are kept, (48,) float32 a token, and on
    the way back one block of two with its LoRA inputs; no weight has bytes of its own then."""
    plain, anew = (Workspace(small(*words, out=tmp_path)) for words in ((), (ANEW,)))
    assert saved(anew) < saved(plain) / 2
    before, after = plain.costs, anew.costs
    assert (after.input_bytes, after.inner_bytes) == (0, 0)
    assert after.saved_bytes[0] > after.saved_bytes[1]
    # q and v have LoRA of rank 8 over 48 columns; 4 bytes a number, and what ALLOCATOR adds
    lora, border = (ALLOCATOR * 4 * numbers * before.tokens for numbers in (2 * (48 + 8), 48))
    first, last = before.saved_bytes[0] - before.saved_bytes[1], before.saved_bytes[1]
    assert after.saved_bytes[1] == pytest.approx(border + last + lora, rel=1e-6)
    assert after.saved_bytes[0] == pytest.approx(2 * border + max(first, last) + lora, rel=1e-6)
    linear = [one - other for one, other in zip(after.backward_flop, before.backward_flop, strict=True)]
    assert linear[0] == pytest.approx(2 * linear[1])
    assert after.read_bytes[0] > before.read_bytes[0]
    assert after.forward_flop == before.forward_flop


def test_who_resumes_an_older_run_has_the_same_settings(tmp_path):
    """A setting that came later is none of what a run is told by, unless it is set."""
    plain = small(out=tmp_path)
    assert "checkpoint_activations" not in plain.fixed()["train"]
    assert "deterministic" not in plain.fixed()["runtime"]
    assert small(ANEW, out=tmp_path).sha256 != plain.sha256
    assert small("runtime.deterministic=false", out=tmp_path).sha256 != plain.sha256


@pytest.mark.slow
def test_what_cant_be_computed_anew_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="adapter=prefix_tuning hands keys and values"):
        small("adapter=prefix_tuning", ANEW, out=tmp_path)
    workspace = Workspace(small(out=tmp_path))
    monkeypatch.setattr(type(workspace.model.base), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="LlamaForCausalLM can't compute activations anew"):
        workspace.model.checkpoint_activations()


def test_float16_with_a_scaled_loss_goes_where_float32_goes(tmp_path):
    """Rounding alone is between them: 0.0022 of the way on this model, and 0.1 in bfloat16, whose mantissa has 3 bits
    less."""
    (workspace, plain), (_, half) = trained(tmp_path), trained(tmp_path, "model.dtype=float16")
    there, other = (way(update, workspace.model.layout.initial) for update in (plain, half))
    assert (other - there).norm() < 0.02 * there.norm()
    assert half.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_gradients_that_dont_fit_halve_the_scale_and_no_step_is_lost(tmp_path, monkeypatch):
    """From a scale that is too large by far, and from one that fits: the same steps, as near as float16 comes."""
    answers = []
    for scale in (2.0**16, 2.0**40):
        monkeypatch.setattr(first_order, "LOSS_SCALE", scale)
        answers.append(trained(tmp_path, "model.dtype=float16")[1])
    for name, tensor in answers[0].tensors.items():
        torch.testing.assert_close(answers[1].tensors[name], tensor, rtol=1e-2, atol=1e-5)
    assert answers[0].metrics["train_loss"] == pytest.approx(answers[1].metrics["train_loss"], rel=1e-3)


def times(factor, monkeypatch):
    """Have all losses multiplied."""
    whole = gradients.packed_losses

    @contextmanager
    def packed_losses(passengers):
        with whole(passengers) as losses:
            yield [loss * factor for loss in losses]

    monkeypatch.setattr(gradients, "packed_losses", packed_losses)


def test_small_gradients_arrive_because_of_the_scale(tmp_path, monkeypatch):
    """A loss times 1e-7 has gradients that float16 has no numbers for; scaled, they are those of float32."""
    times(1e-7, monkeypatch)
    words = ("train.optimizer=sgd", "train.lr=1e6", "train.max_grad_norm=0", "train.steps=1")
    workspace, plain = trained(tmp_path, *words)
    there = way(plain, workspace.model.layout.initial)
    scaled = way(trained(tmp_path, *words, "model.dtype=float16")[1], workspace.model.layout.initial)
    assert (scaled - there).norm() < 0.05 * there.norm()


def test_what_no_scale_helps_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(first_order, "LOSS_SCALE", 2.0)
    times(1e9, monkeypatch)
    with pytest.raises(ClientError, match="gradients don't fit float16"):
        trained(tmp_path, "model.dtype=float16")


def test_float16_weights_are_not_trained_themselves(tmp_path):
    with pytest.raises(ConfigError, match="float16 has no room"):
        small("adapter=none", "model.dtype=float16", out=tmp_path)


def test_a_float16_run_has_one_result_and_resumes(tmp_path):
    for name in ("one", "parts"):
        rounds = 2 if name == "one" else 1
        run_local(small("model.dtype=float16", f"rounds={rounds}", out=tmp_path / name))
    run_local(small("model.dtype=float16", "rounds=2", out=tmp_path / "parts"), resume=str(tmp_path / "parts"))
    assert summary_of(tmp_path / "one")["state_sha256"] == summary_of(tmp_path / "parts")["state_sha256"]
