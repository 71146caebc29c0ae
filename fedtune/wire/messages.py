"""Instructions and updates to Flower messages and back. The only place where bytes are counted.

A message holds one record of arrays with one uint8 array, the codec's blob, and one record of plain values. Everything
else about an update is checked here before anyone trusts it: an update is input from a stranger.

    payload bytes   len(blob)
    wire bytes      length of the whole message, serialised as protobuf: blob, values, names and addresses
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedtune.core.errors import ConfigError, WireError, short
from fedtune.core.limits import check_settings
from fedtune.core.protocol import (
    MAX_LABEL,
    UNLIMITED,
    ClientInfo,
    Codec,
    DeviceProfile,
    Instruction,
    Score,
    Setting,
    Tensors,
    Update,
)
from fedtune.core.settings import EngineSetting
from fedtune.wire.delta_coding import decode, encode
from fedtune.wire.flower_private import content_bytes, envelope_bytes

PAYLOAD, BLOB, SETTINGS, METRICS, EXAMPLES, GREETING = "payload", "blob", "settings", "metrics", "examples", "greeting"
ROUND = "round"
LOST = "lost"
RUN = EngineSetting.RUN  # the setting under which an instruction carries the run's id
MAX_METRICS = 64
MAX_EXAMPLES = 10**9  # that a client may say it holds
# What a metric may be, and a loss: sums over all clients and rounds stay numbers, and no honest one comes near
MAX_METRIC, MAX_LOSS = 1e15, 1e6
SCORED = ("loss", "accuracy", "tokens")  # what every score has
COUNTED = {"answers": ("exact_match", "rouge_l"), "questions": ("choice_accuracy",)}  # what some have, of how many


def pack_instruction(
    instruction: Instruction, codec: Codec, key: int, run: str = "", known: Tensors | None = None
) -> RecordDict:
    """The content of a message to a client.

    Args:
        known: the tensors that the receiver holds already; a lossy codec carries the difference.
        run: the run's id, which stays the same over resumes: a client finds what it kept by it.
    """
    return pack_told(encode(codec, instruction.tensors, key, known or {}), instruction.settings, run)


def pack_told(blob: bytes, settings: Mapping[str, Setting], run: str = "") -> RecordDict:
    """The content of a message to a client whose tensors are in `blob`."""
    return RecordDict({PAYLOAD: _payload(blob), SETTINGS: ConfigRecord({**settings, **({RUN: run} if run else {})})})


def unpack_instruction(content: RecordDict, codec: Codec, known: Tensors | None = None) -> tuple[Instruction, str]:
    """What `pack_instruction` packed: the instruction, and the run's id or "".

    Raises:
        WireError: if the content has another form.
    """
    settings, run = unpack_settings(content)
    return Instruction(decode(codec, blob_of(content), known or {}), settings), run


def unpack_settings(content: RecordDict) -> tuple[dict[str, Setting], str]:
    """What an instruction says beside its tensors, and the run's id or "".

    Raises:
        WireError: if the content has another form.
    """
    settings: dict[str, Setting] = {}
    for name, value in _record(content, SETTINGS, ConfigRecord).items():
        if not isinstance(value, int | float | str | bool):
            raise WireError(
                f"setting '{short(name)}' should be a number, text or truth value, got {type(value).__name__}"
            )
        settings[name] = value
    run = settings.pop(RUN, "")
    if not isinstance(run, str):
        raise WireError(f"setting '{RUN}' should be the run's id, got {short(repr(run))}")
    check_settings(settings)
    return settings, run


def pack_update(update: Update, codec: Codec, key: int, known: Tensors | None = None) -> RecordDict:
    """The content of a client's reply.

    Args:
        known: the tensors that the client was sent; a lossy codec carries the difference.
    """
    metrics = MetricRecord(
        {EXAMPLES: update.examples, **{name: float(value) for name, value in update.metrics.items()}}
    )
    return RecordDict({PAYLOAD: _payload(encode(codec, update.tensors, key, known or {})), METRICS: metrics})


def unpack_update(content: RecordDict, blob: bytes, codec: Codec, known: Tensors | None = None) -> Update:
    """What `pack_update` packed, checked.

    Args:
        blob: the content's `blob_of`.
        known: as for `pack_update`.

    Raises:
        WireError: if the content has another form, a tensor isn't finite, a metric has a name that is none or is out of
            range, or the number of examples isn't a positive integer.
    """
    if extra := content.keys() - {PAYLOAD, METRICS}:
        raise WireError(f"record '{short(min(extra))}' was not asked for")
    examples, metrics = _metrics(_record(content, METRICS, MetricRecord))
    tensors = decode(codec, blob, known or {})
    check_finite(tensors)
    return Update(tensors, examples, metrics)


def pack_score(score: Score | None) -> RecordDict:
    """The content of a client's answer to what its own model is worth; empty where it has nothing to tell it by."""
    if score is None:
        return RecordDict({METRICS: MetricRecord()})
    measured = [name for counted, shares in COUNTED.items() if getattr(score, counted) for name in (counted, *shares)]
    return RecordDict({METRICS: MetricRecord({name: getattr(score, name) for name in (*SCORED, *measured)})})


def unpack_score(content: RecordDict) -> Score | None:
    """What `pack_score` packed, checked.

    Raises:
        WireError: if a figure is missing, unknown, not finite or out of range.
    """
    record = dict(_record(content, METRICS, MetricRecord))
    if not record:
        return None
    loss, accuracy, tokens = (record.pop(name, None) for name in SCORED)
    right = isinstance(loss, float) and isinstance(accuracy, float) and isinstance(tokens, int)
    if not right or not 0 <= loss <= MAX_LOSS or not 0 <= accuracy <= 1 or tokens < 1:
        got = ", ".join(short(repr(value)) for value in (loss, accuracy, tokens))
        raise WireError(
            f"expected loss, accuracy and tokens, within 0 ... {MAX_LOSS:g}, 0 ... 1 and from 1 up, got {got}"
        )
    more: dict[str, Any] = {}
    for counted, shares in COUNTED.items():
        if counted in record:
            figures = {name: record.pop(name, None) for name in (counted, *shares)}
            count, *values = figures.values()
            fair = all(isinstance(value, float) and 0 <= value <= 1 for value in values)
            if not isinstance(count, int) or count < 1 or not fair:
                raise WireError(f"expected how many {counted} and what share of them, got {short(figures)}")
            more |= figures
    if record:
        raise WireError(f"figure '{short(min(record))}' of a score is not known, or lacks what it was counted over")
    return Score(loss, accuracy, tokens, **more)


def blob_of(content: RecordDict) -> bytes:
    """The codec's blob in a message's content.

    Raises:
        WireError: if there isn't exactly one uint8 array of matching length.
    """
    record = _record(content, PAYLOAD, ArrayRecord)
    if list(record) != [BLOB]:
        raise WireError(f"record '{PAYLOAD}' should hold one array '{BLOB}', got {short(sorted(record)[:5])}")
    array = record[BLOB]
    if array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        got = short(f"{short(array.dtype)} {tuple(array.shape[:9])}")
        raise WireError(f"array '{BLOB}' should be uint8 of shape ({len(array.data)},), got {got}")
    return bytes(array.data)


def check_finite(tensors: Tensors) -> None:
    """Check that every number is one.

    Raises:
        WireError: naming the first tensor with a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WireError(f"tensor '{short(name)}' has values that are not finite")


def pack_arrays(tensors: Tensors) -> ArrayRecord:
    """Tensors as Flower's own strategies carry them.

    Raises:
        ConfigError: for a dtype that numpy lacks, as bfloat16.
    """
    record = ArrayRecord()
    for name, tensor in tensors.items():
        try:
            record[name] = Array(tensor.detach().cpu().numpy())
        except TypeError as error:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(f"tensor '{name}' is {dtype}, which Flower's Array can't hold: use float32") from error
    return record


def unpack_arrays(record: Mapping[str, Array]) -> Tensors:
    """What a stranger's arrays hold.

    Raises:
        WireError: naming the array that is not a plain block of numbers.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> torch.Tensor:
    try:
        stream = BytesIO(array.data)
        if (version := np.lib.format.read_magic(stream)) != (1, 0):
            raise ValueError(f"version {version} of numpy's format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        # Checked first: numpy makes room for what the header says before it reads
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(array.data) - stream.tell():
            raise ValueError(f"{len(array.data)} bytes that are no {dtype} {shape}")
        return torch.from_numpy(array.numpy())
    except Exception as error:  # the header is a Python literal: a bad one raises whatever Python's parser does
        raise WireError(f"array '{short(name)}' ({short(array.dtype)}) can't be read: {error}") from error


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the codec's blob."""
    return len(blob_of(content))


def update_bytes(blob: bytes, update: Update) -> int:
    """Bytes of the content that carries `update`, as Flower serialises it.

    They depend on nothing but lengths, the blob's, the metrics' names' and that of the number of examples, so each such
    shape is serialised and measured once: copying a blob about to measure it takes longer than everything else here.
    What is remembered holds nothing of a client's own words.
    """
    names = tuple(sorted(len(name.encode()) for name in update.metrics))
    return _update_bytes(len(blob), update.examples.bit_length(), names)


@lru_cache(maxsize=1 << 16)
def _update_bytes(blob: int, examples: int, names: tuple[int, ...]) -> int:
    """Args:
    examples: bits of the number of examples.
    names: the lengths of the metrics' names, in bytes.
    """
    # Any names of these lengths; a base of 64 tells MAX_METRICS of one letter apart
    metrics = {f"{chr(48 + place):_>{length}}": 0.0 for place, length in enumerate(names)}
    record = MetricRecord({EXAMPLES: 1 << (examples - 1), **metrics})
    return content_bytes(RecordDict({PAYLOAD: _payload(bytes(blob)), METRICS: record}))


def wire_bytes(message: Message, content: int | None = None) -> int:
    """Bytes of the message as Flower serialises it.

    Args:
        content: the content's share where it is known already: a broadcast is measured once, not once a client.
    """
    if content is None:
        content = content_bytes(message.content) if message.has_content() else 0
    return envelope_bytes(message) + content


def _payload(blob: bytes) -> ArrayRecord:
    # One uint8 array: Flower sends arrays in chunks but config values whole, and numpy has no bfloat16
    record = ArrayRecord()
    record[BLOB] = Array("uint8", (len(blob),), "fedtune", blob)
    return record


def _record(content: RecordDict, name: str, kind: type) -> Any:
    record = content.get(name)
    if not isinstance(record, kind):
        raise WireError(f"expected a record '{name}' ({kind.__name__}), got {short(sorted(content)[:5])}")
    return record


def _metrics(record: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    if len(record) > MAX_METRICS:
        raise WireError(f"{len(record)} metrics are too many: expected at most {MAX_METRICS}")
    examples = record.get(EXAMPLES)
    if not isinstance(examples, int) or examples < 1:
        raise WireError(f"'{EXAMPLES}' should be a positive integer, got {short(repr(examples))}")
    metrics: dict[str, float] = {}
    for name, value in record.items():
        if name == EXAMPLES:
            continue
        if not 0 < len(name) <= MAX_LABEL or not name.isprintable():
            raise WireError(f"metric '{short(name)}' should have a name of 1 to {MAX_LABEL} printable characters")
        if not isinstance(value, float) or not math.isfinite(value):
            raise WireError(f"metric '{name}' should be a finite float, got {short(repr(value))}")
        if abs(value) > (most := MAX_LOSS if name.endswith("loss") else MAX_METRIC):
            raise WireError(f"metric '{name}' should be at most {most:g} in magnitude, got {value:g}")
        metrics[name] = value
    return examples, metrics


def pack_question(run: str, round: int) -> RecordDict:
    """Who are you, and what do you hold of this run before `round`?"""
    return RecordDict({SETTINGS: ConfigRecord({RUN: run, ROUND: round})})


def unpack_question(content: RecordDict) -> tuple[str, int]:
    """The run's id and the round of `pack_question`; of an empty question, "" and 0."""
    if not content:
        return "", 0
    record = _record(content, SETTINGS, ConfigRecord)
    run, round = record.get(RUN), record.get(ROUND)
    if not isinstance(run, str) or not isinstance(round, int):
        raise WireError(f"expected a run's id and a round, got {short(repr(run))} and {short(repr(round))}")
    return run, round


def pack_greeting(peer: ClientInfo, layout_sha256: str, data_sha256: str = "", lost: bool = False) -> RecordDict:
    """What a client says of itself at the handshake. Of its capability, only what is limited.

    Args:
        lost: whether it could not read what it had kept.
    """
    limits = {name: value for name, value in vars(peer.capability).items() if value != getattr(UNLIMITED, name)}
    greeting = {"index": peer.index, "samples": peer.samples, "layout": layout_sha256, **limits}
    held = {"version": peer.base_version, "heard": peer.broadcast}
    greeting |= {name: number for name, number in held.items() if number} | ({LOST: True} if lost else {})
    greeting |= {"data": data_sha256} if data_sha256 else {}
    greeting |= {"name": peer.name, "tokens": peer.tokens} if peer.name else {}
    return RecordDict({GREETING: ConfigRecord(greeting)})


def has_lost(content: RecordDict) -> bool:
    """Whether a greeting says that its client could not read what it had kept."""
    return bool(_record(content, GREETING, ConfigRecord).get(LOST, False))


def unpack_greeting(content: RecordDict, clients: int, layout_sha256: str, data_sha256: str = "") -> ClientInfo:
    """The peer that a greeting describes.

    Args:
        data_sha256: of the data that server and clients divide alike; "" where theirs are no business of the server's.

    Raises:
        WireError: if the greeting has another form, names a client that doesn't exist, or comes from a client whose
            trainable tensors, the base that they are part of, or data differ from the server's.
    """
    record = dict(_record(content, GREETING, ConfigRecord))
    index, samples, layout = (record.pop(name, None) for name in ("index", "samples", "layout"))
    data, name, tokens = record.pop("data", ""), record.pop("name", ""), record.pop("tokens", 0)
    held = {name: record.pop(name, 0) for name in ("version", "heard")}
    record.pop(LOST, None)
    if not isinstance(index, int) or not 0 <= index < clients:
        raise WireError(f"client index should be 0 ... {clients - 1}, got {short(repr(index))}")
    if not isinstance(samples, int) or samples < 0:
        raise WireError(f"client {index} should have a number of samples from 0 up, got {short(repr(samples))}")
    if samples > MAX_EXAMPLES:
        raise WireError(f"client {index} says it has more than {MAX_EXAMPLES:,} samples, which nobody has")
    if layout != layout_sha256:
        raise WireError(
            f"client {index} has other trainable tensors than the server: it runs another model, adapter or version, "
            "or, where the base itself is trained (adapter=none), it holds another base"
        )
    if data_sha256 and data != data_sha256:
        raise WireError(
            f"client {index} holds other data than the server, or divides them otherwise: give its device the same "
            "file, tokenizer and versions of fedtune, flwr-datasets and numpy"
        )
    for key, number in (*held.items(), ("tokens", tokens)):
        if not isinstance(number, int) or number < 0:
            raise WireError(f"client {index}: '{key}' should be a number from 0 up, got {short(repr(number))}")
    if not isinstance(name, str):
        raise WireError(f"client {index}: 'name' should be a text, got {short(repr(name))}")
    try:
        able = DeviceProfile(**record) if record else UNLIMITED
        known = {
            "base_version": held["version"],
            "broadcast": held["heard"],
            "name": short(name) if name else "",
            "tokens": tokens,
        }
        return ClientInfo(index, samples, able, **known)
    except (TypeError, ValueError) as error:
        raise WireError(f"client {index} describes what it can do in a way that is not understood: {error}") from error
