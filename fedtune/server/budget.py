"""What a run may spend: the first limit of `budget.` that the next round would go beyond ends it."""

from dataclasses import dataclass

from fedtune.config.schema import BudgetSpec


@dataclass(frozen=True)
class Spent:
    """What a run has come to."""

    rounds: int = 0
    bytes: int = 0  # wire bytes, both ways
    seconds: float = 0.0
    loss: float | None = None  # the last held-out one, nats per token
    round_bytes: int = 0  # of the last round alone
    round_seconds: float = 0.0


def ended_by(budget: BudgetSpec, spent: Spent) -> str | None:
    """The limit that leaves no room for another round like the last one, as "budget.bytes=4e+07"; None while there is
    room."""
    if spent.rounds < budget.rounds:
        return None
    if budget.bytes is not None and spent.bytes + spent.round_bytes > budget.bytes:
        return f"budget.bytes={budget.bytes:g}"
    if budget.seconds is not None and spent.seconds + spent.round_seconds > budget.seconds:
        return f"budget.seconds={budget.seconds:g}"
    if budget.loss is not None and spent.loss is not None and spent.loss <= budget.loss:
        return f"budget.loss={budget.loss:g}"
    return None
