"""adapter=none: no adapter, the base's own weights are trained, travel and are averaged."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, of_each_kind, rows, strategy_of, summary_of, traits_of_method
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from fedtune.config.compose import choices, compose
from fedtune.config.schema import FULL, AdapterSpec, ModelSpec
from fedtune.core.errors import ConfigError, ModelError, WireError
from fedtune.core.protocol import Batch, ClientInfo, Layout, Slot, Update
from fedtune.core.seeds import derive_seed, uniform
from fedtune.models.adapted_model import LocalModel
from fedtune.models.adapter_kinds import adaptable
from fedtune.models.base import load_base
from fedtune.models.tiny import tiny_model, tiny_tokenizer
from fedtune.runs.adapter_files import adapter_files
from fedtune.runtime.local import run_local
from fedtune.server.progress import closing
from fedtune.training.first_order import fit
from fedtune.training.gradients import finished
from fedtune.wire.messages import pack_greeting, unpack_greeting
from fedtune.workspace.workspace import Workspace
from strategies.fedit import FedIT

CPU = torch.device("cpu")
TINY = ModelSpec(name="tiny", dtype="float32")
NEEDY = [name for name in choices("method") if traits_of_method(name).needs_low_rank]
LORA_OF_TINY = "868467fc612d67025af1e7acd977099d3a82487d05b1950d88c3efd441145e07"
NONE = ("adapter=none", "model.dtype=float32", f"data.path={Path(__file__).with_name('pairs.jsonl')}")
IA3_OF_TINY = "0a123481b62a2c1012fb18fa818bfc31ba54224441bf38e51dfb0976642832d8"


def full(base=TINY, **adapter):
    return LocalModel(load_base(base, CPU), AdapterSpec(kind=FULL, **adapter), 0)


def batch(seed=0):
    tokens = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))


def train(model, steps=2, lr=1e-3, optimizer="adamw"):
    settings = {"optimizer": optimizer, "weight_decay": 0.0, "max_grad_norm": 1.0, "key": 0}
    return finished(fit(model, [batch()] * steps, steps=steps, lr=lr, **settings))


def logits(module):
    with torch.no_grad():
        return module(batch().tokens).logits


def gpt2(folder, seed=0):
    """A GPT-2 whose head is tied to its embeddings, saved in `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=260))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelSpec(path=str(folder), dtype="float32")


def test_it_starts_as_the_base_with_the_bases_own_names_and_weights():
    model, base = full(), tiny_model().eval()
    assert torch.equal(logits(model.module), logits(base))
    assert not model.module.training
    expected = dict(base.named_parameters())
    assert model.layout.initial.keys() == expected.keys()
    assert all(torch.equal(model.layout.initial[name], p) for name, p in expected.items())
    assert model.trainable == sum(p.numel() for p in base.parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    slot = next(slot for slot in model.layout.slots if slot.name == name)
    assert slot == Slot(name, (48, 48), "float32", "weight", "model.layers.0.self_attn.q_proj", 1.0)
    assert (model.scaling, model.constants, model.origin_shift) == (None, {}, {})
    assert not model.layout.is_low_rank


def test_the_start_is_a_copy_and_slots_say_the_dtype_that_the_base_is_held_in():
    model = full(ModelSpec(name="tiny", dtype="bfloat16"))
    assert {slot.dtype for slot in model.layout.slots} == {"bfloat16"}
    live = {p.data_ptr() for p in model.module.parameters()}
    assert live.isdisjoint(t.data_ptr() for t in model.layout.initial.values())


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("float32", "sgd"), ("bfloat16", "adamw")])
def test_training_changes_every_weight_and_reset_leaves_no_trace(dtype, optimizer):
    model = full(ModelSpec(name="tiny", dtype=dtype))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    start = logits(model.module)
    first = train(model, steps=1, lr=0.02, optimizer=optimizer)
    assert train(model, steps=4, lr=0.02, optimizer=optimizer) < first
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.read().items())
    model.train_only(["weight"])
    module = "model.layers.0.self_attn.v_proj"
    model.base_delta.set({f"{module}.delta": uniform(5, (24, 48), 0.5)})
    assert not torch.equal(logits(model.module), start)
    model.reset()
    now = model.module.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in now.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.module.parameters())
    assert torch.equal(logits(model.module), start)


def test_tied_weights_are_one_tensor(tmp_path):
    model = full(gpt2(tmp_path / "gpt2"))
    names = [slot.name for slot in model.layout.slots]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names)) == len(dict(model.module.named_parameters()))
    assert {slot.role for slot in model.layout.slots} == {"weight", "bias"}
    train(model)
    assert model.module.lm_head.weight is model.module.transformer.wte.weight
    assert not torch.equal(model.module.lm_head.weight, model.layout.initial["transformer.wte.weight"])
    head = full(gpt2(tmp_path / "again"), targets=["lm_head"])  # named by one of its layers, it is the same tensor
    assert [slot.name for slot in head.layout.slots] == ["transformer.wte.weight"]


def test_targets_choose_modules_and_all_that_is_in_them():
    def modules(*targets):
        return {slot.module.removeprefix("model.layers.") for slot in full(targets=list(targets)).layout.slots}

    assert modules("v_proj") == {"0.self_attn.v_proj", "1.self_attn.v_proj"}
    assert modules("mlp", "model.norm") == {
        f"{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")
    } | {"model.norm"}
    linear = {module.rsplit(".", 1)[-1] for module in modules("all-linear")}
    assert linear == set(adaptable(load_base(TINY, CPU).model))
    model = full(targets=["v_proj"])
    frozen = {name: p.clone() for name, p in model.module.named_parameters() if not p.requires_grad}
    train(model)
    assert all(torch.equal(frozen[name], p) for name, p in model.module.named_parameters() if name in frozen)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_prj"], "no layer 'q_prj'; it has down_proj, gate_proj"),
        (["proj"], "no layer 'proj'"),  # a whole name, not the end of one
        (["v_proj", "act_fn"], "'act_fn' of LlamaForCausalLM has no weights to train"),
        ([], r"adapter\.targets=\[\] leaves nothing to train"),
    ],
)
def test_targets_that_are_not_there_or_hold_nothing_are_named(targets, said):
    with pytest.raises(ModelError, match=said):
        full(targets=targets)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_refused_before_it_is_loaded(quantization):
    with pytest.raises(ConfigError, match=rf"model\.quantization={quantization} .* take model\.quantization=none, or"):
        compose(["model=smollm2", "adapter=none", f"model.quantization={quantization}"])
    assert compose(["model=smollm2", f"model.quantization={quantization}"]).adapter.kind == "lora"


def test_a_base_that_was_saved_quantized_is_refused():
    base = load_base(TINY, CPU)
    base.model.is_quantized = True  # as transformers sets it
    with pytest.raises(ModelError, match=r"those of this LlamaForCausalLM are quantized: .* Take a base that isn't"):
        LocalModel(base, AdapterSpec(kind=FULL), 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", NEEDY)
def test_methods_on_b_a_are_refused_at_the_start(method):
    with pytest.raises(
        ConfigError, match=rf"method={method} works on B A, which adapter=none hasn't got: take adapter="
    ):
        Workspace(compose([*SMALL, f"method={method}", "adapter=none"]))


@pytest.mark.slow
def test_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"population\.ranks=\[4, 2\] is about B A, which adapter=none hasn't got"):
        Workspace(compose([*SMALL, "method=local_only", "adapter=none", "population.ranks=[4,2]"]))
    with pytest.raises(ConfigError, match=r"adapter\.rank=4 means nothing to adapter\.kind=none, which has targets"):
        compose(["adapter=none", "adapter.rank=4"])


def test_hashes_of_adapters_layouts_are_what_they_always_were():
    assert LocalModel(load_base(TINY, CPU), AdapterSpec(), 0).layout.sha256 == LORA_OF_TINY
    assert LocalModel(load_base(TINY, CPU), AdapterSpec(kind="ia3"), 0).layout.sha256 == IA3_OF_TINY


@pytest.mark.slow
def test_a_client_with_another_base_is_refused_at_the_handshake(tmp_path):
    one, same, other = (full(gpt2(tmp_path / str(n), seed)) for n, seed in enumerate((0, 0, 1)))
    assert one.layout.slots == other.layout.slots
    greeting = pack_greeting(ClientInfo(0, 3), same.layout.sha256)
    assert unpack_greeting(greeting, 4, one.layout.sha256) == ClientInfo(0, 3)
    with pytest.raises(WireError, match=r"client 0 has other trainable tensors .*\(adapter=none\), it holds another"):
        unpack_greeting(pack_greeting(ClientInfo(0, 3), other.layout.sha256), 4, one.layout.sha256)
    assert Layout(one.layout.slots, one.layout.initial).sha256 != one.layout.sha256
    # To adapters the base's bits were never part of it: a client may hold it quantized
    lora = [
        LocalModel(load_base(ModelSpec(path=m.origin.path, dtype="float32"), CPU), AdapterSpec(), 0)
        for m in (one, other)
    ]
    assert lora[0].layout.sha256 == lora[1].layout.sha256


def test_the_average_is_the_weighted_mean_of_all_weights():
    """(1 W_1 + 3 W_2) / 4, in float64 and rounded once."""
    layout, method = full().layout, FedIT()
    moved = [{n: t + uniform(derive_seed(k, n), t.shape, 0.1) for n, t in layout.initial.items()} for k in (1, 2)]
    replies = [(ClientInfo(k, n), Update(tensors, n)) for k, (tensors, n) in enumerate(zip(moved, (1, 3), strict=True))]
    after = method.aggregate(method.init(layout), 1, replies).adapter
    for name in layout.initial:
        expected = (moved[0][name].double() + 3 * moved[1][name].double()) / 4
        assert torch.equal(after[name], expected.float())


def test_fedit_averages_what_its_clients_trained(small_run, monkeypatch):
    """The real engine for a round: the checkpoint holds the mean of what the clients sent, by their examples."""
    sent = []
    aggregate = FedIT.aggregate

    def listen(self, state, round, replies):
        sent.extend((update.examples, update.tensors) for _, update in replies)
        return aggregate(self, state, round, replies)

    monkeypatch.setattr(FedIT, "aggregate", listen)
    folder = small_run(*NONE, "population.clients=2", "population.cohort=2", rounds=1)
    state = load_file(folder / "checkpoint" / "state.safetensors")
    (n, one), (m, other) = sent
    assert state.keys() == {f"/adapter/{name}" for name in one}
    for name in one:
        expected = (n * one[name].double() + m * other[name].double()) / (n + m)
        assert torch.allclose(state[f"/adapter/{name}"].double(), expected, rtol=1e-6, atol=1e-9)
        assert not torch.equal(one[name], other[name])


# Seeded methods, which have rules, train the base as it is in test_contract.py; here they would take minutes
FIRST_ORDER = of_each_kind(name for name in choices("method") if name not in NEEDY and "rules" not in strategy_of(name))


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_methods_that_need_no_b_a_train_the_base(method, small_run, capsys):
    folder = small_run(*NONE, f"method={method}", "train.lr=2e-3")
    losses = [float(row["eval_loss"]) for row in rows(folder, "metrics.csv")]
    assert losses[2] < losses[0]
    assert {row["aggregation_error"] for row in rows(folder, "metrics.csv")} == {""}
    summary = summary_of(folder)
    assert (summary["status"], summary["adapter"]["kind"]) == ("finished", "none")
    assert summary["adapter"]["trainable_parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert not (folder / "adapter").exists()
    assert f"weights  {folder / 'checkpoint'}" in capsys.readouterr().out


def test_nothing_is_exported():
    assert adapter_files(full()) == {}


@pytest.mark.parametrize("adapter", [{"kind": "lora"}, {}])  # a summary of before kinds were written down has none
def test_what_came_of_a_run_with_an_adapter_names_it(adapter, tmp_path):
    summary = {"totals": dict.fromkeys(("failed", "up_wire_bytes", "down_wire_bytes"), 0), "rounds": 1, "seconds": 1.0}
    summary |= {"state_sha256": "0", "adapter": adapter}
    assert any("PeftModel" in line for line in closing(summary, tmp_path))


def test_resume_equals_uninterrupted(tmp_path, small_run):
    whole, parts = small_run(*NONE, name="whole", rounds=3), small_run(*NONE, name="parts", rounds=1)
    run_local(compose([*SMALL, *NONE, "rounds=3", f"out={parts}"]), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]


def test_bfloat16_weights_are_deaf_to_steps_that_float32_ones_take():
    """A norm's weights are 1, whose neighbours in bfloat16 are 1/256 below and 1/128 above."""
    name = "model.norm.weight"
    for dtype, moves in (("float32", True), ("bfloat16", False)):
        model = full(ModelSpec(name="tiny", dtype=dtype))
        train(model, steps=3, lr=1e-4)
        assert torch.equal(model.read()[name], model.layout.initial[name]) != moves


@pytest.mark.slow
class TestSmolLM2:
    """The real base's vocabulary and its first blocks."""

    def test_all_its_weights_are_trained_and_put_back(self, short_smollm2):
        model = full(ModelSpec(path=str(short_smollm2), dtype="float32"))
        assert model.trainable == 35_392_320
        start = logits(model.module)
        first = train(model, steps=1, lr=1e-4)
        assert train(model, steps=1, lr=1e-4) < first
        model.reset()
        assert torch.equal(logits(model.module), start)
