"""Save a strategy's state in one file, and read it back exactly.

State is data: dataclasses, dicts, lists, tensors, numbers and text, nested as the strategy likes. Tensors go into
safetensors and the rest into that file's own header, so a checkpoint is one file that appears by one rename: whatever
kills the process, the last whole one is there. No code is stored and none is run on reading.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from fedtune.core.errors import RunFolderError
from fedtune.core.files import write_atomically
from fedtune.core.protocol import Tensors
from fedtune.core.sealed import seal, unseal
from fedtune.wire.broadcast_chain import BroadcastChain

TENSOR = "$tensor"  # stands in the tree where a tensor belongs; a plain dict may not use it as a key


@dataclass(frozen=True)
class Progress:
    """What the server knows of clients and time from round to round; a part of its checkpoint."""

    seconds: float = 0.0  # the virtual clock
    losses: dict[str, float] = field(default_factory=dict)  # by index: the training loss that each reported last
    pending: dict[str, Any] = field(
        default_factory=dict
    )  # by index: turns that have not ended (fedtune/server/asynchronous.py)
    state_unknown: list[int] = field(
        default_factory=list
    )  # clients whose last turn failed: who knows what they kept of it
    in_a_row: dict[str, int] = field(default_factory=dict)  # by index: rounds that power_of_choice took it in turn
    measured: list[float] = field(default_factory=lambda: [1.0, 1.0])  # messages down and up beside what was expected


@dataclass(frozen=True)
class Checkpoint:
    round: int  # the last round that is part of the state; 0 is the untouched model
    config_sha256: str
    state: Any
    run: str  # the run's id, by which clients find what they kept
    sent: BroadcastChain = field(
        default_factory=BroadcastChain
    )  # what was broadcast so far, where broadcasts build on one another
    progress: Progress = field(default_factory=Progress)
    data: dict[str, Any] = field(default_factory=dict)  # by what the data are known again (FederatedData.identity)
    tables: dict[str, list[Any]] = field(default_factory=dict)  # by name: bytes and SHA-256 (fedtune/runs/tables.py)


def flatten(state: Any, root: str = "") -> tuple[Any, Tensors]:
    """The state as a JSON-ready tree and the tensors that its leaves name, their names beginning with `root`.

    Raises:
        TypeError: for a value that a checkpoint can't hold exactly, naming where it is.
    """
    tensors: Tensors = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {TENSOR: path}
        if is_dataclass(value) and not isinstance(value, type):
            return {item.name: walk(getattr(value, item.name), f"{path}/{item.name}") for item in fields(value)}
        if isinstance(value, Mapping):
            if bad := [key for key in value if not isinstance(key, str) or key == TENSOR]:
                raise TypeError(f"state{path}: expected text as keys, got {bad[0]!r}")
            return {key: walk(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, f"{path}/{place}") for place, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"state{path}: a checkpoint can't hold a {type(value).__name__}")

    return walk(state, root), tensors


def unflatten(tree: Any, tensors: Tensors, template: Any) -> Any:
    """The inverse of `flatten`. `template` is a state of the same strategy, which says where dataclasses stand."""
    if is_dataclass(template) and not isinstance(template, type):
        inner = {
            item.name: unflatten(tree[item.name], tensors, getattr(template, item.name)) for item in fields(template)
        }
        return type(template)(**inner)
    if isinstance(tree, dict):
        if tree.keys() == {TENSOR}:
            return tensors[tree[TENSOR]]
        known = template if isinstance(template, Mapping) else {}
        return {key: unflatten(item, tensors, known.get(key)) for key, item in tree.items()}
    if isinstance(tree, list):
        return [unflatten(item, tensors, None) for item in tree]
    return tree


def state_sha256(state: Any) -> str:
    """A hash of every bit of the state: equal states, and only those, have equal hashes."""
    tree, tensors = flatten(state)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for path in sorted(tensors):
        tensor = tensors[path]
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint so that `path` always holds a whole one, the old or the new.

    Raises:
        OSError: if it can't be written; the old one is then untouched.
    """
    tree, tensors = flatten(checkpoint.state)
    sent, links = flatten(checkpoint.sent, "sent")
    progress, updates = flatten(checkpoint.progress, "progress")
    header = {
        "round": str(checkpoint.round),
        "config_sha256": checkpoint.config_sha256,
        "run": checkpoint.run,
        "state": json.dumps(tree),
        "sent": json.dumps(sent),
        "progress": json.dumps(progress),
        "data": json.dumps(checkpoint.data),
        "tables": json.dumps(checkpoint.tables),
    }
    apart, same = _apart(tensors | links | updates)
    if same:
        header["same"] = json.dumps(same)
    write_atomically(path, seal(apart, header))


def load_checkpoint(path: Path, template: Any) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        RunFolderError: if the file is damaged or belongs to another method.
    """
    try:
        tensors, header = unseal(path)
        tensors |= {name: tensors[first] for name, first in json.loads(header.get("same", "{}")).items()}
        state = unflatten(json.loads(header["state"]), tensors, template)
        sent = unflatten(json.loads(header["sent"]), tensors, BroadcastChain())
        progress = unflatten(json.loads(header["progress"]), tensors, Progress())
        data, tables = json.loads(header["data"]), json.loads(header["tables"])
        run, config = header["run"], header["config_sha256"]
        return Checkpoint(int(header["round"]), config, state, run, sent, progress, data, tables)
    except OSError as error:
        raise RunFolderError(f"{path} can't be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path} is no checkpoint of this method: {error}. Start anew with another out="
        ) from error


def _apart(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Tensors that share no memory, as safetensors wants them; and under whose name the others are, which are equal to
    one of these: what stands twice in a state is written once."""
    apart: Tensors = {}
    same: dict[str, str] = {}
    known: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        first = known.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape), name)
        if first != name:
            same[name] = first
            continue
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return apart, same
