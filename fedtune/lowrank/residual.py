"""Changes of the base: what a server has merged into it, and how a client comes to hold the same.

Whatever the base is held in (bfloat16, int8, NF4), it stays as it was loaded. What a method merges is carried beside it
as a frozen low-rank residual, W = W0 + B A in float32: rounding W0 + B A to eight bits would lose most of a round's
change. Merges are counted; a client keeps the residual and its version, and is sent the merges that it lacks, or all
of the residual where that is less.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedtune.core.errors import ClientError
from fedtune.core.protocol import Instruction, Setting, Tensors
from fedtune.core.settings import EngineSetting
from fedtune.lowrank.algebra import LowRank, narrowest, stack, truncated_svd

B, A = ".residual_B", ".residual_A"  # MODULE.residual_B (out, R) and MODULE.residual_A (R, in), float32
FROM, VERSION = EngineSetting.BUILDS_ON, EngineSetting.VERSION
KEPT = "version"  # in a client's memory, beside the residual


@dataclass(frozen=True)
class BaseResidual:
    """All that a server has merged."""

    version: int = 0  # how many merges there were
    total: Tensors = field(default_factory=dict)  # the whole residual
    recent: list[Tensors] = field(default_factory=list)  # the last merges, oldest first
    error: float = 0.0  # ||recompressed - total||_F / ||total||_F of the last merge; 0 where nothing was cut

    def merge(self, change: Mapping[str, LowRank], limit: int) -> "BaseResidual":
        """One merge more.

        Args:
            change: what is added to the base, by module.
            limit: the residual's rank. When stacking passes twice as much, it is cut back to this by SVD, and every
                client is sent it whole: so it happens once in a while, and all hold the same bits.
        """
        increment = as_residual({module: narrowest(product) for module, product in change.items()})
        version = self.version + 1
        held, added = from_residual(self.total), from_residual(increment)
        if max((_width(module, held, added) for module in held | added), default=0) <= 2 * limit:
            total = joined([self.total, increment])
            recent = [*self.recent, increment]
            while len(recent) > 1 and sum(map(size_of, recent)) > size_of(total):
                recent = recent[1:]  # who lacks more than these is better off with the whole
            return BaseResidual(version, total, recent, 0.0)
        cut: dict[str, LowRank] = {}
        lost = whole = 0.0
        for module in sorted(held | added):  # the error's last bits depend on the order
            product = stack([part[module] for part in (held, added) if module in part])
            best, s = truncated_svd(product, lambda s: min(limit, len(s)))
            cut[module] = LowRank(best.b.float(), best.a.float())
            lost += float(s[best.rank :].square().sum())
            whole += float(s.square().sum())
        return BaseResidual(version, as_residual(cut), [], math.sqrt(lost / whole) if whole else 0.0)

    def missing_merges(self, installed: int) -> Instruction:
        """What brings a client that holds version `installed` (0: the plain base) up to date."""
        behind = self.version - installed
        settings: dict[str, Setting] = {FROM: installed, VERSION: self.version}
        if behind == 0:
            return Instruction({}, settings)
        if 0 < behind <= len(self.recent):
            merges = self.recent[-behind:]
            if sum(map(size_of, merges)) <= size_of(self.total):
                first = self.version - behind + 1
                return Instruction(
                    {f"{name}.{first + place}": t for place, merge in enumerate(merges) for name, t in merge.items()},
                    settings,
                )
        return Instruction(
            {f"{name}.{self.version}": tensor for name, tensor in self.total.items()}, {**settings, FROM: 0}
        )


def as_residual(products: Mapping[str, LowRank]) -> Tensors:
    """Products by module as named float32 tensors."""
    tensors: Tensors = {}
    for module, product in products.items():
        tensors[module + B] = product.b.float().contiguous()
        tensors[module + A] = product.a.float().contiguous()
    return tensors


def from_residual(residual: Tensors) -> dict[str, LowRank]:
    """The inverse of `as_residual`."""
    return {
        name.removesuffix(B): LowRank(tensor, residual[name.removesuffix(B) + A])
        for name, tensor in residual.items()
        if name.endswith(B)
    }


def joined(residuals: list[Tensors]) -> Tensors:
    """The sum of residuals, as one: their factors end to end."""
    parts = [part for part in residuals if part]
    if len(parts) < 2:
        return dict(parts[0]) if parts else {}
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.cat([part[name] for part in parts if name in part], 1 if name.endswith(B) else 0) for name in names
    }


def size_of(residual: Tensors) -> int:
    """How many numbers it takes."""
    return sum(tensor.numel() for tensor in residual.values())


def update_residual(instruction: Instruction, memory: Tensors) -> tuple[Tensors, Tensors]:
    """What a client holds merged after an instruction, which it also keeps in `memory`.

    Returns:
        residual: the whole of it.
        rest: the instruction's other tensors.

    Raises:
        ClientError: if the merges build on others than those that this client holds.
    """
    held = {name: tensor for name, tensor in memory.items() if name.endswith((A, B))}
    if VERSION not in instruction.settings:
        return held, instruction.tensors
    base, version = int(instruction.settings[FROM]), int(instruction.settings[VERSION])
    mine = base_version(memory)
    if base not in (0, mine):
        raise ClientError(f"the server's merges build on version {base} of the base; this client holds {mine}")
    merges: dict[int, Tensors] = {}
    rest: Tensors = {}
    for name, tensor in instruction.tensors.items():
        stem, _, number = name.rpartition(".")
        if stem.endswith((A, B)) and number.isdecimal():
            merges.setdefault(int(number), {})[stem] = tensor
        else:
            rest[name] = tensor
    residual = joined([held if base else {}, *(merges[number] for number in sorted(merges))])
    for name in held:
        del memory[name]
    memory.update(residual)
    memory[KEPT] = torch.tensor(version)
    return residual, rest


def base_version(memory: Tensors) -> int:
    """The version of the base that a client with this memory holds; 0 is the base as loaded."""
    return int(memory[KEPT]) if KEPT in memory else 0


def _width(module: str, *residuals: Mapping[str, LowRank]) -> int:
    """The inner width of one module in the sum of the residuals."""
    return sum(residual[module].rank for residual in residuals if module in residual)
