"""What a client's local update takes on its device, and when it was."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """What one client's turn takes on its device."""

    device: str
    down_bytes: float
    download: float  # seconds
    compute: float
    up_bytes: float
    upload: float
    memory_bytes: float
    limit_bytes: float  # what the device has
    bits: int
    batch_size: int
    steps: int
    layers: int
    trainable_params: int  # that it trains

    @property
    def seconds(self) -> float:
        return self.download + self.compute + self.upload


@dataclass(frozen=True)
class Timed:
    """A turn as the clock saw it: a line of clock.csv."""

    client: int
    turn: Turn
    begun: float  # what the clock showed when the client was asked
    staleness: int = 0  # updates of the server's since then
    excluded_reason: str = ""  # why its update isn't part of the round; empty if it is
