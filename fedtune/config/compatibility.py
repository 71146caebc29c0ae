"""What a method can't do, said at start."""

from dataclasses import fields, is_dataclass
from typing import Any

from typing_extensions import TypeIs

from fedtune.config.schema import Experiment
from fedtune.config.targets import called
from fedtune.core.errors import ConfigError
from fedtune.core.optional import CostedClient, DeclaresTraits, HasBuffer
from fedtune.core.protocol import Codec, Traits, grid, is_lossless
from fedtune.core.settings import EngineSetting

LOW_RANK = ("lora", "rslora", "pissa")  # adapters that are s B A and nothing else


def traits_of(strategy: Any) -> Traits:
    """The traits that a strategy's class declares."""
    return strategy.traits if isinstance(strategy, DeclaresTraits) else Traits()


def tells_its_work(client: Any) -> TypeIs[CostedClient]:
    """Whether it can be known what a turn of this client takes."""
    return isinstance(client, CostedClient)


def check_traits(experiment: Experiment, traits: Traits) -> None:
    """Check that the method can do what the experiment asks of it.

    Raises:
        ConfigError: if the method can't take the population's ranks, its deadline or the kind of adapter.
    """
    name, kind = experiment.method_name, experiment.adapter.kind
    ranks, deadline = experiment.population.ranks, experiment.population.deadline
    if ranks is not None and traits.plans:
        raise ConfigError(
            f"method={name} gives each client ranks by what its device can do: leave out population.ranks={ranks}"
        )
    if deadline is not None and traits.asynchronous:
        raise ConfigError(
            f"method={name} takes updates as they come and waits for nobody: leave out population.deadline="
            f"{deadline:g}, and population.straggler, or take a method whose rounds end together"
        )
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
    if traits.personal and (experiment.keep.best or experiment.keep.every):
        raise ConfigError(
            f"method={name} leaves part of the model with each client, and what the server could keep of a round is "
            "not one model: leave out keep.best and keep.every"
        )
    if kind == "pissa" and ranks is not None:
        raise ConfigError(
            f"population.ranks={ranks}: adapter=pissa takes as many factors out of the base as the widest client has, "
            "and one with fewer couldn't put them back. Take adapter=lora or rslora"
        )
    if kind not in LOW_RANK and (traits.needs_low_rank or ranks is not None):
        why = f"method={name} works on B A" if traits.needs_low_rank else f"population.ranks={ranks} is about B A"
        raise ConfigError(f"{why}, which adapter={kind} hasn't got: take adapter={', '.join(LOW_RANK)}")


def check_training(experiment: Experiment, traits: Traits, client: Any) -> None:
    """Check that the method's clients can train as `train.` says.

    Raises:
        ConfigError: for a schedule, epochs or an optimizer that means nothing to them.
    """
    name, train, kind = experiment.method_name, experiment.train, type(client).__name__

    def has(field: str) -> bool:
        return is_dataclass(client) and field in {item.name for item in fields(client)}

    if getattr(client, "schedule", None) is not None:
        raise ConfigError("method.client.schedule is no setting: train.schedule says how the rate goes")
    if train.is_scheduled:
        if (rate := experiment.learning_rate) is None or not has("schedule"):
            asked = f"train.schedule={train.schedule}, train.warmup_rounds={train.warmup_rounds}"
            raise ConfigError(
                f"{asked}: {kind}, the client of method={name}, has no learning rate that is scheduled (no field "
                "`schedule`, as clients/first_order.py has one): take train.schedule=constant and no warm-up"
            )
        if train.lr_end > rate:
            raise ConfigError(
                f"train.lr_end={train.lr_end:g} is above the rate that a schedule comes down from, which is {rate:g} "
                f"for method={name}: take a smaller one"
            )
    if train.epochs is not None and traits.plans:
        raise ConfigError(
            f"train.epochs={train.epochs:g}: method={name} plans the same number of steps for all devices: take "
            "train.steps"
        )
    if train.epochs is not None and (traits.local_steps or not has(EngineSetting.STEPS)):
        where = f"method.strategy.{traits.local_steps}" if traits.local_steps else "the client's own settings"
        raise ConfigError(
            f"train.epochs={train.epochs:g}: method={name} takes its number of steps from {where}: leave train.epochs "
            "out"
        )
    if train.optimizer.endswith("8bit") and not has("optimizer"):
        raise ConfigError(
            f"train.optimizer={train.optimizer}: clients of method={name} have steps of their own kind, without an "
            "optimizer that keeps anything: leave it out"
        )


def check_client(experiment: Experiment, strategy: Any, client: Any) -> None:
    """What depends on the class of the clients, and on the strategy's own settings.

    Raises:
        ConfigError: if a turn can't be timed, planned or shortened though something asks for that, or the method is
            asynchronous and doesn't say of how many updates a step is made.
    """
    name, population, traits = experiment.method_name, experiment.population, traits_of(strategy)
    if not tells_its_work(client):
        asking = {
            f"method={name}, which plans by it": traits.plans,
            f"population.deadline={population.deadline}": population.deadline is not None,
            "population.selection=speed_tier": population.selection == "speed_tier",
        }
        if asked := next((word for word, asks in asking.items() if asks), ""):
            raise ConfigError(
                f"{type(client).__name__}, this method's client, doesn't say what a turn takes (it has no `work`), "
                f"which is asked for by {asked}: leave that out, or take a client that does"
            )
    if population.straggler == "partial" and EngineSetting.STEPS not in {item.name for item in fields(client)}:
        raise ConfigError(
            f"population.straggler=partial has slow clients take fewer steps, and method={name} has no number of steps "
            "that is a client's own: take population.straggler=drop"
        )
    if traits.asynchronous:
        buffer = strategy.buffer if isinstance(strategy, HasBuffer) else None
        if not isinstance(buffer, int) or isinstance(buffer, bool) or buffer < 1:
            raise ConfigError(
                f"method={name} is asynchronous, and its strategy's `buffer` should say of how many updates a step is "
                f"made: expected a whole number from 1 up, got {buffer!r}"
            )


def check_codecs(experiment: Experiment, traits: Traits, up: Codec, down: Codec) -> None:
    """Check that the method's messages survive these codecs.

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
                f"codec_{where}={called(codec)} is lossy, and what method={name} sends {where} has to "
                f"come as it is: take codec_{where}=raw or packed"
            )
