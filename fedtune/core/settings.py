"""The settings of an instruction that the engine itself reads, and those that are a method's own.

An instruction's settings are one flat mapping, and so are a message's: what the engine looks up there and what a
strategy tells its clients stand side by side. The engine's names are reserved. A strategy that sends one of them means
what the engine does by it; rules of a method's own (`SharedRules`) may not have a field of such a name, or it would
steer the engine without anybody saying so. Nothing here imports torch.
"""

import inspect
from dataclasses import fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.core.protocol import Setting


class EngineSetting(StrEnum):
    """What the engine reads in an instruction's settings; the value is the name on the wire."""

    RUN = "run"  # the run's id, under which a client finds what it kept; put there by the engine, and by no strategy
    VERSION = "version"  # of the base, or of what else a client keeps, that the tensors lead to
    BUILDS_ON = "builds_on"  # the version that they build on; 0: on nothing but what every client starts from
    RANK = "rank"  # r_k of the client's adapter; 0: everybody's
    SCALING = "scaling"  # s_k, what its B A is multiplied by; also a metric of every update of a LoRA adapter
    TRAIN = "train"  # the role of the tensors that are trained while the others stay as they are, as "lora_B"
    # Of this client alone, where they aren't everybody's
    BATCH_SIZE = "batch_size"
    BITS = "bits"  # in which it holds the frozen base
    STEPS = "steps"  # that it takes

    def __repr__(self) -> str:
        """The name as any other setting's: errors show it."""
        return repr(self.value)


RESERVED = frozenset(EngineSetting)


class SharedRules:
    """A base for dataclasses of what all parties of a method have to agree on: strategies tell clients by `told`, field
    by field, as an instruction's settings.

    Raises:
        ConfigError: as soon as there is a class with a field that would be taken for the engine's.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in inspect.get_annotations(cls):
            if name in RESERVED:
                raise ConfigError(
                    f"{cls.__name__}.{name}: an instruction's setting '{name}' is the engine's, which would act on it. "
                    f"Give the field another name; taken are {', '.join(sorted(RESERVED))}"
                )


def told(rules: SharedRules) -> "dict[str, Setting]":
    """The rules as an instruction's settings."""
    given: Any = rules
    return {item.name: getattr(rules, item.name) for item in fields(given)}
