"""First-order local training: a few optimizer steps on what the server sent, starting fresh each round."""

from dataclasses import dataclass

from fedtune.adapters import LocalModel
from fedtune.protocol import Batches, Instruction, Tensors, Update
from fedtune.training import fit


@dataclass(frozen=True)
class FirstOrder:
    lr: float = 1e-3
    steps: int = 4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        model.install(instruction.tensors)

    def train(self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int) -> Update:
        loss = fit(
            model,
            batches,
            steps=self.steps,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            key=key,
        )
        return Update(model.read(), batches.examples, {"train_loss": loss})
