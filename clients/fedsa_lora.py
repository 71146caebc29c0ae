"""First-order local training that keeps B to itself (strategies/fedsa_lora.py).

The client's memory is its B of every layer, under the tensors' own names.
"""

from dataclasses import dataclass, replace

from clients.first_order import FirstOrder
from fedtune.core.protocol import Batches, InSteps, Instruction, Tensors, Update
from fedtune.lowrank.algebra import factors
from fedtune.models.adapted_model import LocalModel


@dataclass(frozen=True)
class KeepsB(FirstOrder):
    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        super().receive(model, replace(instruction, tensors={**instruction.tensors, **memory}), memory)

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        update = yield from super().train(model, batches, instruction, memory, key)
        memory.update(factors(update.tensors, "lora_B"))
        return replace(update, tensors=factors(update.tensors, "lora_A"))
