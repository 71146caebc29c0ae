"""SCAFFOLD's local training: plain steps along g + c - c_i, and a new c_i from how far they led.

Option II of the paper: c_i+ = c_i - c + (x - y) / (K lr) is the mean of the K gradients. With max_grad_norm > 0 it is
what is left of them: g + c - c_i is clipped as one, and c_i then misses what was cut. The paper clips nothing. Where
the rate follows a schedule, K lr is the sum of the steps' rates and the mean one weighted by them; where that sum is 0
c_i stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.core.costs import Work
from fedtune.core.protocol import Batches, InSteps, Instruction, Setting, Tensors, Update
from fedtune.models.adapted_model import LocalModel
from fedtune.training.apply_instruction import install, metrics_of
from fedtune.training.control_variates import CHANGE, CONTROL, own_control, settle, tag
from fedtune.training.first_order import fit
from fedtune.training.schedule import RoundSchedule, by_engine


@dataclass(frozen=True)
class Scaffold:
    lr: float = 0.1
    steps: int = 4  # K
    max_grad_norm: float = 0.0  # 0 leaves gradients alone
    schedule: RoundSchedule | None = by_engine()

    def work(self, settings: Mapping[str, Setting]) -> Work:
        return Work(self.steps, state_bytes=16)  # weight, gradient, c and its correction

    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        settle(instruction, memory)
        adapter = {name: tensor for name, tensor in instruction.tensors.items() if not name.startswith(CONTROL)}
        install(model, Instruction(adapter, instruction.settings), memory)

    def train(
        self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> InSteps[Update]:
        x = model.read()
        c = {name: instruction.tensors[CONTROL + name] for name in x}
        mine = own_control(memory, x.items())
        correction = [(c[name] - mine[name]).to(model.device) for name in x]
        live = model.parameters()

        def linear() -> Tensor:  # its gradient is the correction
            return torch.stack([(p * v).sum() for p, v in zip(live, correction, strict=True)]).sum()

        loss = yield from fit(
            model,
            batches,
            steps=self.steps,
            lr=self.lr,
            optimizer="sgd",
            weight_decay=0.0,
            max_grad_norm=self.max_grad_norm,
            key=key,
            penalty=linear,
            schedule=self.schedule,
        )
        y = model.read()
        rates = (self.steps if self.schedule is None else self.schedule.total(self.steps)) * self.lr
        way = {name: (x[name].double() - y[name].double()) / rates if rates else c[name].double() for name in x}
        change = {name: (way[name] - c[name].double()).to(x[name].dtype) for name in x}
        memory.update(tag(CONTROL, mine) | tag(CHANGE, change))
        return Update(y | tag(CHANGE, change), batches.examples, {"train_loss": loss, **metrics_of(model)})
