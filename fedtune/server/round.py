"""What a round has come to so far."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fedtune.core.protocol import ClientInfo, Instruction, Tensors, Update
from fedtune.server.update_similarity import Signs
from fedtune.server.virtual_clock import Timed


@dataclass(frozen=True)
class Asked:
    """What a client was sent."""

    meant: Instruction  # whole
    heard: Instruction  # as far as its answer needs it
    lost: Tensors  # what the codec left out: meant less heard; nothing of a lossless one
    content_bytes: int  # of the message, without its addresses


# What becomes of a valid update, its blob, and what its client was sent
Take = Callable[[ClientInfo, Update, bytes, Asked], None]


@dataclass
class Round:
    number: int
    clients: int = 0  # whose updates count
    failures: list[tuple[int, int, str]] = field(default_factory=list)
    seconds: float = 0.0
    virtual_seconds: float | None = None  # the virtual clock at its end, where there is one
    turns: list[Timed] = field(default_factory=list)
    error: float | None = None  # how far the server's update is from the mean of the clients'
    signs: dict[int, Signs] = field(default_factory=dict)  # of the updates that count, if they are asked for
    norms: dict[int, float] = field(default_factory=dict)  # of the updates that came: how far each is from its start
    told: dict[int, Tensors] = field(default_factory=dict)  # what that is, where an update is a change of it
    _metrics: list[tuple[int, Update]] = field(default_factory=list)  # by peer, of the updates that count; no tensors
    _counted: list[int] = field(default_factory=list)  # for how many examples each counts, if not for its own

    def count(self, peer: int, update: Update) -> None:
        self.clients += 1
        self._metrics.append((peer, Update({}, update.examples, update.metrics)))

    def fail(self, peer: int, reason: str) -> None:
        self.failures.append((self.number, peer, " ".join(reason.split())))

    def forget(self, peer: int, reason: str) -> None:
        """Take back what was counted of this client."""
        self._metrics = [(index, update) for index, update in self._metrics if index != peer]
        self.clients = len(self._metrics)
        for known in (self.signs, self.norms, self.told):
            known.pop(peer, None)
        self.turns = [replace(turn, excluded_reason=reason) if turn.peer == peer else turn for turn in self.turns]

    def examples(self) -> list[tuple[int, int]]:
        """Each update's peer and number of examples, in order of the peers."""
        self._metrics.sort(key=lambda reply: reply[0])
        return [(peer, update.examples) for peer, update in self._metrics]

    def weigh(self, counted: Sequence[int]) -> None:
        """Have the updates count for so many examples, in the order of `examples`."""
        self._counted = list(counted)

    def mean(self, name: str) -> float | None:
        """The clients' metric `name` so far, weighted by examples; the same whoever came first."""
        counted = self._counted or [update.examples for _, update in self._metrics]
        came = [
            (n, update.metrics[name])
            for n, (_, update) in zip(counted, self._metrics, strict=True)
            if name in update.metrics
        ]
        examples = sum(n for n, _ in came)
        return math.fsum(n * value for n, value in came) / examples if examples else None

    def reported(self, name: str) -> dict[int, float]:
        """The metric of each client that has it, by index in ascending order; of several, the last."""
        found = {peer: update.metrics[name] for peer, update in self._metrics if name in update.metrics}
        return dict(sorted(found.items()))
