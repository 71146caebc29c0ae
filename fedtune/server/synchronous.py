"""Synchronous rounds: a cohort is asked, and the round is over when all of it has answered, or is late.

eligible clients -> cohort -> ask ... receive -> check -> aggregate -> the clock goes on
"""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from fedtune.core.errors import QuorumError
from fedtune.core.protocol import ClientInfo
from fedtune.planning.population import server_peer
from fedtune.runs.run_folder import RunFolder
from fedtune.runs.update_store import Replies
from fedtune.server.aggregation_error import aggregation_error
from fedtune.server.round import Round
from fedtune.server.round_parts import RoundParts
from fedtune.workspace.downlink import SentInstruction
from fedtune.workspace.uplink import ReceivedUpdate


class SynchronousRounds:
    """How rounds are played where the server waits for a cohort."""

    def __init__(self, parts: RoundParts):
        self._parts = parts

    def play(self, number: int) -> Round:
        """One round, up to the aggregated state.

        Raises:
            QuorumError: if too few clients can take part, or gave a usable update.
            DivergedError: if the updates can't be aggregated.
        """
        played = Round(number)
        begun = time.monotonic()
        channel, view = self._parts.channel, self._parts.view
        present = channel.registry.refresh(number)
        able, expected = self._parts.eligibility.clients(self._parts.known.strategy_state, number, present)
        self._parts.eligibility.check(number, able)
        size = self._parts.eligibility.cohort_size
        cohort = self._parts.clock.cohort(number, able, size, channel.registry.peers, expected)
        asked = [index for index in cohort if index in present]
        view.round_begins(number, len(cohort))

        def check(got: int) -> None:
            enough = self._parts.workspace.experiment.population.min_replies(max(len(cohort), size))
            check_quorum(played, got, len(cohort), "clients gave a usable update,", enough, self._parts.folder)

        with closing(Replies(self._parts.workspace.codec_up, Path(self._parts.folder.path))) as replies:

            def take(peer: ClientInfo, received: ReceivedUpdate, sent: SentInstruction) -> None:
                replies.add(peer, received.update, received.blob, received.known, sent.lost)
                channel.count(peer.index, received.update, received.blob, sent.decoded.tensors, played)

            for index in cohort:
                if index not in present:
                    channel.miss(index, played)
            for index, arrival in channel.ask(number, asked):
                channel.receive(index, arrival, played, take)
                view.reply(played.mean("train_loss"), len(played.failures), channel.ledger.totals)
            self._parts.aggregator.sift(played, replies)
            check(len(replies))
            replies.sort()
            self._aggregate(played, replies, check)
        self._parts.clock.record_losses(played.reported("train_loss"))
        if self._parts.clock.timed:
            played.virtual_seconds = self._parts.clock.advance(played.turns, played.clients < len(asked))
        played.seconds = time.monotonic() - begun
        return played

    def _aggregate(self, played: Round, replies: Replies, check: Callable[[int], None]) -> None:
        before = self._parts.known.strategy_state
        self._parts.known.strategy_state, weighed = self._parts.aggregator.aggregate(before, played, replies, check)
        if self._parts.workspace.experiment.evaluate.exactness:
            layout, strategy = self._parts.workspace.model.layout, self._parts.workspace.strategy
            me, after = server_peer(self._parts.workspace.experiment, layout), self._parts.known.strategy_state
            played.error = aggregation_error(layout, strategy, played.number, before, after, weighed, me)


def check_quorum(played: Round, got: int, asked: int, what: str, enough: int, folder: RunFolder) -> None:
    """Check that so many updates make a round; if they don't, the reasons are written down first.

    Args:
        what: of `asked`, `got` did.

    Raises:
        QuorumError: if there are fewer than `enough`.
    """
    if got < enough:
        folder.append_failures(played.failures)
        first = next((f"; client {peer}: {reason}" for _, peer, reason in played.failures), "")
        raise QuorumError(f"round {played.number}: {got} of {asked} {what} population.quorum asks for {enough}{first}")
