"""Start an experiment on the runtime that it names."""

import os

from fedtune.config.schema import Experiment


def start(experiment: Experiment, resume: str | None) -> None:
    """Run the experiment, or go on with the run in the folder `resume`.

    Raises:
        FedtuneError: if it can't be set up or can't go on.
    """
    from fedtune.server.trackers import check_installed

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if experiment.runtime.name != "flower":  # else that is for the machine of the SuperLink, where the server runs
        check_installed(experiment.tracker)
    if experiment.runtime.name == "ray":
        from fedtune.runtime.ray import run_ray as run
    elif experiment.runtime.name == "flower":
        from fedtune.runtime.deploy import run_deployed as run
    else:
        from fedtune.runtime.local import run_local as run

    run(experiment, resume)
