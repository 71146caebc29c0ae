"""Asynchronous rounds: the server takes updates as they come on the virtual clock, and never waits for the slowest.

As many clients as a cohort has are at work at any time. Whoever is done first answers first, and another takes its
place, which is sent what the server then holds. A round is one update of the server: the next `buffer` answers.

    fill up the cohort -> the earliest to end -> clock = its end -> into the buffer -> ... -> aggregate

The turns themselves are played when a client is asked, so the messages and their bytes are those of any other run; an
answer then lies in memory and in the checkpoint, encoded as it came, until the clock comes to its end. There are never
more than a cohort of them.

A client is asked once for each state of the server: a second answer to the same would be the same. One that fails, or
drops out by population.dropout, leaves its place at once. Where everybody was asked and fewer answers than `buffer`
came, the update is made of these if they are a quorum of it.

Where no device has a limit nobody is faster than another, and rounds are synchronous.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Update
from fedtune.planning.turn_times import Timed, Turn
from fedtune.runs.update_store import Buffered
from fedtune.server.round import Round
from fedtune.server.round_parts import RoundParts
from fedtune.server.synchronous import SynchronousRounds, check_quorum
from fedtune.wire.delta_coding import decode, with_feedback
from fedtune.workspace.downlink import SentInstruction
from fedtune.workspace.uplink import ReceivedUpdate


class AsynchronousRounds:
    """How rounds are played where updates are taken as they come.

    Args:
        buffer: updates that a step of the server takes.
        synchronous: what plays rounds where no device has a limit.
    """

    def __init__(self, buffer: int, synchronous: SynchronousRounds, parts: RoundParts):
        self._buffer = buffer
        self._synchronous = synchronous
        self._parts = parts

    def play(self, number: int) -> Round:
        """One update of the server.

        Raises:
            ConfigError: if it takes more updates than there are clients.
            QuorumError: if too few updates came and nobody is left to ask.
            DivergedError: if the updates can't be aggregated.
        """
        if not self._parts.eligibility.is_timed:
            if number == 1:
                self._parts.view.note(
                    "no device has a limit, so nobody is faster than another and rounds are synchronous; "
                    "population=mixed makes clients unequal"
                )
            return self._synchronous.play(number)
        clients = self._parts.eligibility.most_clients
        if self._buffer > clients:
            raise ConfigError(
                f"a step of the server takes {self._buffer} updates, and {clients} clients with rows give one each to "
                f"what it holds: take method.strategy.buffer={clients} or less"
            )
        begun = time.monotonic()
        played = Round(number)
        self._parts.view.round_begins(number, self._buffer)
        asked: set[int] = set()  # for the state that the server holds
        replies = Buffered()
        while len(replies) < self._buffer:
            self._fill(played, asked)
            if not self._pending:
                self._check(played, len(replies))
                break
            if (reply := self._next(played)) is not None:
                replies.append(reply)
            self._parts.view.reply(played.mean("train_loss"), len(played.failures), self._parts.channel.ledger.totals)
        replies.sort(key=lambda reply: reply[0].index)
        self._parts.known.strategy_state, _ = self._parts.aggregator.aggregate(
            self._parts.known.strategy_state, played, replies, lambda got: self._check(played, got)
        )
        self._parts.clock.record_losses(played.reported("train_loss"))
        played.virtual_seconds = self._parts.clock.set_time(self._parts.clock.progress.seconds)
        played.seconds = time.monotonic() - begun
        return played

    @property
    def _pending(self) -> dict[str, Any]:
        return self._parts.clock.progress.pending

    def _fill(self, played: Round, asked: set[int]) -> None:
        """Ask as many clients as a cohort lacks, until as many are at work or nobody is left.

        Args:
            asked: those that were asked already for what the server holds.
        """
        number, registry = played.number, self._parts.channel.registry
        present = registry.refresh(number)
        able, expected = self._parts.eligibility.clients(self._parts.known.strategy_state, number, present)
        able = [index for index in able if index in present and str(index) not in self._pending and index not in asked]
        while able and (lacking := self._parts.eligibility.cohort_size - len(self._pending)) > 0:
            chosen = self._parts.clock.cohort(number, able, lacking, registry.peers, expected)
            asked.update(chosen)
            able = [index for index in able if index not in asked]
            self._set_to_work(played, chosen)

    def _set_to_work(self, played: Round, chosen: Sequence[int]) -> None:
        def take(peer: ClientInfo, received: ReceivedUpdate, sent: SentInstruction) -> None:
            timed = played.turns.pop()
            played.told.pop(peer.index)
            update = received.update
            waiting = {
                "version": played.number - 1,
                "begun": timed.begun,
                "end": timed.begun + timed.turn.seconds,
                "turn": asdict(timed.turn),
                "peer": {"samples": peer.samples, "rank": peer.rank, "scaling": peer.scaling},
                "examples": update.examples,
                "metrics": dict(update.metrics),
                "norm": played.norms.pop(peer.index),
                "blob": torch.frombuffer(bytearray(received.blob), dtype=torch.uint8),
                "told": sent.decoded.tensors,
                "lost": sent.lost,
            }
            self._parts.clock.progress = replace(
                self._parts.clock.progress, pending={**self._pending, str(peer.index): waiting}
            )

        for index, arrival in self._parts.channel.ask(played.number, chosen):
            self._parts.channel.receive(index, arrival, played, take)

    def _next(self, played: Round) -> tuple[ClientInfo, Update] | None:
        """The answer that is there first, of equal ones the lowest index's; the clock goes on to then. None if it is
        out of all proportion to those that are at work or counted."""
        norms = {int(index): waiting["norm"] for index, waiting in self._pending.items()}
        index = min(map(int, self._pending), key=lambda index: (self._pending[str(index)]["end"], index))
        pending = dict(self._pending)
        ended = pending.pop(str(index))
        seconds = max(self._parts.clock.progress.seconds, ended["end"])
        self._parts.clock.progress = replace(self._parts.clock.progress, seconds=seconds, pending=pending)
        told, blob = ended["told"], ended["blob"].numpy().tobytes()
        known = self._parts.channel.uplink.known(Instruction(told))
        tensors = decode(self._parts.workspace.codec_up, blob, known)
        update = Update(tensors, ended["examples"], ended["metrics"])
        staleness = played.number - 1 - ended["version"]
        out = self._parts.aggregator.implausible(played.norms | norms, {index: told}).get(index, "")
        played.turns.append(Timed(index, Turn(**ended["turn"]), ended["begun"], staleness, out))
        if out:
            self._parts.channel.refuse(index, played, out)
            return None
        self._parts.channel.count(index, update, blob, told, played)
        played.norms[index] = ended["norm"]
        # As of a client that heard all that was meant (`Replies.add`)
        start = {name: known[name] for name in tensors if name in known}
        moved, start = (with_feedback(held, ended["lost"]) for held in (tensors, start))
        update = replace(update, tensors=moved, start=start)
        return ClientInfo(index, **ended["peer"], staleness=staleness), update

    def _check(self, played: Round, got: int) -> None:
        """Check that a round with that many updates counts.

        Raises:
            QuorumError: if it doesn't.
        """
        enough = self._parts.workspace.experiment.population.min_replies(self._buffer)
        what = "updates came and nobody is left to ask,"
        check_quorum(played, got, self._buffer, what, enough, self._parts.folder)
