"""FedPipe-style: each client adapts the layers, at the ranks, batch size and bits, that its device can do in time.

Fang et al. 2024, "Automated Federated Pipeline for Parameter-Efficient Fine-Tuning of Large Language Models",
arXiv:2404.06448. There is no code of the authors; this is a reconstruction from the paper's text, and says what it
chose.

1. Score. In the rounds 1, 1 + R, 1 + 2R, ... clients answer with the importance of each layer that they trained, by
   AdaLoRA's formula (clients/scoring.py). A client's I_kj is of r_kj components; a layer's, at the largest rank,

       score_j = sum_k n_k I_kj / sum_k n_k c_j(r_kj)        c_j(r) = (S_1 + ... + S_r) / (S_1 + ... + S_max)

   over those who trained it, with S_1 >= S_2 >= ... the singular values of the global B_j A_j in that round: where all
   have the largest rank, the n_k-weighted mean. A component that nobody has trained yet counts as the least that
   somebody has; a layer that nobody has scored, as the mean one; and no layer as less than a thousandth of that, so
   that what costs nothing is always worth doing.
2. Value. Layer j at rank r is worth score_j c_j(r). Before anything is known all scores and all S are 1.
3. Plan. Of all (layers, ranks, batch, bits) that fit the device's memory and the round's deadline, those worth most;
   of these the largest batch, then the most bits (fedtune/planning/planner.py, which has the model of memory and time).
4. Train. A client is sent its layers alone, the others are as in the base; it trains them on a base in its bits.
5. Aggregate. Layer j over those K_j who trained it, p renormalised:

       dW_j = sum_{k in K_j} p_k s B_k A_k        p_k = n_k / sum_{i in K_j} n_i

   and back to the global rank by truncated SVD, components in order of S, so that a client's first r are its best r.
   A layer that nobody trained stays.

Down and up: A and B of a client's own layers, bytes per scalar times sum_j r_j (in + out); up, in a scoring round, also
4 bytes a layer.
Inexact: |dW_j - s B A|^2 = sum_{i>r} S_i^2, the least possible at rank r (Eckart and Young).
Mixed ranks: by layer, as planned; population.ranks is not for this method. Clients keep nothing.
Departs from the paper, or chooses where it leaves a choice: one score a layer crosses the wire instead of one a
component, and singular values say how it is spread over ranks; the deadline is the round's (population.deadline) and
without one memory alone limits a plan; all clients take the same number of steps; all B A are multiplied by one s; a
plan has room for a score's running means in every round, so that a layer is not left out just where it would be scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from fedtune.core.checks import at_least
from fedtune.core.costs import STATE_BYTES, Costs, Weight
from fedtune.core.errors import CapacityError, ConfigError, WireError
from fedtune.core.protocol import (
    SERVER,
    ClientInfo,
    DeviceProfile,
    Instruction,
    Layout,
    Tensors,
    Traits,
    Update,
    expect_like,
    share,
)
from fedtune.lowrank.algebra import LowRank, lora_factors, pad_rank, stack, to_adapter, truncated_svd
from fedtune.lowrank.averaging import parts
from fedtune.lowrank.stacking import each_layer
from fedtune.planning.plan_cache import Offer, offer
from fedtune.planning.planner import Plan, Rules
from fedtune.training.apply_instruction import BATCH, BITS, SCORE, SCORE_BYTES, SCORES

LEAST = 1e-3  # of the mean score, that every layer counts
# What messages have around their numbers, at most: a safetensors header's line of each tensor, and Flower's own framing
TENSOR_BYTES, MESSAGE_BYTES = 256, 4096


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer at the largest rank, components in order of their singular values
    scaling: float  # s
    costs: Costs
    blocks: dict[str, int]  # by layer, where in the base it is
    scores: dict[str, float] = field(default_factory=dict)  # by layer, as far as they are known
    shares: dict[str, list[float]] = field(default_factory=dict)  # by layer: S_1, S_2, ... when it was last scored


@dataclass(frozen=True)
class FedPipe:
    """The server's side of FedPipe: a plan for each device, and an average of each layer over those who trained it.

    Raises:
        ConfigError: for a setting out of range.
    """

    traits: ClassVar[Traits] = Traits(title="FedPipe-style", needs_low_rank=True, plans=True, partial=True)

    steps: int  # a client's, in each round
    batch_size: int  # the largest; smaller ones are halves of it
    optimizer: str = "adamw"
    deadline: float | None = None  # seconds of a round, on the virtual clock
    refresh: int = 5  # R, rounds between scores
    ranks: list[int] | None = None  # that a layer can have; None: adapter.rank and its halves
    bits: list[int] | None = None  # that a base can be held in; None: all there are for this model
    micro_batch_size: int = 0  # examples of a batch that go through the model at a time; 0: all of them

    def __post_init__(self) -> None:
        at_least("method.strategy.refresh", self.refresh, 1)

    def init(self, layout: Layout) -> State:
        if layout.costs is None or not layout.weights:
            raise ConfigError(
                "method=fedpipe plans by what training costs, and this layout doesn't say (Layout.costs and .weights, "
                "fedtune/planning/cost_probe.py): run it with fedtune run, which measures that, or take another method"
            )
        if not layout.starts_at_zero:
            raise ConfigError(
                "method=fedpipe leaves layers as the base has them, so B A has to start at 0: take adapter=lora or "
                "adapter=rslora, without adapter.path"
            )
        if self.ranks is not None and layout.rank not in self.ranks:
            raise ConfigError(
                f"method.strategy.ranks={list(self.ranks)}: the largest should be adapter.rank, which is {layout.rank}"
            )
        blocks = {weight.module: weight.block for weight in layout.weights}
        state = State(dict(layout.initial), layout.scaling, layout.costs, blocks)
        self.rules(state)
        return state

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        if peer.index == SERVER:
            return Instruction(state.adapter)
        planned = self.plan(state, peer.capability)
        if isinstance(planned, str):
            raise CapacityError(planned)
        settings = {BATCH: planned.batch_size, BITS: planned.bits, SCORE: self.scores_in(round)}
        return Instruction(parts(state.adapter, planned.ranks), settings)

    def plan(self, state: State, capability: DeviceProfile) -> Plan | str:
        """What a device is asked to do, or why it can take no part."""
        return self._offer(state).plans_for([capability])[0]

    def plan_for_all(self, state: State, capabilities: Sequence[DeviceProfile]) -> None:
        """Plan for many devices at once, which takes little longer than for one."""
        self._offer(state).plans_for(capabilities)

    def _offer(self, state: State) -> Offer:
        """What there is to choose from while scores last."""

        def make() -> Offer:
            rules = self.rules(state)
            return Offer(rules, state.costs, weights_of(state), self.values(state, rules.ranks))

        return offer((self, state.costs, state.blocks, state.scores, state.shares), make)

    def rules(self, state: State) -> Rules:
        """What is on offer."""
        widest = next(iter(lora_factors(state.adapter).values())).rank
        known = sorted(int(bits) for bits in state.costs.base_bytes)
        for name, asked in (("ranks", self.ranks), ("bits", self.bits)):
            if asked is not None and not (asked and all(isinstance(each, int) and each > 0 for each in asked)):
                raise ConfigError(f"method.strategy.{name}={list(asked)}: expected whole numbers above 0, or null")
        if unknown := set(self.bits or []) - set(known):
            raise ConfigError(
                f"method.strategy.bits={list(self.bits or [])}: this base can't be held in {min(unknown)} bits; it "
                f"can in {', '.join(map(str, known))}"
            )
        if self.ranks is not None and max(self.ranks) > widest:
            raise ConfigError(f"method.strategy.ranks={list(self.ranks)}: adapter.rank is {widest}, none may be above")
        return Rules(
            ranks=sorted(set(self.ranks or halves(widest))),
            batches=halves(self.batch_size),
            bits=sorted(set(self.bits or known)),
            steps=self.steps,
            deadline=float("inf") if self.deadline is None else float(self.deadline),
            wire_bytes=MESSAGE_BYTES + 2 * TENSOR_BYTES * len(state.blocks),
            state_bytes=STATE_BYTES[self.optimizer] + SCORE_BYTES,
            micro_batch=self.micro_batch_size,
        )

    def values(self, state: State, ranks: Sequence[int]) -> np.ndarray:
        """What each layer is worth at each rank, (layers, ranks), layers in the order of their names."""
        mean = sum(state.scores.values()) / max(len(state.scores), 1) or 1.0
        rows = []
        for weight in weights_of(state):
            score = max(state.scores.get(weight.module, mean), LEAST * mean)
            rows.append([score * _reached(state.shares.get(weight.module, []), rank, max(ranks)) for rank in ranks])
        return np.array(rows)

    def scores_in(self, round: int) -> bool:
        """Whether clients are asked for scores."""
        return (round - 1) % self.refresh == 0

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        asked = self.configure(state, round, peer)
        expected = dict(asked.tensors)
        if asked.settings[SCORE]:
            expected[SCORES] = torch.empty(len(lora_factors(asked.tensors)))
        expect_like(update.tensors, expected)
        if asked.settings[SCORE] and not ((scores := update.tensors[SCORES]) >= 0).all() & scores.isfinite().all():
            raise WireError(f"its scores should be numbers from 0 up, got {scores.min():g} to {scores.max():g}")

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        held = list(replies)
        trained = [lora_factors(update.tensors) for _, update in held]
        old = lora_factors(state.adapter)
        touched = sorted({module for layers in trained for module in layers})

        def sum_of(module: str) -> LowRank:
            whose = [place for place, layers in enumerate(trained) if module in layers]
            weights = [weight * state.scaling for weight in share([held[place] for place in whose])]
            return stack([trained[place][module] for place in whose], weights)

        spectra: dict[str, list[float]] = {}

        def best(module: str, ideal: LowRank) -> LowRank:
            rank = old[module].rank
            found, singular = truncated_svd(ideal, lambda s: min(rank, len(s)))
            spectra[module] = _spread(singular, rank, max(ideal.b.shape[0], ideal.a.shape[1]))
            found = pad_rank(found, rank, old[module].a)
            return LowRank(found.b / state.scaling, found.a).to(old[module].a.dtype)

        new = each_layer({module: partial(sum_of, module) for module in touched}, best)
        state = replace(state, adapter={**state.adapter, **to_adapter(new)})
        if not self.scores_in(round):
            return state
        scores = _scores(held, spectra)
        return replace(
            state,
            scores=dict(sorted((state.scores | scores).items())),
            shares=dict(sorted((state.shares | spectra).items())),
        )


def weights_of(state: State) -> list[Weight]:
    """The layers in the order of their names."""
    return [
        Weight(module, state.blocks[module], product.b.shape[0], product.a.shape[1])
        for module, product in sorted(lora_factors(state.adapter).items())
    ]


def halves(largest: int) -> list[int]:
    """Batch sizes: `largest` and what is left of it by halving, ascending: 1, 2, 4, 8 of 8."""
    return sorted({largest >> by for by in range(largest.bit_length())})


def _spread(singular: torch.Tensor, rank: int, side: int) -> list[float]:
    """The first `rank` singular values, the least of them in place of those that nobody trained, which are zero but for
    rounding; nothing if all are zero."""
    noise = float(singular[0]) * side * torch.finfo(singular.dtype).eps
    found: list[float] = [value for value in singular[:rank].tolist() if value > noise]
    return found + found[-1:] * (rank - len(found))


def _reached(spread: Sequence[float], rank: int, widest: int) -> float:
    """c(r) of `spread`, S_1, S_2, ...; without one, of equal S."""
    return sum(spread[:rank]) / sum(spread) if spread else rank / widest


def _scores(replies: Sequence[tuple[ClientInfo, Update]], spectra: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each layer that was trained, what it would be at the largest rank."""
    sums: dict[str, tuple[float, float]] = {}
    for _, update in replies:
        layers = sorted(lora_factors(update.tensors).items())
        for (module, product), score in zip(layers, update.tensors[SCORES].tolist(), strict=True):
            scored, covered = sums.get(module, (0.0, 0.0))
            part = _reached(spectra[module], product.rank, product.rank)
            sums[module] = scored + update.examples * score, covered + update.examples * part
    return {module: scored / covered for module, (scored, covered) in sums.items()}
