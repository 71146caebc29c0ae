"""Zeroth-order steps along seeded directions, which forward passes alone can take.

    two-sided   g = (L(w + eps z) - L(w - eps z)) / (2 eps)
    one-sided   g = (L(w + eps z) - L(w)) / eps
    then        w <- w - lr / P sum_p g_p z_p

With P = 1 that is MeZO (Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333).
On a quadratic loss the two-sided slope is exactly z^T grad L, for any eps. The steps are whole numbers of a quantum
(fedtune/random_directions/weights.py), so whoever knows them takes the very same ones.

`Rules` are what all parties need to know; clients are told them as settings (fedtune/core/settings.py).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.config.targets import fits
from fedtune.core.checks import at_least
from fedtune.core.errors import ClientError, ConfigError, DivergedError, WireError
from fedtune.core.protocol import Batch, Setting, describe
from fedtune.core.settings import SharedRules
from fedtune.models.adapted_model import LocalModel
from fedtune.random_directions.hash_noise import coefficient
from fedtune.random_directions.weights import SeededWeights, Space, steps_record
from fedtune.training.first_order import loss_of
from fedtune.training.schedule import RoundSchedule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_SLOPES = 1_000_000  # that a client measures in a round; each takes a forward pass
Told = TypeVar("Told", bound="DataclassInstance")


@dataclass(frozen=True)
class Rules(SharedRules):
    """What every party of a seeded method has to agree on.

    Raises:
        ConfigError: for a value out of range.
    """

    lr: float  # of slopes in loss per unit of z
    local_steps: int  # a client's, in each round
    eps: float  # of the difference, in units of z
    perturbations: int = 1  # P, directions a step
    two_sided: bool = True
    noise: str = "normal"  # the distribution of z, or rademacher
    sparsity: float = 0.0  # the share of weights, the largest of each parameter, that stay as they are
    pool_seed: int = 0  # what all seeds are made from

    def __post_init__(self) -> None:
        at_least("method.strategy.rules.local_steps", self.local_steps, 1)
        at_least("method.strategy.rules.perturbations", self.perturbations, 1)
        if self.slopes > MAX_SLOPES:
            raise ConfigError(
                f"method.strategy.rules: {self.local_steps} steps of {self.perturbations} directions are more than a "
                f"round can have, {MAX_SLOPES} in all"
            )
        if not 0 < self.eps < math.inf:
            raise ConfigError(f"method.strategy.rules.eps={self.eps}: expected a number above 0")
        _ = self.space

    @property
    def space(self) -> Space:
        return Space(self.lr, self.noise, self.sparsity)

    @property
    def slopes(self) -> int:
        """How many a client measures in a round."""
        return self.local_steps * self.perturbations


def as_told(kind: type[Told], settings: Mapping[str, Setting]) -> Told:
    """The inverse of `told` (fedtune/core/settings.py).

    Raises:
        ClientError: if these settings are not that.
    """
    try:
        given: dict[str, Any] = {field.name: settings[field.name] for field in fields(kind)}
        for name, hint in get_type_hints(kind).items():
            if not fits(given[name], hint):
                raise TypeError(f"{name}={given[name]!r}")
        return kind(**given)
    except (KeyError, TypeError) as error:
        raise ClientError(f"the server's instruction is no seeded method's: {error} is missing or wrong") from error


def rules_of(settings: Mapping[str, Setting]) -> Rules:
    """The `Rules` that these settings are.

    Raises:
        ClientError: if they are none.
    """
    return as_told(Rules, settings)


@dataclass(frozen=True)
class Steps:
    """What a client did: `counts[t, p]` quanta along the p-th direction of step t, zero where it was skipped."""

    counts: np.ndarray  # (steps, P) int64
    loss: float  # mean over all forward passes
    skipped: int  # steps


def slopes_along(
    weights: SeededWeights, loss: Callable[[], float], seeds: Sequence[int], eps: float, two_sided: bool = True
) -> tuple[list[float], float, float]:
    """The slope along each direction, at one point and on one batch. The tensors are left perturbed; the next `render`
    sets them.

    Args:
        eps: taken to 20 bits.

    Returns:
        slopes: loss per unit of z, not finite where the loss isn't.
        mean: of the losses that were met.
        widest: the largest difference between two of them that made a slope.
    """
    eps = coefficient(eps)
    found, met = [], []
    widest = 0.0
    if not two_sided:
        weights.render()
        met.append(loss())
    for seed in seeds:
        weights.render(seed, eps)
        met.append(loss())
        difference = met[-1] - met[0]
        if two_sided:
            weights.render(seed, -eps)
            met.append(loss())
            difference = met[-2] - met[-1]
        widest = max(widest, abs(difference))
        found.append(difference / (2 * eps if two_sided else eps))
    return found, sum(met) / len(met), widest


def descend(
    model: LocalModel,
    batches: Iterable[Batch],
    rules: Rules,
    seeds: Sequence[Sequence[int]],
    clip: float = 0.0,
    schedule: RoundSchedule | None = None,
) -> Steps:
    """Take one step for each of `seeds`, from where the model's seeded weights are.

    Args:
        seeds: (steps, P).
        clip: a step with |L+ - L-| above it is skipped, as is one whose loss isn't finite; 0 doesn't clip.
        schedule: what share of `rules.lr` each step has; None: all of it. The quantum stays that of `rules.lr`, so what
            was counted under one rate adds up with what was under another.

    Raises:
        ClientError: if every step had to be skipped, or a slope is too large to be written down.
    """
    weights, space = model.seeded, rules.space
    counts = np.zeros((len(seeds), rules.perturbations), dtype=np.int64)
    total, taken = 0.0, 0
    source = iter(batches)
    for place, directions in enumerate(seeds):
        batch = next(source).to(model.device)
        slopes, loss, widest = slopes_along(
            weights, partial(_loss, model.module, batch), directions, rules.eps, rules.two_sided
        )
        if not all(map(math.isfinite, slopes)) or (clip and widest > clip):
            continue
        wanted = np.array(slopes) / rules.perturbations
        steps = space.counts(wanted if schedule is None else wanted * schedule.share(place, len(seeds)))
        if (np.abs(steps) >= space.limit).any():
            worst = max(slopes, key=abs)
            raise ClientError(
                f"the slope became {worst:.3g} at step {place + 1} of {len(seeds)}: "
                f"lower method.strategy.rules.lr (now {rules.lr:g})"
            )
        counts[place] = steps
        weights.step(steps_record(directions, steps.tolist()))
        total, taken = total + loss, taken + 1
    if not taken:
        raise ClientError(
            f"all {len(seeds)} steps were skipped: the loss isn't finite"
            + (f", or two of them differ by more than method.client.clip={clip:g}" if clip else "")
        )
    return Steps(counts, total / taken, len(seeds) - taken)


def _loss(module: nn.Module, batch: Batch) -> float:
    with torch.inference_mode():
        return sum(share * float(loss_of(module, part)) for part, share in batch.parts())


def check_counts(name: str, counts: Tensor, shape: tuple[int, ...], space: Space) -> None:
    """Check the slopes that a client sent, in quanta.

    Raises:
        WireError: if these are not int32 of that shape, each within what one step can be.
    """
    if counts.dtype != torch.int32 or tuple(counts.shape) != shape:
        raise WireError(f"tensor '{name}': expected int32 {shape}, got {describe(counts)}")
    if counts.numel() and int(counts.long().abs().max()) > space.limit:
        worst = int(counts.flatten()[counts.long().abs().argmax()])
        raise WireError(f"tensor '{name}': a slope of {worst} quanta is out of range, +-{space.limit}")


def check_length(name: str, counts: Tensor, space: Space) -> None:
    """Check that a client's slopes alone don't come near the limit of the sum.

    Raises:
        WireError: if these alone would leave no room for what others add.
    """
    try:
        space.check(counts.numpy())
    except DivergedError as error:  # the client's, not the run's
        raise WireError(f"tensor '{name}': {error}") from error
