"""What the runs of one process, and the processes of one user, have in common.

Nothing is shared unless asked for, within `sharing()`: a process with one run has no use for a second copy of anything.
"""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import platformdirs

Made = TypeVar("Made")

_kept: dict[Hashable, object] | None = None


@contextmanager
def sharing() -> Iterator[None]:
    """Within this, what is loaded is kept for the next run of this process."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def once(key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` returns, or what it returned before under this key."""
    if _kept is None:
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]  # type: ignore[return-value]


def is_sharing() -> bool:
    """Whether what is loaded is kept for the next run of this process."""
    return _kept is not None


def cache_folder() -> Path:
    """Where caches are kept: $FEDTUNE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("FEDTUNE_CACHE") or platformdirs.user_cache_dir("fedtune"))
