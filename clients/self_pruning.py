"""First-order local training that gives up the adapter's last components where they don't grow (strategies/hetlora.py).

What the server's settings ask for, besides those of clients/first_order.py: `rank`, the adapter's; `head`, how many
components come before the tail; `lam`, the penalty on the tail; `least`, the rank that nothing is pruned below.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.first_order import FirstOrder, proximal
from fedtune.core.protocol import Batches, InSteps, Instruction, Tensors, Update
from fedtune.lowrank.algebra import lora_factors
from fedtune.lowrank.averaging import truncate_rank
from fedtune.models.adapted_model import LocalModel
from fedtune.training.apply_instruction import RANK, metrics_of


@dataclass(frozen=True)
class SelfPruning(FirstOrder):
    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        rank, head, least = (int(instruction.settings[name]) for name in (RANK, "head", "least"))
        lam, pruned = float(instruction.settings["lam"]), max(least, head)
        near = proximal(model, self.mu) if self.mu else None
        if pruned >= rank:
            loss = yield from self.fit(model, batches, key, near)
        else:
            live = model.trained()
            received = tail(live, head).item()

            def penalty() -> Tensor:
                return lam * tail(live, head) + (near() if near else 0)

            loss = yield from self.fit(model, batches, key, penalty)
            if tail(live, head).item() < received:
                rank = pruned
        metrics = {"train_loss": loss, "rank": rank, **metrics_of(model)}
        return Update(truncate_rank(model.read(), rank), batches.examples, metrics)


def tail(adapter: Mapping[str, Tensor], head: int) -> Tensor:
    """What the tail weighs: sum_layers ||B[:, head:]||_F ||A[head:, :]||_F, a function of the factors themselves."""
    norms = [p.b[:, head:].norm() * p.a[head:].norm() for p in lora_factors(dict(adapter)).values()]
    return torch.stack(norms).sum()
