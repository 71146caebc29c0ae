"""Adapters that begin anew each round and end up in the base: what FLoRA, FLoRIST and the dense oracle share.

    dW* = sum_k p_k s_k B_k A_k = [B_1 B_2 ...] [p_1 s_1 A_1; p_2 s_2 A_2; ...]        of rank sum_k r_k at most

A client's rank r_k and scaling s_k are the population's, or the layout's where all have the same.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Update, expect_like, share
from fedtune.lowrank.algebra import LowRank, lora_factors, name_of, stack
from fedtune.lowrank.averaging import own_width
from fedtune.lowrank.residual import BaseResidual

LAYERS_AT_A_TIME = 4  # each of 4096 x 4096 at a stacked rank of 500 takes some 100 MB meanwhile


@dataclass(frozen=True)
class State:
    merged: BaseResidual  # the sum of all rounds so far, which every party adds to its base
    sizes: dict[str, list[int]]  # (out, in) of each adapted layer
    rank: int  # of clients that have none of their own
    scaling: float  # theirs


def begin(layout: Layout) -> State:
    """Nothing merged yet."""
    start = fresh_layers(layout)
    sizes = {module: [product.b.shape[0], product.a.shape[1]] for module, product in start.items()}
    return State(BaseResidual(), sizes, layout.rank, layout.scaling)


def fresh_layers(layout: Layout) -> dict[str, LowRank]:
    """The layers of an adapter that is to start at B A = 0.

    Raises:
        ConfigError: if it doesn't.
    """
    if not layout.starts_at_zero:
        raise ConfigError(
            "this method begins each round with B = 0, and this adapter begins with something in B A: take "
            "adapter=lora or adapter=rslora, without adapter.path"
        )
    return lora_factors(layout.initial)


def instruct(state: State, peer: ClientInfo) -> Instruction:
    """The merges that this client lacks, and the adapter that it is to begin with."""
    lacking = state.merged.missing_merges(peer.base_version)
    return Instruction(lacking.tensors, {**lacking.settings, **own_width(peer)})


def check_factors(state: State, peer: ClientInfo, update: Update) -> None:
    """Check the factors that a client sent: names, shapes and dtypes.

    Raises:
        WireError: if these are not A and B of every layer at this client's rank.
    """
    rank = peer.rank or state.rank
    expected: Tensors = {}
    for module, (out, width) in state.sizes.items():
        expected[name_of(module, "lora_A")] = torch.empty(rank, width, device="meta")
        expected[name_of(module, "lora_B")] = torch.empty(out, rank, device="meta")
    expect_like(update.tensors, expected)


def stacked(replies: Sequence[tuple[ClientInfo, Update]], scaling: float) -> dict[str, Callable[[], LowRank]]:
    """The exact update dW* of each layer, in float64, once it is asked for.

    Args:
        scaling: s_k of clients that have none of their own.
    """
    held = list(replies)
    weights = [weight * (peer.scaling or scaling) for weight, (peer, _) in zip(share(held), held, strict=True)]
    adapters = [lora_factors(update.tensors) for _, update in held]
    # Sorted: safetensors hands out tensors in another order each time, and a sum over layers keeps the order's bits
    return {
        module: partial(stack, [adapter[module] for adapter in adapters], weights) for module in sorted(adapters[0])
    }


def each_layer(
    ideal: Mapping[str, Callable[[], LowRank]], work: Callable[[str, LowRank], LowRank]
) -> dict[str, LowRank]:
    """What `work` makes of each layer's name and dW*.

    QR of a tall factor gains little from a second thread, so layers are worked on side by side with one thread each.
    The bits are then the same with any number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, LAYERS_AT_A_TIME)) as pool:
            return dict(zip(ideal, pool.map(lambda module: work(module, ideal[module]()), ideal), strict=True))
    finally:
        torch.set_num_threads(threads)
