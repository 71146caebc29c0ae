"""What a run may spend: whichever limit of `budget.` it reaches first ends it."""

from fedtune.schema import BudgetSpec


def reached(budget: BudgetSpec, rounds: int, bytes: int, seconds: float, loss: float | None) -> str | None:
    """The limit that these are at or beyond, as "budget.bytes=4e+07"; None while there is something left.

    Args:
        rounds: that are done.
        bytes: wire bytes so far, both ways.
        seconds: so far.
        loss: the last held-out one, nats per token; None before the first.
    """
    if rounds < budget.rounds:
        return None
    if budget.bytes is not None and bytes >= budget.bytes:
        return f"budget.bytes={budget.bytes:g}"
    if budget.seconds is not None and seconds >= budget.seconds:
        return f"budget.seconds={budget.seconds:g}"
    if budget.loss is not None and loss is not None and loss <= budget.loss:
        return f"budget.loss={budget.loss:g}"
    return None
