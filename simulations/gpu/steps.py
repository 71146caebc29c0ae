"""The steps of `python -m simulations.gpu`, in the order in which they are run: what matters most comes first.

A step is a function that yields its rows as they are there; a new one is a line in STEPS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from simulations.gpu.results import Row


class Unmeasured(Exception):
    """What this machine can't do, with the reason."""


@dataclass(frozen=True)
class Place:
    """Where a step works: a folder of its own, and whether it is to be small."""

    folder: Path
    tiny: bool


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        function: its function's name; the module is imported by the step's own process alone.
        least: seconds that have to be left for it to begin.
        most: seconds after which it is stopped.
    """

    name: str
    title: str
    function: str
    least: float
    most: float

    @property
    def run(self) -> Callable[[Place], Iterator[Row]]:
        module, _, name = self.function.rpartition(".")
        found: Callable[[Place], Iterator[Row]] = getattr(import_module(f"simulations.gpu.{module}"), name)
        return found


STEPS = (
    Step("machine", "the card, the libraries, what it multiplies and copies", "checks.machine", 10, 60),
    Step("tests", "pytest -m cuda", "checks.tests", 40, 200),
    Step("qlora", "a 7B base in NF4: training, with and without activations kept", "training.qlora", 30, 90),
    Step("smollm2", "clients of SmolLM2-135M, one by one", "training.smollm2", 30, 120),
    Step("cohorts", "clients of SmolLM2-135M, up to 64 in one pass", "training.cohorts", 30, 90),
    Step("round", "a federated round of 4 clients over the 7B base", "training.federated_round", 30, 90),
    Step("resume", "one seed has one result, also after a resume", "checks.resume", 20, 90),
    Step("seeded", "noise from seeds, and FedKSeed's steps", "checks.seeded", 20, 90),
    Step("doctor", "what `fedtune doctor` finds here", "checks.doctor", 15, 60),
    Step("contract", "tests/test_contract.py with every run on the GPU", "checks.contract", 40, 150),
)


def has_cuda() -> bool:
    """Whether there is a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()
