"""Which rows each client trains on, which it and the server keep for testing, and the batches that training sees.

A client's data is a list of row numbers into one corpus: hundreds of clients cost hundreds of short integer arrays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedtune.corpus import Corpus
from fedtune.data import load_examples
from fedtune.errors import DataError
from fedtune.keys import fold, permutation
from fedtune.partition import divide
from fedtune.protocol import Batch
from fedtune.schema import DataSpec
from fedtune.sharing import once
from fedtune.token_cache import kept_or
from fedtune.tokenisation import tokenise


@dataclass(frozen=True)
class ClientBatches:
    """One client's endless stream of training batches: `protocol.Batches`.

    Every epoch is a fresh order of all rows, drawn by key. A client with fewer rows than a batch gets smaller batches.
    """

    corpus: Corpus
    rows: np.ndarray  # (n,) the client's training rows
    batch_size: int
    pad: int
    key: int

    @property
    def examples(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        size = min(self.batch_size, len(self.rows))
        waiting: list[int] = []
        epoch = 0
        while True:
            while len(waiting) < size:
                order = permutation(fold(self.key, "epoch", epoch), len(self.rows))
                waiting.extend(self.rows[order].tolist())
                epoch += 1
            yield self.corpus.batch(waiting[:size], self.pad)
            del waiting[:size]


@dataclass(frozen=True)
class FederatedData:
    """Who holds which rows."""

    corpus: Corpus
    train: tuple[np.ndarray, ...]  # by client index: rows it trains on
    heldout: tuple[np.ndarray, ...]  # by client index: rows of its own that it doesn't
    server: np.ndarray  # rows that no client holds
    pad: int
    dropped: int  # examples left out because the cut at max_length left nothing to learn

    def batches(self, client: int, batch_size: int, key: int) -> ClientBatches:
        return ClientBatches(self.corpus, self.train[client], batch_size, self.pad, key)

    def pooled(self) -> "FederatedData":
        """The same division with one client in place of all: it trains on what any of them trains on."""
        train, heldout = (np.sort(np.concatenate(rows)) for rows in (self.train, self.heldout))
        return replace(self, train=(train,), heldout=(heldout,))


def load_data(spec: DataSpec, clients: int, tokenizer: Any, seed: int) -> FederatedData:
    """Read, tokenise and divide the data.

    First the server's held-out rows are set aside, then flwr-datasets divides the rest among the clients, then each
    client sets aside its own held-out rows. All of it follows from the seed.

    Raises:
        DataError: if the source can't be read, or a client would have nothing to train on.
        ConfigError: if the partition doesn't fit the data or the number of clients.
    """
    same = ("partition", "partition_by", "alpha", "classes", "partition_options", "heldout", "client_heldout")
    source = tuple(str(value) for name, value in vars(spec).items() if name not in same)
    examples = once(("examples", source), lambda: load_examples(spec))
    corpus, kept = once(("corpus", source, id(tokenizer)), lambda: kept_or(tokenise, examples, tokenizer, spec))
    if len(corpus) < clients + 1:
        raise DataError(f"{len(corpus)} examples are too few for {clients} clients: use fewer clients or more data")
    order = permutation(fold(seed, "data"), len(corpus))
    columns = [examples[place].columns for place in kept]
    spared = _one_of_each(order, columns, spec.partition_by)
    candidates = order[~np.isin(order, spared)]
    server = np.sort(candidates[: round(spec.heldout * len(corpus))])
    shared = order[~np.isin(order, server)]
    labels = [columns[row] for row in shared]
    train, heldout = [], []
    for client, places in enumerate(divide(spec, labels, clients, seed)):
        rows = shared[places]
        # At least one row is left to train on; a client with a single row has no held-out data of its own.
        own = min(round(spec.client_heldout * len(rows)), max(len(rows) - 1, 0))
        mixed = rows[permutation(fold(seed, "client data", client), len(rows))]
        heldout.append(np.sort(mixed[:own]))
        train.append(np.sort(mixed[own:]))
    if empty := [str(client) for client, rows in enumerate(train) if not len(rows)]:
        raise DataError(
            f"{len(empty)} of {clients} clients have no data (client {', '.join(empty[:5])}): "
            "use fewer clients, a milder partition (data.partition=iid, a larger data.alpha) or more data"
        )
    return FederatedData(
        corpus, tuple(train), tuple(heldout), server, int(tokenizer.pad_token_id), len(examples) - len(corpus)
    )


def _one_of_each(order: np.ndarray, columns: Sequence[Mapping[str, Any]], by: str | None) -> list[int]:
    """The first row of every label, which the server leaves to the clients: a rare label would else vanish."""
    first: dict[Any, int] = {}
    for row in order.tolist() if by else []:
        first.setdefault(str(columns[row].get(by)), row)
    return list(first.values())
