"""The optimizers that a client may take its steps with."""

import importlib.util
import sys
from typing import Any

import torch

from fedtune.core.errors import ConfigError
from fedtune.core.lean_imports import import_bitsandbytes

IN_8_BITS = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}  # bitsandbytes' classes


def check_optimizer(name: str, device: torch.device) -> None:
    """Check that this optimizer works on this device.

    Raises:
        ConfigError: for a name that isn't known, or saying what is missing.
    """
    if name not in ("adamw", "sgd", *IN_8_BITS):
        raise ConfigError(f"optimizer={name} is not known: expected adamw, sgd, {' or '.join(IN_8_BITS)}")
    if name not in IN_8_BITS:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"train.optimizer={name} needs bitsandbytes (pip install bitsandbytes): or take adamw")
    # bitsandbytes would go on without paging, and say so in a warning
    if name.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"train.optimizer={name} needs a CUDA device, whose driver does the paging, and this is {device.type}: "
            "take adamw8bit or adamw"
        )


def make_optimizer(name: str, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> Any:
    """Make the optimizer: `adamw`, plain `sgd`, or AdamW whose moments are held in 8 bits, by blocks of 256, where a
    tensor has 4,096 numbers or more (Dettmers et al. 2022, arXiv:2110.02861).

    Raises:
        ConfigError: as `check_optimizer`, or if bitsandbytes has no such kernel for this device.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)
    check_optimizer(name, parameters[0].device)
    import_bitsandbytes()
    return getattr(sys.modules["bitsandbytes"].optim, IN_8_BITS[name])(parameters, lr=lr, weight_decay=weight_decay)
