"""Which rows each client trains on, which it and the server keep for testing, and the batches that training sees.

A client's data is a list of row numbers into one corpus: hundreds of clients cost hundreds of short integer arrays.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedtune.config.schema import DataSpec
from fedtune.core.caches import once
from fedtune.core.errors import CapacityError, DataError
from fedtune.core.protocol import Batch
from fedtune.core.seeds import derive_seed, permutation
from fedtune.data.corpus import Corpus
from fedtune.data.duplicates import distinct, groups, hold_out, repeated, texts
from fedtune.data.partition import divide
from fedtune.data.sources import load_examples
from fedtune.data.token_cache import kept_or
from fedtune.data.tokenisation import tokenise


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
    at_once: int = 0  # examples of a batch that go through the model at a time; 0: all of them
    seconds: float = math.inf  # after which there are no more

    @property
    def examples(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        size = min(self.batch_size, len(self.rows))
        waiting: list[int] = []
        epoch, end = 0, time.monotonic() + self.seconds
        while True:
            if time.monotonic() > end:
                raise CapacityError(
                    f"training takes longer than seconds = {self.seconds:g}, which this device's owner allows "
                    "(device.toml)"
                )
            while len(waiting) < size:
                order = permutation(derive_seed(self.key, "epoch", epoch), len(self.rows))
                waiting.extend(self.rows[order].tolist())
                epoch += 1
            yield replace(self.corpus.batch(waiting[:size], self.pad), at_once=self.at_once)
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
    repeated: int = 0  # and those left out because another has the same text
    asked: tuple[int, int] = (0, 0)  # rows that the server, and all clients together, were to hold out
    names: tuple[str, ...] = ()  # by client index, where files or users are the clients
    shared: bool = True  # whether server and clients hold the same rows, divided alike

    def batches(self, client: int, batch_size: int, key: int, at_once: int = 0) -> ClientBatches:
        """What client `client` trains on.

        Args:
            at_once: examples of a batch that go through the model at a time; 0: all of them.

        Raises:
            DataError: if it has no rows.
        """
        if not len(self.train[client]):
            raise DataError(f"client {client} has no rows to train on, so it should not be asked to")
        return ClientBatches(self.corpus, self.train[client], batch_size, self.pad, key, at_once)

    def tokens(self, client: int) -> int:
        """How many tokens client `client` trains on."""
        lengths = np.diff(self.corpus.starts)
        return int(lengths[self.train[client]].sum())

    @cached_property
    def mean_length(self) -> float:
        """Tokens of an example, in the mean over all that clients train on; 1 if they have none."""
        held = np.diff(self.corpus.starts)[np.concatenate(self.train)]
        return float(held.mean()) if len(held) else 1.0

    def pooled(self) -> "FederatedData":
        """The same division with one client in place of all: it trains on what any of them trains on."""
        train, heldout = (np.sort(np.concatenate(rows)) for rows in (self.train, self.heldout))
        return replace(self, train=(train,), heldout=(heldout,), names=())

    @property
    def read(self) -> int:
        """Rows of the source that had anything to learn."""
        return len(self.corpus) + self.repeated

    @cached_property
    def distinct(self) -> int:
        """How many texts there are."""
        return len(np.unique(self._same))

    @cached_property
    def idle(self) -> list[int]:
        """The clients without rows, as far as is known here."""
        return [] if not self.shared else [client for client, rows in enumerate(self.train) if not len(rows)]

    @cached_property
    def in_training(self) -> tuple[int, int]:
        """How many of the rows that the server, and that clients, hold out stand word for word in what some client
        trains on."""
        trained = np.concatenate(self.train)
        own = np.concatenate(self.heldout)
        return repeated(self._same, self.server, trained), repeated(self._same, own, trained)

    @cached_property
    def _same(self) -> np.ndarray:
        return texts(self.corpus)

    @cached_property
    def sha256(self) -> str:
        """A hash of the corpus and its division: what both ends have to have in common; "" where they don't."""
        if not self.shared:
            return ""
        return hashlib.sha256("".join(map(str, self.identity.values())).encode()).hexdigest()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """By what the data are known again."""
        division = hashlib.sha256()
        for rows in (self.server, *self.train, *self.heldout):
            division.update(f"{len(rows)} ".encode() + rows.astype(np.int64).tobytes())
        return {
            "examples": len(self.corpus),
            "corpus_sha256": self.corpus.sha256,
            "division_sha256": division.hexdigest(),
        }

    def check_same(self, before: Mapping[str, Any], refused: str) -> None:
        """Check that these are the rows, the tokens and the division that a run began with.

        Args:
            before: the `identity` of the data that a run began with; empty where nothing is known of them.
            refused: what can't be done if these are others.

        Raises:
            DataError: saying what differs.
        """
        own, was = self.identity, {name: before.get(name, value) for name, value in self.identity.items()}
        if own == was:
            return
        if own["corpus_sha256"] != was["corpus_sha256"] or own["examples"] != was["examples"]:
            now, then = own["examples"], was["examples"]
            counts = (
                f"are {now:,} examples and were {then:,}" if now != then else f"are {now:,} examples with other tokens"
            )
            raise DataError(
                f"{refused}: its data {counts}: the file was changed, or is read by another tokenizer or version of "
                "fedtune. Put back what was changed, or start a new run with another out="
            )
        raise DataError(
            f"{refused}: its examples are divided otherwise than they were, by a column of the file that was changed "
            "or by another version of fedtune, flwr-datasets or numpy. Go back to it, or start a new run with out="
        )

    def describe(self, spec: DataSpec) -> list[str]:
        """What a person should know of this division, a line each."""
        lines = []
        if again := self.read - self.distinct:
            kept = spec.duplicates == "keep"
            ending = "they stay (data.duplicates=keep)" if kept else "left out (data.duplicates=keep takes them)"
            lines.append(f"repeated {again:,} of {self.read:,} rows say what another says, word for word: {ending}")
        own = sum(map(len, self.heldout))
        inside, theirs = self.in_training
        lines.append(
            f"held out {len(self.server):,} rows by the server, {own:,} by clients; {inside} and {theirs} of them "
            "stand in training data word for word"
        )
        for setting, got, asked in (
            ("heldout", len(self.server), self.asked[0]),
            ("client_heldout", own, self.asked[1]),
        ):
            if 2 * got < asked and not self.names:
                lines.append(
                    f"         data.{setting}={getattr(spec, setting):g} asks for {asked:,} rows, and {got:,} are held "
                    "out: rows with one prompt are held out together or not at all"
                )
        if idle := len(self.idle):
            lines.append(f"         {idle:,} of {len(self.train):,} clients have no rows, and are never asked")
        return lines


def load_data(spec: DataSpec, clients: int, tokenizer: Any, seed: int) -> FederatedData:
    """Read, tokenise and divide the data.

    Rows whose text another has are left out (data.duplicates). Then the server's held-out rows are set aside,
    flwr-datasets divides the rest among the clients, and each client sets aside its own held-out rows; rows with one
    text or one prompt are on one side of each of these splits (fedtune/data/duplicates.py). All of it follows from the
    seed. A client may end up without rows.

    Raises:
        DataError: if the source can't be read, or has too few rows.
        ConfigError: if the partition doesn't fit the data or the number of clients.
    """
    division = (
        "partition",
        "partition_by",
        "alpha",
        "classes",
        "partition_options",
        "heldout",
        "client_heldout",
        "user_column",
        "heldout_path",
    )
    others = (*division, "duplicates")
    source = tuple(str(value) for name, value in vars(spec).items() if name not in others)
    if spec.is_brought:
        from fedtune.data.own_data import load_own

        return load_own(spec, clients, tokenizer, seed)
    examples = once(("examples", source), lambda: load_examples(spec))
    whole, kept = once(("corpus", source, id(tokenizer)), lambda: kept_or(tokenise, examples, tokenizer, spec))
    by = spec.partition_by

    def pick() -> tuple[Corpus, list[int]]:
        labels = [str(examples[place].columns.get(by)) if by else "" for place in kept]
        rows = distinct(texts(whole), labels)
        return whole.pick(rows), [kept[row] for row in rows]

    corpus, places = whole, kept
    if spec.duplicates == "drop":
        corpus, places = once(("distinct", source, id(tokenizer), by), pick)
    count = len(corpus)
    columns = [examples[place].columns for place in places]
    group = groups([examples[place] for place in places], texts(corpus))
    order = permutation(derive_seed(seed, "data"), count)
    aside = round(spec.heldout * count)
    labels = [str(own.get(by)) if by else "" for own in columns]
    server = hold_out(order, group, [0] * count, {0: aside}, labels)
    shared = order[~np.isin(order, server)]
    if len(shared) < clients:
        without = f", {len(server)} of them the server's own (data.heldout={spec.heldout:g})," if len(server) else ""
        again = f" ({len(kept) - count:,} rows that repeat others are left out)" if count < len(kept) else ""
        raise DataError(
            f"{count} examples{without} are too few for {clients} clients{again}: use fewer clients or more data"
        )
    held = [shared[places] for places in divide(spec, [columns[row] for row in shared], clients, seed)]
    # At least one row is left to train on; a client with a single row has no held-out data of its own.
    quota = {
        client: min(round(spec.client_heldout * len(rows)), max(len(rows) - 1, 0)) for client, rows in enumerate(held)
    }
    owner = np.full(count, -1)
    for client, rows in enumerate(held):
        owner[rows] = client
    mixed = [rows[permutation(derive_seed(seed, "client data", client), len(rows))] for client, rows in enumerate(held)]
    owners = owner.tolist()
    own = hold_out(np.concatenate(mixed), group, owners, quota, owners)
    tests = np.zeros(count, dtype=bool)
    tests[own] = True
    return FederatedData(
        corpus,
        tuple(np.sort(rows[~tests[rows]]) for rows in held),
        tuple(np.sort(rows[tests[rows]]) for rows in held),
        server,
        int(tokenizer.pad_token_id or 0),
        len(examples) - len(kept),
        len(kept) - count,
        (aside, sum(quota.values())),
    )
