"""FedSVD: clients train B alone, and after each round the SVD of B A gives all a new orthonormal A.

Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv:2505.12805.

    B' = sum_k p_k B_k        U S V^T = B' A        A <- V_r^T      B <- U_r S_r        A: (r, in)   B_k: (out, r)

Up: B of every adapted layer, bytes per scalar times r out a layer.
Down: A and B, r (in + out) a layer.
Exact: at one A the product is linear in B, and the SVD of a matrix of rank r keeps it whole.
Mixed ranks: no. Clients keep nothing.
The steps: clients/first_order.py. The SVD: fedtune/lowrank/algebra.py.
Where the text is silent: A's first value. Here its rows are orthonormal from the start, those of the layout's A by QR;
B is 0, so the product doesn't change.
Departs from the paper: no noise is added to gradients and none is clipped by example, which is what it is made for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.algebra import LowRank, factors, lora_factors, pad_rank, to_adapter, truncated
from fedtune.lowrank.averaging import average
from fedtune.training.apply_instruction import TRAIN


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, A's rows orthonormal


@dataclass(frozen=True)
class FedSVD:
    traits: ClassVar[Traits] = Traits(title="FedSVD", needs_low_rank=True, lossy_down=False)

    def init(self, layout: Layout) -> State:
        for module, start in lora_factors(layout.initial).items():
            if start.rank > start.a.shape[1]:
                raise ConfigError(
                    f"method=fedsvd: layer '{module}' takes {start.a.shape[1]} numbers, so there are no {start.rank} "
                    f"orthonormal rows: set adapter.rank to {start.a.shape[1]} or less"
                )
        return State(orthonormal(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter, {TRAIN: "lora_B"})

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, factors(state.adapter, "lora_B"))

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(orthonormal(state.adapter | average(replies, factors(state.adapter, "lora_B"))))


def orthonormal(adapter: Tensors) -> Tensors:
    """The same products with orthonormal rows in A."""
    products = {}
    for module, old in lora_factors(adapter).items():
        new = pad_rank(truncated(old, old.rank), old.rank, old.a)
        products[module] = LowRank(new.b.to(old.b.dtype), new.a.to(old.a.dtype))
    return to_adapter(products)
