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

from fedtune.core.errors import ConfigError, QuorumError
from fedtune.core.protocol import ClientInfo, Instruction, Update
from fedtune.runs.update_store import Buffered
from fedtune.server.round import Asked, Round
from fedtune.server.round_loop import Server
from fedtune.server.virtual_clock import Timed, Turn
from fedtune.wire.delta_coding import decode, with_feedback


class AsynchronousServer(Server):
    """One run of an asynchronous method."""

    keeps_told = True

    @property
    def buffer(self) -> int:
        """Updates that a step of the server takes."""
        buffer: int = getattr(self.strategy, "buffer")  # noqa: B009 (fedtune/config/compatibility.py has looked)
        return buffer

    def _play(self, number: int) -> Round:
        if not self._is_timed():
            if number == 1:
                self.view.note(
                    "no device has a limit, so nobody is faster than another and rounds are synchronous; "
                    "population=mixed makes clients unequal"
                )
            return super()._play(number)
        clients = self.experiment.population.clients - len(self.idle)
        if self.buffer > clients:
            raise ConfigError(
                f"a step of the server takes {self.buffer} updates, and {clients} clients with rows give one each to "
                f"what it holds: take method.strategy.buffer={clients} or less"
            )
        begun = time.monotonic()
        self.before = (self.ledger.totals["spent_bytes"], self.seconds)
        played = Round(number)
        self.view.round_begins(number, self.buffer)
        asked: set[int] = set()  # for the state that the server holds
        replies = Buffered()
        while len(replies) < self.buffer:
            self._fill(played, asked)
            if not self._pending:
                self._check_buffer(played, len(replies))
                break
            if (reply := self._next(played)) is not None:
                replies.append(reply)
            self.view.reply(played.mean("train_loss"), len(played.failures), self.ledger.totals)
        replies.sort(key=lambda reply: reply[0].index)
        self.state, _ = self.aggregator.aggregate(
            self.state, played, replies, lambda got: self._check_buffer(played, got)
        )
        self.clock.hear(played.reported("train_loss"))
        played.virtual_seconds = self.clock.settle(self.clock.progress.seconds)
        played.seconds = time.monotonic() - begun
        return played

    def _is_timed(self) -> bool:
        return super()._is_timed() or bool(self._pending)  # devices may come back as others, while some are at work

    @property
    def _pending(self) -> dict[str, Any]:
        return self.clock.progress.pending

    def _fill(self, played: Round, asked: set[int]) -> None:
        """Ask as many clients as a cohort lacks, until as many are at work or nobody is left.

        Args:
            asked: those that were asked already for what the server holds.
        """
        number = played.number
        present = self.roster.refresh(number)
        able, expected = self._able(number)
        able = [index for index in able if index in present and str(index) not in self._pending and index not in asked]
        while able and (lacking := self.cohort_size - len(self._pending)) > 0:
            chosen = self.clock.cohort(number, able, lacking, self.roster.peers, expected)
            asked.update(chosen)
            able = [index for index in able if index not in asked]
            self._set_to_work(played, chosen)

    def _set_to_work(self, played: Round, chosen: Sequence[int]) -> None:
        def take(peer: ClientInfo, update: Update, blob: bytes, asked: Asked) -> None:
            timed = played.turns.pop()
            played.told.pop(peer.index)
            waiting = {
                "version": played.number - 1,
                "begun": timed.begun,
                "end": timed.begun + timed.turn.seconds,
                "turn": asdict(timed.turn),
                "peer": {"samples": peer.samples, "rank": peer.rank, "scaling": peer.scaling},
                "examples": update.examples,
                "metrics": dict(update.metrics),
                "norm": played.norms.pop(peer.index),
                "blob": torch.frombuffer(bytearray(blob), dtype=torch.uint8),
                "told": asked.heard.tensors,
                "lost": asked.lost,
            }
            self.clock.progress = replace(self.clock.progress, pending={**self._pending, str(peer.index): waiting})

        for index, arrival in self._ask(played.number, chosen):
            self._receive(index, arrival, played, take)

    def _next(self, played: Round) -> tuple[ClientInfo, Update] | None:
        """The answer that is there first, of equal ones the lowest index's; the clock goes on to then. None if it is
        out of all proportion to those that are at work or counted."""
        norms = {int(index): waiting["norm"] for index, waiting in self._pending.items()}
        index = min(map(int, self._pending), key=lambda index: (self._pending[str(index)]["end"], index))
        pending = dict(self._pending)
        ended = pending.pop(str(index))
        seconds = max(self.clock.progress.seconds, ended["end"])
        self.clock.progress = replace(self.clock.progress, seconds=seconds, pending=pending)
        told, blob = ended["told"], ended["blob"].numpy().tobytes()
        known = self.workspace.known(Instruction(told))
        tensors = decode(self.workspace.codec_up, blob, known)
        update = Update(tensors, ended["examples"], ended["metrics"])
        staleness = played.number - 1 - ended["version"]
        out = self.aggregator.implausible(played.norms | norms, {index: told}).get(index, "")
        played.turns.append(Timed(index, Turn(**ended["turn"]), ended["begun"], staleness, out))
        if out:
            self._refuse(index, played, out)
            return None
        self._count(index, update, blob, told, played)
        played.norms[index] = ended["norm"]
        # As of a client that heard all that was meant (`Replies.add`)
        start = {name: known[name] for name in tensors if name in known}
        moved, start = (with_feedback(held, ended["lost"]) for held in (tensors, start))
        update = replace(update, tensors=moved, start=start)
        return ClientInfo(index, **ended["peer"], staleness=staleness), update

    def _check_buffer(self, played: Round, got: int) -> None:
        """
        Raises:
            QuorumError: if a round with that many updates doesn't count.
        """
        enough = self.experiment.population.min_replies(self.buffer)
        if got < enough:
            self.folder.append_failures(played.failures)
            first = next((f"; client {peer}: {reason}" for _, peer, reason in played.failures), "")
            raise QuorumError(
                f"round {played.number}: {got} of {self.buffer} updates came and nobody is left to ask, "
                f"population.quorum asks for {enough}{first}"
            )
