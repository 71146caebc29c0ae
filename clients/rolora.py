"""First-order local training that keeps what it was sent, and is sent what has changed since (strategies/rolora.py).

The client's memory is the adapter as it was last sent, under the tensors' own names, and its version.
"""

from dataclasses import dataclass, replace

from clients.first_order import FirstOrder
from fedtune.core.protocol import Instruction, Tensors
from fedtune.lowrank.residual import FROM, KEPT
from fedtune.models.adapted_model import LocalModel


@dataclass(frozen=True)
class KeepsAdapter(FirstOrder):
    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        if instruction.settings[FROM] == 0:
            memory.clear()
        held = {name: tensor for name, tensor in memory.items() if name != KEPT} | instruction.tensors
        super().receive(model, replace(instruction, tensors=held), memory)
        memory.update(held)
