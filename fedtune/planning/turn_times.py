"""What a client's local update takes on its device, and when it was."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.core.costs import Costs, Weight, Work, at_once
from fedtune.core.protocol import Instruction
from fedtune.lowrank.algebra import lora_factors
from fedtune.models.adapted_model import LocalModel
from fedtune.training.apply_instruction import RANK, TRAIN


@dataclass(frozen=True)
class Turn:
    """What one client's turn takes on its device."""

    device: str
    down_bytes: float
    download: float  # seconds
    compute: float
    up_bytes: float
    upload: float
    memory_bytes: float
    limit_bytes: float  # what the device has
    bits: int
    batch_size: int
    steps: int
    layers: int
    trainable_params: int  # that it trains

    @property
    def seconds(self) -> float:
        return self.download + self.compute + self.upload


@dataclass(frozen=True)
class Timed:
    """A turn as the clock saw it: a line of clock.csv."""

    client: int
    turn: Turn
    begun: float  # what the clock showed when the client was asked
    staleness: int = 0  # updates of the server's since then
    excluded_reason: str = ""  # why its update isn't part of the round; empty if it is


@dataclass(frozen=True)
class Trained:
    """What of a model a client trains."""

    ranks: Mapping[str, int]  # by layer; 0 where what is trained has none
    numbers: int
    block: int  # the lowest
    per_token: float  # bytes that LoRA keeps


def trained_of(
    model: LocalModel,
    weights: Mapping[str, Weight],
    costs: Costs,
    told: Instruction,
    rank: int = 0,
    partial: bool = False,
) -> Trained:
    """What a client trains that is told this.

    Args:
        weights: the layers that have a LoRA adapter, by name.
        rank: the client's own, where it isn't told one; 0: the layout's.
        partial: whether it trains what it is sent, and no other layer.
    """
    layout = model.layout
    if not layout.is_low_rank:
        return Trained({slot.module: 0 for slot in layout.slots}, model.trainable, 0, 0.0)
    if partial:
        ranks = {module: product.rank for module, product in lora_factors(told.tensors).items()}
    else:
        ranks = dict.fromkeys(weights, int(told.settings.get(RANK, 0)) or rank or layout.rank)
    of = [(weights[module], rank) for module, rank in ranks.items()]
    # A's gradient needs the layer's input, B's what A makes of it
    only = told.settings.get(TRAIN)
    a, b = only != "lora_B", only != "lora_A"
    numbers = sum(rank * (a * weight.columns + b * weight.rows) for weight, rank in of)
    per_token = sum(a * costs.input_bytes * weight.columns + b * costs.inner_bytes * rank for weight, rank in of)
    return Trained(ranks, numbers, min((weight.block for weight, _ in of), default=0), per_token)


def memory_of(costs: Costs, work: Work, trained: Trained, batch: int, micro_batch: int, bits: int) -> float:
    """Bytes that a turn takes.

    Args:
        micro_batch: examples of a batch that go through the model at a time; 0: all of them.
    """
    held = at_once(batch, micro_batch)
    if work.backward:
        return float(costs.memory(held, bits, trained.block, trained.numbers, trained.per_token, work.state_bytes))
    forward = costs.base_bytes[str(bits)] + costs.fixed_bytes + held * costs.head_bytes
    return forward + work.state_bytes * trained.numbers
