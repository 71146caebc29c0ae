"""The operator's side of a deployment: Flower's command line, and the runs that it starts."""

import re
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fedtune.core.errors import DeploymentError
from fedtune.runtime.deploy import Value, script, write_toml
from simulations.fleet.processes import wait_until

if TYPE_CHECKING:
    from simulations.fleet import Fleet

START_SECONDS = 60.0  # for a SuperLink to answer, a node to be online, a run to be accepted; each takes about 2
LINK = "fleet"  # the SuperLink's name in the command line's config.toml


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        status: Flower's word: finished:completed, finished:failed or finished:stopped.
        exit_code: of `flwr run --stream`, which is 0 even for a run that failed.
        seconds: from the command to its end.
        log: what the command printed.
    """

    run_id: int
    status: str
    details: str
    exit_code: int
    seconds: float
    log: Path

    @property
    def completed(self) -> bool:
        return self.status == "finished:completed"


class Run:
    """A run that goes on in the background."""

    def __init__(self, fleet: "Fleet", name: str, config: Mapping[str, Value], stream: TextIO | None):
        self.fleet = fleet
        self.log_file = fleet.operator / f"{name}.log"
        settings = fleet.operator / f"{name}.toml"
        write_toml(settings, config)
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [script("flwr"), "run", str(fleet.app), LINK, "--stream", "--run-config", str(settings)],
            cwd=fleet.operator,
            env=fleet.environment(fleet.operator, f"{fleet.mark}/operator"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._ended = 0.0
        self._pump = threading.Thread(target=self._copy, args=(stream,), daemon=True)
        self._pump.start()

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8") if self.log_file.exists() else ""

    def run_id(self, seconds: float = START_SECONDS) -> int:
        """Flower's name for it; waits for it to be accepted.

        Raises:
            DeploymentError: if it isn't within `seconds`; the message has what `flwr run` printed.
        """

        def found() -> re.Match[str] | None:
            return re.search(r"Successfully started run (\d+)", self.log())

        wait_until(lambda: found() or not self._pump.is_alive(), seconds)
        if not (match := found()):
            code = None if self._pump.is_alive() else self._process.wait(10)
            hint = " Each key must be in the app's [tool.flwr.app.config]." if "[code: 15]" in self.log() else ""
            raise DeploymentError(f"flwr run (exit code {code}) started no run.{hint} It said:\n{self.log().strip()}")
        return int(match[1])

    def status(self) -> tuple[str, str]:
        """Flower's status (pending, starting, running, finished:...) and its details."""
        answer = self.fleet.ask("ls", LINK, "--run-id", str(self.run_id()))
        return answer["runs"][0]["status"], answer["runs"][0]["status-details"]

    def wait(self, seconds: float) -> RunResult:
        """Wait for the end.

        Raises:
            DeploymentError: if it goes on for more than `seconds`.
        """
        deadline = time.monotonic() + seconds
        self._pump.join(seconds)
        run_id = self.run_id(1)
        # The log's stream breaks off when the SuperLink goes, and the run's status can't be had until it is back
        while True:
            try:
                now = self.status()
            except DeploymentError:
                now = ("unknown", "")
                if time.monotonic() > deadline:
                    raise
            if now[0].startswith("finished"):
                break
            if time.monotonic() > deadline:
                raise DeploymentError(f"run {run_id} is still {now[0]} after {seconds:g} s; see {self.log_file}")
            time.sleep(1)
        end = self._ended or time.monotonic()
        return RunResult(run_id, *now, self._process.wait(10), end - self._began, self.log_file)

    def stop(self) -> None:
        """Have Flower stop it."""
        self.fleet.flwr("stop", str(self.run_id()), LINK)

    def _copy(self, stream: TextIO | None) -> None:
        with self.log_file.open("w", encoding="utf-8") as log:
            for line in self._process.stdout or ():
                log.write(line)
                log.flush()
                if stream is not None:
                    stream.write(line)
                    stream.flush()
        self._ended = time.monotonic()
