"""The words that every part of fedtune speaks: read this first.

A round in one line: the server's strategy makes an `Instruction` for each client (`ClientInfo`), a codec turns its
tensors into a blob, the client's `Update` comes back the same way, and the strategy folds the updates into its next
state.

Strategies, clients and codecs are values: frozen dataclasses whose fields are hyper-parameters and whose methods keep
nothing between calls. What lasts is data that is passed in and handed back.
"""

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import TypeIs

from fedtune.core.costs import Costs, Weight
from fedtune.core.errors import WireError, short
from fedtune.core.method_traits import Traits as Traits
from fedtune.core.optional import ContractingCodec, GridCodec

Tensors = dict[str, Tensor]
Setting = int | float | str | bool

MAX_LABEL = 64  # characters of a device's name, and of a metric's
SERVER = -1  # the index under which the server itself installs and evaluates what it broadcasts


@dataclass(frozen=True)
class DeviceProfile:
    """What a device can do: as the population assigns it (fedtune/planning/population.py), and as its owner declares
    it to its SuperNode (`--node-config 'memory-bytes=8e9 ...'`), which goes first. inf: unlimited.

    Attributes:
        device: a label, of at most 64 printable characters.
        memory_bytes: memory that training may take, in bytes.
        backprop: whether it can take gradients, or forward passes alone.
        max_rank: the widest adapter that it takes.
        flop_per_s: floating-point operations per second that training sustains at 16 bits (bf16); not the peak of a
            data sheet.
        read_bytes_per_s: how fast a step reads the base's weights, which is what small batches wait for.
        up_bytes_per_s: what it sends, in bytes per second.
        down_bytes_per_s: what it receives, in bytes per second.
        availability: share of rounds in which it is there, above 0 up to 1.

    Raises:
        ValueError: naming the attribute that is out of range or of another type.
    """

    device: str = ""
    memory_bytes: float = float("inf")
    backprop: bool = True
    max_rank: float = float("inf")
    flop_per_s: float = float("inf")
    read_bytes_per_s: float = float("inf")
    up_bytes_per_s: float = float("inf")
    down_bytes_per_s: float = float("inf")
    availability: float = 1.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            got = f"got {repr(value)[:80]}"  # a stranger may have sent megabytes
            if item.name == "device":
                if not isinstance(value, str) or len(value) > MAX_LABEL or not value.isprintable():
                    raise ValueError(f"device should be a label of at most {MAX_LABEL} printable characters, {got}")
            elif item.name == "backprop":
                if not isinstance(value, bool):
                    raise ValueError(f"backprop should be true or false, {got}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{item.name} should be a number above 0, {got}")
        if self.availability > 1:
            raise ValueError(f"availability is a share of rounds, above 0 up to 1, got {self.availability!r}")


UNLIMITED = DeviceProfile()


@dataclass(frozen=True)
class ClientInfo:
    """One client as the server knows it."""

    index: int  # the client's partition; stable between runs, unlike Flower's node id
    samples: int  # training examples the client holds, as it said at the handshake
    capability: DeviceProfile = field(default_factory=DeviceProfile)
    rank: int = 0  # r_k of the adapter that it trains; 0: the layout's, as everybody's
    scaling: float = 0.0  # s_k, what its B A is multiplied by; 0: the layout's
    base_version: int = 0  # the last change of the base (or of what else it keeps) that it is known to hold
    broadcast: int = 0  # the last broadcast that it is known to hold, where broadcasts build on one another
    staleness: int = 0  # server updates since it was sent what it trained on; 0 where rounds are synchronous
    name: str = ""  # of its file, user or device, where it brings its data
    tokens: int = 0  # that it trains on, as it said, where it brings its data


@dataclass(frozen=True)
class Instruction:
    """What the server asks of one client."""

    tensors: Tensors
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What one client answers."""

    tensors: Tensors
    examples: int  # training examples behind the update, the n_k of the papers
    metrics: Mapping[str, float] = field(default_factory=dict)
    # What the client was sent, where the server has moved on since (asynchronous methods); it never crosses the wire
    start: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """One trainable tensor: its name and everything that must not be guessed from its shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32", as torch names it
    role: str  # "lora_A" (r, in), "lora_B" (out, r), or another of PEFT's names; "weight", "bias" of a base's own
    module: str  # the layer that it adapts, or is a part of
    scaling: float  # alpha / r, what B A is multiplied by


@dataclass(frozen=True)
class Layout:
    """The trainable tensors of a model, in the order that every party keeps, and the values they all start from."""

    slots: tuple[Slot, ...]
    initial: Tensors = field(compare=False, repr=False)
    base: str = ""  # Origin.sha256 where the base's own weights are what is trained and starts; "" for adapters
    start: str = ""  # AdapterSpec.sha256 where the values are a given adapter's; "" where they follow from the seed
    costs: Costs | None = field(default=None, compare=False, repr=False)  # for methods that plan
    weights: tuple[Weight, ...] = field(default=(), compare=False, repr=False)  # the adapted layers, likewise

    @cached_property
    def scaling(self) -> float:
        """What every layer's B A is multiplied by; 1 for adapters that have none."""
        return next((slot.scaling for slot in self.slots if slot.role == "lora_A"), 1.0)

    @cached_property
    def rank(self) -> int:
        """The rank r of the layers' B A; 0 for adapters that have none."""
        return max((slot.shape[0] for slot in self.slots if slot.role == "lora_A"), default=0)

    @cached_property
    def is_low_rank(self) -> bool:
        """Whether all that is trained is the A and B of W = W0 + s B A."""
        return {slot.role for slot in self.slots} == {"lora_A", "lora_B"}

    @cached_property
    def starts_at_zero(self) -> bool:
        """Whether every B is zero at first, and so B A adds nothing to the base."""
        return not any(self.initial[slot.name].any() for slot in self.slots if slot.role == "lora_B")

    @cached_property
    def sha256(self) -> str:
        """The manifest's hash: names, shapes, dtypes, roles, scaling and order, but no values; those of a base's own
        weights, and of an adapter that was given, are in it by their files' hash."""
        given = self.base or self.start
        manifest = repr((self.slots, given) if given else self.slots)
        return hashlib.sha256(manifest.encode()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """Some tokenised examples, padded on the right."""

    tokens: Tensor  # (examples, length) int64
    targets: Tensor  # (examples, length) bool: the tokens whose loss counts
    at_once: int = 0  # examples that go through the model at a time; 0: all of them

    def to(self, device: torch.device) -> "Batch":
        return self if device.type == "cpu" else Batch(self.tokens.to(device), self.targets.to(device), self.at_once)

    def parts(self) -> Iterator[tuple["Batch", float]]:
        """Its micro-batches, each with its share of the tokens whose loss counts: the mean over the batch is the sum of
        their means, times these. Each is cut behind the last such token, after which nothing is learnt.

        The first token of an example has nothing that it could be told from, so it never counts.
        """
        size = len(self.tokens)
        if not 0 < self.at_once < size:
            yield self, 1.0
            return
        counts = self.targets[:, 1:].sum(1).tolist()
        for start in range(0, size, self.at_once):
            part = slice(start, start + self.at_once)
            if learnt := sum(counts[part]):
                width = int(self.targets[part].any(0).nonzero().max()) + 1
                yield Batch(self.tokens[part, :width], self.targets[part, :width]), learnt / sum(counts)


FIGURES = ("loss", "accuracy", "exact_match", "rouge_l", "choice_accuracy")  # of a score, in the order of columns


@dataclass(frozen=True)
class Score:
    """How good a model is on held-out data (fedtune/evaluation/scoring.py)."""

    loss: float  # mean negative log-likelihood per learnt token, nats
    accuracy: float  # fraction of learnt tokens that were the most likely one
    tokens: int  # how many there were
    exact_match: float | None = None  # fraction of answers that are their reference; None where nothing was answered
    rouge_l: float | None = None  # mean ROUGE-L F1 of the answers, 0 ... 1; likewise
    answers: int = 0  # how many there were
    choice_accuracy: float | None = None  # fraction of questions whose right choice was the most likely; None of none
    questions: int = 0  # how many there were

    def row(self) -> dict[str, float | None]:
        """The figures, by the columns that tables have for them."""
        return {f"eval_{name}": getattr(self, name) for name in FIGURES}


class Batches(Protocol):
    """A client's training data: endless, reshuffled by key each epoch."""

    @property
    def examples(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


State = TypeVar("State")


class Strategy(Protocol[State]):
    """The server's side of a method. What else a class, and its state, may have: fedtune/core/optional.py."""

    def init(self, layout: Layout) -> State: ...

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        """What `peer` is sent. Peers that are sent the same should be handed the same `tensors` object: it is then
        encoded once."""
        ...

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        """Raise `WireError` if the update is not what was asked for; the round then goes on without this peer."""
        ...

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        """Fold the valid replies, in order of peer index, into the next state. A reply is decoded when it is looked
        up, so a strategy that passes over them once holds one update at a time."""
        ...


@dataclass(frozen=True)
class GradientRequest:
    """What a client asks for between two of its steps: a batch's mean loss, and its gradient."""

    model: Any  # to whose trained tensors' `grad` it is added
    batch: Batch
    key: int  # draws dropout
    scale: float = 1.0  # of the loss on the way back, where the base is held in float16; the gradient is divided by it


@dataclass(frozen=True)
class GradientReply:
    """What came of it; the gradient is in the tensors."""

    loss: float  # mean negative log-likelihood per learnt token, nats
    scale: float = 1.0  # under which the gradient was finite, for the next request; 0: under none


Result = TypeVar("Result")
# What is done between gradients, which whoever drives it computes: for one client or for many at once
InSteps = Generator[GradientRequest, GradientReply, Result]

Model = TypeVar("Model", contravariant=True)


class Client(Protocol[Model]):
    """The client's side of a method, on a model that it can train (fedtune.models.adapted_model.LocalModel).

    Where a class is no `CostedClient` (fedtune/core/optional.py), there is no virtual clock.

    `memory` is what this client kept for itself at its last turn, empty at first. Whatever a client puts there stays on
    its device, is there again at its next turn, also after a resume, and reaches no other client.
    """

    def receive(self, model: Model, instruction: Instruction, memory: Tensors) -> None:
        """Install what the server sent. The model starts each turn from the layout's initial values; the server, which
        evaluates what it broadcasts, has no memory."""
        ...

    def train(
        self, model: Model, batches: Batches, instruction: Instruction, memory: Tensors, key: int
    ) -> Update | InSteps[Update]:
        """What this client answers. Written as a generator that yields its `GradientRequest`s it may be trained beside
        other clients, in one pass over the base (fedtune/training/cohort.py); otherwise it computes by itself."""
        ...


class LosslessCodec(Protocol):
    """Tensors to bytes and back, bit by bit."""

    lossless: ClassVar[bool]  # True

    def encode(self, tensors: Tensors, key: int) -> bytes: ...

    def decode(self, blob: bytes) -> Tensors:
        """Raises `WireError` on anything that `encode` can't have made."""
        ...


class LossyCodec(Protocol):
    """Differences to bytes, and to what is left of them; `decode(encode(x))` is what the other side trains on.

    Both ends know names and shapes, so they aren't in the blob (fedtune/wire/delta_coding.py).
    """

    lossless: ClassVar[bool]  # False

    def encode(self, tensors: Tensors, key: int) -> bytes: ...

    def decode(self, blob: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
        """Floating tensors of exactly these shapes. Raises `WireError` on anything that `encode` can't have made, and
        takes no more memory than the shapes and the blob do."""
        ...


Codec = LosslessCodec | LossyCodec


def is_lossless(codec: Codec) -> TypeIs[LosslessCodec]:
    return codec.lossless


def grid(codec: Codec) -> Sequence[Codec]:
    """The codecs among which a client chooses by held-out loss, where a setting of this one says several values."""
    return codec.grid if isinstance(codec, GridCodec) else ()


def contracts(codec: Codec) -> bool:
    """Whether it leaves out less than it is given (`ContractingCodec`): without, what error feedback keeps grows
    without end."""
    return isinstance(codec, ContractingCodec) and codec.contracts


def share(replies: Sequence[tuple[ClientInfo, Update]]) -> list[float]:
    """The weight p_k = n_k / sum(n) of each reply, summing to one.

    Raises:
        WireError: if no reply has an example behind it.
    """
    examples = [update.examples for _, update in replies]
    total = sum(examples)
    if total <= 0:
        raise WireError(f"none of the {len(examples)} updates has a training example behind it: there are no weights")
    return [n / total for n in examples]


def same_instruction(one: Instruction, other: Instruction) -> bool:
    """Whether one encoding serves both: the very same tensors, which need no comparing, and equal settings."""
    return one.settings == other.settings and same_tensors(one.tensors, other.tensors)


def same_tensors(mine: Tensors, theirs: Tensors) -> bool:
    return mine is theirs or (
        mine.keys() == theirs.keys() and all(tensor is theirs[name] for name, tensor in mine.items())
    )


def size_of(tensors: Tensors) -> int:
    """Bytes that tensors take in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def expect_like(tensors: Tensors, reference: Mapping[str, Tensor]) -> None:
    """Check that `tensors` has exactly the names, shapes and dtypes of `reference`.

    Raises:
        WireError: naming the first tensor that is missing, extra, misshapen or of another dtype.
    """
    if missing := reference.keys() - tensors.keys():
        raise WireError(f"tensor '{min(missing)}' is missing ({len(missing)} of {len(reference)} are)")
    if extra := tensors.keys() - reference.keys():
        raise WireError(f"tensor '{short(min(extra))}' was not asked for ({len(extra)} such)")
    for name, expected in reference.items():
        got = tensors[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise WireError(f"tensor '{name}': expected {describe(expected)}, got {describe(got)}")


def describe(tensor: Tensor) -> str:
    """Dtype and shape, as in `float32 (8, 576)`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
