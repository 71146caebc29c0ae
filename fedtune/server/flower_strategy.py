"""Our strategies in Flower's own ServerApps, and on Flower's own ClientApps.

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = as_flower_strategy(FedIT())
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(adapter), num_rounds=3)

Without a codec, messages look as those of Flower's own strategies: a record "arrays" and a record "config" with
"server-round" go down, one ArrayRecord and one MetricRecord with "num-examples" come up. A ClientApp that works with
FedAvg works with this.

With a codec, they carry what fedtune's own messages carry, and "config" besides:

    @app.train()
    def train(message: Message, context: Context) -> Message:
        instruction, _ = wire.unpack_instruction(message.content, codec)  # .tensors, .settings
        update = Update(tensors, examples, {"train_loss": loss, "partition-id": index})
        return Message(wire.pack_update(update, codec, key), reply_to=message)

Updates are folded in order of the clients' indices, so that the sum does not depend on who came first. A client tells
its index as a metric "partition-id" with each reply; one that doesn't goes by its node id, which Flower draws anew in
each run. A strategy that looks at `peer.index` sees the node id until the client's first reply.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedtune.core.errors import ClientError, ConfigError, FedtuneError, QuorumError, WireError
from fedtune.core.protocol import (
    SERVER,
    ClientInfo,
    Instruction,
    Layout,
    LosslessCodec,
    Slot,
    Strategy,
    Update,
    expect_like,
    is_lossless,
    same_instruction,
)
from fedtune.core.seeds import derive_seed
from fedtune.planning.population import sample_cohort
from fedtune.runs.checkpoint import state_sha256
from fedtune.wire import messages as wire

LOG = logging.getLogger("flwr.fedtune")  # its lines appear where Flower's own do
POLL_SECONDS = 1.0  # between two looks for nodes

Aggregate = Callable[[list[RecordDict], str], MetricRecord]


def as_flower_strategy(strategy: Strategy[Any], codec: LosslessCodec | None = None, **options: Any) -> "FlowerStrategy":
    """A `flwr.serverapp.strategy.Strategy` that aggregates as `strategy` does.

    Args:
        codec: what tensors look like on the wire, both ways, bit by bit; None sends plain Flower arrays.
        options: the other fields of `FlowerStrategy`.

    Raises:
        ConfigError: for an option out of range.
    """
    return FlowerStrategy(strategy, codec, **options)


@dataclass(eq=False)
class FlowerStrategy(flower.Strategy):
    """What `as_flower_strategy` makes. Names and defaults are those of Flower's FedAvg where it has them.

    `start` raises a QuorumError where too few replies of a round are usable, and a ConfigError where `initial_arrays`
    don't fit. A reply that is an error, has another form, isn't finite, or is refused by the strategy is left out; the
    reason is logged, and kept in `failures`.
    """

    strategy: Strategy[Any]
    codec: LosslessCodec | None = None
    layout: Layout | None = None  # for strategies that look at roles or scaling, which arrays don't tell; values aside
    seed: int = 0  # of the sampling and of the codec's draws
    quorum: float = 0.5  # a round counts when at least this fraction of its clients gave a usable update
    max_examples: int | None = None  # a reply that claims more examples is refused; None believes all
    fraction_train: float = 1.0
    fraction_evaluate: float = 1.0
    min_train_nodes: int = 2
    min_evaluate_nodes: int = 2
    min_available_nodes: int = 2
    weighted_by_key: str = "num-examples"
    arrayrecord_key: str = "arrays"
    configrecord_key: str = "config"
    index_key: str = "partition-id"
    train_metrics_aggr_fn: Aggregate | None = None  # given the metrics that are numbers; None takes weighted means
    evaluate_metrics_aggr_fn: Aggregate | None = None

    state: Any = field(default=None, init=False)  # the strategy's own, after the last round
    failures: list[tuple[int, int, str]] = field(default_factory=list, init=False)  # round, node, reason
    peers: dict[int, ClientInfo] = field(default_factory=dict, init=False)  # by node, once it replied
    _start: Layout = field(init=False, repr=False)
    _known: dict[str, Array] = field(default_factory=dict, init=False, repr=False)  # the arrays that `state` stands for
    _sent: list[Message] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, low in (("fraction_train", 1e-9), ("fraction_evaluate", 0), ("quorum", 0)):
            if not low <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name}={value}: expected a fraction {'from' if low == 0 else 'above'} 0 up to 1")
        if self.codec is not None and not is_lossless(self.codec):
            raise ConfigError(
                f"codec={type(self.codec).__name__}: another app's clients don't say what they began with; a lossy "
                "codec carries the difference from that: take Raw() or Packed()"
            )

    def summary(self) -> None:
        codec = type(self.codec).__name__ if self.codec else "none, plain arrays"
        LOG.info("\t├──> %s, codec: %s", self.strategy, codec)
        LOG.info("\t└──> Fraction: train (%.2f) | evaluate (%.2f)", self.fraction_train, self.fraction_evaluate)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if server_round == 1 or self.state is None:
            self._begin(arrays)
        self._take_up(arrays)
        nodes = self._sample("train", server_round, self.fraction_train, self.min_train_nodes, grid)
        self._sent = list(self._messages(server_round, server_round, MessageType.TRAIN, config, nodes))
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        usable: list[tuple[int, ClientInfo, Update]] = []
        failed_before = len(self.failures)
        for node, reply in self._answers(server_round, replies):
            try:
                usable.append((node, *self._receive(server_round, node, reply)))
            except FedtuneError as error:
                self._fail(server_round, node, str(error))
        claims = Counter(peer.index for _, peer, _ in usable)
        accepted: list[tuple[ClientInfo, Update]] = []
        for node, peer, update in usable:
            if claims[peer.index] == 1:
                self.peers[node] = peer
                accepted.append((peer, update))
            else:  # both: else the result would depend on who came first
                told = (
                    f"it says it is client {peer.index}, and so does another node: give each its own {self.index_key}"
                )
                self._fail(server_round, node, told)
        enough = max(1, math.ceil(self.quorum * len(self._sent) - 1e-9))
        if len(accepted) < enough:
            first = next((f"; node {node}: {reason}" for _, node, reason in self.failures[failed_before:]), "")
            raise QuorumError(
                f"round {server_round}: {len(accepted)} of {len(self._sent)} clients gave a usable update, "
                f"quorum={self.quorum:g} asks for {enough}{first}"
            )
        accepted.sort(key=lambda reply: reply[0].index)
        self.state = self.strategy.aggregate(self.state, server_round, accepted)
        arrays = self._broadcast(server_round + 1)
        self._known = dict(arrays)
        means = self._combine(self.train_metrics_aggr_fn, [(u.examples, u.metrics) for _, u in accepted])
        return arrays, means

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.fraction_evaluate == 0:
            self._sent = []
            return []
        self._take_up(arrays)
        nodes = self._sample("evaluate", server_round, self.fraction_evaluate, self.min_evaluate_nodes, grid)
        # What they would train on next is what is scored
        self._sent = list(self._messages(server_round + 1, server_round, MessageType.EVALUATE, config, nodes))
        return self._sent

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        found: list[tuple[int, Mapping[str, float]]] = []
        for node, reply in self._answers(server_round, replies):
            try:
                found.append(self._metrics(_only(_content(reply).metric_records, "MetricRecord")))
            except FedtuneError as error:
                self._fail(server_round, node, str(error))
        return self._combine(self.evaluate_metrics_aggr_fn, found) if found else None

    def _begin(self, arrays: ArrayRecord) -> None:
        """The strategy's first state, from what Flower calls initial arrays."""
        try:
            tensors = wire.unpack_arrays(arrays)
            wire.check_finite(tensors)
            if self.layout is not None:
                like = {s.name: torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for s in self.layout.slots}
                expect_like(tensors, like)
                tensors = {name: tensors[name] for name in like}
        except WireError as error:
            raise ConfigError(f"initial_arrays: {error}") from error
        slots = self.layout.slots if self.layout else tuple(_untold(name, tensor) for name, tensor in tensors.items())
        self._start = Layout(slots, tensors)
        self.state = self.strategy.init(self._start)
        self.failures, self.peers, self._known = [], {}, dict(arrays)

    def _take_up(self, arrays: ArrayRecord) -> None:
        """Go on from arrays that somebody changed after `aggregate_train`, as Flower's differential privacy does.

        Raises:
            ConfigError: if the strategy keeps more between rounds than arrays can tell.
        """
        if dict(arrays) == self._known:
            return
        rebuilt = self.strategy.init(replace(self._start, initial=wire.unpack_arrays(self._known)))
        if state_sha256(rebuilt) != state_sha256(self.state):
            raise ConfigError(
                f"the arrays were changed between rounds, as by a wrapper around this strategy, and "
                f"{type(self.strategy).__name__} can't go on from changed ones: its state is more than arrays. "
                "Use a strategy whose state is its arrays, without a lossy codec, or leave the wrapper out"
            )
        tensors = wire.unpack_arrays(arrays)
        expect_like(tensors, self._start.initial)
        self.state, self._known = self.strategy.init(replace(self._start, initial=tensors)), dict(arrays)

    def _sample(self, purpose: str, server_round: int, fraction: float, least: int, grid: Grid) -> list[int]:
        """Nodes by seed. The draw is over indices as far as they are known, so that it can be repeated."""
        while True:
            nodes = sorted(grid.get_node_ids(), key=lambda node: self._peer(node).index)
            wanted = max(int(len(nodes) * fraction), least)
            if len(nodes) >= (needed := max(wanted, self.min_available_nodes, 1)):
                return [
                    nodes[place]
                    for place in sample_cohort(len(nodes), wanted, derive_seed(self.seed, purpose), server_round)
                ]
            LOG.info("waiting for nodes: %d of at least %d are connected", len(nodes), needed)
            time.sleep(POLL_SECONDS)

    def _peer(self, node: int) -> ClientInfo:
        return self.peers.get(node, ClientInfo(node, samples=1))

    def _messages(
        self, number: int, server_round: int, kind: str, config: ConfigRecord, nodes: Iterable[int]
    ) -> Iterator[Message]:
        """The instructions of round `number`. Clients that are sent the same share one content, as in Flower."""
        made: list[tuple[Instruction, RecordDict]] = []
        words = {**config, "server-round": server_round}
        for node in nodes:
            instruction = self.strategy.configure(self.state, number, self._peer(node))
            content = next((content for known, content in made if same_instruction(known, instruction)), None)
            if content is None:
                content = self._pack(instruction, number, words)
                made.append((instruction, content))
            yield Message(content, node, kind, group_id=str(server_round))

    def _pack(self, instruction: Instruction, number: int, words: dict[str, Any]) -> RecordDict:
        if self.codec is not None:
            content = wire.pack_instruction(instruction, self.codec, derive_seed(self.seed, "down", number))
            content[self.configrecord_key] = ConfigRecord(words)
            return content
        if clash := words.keys() & instruction.settings.keys():
            raise ConfigError(
                f"train_config: '{min(clash)}' is a setting of {type(self.strategy).__name__}; rename yours"
            )
        settings = ConfigRecord({**words, **instruction.settings})
        return RecordDict(
            {self.arrayrecord_key: wire.pack_arrays(instruction.tensors), self.configrecord_key: settings}
        )

    def _broadcast(self, number: int) -> ArrayRecord:
        """What a fully capable client would hold after decoding the broadcast of round `number`."""
        tensors = self.strategy.configure(self.state, number, ClientInfo(SERVER, 1)).tensors
        if self.codec is not None:
            decoded = self.codec.decode(self.codec.encode(tensors, derive_seed(self.seed, "down", number)))
            tensors = {name: decoded[name] for name in tensors}  # safetensors keeps no order, and Flower's users do
        return wire.pack_arrays(tensors)

    def _answers(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[int, Message]]:
        """Each asked node's first reply; the rest are failures."""
        # By the message that it answers: an error may come under another node's id
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._sent}
        waiting = dict.fromkeys(message.metadata.dst_node_id for message in self._sent)
        for reply in replies:
            node = asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            if node in waiting:
                del waiting[node]
                yield node, reply
            else:
                self._fail(server_round, node, "it was not asked, or has answered already")
        for node in waiting:
            self._fail(server_round, node, "no reply within the timeout")

    def _receive(self, server_round: int, node: int, reply: Message) -> tuple[ClientInfo, Update]:
        content = _content(reply)
        if self.codec is not None:
            update = wire.unpack_update(content, wire.blob_of(content), self.codec)
        else:
            tensors = wire.unpack_arrays(_only(content.array_records, "ArrayRecord"))
            wire.check_finite(tensors)
            update = Update(tensors, *self._metrics(_only(content.metric_records, "MetricRecord")))
        if self.max_examples is not None and update.examples > self.max_examples:
            raise WireError(f"it claims {update.examples} examples; max_examples={self.max_examples}")
        metrics = dict(update.metrics)
        peer = ClientInfo(self._index(node, metrics.pop(self.index_key, None)), update.examples)
        update = replace(update, metrics=metrics)
        self.strategy.validate(self.state, server_round, peer, update)
        return peer, update

    def _index(self, node: int, told: float | None) -> int:
        if told is None:
            return self._peer(node).index
        if not told.is_integer() or told < 0:
            raise WireError(f"'{self.index_key}' should be a whole number from 0 up, got {told}")
        index = int(told)
        if node in self.peers and self.peers[node].index not in (index, node):
            raise WireError(f"it says it is client {index}, and was {self.peers[node].index} before")
        if other := next((n for n, peer in self.peers.items() if peer.index == index and n != node), None):
            raise WireError(f"it says it is client {index}, which node {other} is already")
        return index

    def _metrics(self, record: MetricRecord) -> tuple[int, dict[str, float]]:
        """Examples, and the metrics that are numbers; lists are left out."""
        examples = record.get(self.weighted_by_key)
        if not (isinstance(examples, int) or (isinstance(examples, float) and examples.is_integer())) or examples < 1:
            raise WireError(f"'{self.weighted_by_key}' should be a positive whole number, got {examples!r}")
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != self.weighted_by_key}
        if bad := next((name for name, value in numbers.items() if not math.isfinite(value)), None):
            raise WireError(f"metric '{bad}' should be finite, got {numbers[bad]}")
        return int(examples), numbers

    def _combine(self, aggregate: Aggregate | None, found: Sequence[tuple[int, Mapping[str, float]]]) -> MetricRecord:
        if aggregate is not None:
            records = [MetricRecord({self.weighted_by_key: examples, **metrics}) for examples, metrics in found]
            return aggregate([RecordDict({"metrics": record}) for record in records], self.weighted_by_key)
        means = MetricRecord()
        for name in sorted({name for _, metrics in found for name in metrics}):
            having = [(examples, metrics[name]) for examples, metrics in found if name in metrics]
            means[name] = sum(n * value for n, value in having) / sum(n for n, _ in having)
        return means

    def _fail(self, server_round: int, node: int, reason: str) -> None:
        reason = " ".join(reason.split())
        self.failures.append((server_round, node, reason))
        LOG.warning("round %d: node %d is left out: %s", server_round, node, reason)


class _Untold(Slot):
    """A slot of which only name, shape and dtype are known: whoever asks for more is told so."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("role", "module", "scaling"):
            raise ConfigError(
                f"this strategy asks for the {name} of '{self.name}', which arrays don't tell: "
                "give as_flower_strategy a layout=Layout(slots, {})"
            )
        return super().__getattribute__(name)


def _untold(name: str, tensor: torch.Tensor) -> Slot:
    return _Untold(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "", "", math.nan)


def _content(reply: Message) -> RecordDict:
    if reply.has_error():
        raise ClientError(reply.error.reason or f"Flower error {reply.error.code}")
    return reply.content


def _only(records: Mapping[str, Any], kind: str) -> Any:
    if len(records) != 1:
        raise WireError(f"expected exactly one {kind}, got {len(records)}")
    return next(iter(records.values()))
