"""Averages of what clients sent, in float64 and in the order of their indices.

Where ranks differ, client k holds the first r_k components of the global B A and is averaged as if its others were
zero. Where alpha / r differs too, its B A counts s_k times and the global one s times; B, and B alone, is carried over:

    down:  (s / s_k) B[:, :r_k] and A[:r_k], so that what the client holds is s B[:, :r_k] A[:r_k]
    up:    (s_k / s) B_k and A_k, so that s times their product is s_k B_k A_k
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedtune.core.protocol import ClientInfo, Instruction, Setting, Tensors, Update, share
from fedtune.core.settings import EngineSetting
from fedtune.lowrank.algebra import ROLES, name_of, role_of

Replies = Sequence[tuple[ClientInfo, Update]]
PORTION_BYTES = 1 << 30  # of updates that are held at a time
Weights = Sequence[float] | Mapping[str, Sequence[float]]


def average(
    replies: Replies, like: Mapping[str, Tensor], weights: Weights | None = None, scaling: float = 0
) -> Tensors:
    """The mean sum_k w_k theta_k of the tensors that `like` names, in their dtypes; narrower ones count as padded with
    zeros.

    Sums run in float64, so that identical updates average to exactly themselves.

    Args:
        weights: one per reply, summing to one, or such for each name; None takes p_k = n_k / sum(n).
        scaling: the global adapter's alpha / r, where clients may have their own.
    """
    weights = weights or share(replies)
    means: Tensors = {}
    sums: Tensors = {}  # of what was passed over, where the updates are too many to be held at once
    for start, portion in _portions(replies):
        last = start + len(portion) == len(replies)
        # Name by name: one sum stays in the processor's cache, where all of them in turn would not
        for name, tensor in like.items():
            total = sums.pop(name) if start else torch.zeros(tensor.shape, dtype=torch.float64)
            own = weights[name] if isinstance(weights, Mapping) else weights
            for place, (peer, update) in enumerate(portion, start):
                part = update.tensors[name]
                into = total if part.shape == total.shape else total[tuple(map(slice, part.shape))]
                into.add_(part, alpha=own[place] * carried(name, peer, scaling))
            if last:
                means[name] = total.to(tensor.dtype)
            else:
                sums[name] = total
    return means


def cast_like(tensors: Tensors, reference: Mapping[str, Tensor]) -> Tensors:
    """The tensors that `reference` names, in its dtypes."""
    return {name: tensors[name].to(tensor.dtype) for name, tensor in reference.items()}


def _portions(replies: Replies) -> Iterator[tuple[int, Replies]]:
    """The replies, as many at a time as take little memory once they are looked up, and the place of the first."""
    start, room = 0, PORTION_BYTES
    held: list[tuple[ClientInfo, Update]] = []
    for place, reply in enumerate(replies):
        size = sum(tensor.nbytes for tensor in reply[1].tensors.values())
        if held and size > room:
            yield start, held
            held.clear()  # it is done with: without this, two portions would be held
            start, room = place, PORTION_BYTES
        held.append(reply)
        room -= size
    yield start, held


def carried(name: str, peer: ClientInfo, scaling: float) -> float:
    """What a tensor of `peer` is multiplied by to stand in the global adapter: s_k / s for B, 1 for all else."""
    return peer.scaling / scaling if role_of(name) == "lora_B" and peer.scaling and scaling else 1.0


def truncate_rank(adapter: Tensors, rank: int) -> Tensors:
    """The adapter's first `rank` components: the first columns of B, the first rows of A. 0 takes them all."""
    return {name: _first(name, tensor, rank) for name, tensor in adapter.items()} if rank else adapter


def own_width(peer: ClientInfo) -> dict[str, Setting]:
    """The settings that tell a client its rank and what its B A is multiplied by, where these are its own."""
    return {EngineSetting.RANK: peer.rank, EngineSetting.SCALING: peer.scaling} if peer.rank else {}


def for_peer(adapter: Tensors, peer: ClientInfo, scaling: float = 0, rank: int = 0) -> Instruction:
    """The adapter, or as much of it as `peer` takes. Peers that take the same are handed the same tensors.

    Args:
        adapter: as the strategy's state holds it: tensors that nobody changes.
        scaling: the adapter's own alpha / r, where the peer's may be another.
        rank: how many components it takes, if not the peer's own number.
    """
    rank = rank or peer.rank
    part = {name: _part(name, tensor, rank, carried(name, peer, scaling)) for name, tensor in adapter.items()}
    return Instruction(adapter if all(part[name] is adapter[name] for name in part) else part, own_width(peer))


def parts(adapter: Tensors, ranks: Mapping[str, int]) -> Tensors:
    """A and B of the layers that `ranks` names, as many components of each as it says. Clients that take the same of a
    layer are handed the same tensors."""
    names = {name_of(module, role): rank for module, rank in ranks.items() for role in ROLES}
    return {name: _part(name, adapter[name], rank, 1.0) for name, rank in names.items()}


# What was cut from a tensor, for as long as it lives: made once for all clients of a rank, it is also encoded once
_parts: MutableMapping[Tensor, dict[tuple[int, float], Tensor]] = WeakTensorKeyDictionary()


def _part(name: str, tensor: Tensor, rank: int, ratio: float) -> Tensor:
    known = _parts.setdefault(tensor, {})
    if (rank, ratio) not in known:
        first = _first(name, tensor, rank) if rank else tensor
        if first is tensor and ratio == 1:
            return tensor  # kept, it would keep itself alive
        known[rank, ratio] = first if ratio == 1 else first / ratio
    return known[rank, ratio]


def _first(name: str, tensor: Tensor, rank: int) -> Tensor:
    match role_of(name):
        case "lora_A" if rank < tensor.shape[0]:
            return tensor[:rank].contiguous()
        case "lora_B" if rank < tensor.shape[1]:
            return tensor[:, :rank].contiguous()
    return tensor
