"""The ledger: bytes and seconds by round, client, direction and part.

Kept by the server from what it sent and received, so a client can't misreport.
"""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class Part(StrEnum):
    """What a message was for; in ledger.csv it is the value."""

    HANDSHAKE = "handshake"
    TRAIN = "train"
    EVALUATE = "evaluate"  # only measures, so no budget counts it
    IDLE = "idle"  # moved around messages without one: a node's asking whether there is any
    FAILED = "failed"  # an error, a refused update, no reply


class LedgerRow(NamedTuple):
    """One message that crossed the wire, or should have."""

    round: int
    client: int  # the client's index
    direction: str  # "down" to the client, "up" from it
    part: Part
    payload_bytes: int  # the codec's blob
    wire_bytes: int  # the serialised message
    overhead_bytes: int  # what a deployment moves around it, either way; 0 where there are no sockets
    seconds: float  # down: making the message; up: until its reply was there

    def line(self) -> str:
        """The line in ledger.csv; nothing in it needs quotes."""
        round, client, direction, part, payload, wire, overhead, seconds = self
        return f"{round},{client},{direction},{part},{payload},{wire},{overhead},{seconds:.6f}\n"


COLUMNS = LedgerRow._fields


TOTALS = {
    "up": ("up_payload_bytes", "up_wire_bytes"),
    "down": ("down_payload_bytes", "down_wire_bytes"),
}


class Ledger:
    """Totals over all entries, and the entries that are not yet on disk.

    `spent_bytes` are the wire bytes of both directions without those of messages that only measure."""

    def __init__(self, entries: Iterable[LedgerRow] = ()):
        self.totals: Counter[str] = Counter()
        self.pending: list[LedgerRow] = []
        for entry in entries:
            self._add(entry)

    def record(self, entry: LedgerRow) -> None:
        self._add(entry)
        self.pending.append(entry)

    def fail(self, round: int, client: int) -> None:
        """Book an update that came in this round as failed after all; one that is on disk stays as it was."""
        for place, entry in enumerate(self.pending):
            if (entry.round, entry.client, entry.direction, entry.part) == (round, client, "up", Part.TRAIN):
                self.pending[place] = entry._replace(part=Part.FAILED)
                self.totals["failed"] += 1
                return

    def take_pending(self) -> list[LedgerRow]:
        pending, self.pending = self.pending, []
        return pending

    def _add(self, entry: LedgerRow) -> None:
        payload, wire = TOTALS[entry.direction]
        self.totals[payload] += entry.payload_bytes
        self.totals[wire] += entry.wire_bytes
        self.totals["overhead_bytes"] += entry.overhead_bytes
        self.totals["spent_bytes"] += entry.wire_bytes * (entry.part != Part.EVALUATE)
        self.totals["messages"] += entry.wire_bytes > 0
        self.totals["failed"] += entry.part == Part.FAILED


def sums(entries: Iterable[LedgerRow]) -> dict[str, int]:
    """Bytes by direction and kind, e.g. {"up_payload_bytes": ...}; the overhead is of both directions."""
    totals = Ledger(entries).totals
    return {name: totals[name] for name in (*(name for names in TOTALS.values() for name in names), "overhead_bytes")}


def parse(row: list[str]) -> LedgerRow:
    """An entry from its line in ledger.csv. Raises ValueError on any other line."""
    round_, client, direction, part, payload, wire, overhead, seconds = row
    if direction not in TOTALS:
        raise ValueError(f"direction: expected {' or '.join(TOTALS)}, got {direction!r}")
    counted = int(payload), int(wire), int(overhead)
    return LedgerRow(int(round_), int(client), direction, Part(part), *counted, float(seconds))
