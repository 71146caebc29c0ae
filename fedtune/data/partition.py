"""The division of rows among clients, by flwr-datasets' partitioners."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedtune.config.schema import DataSpec
from fedtune.core import lean_imports as lean
from fedtune.core.checks import one_of
from fedtune.core.errors import ConfigError
from fedtune.core.seeds import derive_seed
from fedtune.core.text import first_line

LEAST = "min_partition_size"


def divide(spec: DataSpec, columns: Sequence[Mapping[str, Any]], clients: int, seed: int) -> list[np.ndarray]:
    """Places 0 ... len(columns) - 1 divided among the clients by a flwr-datasets partitioner. Some may get none.

    Args:
        columns: the columns of the row in each place.

    Raises:
        ConfigError: for an unknown partition or column, or a partition that doesn't fit.
    """
    by, count = spec.partition_by, len(columns)
    if spec.partition == "iid" and not spec.partition_options:
        # What IidPartitioner does, whose import takes seconds, and a shard milliseconds
        return np.array_split(np.arange(count, dtype=np.int64), clients)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    datasets.disable_progress_bars()
    rows: dict[str, Any] = {"place": range(count)}
    if by is not None:
        if not any(by in row for row in columns):
            named = ", ".join(map(str, columns[0])) or "none"
            raise ConfigError(f"data.partition_by={by}: no such column in every row; there are {named}")
        rows[by] = _labels([row.get(by) for row in columns])
    dataset = datasets.Dataset.from_dict(rows)
    named = f"data.partition={spec.partition}" + (f" by '{by}'" if by else "")
    given = spec.partition_options or {}
    try:
        try:
            made = _places(spec, dataset, clients, seed)
        except ValueError:
            # Among many clients hardly any draw of a small alpha has rows for everybody: then the first draw it is
            if spec.partition != "dirichlet" or LEAST in given:
                raise
            made = _places(replace(spec, partition_options={**given, LEAST: 0}), dataset, clients, seed)
    except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{named} does not work for {count} rows and {clients} clients: {reason} "
            "Use fewer clients, a milder partition, or other data.partition_options"
        ) from error
    if len(made) != clients:
        raise ConfigError(f"{named} makes {len(made)} clients, not {clients}: set population.clients={len(made)}")
    return made


def _places(spec: DataSpec, dataset: Any, clients: int, seed: int) -> list[np.ndarray]:
    """The places of each partition, however many there are."""
    partitioner = _partitioner(spec, clients, derive_seed(seed, "partition") % 2**32)
    partitioner.dataset = dataset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line for every attempt at a skewed draw
        return _places_of(partitioner, partitioner.num_partitions)


def _labels(values: Sequence[Any]) -> list[Any]:
    """These, if all are texts or all are whole numbers; else each as text: null as `null`, a list as JSON."""
    if {type(value) for value in values} in ({str}, {int}):
        return list(values)
    return [value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for value in values]


def _places_of(partitioner: Any, clients: int) -> list[np.ndarray]:
    """The column `place` of every partition. A data set of its own takes milliseconds to make, so only the first gets
    one, which has the partitioner decide; the others are looked up in its table of rows, where it has one."""
    first = np.asarray(partitioner.load_partition(0)["place"], dtype=np.int64)
    rows = getattr(partitioner, "_partition_id_to_indices", None)
    if not isinstance(rows, Mapping) or len(rows) != clients:
        others = (partitioner.load_partition(client)["place"] for client in range(1, clients))
        return [first, *(np.asarray(places, dtype=np.int64) for places in others)]
    places = np.asarray(partitioner.dataset["place"], dtype=np.int64)  # a partitioner may have sorted them
    return [places[np.asarray(rows[client], dtype=np.int64)] for client in range(clients)]


def _partitioner(spec: DataSpec, clients: int, seed: int) -> Any:
    with lean.without_plots():
        from flwr_datasets import partitioner as kinds

    counted = {"num_partitions": clients}
    labelled = {**counted, "partition_by": spec.partition_by, "seed": seed}
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        "iid": (kinds.IidPartitioner, counted),
        "linear": (kinds.LinearPartitioner, counted),
        "square": (kinds.SquarePartitioner, counted),
        "exponential": (kinds.ExponentialPartitioner, counted),
        "natural": (kinds.NaturalIdPartitioner, {"partition_by": spec.partition_by}),
        "dirichlet": (kinds.DirichletPartitioner, {**labelled, "alpha": spec.alpha, LEAST: 2}),
        "pathological": (kinds.PathologicalPartitioner, {**labelled, "num_classes_per_partition": spec.classes}),
        "shard": (kinds.ShardPartitioner, {**labelled, "num_shards_per_partition": spec.classes}),
    }
    if spec.partition not in known:
        one_of("data.partition", spec.partition, tuple(known))
    kind, arguments = known[spec.partition]
    if "partition_by" in arguments and not spec.partition_by:
        raise ConfigError(f"data.partition={spec.partition} goes by a column: set data.partition_by=")
    try:
        return kind(**{**arguments, **(spec.partition_options or {})})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.partition={spec.partition}: {error}") from error
