"""The global adapter as a PEFT folder, which `PeftModel.from_pretrained` loads anywhere."""

import json
from typing import Any

from safetensors.torch import save

from fedtune.adapters import LocalModel


def adapter_weights(model: LocalModel) -> bytes:
    """The content of adapter_model.safetensors: the adapter that `model` holds now."""
    return save(model.read(), metadata={"format": "pt"})


def adapter_config(model: LocalModel) -> bytes:
    """The content of adapter_config.json.

    The base is named by its hub id where it has one, because a path on this machine means nothing elsewhere.
    """
    config: dict[str, Any] = model.module.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = model.origin.hub_id or model.origin.path
    config["inference_mode"] = True
    return (json.dumps(_json_ready(config), indent=2, sort_keys=True) + "\n").encode()


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return value
