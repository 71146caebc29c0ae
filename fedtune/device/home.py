"""Where a device keeps what lasts."""

import os
from pathlib import Path

from platformdirs import user_state_path


def home() -> Path:
    """Where a device keeps what lasts: $FEDTUNE_HOME, or beside what Flower keeps in $FLWR_HOME, or the user's own
    place for such things."""
    if named := os.environ.get("FEDTUNE_HOME"):
        return Path(named).expanduser()
    flower = os.environ.get("FLWR_HOME")
    return Path(flower).expanduser() / "fedtune" if flower else user_state_path("fedtune")
