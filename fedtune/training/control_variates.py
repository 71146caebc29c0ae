"""Control variates between a server and its clients (SCAFFOLD): how they are named, and when a change to one counts.

A client's change to its own variate counts only if the server folded it into its own: a reply may get lost or be
refused after the client has done its part. So a client keeps the change apart until its next turn, and the server says
which turn of it was the last that counted, unless both know that to be the last one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedtune.core.protocol import Instruction, Tensors
from fedtune.lowrank.residual import base_version

CONTROL = "c/"  # c/NAME: the server's c on its way down, the client's c_i in its memory
CHANGE = "dc/"  # dc/NAME: c_i+ - c_i on its way up, and in the memory until it is known to count
COUNTED = "counted"  # the setting: the round of the client's last turn that counted, 0 if none did


def tag(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors under names that begin with `prefix`."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def settle(instruction: Instruction, memory: Tensors) -> None:
    """Add the change of the last turn to the client's variate if it counted, and forget it if not."""
    mine = base_version(memory)
    counts = instruction.settings.get(COUNTED, mine) == mine
    for name in [name for name in memory if name.startswith(CHANGE)]:
        change, own = memory.pop(name), CONTROL + name.removeprefix(CHANGE)
        if counts:
            memory[own] = memory[own] + change


def own_control(memory: Tensors, like: Iterable[tuple[str, Tensor]]) -> Tensors:
    """The client's c_i, zero where it has none yet."""
    return {name: memory.get(CONTROL + name, torch.zeros_like(tensor)) for name, tensor in like}
