"""Centralized: a control in which all data is in one place.

No method of a paper's. It is the loop of FedIT (Zhang et al. 2024, arXiv:2305.05644) with a single client that holds
the data of all N, and so plain training, which federated methods try to come near to:

    theta <- cohort x steps optimizer steps on the union of the clients' training data        p_k = 1

A round sees as many examples as a round of the cohort would have seen, batches being full: cohort x steps x batch_size.
The union is exactly the rows that the N clients would train on, and the server's held-out rows are the same too.
Down and up: one client's adapter, bytes per scalar times r (in + out) a layer, which counts what moving the adapter to
the data costs; the data itself was moved for nothing.
Exact: one client's B A as it trained it. One rank. On the client: nothing.
The steps: clients/first_order.py. How the clients become one: `pooled` in the YAML, fedtune/schema.py.
Departs from plain training: the optimizer begins anew in each round, as it does in the federated methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.averaging import average
from fedtune.protocol import Instruction, Layout, Peer, Tensors, Traits, Update, expect_like


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, as trained


@dataclass(frozen=True)
class Centralized:
    traits: ClassVar[Traits] = Traits(averages=True)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: Peer) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: Peer, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[Peer, Update]]) -> State:
        return State(average(replies, state.adapter))
