"""Clients side by side: Flower's simulation engine, on this machine or a Ray cluster.

Each Ray process keeps a base of its own and plays one client after another. A process that dies is started again and
its client's turn with it, once; if that dies too, it is booked as a failure.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

from fedtune.config.schema import Experiment, RuntimeSpec
from fedtune.core.errors import ConfigError
from fedtune.runs.run_folder import settled
from fedtune.runtime.app import make_client_app, make_server_app
from fedtune.wire.flower_private import simulate


def run_ray(experiment: Experiment, resume: str | None = None) -> Path:
    """Run the experiment with its clients in Ray's processes; returns the run's folder.

    Raises:
        ConfigError: if Ray can't give a client what `runtime.cpus` and `runtime.gpus` ask for.
        FedtuneError: as `fedtune.server.round_loop.run`.
    """
    stop = Event()
    with settled(experiment, resume) as experiment, ctrl_c_sets(stop):
        # Ray's processes may have another working folder
        experiment = replace(experiment, out=str(Path(str(experiment.out)).expanduser().resolve()))
        text = experiment.text()
        try:
            simulate(
                make_server_app(text, str(experiment.out) if resume else None, stop),
                make_client_app(text),
                experiment.population.clients,
                backend_config(experiment.runtime),
            )
        finally:
            stop.set()  # where the engine failed, the server must not wait for clients that will never come
        return Path(str(experiment.out))


def backend_config(runtime: RuntimeSpec) -> dict[str, Any]:
    """What Flower's engine is told about Ray.

    Raises:
        ConfigError: if this machine has fewer cores than one client takes.
    """
    if runtime.address is None and runtime.cpus > (cores := os.cpu_count() or 1):
        raise ConfigError(f"runtime.cpus={runtime.cpus:g} asks for more cores a client than there are ({cores})")
    if runtime.address:
        start = {"address": runtime.address}
    else:
        # Ray would listen on every interface. It stays on loopback by itself on Windows and macOS only, and takes this
        # machine's outer address for 127.0.0.1 unless told that this is such a system
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        start = {"_node_ip_address": "127.0.0.1"}
    return {
        "init_args": {**start, "include_dashboard": False, "log_to_driver": bool(os.environ.get("FEDTUNE_DEBUG"))},
        # Flower hands these to the actors as they are. A process that died is started again, else Flower keeps giving
        # work to the dead one; and a turn is tried once more, else those fail that come while it starts
        "client_resources": {
            "num_cpus": runtime.cpus,
            "num_gpus": runtime.gpus,
            "max_restarts": -1,
            "max_task_retries": 1,
        },
    }


@contextmanager
def ctrl_c_sets(stop: Event) -> Iterator[None]:
    """Let Ctrl-C set `stop`: the run goes on in another thread, which no exception raised here would end. A second
    Ctrl-C does what it always does."""
    if current_thread() is not main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
