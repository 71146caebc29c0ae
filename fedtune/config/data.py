"""The settings of the data: what is read, how it becomes tokens, and who gets it.

A part of fedtune/config/schema.py; no torch here either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from fedtune.core.checks import above_zero, at_least, fraction, one_of, option
from fedtune.core.errors import ConfigError

USERS, FILES, OWN = "users", "files", "own"
BROUGHT = (FILES, USERS, OWN)  # partitions in which each client's rows are its own


@dataclass(frozen=True)
class DataSpec:
    name: str = option("custom", "label of the data")
    path: Any = option(
        None,
        "a .jsonl, .json, .csv, .tsv or .parquet file, a folder or pattern of such, or a hub id; or a list of these",
    )
    subset: str | None = option(None, "configuration name of a hub data set")
    split: str = option("train", "split of a hub data set, a folder or a JSON file that has several")
    prompt_column: str | None = option(None, "column to answer, where the usual names don't apply")
    completion_column: str | None = option(None, "column with the answer, where the usual names don't apply")
    loss_on: str = option("completion", "completion (the answers alone), last (the last of them) or all tokens")
    max_length: int = option(512, "tokens; longer examples are cut")
    duplicates: str = option("drop", "rows with the same text: drop (one stays) or keep; docs/evaluation.md")
    date: str = option("2024-07-26", "the day, YYYY-MM-DD, that a chat template is told when it asks for today's")
    parse_special: bool = option(
        False, "special tokens spelled out in the data are the real ones, not characters: for text that is templated"
    )
    partition: str = option(
        "iid",
        "iid, dirichlet, natural, pathological, shard, linear, square or exponential; files or users: each is "
        "a client; own: each device reads its own (docs/data.md)",
    )
    user_column: str | None = option(None, "column whose every value is a client: data.partition=users")
    partition_by: str | None = option(
        None, "column that dirichlet, natural, pathological and shard look at; meta.src: src within meta"
    )
    alpha: float = option(0.5, "dirichlet: the smaller, the more unlike the clients")
    classes: int = option(2, "pathological: values of the column per client")
    partition_options: Any = option(None, "more arguments for the flwr-datasets partitioner, as {name: value}")
    heldout: float = option(0.1, "fraction of all data that no client gets: the server's own test")
    heldout_path: str | None = option(None, "files, users, own: the server's own test, as data.path; null: it has none")
    client_heldout: float = option(0.1, "fraction of each client's data that it does not train on")

    def __post_init__(self) -> None:
        one_of("data.loss_on", self.loss_on, ("completion", "last", "all"))
        if isinstance(self.path, int | float):  # a file may be named by a number
            object.__setattr__(self, "path", str(self.path))
        if self.path is not None and (not self.paths or not all(isinstance(path, str) for path in self.paths)):
            raise ConfigError(
                f"data.path={self.path}: expected a file, a folder, a pattern, a hub id, or a list of these"
            )
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise ConfigError(f"data.date={self.date} is no day: expected YYYY-MM-DD") from error
        at_least("data.max_length", self.max_length, 2)
        one_of("data.duplicates", self.duplicates, ("drop", "keep"))
        above_zero("data.alpha", self.alpha)
        at_least("data.classes", self.classes, 1)
        fraction("data.heldout", self.heldout)
        fraction("data.client_heldout", self.client_heldout)
        self._check_owners()
        if self.partition_options is not None and not isinstance(self.partition_options, Mapping):
            raise ConfigError(f"data.partition_options={self.partition_options}: expected {{name: value}}")

    def _check_owners(self) -> None:
        """What concerns data that clients bring."""
        if self.user_column is not None and self.partition == "iid":
            object.__setattr__(self, "partition", USERS)
        if self.user_column is not None and self.partition != USERS:
            raise ConfigError(
                f"data.user_column={self.user_column} makes every user a client, and data.partition={self.partition} "
                "divides otherwise: leave one of them out"
            )
        if self.heldout_path is not None and not self.is_brought:
            raise ConfigError(
                f"data.heldout_path={self.heldout_path} is the server's test where clients bring their data "
                f"(data.partition={', '.join(BROUGHT)}); elsewhere it is a share, data.heldout"
            )
        if self.partition == OWN and self.path is not None:
            raise ConfigError(
                f"data.path={self.path}: with data.partition=own each device reads what its owner names in its "
                "device.toml. Leave data.path out, or take data.partition=files to simulate this, a file a client"
            )

    @property
    def is_brought(self) -> bool:
        """Whether each client's rows are its own, rather than a share of all."""
        return self.partition in BROUGHT

    @property
    def paths(self) -> list[str]:
        """What `path` names, one or several."""
        if self.path is None:
            return []
        return list(self.path) if isinstance(self.path, list | tuple) else [self.path]
