"""Which of the clients that could take part in a round do, by rule.

    uniform          all alike
    power_of_choice  Cho, Wang and Joshi 2020, "Client Selection in Federated Learning: Convergence Analysis and
                     Power-of-Choice Selection Strategies", arXiv:2010.01243: of d candidates, drawn by p_k = n_k /
                     sum(n), those with the highest loss. This is its rpow-d, which goes by the loss that a client
                     reported last, and so costs no message. A report is the client's word: one that is out of all
                     proportion counts as the median one, and who took part PATIENCE times in a row lets another go.
    speed_tier       Chai et al. 2020, "TiFL: A Tier-based Federated Learning System", arXiv:2001.09249: clients of
                     about one speed, so that nobody waits for slow ones. A tier is drawn, clients within it, and
                     where it has too few, more from the tiers nearest to it, of two the faster first. Tiers are drawn
                     uniformly: TiFL's probabilities that follow their accuracy, and its credits, are left out.

Every choice is a function of its arguments alone, and of `able` as a set. Whole numbers decide all draws, so they are
the same on every machine.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from statistics import median_low

import numpy as np

from fedtune.core.checks import at_least, one_of
from fedtune.core.errors import ConfigError, QuorumError
from fedtune.core.seeds import bits, derive_seed, permutation

RULES = ("uniform", "power_of_choice", "speed_tier")
NOTHING: Mapping[int, float] = {}
BELIEVED = 10  # times the median: up to what a reported loss is believed
PATIENCE = 5  # rounds in a row that a client takes part in because of its loss, where others could


def select(
    rule: str,
    *,
    seed: int,
    round: int,
    able: Sequence[int],
    cohort: int,
    clients: int,
    samples: Mapping[int, int] | None = None,
    losses: Mapping[int, float] = NOTHING,
    waiting: Collection[int] = (),
    candidates: int | None = None,
    seconds: Mapping[int, float] = NOTHING,
    tiers: int = 5,
) -> list[int]:
    """The indices that take part in `round`, ascending: `cohort` of those in `able`, or all where these are fewer.

    Args:
        rule: one of `RULES`, of which each looks at its own arguments only.
        able: indices of those that could take part, in any order.
        clients: how many there are in all; indices are below it.
        samples: power_of_choice: training examples of each that is able. One without any is never drawn, so that the
            cohort can be smaller.
        losses: power_of_choice: what each reported last; who is missing, or reported no number, counts as the highest.
        waiting: power_of_choice: who goes only if there is nobody else among those drawn.
        candidates: power_of_choice: d, how many are drawn before the losses decide; None takes twice the cohort.
        seconds: speed_tier: what each is expected to need for a round, able or not; who is missing counts as slowest.
        tiers: speed_tier: how many there are.

    Raises:
        ConfigError: for an unknown rule, or a number out of range.
        QuorumError: if there is nobody to choose.
    """
    one_of("selection rule", rule, RULES)
    at_least("cohort", cohort, 1)
    there = sorted({int(index) for index in able})
    if not there:
        raise QuorumError(
            f"round {round}: none of {clients} clients is able to take part, so there is nobody to choose"
        )
    if there[0] < 0 or there[-1] >= clients:
        wrong = next(index for index in there if not 0 <= index < clients)
        raise ConfigError(
            f"client {wrong} can't be chosen: with {clients} clients, indices are from 0 to {clients - 1}"
        )
    if rule == "power_of_choice":
        if samples is None:
            raise ConfigError("power_of_choice draws by how many samples clients have: expected `samples`")
        wanted = 2 * cohort if candidates is None else candidates
        if wanted < cohort:
            raise ConfigError(f"candidates={wanted} is too small: expected at least the cohort, which is {cohort}")
        drawn = _by_samples(there, samples, wanted, derive_seed(seed, "candidates", round))
        if not drawn:
            raise QuorumError(f"round {round}: none of the {len(there)} clients that are able has a training example")
        ranked = sorted(
            drawn, key=lambda index: (index in waiting, -_known(losses.get(index)))
        )  # stable: ties as drawn
        chosen = ranked[:cohort]
        return sorted(chosen)
    shuffled = permutation(derive_seed(seed, "cohort", round), clients)  # of all, so that an absence moves nobody else
    order = [int(index) for index in shuffled[np.isin(shuffled, there)]]
    if rule == "speed_tier":
        if not 1 <= tiers <= clients:
            raise ConfigError(f"tiers={tiers}: expected from 1 to the number of clients, which is {clients}")
        far = _distances(clients, seconds, tiers, _below(tiers, int(bits(derive_seed(seed, "tier", round), 1)[0])))
        order.sort(key=far.__getitem__)  # stable: within a tier it stays at random
    return sorted(order[:cohort])


def believed(losses: Mapping[int, float], failed: Collection[int] = ()) -> dict[int, float]:
    """Reported losses as far as they are believed, by client.

    One of more than `BELIEVED` times the median, and that of a client that failed and never reported one, count as the
    median. So neither a lie nor an answer that is refused each time brings a client into every cohort.
    """
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if not finite:
        return dict(losses)
    usual = median_low(finite)
    most = BELIEVED * abs(usual) if usual else math.inf
    return {**dict.fromkeys(failed, usual), **{index: usual if loss > most else loss for index, loss in losses.items()}}


def _by_samples(there: Sequence[int], samples: Mapping[int, int], count: int, key: int) -> list[int]:
    """Up to `count` of `there`, one after another without repetition, by n_k / sum(n) of those who are left."""
    left = [(index, int(samples[index])) for index in there if samples[index] > 0]
    drawn = []
    for word in bits(key, min(count, len(left))):
        ends = list(accumulate(n for _, n in left))
        drawn.append(left.pop(bisect_right(ends, _below(ends[-1], int(word))))[0])
    return drawn


def _distances(clients: int, seconds: Mapping[int, float], tiers: int, drawn: int) -> dict[int, tuple[int, bool]]:
    """How far each client's tier is from the one that was drawn. Of two as far, the faster is nearer: it costs a round
    no time.

    All clients are cut into tiers, from the fastest, whether they are able or not, so that a tier stays what it is
    while devices come and go. The first have one client more where it doesn't come out even.
    """
    by_speed = sorted(range(clients), key=lambda index: (_known(seconds.get(index)), index))
    size, more = divmod(clients, tiers)
    far = {}
    for place, index in enumerate(by_speed):
        tier = place // (size + 1) if place < more * (size + 1) else (place - more) // size
        far[index] = (abs(tier - drawn), tier > drawn)
    return far


def _known(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _below(count: int, word: int) -> int:
    """A whole number below `count` from 64 random bits; off a uniform one by less than count / 2^64."""
    return word * count >> 64
