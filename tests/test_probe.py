"""What a step takes, measured on the model itself: against pencil and paper for the tiny Llama, and other counts.

The tiny Llama has 2 blocks of width 48, 4 heads of 12, 2 of them for keys and values, and 96 in between:

    q, k, v, o, gate, up, down     48 * (48 + 24 + 24 + 48 + 96 + 96) + 96 * 48 = 20,736 numbers a block
    two norms a block, one at the end, 260 x 48 of a vocabulary that is both ends: 240 + 12,480 = 12,720
"""

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedtune.config.compose import compose
from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.data.corpus import Corpus
from fedtune.data.federated_data import FederatedData
from fedtune.lowrank.algebra import lora_factors
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base, pick_device
from fedtune.models.tiny import tiny_tokenizer
from fedtune.planning.cost_probe import ALLOCATOR, LOGIT_BYTES, NF4_BYTES, base_bytes, blocks_of, costs_of, weights_of
from fedtune.workspace.workspace import Workspace

TINY = ModelSpec(name="tiny", dtype="float32")
BLOCK, REST = 20_736, 12_720


def local(spec=TINY, **adapter):
    return LocalModel(load_base(spec, pick_device("cpu")), AdapterSpec(**adapter), 0)


def data(lengths=(5, 9, 7, 12), prompt=3):
    """Examples of so many tokens, all but the first `prompt` of them learnt; the last is the server's."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    targets = np.ones(starts[-1], bool)
    for start in starts[:-1]:
        targets[start : start + prompt] = False
    corpus = Corpus(np.arange(starts[-1], dtype=np.int32) % 256, targets, starts)
    rows = np.arange(len(lengths) - 1)
    return FederatedData(corpus, (rows[:1], rows[1:]), (rows[:0],) * 2, np.array([len(lengths) - 1]), 256, 0)


def test_lengths_and_answers_by_hand():
    """5, 9 and 7 tokens of clients: one at a time, each epoch 7 on average; all three at a time, 9. Learnt are 2, 6 and
    4, at most 6. Over 64 batches of one, 21 epochs and one example more: within 2 / 64 of the mean."""
    costs = costs_of(local(), data(), 3, 0)
    assert (costs.tokens, costs.typical_tokens) == (9, 9)
    assert costs.head_bytes == pytest.approx(ALLOCATOR * LOGIT_BYTES * 260 * 6)
    assert costs_of(local(), data(), 1, 0).typical_tokens == pytest.approx(7, abs=2 / 64)
    first = data(prompt=0)  # nothing comes before the first token that it could be told from
    assert costs_of(local(), first, 3, 0).head_bytes == pytest.approx(ALLOCATOR * LOGIT_BYTES * 260 * 8)


def test_flop_by_hand():
    """At 9 tokens, forward: 2 * 9 * 20,736 of a block's matrices and 2 * 9^2 * 48 of its attention; 2 * 260 * 48 for
    each of 4 answers. Backward as much but for attention, 2.5 times."""
    costs = costs_of(local(), data(), 3, 0)
    matrices, attention, head = 18 * BLOCK, 2 * 81 * 48, 2 * 260 * 48 * 4
    assert costs.forward_flop == 2 * (matrices + attention) + head
    assert costs.backward_flop == [head + blocks * (matrices + 2.5 * attention) for blocks in (2, 1)]
    assert costs.read_bytes == [4 * (2 * BLOCK + blocks * BLOCK + 2 * 260 * 48) for blocks in (2, 1)]


def test_a_base_in_bytes_by_hand(tmp_path):
    assert base_bytes(local()) == {"32": 4 * (2 * BLOCK + REST)}
    saved = local(llama(tmp_path, dtype="float32"), targets=["all-linear"])
    linear, rest = 2 * (64 * (64 + 32 + 32 + 64 + 128 + 128) + 128 * 64), 5 * 64 + 260 * 64
    assert base_bytes(saved) == pytest.approx(
        {"4": linear * NF4_BYTES + 4 * rest, "8": linear + 4 * rest, "32": 4 * (linear + rest)}
    )
    half = local(llama(tmp_path, dtype="bfloat16"))
    assert base_bytes(half) == pytest.approx(
        {"4": linear * NF4_BYTES + 2 * rest, "8": linear + 2 * rest, "16": 2 * (linear + rest)}
    )


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "bits"), [("nf4", "4"), ("int8", "8")])
def test_a_quantized_base_says_the_same(tmp_path, quantization, bits):
    """In whatever bits it is held; and what it is said to take is about what its tensors take, but for a table of 256
    numbers that each layer has, however small it is."""
    plain = local(llama(tmp_path, dtype="bfloat16"))
    held = local(llama(tmp_path, dtype="bfloat16", quantization=quantization))
    assert base_bytes(held) == base_bytes(plain)
    beside = ("lora", "lm_head", "quant_map", "quant_state")
    tensors = [t for n, t in held.module.state_dict().items() if not any(word in n for word in beside)]
    assert sum(t.nbytes for t in tensors) == pytest.approx(base_bytes(plain)[bits], rel=0.1)
    costs = costs_of(held, data(), 2, 0)
    assert costs.forward_flop == costs_of(plain, data(), 2, 0).forward_flop
    assert costs.saved_bytes[0] > costs.saved_bytes[1] > 0


def llama(folder, **spec):
    """A Llama of whole blocks of 64, which can be quantized."""
    if not (folder / "config.json").exists():
        config = LlamaConfig(
            vocab_size=260,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return ModelSpec(path=str(folder), **spec)


def gpt2(folder):
    config = GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, vocab_size=260)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelSpec(path=str(folder), dtype="float32")


def saved_by_a_step(base, tokens):
    """Bytes that autograd keeps of a step in which every block has something to pass on, with the last token's logits
    alone."""
    own = {t.untyped_storage().data_ptr() for t in (*base.parameters(), *base.buffers())}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        embedded = base.get_input_embeddings()(torch.zeros(1, tokens, dtype=torch.int64)).detach().requires_grad_()
        base(inputs_embeds=embedded, use_cache=False, logits_to_keep=1)
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_all_blocks_keep_is_what_a_whole_step_keeps(tmp_path, architecture):
    """Counted anew, by storages and without blocks; GPT-2's own dropout keeps its masks while it trains."""
    spec = TINY if architecture == "llama" else gpt2(tmp_path)
    costs = costs_of(local(spec), data(), 2, 0)
    base = load_base(spec, pick_device("cpu")).model.train()
    assert costs.saved_bytes[0] == pytest.approx(ALLOCATOR * saved_by_a_step(base, 9), rel=1e-9)
    falls = [high - low for high, low in zip(costs.saved_bytes, costs.saved_bytes[1:], strict=False)]
    assert falls[0] > 0
    assert falls[0] == pytest.approx(falls[-1], rel=0.1)  # one block is like another


def test_another_architecture(tmp_path):
    """GPT-2's matrices lie the other way round: 32 x (96 + 32 + 128) + 128 x 32 a block."""
    model = local(gpt2(tmp_path), targets=["c_attn"], rank=4)
    costs = costs_of(model, data(), 3, 0)
    matrices = 3 * 2 * 9 * (32 * (96 + 32 + 128) + 128 * 32)
    assert costs.forward_flop == matrices + 3 * 2 * 81 * 32 + 2 * 260 * 32 * 4
    assert [(weight.block, weight.rows, weight.columns) for weight in weights_of(model)] == [
        (block, 96, 32) for block in range(3)
    ]
    assert list(blocks_of(model.module.get_base_model())) == [f"transformer.h.{place}" for place in range(3)]


def test_layers_and_where_they_are():
    found = {weight.module.split("layers.")[1]: weight for weight in weights_of(local(targets=["q_proj", "down_proj"]))}
    assert {name: (weight.block, weight.rows, weight.columns) for name, weight in found.items()} == {
        "0.self_attn.q_proj": (0, 48, 48),
        "0.mlp.down_proj": (0, 48, 96),
        "1.self_attn.q_proj": (1, 48, 48),
        "1.mlp.down_proj": (1, 48, 96),
    }


def test_blocks_are_not_what_a_block_is_made_of():
    """Two blocks of five experts each; and a model of one piece."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))

    whole = nn.Module()
    whole.layers = nn.ModuleList(Block() for _ in range(2))
    assert list(blocks_of(whole)) == ["layers.0", "layers.1"]
    single = nn.Linear(2, 2)
    assert blocks_of(single) == {"": single}


def test_an_adapted_vocabulary_is_still_the_vocabulary():
    plain, adapted = local(), local(targets=["q_proj", "lm_head"])
    assert base_bytes(adapted) == base_bytes(plain)
    assert costs_of(adapted, data(), 3, 0).forward_flop == costs_of(plain, data(), 3, 0).forward_flop


KINDS = {
    "lora": {},
    "rslora": {},
    "dora": {},
    "pissa": {},
    "ia3": {},
    "vera": {"rank": 8},
    "oft": {"block_size": 8},
    "bone": {"rank": 8},
    "prompt_tuning": {},
    "prefix_tuning": {},
    "adaption_prompt": {},
    "none": {},
}


def state_of(module):
    """All that somebody could leave behind."""
    hooks = sum(len(getattr(m, f"_forward{kind}hooks")) for m in module.modules() for kind in ("_", "_pre_"))
    off = [name for name, m in module.named_modules() if getattr(m, "_disable_adapters", None) is True]
    return (
        hooks,
        off,
        {name: m.training for name, m in module.named_modules()},
        {name: p.requires_grad for name, p in module.named_parameters()},
        {name: p.grad for name, p in module.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_adapter_the_model_is_as_it_was(kind):
    model = local(kind=kind, **KINDS[kind])
    tokens = torch.arange(12).reshape(2, 6)
    before = state_of(model.module)
    torch.manual_seed(3)
    drawn = torch.random.get_rng_state()
    with torch.no_grad():
        logits = model.module(tokens).logits
    costs = costs_of(model, data(), 2, 0)
    assert state_of(model.module) == before
    assert torch.equal(drawn, torch.random.get_rng_state())
    with torch.no_grad():
        assert torch.equal(model.module(tokens).logits, logits)
    assert costs.forward_flop == costs_of(local(), data(), 2, 0).forward_flop
    assert costs.saved_bytes[0] > costs.saved_bytes[1] > 0
    assert (len(weights_of(model)) > 0) == (kind in ("lora", "rslora", "dora", "pissa"))


def test_layers_that_are_switched_off_stay_so():
    """Between two turns of a client of some layers."""
    model = local()
    model.adapt_only([module for module in lora_factors(model.layout.initial) if "q_proj" in module])
    model.module.train()
    before = state_of(model.module)
    assert len(before[1]) == 2
    costs_of(model, data(), 2, 0)
    assert state_of(model.module) == before


def test_a_partys_costs_are_those_of_its_own_data():
    workspace = Workspace(compose([*SMALL, "method=fedpipe"]))
    rows = np.concatenate(workspace.data.train)
    assert workspace.costs.tokens == max(workspace.data.corpus.length(row) for row in rows)
    assert workspace.layout.costs is workspace.costs
    assert workspace.layout.weights == tuple(weights_of(workspace.model))
    assert Workspace(compose([*SMALL, "method=fedit"])).layout.costs is None
