"""What a method can't do, said at start."""

from typing import Any

from fedtune.errors import ConfigError
from fedtune.protocol import Codec, Traits, grid, is_lossless
from fedtune.schema import Experiment

LOW_RANK = ("lora", "rslora", "pissa")  # adapters that are s B A and nothing else


def traits_of(strategy: Any) -> Traits:
    """The traits that a strategy's class declares."""
    declared = getattr(strategy, "traits", Traits())
    assert isinstance(declared, Traits)
    return declared


def check_traits(experiment: Experiment, traits: Traits) -> None:
    """Raises:
    ConfigError: if the method can't take the population's ranks or the kind of adapter.
    """
    name, kind = experiment.method_name, experiment.adapter.kind
    ranks = experiment.population.ranks
    if ranks is not None and not traits.mixed_ranks:
        raise ConfigError(
            f"method={name} needs the same rank everywhere: leave out population.ranks={ranks}, or take a method for "
            "mixed ranks (docs/methods.md)"
        )
    if traits.personal and experiment.evaluate.every and not experiment.data.client_heldout:
        raise ConfigError(
            f"method={name} leaves part of the model with each client, so it is evaluated there: data.client_heldout=0 "
            "leaves nothing to do that with. Set it above 0, or evaluate.every=0"
        )
    if kind == "pissa" and ranks is not None:
        raise ConfigError(
            f"population.ranks={ranks}: adapter=pissa takes as many factors out of the base as the widest client has, "
            "and one with fewer couldn't put them back. Take adapter=lora or rslora"
        )
    if kind not in LOW_RANK and (traits.needs_low_rank or ranks is not None):
        why = f"method={name} works on B A" if traits.needs_low_rank else f"population.ranks={ranks} is about B A"
        raise ConfigError(f"{why}, which adapter={kind} hasn't got: take adapter={', '.join(LOW_RANK)}")


def check_codecs(experiment: Experiment, traits: Traits, up: Codec, down: Codec) -> None:
    """
    Raises:
        ConfigError: for a lossy codec where messages have to come as they were sent, or a choice by held-out loss for
            those who hold no data of their own.
    """
    name = experiment.method_name
    if grid(down):
        raise ConfigError(
            "codec_down: several values of a setting are for clients, who choose by their own held-out loss; the "
            "server would choose by the data that it is judged on. Give it one, and the clients codec_up."
        )
    if grid(up) and not experiment.data.client_heldout:
        raise ConfigError(
            "codec_up: clients choose among several values of a setting by their own held-out loss, and "
            "data.client_heldout=0 leaves them nothing to do that with. Set it above 0, or give one value"
        )
    for where, codec, fits in (("up", up, traits.lossy_up), ("down", down, traits.lossy_down)):
        if not (fits or is_lossless(codec)):
            raise ConfigError(
                f"codec_{where}={type(codec).__name__.lower()} is lossy, and what method={name} sends {where} has to "
                f"come as it is: take codec_{where}=raw or packed"
            )
