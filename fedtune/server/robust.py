"""Flower's robust aggregations on our replies.

The maths is Flower's own: its strategies are handed the updates as they hand each other messages. Values travel as
float64, which holds float32, float16 and bfloat16 exactly (numpy has no bfloat16), and are rounded once, at the end, to
the adapter's dtype. The width also matters to Krum and Bulyan: Flower takes |x - y|^2 as |x|^2 + |y|^2 - 2 x.y, and in
float32 the clients of one round, which differ little, would be told apart by rounding.

All replies are held at once, unlike in a sum: 24 bytes a value and reply, for Bulyan 34.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedtune.core.errors import ConfigError, QuorumError
from fedtune.core.protocol import ClientInfo, Tensors, Update
from fedtune.wire.flower_private import as_message, suppress_logs
from fedtune.wire.messages import pack_arrays, unpack_arrays

Replies = Sequence[tuple[ClientInfo, Update]]


@dataclass(frozen=True)
class State:
    adapter: Tensors  # what the last round agreed on, as trained


def median(adapter: Tensors, replies: Replies) -> Tensors:
    """The median of each number; of an even count, the mean of the middle two."""
    return _through(flower.FedMedian(), adapter, replies)


def trimmed_mean(adapter: Tensors, replies: Replies, beta: float) -> Tensors:
    """The mean of each number without its floor(beta n) lowest and as many of its highest values."""
    return _through(flower.FedTrimmedAvg(beta=beta), adapter, replies)


def krum(adapter: Tensors, replies: Replies, malicious: int, selected: int) -> Tensors:
    """The mean, weighted by examples, of the `selected` updates with the nearest neighbours."""
    rule = flower.MultiKrum(num_malicious_nodes=malicious, num_nodes_to_select=selected)
    return _through(rule, adapter, replies)


def bulyan(adapter: Tensors, replies: Replies, malicious: int) -> Tensors:
    """For each number, the mean of the values nearest to the median of the updates that Krum selects."""
    if malicious == 0:
        # Then all are selected and all are nearest: the mean of all, for which Flower's Bulyan asks for three replies
        return trimmed_mean(adapter, replies, 0.0)
    return _through(flower.Bulyan(num_malicious_nodes=malicious), adapter, replies)


def tolerated(num_malicious: int | None, replies: int, each: int) -> int:
    """How many attackers f to guard against among `replies`, where the proof asks for n >= each * f + 3.

    Args:
        num_malicious: f as the method was given it; None takes the most that the replies allow, down to none.

    Raises:
        QuorumError: if the replies don't suffice for the f that was given.
    """
    if num_malicious is None:
        return max(0, (replies - 3) // each)
    need = each * num_malicious + 3
    if num_malicious and replies < need:
        raise QuorumError(
            f"{replies} replies can't outvote {num_malicious} attackers: expected at least {need}. Raise "
            "population.cohort or population.quorum, or lower method.strategy.num_malicious (null: what they allow)"
        )
    return num_malicious


def check_count(name: str, value: object, low: int) -> None:
    """Check a hyper-parameter that is a whole number or None.

    Raises:
        ConfigError: naming it.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
        raise ConfigError(f"method.strategy.{name}={value}: expected a whole number from {low} up, or null")


def _through(rule: flower.FedAvg, adapter: Tensors, replies: Replies) -> Tensors:
    messages = []
    for _, update in replies:
        # In the adapter's order, whatever the client's: Flower lays the numbers end to end to measure distances
        arrays = pack_arrays({name: update.tensors[name].double() for name in adapter})
        metrics = MetricRecord({rule.weighted_by_key: update.examples})
        messages.append(as_message(RecordDict({"arrays": arrays, "metrics": metrics})))
    with suppress_logs():
        merged, _ = rule.aggregate_train(0, messages)
    assert merged is not None, "Flower skips a round without replies"
    found = unpack_arrays(merged)
    return {name: found[name].to(tensor.dtype) for name, tensor in adapter.items()}
