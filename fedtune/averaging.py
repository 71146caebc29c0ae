"""Averages of what clients sent, in float64 and in the order of their indices."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.lowrank import LowRank, pairs, unpair
from fedtune.protocol import Instruction, Peer, Setting, Tensors, Update, share

Replies = Sequence[tuple[Peer, Update]]


def average(replies: Replies, like: Mapping[str, Tensor], weights: Sequence[float] | None = None) -> Tensors:
    """sum_k w_k theta_k of the tensors that `like` names, in their dtypes.

    Sums run in float64, so that identical updates average to exactly themselves.

    Args:
        weights: one per reply, summing to one; None takes p_k = n_k / sum(n).
    """
    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in like.items()}
    for weight, (_, update) in zip(weights or share(replies), replies, strict=True):
        for name, tensor in total.items():
            tensor.add_(update.tensors[name], alpha=weight)
    return {name: total[name].to(tensor.dtype) for name, tensor in like.items()}


def narrowed(adapter: Tensors, rank: int) -> Tensors:
    """The adapter's first `rank` components: the first columns of B, the first rows of A. 0 takes them all."""
    if not rank:
        return adapter
    return unpair({m: LowRank(product.b[:, :rank], product.a[:rank]) for m, product in pairs(adapter).items()})


def own_width(peer: Peer) -> dict[str, Setting]:
    """The settings that tell a client what its B A is multiplied by, where that is its own."""
    return {"scaling": peer.scaling} if peer.rank else {}


def for_peer(adapter: Tensors, peer: Peer) -> Instruction:
    """The adapter, or as much of it as `peer` takes."""
    return Instruction(narrowed(adapter, peer.rank), own_width(peer))
