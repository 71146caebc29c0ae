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
from fedtune.server.aggregation import Aggregator
from fedtune.server.aggregation_error import aggregation_error
from fedtune.server.client_channel import ClientChannel
from fedtune.server.eligibility import Eligibility
from fedtune.server.progress import View
from fedtune.server.round import Round
from fedtune.server.state import ServerState
from fedtune.server.virtual_clock import Clock
from fedtune.workspace.downlink import SentInstruction
from fedtune.workspace.uplink import ReceivedUpdate
from fedtune.workspace.workspace import Workspace


class SynchronousRounds:
    """How rounds are played where the server waits for a cohort."""

    def __init__(
        self,
        workspace: Workspace,
        channel: ClientChannel,
        eligibility: Eligibility,
        aggregator: Aggregator,
        clock: Clock,
        known: ServerState,
        folder: RunFolder,
        view: View,
    ):
        self._workspace = workspace
        self._channel = channel
        self._eligibility = eligibility
        self._aggregator = aggregator
        self._clock = clock
        self._known = known
        self._folder = folder
        self._view = view

    def play(self, number: int) -> Round:
        """One round, up to the aggregated state.

        Raises:
            QuorumError: if too few clients can take part, or gave a usable update.
            DivergedError: if the updates can't be aggregated.
        """
        played = Round(number)
        begun = time.monotonic()
        channel, view = self._channel, self._view
        present = channel.registry.refresh(number)
        able, expected = self._eligibility.clients(self._known.strategy_state, number)
        self._eligibility.check(number, able)
        size = self._eligibility.cohort_size
        cohort = self._clock.cohort(number, able, size, channel.registry.peers, expected)
        asked = [index for index in cohort if index in present]
        view.round_begins(number, len(cohort))

        def check(got: int) -> None:
            enough = self._workspace.experiment.population.min_replies(max(len(cohort), size))
            check_quorum(played, got, len(cohort), "clients gave a usable update,", enough, self._folder)

        with closing(Replies(self._workspace.codec_up, Path(self._folder.path))) as replies:

            def take(peer: ClientInfo, received: ReceivedUpdate, sent: SentInstruction) -> None:
                replies.add(peer, received.update, received.blob, received.known, sent.lost)
                channel.count(peer.index, received.update, received.blob, sent.decoded.tensors, played)

            for index in cohort:
                if index not in present:
                    channel.miss(index, played)
            for index, arrival in channel.ask(number, asked):
                channel.receive(index, arrival, played, take)
                view.reply(played.mean("train_loss"), len(played.failures), channel.ledger.totals)
            self._aggregator.sift(played, replies)
            check(len(replies))
            replies.sort()
            self._aggregate(played, replies, check)
        self._clock.record_losses(played.reported("train_loss"))
        if self._clock.timed:
            played.virtual_seconds = self._clock.advance(played.turns, played.clients < len(asked))
        played.seconds = time.monotonic() - begun
        return played

    def _aggregate(self, played: Round, replies: Replies, check: Callable[[int], None]) -> None:
        before = self._known.strategy_state
        self._known.strategy_state, weighed = self._aggregator.aggregate(before, played, replies, check)
        if self._workspace.experiment.evaluate.exactness:
            layout, strategy = self._workspace.model.layout, self._workspace.strategy
            me, after = server_peer(self._workspace.experiment, layout), self._known.strategy_state
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
