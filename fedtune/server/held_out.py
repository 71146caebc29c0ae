"""How good the model is after a round: on the server's held-out rows, and on the clients' own, by the clients."""

from flwr.app import MessageType

from fedtune.config.compatibility import traits_of
from fedtune.core.errors import FedtuneError
from fedtune.core.protocol import Instruction, Score
from fedtune.evaluation.scoring import mean_score
from fedtune.runs.ledger import Part
from fedtune.server.round_parts import RoundParts
from fedtune.wire.messages import unpack_score


class HeldOut:
    """One run's evaluation."""

    def __init__(self, parts: RoundParts):
        self._parts = parts
        self._spec = parts.workspace.experiment.evaluate
        self._personal = traits_of(parts.workspace.strategy).personal
        # Where clients bring their data and the server has none, theirs are all there are
        brought = parts.workspace.experiment.data.is_brought and not len(parts.workspace.data.server)
        self._by_clients = self._personal or brought

    def score(self, number: int, broadcast: Instruction) -> Score | None:
        """The round's score, where one is due: of a personal method the clients' own models', and where the server has
        no data theirs.

        Args:
            broadcast: what the server's own model holds, which it is to hold afterwards as well.
        """
        every = self._spec.every
        if not (every and number % every == 0):
            return None
        return self.ask_clients(number, broadcast) if self._by_clients else self._parts.workspace.evaluate()

    def clients_are_due(self, number: int, last: bool) -> bool:
        """Whether clients are to score the global model after this round.

        Args:
            last: whether the run ends with it.
        """
        every = self._spec.peers == "every" and self._spec.every > 0 and number % self._spec.every == 0
        return not self._by_clients and (every or (self._spec.peers == "last" and last))

    def ask_clients(self, number: int, broadcast: Instruction) -> Score | None:
        """How good what the clients hold is after round `number` (the global model, or their own), each on its own
        held-out data: the mean over all that are there, weighted by samples.

        Args:
            broadcast: as for `score`.
        """
        channel, registry = self._parts.channel, self._parts.channel.registry
        present, idle = channel.transport.nodes(), self._parts.eligibility.idle
        there = [i for i in sorted(registry.nodes) if registry.nodes[i] in present and i not in idle]
        scores: dict[int, Score] = {}
        for index, arrival in channel.ask(number + 1, there, MessageType.EVALUATE, number):
            part = Part.EVALUATE
            try:
                if (score := unpack_score(arrival.content())) is not None:
                    scores[index] = score
            except FedtuneError as error:
                part = Part.FAILED
                self._parts.view.note(f"client {index} could not be evaluated: {error}")
            channel.record_reply(number, index, part, arrival)
        self._parts.workspace.install(broadcast, memory={})  # clients in this process had the model meanwhile
        self._parts.folder.append_clients(number, scores, {index: registry.peers[index].name for index in scores})
        counted = self._parts.aggregator.weights([registry.peers[index].samples for index in scores])
        return mean_score(dict(zip(scores, counted, strict=True)), scores)
