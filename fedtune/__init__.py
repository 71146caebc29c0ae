"""Federated fine-tuning of language models, with the true cost of each method.

From Python: `fedtune.run`, `fedtune.compare` and `fedtune.load_run` (docs/python.md). They are imported when they are
first asked for, so that `import fedtune` costs nothing and brings no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.core.errors import FedtuneError as FedtuneError
    from fedtune.python_api.comparison import Comparison as Comparison
    from fedtune.python_api.comparison import compare as compare
    from fedtune.python_api.loaded_run import Run as Run
    from fedtune.python_api.loaded_run import load_run as load_run
    from fedtune.python_api.running import run as run

__version__ = "0.1.0"
__all__ = ["Comparison", "FedtuneError", "Run", "__version__", "compare", "load_run", "run"]

_HOMES = {
    "Comparison": "fedtune.python_api.comparison",
    "FedtuneError": "fedtune.core.errors",
    "Run": "fedtune.python_api.loaded_run",
    "compare": "fedtune.python_api.comparison",
    "load_run": "fedtune.python_api.loaded_run",
    "run": "fedtune.python_api.running",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
