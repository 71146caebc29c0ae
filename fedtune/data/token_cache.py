"""Tokenised data that is kept for the next run on the same rows: tokenising 40,000 of them takes longer than all else
before the first round.

A file lies in the cache folder under the hash of everything that it follows from: the rows, the tokenizer, the
settings, and the code. A file that is damaged is made anew, and a disk that takes none costs nothing but time.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.config.schema import DataSpec
from fedtune.core.caches import cache_folder
from fedtune.core.files import write_atomically
from fedtune.core.sealed import seal, unseal
from fedtune.data.corpus import Corpus
from fedtune.data.sources import Example

KEPT_BYTES = 1 << 30  # of all files together; those that were read last stay
Tokenised = tuple[Corpus, list[int]]
# Where rows are from is said by the rows; who gets which is decided afterwards
ELSEWHERE = (
    "name", "path", "subset", "split", "prompt_column", "completion_column", "partition", "partition_by", "alpha",
    "classes", "partition_options", "heldout", "client_heldout", "duplicates",
    "user_column", "heldout_path",
)  # fmt: skip


def kept_or(
    tokenise: Callable[[Sequence[Example], Any, DataSpec], Tokenised],
    examples: Sequence[Example],
    tokenizer: Any,
    spec: DataSpec,
) -> Tokenised:
    """What `tokenise` makes of these, from the cache if it did so before."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # of a tokenizer in Python nobody knows what it depends on
        return tokenise(examples, tokenizer, spec)
    path = cache_folder() / "tokens" / f"{_key(examples, tokenizer, spec)}.safetensors"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = _read(path)
        os.utime(path)
        return found
    made = tokenise(examples, tokenizer, spec)
    with suppress(OSError, TypeError):
        _write(path, made)
    return made


def _key(examples: Sequence[Example], tokenizer: Any, spec: DataSpec) -> str:
    digest = hashlib.sha256(_code())
    settings = {name: value for name, value in vars(spec).items() if name not in ELSEWHERE}
    marks = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    about = (settings, marks, getattr(tokenizer, "chat_template", None), type(tokenizer).__name__)
    digest.update(json.dumps(about, sort_keys=True, default=repr).encode(errors="surrogatepass"))
    digest.update(tokenizer.backend_tokenizer.to_str().encode(errors="surrogatepass"))
    for row in examples:
        digest.update(json.dumps(vars(row), default=repr).encode(errors="surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


@cache
def _code() -> bytes:
    """A hash of what does the work: of fedtune's own files, as they may change within a version."""
    digest = hashlib.sha256()
    for package in ("transformers", "tokenizers", "jinja2", "numpy"):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def _read(path: Path) -> Tokenised:
    tensors, texts = unseal(path)
    kept = tensors.pop("kept").tolist()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Corpus(**arrays, **{name: json.loads(text) for name, text in texts.items()}), kept


def _write(path: Path, made: Tokenised) -> None:
    """
    Raises:
        OSError: if the disk doesn't take it.
        TypeError: if there is more in the corpus than arrays and plain values, as questions are.
    """
    corpus, kept = made
    arrays: dict[str, np.ndarray] = {"kept": np.asarray(kept, dtype=np.int64)}
    texts: dict[str, str] = {}
    for item in fields(corpus):
        value = getattr(corpus, item.name)
        if isinstance(value, np.ndarray):
            arrays[item.name] = value
        elif json.loads(text := json.dumps(value)) == value:
            texts[item.name] = text
        else:
            raise TypeError(f"{item.name} is not the same after JSON")
    if sum(array.nbytes for array in arrays.values()) > KEPT_BYTES // 2:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, seal({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, texts))
    for old in _superfluous(path.parent):
        old.unlink(missing_ok=True)


def _superfluous(folder: Path) -> Iterator[Path]:
    """The files that were read longest ago, beyond KEPT_BYTES."""
    found = sorted(((file.stat(), file) for file in folder.iterdir()), key=lambda item: -item[0].st_mtime_ns)
    total = 0
    for about, file in found:
        total += about.st_size
        if total > KEPT_BYTES:
            yield file
