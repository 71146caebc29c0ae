"""LoRA between two frozen bases: W = W0 + s B0 R A0, where R (r, r) is all that is trained and all that travels.

A0 is the layout's own start. B0 is drawn by key, uniformly in +-sqrt(3 / out), so that its numbers have the variance
1 / out and B0^T B0 is about the identity. Both ends draw the same bits, from a seed that travels as a setting.

Whoever isn't training holds a plain LoRA adapter, lora_B = B0 and lora_A = R A0.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedtune.core.protocol import Layout, Setting, Tensors
from fedtune.core.seeds import derive_seed, uniform
from fedtune.lowrank.algebra import lora_factors, name_of
from fedtune.models.adapted_model import LocalModel

SEED = "basis_seed"  # the setting
CORE = "lora_R"  # the role of R, as in `...q_proj.lora_R.weight`


def zero_core(layout: Layout) -> Tensors:
    """R of every layer, zero: nothing is added to the base yet."""
    start = lora_factors(layout.initial)
    return {name_of(m, CORE): torch.zeros(p.rank, p.rank, dtype=p.a.dtype) for m, p in start.items()}


@lru_cache(maxsize=1)  # drawn once a run rather than once a turn
def left_basis(layout: Layout, seed: int) -> Tensors:
    """B0 of every layer, by lora_B's name. It is shared: not to be changed."""
    drawn = {}
    for module, start in lora_factors(layout.initial).items():
        name = name_of(module, "lora_B")
        bound = math.sqrt(3 / start.b.shape[0])
        drawn[name] = uniform(derive_seed(seed, "left basis", name), start.b.shape, bound).to(start.b.dtype)
    return drawn


def expanded(tensors: Tensors, settings: Mapping[str, Setting], layout: Layout) -> Tensors:
    """The tensors with every R replaced by what a plain LoRA adapter holds for it: B0, and R A0."""
    ending = name_of("", CORE)
    cores = {name.removesuffix(ending): tensor for name, tensor in tensors.items() if name.endswith(ending)}
    if not cores:
        return tensors
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    basis = left_basis(layout, int(settings[SEED]))
    for module, core in cores.items():
        a, b = name_of(module, "lora_A"), name_of(module, "lora_B")
        plain |= {a: core @ layout.initial[a], b: basis[b]}
    return plain


@contextmanager
def training_core(model: LocalModel, core: Tensors) -> Iterator[Callable[[], Tensors]]:
    """Within, R is what the model trains, from `core` on: lora_A's weight is R, and its input passes through A0 first.
    Afterwards, however it ended, lora_A's weight is R A0.

    Yields:
        What reads R.
    """
    model.train_only(["lora_A"])
    live = model.trained()
    entered: list[tuple[nn.Parameter, Tensor]] = []
    bases = {
        module: model.layout.initial[name_of(module, "lora_A")].to(model.device)
        for module in lora_factors(model.layout.initial)
    }
    try:
        model.pass_through(bases)
        for module, basis in bases.items():
            parameter = live[name_of(module, "lora_A")]
            parameter.data = core[name_of(module, CORE)].to(model.device, copy=True)
            entered.append((parameter, basis))
        yield lambda: {name.replace("lora_A", CORE): tensor for name, tensor in model.read().items()}
    finally:
        model.pass_through({})
        for parameter, basis in entered:
            parameter.data = parameter.data @ basis
