"""Rows that a server adds to and clients catch up on: all of them make the model, so each keeps what it has and is sent
the rest.

The tensors grow along their first dimension, all alike. How many rows a client holds is its version, as that of a
changed base is in fedtune/lowrank/residual.py.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.core.errors import ClientError
from fedtune.core.protocol import ClientInfo, Instruction, Setting, Tensors
from fedtune.lowrank.residual import FROM, KEPT, VERSION, base_version


def missing_merges(rows: Mapping[str, Tensor], peer: ClientInfo, settings: Mapping[str, Setting]) -> Instruction:
    """The rows that `peer` hasn't got, or all where it claims more than there are: those of a run that was resumed."""
    done = len(next(iter(rows.values())))
    known = peer.base_version if peer.base_version <= done else 0
    missed = {name: tensor[known:] for name, tensor in rows.items()}
    return Instruction(missed, {**settings, FROM: known, VERSION: done})


def caught_up(instruction: Instruction, memory: Tensors, names: Sequence[str], one: str, many: str) -> Tensors:
    """All rows, which the client also keeps in `memory`.

    Args:
        one, many: what messages call a row, and several.

    Raises:
        ClientError: if what was sent goes on from other rows than those that this client holds.
    """
    base, version = int(instruction.settings[FROM]), int(instruction.settings[VERSION])
    if base not in (0, mine := base_version(memory)):
        raise ClientError(f"the server's numbers go on from {one} {base}; this client knows {mine} {many}")
    new = {name: instruction.tensors[name] for name in names}
    known = {name: torch.cat([memory[name], tensor]) if base else tensor for name, tensor in new.items()}
    if wrong := [name for name, tensor in known.items() if len(tensor) != version]:
        raise ClientError(f"the server's '{wrong[0]}' is of {len(known[wrong[0]])} {many}, expected {version}")
    memory.update(known)
    memory[KEPT] = torch.tensor(version)
    return known
