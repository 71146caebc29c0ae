"""Lossy codecs on the wire: what is coded is the difference from what the other end knows already.

Up, that is what the client was sent; down, what every model starts from. So names, shapes and dtypes need not be said,
and an end's memory is bounded by what it holds itself, whatever a blob declares. Lossless codecs carry tensors whole.

    blob    "fd", version 1, form (one byte: 0 if all known tensors follow in their shapes, 1 if not); in form 1, of
            each known tensor by name: 0 it is missing, 1 it follows, or 2, the number of dimensions and the
            dimensions (a byte and varints) of the leading part of it that follows, as of a LoRA factor cut to a lower
            rank; the length of the others (varint) and they themselves as codec=packed has them, whole: whole numbers,
            and what nobody knows the start of; then what the codec makes of the differences

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al. 2019, arXiv:1901.09847) adds what the last messages
left out to what is sent next: sent_t = C(meant_t + e_t), e_{t+1} = meant_t + e_t - sent_t, so that the sum of what was
sent follows the sum of what was meant. It takes a codec that leaves out less than it is given (`contracts`).
"""

from collections.abc import Collection, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedtune.codecs.bytes import Format, Reader, varint
from fedtune.codecs.packed import Packed
from fedtune.config.compose import build
from fedtune.core.errors import ConfigError, WireError, short
from fedtune.core.protocol import Codec, Tensors, contracts, describe, is_lossless

FORMAT = Format(b"fd")
WHOLE = Packed()


def build_codec(
    spec: Mapping[str, Any], where: str, feedback: bool = False, allowed: Collection[str] | None = None
) -> tuple[Codec, bool]:
    """The codec that a choice of conf/codec describes, and its `feedback`: whether what it leaves out is to be sent
    later, which is for whoever keeps it to do.

    Args:
        feedback: where the choice leaves it to the direction (null).
        allowed: as for `build`.

    Raises:
        ConfigError: as for `build`, and for feedback where nothing is left out, or what is left out could grow.
    """
    codec: Codec = build({name: value for name, value in spec.items() if name != "feedback"}, where, allowed)
    asked = spec.get("feedback", False)
    if not (asked is None or isinstance(asked, bool)):
        raise ConfigError(f"{where}.feedback={asked}: expected true or false")
    if asked and is_lossless(codec):
        raise ConfigError(f"{where}.feedback=true: this codec leaves nothing out")
    if not (feedback if asked is None else asked):
        return codec, False
    return _for_feedback(codec, where), True


def _for_feedback(codec: Codec, where: str) -> Codec:
    """The codec in the form that error feedback needs, where it has another by itself."""
    if is_dataclass(codec) and not isinstance(codec, type) and "feedback" in vars(codec):
        try:
            codec = replace(codec, feedback=True)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if not contracts(codec):
        raise ConfigError(
            f"{where}.feedback=true: {type(codec).__name__} doesn't say that it leaves out less than it is given "
            "(`contracts`), and what is left out could grow without end: set feedback=false, or take another codec"
        )
    return codec


def encode(codec: Codec, tensors: Tensors, key: int, known: Tensors) -> bytes:
    """Encode tensors; with a lossy codec, as differences from what the other end holds.

    Args:
        key: of the codec's draws.
        known: what the other end holds, by name.
    """
    if is_lossless(codec):
        return codec.encode(tensors, key)
    coded = {
        name: tensors[name].detach().cpu().to(wide(part)) - part.cpu().to(wide(part))
        for name, part in starts_of(tensors, known).items()
    }
    others = {name: tensor for name, tensor in tensors.items() if name not in coded}
    rest = WHOLE.encode(others, key) if others else b""
    head = FORMAT.head + _form(coded, known) + varint(len(rest))
    return head + rest + codec.encode(coded, key)


def decode(codec: Codec, blob: bytes, known: Tensors) -> Tensors:
    """What the other end means, given the same `known`.

    Raises:
        WireError: on anything that `encode` can't have made.
    """
    if is_lossless(codec):
        return codec.decode(blob)
    reader = FORMAT.reader(blob, "a difference")
    shapes = _read_form(reader, known)
    others = reader.take(reader.varint("the length of the other tensors"), "the other tensors")
    tensors = WHOLE.decode(others) if others else {}
    if both := tensors.keys() & shapes.keys():
        raise WireError(f"tensor '{short(min(both))}' comes twice")
    for name, moved in codec.decode(reader.rest(), shapes).items():
        part = _part(known[name], shapes[name])
        assert part is not None
        tensors[name] = (part.cpu().to(wide(part)) + moved.to(wide(part))).to(part.dtype)
    return dict(sorted(tensors.items()))


def starts_of(tensors: Tensors, known: Tensors) -> Tensors:
    """What each tensor is the difference from, by name: the part of the known one that has its shape. Not in it are
    tensors that aren't known, are known with another dtype, or hold whole numbers."""
    parts = {name: _part(known[name], tensor.shape) for name, tensor in tensors.items() if name in known}
    return {
        name: part
        for name, part in parts.items()
        if part is not None and part.is_floating_point() and tensors[name].dtype == part.dtype
    }


def with_feedback(tensors: Tensors, residual: Mapping[str, Tensor]) -> Tensors:
    """The tensors, and with each what was left out of it earlier: the leading part that has its shape, if there is one,
    as where a LoRA factor was cut to a lower rank meanwhile."""
    parts = {name: _part(residual[name], tensor.shape) for name, tensor in tensors.items() if name in residual}
    return {
        name: tensor if (part := parts.get(name)) is None else (tensor.to(part.dtype) + part).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def left_out(meant: Tensors, sent: Tensors) -> Tensors:
    """What of `meant` isn't in `sent`, of every floating tensor."""
    return {
        name: tensor.cpu().to(wide(tensor)) - sent[name].to(wide(tensor))
        for name, tensor in meant.items()
        if tensor.is_floating_point()
    }


def wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _part(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The leading part of a tensor that has this shape; None if there is none."""
    if len(shape) != tensor.dim() or any(size > whole for size, whole in zip(shape, tensor.shape, strict=True)):
        return None
    return tensor[tuple(slice(size) for size in shape)] if tuple(shape) != tuple(tensor.shape) else tensor


def _form(coded: Mapping[str, Tensor], known: Tensors) -> bytes:
    if coded.keys() == known.keys() and all(coded[name].shape == tensor.shape for name, tensor in known.items()):
        return b"\0"
    found = [b"\1"]
    for name in sorted(known):
        if name not in coded:
            found.append(b"\0")
        elif (shape := coded[name].shape) == known[name].shape:
            found.append(b"\1")
        else:
            found += [b"\2", bytes([len(shape)]), *map(varint, shape)]
    return b"".join(found)


def _read_form(reader: Reader, known: Tensors) -> dict[str, tuple[int, ...]]:
    form = reader.take(1, "its form")[0]
    if form > 1:
        raise WireError(f"form {form} is not known: expected 0 or 1")
    shapes = {}
    for name in sorted(known):
        state = 1 if form == 0 else reader.take(1, f"what is said of tensor '{name}'")[0]
        if state > 2:
            raise WireError(f"tensor '{name}': expected 0, 1 or 2, got {state}")
        if not state:
            continue
        shape = tuple(known[name].shape)
        if state == 2:
            count = reader.take(1, f"the number of dimensions of tensor '{name}'")[0]
            shape = tuple(reader.varint(f"a dimension of tensor '{name}'") for _ in range(count))
        if _part(known[name], shape) is None or not known[name].is_floating_point():
            raise WireError(f"tensor '{name}': {shape} is no part of {describe(known[name])}")
        shapes[name] = shape
    return shapes
