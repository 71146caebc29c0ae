"""The loaded base, which the runs of one process may share (fedtune/core/caches.py)."""

import copy
from dataclasses import replace

import torch

from fedtune.config.schema import ModelSpec
from fedtune.core.caches import is_sharing, once
from fedtune.models.base import Base, load_base


def base_for(spec: ModelSpec, device: torch.device, changes: bool) -> Base:
    """The base that `spec` names, to put adapters on. Where bases are shared its modules are its own, and its weights
    are everybody's unless `changes`: then it has a copy, for a run that trains or rounds the base's own numbers.

    Raises:
        ModelError: as load_base.
    """
    if not is_sharing():
        return load_base(spec, device)
    base = once(("base", replace(spec, merge="residual"), device), lambda: load_base(spec, device))
    # deepcopy takes whatever its memo names for copied already
    memo = {} if changes else {id(weight): _twin(weight) for weight in base.model.parameters()}
    return replace(base, model=copy.deepcopy(base.model, memo))


def _twin(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Another parameter with the same numbers in the same place. One object for all wouldn't do: bitsandbytes' int8
    layers take from theirs what they need when they are first used, and leave nothing for a second layer."""
    twin = torch.Tensor._make_subclass(type(weight), weight.data, weight.requires_grad)
    twin.__dict__.update(weight.__dict__)
    return twin
