"""How many clients of a round are trained in one pass over the base (runtime.cohort), and who can't be."""

import inspect
import math
from typing import TYPE_CHECKING, Any

from fedtune.config.compatibility import tells_its_work
from fedtune.config.schema import Experiment
from fedtune.core.costs import at_once
from fedtune.core.errors import CapacityError, ConfigError
from fedtune.core.protocol import Instruction
from fedtune.device.memory import MemoryFound
from fedtune.device.memory import memory_of as device_memory
from fedtune.models.stacked_layers import STACKED
from fedtune.planning.turn_times import memory_of, trained_of

if TYPE_CHECKING:
    from fedtune.workspace.workspace import Workspace

AUTO = "auto"
ENOUGH_TOKENS = 512  # in one pass on a CPU: more gain nothing there (simulations/benchmarks/cohort.py)
MOST = 8  # clients on a CPU, likewise


def asks_for_gradients(client: Any) -> bool:
    """Whether this class of client has its gradients computed for it (fedtune/core/protocol.py, InSteps)."""
    return inspect.isgeneratorfunction(client.train)


def check_cohort(experiment: Experiment, client: Any) -> None:
    """Check, before anything is loaded, that the clients can be trained so many at once.

    Raises:
        ConfigError: if they can't, saying why.
    """
    asked = experiment.runtime.cohort
    if asked in (AUTO, 1):
        return
    if experiment.runtime.name != "local":
        raise ConfigError(
            f"runtime.cohort={asked} is for runtime=local, where one process has all clients: leave it out for "
            f"runtime={experiment.runtime.name}"
        )
    if not asks_for_gradients(client):
        raise ConfigError(
            f"runtime.cohort={asked}: clients of method={experiment.method_name} compute by themselves, one after the "
            "other: leave it out"
        )
    if (kind := experiment.adapter.kind) not in STACKED:
        raise ConfigError(
            f"runtime.cohort={asked}: adapter={kind} has no form for several clients at once: leave it out, or take "
            f"one of {', '.join(sorted(STACKED))}"
        )


def cohort_size(workspace: "Workspace") -> int:
    """How many clients are trained at once.

    Raises:
        CapacityError: if that many were asked for as there isn't memory for.
    """
    asked = workspace.experiment.runtime.cohort
    if asked == 1 or not workspace.stacks(Instruction({})):
        return 1
    if asked == AUTO and workspace.model.device.type != "cpu":
        return 1
    found = device_memory(workspace.model.device)
    each = _turn_bytes(workspace)
    if asked == AUTO:
        train = workspace.experiment.train
        tokens = workspace.data.mean_length * at_once(train.batch_size, train.micro_batch_size)
        wanted = min(MOST, math.ceil(ENOUGH_TOKENS / tokens))
        return wanted if found is None or not each else max(1, min(wanted, int(found.free / 2 / each)))
    return _fitting(int(asked), workspace.experiment.population.cohort_size, found, each)


def _fitting(asked: int, most: int, found: MemoryFound | None, each: float) -> int:
    if found is not None and min(asked, most) * each > found.free:
        raise CapacityError(
            f"runtime.cohort={asked}: so many take {min(asked, most) * each / 1e9:.1f} GB at once, and "
            f"{found.free / 1e9:.1f} GB are free: take at most {max(1, int(found.free / each))}"
        )
    return asked


def _turn_bytes(workspace: "Workspace") -> float:
    """Bytes that one of many clients takes beside the base, for examples of the mean length, since nothing is padded;
    0 where its class doesn't say."""
    if not tells_its_work(workspace.client):
        return 0.0
    train, costs, bits = workspace.experiment.train, workspace.costs, workspace.bits
    trained = trained_of(workspace.model, workspace.weight_of, costs, Instruction({}))
    full, idle = (
        memory_of(costs, workspace.client.work({}), trained, batch, train.micro_batch_size, bits)
        for batch in (train.batch_size, 0)
    )
    adapter = idle - costs.base_bytes[str(bits)] - costs.fixed_bytes
    return adapter + (full - idle) * min(1.0, workspace.data.mean_length / costs.tokens)


def cohort_note(workspace: "Workspace") -> str:
    """Why clients are trained one by one where they might have been at once, or ""."""
    experiment = workspace.experiment
    one_by_one = experiment.runtime.name != "local" or experiment.runtime.cohort == 1 or experiment.population.pooled
    if one_by_one or not asks_for_gradients(workspace.client) or not workspace.model.obstacle:
        return ""
    return f"clients are trained one by one: {workspace.model.obstacle}"
