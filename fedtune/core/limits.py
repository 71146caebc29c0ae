"""How much anybody may ask of a device, in a run's config or in a message: by the name of the setting, wherever it is.

These are bounds on nonsense, far above what any method uses: what a device can really do is for its memory and its time
to say (fedtune/workspace/workspace.py, runtime.timeout).
"""

import math
from collections.abc import Mapping
from typing import Any

from fedtune.core.errors import ConfigError, WireError

LARGEST = 1 << 63  # what Flower's messages carry
MAX_TEXT = 10_000  # characters of a value
MAX_NAME = 64  # characters of a setting's name in a message
MAX_SETTINGS = 64  # of a message

# Whole numbers: the least and the most that a setting of this name may be, or of this key
BOUNDS: dict[str, tuple[int, int]] = {
    "steps": (1, 1_000_000),  # a client's, in a round
    "local_steps": (1, 1_000_000),
    "perturbations": (1, 10_000),
    "directions": (1, 1 << 22),
    "batch_size": (1, 1 << 16),
    "micro_batch_size": (0, 1 << 16),
    "warmup_rounds": (0, 1_000_000_000),
    "max_length": (2, 1 << 20),
    "max_new_tokens": (1, 1 << 16),
    "rank": (0, 1 << 16),  # 0, in a message: everybody's
    "tokens": (1, 1 << 16),
    "layers": (1, 1 << 12),
    "block_size": (2, 1 << 16),
    "keep.every": (0, 1_000_000_000),
    "population.clients": (1, 10_000_000),
    "population.pooled": (0, 10_000_000),
    "classes": (1, 1 << 16),
    "head": (0, 1 << 16),
    "least": (0, 1 << 16),
    "version": (0, LARGEST - 1),
    "builds_on": (0, LARGEST - 1),
    "bits": (1, 64),
}
# In messages: what has to be a number
NUMBERS = ("scaling", "lr", "eps", "share", "lam", "sparsity", "server_lr", "finest")
MOST_SECONDS = 7 * 86_400.0  # runtime.timeout: how long a device works on one message at most


def problem(name: str, value: Any) -> str:
    """What is wrong with a setting of this name, or ""."""
    if isinstance(value, int) and not isinstance(value, bool) and not -LARGEST <= value < LARGEST:
        return "it has more than 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, got {value}"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"it has {len(value)} characters, at most {MAX_TEXT} are taken"
    bounds = BOUNDS.get(name) or BOUNDS.get(name.rpartition(".")[2])
    if bounds and value is not None and not isinstance(value, list | tuple | Mapping):
        low, high = bounds
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return f"expected a whole number from {low} to {high}, got {str(value)[:40]!r}"
    return ""


def check_values(settings: Mapping[str, Any]) -> None:
    """Look at the values of a config that came from elsewhere, by dotted key.

    Raises:
        ConfigError: naming the first that no device takes.
    """
    for key, value in settings.items():
        for item in value if isinstance(value, list | tuple) else (value,):
            if wrong := problem(key, item):
                raise ConfigError(f"{key[:100]}: {wrong}")
    if (seconds := settings.get("runtime.timeout", 0.0)) > MOST_SECONDS:
        raise ConfigError(f"runtime.timeout={seconds:g}: a device works on one message for {MOST_SECONDS:g} s at most")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Look at what a message says beside its tensors.

    Raises:
        WireError: naming the first setting that no device takes.
    """
    if len(settings) > MAX_SETTINGS:
        raise WireError(f"{len(settings)} settings in one message: at most {MAX_SETTINGS} are taken")
    for name, value in settings.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise WireError(
                f"a setting is called {name[:MAX_NAME]!r}: expected at most {MAX_NAME} printable characters"
            )
        if wrong := problem(name, value):
            raise WireError(f"setting '{name}': {wrong}")
        if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise WireError(f"setting '{name}': expected a number, got {str(value)[:40]!r}")
