"""Tensors and text in one safetensors file that tells if a bit of it has changed.

safetensors has no checksum: a flipped bit of a tensor, a name or a number in the header is read as if it had been
written. So the header holds a hash of all that a reader gets: of every text, and of each tensor's name, type, shape and
bits. What it leaves out, as blanks between two entries, makes no difference to anybody.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedtune.core.protocol import Tensors

SEAL = "sha256"  # in the header; no text of its own may have this name


def seal(tensors: Tensors, texts: Mapping[str, str] | None = None) -> bytes:
    """The file's content.

    Args:
        tensors: contiguous, on the CPU, and none of them in another's memory.
    """
    texts = texts or {}
    return save(tensors, metadata={**texts, SEAL: _digest(tensors, texts)})


def unseal(path: Path) -> tuple[Tensors, dict[str, str]]:
    """What `seal` was given.

    Raises:
        OSError: if there is no such file, or it can't be read.
        ValueError: if it isn't what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError:
        raise
    except (SafetensorError, UnicodeError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"it is damaged: {error}") from error
    if texts.pop(SEAL, None) != _digest(tensors, texts):
        raise ValueError("it is damaged, or of another version of fedtune: its hash is not that of what it holds")
    return tensors, texts


def _digest(tensors: Tensors, texts: Mapping[str, str]) -> str:
    names = sorted(tensors)
    form = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([sorted(texts.items()), form]).encode())
    for name in names:
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
