"""Small models of many architectures, made from transformers' own configs: random weights, two blocks, 260 tokens."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedtune.config.schema import ModelSpec
from fedtune.models.tiny import tiny_tokenizer

_TOKENS = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
_LLAMA = _TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_EXPERTS = _LLAMA | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_GPT2 = _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
_MAMBA = {"state_size": 4, "time_step_rank": 4}
_ATTENTION = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gemma2": _LLAMA | {"query_pre_attn_scalar": 8},
    "qwen3": _LLAMA,
    "phi3": _LLAMA | {"original_max_position_embeddings": 128},
    "cohere": _LLAMA,
    "lfm2": _LLAMA | {"full_attn_idxs": [1], "block_multiple_of": 16},
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"decoder_sparse_step": 1},
    "qwen3_moe": _EXPERTS | {"decoder_sparse_step": 1},
    "olmoe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v3": _EXPERTS
    | _ATTENTION
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4},
    "mamba": _LLAMA | _MAMBA,
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    | {"mamba_chunk_size": 16},
    "gpt2": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 4},
    "ctrl": {"vocab_size": 260, "n_positions": 64, "n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4},
    "opt": _LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bert": _LLAMA | {"max_position_embeddings": 64, "is_decoder": True},
    "roberta": _LLAMA | {"max_position_embeddings": 64, "is_decoder": True, "pad_token_id": 1},
    "mpt": {"vocab_size": 260, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
}


def made(name: str, **settings: Any) -> Any:
    """A model of this architecture, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(CONFIGS[name] | settings))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def saved(name: str, folder: Path, **settings: Any) -> ModelSpec:
    """Such a model in a folder, with a tokenizer of bytes."""
    made(name, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelSpec(path=str(folder), dtype="float32")
