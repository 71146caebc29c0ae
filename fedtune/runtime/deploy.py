"""Clients on real nodes: hand the experiment to a SuperLink, through Flower's own command line.

`flwr run` bundles this project, so the nodes run the code that is here. The round loop runs on the SuperLink's machine,
and so does the run folder.
"""

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedtune.config.compose import CONF
from fedtune.config.schema import Experiment
from fedtune.core.errors import ConfigError, DeploymentError, Interrupted

ROOT = CONF.parent

PATIENCE = 20.0  # seconds for which a SuperLink that doesn't say how a run stands is asked again
HEADER = "Starting logstream"  # in the line of Flower's own before the log of a run

Value = str | int | float | bool


def run_deployed(experiment: Experiment, resume: str | None = None) -> Path | None:
    """Run the experiment on the SuperLink that `runtime.superlink` names, and show its log until it ends.

    Returns:
        The run's folder on the SuperLink's machine, if `out=` named it.

    Raises:
        ConfigError: if this is no checkout that can be bundled.
        DeploymentError: if Flower can't start the run, or it did not complete.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise ConfigError(
            f"runtime=flower bundles the project's folder for the nodes, but {ROOT} has no pyproject.toml: run it from "
            "a clone that is installed with pip install -e"
        )
    out = resume or experiment.out
    # The SuperLink has another working folder
    experiment = replace(experiment, out=str(Path(out).expanduser().resolve()) if out else None)
    settings = {"config": experiment.text(), "resume": str(experiment.out) if resume else ""}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        write_toml(file, settings)
        link = [experiment.runtime.superlink] if experiment.runtime.superlink else []
        with bundled(ROOT) as app:
            _watch(["run", str(app), *link, "--stream", "--run-config", str(file)], link)
    return Path(experiment.out) if experiment.out else None


@contextmanager
def bundled(root: Path) -> Iterator[Path]:
    """A folder with nothing but what goes into the bundle of the project in `root`. Flower looks at every file under
    the folder that it is given, an environment's 80,000 among them, for 10 CPU seconds."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder, root.name)
        app.mkdir()
        for pattern in ("pyproject.toml", *settings["tool"]["flwr"]["app"]["fab-include"]):
            source = root / pattern.removesuffix("/**")
            if source.is_dir():
                shutil.copytree(source, app / source.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, app / source.name)
        yield app


def _watch(words: list[str], link: list[str]) -> None:
    """Start a run, and pass on its log until it has ended.

    Raises:
        DeploymentError: if it isn't started, or did not complete.
    """
    run, seen = None, 0  # lines of its log
    try:
        for line in _said(words):
            print(line, end="", flush=True)
            if "Successfully started run " in line:
                run = line.rpartition("run ")[2].strip()
            seen = 0 if HEADER in line else seen + 1
        if run is None:
            raise DeploymentError("flwr run started no run; what it said stands above")
        # A busy SuperLink breaks the stream off, and the run goes on
        while not (status := _status(run, link))[0].startswith("finished"):
            print(f"fedtune: the log broke off, and run {run} is {status[0]}; watching on", flush=True)
            time.sleep(1)
            lines = 0
            for line in _said(["log", run, *link]):
                lines = 0 if HEADER in line else lines + 1
                if lines > seen:
                    print(line, end="", flush=True)
            seen = max(seen, lines)
    except KeyboardInterrupt:
        raise Interrupted(
            f"no longer watching; run {run} goes on. Look again with: flwr log {run}; end it with: flwr stop {run}"
        ) from None
    word, details = status
    if word != "finished:completed":
        raise DeploymentError(f"run {run} is {word}{f': {details}' if details else ''}")


def _said(words: list[str]) -> Iterator[str]:
    """The lines that Flower's command line prints."""
    # Without a SuperLink of one's own Flower starts one, by name
    environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
    with subprocess.Popen(
        [script("flwr"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        yield from process.stdout or ()


def _status(run: str, link: list[str]) -> tuple[str, str]:
    """Flower's word for how the run stands, and its details; asked again while the SuperLink doesn't answer.

    Raises:
        DeploymentError: if it hasn't for `PATIENCE` seconds.
    """
    # The exit code of `flwr run --stream` is 0 for a run that failed
    words = [script("flwr"), "ls", *link, "--run-id", run, "--format", "json"]
    deadline, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        try:
            found = json.loads(done.stdout)["runs"][0]
            return found["status"], found["status-details"]
        except (ValueError, KeyError, IndexError) as error:
            if time.monotonic() > deadline:
                raise DeploymentError(
                    f"flwr ls can't tell how run {run} stands: {(done.stderr or done.stdout).strip()}. If its "
                    f"SuperLink is still there, the run goes on; look again with: flwr log {run}"
                ) from error
        time.sleep(pause)
        pause *= 2  # asking costs 2 CPU seconds


def script(name: str) -> str:
    """The path of a command that was installed beside this Python."""
    return str(Path(sysconfig.get_path("scripts"), name))


def write_toml(path: Path, values: Mapping[str, Value]) -> None:
    """Write flat settings; a string may have any length and any number of lines (JSON's strings are TOML's)."""
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n" for name, value in values.items())
    path.write_text("".join(lines), encoding="utf-8")
