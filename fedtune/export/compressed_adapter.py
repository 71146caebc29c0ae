"""`fedtune compress` and `decompress`: a PEFT adapter on disk as a small file, coded as messages are, and back.

A lossy codec is meant for updates. With the adapter that training began with at hand (the start), what is coded is the
difference from it, and it is needed again to decode. Without, it is the difference from zero: A's random initial values
are coded together with what was learned.

The folder has adapter_config.json as it was, and adapter_model.fedtune:

    magic     "fedtune", version 1 (one byte)
    sha256    of all that follows, 32 bytes
    length    of the head, uint32, little-endian
    head      JSON: codec, its class as `_target_` and its settings; tensors, [dtype, shape] by name; start, the sha256
              of the start's adapter_model.safetensors, or null
    body      what the codec makes of the tensors or, if it is lossy, of their differences

Such a file may come from a stranger, and then its hash is right whatever is in it. So a head may name nothing but the
codecs in conf/codec, and tensors of up to `MAX_VALUES` values in all. Decoding takes a few times the memory of these,
of the file and of the start: 12 bytes a value for float32. A short file may well declare that many, because an update
of zeros is short.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from fedtune.codecs.packed import DTYPES, FORMAT, MAX_DIMENSIONS, Packed, read_head
from fedtune.config.compose import CONF, build, choices, compose
from fedtune.core.checks import one_of
from fedtune.core.errors import MALFORMED, ConfigError, ExportError, WireError
from fedtune.core.files import beside, new_folder
from fedtune.core.protocol import Codec, Tensors, describe, is_lossless
from fedtune.core.text import first_line
from fedtune.runs.adapter_files import ADAPTER_CONFIG
from fedtune.wire.delta_coding import wide
from fedtune.wire.messages import check_finite

WEIGHTS = "adapter_model.safetensors"
PACKED = "adapter_model.fedtune"

MAGIC = b"fedtune\1"  # its last byte is the version
BEGIN = len(MAGIC) + 32 + 4  # where the head begins

MAX_VALUES = 1 << 31  # 8 GiB of float32; LoRA of rank 128 on a model of 70 billion parameters has 1.7 billion
MAX_HEAD = 1 << 24  # bytes; a tensor takes about 100
MAX_FILE = 2 * MAX_HEAD + 8 * MAX_VALUES  # bytes; no dtype has more than 8 a value
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
NAMED = {name: dtype for dtype, name in NAMES.items()}

Slots = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Compressed:
    """What was written, and what it is worth."""

    path: Path
    codec: Codec
    before: int  # bytes of the adapter's weights
    after: int  # and of the file that stands for them
    error: float  # ||decoded - x|| / ||x||
    of_difference: float | None  # ||decoded - x|| / ||x - start||, if there was a start


@dataclass(frozen=True)
class Weights:
    """A PEFT folder's adapter_model.safetensors."""

    path: Path
    tensors: Tensors
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Coded:
    """A file whose head is checked and whose body isn't decoded yet."""

    codec: Codec
    slots: Slots
    start: str | None  # sha256
    body: bytes
    path: Path

    def decoded(self, start: Tensors) -> Tensors:
        """The adapter, given the start's tensors.

        Raises:
            ExportError: if the body isn't that of the tensors which the head declares.
        """
        with _naming(self.path):
            if is_lossless(self.codec):
                if isinstance(self.codec, Packed):
                    _check_packed(self.body, self.slots)
                tensors = self.codec.decode(self.body)
            else:
                moved = self.codec.decode(self.body, {name: shape for name, (_, shape) in self.slots.items()})
                dtypes = {name: dtype for name, (dtype, _) in self.slots.items()}
                tensors = {name: _plus(moved[name], start.get(name), dtype) for name, dtype in dtypes.items()}
            if _slots(tensors) != self.slots:
                raise WireError("its body has other tensors than its head declares")
            check_finite(tensors)
        return tensors


def compress(
    adapter: str, out: str, codec: str = "compeft", words: Sequence[str] = (), start: str | None = None
) -> Compressed:
    """Write a PEFT folder's adapter into a new folder, smaller.

    Args:
        codec: a name in conf/codec.
        words: its settings, as `codec.density=0.1`.
        start: the PEFT folder that the adapter was trained from, for a lossy codec to code the difference.

    Raises:
        FedtuneError: if there is no such codec or setting, an adapter can't be read or coded, the start has other
            tensors, or `out` can't be written; nothing is left of `out` then.
    """
    target = new_folder(out)
    made = chosen(codec, words)
    if start is not None and is_lossless(made):
        raise ConfigError(f"codec={codec} keeps every bit and takes no difference: leave --start out")
    source = Path(adapter).expanduser()
    config = _config(source)
    given = _weights(source)
    first, sha256 = _start(start, _slots(given.tensors))
    with _naming(given.path):
        packed = dump(made, given.tensors, first, sha256)
    with beside(target) as unfinished:
        (unfinished / ADAPTER_CONFIG).write_bytes(config)
        (unfinished / PACKED).write_bytes(packed)
        decoded = read((unfinished / PACKED).read_bytes(), target / PACKED).decoded(first)
    left = _distance(decoded, given.tensors)
    of_difference = None if start is None else _ratio(left, _distance(given.tensors, first))
    return Compressed(target, made, given.bytes, len(packed), _ratio(left, _distance(given.tensors, {})), of_difference)


def decompress(packed: str, out: str, start: str | None = None) -> Path:
    """Make the PEFT folder again, as a new folder, and return its path.

    Args:
        start: the PEFT folder that was the start.

    Raises:
        FedtuneError: if the file is damaged or there is none, it needs another start, or `out` can't be written;
            nothing is left of `out` then.
    """
    target = new_folder(out)
    source = Path(packed).expanduser()
    path = source / PACKED
    coded = read(_content(path, "a folder that fedtune compress made"), path)
    config = _config(source)
    if coded.start is None and start is not None:
        raise ExportError(f"{path} has the adapter itself, and not a difference: leave --start out")
    if coded.start is not None and start is None:
        raise ExportError(
            f"{path} has the difference from another adapter, whose {WEIGHTS} has sha256 {coded.start}: "
            "name its folder with --start"
        )
    first, _ = _start(start, coded.slots, coded.start)
    tensors = coded.decoded(first)
    with beside(target) as unfinished:
        (unfinished / ADAPTER_CONFIG).write_bytes(config)
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
    return target


def chosen(name: str, words: Sequence[str]) -> Codec:
    """The codec of that name, with settings as `codec.density=0.1`.

    Raises:
        ConfigError: if there is no such codec or setting.
    """
    one_of("codec", name, choices("codec"))
    for word in words:
        if not word.startswith("codec.") or "=" not in word:
            raise ConfigError(f"{word}: expected a setting of the codec, as in codec.density=0.1")
    settings = [f"codec_up.{word.removeprefix('codec.')}" for word in words]
    try:
        spec = dict(compose([f"codec_up={name}", *settings]).codec_up)
    except ConfigError as error:
        raise ConfigError(str(error).replace("codec_up", "codec")) from None
    if spec.pop("feedback", False):
        raise ConfigError("codec.feedback=true: there is no later message that could carry what is left out")
    return _codec({name: value for name, value in spec.items() if value is not None}, "codec")


def dump(codec: Codec, tensors: Tensors, start: Tensors, sha256: str | None) -> bytes:
    """The file's content, the same for the same tensors.

    Args:
        start: what a lossy codec takes the difference from, in the same dtypes, and its sha256; nothing and None for 0.

    Raises:
        WireError: naming the tensor that can't be coded.
    """
    allowed = [dtype for dtype in DTYPES if dtype.is_floating_point or is_lossless(codec)]
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            known = ", ".join(NAMES[dtype] for dtype in allowed)
            raise WireError(f"tensor '{name}' is {describe(tensor)}, and this codec takes {known} (raw has most)")
    check_finite(tensors)
    coded = tensors if is_lossless(codec) else {name: _minus(x, start.get(name)) for name, x in tensors.items()}
    body = codec.encode(coded, 0)
    kind = type(codec)
    settings = {name: value for name, value in vars(codec).items() if value is not None}
    head = {
        "codec": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings},
        "tensors": {name: (NAMES[dtype], shape) for name, (dtype, shape) in sorted(_slots(tensors).items())},
        "start": sha256,
    }
    text = json.dumps(head).encode()
    hashed = struct.pack("<I", len(text)) + text + body
    return MAGIC + hashlib.sha256(hashed).digest() + hashed


def read(content: bytes, path: Path) -> Coded:
    """Read what `dump` made; nothing of the size that it declares is made yet.

    Raises:
        ExportError: if it is damaged, isn't fedtune's, is of an unknown version, or declares what no adapter has.
        ConfigError: if its codec isn't one of conf/codec.
    """
    if content[: len(MAGIC) - 1] != MAGIC[:-1] or len(content) < BEGIN:
        raise ExportError(f"{path} is no compressed adapter: give a folder that fedtune compress made, whole")
    if (version := content[len(MAGIC) - 1]) != MAGIC[-1]:
        raise ExportError(f"{path} is of version {version}; this fedtune reads {MAGIC[-1]}: take the fedtune it is of")
    if hashlib.sha256(memoryview(content)[BEGIN - 4 :]).digest() != content[len(MAGIC) : BEGIN - 4]:
        raise ExportError(f"{path} is damaged: its bytes don't have the sha256 that it says. Get it again, whole")
    (length,) = struct.unpack("<I", content[BEGIN - 4 : BEGIN])
    if length > min(MAX_HEAD, len(content) - BEGIN):
        raise ExportError(f"{path}: a head of {length} bytes is more than it has, or than {MAX_HEAD}")
    with _naming(path):
        head = json.loads(content[BEGIN : BEGIN + length])
        if not isinstance(head, dict) or head.keys() != {"codec", "tensors", "start"}:
            raise WireError(f"expected a head with codec, tensors and start, got {str(head)[:60]!r}")
        start = head["start"]
        if start is not None and not (isinstance(start, str) and re.fullmatch("[0-9a-f]{64}", start)):
            raise WireError(f"expected the start's sha256, got {str(start)[:70]!r}")
        slots = _read_slots(head["tensors"])
        codec = _codec(head["codec"], f"{path}: its codec")
    return Coded(codec, slots, start, content[BEGIN + length :], path)


def _read_slots(tensors: Any) -> Slots:
    if not isinstance(tensors, dict):
        raise WireError(f"expected tensors by name, got {str(tensors)[:60]!r}")
    slots: Slots = {}
    left = MAX_VALUES
    for name, said in tensors.items():
        if not name.isprintable() or name == "__metadata__":  # which is no name for safetensors
            raise WireError(f"a tensor can't be called {name[:60]!r}")
        match said:
            case [str(dtype), [*shape]] if dtype in NAMED and all(type(size) is int and size >= 0 for size in shape):
                slots[name] = NAMED[dtype], tuple(shape)
            case _:
                raise WireError(f"tensor {name[:60]!r}: expected a known dtype and a shape, got {str(said)[:60]!r}")
        # Torch can't have all that are empty
        if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_VALUES:
            raise WireError(f"tensor {name[:60]!r}: {str(shape)[:60]} is more than any adapter has")
        left -= math.prod(shape)
    if left < 0:
        raise WireError(f"{MAX_VALUES - left} values are declared, at most {MAX_VALUES} may be")
    return slots


def _codec(spec: Any, where: str) -> Codec:
    """A codec from a stranger's words: one of those in conf/codec, and only with settings that these have.

    Raises:
        ConfigError: if it is anything else.
    """
    texts = ((CONF / "codec" / f"{name}.yaml").read_text(encoding="utf-8") for name in choices("codec"))
    known = {entry.pop("_target_"): entry for entry in map(yaml.safe_load, texts)}
    target = spec.get("_target_") if isinstance(spec, dict) else None
    if not isinstance(target, str) or target not in known:
        raise ConfigError(f"{where}: {str(target)[:100]!r} is not known: expected one of {', '.join(known)}")
    for name, value in spec.items():
        # Not the likes of _args_, of ${oc.env:HOME}, or of what a terminal obeys
        right = isinstance(value, int | float | str) and re.fullmatch(r"[\w.+-]{1,40}", str(value))
        if name != "_target_" and not (name in known[target] and right):
            raise ConfigError(f"{where}: {target} has no setting {name[:60]!r} that can be {str(value)[:60]!r}")
    codec: Codec = build(spec, where)
    return codec


def _check_packed(blob: bytes, slots: Slots) -> None:
    """Hold a packed blob's heads against what is declared, before a value that takes a bit is made 8 bytes."""
    reader = FORMAT.reader(blob, "a packed blob")
    count = reader.varint("the number of tensors")
    heads = [read_head(reader) for _ in range(min(count, len(slots) + 1))]
    if [(head.name, (head.dtype, head.shape)) for head in heads] != sorted(slots.items()):
        raise WireError("its body has other tensors than its head declares")


def _start(folder: str | None, slots: Slots, sha256: str | None = None) -> tuple[Tensors, str | None]:
    """The start's tensors in the dtypes of the adapter, and its sha256; nothing and None if there is none.

    Args:
        sha256: what it has to be; None for any.

    Raises:
        ExportError: if it is another one, or has other tensors than the adapter.
    """
    if folder is None:
        return {}, None
    found = _weights(Path(folder).expanduser())
    if sha256 not in (None, found.sha256):
        raise ExportError(
            f"{found.path} is not what the difference was taken from: its sha256 is {found.sha256}, expected {sha256}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    wanted = {name: shape for name, (_, shape) in slots.items()}
    for name in sorted(shapes.keys() | wanted.keys()):
        one, other = shapes.get(name, "missing"), wanted.get(name, "missing")
        if one != other:
            raise ExportError(f"{found.path} is no start of this adapter: {name[:100]!r} is {one} there, {other} here")
    with _naming(found.path):
        check_finite(found.tensors)
    return {name: tensor.to(slots[name][0]) for name, tensor in found.tensors.items()}, found.sha256


def _weights(folder: Path) -> Weights:
    path = folder / WEIGHTS
    content = _content(path, f"a PEFT folder, with {ADAPTER_CONFIG} and {WEIGHTS}")
    with _naming(path):
        return Weights(path, load(content), len(content), hashlib.sha256(content).hexdigest())


def _config(folder: Path) -> bytes:
    path = folder / ADAPTER_CONFIG
    content = _content(path, "a PEFT folder, or one that fedtune compress made of it")
    with _naming(path):
        if not isinstance(json.loads(content), dict):
            raise WireError("expected a JSON object")
    return content


def _content(path: Path, wanted: str) -> bytes:
    if not path.is_file():
        raise ExportError(f"{path} is not there: give {wanted}")
    if (size := path.stat().st_size) > MAX_FILE:
        raise ExportError(f"{path} has {size} bytes, more than any adapter that is read here: at most {MAX_FILE}")
    with _naming(path):
        return path.read_bytes()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file where what is in it makes something fail, however it does."""
    try:
        yield
    except (WireError, SafetensorError, OSError, *MALFORMED) as error:
        reason = first_line(error)[:300]
        kind = "" if isinstance(error, WireError) else f"{type(error).__name__}: "
        raise ExportError(f"{path} can't be used: {kind}{reason}") from error


def _slots(tensors: Tensors) -> Slots:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _minus(tensor: Tensor, start: Tensor | None) -> Tensor:
    return tensor.to(wide(tensor)) if start is None else tensor.to(wide(tensor)) - start.to(wide(tensor))


def _plus(moved: Tensor, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    if start is not None:
        moved = start.to(wide(start)) + moved.to(wide(start))
    return moved.to(dtype, copy=True)  # they lie in one buffer, which safetensors refuses


def _distance(ones: Tensors, others: Tensors) -> float:
    """The norm of the difference; what isn't in the others is zero."""
    parts = (_minus(tensor.double(), others.get(name)) for name, tensor in ones.items())
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0
