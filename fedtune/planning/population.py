"""Who takes part in a round, and with what."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedtune.config.devices import CATALOGUE, apportion, read_devices
from fedtune.config.population import MEASURED
from fedtune.config.schema import Experiment
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import SERVER, UNLIMITED, ClientInfo, DeviceProfile, Layout
from fedtune.core.seeds import derive_seed, permutation


def sample_cohort(clients: int, cohort: int, seed: int, round: int) -> list[int]:
    """The indices that take part in `round`, ascending: uniform, without repetition.

    A function of the seed and the round alone, so it is the same after a resume and whatever ids Flower gives to nodes.
    """
    chosen = permutation(derive_seed(seed, "cohort", round), clients)[:cohort]
    return [int(index) for index in np.sort(chosen)]


def assign_rank(peer: ClientInfo, experiment: Experiment, layout: Layout) -> ClientInfo:
    """The peer with the rank and the scaling of the adapter that it is to train."""
    rank = experiment.population.rank_of(peer.index, experiment.adapter.rank, peer.capability.max_rank)
    if not rank:
        return peer
    return replace(peer, rank=rank, scaling=scaling_at(rank, experiment, layout))


def scaling_at(rank: int, experiment: Experiment, layout: Layout) -> float:
    """alpha / r of an adapter of that rank, or alpha / sqrt(r) for rsLoRA."""
    whole = layout.scaling
    if experiment.population.scaling == "equal":
        return whole
    wider = experiment.adapter.rank / rank
    return whole * (math.sqrt(wider) if experiment.adapter.kind == "rslora" else wider)


def server_peer(experiment: Experiment, layout: Layout) -> ClientInfo:
    """The server as one more client: it holds nothing yet, and can take the widest adapter."""
    if experiment.population.ranks is None:
        return ClientInfo(SERVER, 1)
    return ClientInfo(SERVER, 1, rank=experiment.adapter.rank, scaling=layout.scaling)


def profile_of(index: int, experiment: Experiment, home: Path | None = None) -> DeviceProfile:
    """What client `index` can do, as population.devices has it: a function of the settings alone, wherever it is asked,
    but for files, which are read where it is asked.

    Args:
        home: the device's own folder, with the `device.csv` that fedtune doctor wrote; only `measured` looks there.

    Raises:
        ConfigError: if a file of devices isn't there or is wrong.
    """
    population = experiment.population
    devices = population.devices
    if devices is None:
        return UNLIMITED
    if isinstance(devices, str):
        rows = _rows(_own(home) if devices == MEASURED else Path(devices).expanduser())
        return rows[index % len(rows)]
    if isinstance(devices, Mapping):
        name = _dealt(json.dumps(dict(devices), sort_keys=True), population.clients, experiment.seed)[index]
    else:
        name = devices[index % len(devices)]
    return CATALOGUE[name].capability(population.efficiency)


@lru_cache(maxsize=4)
def _dealt(shares: str, clients: int, seed: int) -> tuple[str, ...]:
    """The name of each client's device: so many of each as their shares come to, in an order by the seed.

    Args:
        shares: as JSON, by which they are known again.
    """
    counts = apportion(json.loads(shares), clients)
    names = [name for name, count in counts.items() for _ in range(count)]
    return tuple(names[place] for place in permutation(derive_seed(seed, "devices"), clients))


def _own(home: Path | None) -> Path:
    if home is None or not (home / "device.csv").is_file():
        place = "the device's home" if home is None else str(home)
        raise ConfigError(
            f"population.devices={MEASURED}: there is no device.csv in {place}: run fedtune doctor on the device, or "
            "take another population.devices"
        )
    return home / "device.csv"


def _rows(path: Path) -> tuple[DeviceProfile, ...]:
    try:
        found = path.stat()
    except OSError:
        return tuple(read_devices(path))  # which says what is wrong
    return _read(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int) -> tuple[DeviceProfile, ...]:
    """The file's devices; read again when it changed, as a process may stay longer than a run."""
    return tuple(read_devices(path))
