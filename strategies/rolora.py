"""RoLoRA: A and B of LoRA adapters trained in turn, a round each, the other frozen and the same for all.

Chen et al. 2024, "Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA",
arXiv:2409.02346.

With p_k = n_k / sum(n) over the clients that replied, and s_k what client k multiplies B A by,

    odd rounds    B = sum_k p_k (s_k / s) pad_r(B_k)        A as it was        B_k: (out, r_k)
    even rounds   A = sum_k p_k pad_r(A_k)                  B as it was        A_k: (r_k, in)

B goes first: it starts at zero, where the gradient of A is zero.

Up: the factor that was trained, bytes per scalar times r_k out a layer in odd rounds, r_k in in even ones.
Down: what has changed since the client's last turn. If that was the round before, it is the other factor, r_k in or
r_k out a layer; after a longer absence or a failed turn it is both; in round 1 nothing, for all know the start.
Exact: B A is linear in the factor that is averaged.
Mixed ranks: yes, exact as well: client k has the first r_k components.
On the client: A and B as it was last sent them, and the number of the round that they are of. It trains the factor that
it was sent the round before, so a broadcast has to come whole: the server couldn't tell what a lossy one left it with.
The steps: clients/rolora.py.
Departs from the paper, which sends the factor that was averaged to all clients, so that all have to be there each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.algebra import factors
from fedtune.lowrank.averaging import average, for_peer, truncate_rank
from fedtune.lowrank.residual import FROM, VERSION
from fedtune.training.apply_instruction import TRAIN


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, of the widest rank
    scaling: float  # s, what the adapter's B A is multiplied by
    changed: dict[str, int] = field(default_factory=dict)  # by role: the last round that changed this factor


@dataclass(frozen=True)
class RoLoRA:
    traits: ClassVar[Traits] = Traits(
        title="RoLoRA", mixed_ranks=True, needs_low_rank=True, averages=True, lossy_down=False
    )

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial), layout.scaling)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        version = max(state.changed.values(), default=0)
        held = peer.base_version if peer.base_version <= version else 0
        lacking = [role for role, changed in state.changed.items() if changed > held]
        if len(lacking) == len(state.changed):
            held = 0  # nothing is built on: all who lack everything are sent the same
        told = for_peer(factors(state.adapter, *lacking), peer, state.scaling)
        return Instruction(told.tensors, {**told.settings, TRAIN: active(round), FROM: held, VERSION: version})

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, truncate_rank(factors(state.adapter, active(round)), peer.rank))

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        trained = average(replies, factors(state.adapter, active(round)), scaling=state.scaling)
        return replace(state, adapter=state.adapter | trained, changed=state.changed | {active(round): round})


def active(round: int) -> str:
    """The factor that is trained in `round`."""
    return "lora_B" if round % 2 else "lora_A"
