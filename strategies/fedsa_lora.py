"""FedSA-LoRA: A and B are both trained, but only A is shared; each client's B is its own.

Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv:2410.01463.

With p_k = n_k / sum(n) over the clients that replied,

    A = sum_k p_k A_k        client k's model: W0 + s B_k A        A: (r, in)   B_k: (out, r)

Down and up: A of every adapted layer, bytes per scalar times r in a layer.
There is no global model that this could be exact or inexact for: personal models are evaluated, client by client.
What the run folder exports is A with B as it started, zero, which is what a client that never trained holds.
Mixed ranks: no.
On the client: B, from its last turn. It starts as the layout's, never leaves the client and reaches no other.
The steps: clients/fedsa_lora.py.
Departs from the paper: clients may be sampled; one that comes back meets a newer A with the B that it left with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.algebra import factors
from fedtune.lowrank.averaging import average


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A of every layer


@dataclass(frozen=True)
class FedSALoRA:
    traits: ClassVar[Traits] = Traits(title="FedSA-LoRA", needs_low_rank=True, averages=True, personal=True)

    def init(self, layout: Layout) -> State:
        return State(factors(layout.initial, "lora_A"))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(average(replies, state.adapter))
