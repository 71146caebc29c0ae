"""The C library's heap, which keeps what is freed: on Linux with glibc; elsewhere nothing here does anything."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_MMAP_THRESHOLD = -3  # mallopt's name for it
_LARGE = 4 << 20  # bytes
_LARGEST = 32 << 20  # bytes; what glibc raises it to by itself on 64 bits


def trim() -> None:
    """Give back to the system what has been freed."""
    _call("malloc_trim", 0)


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Blocks of 4 MB and more go back to the system as soon as they are freed, as no longer happens by itself once a
    process has freed a larger one: a base in NF4, which makes a layer at a time whole, would otherwise leave as much
    behind as it takes unquantized. Each such block then takes the system longer, so this is for loading."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:  # somebody has decided already
        yield
        return
    _call("mallopt", _MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        _call("mallopt", _MMAP_THRESHOLD, _LARGEST)
        trim()


def _call(name: str, *numbers: int) -> None:
    with suppress(OSError, AttributeError):  # not every system's C library is glibc
        getattr(ctypes.CDLL(None), name)(*numbers)
