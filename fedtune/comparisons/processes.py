"""Processes that are started with everything imported already."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any

# What a run of a Llama needs: 6 of the 7 CPU seconds that its process takes to start. None of these starts a thread
IMPORTED = ("fedtune.runtime.local", "transformers.models.llama.modeling_llama", "peft")


@cache
def starting() -> BaseContext:
    """Where processes come from: on Linux from a server that has imported all of it once and forks, elsewhere, where
    what a system's libraries start doesn't outlive a fork, from new ones.

    The server keeps the environment that it was started in: hand `os.environ` on with what a process is to do.
    """
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def take_environment(environment: dict[str, str]) -> None:
    """Be in this environment, and no other."""
    os.environ.clear()
    os.environ.update(environment)


@contextmanager
def without_script() -> Iterator[None]:
    """A process that starts imports the script that its parent runs, which would begin a comparison anew in each if
    it calls `fedtune.compare` at its top. Nothing that a cell needs is in there."""
    script: Any = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
