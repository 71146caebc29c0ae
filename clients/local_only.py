"""Training alone: first-order steps from where this client's last turn ended, with an answer that holds no tensors."""

from dataclasses import dataclass

from clients.first_order import FirstOrder
from fedtune.core.protocol import Batches, InSteps, Instruction, Tensors, Update
from fedtune.lowrank.averaging import truncate_rank
from fedtune.models.adapted_model import LocalModel
from fedtune.training.apply_instruction import RANK, install


@dataclass(frozen=True)
class LocalOnly(FirstOrder):
    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        own = memory or truncate_rank(model.layout.initial, int(instruction.settings[RANK]))
        install(model, Instruction(own, instruction.settings), {})

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        update = yield from super().train(model, batches, instruction, memory, key)
        memory.update(update.tensors)
        return Update({}, update.examples, update.metrics)
