"""Which rounds' models a run keeps beside the last."""

from dataclasses import dataclass

from fedtune.core.checks import at_least, option


@dataclass(frozen=True)
class KeepSpec:
    """What is written to best/ and rounds/N/ of the run folder (fedtune/runs/run_folder.py). It changes no result, so
    a run may go on with other values."""

    best: bool = option(False, "keep the model of the round with the lowest held-out loss, in best/")
    every: int = option(0, "keep the model of each Nth round, in rounds/N/; 0: none")

    def __post_init__(self) -> None:
        at_least("keep.every", self.every, 0)
