"""What the oldest PEFT that fedtune supports knows of an adapter_config.json.

A newer PEFT writes all that it knows, most of it at its default, and an older one refuses names that are new to it. So
what is new and at its default is left out: the adapter is the same, and more programs read it.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

OLDEST = "0.18.0"  # as in pyproject.toml

_ANY = "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type"
_LAYERS = "bias layers_pattern layers_to_transform modules_to_save target_modules"
_TOKENS = "modules_to_save num_attention_heads num_layers num_transformer_submodules num_virtual_tokens token_dim"

# By PEFT's name for the kind, all fields of its config class in that version
FIELDS: dict[str, frozenset[str]] = {
    kind: frozenset(f"{_ANY} {own}".split())
    for kind, own in {
        "LORA": f"{_LAYERS} alora_invocation_tokens alpha_pattern arrow_config corda_config ensure_weight_tying "
        "eva_config exclude_modules fan_in_fan_out init_lora_weights layer_replication loftq_config lora_alpha "
        "lora_bias lora_dropout megatron_config megatron_core qalora_group_size r rank_pattern runtime_config "
        "target_parameters trainable_token_indices use_dora use_qalora use_rslora",
        "IA3": "exclude_modules fan_in_fan_out feedforward_modules init_ia3_weights modules_to_save target_modules",
        "VERA": f"{_LAYERS} d_initial fan_in_fan_out init_weights projection_prng_key r save_projection vera_dropout",
        "OFT": f"{_LAYERS} block_share coft eps exclude_modules fan_in_fan_out init_weights module_dropout "
        "num_cayley_neumann_terms oft_block_size r use_cayley_neumann",
        "MISS": f"{_LAYERS} exclude_modules init_weights mini_r miss_dropout r",
        "ADAPTION_PROMPT": "adapter_layers adapter_len target_modules",
        "PROMPT_TUNING": f"{_TOKENS} prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs "
        "tokenizer_name_or_path",
        "PREFIX_TUNING": f"{_TOKENS} encoder_hidden_size prefix_projection",
    }.items()
}


def readable(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that are at their default and newer than `OLDEST`.

    Args:
        config: the PEFT config that they are of.
        settings: by name.
    """
    known, defaults = FIELDS[config.peft_type.value], _defaults(config)
    return {
        name: value
        for name, value in settings.items()
        if name in known or name not in defaults or value != defaults[name]
    }


def _defaults(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(config):
        if item.default is not MISSING:
            found[item.name] = item.default
        elif item.default_factory is not MISSING:
            found[item.name] = item.default_factory()
    return found
