"""The exactness meter: how far a server's update is from the ideal one.

    dW* = sum_k p_k s_k B_k A_k        over the clients that replied, as they stood after training

(of a method that has clients train some layers each, over those who trained the layer, p renormalised; a layer that
nobody trained should stay as it is)

    error = ||dW_server - dW*||_F / ||dW*||_F        over all adapted layers together

dW_server is what a client that takes all would be sent next: s B A of the new adapter, and what was merged into the
base in this round. Float64 throughout; the factors of a round are held at once.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.config.compatibility import traits_of
from fedtune.core.protocol import ClientInfo, Layout, Setting, Strategy, Tensors, Update, share
from fedtune.lowrank.algebra import ROLES, LowRank, Sum, lora_factors, name_of, norm_of
from fedtune.lowrank.residual import from_residual, update_residual
from fedtune.models.base_delta import DENSE
from fedtune.training.apply_instruction import SCALING
from fedtune.training.frozen_basis import expanded


def aggregation_error(
    layout: Layout,
    strategy: Strategy[Any],
    round: int,
    before: Any,
    after: Any,
    replies: Sequence[tuple[ClientInfo, Update]],
    server: ClientInfo,
) -> float | None:
    """The error of one round, or None where there is no such thing: part of what clients trained stayed with them, or
    nothing changed.

    Args:
        before: the state that the clients were sent.
        after: the state that came of their replies.
        server: the peer that takes all.
    """
    if traits_of(strategy).personal or not layout.is_low_rank:
        return None
    sums: dict[str, Sum] = defaultdict(Sum)
    weights = share(replies)
    trained: dict[str, float] = {}
    if traits_of(strategy).partial:
        for weight, (_, update) in zip(weights, replies, strict=True):
            for module in lora_factors(update.tensors):
                trained[module] = trained.get(module, 0.0) + weight
        kept = strategy.configure(before, round, server)
        names = {name_of(module, role) for module in trained for role in ROLES}
        rest = {name: tensor for name, tensor in kept.tensors.items() if name not in names}
        _add_adapter(sums, layout, rest, kept.settings, 1.0)
    for weight, (peer, update) in zip(weights, replies, strict=True):
        told = strategy.configure(before, round, peer)
        held = _parted(told.tensors)[0] | update.tensors
        _add_adapter(sums, layout, held, told.settings, weight, trained)
    ideal = norm_of(sums.values())
    if ideal == 0:
        return None
    for state, number, weight in ((after, round + 1, -1.0), (before, round, 1.0)):
        told = strategy.configure(state, number, server)
        residual, rest = update_residual(told, {})
        adapter, dense = _parted(rest)
        for module, product in from_residual(residual).items():
            sums[module].add(product, weight)
        for name, matrix in dense.items():
            sums[name.removesuffix(DENSE)].add_dense(matrix, weight)
        if state is after:
            _add_adapter(sums, layout, adapter, told.settings, weight)
    return norm_of(sums.values()) / ideal


def _add_adapter(
    sums: dict[str, Sum],
    layout: Layout,
    tensors: Tensors,
    settings: Mapping[str, Setting],
    weight: float,
    whole: Mapping[str, float] | None = None,
) -> None:
    """Add weight * s B A of every layer, as a client holds them that has these tensors, less what all started from.

    Args:
        whole: by layer, what the weights of those that have it add up to, if that isn't 1.
    """
    weight_of = {module: weight / total for module, total in (whole or {}).items()}
    scaling = float(settings.get(SCALING, layout.scaling))
    tensors = expanded(tensors, settings, layout)
    for module, start in lora_factors(layout.initial).items():
        b, a = tensors.get(name_of(module, "lora_B")), tensors.get(name_of(module, "lora_A"))
        if b is not None or a is not None:
            rank = b.shape[1] if b is not None else a.shape[0]  # type: ignore[union-attr]
            held = LowRank(start.b[:, :rank] if b is None else b, start.a[:rank] if a is None else a)
            share_of = weight_of.get(module, weight)
            sums[module].add(held, share_of * scaling)
            if not layout.starts_at_zero:
                sums[module].add(start, -share_of * layout.scaling)
        elif (matrix := tensors.get(module + DENSE)) is not None:
            sums[module].add_dense(matrix, weight)


def _parted(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """What is no dense change of the base, and what is."""
    dense = {name: tensor for name, tensor in tensors.items() if name.endswith(DENSE)}
    return {name: tensor for name, tensor in tensors.items() if name not in dense}, dense
