"""Which of transformers' implementations of attention a base has (model.attention), and which it can't have here.

What transformers would do about one that is missing isn't left to it: it takes another with a warning, or, where the
package `kernels` is installed, a kernel's code from the hub.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedtune.core.errors import ModelError
from fedtune.core.text import first_line

WAY_OUT = "take model.attention=sdpa, eager or auto"


def lacking(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """What the implementation needs that isn't here, or ""."""
    if asked in ("flash_attention_2", "flex_attention") and device.type != "cuda":
        return f"a CUDA device to train on, and this is {device.type}"
    if asked == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn, which isn't installed"
    if asked == "flash_attention_2" and dtype == torch.float32:
        return "a base in 16 bits (model.dtype=bfloat16)"
    return ""


def check_attention(asked: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check, before anything is loaded, that this machine has what the implementation needs.

    Raises:
        ModelError: saying what is missing.
    """
    if missing := lacking(asked, device, dtype):
        raise ModelError(f"model.attention={asked} needs {missing}: {WAY_OUT}")


@contextmanager
def with_attention(asked: str) -> Iterator[dict[str, Any]]:
    """The options of from_pretrained for this implementation; within, transformers' refusal of it becomes ours.

    Raises:
        ModelError: if the architecture, or this version of transformers, hasn't got it.
    """
    if asked == "auto":
        yield {}
        return
    try:
        yield {"attn_implementation": asked}
    except (ValueError, ImportError, AttributeError) as error:
        if "attention" not in str(error).lower():
            raise
        raise ModelError(
            f"model.attention={asked} isn't to be had: {first_line(error)[:200]} Way out: {WAY_OUT}"
        ) from error


def attention_of(model: Any) -> str:
    """The implementation that a model has; of one that names none, "eager", its own."""
    config = model.config.get_text_config()
    return str(getattr(config, "_attn_implementation", None) or "eager")


def expect_attention(model: Any, asked: str, name: str) -> None:
    """Check that the model has what was asked for.

    Raises:
        ModelError: if transformers took another instead.
    """
    if asked not in ("auto", found := attention_of(model)):
        raise ModelError(f"model.attention={asked}: {name} was loaded with {found} instead: {WAY_OUT}")
