"""raFLoRA: each rank component of LoRA adapters averaged over those clients that have it.

Wu et al. 2026, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
arXiv:2602.13486. The same weights: "RB-LoRA", Ha et al., Findings of EACL 2026, https://github.com/seonha01/rb-lora
(no arXiv id known here); "RBLA", Chen et al. 2024, arXiv:2408.08699, on the factors.

With p_k = n_k / sum(n) over the clients that replied, and c_j = sum of p_k over those of them with r_k >= j,

    dW = sum_j 1/c_j sum_{k: r_k >= j} p_k s_k B_k[:, j] A_k[j, :]        B_k: (out, r_k)   A_k: (r_k, in)

so that a component which few clients train isn't drawn towards zero by the others, as in zero-padding. A component that
none of them trained, c_j = 0, stays as it was. Then either

    form="product"  B A = dW / s cut to the widest rank r by SVD, A with orthonormal rows (raFLoRA, RB-LoRA)
    form="factors"  B[:, j] and A[j, :] are each averaged with the weights p_k / c_j, B_k as (s_k / s) B_k (RBLA)

and client k starts from the first r_k components of B A.

Down and up: A and B of rank r_k of every adapted layer, bytes per scalar times r_k (in + out) a layer.
Inexact on purpose: dW is not sum_k p_k s_k B_k A_k unless all ranks are equal, and the SVD, or averaging the factors
apart, loses more.
Mixed ranks: yes. With equal ranks, "product" is FlexLoRA and "factors" is FedIT.
The steps: clients/first_order.py. The algebra: fedtune/lowrank/algebra.py; dW is never formed.
Departs from the papers, of which the abstracts and RB-LoRA's code were seen: components one by one rather than in
blocks between the ranks that occur, which comes to the same; the SVD's singular values go into B alone, where A keeps
its scale from round to round; what nobody trained is kept rather than dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like, share
from fedtune.lowrank.algebra import LowRank, lora_factors, name_of, stack, to_adapter, truncated
from fedtune.lowrank.averaging import average, carried, cast_like, for_peer, truncate_rank


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, of the widest rank
    scaling: float  # s, what the adapter's B A is multiplied by


@dataclass(frozen=True)
class RaFLoRA:
    traits: ClassVar[Traits] = Traits(title="raFLoRA", mixed_ranks=True, needs_low_rank=True)

    form: str = "product"  # what is averaged: the product B A, or its factors apart

    def __post_init__(self) -> None:
        if self.form not in ("product", "factors"):
            raise ConfigError(f"form={self.form} is not known: expected product or factors")

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial), layout.scaling)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return for_peer(state.adapter, peer, state.scaling)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, truncate_rank(state.adapter, peer.rank))

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        old = lora_factors(state.adapter)
        width = {module: product.rank for module, product in old.items()}
        covered = {module: torch.zeros(rank, dtype=torch.float64) for module, rank in width.items()}
        for weight, (peer, _) in zip(share(replies), replies, strict=True):
            for module, rank in width.items():
                covered[module][: peer.rank or rank] += weight  # c_j
        if self.form == "factors":
            mean = lora_factors(
                average(replies, {n: t.double() for n, t in state.adapter.items()}, scaling=state.scaling)
            )
            new = {module: _spread(old[module], mean[module], covered[module]) for module in old}
            return State(cast_like(to_adapter(new), state.adapter), state.scaling)
        terms: dict[str, list[LowRank]] = {module: [] for module in old}
        for weight, (peer, update) in zip(share(replies), replies, strict=True):
            for module, product in lora_factors(update.tensors).items():
                ratio = carried(name_of(module, "lora_B"), peer, state.scaling)
                part = weight * ratio / covered[module][: product.rank]
                terms[module].append(LowRank(product.b.double(), product.a.double() * part[:, None]))
        for module, product in old.items():
            kept = covered[module] == 0
            terms[module].append(LowRank(product.b[:, kept], product.a[kept]))
        new = {module: truncated(stack(terms[module]), width[module]) for module in old}
        return State(cast_like(to_adapter(new), state.adapter), state.scaling)


def _spread(old: LowRank, mean: LowRank, covered: Tensor) -> LowRank:
    """The padded mean with each component over its own weight, and the old where that is zero."""
    trained = covered > 0
    over = torch.where(trained, covered, 1.0)
    b = torch.where(trained, mean.b / over, old.b.double())
    return LowRank(b, torch.where(trained[:, None], mean.a / over[:, None], old.a.double()))
