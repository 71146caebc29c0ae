"""Tokenised examples, their division among the clients, and the batches that training sees.

Tokens of all examples lie in one array; a client's data is a list of row numbers into it. Hundreds of clients cost
hundreds of short integer arrays.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedtune.checks import one_of
from fedtune.data import Example, load_examples
from fedtune.errors import ConfigError, DataError
from fedtune.keys import fold, permutation
from fedtune.protocol import Batch
from fedtune.schema import DataSpec
from fedtune.sharing import once

PLACEHOLDER = "\x1aanswer\x1a"  # stands where a choice will; no text has it

Span = tuple[np.ndarray, np.ndarray]  # tokens (length,) int32, and which count: (length,) bool


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: each choice after the prompt, with the choice's own tokens as those that count."""

    options: tuple[Span, ...]
    right: int  # the place of the right one


@dataclass(frozen=True)
class Corpus:
    """Tokenised examples, end to end."""

    tokens: np.ndarray  # (total,) int32
    targets: np.ndarray  # (total,) bool: the tokens whose loss counts
    starts: np.ndarray  # (examples + 1,) int64: example i is [starts[i], starts[i + 1])
    questions: Mapping[int, Question] = field(default_factory=dict)  # by row, where the example is one

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def batch(self, rows: Sequence[int] | np.ndarray, pad: int) -> Batch:
        """The examples of those row numbers as one batch, padded on the right with `pad`."""
        return padded([self.span(row) for row in rows], pad)

    def span(self, row: int) -> Span:
        start, end = self.starts[row], self.starts[row + 1]
        return self.tokens[start:end], self.targets[start:end]


def padded(spans: Sequence[Span], pad: int) -> Batch:
    """These as one batch, padded on the right with `pad`."""
    width = max(len(tokens) for tokens, _ in spans)
    tokens = torch.full((len(spans), width), pad, dtype=torch.int64)
    targets = torch.zeros((len(spans), width), dtype=torch.bool)
    for place, (own, counts) in enumerate(spans):
        tokens[place, : len(own)] = torch.from_numpy(own.astype(np.int64))
        targets[place, : len(own)] = torch.from_numpy(counts)
    return Batch(tokens, targets)


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
    corpus, kept = once(("corpus", source, id(tokenizer)), lambda: tokenise(examples, tokenizer, spec))
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


def divide(spec: DataSpec, columns: Sequence[Mapping[str, Any]], clients: int, seed: int) -> list[np.ndarray]:
    """Places 0 ... len(columns) - 1 divided among the clients by a flwr-datasets partitioner.

    Args:
        columns: the columns of the row in each place.

    Raises:
        ConfigError: for an unknown partition or column, or a partition that doesn't fit.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    datasets.disable_progress_bars()
    by, count = spec.partition_by, len(columns)
    rows: dict[str, Any] = {"place": range(count)}
    if by is not None:
        missing = next((row for row in columns if by not in row), None)
        if missing is not None:
            named = ", ".join(map(str, missing)) or "none"
            raise ConfigError(f"data.partition_by={by}: no such column in every row; there are {named}")
        rows[by] = [row[by] for row in columns]
    partitioner = _partitioner(spec, clients, fold(seed, "partition") % 2**32)
    partitioner.dataset = datasets.Dataset.from_dict(rows)
    named = f"data.partition={spec.partition}" + (f" by '{by}'" if by else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a line for every attempt at a skewed draw
            if (made := partitioner.num_partitions) != clients:
                raise ConfigError(f"{named} makes {made} clients, not {clients}: set population.clients={made}")
            return [np.asarray(partitioner.load_partition(i)["place"], dtype=np.int64) for i in range(clients)]
    except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{named} does not work for {count} rows and {clients} clients: {reason} "
            "Use fewer clients, a milder partition, or other data.partition_options"
        ) from error


def _partitioner(spec: DataSpec, clients: int, seed: int) -> Any:
    from flwr_datasets import partitioner as kinds

    counted = {"num_partitions": clients}
    labelled = {**counted, "partition_by": spec.partition_by, "seed": seed}
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        "iid": (kinds.IidPartitioner, counted),
        "linear": (kinds.LinearPartitioner, counted),
        "square": (kinds.SquarePartitioner, counted),
        "exponential": (kinds.ExponentialPartitioner, counted),
        "natural": (kinds.NaturalIdPartitioner, {"partition_by": spec.partition_by}),
        "dirichlet": (kinds.DirichletPartitioner, {**labelled, "alpha": spec.alpha, "min_partition_size": 2}),
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


def tokenise(examples: Sequence[Example], tokenizer: Any, spec: DataSpec) -> tuple[Corpus, list[int]]:
    """Tokenise by the tokenizer's chat template where it has one.

    Each stretch of text that is learnt or not is tokenised by itself, because that is how it will be at inference: the
    prompt ends where the model takes over.

    Returns:
        The corpus, and for each of its examples the place it had in `examples`: those that the cut at `max_length`
        leaves with nothing to learn are dropped.
    """
    stretches = [_stretches(example, tokenizer, spec.loss_on) for example in examples]
    encoded = tokenizer(
        [text for pieces in stretches for text, _ in pieces], add_special_tokens=False, return_attention_mask=False
    )["input_ids"]
    prefix = _prefix(tokenizer)
    suffix = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    kept: list[int] = []
    piece = 0
    for place, (example, pieces) in enumerate(zip(examples, stretches, strict=True)):
        templated = bool(example.messages) and tokenizer.chat_template is not None
        row = [] if templated else list(prefix)
        learn = [False] * len(row)
        for _, target in pieces:
            row += encoded[piece]
            learn += [target] * len(encoded[piece])
            piece += 1
        if not templated:
            row += suffix
            learn += [True] * len(suffix)
        row, learn = row[: spec.max_length], learn[: spec.max_length]
        if any(learn[1:]):  # nothing predicts the first token
            tokens.append(np.asarray(row, dtype=np.int32))
            targets.append(np.asarray(learn, dtype=bool))
            kept.append(place)
    if not kept:
        raise DataError(
            f"data.max_length={spec.max_length} cuts every example before anything to learn: raise it, or set "
            "data.loss_on=all"
        )
    starts = np.concatenate([[0], np.cumsum([len(row) for row in tokens])]).astype(np.int64)
    asked = {row: examples[place] for row, place in enumerate(kept) if examples[place].choices}
    questions = _questions(asked, tokenizer, spec) if asked else {}
    return Corpus(np.concatenate(tokens), np.concatenate(targets), starts, questions), kept


def _questions(asked: Mapping[int, Example], tokenizer: Any, spec: DataSpec) -> dict[int, Question]:
    """The choices of these examples, each in the right one's place. What is too long is cut at its beginning, so that
    a whole choice is left."""
    heads = [_head(example, tokenizer, spec.loss_on) for example in asked.values()]
    texts = [text for head, example in zip(heads, asked.values(), strict=True) for text in (*head, *example.choices)]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    prefix = [] if tokenizer.chat_template is not None else _prefix(tokenizer)
    questions = {}
    for (row, example), head in zip(asked.items(), heads, strict=True):
        before = [*prefix, *(token for _ in head for token in next(encoded))]
        options = []
        for _ in example.choices:
            choice = next(encoded)[: spec.max_length - 1]  # nothing predicts the first token
            tokens = np.asarray([*before, *choice][-spec.max_length :], dtype=np.int32)
            options.append((tokens, np.arange(len(tokens)) >= len(tokens) - len(choice)))
        questions[row] = Question(tuple(options), example.right)
    return questions


def _head(example: Example, tokenizer: Any, loss_on: str) -> list[str]:
    """The stretches of text before the answer."""
    *asked, answer = example.messages
    anything = replace(example, messages=(*asked, {**answer, "content": PLACEHOLDER}))
    *stretches, last = [text for text, _ in _stretches(anything, tokenizer, loss_on)]
    before, found, _ = last.partition(PLACEHOLDER)
    if not found:
        raise DataError("the tokenizer's chat template changes an answer's text, so no choice can be put in its place")
    return [*stretches, before] if before else stretches


def _stretches(example: Example, tokenizer: Any, loss_on: str) -> list[tuple[str, bool]]:
    """The example's text, cut where learning begins and ends."""
    if not example.messages:
        return [(example.text, True)]
    everything = loss_on == "all"
    if tokenizer.chat_template is None:
        pieces = []
        for turn in example.messages:
            answer = turn["role"] == "assistant"
            pieces.append((turn["content"] if answer else turn["content"] + "\n", answer or everything))
        return pieces
    pieces = []
    done = ""
    for place, turn in enumerate(example.messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, example.messages[:place], True)
        after = _render(tokenizer, example.messages[: place + 1], False)
        if not after.startswith(done):
            raise DataError(
                "the tokenizer's chat template renders earlier turns differently once later ones follow, so they "
                "can't be learnt in one pass: give each row one answer, or use another tokenizer"
            )
        # Some templates' generation prompt is no prefix of the finished turn (an empty "thinking" part, say): learning
        # then starts where the two part.
        cut = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
        )
        cut = max(cut, len(done))
        pieces.append((after[len(done) : cut], everything))
        pieces.append((after[cut:], True))
        done = after
    return [(text, learn) for text, learn in pieces if text]


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], generate: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # templates raise what their authors chose
        raise DataError(
            f"the tokenizer's chat template refuses {[turn['role'] for turn in messages]}: {error}"
        ) from error


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before plain text: the begin-of-text token or nothing."""
    start = tokenizer("")["input_ids"]
    return list(start) if start and start == [tokenizer.bos_token_id] else []
