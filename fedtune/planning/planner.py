"""What each device is asked to do: its batch size b, the bits q of its base, and the ranks of the weights it adapts.

FedPipe (Fang et al., 2024, arXiv 2404.06448) gives each edge server the adapters, batch size and bits that its memory
and its share of a round's time allow. It is reconstructed here, since there is no code of the authors'. With ranks r_j
of the adapted weights j, l the lowest block of them, and what fedtune/core/costs.py has measured:

    P = sum r_j (rows_j + columns_j)                              trainable numbers
    T = sum (input_bytes columns_j + inner_bytes r_j)             bytes per token that LoRA keeps
    transfer = (wire_bytes + wire_bytes_per_number P) (1 / down_bytes_per_s + 1 / up_bytes_per_s)

and memory and compute are those of fedtune/core/costs.py.

A plan is feasible if memory <= memory_bytes and compute + transfer <= deadline. Each device gets the feasible plan of
the largest value (fedtune/planning/knapsack.py); of those the largest b, then the largest q, then the least P. A
smaller b is
never worse, and of two values that differ at all the larger one wins, whatever b. Value never falls when any of a
device's limits but `max_rank` rises: all devices with the same ranks on offer choose from the same selections, and
every operation above, as it is rounded, is monotone in the limits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fedtune.core.costs import Costs, Weight, at_once
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import DeviceProfile
from fedtune.core.text import size
from fedtune.planning.knapsack import Floats, Ints, Run, Selections, expect_ranks

ROUNDING = 1e-9  # of the slopes along which ladders were built


@dataclass(frozen=True)
class Rules:
    """What is on offer to every device, and what holds for all of them.

    Raises:
        ConfigError: naming the rule that is out of range.
    """

    ranks: list[int]  # ascending
    batches: list[int]  # sizes
    bits: list[int]  # of the frozen base
    steps: int  # of training in a round
    deadline: float  # seconds of a round; inf: none
    state_bytes: float = 16  # per trainable number: float32 weight, gradient and AdamW's two moments; 8 for SGD
    wire_bytes_per_number: float = 4
    wire_bytes: float = 0  # of a message, whatever it holds
    micro_batch: int = 0  # examples of a batch that go through the model at a time; 0: all of them

    def __post_init__(self) -> None:
        expect_ranks(self.ranks)
        for name, offered in (("batches", self.batches), ("bits", self.bits), ("steps", [self.steps])):
            if not offered or not all(isinstance(each, int) and each > 0 for each in offered):
                raise ConfigError(f"{name} should be whole numbers above 0, got {getattr(self, name)}")
        if not self.deadline > 0:
            raise ConfigError(f"deadline should be a number of seconds above 0, or inf for none, got {self.deadline}")
        for name in ("state_bytes", "wire_bytes_per_number", "wire_bytes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} should be a number of bytes from 0, got {getattr(self, name)}")

    def at_once(self, batch: int) -> int:
        """Examples of such a batch whose activations are in memory at a time."""
        return at_once(batch, self.micro_batch)

    def message(self, parameters: Any) -> Any:
        """Bytes of a message that holds so many numbers."""
        return self.wire_bytes + self.wire_bytes_per_number * parameters


@dataclass(frozen=True)
class Plan:
    """What one device is asked to do, and what that takes."""

    batch_size: int
    bits: int
    ranks: dict[str, int]  # of the adapted weights
    value: float
    memory_bytes: float
    parameters: int  # P
    block: int  # l


def plan(
    selections: Selections,
    costs: Costs,
    weights: Sequence[Weight],
    rules: Rules,
    capabilities: Sequence[DeviceProfile],
) -> list[Plan | str]:
    """A plan for each device, or why it can take no part.

    Args:
        selections: of these weights and `rules.ranks`, with the bytes per token of `costs`.

    Raises:
        ConfigError: if these were made for other weights, ranks or bytes, or `costs` lacks a block or bits.

    One weight in one block, W of 30 x 20, with ranks 1 or 2 on offer, worth 5 and 6:

        P = 50 r, T = 4 * 20 + 4 r bytes per token
        memory = 1000 + 100 + b (400 + 100 + 10 T) + 16 P, at 16 bits and 10 tokens
               = 1100 + b (1300 + 40 r) + 800 r
               = 3240 at b = 1, r = 1;    4080 at b = 1, r = 2;    4580 at b = 2, r = 1;    5460 at b = 2, r = 2
        compute = steps b (2000 + 1000 + 6 * 5 * 50 r) / 1e4, with 5 typical tokens, at 1e4 flop per second
                = 2 * 1 * 6000 / 1e4 = 1.2 s at b = 1, r = 2;     2.4 s at b = 2, r = 2
        transfer = 4 * 100 (1 / 1000 + 1 / 500) = 1.2 s at r = 2

    with nothing to wait for when reading weights. A device of 5000 bytes takes rank 2, worth more than b = 2 with rank
    1: 4080 bytes, 2.4 s. With 6000 bytes it is b = 2, if the deadline leaves it 3.6 s.
    """
    _check(selections, costs, weights, rules)
    answers: dict[DeviceProfile, Plan | str] = {}
    distinct = list(dict.fromkeys(capabilities))
    for count in range(len(rules.ranks) + 1):  # of the ranks that a device can train
        of = [one for one in distinct if one.backprop and sum(rank <= one.max_rank for rank in rules.ranks) == count]
        if of and count:
            offered = selections.within(rules.ranks[count - 1])
            assert offered is not None
            answers |= zip(of, _plan(offered, costs, rules, of), strict=True)
    for one in distinct:
        if not one.backprop:
            answers[one] = "can compute forward only, and adapters are trained with gradients"
        elif one not in answers:
            answers[one] = f"trains ranks up to {one.max_rank:g}, and the smallest on offer is {rules.ranks[0]}"
    return [answers[one] for one in capabilities]


def _plan(selections: Selections, costs: Costs, rules: Rules, devices: Sequence[DeviceProfile]) -> Iterator[Plan | str]:
    for device, value in zip(devices, _best_values(selections, costs, rules, devices).tolist(), strict=True):
        if value < 0:
            yield _reason(selections, costs, rules, device)
        else:
            yield _first(selections, costs, rules, device, selections.worth(value))


def _best_values(selections: Selections, costs: Costs, rules: Rules, devices: Sequence[DeviceProfile]) -> Floats:
    """[device] the largest value of any feasible plan; -1 where none is. The smallest b has it."""
    batch = min(rules.batches)
    # Bits that take no less memory and no less time than others have no value of their own
    takes = {(costs.base_bytes[str(bits)], costs.slowdown[str(bits)]): bits for bits in rules.bits}
    offered = [
        bits
        for (size, time), bits in takes.items()
        if not any(less <= size and faster <= time for less, faster in takes.keys() - {(size, time)})
    ]
    memory_bytes = np.array([device.memory_bytes for device in devices], np.float64)
    best = np.full(len(devices), -1.0)
    blocks = sorted({run.block for run in selections.runs})
    limits = {
        (block, bits): _most_parameters(selections, costs, rules, devices, batch, bits, block)
        for block in blocks
        for bits in offered
    }
    bounds = {key: np.full(len(devices), np.inf) for key in limits}
    for run in sorted(selections.runs, key=lambda run: run.ladder < 0):  # ladders have bounds, and spare the rest work
        part = slice(run.start, run.stop)
        parameters, value = selections.parameters[part], selections.value[part]
        for bits in offered:
            limit, bound = limits[run.block, bits], bounds[run.block, bits]
            open_to = (best < np.minimum(bound, value.max())) & (limit >= parameters.min())
            if not open_to.any():
                continue
            memory = costs.memory(
                rules.at_once(batch), bits, run.block, parameters, selections.per_token_bytes[part], rules.state_bytes
            )
            able = np.flatnonzero(open_to & (memory_bytes >= memory.min()))
            if len(able):
                found, most = _best_of(run, parameters, memory, value, limit[able], memory_bytes[able])
                best[able] = np.maximum(best[able], found)
                # Were T any dearer, P would be counted as less than the memory that it takes
                if run.price * rules.state_bytes <= rules.at_once(batch) * costs.tokens:
                    bound[able] = np.minimum(bound[able], most)
    return best


def _best_of(
    run: Run, parameters: Floats, memory: Floats, value: Floats, most_parameters: Floats, most_memory: Floats
) -> tuple[Floats, Floats]:
    """[device] the best value within two limits, -1 where there is none; and what no selection of the block exceeds."""
    if run.ladder >= 0:
        by_parameters = np.searchsorted(parameters, most_parameters, "right")
        by_memory = np.searchsorted(memory, most_memory, "right")
        rungs = np.minimum(by_parameters, by_memory)
        # The first rung beyond both limits costs more than any selection within them, and is the best at its cost
        beyond = np.clip(np.maximum(by_parameters, by_memory), run.moved, len(value) - 1)
        return np.where(rungs > 0, value[rungs - 1], -1.0), value[beyond] * (1 + ROUNDING)
    fits = (parameters <= most_parameters[:, None]) & (memory <= most_memory[:, None])
    first = fits.argmax(axis=1)  # the best come first
    return np.where(fits[np.arange(len(first)), first], value[first], -1.0), np.full(len(first), np.inf)


def _most_parameters(
    selections: Selections,
    costs: Costs,
    rules: Rules,
    devices: Sequence[DeviceProfile],
    batch: int,
    bits: int,
    block: int,
) -> Floats:
    """[device] the largest P that meets the deadline; 0 if none does. Bisected, so that it is what the equations
    say to the last bit."""
    speeds = np.array([device.flop_per_s for device in devices], np.float64)
    reads = np.array([device.read_bytes_per_s for device in devices], np.float64)
    links = np.array([_seconds_per_byte(device) for device in devices], np.float64)
    low = np.zeros(len(devices))
    high = np.full(len(devices), selections.parameters.max() + 1)
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        seconds = costs.compute(batch, bits, rules.steps, block, middle, speeds, reads, rules.micro_batch)
        meets = seconds + rules.message(middle) * links <= rules.deadline
        low, high = np.where(meets, middle, low), np.where(meets, high, middle)
    return low


def _first(selections: Selections, costs: Costs, rules: Rules, device: DeviceProfile, equal: Ints) -> Plan:
    """Of selections of equal value, one of which is feasible: the largest b, then q, then the least P."""
    block, parameters = selections.block[equal], selections.parameters[equal]
    per_token = selections.per_token_bytes[equal]
    transfer = rules.message(parameters) * _seconds_per_byte(device)
    for batch in sorted(rules.batches, reverse=True):
        for bits in sorted(rules.bits, reverse=True):
            memory = costs.memory(rules.at_once(batch), bits, block, parameters, per_token, rules.state_bytes)
            compute = _compute(costs, rules, batch, bits, block, parameters, device)
            fits = (memory <= device.memory_bytes) & (compute + transfer <= rules.deadline)
            if fits.any():
                i = int(np.where(fits, parameters, np.inf).argmin())
                return Plan(
                    batch_size=batch,
                    bits=bits,
                    ranks=selections.ranks_of(int(equal[i])),
                    value=float(selections.value[equal[i]]),
                    memory_bytes=float(memory[i]),
                    parameters=int(parameters[i]),
                    block=int(block[i]),
                )
    raise AssertionError("the value was found feasible a moment ago")


def _reason(selections: Selections, costs: Costs, rules: Rules, device: DeviceProfile) -> str:
    """Why nothing is feasible. Nothing takes less than the smallest rank on one weight, with the smallest b."""
    batch, rank = min(rules.batches), rules.ranks[0]
    block = np.array([weight.block for weight in selections.weights])
    parameters = np.array([rank * (weight.rows + weight.columns) for weight in selections.weights], np.float64)
    columns = np.array([weight.columns for weight in selections.weights], np.float64)
    per_token = costs.input_bytes * columns + costs.inner_bytes * rank
    memory = np.array(
        [
            costs.memory(rules.at_once(batch), bits, block, parameters, per_token, rules.state_bytes)
            for bits in rules.bits
        ]
    )
    fits = memory <= device.memory_bytes
    if not fits.any():
        bits = rules.bits[int(memory.min(axis=1).argmin())]
        return (
            f"needs at least {size(memory.min(), 3)} of memory (at a batch of {batch} and {bits} bits) "
            f"and has {size(device.memory_bytes, 3)}"
        )
    seconds = np.array([_compute(costs, rules, batch, bits, block, parameters, device) for bits in rules.bits])
    seconds += rules.message(parameters) * _seconds_per_byte(device)
    seconds = np.where(fits, seconds, np.inf)
    bits = rules.bits[int(seconds.min(axis=1).argmin())]
    return (
        f"has the memory but needs at least {seconds.min():.4g} s (at a batch of {batch} and {bits} bits) "
        f"and the deadline is {rules.deadline:.4g} s"
    )


def _compute(
    costs: Costs, rules: Rules, batch: int, bits: int, block: Ints, parameters: Floats, device: DeviceProfile
) -> Floats:
    found: Floats = costs.compute(
        batch,
        bits,
        rules.steps,
        block,
        parameters,
        device.flop_per_s,
        device.read_bytes_per_s,
        rules.micro_batch,
    )
    return found


def _seconds_per_byte(device: DeviceProfile) -> float:
    """There and back."""
    return 1 / device.down_bytes_per_s + 1 / device.up_bytes_per_s


def _known(costs: Costs, bits: int) -> int:
    for known in (costs.base_bytes, costs.slowdown):
        if str(bits) not in known:
            raise ConfigError(f"bits should be among {', '.join(known)}, for which costs were measured, got {bits}")
    return bits


def _check(selections: Selections, costs: Costs, weights: Sequence[Weight], rules: Rules) -> None:
    if selections.weights != tuple(weights) or selections.ranks != tuple(rules.ranks):
        raise ConfigError(
            f"selections were made of {len(selections.weights)} weights with ranks {list(selections.ranks)}, and the "
            f"plan is for {len(weights)} with ranks {rules.ranks}: both should be the same; make the selections again"
        )
    made, asked = (selections.input_bytes, selections.inner_bytes), (costs.input_bytes, costs.inner_bytes)
    if made != asked:
        raise ConfigError(
            f"selections were made for {made} input and inner bytes, and costs say {asked}: make them again"
        )
    for bits in rules.bits:
        _known(costs, bits)
    last = max(weight.block for weight in weights)
    for name, of in (
        ("backward_flop", costs.backward_flop),
        ("read_bytes", costs.read_bytes),
        ("saved_bytes", costs.saved_bytes),
    ):
        if len(of) <= last:
            raise ConfigError(f"{name} should tell of blocks 0 to {last}, and there are {len(of)} figures")
        if any(low < high for low, high in pairwise(of)):
            raise ConfigError(f"{name} should never rise from a block to the next, got {of}")
