"""Packages that import far more than is used of them, imported without that: seconds before the first round."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import ModuleType
from typing import Any

PLOTS = "flwr_datasets.visualization"  # which imports seaborn, matplotlib and scipy.stats


@contextmanager
def without_plots() -> Iterator[None]:
    """Import flwr_datasets within without what it draws with; who imports that by name afterwards still gets it."""
    if "flwr_datasets" in sys.modules:
        yield
        return
    sys.modules[PLOTS] = ModuleType(PLOTS)
    try:
        yield
    finally:
        del sys.modules[PLOTS]
        if (package := sys.modules.get("flwr_datasets")) is not None:
            vars(package).pop("visualization", None)


@cache
def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, as peft does; but what it hands to torch.compile on import is compiled,
    and the compiler imported, when it is first called."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    torch: Any = importlib.import_module("torch")
    compile, torch.compile = torch.compile, _at_first_call(torch.compile)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile


def _at_first_call(compile: Any) -> Any:
    """torch.compile for functions, put off until they are called."""

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return lambda function: later(function, **options)
        compiled = cache(lambda: compile(function, **options))
        return wraps(function)(lambda *args, **named: compiled()(*args, **named))

    return later
