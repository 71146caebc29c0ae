"""A round's updates to the next state: who is believed, what each counts, and what becomes of a state that is none.

Around every strategy alike, so that none has to think of clients that lie: fedtune/server/plausibility.py says what is
believed, and this does it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtune.config.schema import Experiment
from fedtune.core.errors import DivergedError
from fedtune.core.protocol import ClientInfo, Strategy, Tensors, Update
from fedtune.runs.update_store import Updates
from fedtune.server.plausibility import (
    Weighed,
    attempt,
    blame,
    effective_examples,
    heavy_of,
    out_of_proportion,
    outlier,
)
from fedtune.server.round import Round


class Aggregator:
    """One run's.

    Args:
        say: takes what a person should know.
        leave_out: takes back the update of a client, by index, which the round counted, and books why.
    """

    def __init__(
        self,
        experiment: Experiment,
        strategy: Strategy[Any],
        say: Callable[[str], None],
        leave_out: Callable[[int, Round, str], None],
    ):
        self._experiment = experiment
        self._strategy = strategy
        self._say = say
        self._leave_out = leave_out
        self._heavy: set[int] = set()  # of whom it was said that they have more than half of a round

    def implausible(self, norms: Mapping[int, float], told: Mapping[int, Tensors]) -> dict[int, str]:
        """Why which updates can't be believed (`out_of_proportion`)."""
        return out_of_proportion(norms, told, self._experiment.population.max_norm_ratio)

    def sift(self, played: Round, replies: Updates) -> None:
        """Leave out what can't be believed."""
        for index, reason in self.implausible(played.norms, played.told).items():
            self._leave_out(index, played, reason)
            replies.drop(index)

    def aggregate(
        self, state: Any, played: Round, replies: Updates, check: Callable[[int], None]
    ) -> tuple[Any, Sequence[tuple[ClientInfo, Update]]]:
        """The next state, without the update that keeps it from being one if that is one client's, and the replies as
        they counted.

        Args:
            check: raises if as many replies as these don't make a round.

        Raises:
            DivergedError: if there is no such state, with whose update is the largest.
        """
        while True:
            weighed = self._weigh(played, replies)
            after, wrong = attempt(self._strategy, state, played.number, weighed)
            if not wrong:
                return after, weighed
            if (index := outlier(played.norms)) is None:
                raise DivergedError(f"round {played.number} can't be aggregated: {wrong}. {self.advice(played)}")
            norm = f"{played.norms[index]:.3g}"
            said = f"with its update, whose norm is {norm}, the round can't be aggregated: {wrong}"
            self._leave_out(index, played, said)
            replies.drop(index)
            check(len(replies))

    def weights(self, samples: Sequence[int]) -> list[int]:
        """What clients with so many examples count for, as population.weights and population.max_weight have it."""
        population = self._experiment.population
        return effective_examples(samples, population.weights, population.max_weight)

    def _weigh(self, played: Round, replies: Updates) -> Sequence[tuple[ClientInfo, Update]]:
        examples = played.examples()
        given = [count for _, count in examples]
        counted = self.weights(given)
        if (heavy := heavy_of(examples, counted)) and heavy[0] not in self._heavy:
            index, share = heavy
            self._heavy.add(index)
            self._say(
                f"client {index} has {share:.0%} of round {played.number}'s weight; population.max_weight= limits what "
                "one may have, population.weights=equal counts all alike"
            )
        if counted == given:
            return replies
        played.weigh(counted)
        return Weighed(replies, counted)

    def advice(self, played: Round) -> str:
        """What to do about a round that isn't a number any more, and about whom."""
        return blame(played.norms, f"tart a new run with a lower train.lr (now {self._experiment.train.lr:g})")
