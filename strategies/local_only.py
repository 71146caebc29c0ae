"""Local only: a control in which nobody talks to anybody.

No method of a paper's. What it lacks is the server's average of federated averaging (McMahan et al. 2017,
arXiv:1602.05629): a method that isn't better than this, client by client, gives its clients no reason to take part.

    theta_k <- steps on client k's own data from its own theta_k        theta = sum_k p_k theta_k is never formed

Every client begins with the same fresh adapter, keeps its own, and goes on with it whenever it is drawn.
Down and up: no tensors at all, only the message that a turn is due and its metrics.
Exact or not: there is no aggregate to be near to. Ranks may differ: a client of rank r_k begins with the first r_k
components of the common start.
On the client: its adapter. The model is evaluated there, each on its client's own held-out data (clients.csv); of the
server's held-out data it says nothing, and the adapter that the run folder exports is the untouched start.
The steps: clients/local_only.py.
Departs from training each client alone in one go: a cohort is drawn each round and the optimizer begins anew in each,
as in the federated methods, so that the two differ in nothing but the average.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.averaging import own_width
from fedtune.training.apply_instruction import RANK


@dataclass(frozen=True)
class State:
    start: Tensors  # what everybody began with; there is nothing else that the server could know


@dataclass(frozen=True)
class LocalOnly:
    traits: ClassVar[Traits] = Traits(title="Local only", control=True, mixed_ranks=True, personal=True)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction({}, {RANK: peer.rank, **own_width(peer)})

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, {})

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return state
