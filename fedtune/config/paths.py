"""Settings that name files: whole paths wherever they are here, so that a run can be gone on with from anywhere."""

import os
from dataclasses import replace
from typing import Any

from fedtune.config.schema import Experiment

# Which may be lists, and shares of devices, as well
PATHS = ("model.path", "data.path", "data.heldout_path", "adapter.path", "population.devices")


def with_paths(experiment: Experiment) -> Experiment:
    """The experiment with the files and folders that are here by their whole paths, so that it can be gone on with,
    exported and evaluated from anywhere. On real nodes a path is each device's own."""
    if experiment.runtime.name == "flower":
        return experiment
    for key in PATHS:
        section, _, name = key.partition(".")
        spec = getattr(experiment, section)
        if (whole := _absolute(given := getattr(spec, name))) != given:
            experiment = replace(experiment, **{section: replace(spec, **{name: whole})})
    return experiment


def _absolute(given: Any) -> Any:
    if isinstance(given, list):
        return [_absolute(item) for item in given]
    if not isinstance(given, str):
        return given
    path = os.path.expanduser(given)  # noqa: PTH111 (a path that is none stays as it was typed)
    try:
        return os.path.abspath(path) if os.path.exists(path) else given  # noqa: PTH100, PTH110 (links stay links)
    except ValueError:
        return given
