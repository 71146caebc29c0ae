"""Bases of many architectures: what is adapted where nothing is said, that it learns, loads and is exported as it is,
and what is refused at load because it would go wrong later or in silence."""

import json
from functools import cache, partial

import pytest
import torch
from architectures import CONFIGS, made, saved
from conftest import run_on, small, summary_of
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3Config, LlavaConfig, PreTrainedTokenizerFast, Qwen2VLConfig

from fedtune.config.compose import compose
from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.errors import ClientError, ConfigError, ExportError, ModelError
from fedtune.core.protocol import Batch
from fedtune.export.model_folder import export
from fedtune.lowrank.algebra import lora_factors
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.models.model_checks import positions_of
from fedtune.models.tiny import tiny_tokenizer
from fedtune.planning.cost_probe import base_bytes
from fedtune.runs.adapter_files import adapter_files
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.training.first_order import fit, loss_of
from fedtune.training.gradients import finished
from fedtune.workspace.workspace import Workspace

CPU = torch.device("cpu")
FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = Batch(TOKENS, torch.arange(12).expand(2, 12) > 4)
# Qwen3 is adapted as Llama is, and experts in one fused tensor are all alike: test_all_linear_... has the others
ALIKE = {"qwen3", "mixtral", "qwen2_moe", "olmoe", "gptj", "roberta"}
each_architecture = pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ALIKE])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders with a model, each written once."""

    @cache
    def folder(name, **settings):
        path = tmp_path_factory.mktemp(name) / "base"
        return path, saved(name, path, **settings)

    return folder


def local(base, **adapter):
    return LocalModel(load_base(base, CPU), AdapterSpec(**({"rank": 4} | adapter)), 0)


def train(model, steps=1, lr=0.02, batch=BATCH):
    return finished(
        fit(model, [batch] * steps, steps=steps, lr=lr, optimizer="adamw", weight_decay=0, max_grad_norm=1, key=0)
    )


def logits(module):
    with torch.no_grad():
        return module.eval()(input_ids=TOKENS, use_cache=False).logits


def adapted(model):
    return sorted({slot.module.rsplit(".", 1)[-1] for slot in model.layout.slots})


@pytest.mark.slow
@each_architecture
def test_with_nothing_said_it_learns_loads_in_peft_and_merges_to_the_same(name, bases, tmp_path):
    path, base = bases(name)
    model = local(base)
    before = train(model)
    with torch.no_grad():
        assert loss_of(model.module, BATCH) < before
    train(model)
    assert all(not torch.equal(model.layout.initial[n], t) for n, t in model.read().items()), "a layer was not trained"
    for file, content in adapter_files(model).items():
        (tmp_path / file).write_bytes(content)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), str(tmp_path))
    assert torch.allclose(logits(plain), logits(model.module), atol=1e-5)
    assert torch.allclose(logits(plain.merge_and_unload()), logits(model.module), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "layers", "without"),
    [
        ("phi3", "down_proj gate_up_proj o_proj qkv_proj", ""),
        ("gpt_oss", "k_proj o_proj q_proj v_proj", "experts (fused"),
        ("qwen2_moe", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "shared_expert_gate (routers)"),
        # PEFT reads these names as parts of the experts, wherever the adapter is loaded
        (
            "deepseek_v3",
            "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj",
            "down_proj, gate_proj, up_proj (names",
        ),
        ("mamba", "in_proj x_proj", "dt_proj (weights that the model reads"),
        ("ctrl", "0 2 Wk Wq Wv dense", ""),  # "transformer.h.0" is no layer of that name
    ],
)
def test_where_peft_has_no_default_all_layers_that_can_be_are_adapted_and_said(name, layers, without, bases):
    model = local(bases(name)[1])
    assert adapted(model) == layers.split()
    (said,) = model.notes
    assert "PEFT has no default layers" in said
    assert "all-linear" in said
    assert without in said


@pytest.mark.slow
def test_where_peft_has_a_default_it_stays(bases):
    model = local(bases("llama")[1])
    assert adapted(model) == ["q_proj", "v_proj"]
    assert model.notes == []
    assert adapted(local(bases("mixtral")[1])) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("name", FUSED)
def test_all_linear_puts_a_product_on_layers_alone_and_never_on_fused_experts(name, bases):
    model = local(bases(name)[1], targets="all-linear")
    products = lora_factors(model.layout.initial)
    assert len(products) * 2 == len(model.layout.slots)
    for module, product in products.items():
        weight = model.module.get_submodule(module).get_base_layer().weight
        assert weight.shape == (product.b.shape[0], product.a.shape[1])
        assert product.rank == 4
    assert not any("experts." in module or module.endswith("experts") for module in products)
    assert "experts (fused" in model.notes[0]


@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_methods_of_products_are_exact_on_a_mixture_of_experts(method, bases, tmp_path):
    """One client: what the server makes of its update is the update. The export compares its logits with the run's."""
    words = (f"method={method}", "adapter.targets=all-linear", "adapter.rank=4", "codec=raw", "rounds=1")
    alone = ("population.clients=1", "population.cohort=1", "train.lr=0.02")
    run_local(small(*words, *alone, f"model.path={bases('qwen3_moe')[0]}", "model.dtype=float32", out=tmp_path / "run"))
    row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert float(dict(zip(row[0].split(","), row[-1].split(","), strict=True))["aggregation_error"]) < 1e-6
    export(str(tmp_path / "run"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("qwen3_moe", ["experts"], "is Qwen3MoeExperts .*It has k_proj, o_proj, q_proj, v_proj"),
        ("qwen3_moe", ["q_proj", "gate"], "'gate' of Qwen3MoeForCausalLM is Qwen3MoeTopKRouter"),
        ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"], "PEFT takes 'gate_proj' .* fused experts.* q_a_proj"),
        ("llama", "embed_tokens", "'embed_tokens' of LlamaForCausalLM is Embedding"),
        ("llama", "self_attn", "is LlamaAttention"),
        ("llama", "q_prj", "no layer 'q_prj'; it has down_proj"),
        ("mamba", "conv1d", "is Conv1d"),
        ("mamba", "dt_proj", "reads the weight of 'dt_proj' without calling the layer"),
    ],
)
def test_what_is_no_matrix_of_its_own_is_refused_with_those_that_are(name, targets, said, bases):
    with pytest.raises(ModelError, match=said):
        local(bases(name)[1], targets=targets)


@pytest.mark.parametrize("rank", [8, 33])
def test_layers_narrower_than_the_rank_are_left_out_of_all_of_them(rank, bases):
    """Keys and values of 16, Q and O of 32 a side; MLPs of 48 on the long side and 32 on the other."""
    if rank > 32:
        with pytest.raises(ModelError, match=r"no layer to adapt: down_proj, .* \(narrower than adapter.rank=33\)"):
            local(bases("llama")[1], targets="all-linear", rank=rank)
        return
    assert adapted(local(bases("llama")[1], targets="all-linear", rank=20)) == [
        "down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "targets"),
    [("all-linear", ["all-linear"]), ("q_proj", ["q_proj"]), ("[q_proj,v_proj]", ["q_proj", "v_proj"]), ("null", None)],
)
def test_targets_are_a_bare_word_or_a_list(word, targets):
    experiment = compose([f"adapter.targets={word}"])
    assert experiment.adapter.targets == targets
    assert AdapterSpec(targets=experiment.adapter.targets) == experiment.adapter


@pytest.mark.parametrize("word", ["3", "{q_proj:1}", "[1,2]", "[all-linear,q_proj]"])
def test_targets_that_are_no_names_are_refused(word):
    with pytest.raises(ConfigError, match=r"adapter\.targets="):
        compose([f"adapter.targets={word}"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", ("adapter.targets=[c_attn,lm_head]", "data.max_length=64")),
        ("gemma2", ("adapter.targets=[q_proj,lm_head]", "model.dtype=bfloat16")),
        ("tiny", ("adapter.targets=lm_head", "method=flora")),
    ],
)
def test_an_adapted_head_that_shares_the_embeddings_weight_is_exported_apart_from_them(name, words, bases, tmp_path):
    """The run adds to the head alone. Were both changed, as merging in place does, the loss would be another."""
    base = ("model=tiny",) if name == "tiny" else (f"model.path={bases(name)[0]}", "model.dtype=float32")
    experiment = small(*base, "rounds=2", "train.lr=0.05", "codec=raw", *words, out=tmp_path / "run")
    run_local(experiment)
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert not model.config.tie_word_embeddings
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.equal(embeddings, head)
    assert torch.equal(embeddings, Workspace(experiment).model.base.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("up_proj", "'model.layers.0.mlp.up_proj.weight' is not the base's"),
        ("q_proj", "predictions are off the run's by"),
    ],
)
def test_a_folder_that_is_not_the_runs_model_is_not_left(layer, said, shared_run, tmp_path, monkeypatch):
    """One weight is written wrong: one that the run left alone, or one that it adapted."""
    run, write = shared_run("train.lr=0.05"), type(made("llama")).save_pretrained

    def wrong(model, folder):
        with torch.no_grad():
            block = model.model.layers[0]
            getattr(block.mlp if layer == "up_proj" else block.self_attn, layer).weight.mul_(1.1)
        write(model, folder)

    monkeypatch.setattr(type(made("llama")), "save_pretrained", wrong)
    with pytest.raises(ExportError, match=said):
        export(str(run), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_looks_ahead_is_refused(name, dtype, tmp_path):
    base = saved(name, tmp_path / "base", is_decoder=False)
    with pytest.raises(ModelError, match=r"a later token moves the predictions before it.* is_decoder=true"):
        load_base(ModelSpec(path=base.path, dtype=dtype), CPU)


@pytest.mark.parametrize("config", [Gemma3Config, LlavaConfig, Qwen2VLConfig])
def test_a_vision_language_model_is_named_as_one(config, tmp_path):
    config(architectures=[config.__name__.replace("Config", "ForConditionalGeneration")]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("never read")
    with pytest.raises(ModelError, match="ForConditionalGeneration, a vision-language model"):
        load_base(ModelSpec(path=str(tmp_path)), CPU)


def test_code_that_a_model_brings_is_refused_without_a_question(tmp_path):
    """Standard input is closed under pytest, so a question would be an error of another kind."""
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Mine"}}')
    (tmp_path / "configuration.py").write_text("raise SystemExit('this was run')")
    (tmp_path / "model.safetensors").write_text("never read")
    with pytest.raises(ModelError, match="brings Python code of its own, which fedtune doesn't run"):
        load_base(ModelSpec(path=str(tmp_path)), CPU)


# What is held in few bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share", "quantization"), [("llama", 100, "int8"), ("gpt2", 88, "nf4"), ("mixtral", 14, "nf4")]
)
def test_how_much_is_quantized_is_said_counted_and_refused_below_a_half(name, share, quantization, bases):
    """By hand. gpt2: 2 (32 96 + 32 32 + 2 32 48) in layers, 64 32 positions beside. mixtral: 2 (2 32 32 + 2 32 16) in
    layers, 2 4 (3 32 48) in experts and 2 4 32 in routers."""
    layers = {"gpt2": 14_336, "mixtral": 6_144}.get(name, 1)
    beside = {"gpt2": 2_048, "mixtral": 37_120}.get(name, 0)
    assert round(100 * layers / (layers + beside)) == share
    asked = partial(ModelSpec, path=bases(name)[1].path, dtype="bfloat16", quantization=quantization)
    if share < 50:
        with pytest.raises(ModelError, match=rf"{share}% of its weights.* as model\.layers\.0\.mlp\.experts\..*_proj"):
            load_base(asked(), CPU)
    model = local(asked(min_quantized=0.0))
    assert f"{round(100 * layers / (layers + beside))}% of its weights" in model.notes[0]
    held = sum(p.numel() * p.element_size() for p in load_base(asked(min_quantized=0.0), CPU).model.parameters())
    bits = {"nf4": "4", "int8": "8"}[quantization]
    assert base_bytes(model)[bits] == pytest.approx(held, rel=0.02)
    whole = local(ModelSpec(path=bases(name)[1].path, dtype="bfloat16"))
    assert set(base_bytes(whole)) == ({"16"} if share < 50 else {"4", "8", "16"})


def test_an_int8_base_is_as_before_its_first_use_when_it_was_examined(bases):
    """Copies of it (fedtune/models/shared_base.py) take the scales from where they were loaded to."""
    base = load_base(ModelSpec(path=bases("llama")[1].path, quantization="int8"), CPU)
    layers = [module for module in base.model.modules() if type(module).__name__ == "Linear8bitLt"]
    assert len(layers) == 14
    assert all(layer.weight.CB is not None and layer.state.CB is None for layer in layers)
    assert not base.model.training


@pytest.mark.parametrize(("held", "other"), [("nf4", "int8"), ("int8", "nf4")])
def test_a_base_that_is_quantized_already_is_taken_as_it_is_and_as_nothing_else(held, other, bases, tmp_path):
    base = load_base(ModelSpec(path=bases("llama")[1].path, dtype="bfloat16", quantization=held), CPU)
    base.model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = (f"model.path={tmp_path / 'base'}", "model.dtype=bfloat16", "rounds=1")
    with pytest.raises(ModelError, match=f"quantization={other}, and the files of .* are quantized already, to {held}"):
        load_base(ModelSpec(path=str(tmp_path / "base"), quantization=other), CPU)
    assert load_base(ModelSpec(path=str(tmp_path / "base"), quantization=held), CPU).quantization == held
    if held == "int8":
        return
    run_local(small(*words, out=tmp_path / "run"))
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["base"]["quantization"]) == ("finished", held)
    assert summary["memory_bytes"] > 0


# Tokenizers and positions


def test_a_model_without_a_tokenizer_is_told_so(tmp_path):
    for name in ("gpt2", "llama", "mamba"):
        made(name).save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=rf"has no tokenizer\. It was looked for in .*{name}: expected tokenizer"):
            load_base(ModelSpec(path=str(tmp_path / name)), CPU)


def bytes_tokenizer(**special):
    """A token a byte, and these special ones behind them, in their order."""
    vocabulary = {symbol: place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({}, 0),  # any token pads: the loss doesn't count it, and nothing looks at what is on its right
        ({"bos_token": "<s>"}, 256),
        ({"eos_token": "</s>"}, 256),
        ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<u>", "sep_token": "<x>", "pad_token": "<pad>"}, 257),
    ],
    ids=["none", "bos alone", "eos alone", "pad beyond the rows"],
)
def test_padding_takes_a_token_that_the_model_has(special, pad, tmp_path):
    made("llama").save_pretrained(tmp_path / "base")  # 260 rows
    bytes_tokenizer(**special).save_pretrained(tmp_path / "base")
    assert load_base(ModelSpec(path=str(tmp_path / "base")), CPU).pad == pad
    assert Workspace(small(f"model.path={tmp_path / 'base'}", out=tmp_path)).data.pad == pad


def test_tokens_beyond_the_models_rows_are_named_at_the_start(tmp_path):
    made("llama", vocab_size=258, pad_token_id=None, bos_token_id=None, eos_token_id=None).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)  # <|user|> is 258
    with pytest.raises(ModelError, match="makes token 259 of the data, and the model has rows for tokens 0 to 257"):
        Workspace(small(f"model.path={tmp_path}", out=tmp_path)).data  # noqa: B018
    bytes_tokenizer(unk_token="<u>", sep_token="<x>", eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="eos_token_id is 258, and the model has rows for tokens 0 to 257"):
        load_base(ModelSpec(path=str(tmp_path)), CPU)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "ctrl", "opt", "bert", "roberta", "mpt", "llama", "mamba"])
def test_the_longest_text_is_as_long_as_the_table_of_positions(name):
    """RoBERTa counts from behind its token for padding, 1: two of 64 rows go. Rotary positions have no end."""
    model = made(name)
    longest = positions_of(model)
    assert longest == {"llama": None, "mamba": None, "roberta": 62}.get(name, 64)
    tokens = torch.full((1, longest or 200), 5)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        if longest is not None:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                model(input_ids=torch.full((1, longest + 1), 5), use_cache=False)


@pytest.mark.parametrize(("name", "adapter", "length"), [("opt", "lora", 64), ("gpt2", "prompt_tuning", 44)])
def test_longer_examples_than_the_model_has_positions_for_are_cut_and_that_is_said(
    name, adapter, length, bases, tmp_path, capsys
):
    """64 positions, of which 20 go to virtual tokens."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}", "completion": "b" * 100}) + "\n" for i in range(12)))
    words = (
        f"model.path={bases(name)[0]}",
        f"data.path={rows}",
        f"adapter={adapter}",
        "rounds=1",
        "model.dtype=float32",
    )
    run_on(LocalGrid, make_client_app(), tmp_path / "run", *words)
    assert f"examples are cut to {length} tokens" in capsys.readouterr().out
    assert summary_of(tmp_path / "run")["status"] == "finished"


# What happens at the end, and when it goes wrong


def test_a_run_of_an_architecture_that_writes_into_its_inputs_ends_as_finished(bases, tmp_path):
    words = (f"model.path={bases('ctrl')[0]}", "model.dtype=float32", "adapter.rank=4", "rounds=1")
    run_local(small(*words, out=tmp_path / "run"))
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "finished"
    assert summary["memory_bytes"] > 0


def test_a_gradient_that_vanishes_after_a_step_is_divergence_and_not_the_models_fault():
    model = LocalModel(load_base(ModelSpec(name="tiny", dtype="float32"), CPU), AdapterSpec(), 0)
    with pytest.raises(ClientError, match=r"diverged|became nan") as caught:
        train(model, steps=4, lr=1e30)
    assert "train.lr" in str(caught.value)
    with pytest.raises(ClientError, match=r"train\.lr \(now 0\.02\)"):
        train(model)  # the first step of a client that is sent what another's led to


def test_a_loss_of_nothing_leaves_nothing_to_learn_and_is_no_error(monkeypatch):
    model = LocalModel(load_base(ModelSpec(name="tiny", dtype="float32"), CPU), AdapterSpec(), 0)
    table = torch.zeros(260, 48)
    with torch.no_grad():
        model.base.model.norm.weight.fill_(1e9)  # predicts one token, with all certainty
        model.base.lm_head.weight.copy_(table)
        model.base.lm_head.weight[7, 0] = 1e9
        model.base.lm_head.weight[8, 0] = -1e9
    tokens = torch.full((1, 6), 7)
    signs = model.module(tokens).logits[0, :, 7] > 0
    right = torch.where(signs, 7, 8)
    batch = Batch(torch.cat([tokens[0, :1], right[:1]])[None], torch.tensor([[False, True]]))
    assert train(model, steps=2, batch=batch) == 0
