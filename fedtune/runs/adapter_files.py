"""The global adapter as a PEFT folder, which `PeftModel.from_pretrained` loads anywhere.

A change of the base is part of it: layers with one are written as a wider LoRA, [B_change, s B] and [A_change; A].
"""

import json
from typing import Any

import torch
from safetensors.torch import save

from fedtune.core.protocol import Tensors
from fedtune.lowrank.algebra import LowRank, lora_factors, stack, to_adapter
from fedtune.lowrank.residual import from_residual, joined
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base_delta import DENSE
from fedtune.models.peft_fields import readable

ADAPTER_CONFIG = "adapter_config.json"


def adapter_files(model: LocalModel) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors of the adapter that `model` holds now.

    The base is named by its hub id where it has one, because a path on this machine means nothing elsewhere. Where the
    base itself is trained there is no adapter, and so no file: all its weights are in the checkpoint, which would
    otherwise be written twice a round.
    """
    if model.layout.base:
        return {}
    tensors = _tensors(model)
    made = model.module.peft_config["default"]
    config = readable(made, made.to_dict())
    config["base_model_name_or_path"] = model.origin.hub_id or model.origin.path
    config["inference_mode"] = True
    ranks = {module: product.rank for module, product in lora_factors(tensors).items()}
    scaling = 1.0 if _change(model) else model.scaling
    if ranks and scaling is not None and (set(ranks.values()) != {config["r"]} or scaling != model.layout.scaling):
        config |= {"r": max(ranks.values()), "use_rslora": False, "lora_alpha": max(ranks.values()) * scaling}
        narrow = {_inner(module): rank for module, rank in ranks.items() if rank != config["r"]}
        config |= {"rank_pattern": narrow, "alpha_pattern": {module: rank * scaling for module, rank in narrow.items()}}
    return {
        ADAPTER_CONFIG: (json.dumps(_json_ready(config), indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save({**tensors, **model.constants}, metadata={"format": "pt"}),
    }


def _tensors(model: LocalModel) -> Tensors:
    adapter = model.adapter()
    change = _change(model)
    if not change:
        return adapter
    assert model.scaling is not None, "only methods on LoRA change the base"
    products = lora_factors(adapter)
    wider = from_residual(change)
    for name, matrix in change.items():
        if name.endswith(DENSE):
            module, dense = name.removesuffix(DENSE), LowRank(matrix, torch.eye(matrix.shape[1]))
            wider[module] = stack([wider[module], dense]) if module in wider else dense
    for module, part in wider.items():
        own = LowRank(products[module].b * model.scaling, products[module].a)
        # B = 0, as in a fresh adapter, adds nothing but width
        products[module] = stack([part, own]) if own.b.any() else part
    for module in products.keys() - wider.keys():
        products[module] = LowRank(products[module].b * model.scaling, products[module].a)
    return {**adapter, **to_adapter(products, torch.float32)}


def _change(model: LocalModel) -> Tensors:
    return joined([model.origin_shift, model.base_delta.tensors])


def _inner(module: str) -> str:
    # PEFT matches these names against those of the base's own modules
    return module.removeprefix("base_model.model.")


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return value
