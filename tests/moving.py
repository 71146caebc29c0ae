"""A client that always moves by the same, whatever it was sent and whoever it is, for tests.

So what a server makes of its clients' moves can be said beforehand, and depends on no codec.
"""

import zlib
from dataclasses import dataclass

import torch

from clients.first_order import FirstOrder
from fedtune.core.protocol import Update
from fedtune.training.apply_instruction import SCORE, SCORES
from fedtune.training.control_variates import CHANGE, CONTROL

WORDS = ("method.client._target_=moving.Moving",)


def move(name, shape):
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.01 * torch.randn(shape, generator=draw)


@dataclass(frozen=True)
class Moving(FirstOrder):
    beta1: float = 0.0  # FedPipe's
    beta2: float = 0.0

    def receive(self, model, instruction, memory):
        known = model.layout.initial
        model.install({name: tensor for name, tensor in instruction.tensors.items() if name in known})

    def train(self, model, batches, instruction, memory, key):
        tensors = {}
        for name, tensor in instruction.tensors.items():
            if name.startswith(CONTROL):
                tensors[CHANGE + name.removeprefix(CONTROL)] = torch.zeros_like(tensor)
            else:
                tensors[name] = tensor + move(name, tensor.shape)
        if instruction.settings.get(SCORE):  # FedPipe's
            layers = {name.rpartition(".lora_")[0] for name in instruction.tensors}
            tensors[SCORES] = torch.ones(len(layers))
        metrics = {"train_loss": 1.0, "scaling": instruction.settings.get("scaling", model.scaling)}
        if "head" in instruction.settings:  # HetLoRA's
            metrics["rank"] = float(instruction.settings["rank"])
        return Update(tensors, batches.examples, metrics)
