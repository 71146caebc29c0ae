"""First-order local training of R in W = W0 + s B0 R A0 (strategies/fed_sb.py)."""

from dataclasses import dataclass, replace

from clients.first_order import FirstOrder, proximal
from fedtune.core.protocol import Batches, InSteps, Instruction, Tensors, Update
from fedtune.models.adapted_model import LocalModel
from fedtune.training.apply_instruction import metrics_of
from fedtune.training.frozen_basis import expanded, training_core


@dataclass(frozen=True)
class TrainsCore(FirstOrder):
    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        plain = expanded(instruction.tensors, instruction.settings, model.layout)
        super().receive(model, replace(instruction, tensors=plain), memory)

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        with training_core(model, instruction.tensors) as core:
            loss = yield from self.fit(model, batches, key, proximal(model, self.mu) if self.mu else None)
            return Update(core(), batches.examples, {"train_loss": loss, **metrics_of(model)})
