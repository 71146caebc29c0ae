"""Kinds of adapter: each starts where it should, trains, travels, reloads in plain PEFT, and follows its formula."""

import copy
import csv
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from fedtune.config.compatibility import LOW_RANK, check_traits
from fedtune.config.compose import choices, compose
from fedtune.config.schema import ADAPTERS, FULL, AdapterSpec, ModelSpec
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.protocol import Batch, ClientInfo, Traits, Update
from fedtune.core.seeds import bits, derive_seed, uniform
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.models.tiny import tiny_model, tiny_tokenizer
from fedtune.runs.adapter_files import adapter_files
from fedtune.training.first_order import fit, supervised_logits
from fedtune.training.gradients import finished
from strategies.fedit import FedIT

CPU = torch.device("cpu")
TINY = ModelSpec(name="tiny", dtype="float32")
VIRTUAL = ("prompt_tuning", "prefix_tuning")  # what virtual tokens add is there from the start
UNDRAWN = ("pissa", "ia3", "oft", "bone", FULL)  # start from the base, ones or zeros
TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
LAYER = "base_model.model.model.layers.1.self_attn.v_proj"  # 48 in, 24 out
each_kind = pytest.mark.parametrize("kind", ADAPTERS)
# PEFT knows nothing of a base that is trained itself, and nothing is exported: tests/test_full.py
each_adapter = pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != FULL])


def local(kind, seed=0, base=TINY, **adapter):
    return LocalModel(load_base(base, CPU), AdapterSpec(kind=kind, **adapter), seed)


def batch():
    targets = torch.zeros(3, 12, dtype=torch.bool)
    targets[:, 5:] = True
    targets[1, 9:] = False
    return Batch(TOKENS, targets)


def train(model, steps=2, lr=0.05):
    settings = {"optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0, "key": 0}
    return finished(fit(model, [batch()] * steps, steps=steps, lr=lr, **settings))


def logits(module, tokens=TOKENS):
    with torch.no_grad():
        return module(tokens).logits


def stirred(kind, **adapter):
    """A model whose trainable tensors are all off their start, and its tensors without the longer part of the names."""
    model = local(kind, **adapter)
    model.install({n: t + uniform(derive_seed(1, n), t.shape, 0.3) for n, t in model.layout.initial.items()})
    short = {n.removeprefix(f"{LAYER}.").removesuffix(".weight"): t for n, t in model.read().items() if LAYER in n}
    return model, short


def exported(model, folder):
    for name, content in adapter_files(model).items():
        (folder / name).write_bytes(content)
    torch.manual_seed(3)  # whatever PEFT still draws for itself
    return PeftModel.from_pretrained(tiny_model(), str(folder)).eval()


def adapted_and_base(model):
    """What the adapted layer makes of an input, the input, and the base layer's weight (24, 48)."""
    layer, given = model.module.get_submodule(LAYER), uniform(7, (5, 48), 1.0)
    with torch.no_grad():
        return layer(given), given, layer.get_base_layer().weight.detach()


@pytest.mark.slow
def test_every_kind_has_a_choice_of_its_name():
    assert set(choices("adapter")) == set(ADAPTERS)
    assert all(compose([f"adapter={kind}"]).adapter.kind == kind for kind in ADAPTERS)


@pytest.mark.slow
@each_kind
def test_the_start_is_the_base(kind):
    state = torch.random.get_rng_state()
    model = local(kind)
    assert torch.equal(state, torch.random.get_rng_state())
    same = torch.allclose(logits(model.module), logits(tiny_model().eval()), atol=1e-5) if kind not in VIRTUAL else None
    assert same in (True, None)


def names_in(blob):
    return load(blob).keys()


@each_adapter
def test_names_and_values_are_those_that_peft_saves(kind):
    model, _ = stirred(kind)
    saved = get_peft_model_state_dict(model.module, save_embedding_layers=False)
    ours = {**model.read(), **model.constants}
    assert saved.keys() == ours.keys() == set(names_in(adapter_files(model)["adapter_model.safetensors"]))
    assert all(torch.equal(saved[name], ours[name]) for name in saved)
    assert {slot.dtype for slot in model.layout.slots} == {"float32"}


@each_adapter
def test_an_exported_adapter_is_the_model_in_plain_peft(kind, tmp_path):
    model, _ = stirred(kind)
    loaded = exported(model, tmp_path)
    assert torch.allclose(logits(loaded), logits(model.module), atol=1e-5)
    assert not torch.allclose(logits(loaded)[:, -12:], logits(tiny_model().eval()), atol=1e-3)


@each_kind
def test_two_rounds_of_averaging_learn(kind, small_run):
    folder = small_run("method=fedit", f"adapter={kind}", "train.lr=0.02")
    with (folder / "metrics.csv").open(newline="") as stream:
        losses = [float(row["eval_loss"]) for row in csv.DictReader(stream)]
    assert losses[2] < losses[1] < losses[0]


@each_kind
def test_every_party_starts_from_the_same_bits(kind):
    one, again, other = local(kind), local(kind), local(kind, seed=1)
    assert one.layout.sha256 == again.layout.sha256 == other.layout.sha256
    values = [{**model.layout.initial, **model.constants} for model in (one, again, other)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert all(torch.equal(values[0][name], values[2][name]) for name in values[0]) == (kind in UNDRAWN)


@pytest.mark.slow
def test_manifests_of_unlike_kinds_differ():
    """But for PiSSA's: what it trains is LoRA, from another start and on a shifted base."""
    hashes = {kind: local(kind).layout.sha256 for kind in ADAPTERS}
    assert hashes.pop("pissa") == hashes["lora"]
    assert len(set(hashes.values())) == len(hashes)


@each_kind
def test_reset_takes_back_what_training_changed_and_nothing_else_did(kind):
    model = local(kind)
    frozen = {n: p.clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    kept = {n: b.clone() for n, b in model.module.named_buffers()}
    first = train(model, steps=1)
    assert train(model, steps=3) < first
    model.reset()
    assert all(torch.equal(model.layout.initial[n], t) for n, t in model.read().items())
    assert all(torch.equal(frozen[n], p) for n, p in model.module.named_parameters() if n in frozen)
    assert all(torch.equal(kept[n], b) for n, b in model.module.named_buffers())


@each_kind
def test_identical_clients_are_a_fixed_point_of_averaging(kind):
    model, _ = stirred(kind)
    method, update = FedIT(), Update(model.read(), 3)
    state = method.aggregate(method.init(model.layout), 1, [(ClientInfo(index, 3), update) for index in range(7)])
    assert all(torch.equal(state.adapter[name], tensor) for name, tensor in update.tensors.items())


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    """W x + alpha / sqrt(r) B A x, with alpha = 8 and r = 4: 4 B A."""
    model, t = stirred("rslora", rank=4, alpha=8)
    assert {slot.scaling for slot in model.layout.slots} == {4.0}
    got, x, weight = adapted_and_base(model)
    assert torch.allclose(got, x @ (weight + 4 * t["lora_B"] @ t["lora_A"]).T, atol=1e-5)


def test_rslora_keeps_its_scaling_when_the_widest_client_is_wider():
    """alpha / sqrt(r): 8 / sqrt(4) = 16 / sqrt(16)."""
    words = ["adapter=rslora", "adapter.rank=4", "adapter.alpha=8", "population.ranks=[16,4]"]
    assert compose(words).adapter == AdapterSpec(kind="rslora", rank=16, alpha=16.0)


def test_doras_magnitude_starts_as_the_norm_of_each_outputs_weights_and_scales_them():
    """m_i (W + s B A)_i / |(W + s B A)_i|, with s = 16 / 8."""
    start = local("dora").layout.initial[f"{LAYER}.lora_magnitude_vector"]
    model, t = stirred("dora")
    got, x, weight = adapted_and_base(model)
    assert torch.allclose(start, weight.square().sum(1).sqrt(), atol=1e-6)
    direction = weight + 2 * t["lora_B"] @ t["lora_A"]
    merged = t["lora_magnitude_vector"][:, None] * direction / direction.square().sum(1, keepdim=True).sqrt()
    assert torch.allclose(got, x @ merged.T, atol=1e-5)


def test_pissa_starts_from_the_largest_singular_values_and_leaves_the_base_alone():
    """s B0 A0 = sum of the r largest sigma_i u_i v_i^T, A0 A0^T = diag(sigma / s), W = W0 - s B0 A0 + s B A.

    Here s = 16 / 8 and r = 8.
    """
    start = {n.removeprefix(f"{LAYER}."): t for n, t in local("pissa").layout.initial.items()}
    model, t = stirred("pissa")
    got, x, weight = adapted_and_base(model)
    assert torch.equal(weight, tiny_model().get_submodule(LAYER.removeprefix("base_model.model.")).weight)
    a, b = start["lora_A.weight"].numpy(), start["lora_B.weight"].numpy()
    u, sigma, v = np.linalg.svd(weight.numpy())
    assert np.allclose(2 * b @ a, (u[:, :8] * sigma[:8]) @ v[:8], atol=1e-5)
    assert np.allclose(a @ a.T, np.diag(sigma[:8] / 2), atol=1e-5)
    assert (a[range(8), np.abs(a).argmax(1)] > 0).all()
    merged = weight + 2 * (t["lora_B"] @ t["lora_A"] - torch.from_numpy(b @ a))
    assert torch.allclose(got, x @ merged.T, atol=1e-5)


def test_pissas_shift_stays_through_changes_of_the_base_and_in_the_export(tmp_path):
    model, _ = stirred("pissa")
    change = {f"{LAYER}.residual_B": uniform(5, (24, 3), 0.5), f"{LAYER}.residual_A": uniform(6, (3, 48), 0.5)}
    before, x, _ = adapted_and_base(model)
    model.base_delta.set(change)
    after, _, _ = adapted_and_base(model)
    assert torch.allclose(
        after - before, x @ (change[f"{LAYER}.residual_B"] @ change[f"{LAYER}.residual_A"]).T, atol=1e-5
    )
    assert torch.allclose(logits(exported(model, tmp_path)), logits(model.module), atol=1e-5)
    model.reset()
    assert torch.allclose(logits(model.module), logits(tiny_model().eval()), atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_ranks_change_only_where_that_means_something(kind):
    name = f"{LAYER}.lora_A.weight"
    local("rslora").install({n: t[:4] if "_A" in n else t[:, :4] for n, t in local("rslora").layout.initial.items()})
    with pytest.raises(ModelError, match=r"expected float32 \(8, 48\), got float32 \(4, 48\)"):
        local(kind).install({name: torch.zeros(4, 48)})


def test_a_method_that_starts_afresh_refuses_pissa():
    with pytest.raises(ModelError, match="adapter=pissa starts from the base's own factors"):
        local("pissa").start_at(4, None, 0)
    with pytest.raises(ConfigError, match=r"population\.ranks=\[4, 2\]: adapter=pissa"):
        check_traits(compose(["adapter=pissa", "population.ranks=[4,2]"]), Traits(mixed_ranks=True))


def test_ia3_multiplies_outputs_and_a_feed_forward_layers_inputs():
    model, t = stirred("ia3")
    got, x, weight = adapted_and_base(model)
    assert torch.allclose(got, (x @ weight.T) * t["ia3_l"].flatten(), atol=1e-6)
    shapes = {slot.module.rsplit(".", 1)[-1]: slot.shape for slot in model.layout.slots}
    assert shapes == {"k_proj": (24, 1), "v_proj": (24, 1), "down_proj": (1, 96)}
    chosen = {slot.module.rsplit(".", 1)[-1]: slot.shape for slot in local("ia3", targets=["v_proj"]).layout.slots}
    assert chosen == {"v_proj": (24, 1)}


def test_veras_projections_are_keyed_shared_and_cut_to_each_layer():
    """W + diag(b) B[:out] diag(d) A[:, :in]; A and B uniform within sqrt(6 / fan-in)."""
    model, t = stirred("vera", rank=6, targets=["v_proj", "down_proj"])
    a, b = model.constants["base_model.vera_A"], model.constants["base_model.vera_B"]
    assert torch.equal(a, uniform(derive_seed(0, "adapter", "base_model.vera_A"), (6, 96), math.sqrt(6 / 96)))
    assert torch.equal(b, uniform(derive_seed(0, "adapter", "base_model.vera_B"), (48, 6), 1.0))
    got, x, weight = adapted_and_base(model)
    update = t["vera_lambda_b"][:, None] * b[:24] @ (t["vera_lambda_d"][:, None] * a[:, :48])
    assert torch.allclose(got, x @ (weight + update).T, atol=1e-5)


def test_oft_turns_inputs_and_the_mean_of_two_turns_is_one():
    """y = W R x, R block-diagonal with Cayley blocks (I - Q)(I + Q)^-1, Q skew-symmetric: 8 * 7 / 2 numbers travel."""
    model, one = stirred("oft", block_size=8)
    mean = (one["oft_R"] + uniform(11, (6, 28), 0.3)) / 2
    model.install({f"{LAYER}.oft_R.weight": mean})
    skew = torch.zeros(6, 8, 8)
    skew[:, *torch.triu_indices(8, 8, 1)] = mean
    skew = skew - skew.mT
    turn = torch.block_diag(*((torch.eye(8) - q) @ torch.linalg.inv(torch.eye(8) + q) for q in skew))
    got, x, weight = adapted_and_base(model)
    assert torch.allclose(turn @ turn.T, torch.eye(48), atol=1e-5)
    assert torch.allclose(got, x @ turn @ weight.T, atol=1e-5)


def test_bone_adds_one_block_to_every_group_of_inputs():
    """y = W x + D^T (sum of x's groups of r), D: (r, out)."""
    model, t = stirred("bone", rank=6)
    got, x, weight = adapted_and_base(model)
    assert torch.allclose(got, x @ (weight.T + t["miss_block"].repeat(8, 1)), atol=1e-5)


def test_adaption_prompts_have_a_gate_that_opens_first():
    """At a closed gate only the gate has a gradient; the prompts follow from the second step on."""
    model = local("adaption_prompt", tokens=4, layers=1)
    roles = {slot.role: slot.shape for slot in model.layout.slots}
    assert roles == {"adaption_prompt": (1, 4, 48), "adaption_gate": (1,)}
    assert {slot.module for slot in model.layout.slots} == {"base_model.model.model.layers.1.self_attn"}
    name = "base_model.model.model.layers.1.self_attn.adaption_prompt"
    train(model, steps=1)
    assert torch.equal(model.read()[name], model.layout.initial[name])
    train(model, steps=2)
    assert not torch.equal(model.read()[name], model.layout.initial[name])


def test_adaption_prompts_are_trained_in_float32_on_a_bfloat16_base():
    model = local("adaption_prompt", base=ModelSpec(name="tiny", dtype="bfloat16"))
    assert {slot.dtype for slot in model.layout.slots} == {"float32"}
    assert torch.equal(logits(model.module), logits(load_base(ModelSpec(name="tiny", dtype="bfloat16"), CPU).model))
    assert train(model, steps=4) < train(local("adaption_prompt"), steps=1)
    assert logits(model.module).dtype == torch.bfloat16


def real_prefix(kind, words):
    """The virtual tokens that stand for real words: their embeddings, or the keys and values that they leave behind."""
    base = tiny_model().eval()
    with torch.no_grad():
        if kind == "prompt_tuning":
            return base.get_input_embeddings()(words)
        cache = DynamicCache()
        base(words[None], past_key_values=cache, use_cache=True)
    pairs = [state for layer in cache.layers for state in (layer.keys[0], layer.values[0])]  # each (heads, tokens, dim)
    return torch.stack(pairs, dim=1).permute(2, 1, 0, 3).flatten(1)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_act_as_the_words_that_they_are_made_of(kind):
    """Logits at the learnt places are those of the plain base on the words and then the text."""
    model, words = local(kind, tokens=4), torch.tensor([71, 3, 200, 5])
    model.install({"prompt_embeddings": real_prefix(kind, words)})
    with torch.no_grad():
        got, labels = supervised_logits(model.module, batch())
    whole = logits(tiny_model().eval(), torch.cat([words.expand(3, 4), TOKENS], dim=1))[:, 4:-1]
    counts = batch().targets[:, 1:]
    assert torch.equal(labels, TOKENS[:, 1:][counts])
    assert torch.allclose(got, whole[counts], atol=1e-5)
    padded = Batch(torch.nn.functional.pad(TOKENS, (0, 7), value=256), torch.nn.functional.pad(batch().targets, (0, 7)))
    with torch.no_grad():
        assert torch.allclose(supervised_logits(model.module, padded)[0], got, atol=1e-5)


def test_prefix_tuning_starts_from_what_words_drawn_by_key_leave_in_the_base():
    words = torch.from_numpy(bits(derive_seed(0, "adapter", "prompt_embeddings"), 6) % 260).to(torch.int64)
    start = local("prefix_tuning", tokens=6).layout.initial["prompt_embeddings"]
    assert torch.allclose(start, real_prefix("prefix_tuning", words), atol=1e-6)


def test_prompt_tuning_starts_from_words_drawn_by_key():
    words = tiny_model().get_input_embeddings().weight
    for row in local("prompt_tuning", tokens=6).layout.initial["prompt_embeddings"]:
        assert (words == row).all(1).any()


@each_kind
def test_methods_that_multiply_b_by_a_can_tell(kind):
    experiment, needy = compose([f"adapter={kind}"]), Traits(needs_low_rank=True)
    assert local(kind).layout.is_low_rank == (kind in LOW_RANK)
    if kind in LOW_RANK:
        check_traits(experiment, needy)
    else:
        with pytest.raises(ConfigError, match=rf"works on B A, which adapter={kind} hasn't got: take adapter=lora"):
            check_traits(experiment, needy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=roslora"], r"adapter=roslora is not known: .*did you mean rslora"),
        (["adapter.kind=prefixtuning"], r"adapter\.kind=prefixtuning is not known: .*did you mean prefix_tuning"),
        (["adapter=ia3", "adapter.rank=4"], r"adapter\.rank=4 means nothing to adapter\.kind=ia3, which has targets"),
        (["adapter.tokens=4"], r"adapter\.tokens=4 means nothing to adapter\.kind=lora, which has alpha, rank"),
        (["adapter=prompt_tuning", "adapter.dropout=0.1"], r"adapter\.dropout=0\.1 means nothing to"),
        (["adapter=prompt_tuning", "adapter.tokens=0"], r"adapter\.tokens=0 is too small"),
    ],
)
def test_settings_that_make_no_sense_are_named(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(words)


@pytest.mark.parametrize(
    ("kind", "adapter", "said"),
    [
        ("lora", {"rank": 25}, r"adapter\.rank=25 is above the width of layer '.*v_proj' \(48 in, 24 out\)"),
        ("dora", {"rank": 25}, r"adapter\.rank=25 is above the width"),
        ("bone", {"rank": 49}, r"adapter\.kind=bone can't adapt LlamaForCausalLM: `r` \(49\)"),
        ("oft", {"block_size": 32}, r"adapter\.block_size=32 does not divide the 48 inputs of layer '.*q_proj'"),
        ("adaption_prompt", {"layers": 3}, r"adapter\.kind=adaption_prompt can't adapt .* '3' than the model has '2'"),
        ("vera", {"targets": ["q_prj"]}, "no layer 'q_prj'; it has down_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_at_the_start(kind, adapter, said):
    with pytest.raises(ModelError, match=said):
        local(kind, **adapter)


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelSpec(path=str(folder), dtype="float32")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_conv1d_layers_are_adapted_or_refused(kind, tmp_path):
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=260, **still)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(config).eval()
    base = saved(gpt2, tmp_path)
    if kind in ("oft", "bone"):
        with pytest.raises(ModelError, match=rf"adapter\.kind={kind} can't adapt GPT2LMHeadModel: .*Conv1D"):
            local(kind, base=base, targets=["c_attn"])
        return
    model = local(kind, base=base)
    assert kind in VIRTUAL or torch.allclose(logits(model.module), logits(gpt2), atol=1e-5)
    first = train(model, steps=1)
    assert train(model, steps=3) < first


def test_an_architecture_that_peft_has_no_adaption_prompts_for_is_named(tmp_path):
    config = OPTConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=260, word_embed_proj_dim=32
    )
    base = saved(OPTForCausalLM(config), tmp_path)
    with pytest.raises(ModelError, match=r"can't adapt OPTForCausalLM: .*'opt'.* PEFT has it for gpt2, llama"):
        local("adaption_prompt", base=base)


@pytest.fixture(scope="module")
def loaded(short_smollm2):
    """Real weights, read and quantized once for all kinds; each takes a copy, for an adapter changes its base."""

    @cache
    def load(quantization):
        # float32 beside the quantized layers: in bfloat16 the vocabulary's takes seconds a step on many CPUs
        return load_base(ModelSpec(path=str(short_smollm2), quantization=quantization, dtype="float32"), CPU)

    def copied(quantization):
        base = load(quantization)
        return replace(base, model=copy.deepcopy(base.model))

    return copied


@pytest.mark.slow
class TestSmolLM2:
    """Real weights, as they are held on a small device."""

    @pytest.mark.parametrize("quantization", ["int8", "nf4"])
    @each_kind
    def test_a_quantized_base_is_adapted_or_refused(self, kind, quantization, loaded):
        base = loaded(quantization)
        if kind == FULL:
            with pytest.raises(ModelError, match=r"adapter=none trains the base's own weights, .* are quantized"):
                LocalModel(base, AdapterSpec(kind=kind), 0)
            return
        if (kind, quantization) == ("dora", "int8"):
            with pytest.raises(ModelError, match=r"adapter\.kind=dora needs .* Set model\.quantization to none or nf4"):
                LocalModel(base, AdapterSpec(kind=kind), 0)
            return
        bare = logits(base.model)
        model = LocalModel(base, AdapterSpec(kind=kind), 0)
        if kind == "pissa":  # what is taken from the base and given back is rounded to bfloat16 on the way
            assert (logits(model.module) - bare).abs().mean() < 0.1 * bare.std()
        elif kind == "dora":  # m / ||W|| is 1 up to rounding
            torch.testing.assert_close(logits(model.module), bare, rtol=1e-4, atol=1e-3)
        else:
            assert kind in VIRTUAL or torch.equal(logits(model.module), bare)
        first = train(model, steps=1, lr=5e-3)
        assert train(model, steps=2, lr=5e-3) < first
