"""First-order local training: a few optimizer steps on what the server sent, starting fresh each round.

What the server's settings ask for: `train`, the role that is trained while the others stay frozen (as "lora_B");
`rank`, how many components B A has; `scaling`, what it is multiplied by; `version`, a change of the base
(fedtune/lowrank/residual.py).

With mu > 0 the loss has FedProx's proximal term, (mu / 2) |theta - theta_t|^2, where theta_t is what the server sent
(Li et al. 2020, arXiv:1812.06127).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.core.costs import STATE_BYTES, Work
from fedtune.core.protocol import Batches, InSteps, Instruction, Setting, Tensors, Update
from fedtune.models.adapted_model import LocalModel
from fedtune.training.apply_instruction import install, metrics_of
from fedtune.training.first_order import fit
from fedtune.training.schedule import RoundSchedule, by_engine


@dataclass(frozen=True)
class FirstOrder:
    lr: float = 1e-3
    steps: int = 4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mu: float = 0.0  # of the proximal term
    schedule: RoundSchedule | None = by_engine()

    def work(self, settings: Mapping[str, Setting]) -> Work:
        return Work(self.steps, STATE_BYTES.get(self.optimizer, STATE_BYTES["sgd"]))

    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        install(model, instruction, memory)

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        loss = yield from self.fit(model, batches, key, proximal(model, self.mu) if self.mu else None)
        return Update(model.read(), batches.examples, {"train_loss": loss, **metrics_of(model)})

    def fit(
        self,
        model: LocalModel,
        batches: Batches,
        key: int,
        penalty: Callable[[], Tensor] | None,
        watch: Callable[[], None] | None = None,
    ) -> InSteps[float]:
        """The steps themselves, for clients that train in this way and answer in another."""
        return fit(
            model,
            batches,
            steps=self.steps,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            key=key,
            penalty=penalty,
            watch=watch,
            schedule=self.schedule,
        )


def proximal(model: LocalModel, mu: float) -> Callable[[], Tensor]:
    """The term (mu / 2) |theta - theta_t|^2 over the tensors that are trained, theta_t being their values now."""
    live = model.parameters()
    start = [parameter.detach().clone() for parameter in live]

    def penalty() -> Tensor:
        return mu / 2 * torch.stack([(p - s).square().sum() for p, s in zip(live, start, strict=True)]).sum()

    return penalty
