"""FedEx-LoRA: FedIT's average, and what that misses goes into everybody's base.

Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
arXiv:2410.09432.

    A = sum_k p_k A_k        B = sum_k p_k B_k        A_k: (r, in)   B_k: (out, r)   s = alpha / r
    W <- W + s (sum_k p_k B_k A_k - B A) = W + s sum_{k<N} p_k (B_k - B)(A_k - A_N)

Up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Down: as much, and the residual as factors of rank (N - 1) r, never more than min(in, out), for N replies; to a client
that missed rounds, all residuals that it lacks.
Exact: W + s B A is the base before the round plus dW* = s sum_k p_k B_k A_k. The residual is kept beside the base, so a
quantized base takes it up too; when its rank passes twice `residual_rank`, it is cut back to that and sent whole:
metrics.csv has what this loses as merge_error.
Mixed ranks: no, factors of unlike shapes have no average. A client keeps the residual and its version.
The steps: clients/first_order.py. The residual: fedtune/lowrank/residual.py.
Departs from the authors' code: the residual is sent as factors rather than as a matrix, and added beside the weights
rather than into them. Weights p_k = n_k / sum(n); the paper's are equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune.core.checks import at_least
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like, share
from fedtune.lowrank.algebra import LowRank, lora_factors, stack
from fedtune.lowrank.averaging import average
from fedtune.lowrank.residual import BaseResidual


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, averaged
    merged: BaseResidual  # the sum of all residuals so far, which every party adds to its base
    scaling: float


@dataclass(frozen=True)
class FedExLoRA:
    traits: ClassVar[Traits] = Traits(title="FedEx-LoRA", needs_low_rank=True, lossy_down=False)

    residual_rank: int = 256  # what is merged is cut back to this rank when it passes twice as much

    def __post_init__(self) -> None:
        at_least("method.strategy.residual_rank", self.residual_rank, 1)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial), BaseResidual(), layout.scaling)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        lacking = state.merged.missing_merges(peer.base_version)
        return Instruction({**state.adapter, **lacking.tensors}, lacking.settings)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        held = list(replies)
        adapter = average(held, state.adapter)
        if len(held) == 1:
            return replace(state, adapter=adapter)
        weights = [weight * state.scaling for weight in share(held)]
        means, sent = lora_factors(adapter), [lora_factors(update.tensors) for _, update in held]
        change = {}
        for module, mean in means.items():
            residual = spread([adapter[module] for adapter in sent], mean, weights)
            change[module] = LowRank(residual.b.float(), residual.a.float())
        return replace(state, adapter=adapter, merged=state.merged.merge(change, self.residual_rank))


def spread(terms: Sequence[LowRank], mean: LowRank, weights: Sequence[float]) -> LowRank:
    """The sum over k < N of w_k (B_k - B)(A_k - A_N), in float64.

    With sum_k w_k (B_k - B) = 0, the last term is nothing, whatever is taken from every A_k.
    """
    last = terms[-1].a.double()
    return stack([LowRank(t.b.double() - mean.b, t.a.double() - last) for t in terms[:-1]], weights[:-1])
