"""What a round has come to so far."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fedtune.clock import Timed
from fedtune.protocol import Instruction, Peer, Tensors, Update
from fedtune.similarity import Signs


@dataclass(frozen=True)
class Asked:
    """What a client was sent."""

    meant: Instruction  # whole
    heard: Instruction  # as far as its answer needs it
    lost: Tensors  # what the codec left out: meant less heard; nothing of a lossless one
    content_bytes: int  # of the message, without its addresses


# What becomes of a valid update, its blob, and what its client was sent
Take = Callable[[Peer, Update, bytes, Asked], None]


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
    _metrics: list[tuple[int, Update]] = field(default_factory=list)  # by peer, of the updates that count; no tensors

    def count(self, peer: int, update: Update) -> None:
        self.clients += 1
        self._metrics.append((peer, Update({}, update.examples, update.metrics)))

    def fail(self, peer: int, reason: str) -> None:
        self.failures.append((self.number, peer, " ".join(reason.split())))

    def mean(self, name: str) -> float | None:
        """The clients' metric `name` so far, weighted by examples; the same whoever came first."""
        came = [update for _, update in self._metrics if name in update.metrics]
        examples = sum(update.examples for update in came)
        return math.fsum(update.examples * update.metrics[name] for update in came) / examples if examples else None

    def reported(self, name: str) -> dict[int, float]:
        """The metric of each client that has it, by index in ascending order; of several, the last."""
        found = {peer: update.metrics[name] for peer, update in self._metrics if name in update.metrics}
        return dict(sorted(found.items()))
