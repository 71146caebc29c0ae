"""HetLoRA: LoRA adapters of different ranks, weighted by what they change, whose ranks shrink where they can.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv:2401.06432.

Over the clients k that replied, r being the widest rank and s_k what client k multiplies B A by,

    w_k = ||s_k B_k A_k||_F / sum_i ||s_i B_i A_i||_F
    A = sum_k w_k pad_r(A_k)        B = sum_k w_k (s_k / s) pad_r(B_k)        A_k: (r_k, in)   B_k: (out, r_k)

Client k starts from the first r_k components. With t = floor(gamma r_k), but at most r_k - 1, it adds to its loss

    lam sum_layers ||B[:, t:]||_F ||A[t:, :]||_F

and if after training that sum, the tail, is smaller than in what it received, it keeps max(r_min, t) components, sends
no more than these, and has that rank from then on.

Down and up: A and B of rank r_k of every adapted layer, bytes per scalar times r_k (in + out) a layer; up, also the
rank, as a metric.
Inexact: A and B are averaged apart, padded with zeros, and not by p_k = n_k / sum(n).
Mixed ranks: yes, and they become mixed where they weren't.
On the client: nothing; the server keeps its rank. The steps and the pruning: clients/self_pruning.py.
Departs from the paper, whose code wasn't seen, where it leaves a choice: there is one rank per client, so the tail is
summed over layers; the norm of the weights is that of the whole model (norm="model") or each layer's own ("layer"); the
tail has at least one component, where 0.99 r rounded would leave none up to r = 49; a client at r_min has nothing to
lose and trains without the penalty; s_k stays what it was at the rank before; while all B A are zero, the weights are
p_k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like, share
from fedtune.lowrank.algebra import ROLES, lora_factors, name_of, norm
from fedtune.lowrank.averaging import Replies, average, for_peer, truncate_rank
from fedtune.training.apply_instruction import RANK


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, of the widest rank
    scaling: float  # s, what the adapter's B A is multiplied by
    ranks: dict[str, int] = field(default_factory=dict)  # by index, of the clients that pruned theirs


@dataclass(frozen=True)
class HetLoRA:
    traits: ClassVar[Traits] = Traits(title="HetLoRA", mixed_ranks=True, needs_low_rank=True, averages=True)

    gamma: float = 0.99  # share of the rank that isn't penalised
    lam: float = 1e-3  # of the penalty, in units of the loss
    r_min: int = 1  # no rank is pruned below this
    norm: str = "model"  # a client's weight: from the whole model, or each layer's from that layer

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma={self.gamma}: expected a share of the rank, from 0 to 1")
        if not self.lam >= 0 or self.r_min < 1:
            raise ConfigError(f"lam={self.lam} and r_min={self.r_min}: expected at least 0 and at least 1")
        if self.norm not in ("model", "layer"):
            raise ConfigError(f"norm={self.norm} is not known: expected model or layer")

    def init(self, layout: Layout) -> State:
        if not layout.starts_at_zero:
            raise ConfigError(
                "method=hetlora prunes components of B A, which have to start as nothing: take adapter=lora, "
                "without adapter.path"
            )
        return State(dict(layout.initial), layout.scaling)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        rank = rank_of(state, peer)
        told = for_peer(state.adapter, peer, state.scaling, rank)
        head = self.head(rank)
        return Instruction(
            told.tensors, {**told.settings, RANK: rank, "head": head, "least": self.r_min, "lam": self.lam}
        )

    def head(self, rank: int) -> int:
        """The number t of components in front of the tail."""
        return min(math.floor(self.gamma * rank + 1e-9), rank - 1)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        sent = rank_of(state, peer)
        pruned = min(sent, max(self.r_min, self.head(sent)))
        if (rank := update.metrics.get("rank")) not in (sent, pruned):
            raise WireError(f"it says its rank is {rank}; of rank {sent} it may keep {pruned} or all")
        expect_like(update.tensors, truncate_rank(state.adapter, int(rank)))

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        weights = _weights(replies, state.scaling, self.norm)
        ranks = {str(peer.index): int(update.metrics["rank"]) for peer, update in replies}
        pruned = {str(peer.index) for peer, _ in replies if ranks[str(peer.index)] < rank_of(state, peer)}
        return State(
            average(replies, state.adapter, weights, state.scaling),
            state.scaling,
            state.ranks | {index: ranks[index] for index in sorted(pruned)},
        )


def rank_of(state: State, peer: ClientInfo) -> int:
    """The rank r_k: what pruning left of the rank that the peer's device takes."""
    widest = max(product.rank for product in lora_factors(state.adapter).values())
    return min(peer.rank or widest, state.ranks.get(str(peer.index), widest))


def _weights(replies: Replies, scaling: float, by: str) -> dict[str, list[float]]:
    """w_k of every tensor."""
    norms: dict[str, list[float]] = {}
    for peer, update in replies:
        for module, product in lora_factors(update.tensors).items():
            norms.setdefault(module, []).append((peer.scaling or scaling) * norm(product))
    if by == "model":
        whole = [math.hypot(*layers) for layers in zip(*norms.values(), strict=True)]
        norms = dict.fromkeys(norms, whole)
    return {
        name_of(module, role): [one / sum(each) for one in each] if any(each) else share(replies)
        for module, each in norms.items()
        for role in ROLES
    }
