"""Start an experiment on the runtime that it names."""

import os
from pathlib import Path

from fedtune.config.schema import Experiment


def start(experiment: Experiment, resume: str | None) -> Path | None:
    """Run the experiment, or go on with the run in the folder `resume`.

    Returns:
        The run's folder; with runtime=flower that on the SuperLink's machine, and None if nobody named it.

    Raises:
        FedtuneError: if it can't be set up or can't go on.
    """
    from fedtune.server.trackers import check_installed

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if experiment.runtime.name != "flower":  # else that is for the machine of the SuperLink, where the server runs
        check_installed(experiment.tracker)
    if experiment.runtime.name == "ray":
        from fedtune.runtime.ray import run_ray

        return run_ray(experiment, resume)
    if experiment.runtime.name == "flower":
        from fedtune.runtime.deploy import run_deployed

        return run_deployed(experiment, resume)
    from fedtune.runtime.local import run_local

    return run_local(experiment, resume)
