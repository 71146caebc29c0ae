"""Data that clients bring with them: a file or a user is a client, whose rows nobody else has.

    data.partition=files   each file of data.path is a client's
    data.partition=users   each value of the column data.user_column is a client
    data.partition=own     each device reads its own file (device.toml); the server sees none of it

What becomes of a client's rows follows from them, the seed and its index alone, so a device ends in the bits of a
simulation over the same files. Rows that repeat others of the same client are left out, and its held-out rows are taken
from its own; nobody can know what another has. The server's test, if there is one, is data.heldout_path.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.data import FILES, OWN, USERS
from fedtune.config.schema import DataSpec, Experiment
from fedtune.core.caches import once
from fedtune.core.errors import ConfigError
from fedtune.core.seeds import derive_seed, permutation
from fedtune.data.corpus import Corpus
from fedtune.data.duplicates import distinct, groups, hold_out, texts
from fedtune.data.federated_data import FederatedData
from fedtune.data.formats import ending
from fedtune.data.rows import Example
from fedtune.data.sources import data_files, load_examples
from fedtune.data.token_cache import kept_or
from fedtune.data.tokenisation import tokenise

USER = "user"  # the column that {user: [rows]} becomes
NOBODY = np.zeros(0, dtype=np.int64)


def names_of_clients(spec: DataSpec) -> list[str]:
    """The clients of data.partition=files or users, by index.

    Raises:
        DataError: if the source can't be read.
        ConfigError: if it has no such column.
    """
    if spec.partition == FILES:
        return _named(_own_files(spec))
    return [name for name, _ in _clients(spec)]


def counted(experiment: Experiment) -> Experiment:
    """The experiment with as many clients as its data has, where files or users are clients and nobody said how many.

    Raises:
        DataError: if the source can't be read.
        ConfigError: if it has no such column, or fewer clients than take part in a round.
    """
    said = any(word.startswith("population.clients=") for word in experiment.overrides)
    if experiment.data.partition not in (FILES, USERS) or said or experiment.runtime.name == "flower":
        return experiment
    clients = len(names_of_clients(experiment.data))
    return replace(experiment, population=replace(experiment.population, clients=clients))


def load_own(
    spec: DataSpec, clients: int, tokenizer: Any, seed: int, own: tuple[int, str] | None = None
) -> FederatedData:
    """Read and tokenise data that clients bring.

    Args:
        clients: how many there are; of data.partition=own how many there may be.
        own: this device's index, and the name of its data; `spec.path` is then its own file. None: in a simulation all
            clients' files are read, on the server of data.partition=own none.

    Raises:
        DataError: if the source can't be read, or has nothing to learn.
        ConfigError: if there are not as many clients as asked for.
    """
    if own is not None:
        parts: list[tuple[str, list[Example]]] = [(own[1], load_examples(spec))]
        places = [own[0]]
    else:
        parts = [] if spec.partition == OWN else _clients(spec)
        places = list(range(len(parts)))
        if parts and len(parts) != clients:
            raise ConfigError(
                f"data.partition={spec.partition} makes {len(parts)} clients, not {clients}: leave population.clients "
                f"out, or set population.clients={len(parts)}"
            )
    test: list[Example] = []
    if own is None and spec.heldout_path is not None:
        test = load_examples(
            replace(spec, path=spec.heldout_path, heldout_path=None, partition="iid", user_column=None)
        )
    examples = [example for _, rows in parts for example in rows] + test
    holders = [place for place, (_, rows) in zip(places, parts, strict=True) for _ in rows] + [-1] * len(test)
    count = max([*places, 0]) + 1
    if not examples:
        return FederatedData(_EMPTY, (NOBODY,), (NOBODY,), NOBODY, int(tokenizer.pad_token_id or 0), 0, shared=False)
    source = (spec.partition, str(spec.path), spec.user_column, str(spec.heldout_path), spec.max_length, spec.loss_on)

    def made() -> tuple[Corpus, list[int]]:
        return kept_or(tokenise, examples, tokenizer, spec)

    corpus, kept = made() if own is not None else once(("own", *source, id(tokenizer)), made)
    holder = np.asarray(holders, dtype=np.int64)[kept]
    same = texts(corpus)
    train, heldout = [NOBODY] * count, [NOBODY] * count
    repeated, asked = 0, 0
    for place in sorted(set(places)):
        rows = np.flatnonzero(holder == place)
        if not len(rows):
            continue
        if spec.duplicates == "drop":
            alone = rows[distinct(same[rows], [""] * len(rows))]
            repeated += len(rows) - len(alone)
            rows = alone
        aside = min(round(spec.client_heldout * len(rows)), len(rows) - 1)
        asked += aside
        heldout[place] = rows[_aside(rows, [examples[kept[row]] for row in rows], same, aside, place, seed)]
        train[place] = rows[~np.isin(rows, heldout[place])]
    names = {place: name for place, (name, _) in zip(places, parts, strict=True)}
    return FederatedData(
        corpus,
        tuple(train),
        tuple(heldout),
        np.flatnonzero(holder == -1),
        int(tokenizer.pad_token_id or 0),
        len(examples) - len(kept),
        repeated,
        (0, asked),
        names=tuple(names.get(place, "") for place in range(count)),
        shared=own is None and spec.partition != OWN,
    )


_EMPTY = Corpus(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool), np.zeros(1, dtype=np.int64))


def _aside(
    rows: np.ndarray, examples: Sequence[Example], same: np.ndarray, count: int, client: int, seed: int
) -> np.ndarray:
    """Places in `rows` of those that this client holds out."""
    number = {row: place for place, row in reversed(list(enumerate(same[rows].tolist())))}
    group = groups(examples, np.array([number[row] for row in same[rows].tolist()]))
    order = permutation(derive_seed(seed, "client data", client), len(rows))
    owner = [client] * len(rows)
    return hold_out(order, group, owner, {client: count}, owner)


def _clients(spec: DataSpec) -> list[tuple[str, list[Example]]]:
    """Who there is, with their rows."""
    key = ("clients", spec.partition, str(spec.path), spec.user_column, spec.subset, spec.split)
    return once((*key, spec.prompt_column, spec.completion_column), lambda: _read(spec))


def _own_files(spec: DataSpec) -> list[Path]:
    files = data_files(spec)
    if len(files) < 2:
        raise ConfigError(
            f"data.partition=files makes each file a client, and data.path={spec.path} is one file: give a folder, "
            "a pattern or a list of files, or data.partition=users for one file with a column of users"
        )
    return files


def _read(spec: DataSpec) -> list[tuple[str, list[Example]]]:
    if spec.partition == FILES:
        files = _own_files(spec)
        return list(zip(_named(files), [load_examples(replace(spec, path=str(file))) for file in files], strict=True))
    column = spec.user_column or USER
    users: dict[str, list[Example]] = {}
    for example in load_examples(replace(spec, partition_by=column)):
        if (user := example.columns.get(column)) is None:
            found = ", ".join(map(repr, example.columns)) or "none"
            raise ConfigError(
                f"data.user_column={column}: {example.where} has no such column; beside what is learnt it has {found}"
            )
        users.setdefault(str(user), []).append(example)
    return sorted(users.items())


def _named(files: Sequence[Path]) -> list[str]:
    """Names that tell files apart, as short as can be."""
    stems = [file.name[: -len("".join(_endings(file)))] for file in files]
    if len(set(stems)) == len(stems):
        return stems
    return [str(file) for file in files]


def _endings(file: Path) -> list[str]:
    return file.suffixes[-2:] if len(file.suffixes) > 1 and file.suffix.lower() != ending(file) else file.suffixes[-1:]
