"""FedKSeed: full-parameter tuning whose messages are K numbers.

Qin et al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes", arXiv:2312.06353; https://github.com/alibaba/FederatedScope/tree/FedKSeed.

Every party holds the base w0 and can make direction z_j from (pool_seed, j), j < K, so that the global model is

    w = w0 - lr sum_j G_j z_j        G_j += sum_k p_k sum_{t: j_t = j} g_kt        p_k = n_k / sum(n)

where g_kt is the slope that client k met at its step t, along the direction j_t that it drew from all K.

Down: G, at most 4 K bytes; seeds never travel.
Up: the directions that it went along and how far, at most min(steps, K) times log2(K) bits and 4 bytes.
Exact: the mean of the clients' weights is w with the mean of their slopes, up to the rounding of G to whole quanta.
On the client: nothing by name. A process that stays adds what changed in G, where that is less than all of it.
The steps: fedtune/training/zeroth_order.py. Directions and weights: fedtune/random_directions/hash_noise.py,
fedtune/random_directions/weights.py.
Departs from the authors' code: noise is a counter-based hash (theirs is the device's own, so that a CPU and a GPU
disagree); slopes are whole multiples of a quantum of 2^-16 or less; no weight decay, which would make w depend on the
order of the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.core.checks import at_least
from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, share
from fedtune.core.settings import told
from fedtune.training.zeroth_order import Rules, check_counts, check_length


@dataclass(frozen=True)
class State:
    slopes: Tensor  # G: (K,) float64, in quanta


@dataclass(frozen=True)
class FedKSeed:
    traits: ClassVar[Traits] = Traits(
        title="FedKSeed", lossy_up=False, lossy_down=False, local_steps="rules.local_steps", learning_rate="rules.lr"
    )

    rules: Rules
    directions: int = 4096  # K

    def __post_init__(self) -> None:
        at_least("method.strategy.directions", self.directions, 1)

    def init(self, layout: Layout) -> State:
        return State(torch.zeros(self.directions, dtype=torch.float64))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction({"slopes": state.slopes.round().int()}, told(self.rules))

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        check_steps(update, self.directions, self.rules)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        slopes = state.slopes.clone()
        for weight, (_, update) in zip(share(replies), replies, strict=True):
            slopes.index_add_(0, update.tensors["index"].long(), weight * update.tensors["slopes"].double())
        self.rules.space.check(slopes.numpy())
        return State(slopes)


def check_steps(update: Update, directions: int, rules: Rules) -> None:
    """Check the steps that a client says it took.

    Raises:
        WireError: if these are not (n,) directions of the pool and as many slopes, n at most what a client measures.
    """
    if update.tensors.keys() != {"index", "slopes"}:
        raise WireError(f"expected the tensors 'index' and 'slopes', got {sorted(update.tensors)[:5]}")
    index = update.tensors["index"]
    if index.dtype != torch.int32 or index.dim() != 1 or len(index) > rules.slopes:
        raise WireError(f"tensor 'index': expected int32 of at most {rules.slopes}, got {tuple(index.shape)}")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < directions:
        wrong = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise WireError(f"direction {wrong} is not in the pool: expected 0 ... {directions - 1}")
    check_counts("slopes", update.tensors["slopes"], tuple(index.shape), rules.space)
    check_length("slopes", update.tensors["slopes"], rules.space)
