"""Bases with random weights of a real model's shape, made here: what they cost is what the real ones cost."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtune.models.base import Base, Origin, quiet
from fedtune.models.model_checks import examine
from fedtune.models.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool = False

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=self.tied,
            bos_token_id=256,
            eos_token_id=256,
            pad_token_id=256,
        )


SMOLLM2 = Shape(30, 576, 1536, 9, 3, 49152, tied=True)
LLAMA_7B = Shape(32, 4096, 11008, 32, 32, 32000)
SMALL = Shape(2, 64, 128, 4, 2, 320)


def random_folder(shape: Shape, folder: Path) -> Path:
    """A model folder with random weights in bfloat16 and the toy model's tokenizer, a token a byte."""
    from transformers import LlamaForCausalLM

    quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(shape.config()).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_nf4(shape: Shape, device: torch.device) -> Base:
    """A base in NF4 with random weights, made on the device a layer at a time: neither the host nor the device ever
    holds it whole in 16 bits."""
    import bitsandbytes
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    quiet()
    config = shape.config()
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return weight.normal_(0, columns**-0.5, generator=generator)

    for place, module in list(model.named_modules()):
        parent, name = model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            weight = drawn(module.out_features, module.in_features)
            held = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
            layer.weight = held.to(device)
            layer.support_avx512bf16_for_cpu = False  # as load_base sets it
            setattr(parent, name, layer)
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(drawn(*module.weight.shape), requires_grad=False)
        elif getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            module.weight = nn.Parameter(torch.ones_like(module.weight, device=device), requires_grad=False)
    with device:  # it has numbers of its own, which are no weights
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.is_loaded_in_4bit = model.is_quantized = True  # what PEFT looks at
    model = model.eval().requires_grad_(False)
    tokenizer = tiny_tokenizer()
    # A path, so that the base counts as one that can be held in other bits; nobody opens it
    origin = Origin("code:random-nf4", hashlib.sha256(repr(shape).encode()).hexdigest(), "(random)", None)
    reached = examine(model, "the random base", "nf4")
    return Base(model, tokenizer, origin, tokenizer.pad_token_id, "nf4", reached)
