"""What TensorBoard and MLflow read back is what metrics.csv says, each round once, whatever happened in between."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import forked
import numpy as np
import pytest
from conftest import SMALL, rows, small, summary_of
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedtune.commands.main import main
from fedtune.config.compose import load
from fedtune.config.schema import TrackerSpec
from fedtune.core.errors import ConfigError
from fedtune.runs.metrics_columns import METRICS
from fedtune.runtime.local import run_local
from fedtune.server.trackers import Tracking, check_installed, figures, hyper_parameters

pytestmark = pytest.mark.slow

ROW = {"round": 0, "eval_loss": 2.5, "eval_accuracy": None, "seconds": 0.25, "up_wire_bytes": 7}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def store(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path)


class Read:
    """What a tracker has of a run: its points by name, and how it ended."""

    def __init__(self, tracker, folder):
        if tracker == "tensorboard":
            events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
            self.points = {
                name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]
            }
            self.status = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("status/text_summary")]
            self.settings = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
        else:
            client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
            (run,) = client.search_runs([client.get_experiment_by_name("fedtune").experiment_id])
            histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
            self.points = {name: [(point.step, point.value) for point in found] for name, found in histories.items()}
            self.status, self.settings = run.info.status, run.data.params


def check_same(read, folder):
    """Each number of metrics.csv once, under its name, and nothing else; TensorBoard keeps 32 bits of it."""
    told = {name: points for name, points in read.points.items() if not name.startswith("total/")}
    expected = Counter()
    for row in rows(folder, "metrics.csv"):
        numbers = {name: float(cell) for name, cell in row.items() if cell}
        expected.update((name, int(row["round"]), np.float32(value)) for name, value in figures(numbers).items())
    assert Counter((name, step, np.float32(value)) for name, points in told.items() for step, value in points) == (
        expected
    )


def go_on(folder, rounds, tracker=None):
    experiment = load((folder / "config.yaml").read_text())
    spec = experiment.tracker if tracker is None else TrackerSpec(tracker)
    run_local(replace(experiment, rounds=rounds, tracker=spec), resume=str(folder))


def test_every_column_has_a_name_of_its_own_under_a_group():
    """Numbers alone are told: an empty cell isn't, nor is the round, which is the step."""
    names = list(figures(dict.fromkeys(METRICS, 1.0)))
    assert len(set(names)) == len(METRICS) - 1
    assert figures(ROW) == {"eval/loss": 2.5, "time/seconds": 0.25, "bytes/up_wire": 7}
    assert {"client_eval/loss", "train/loss", "time/virtual_seconds", "error/aggregation"} <= set(names)
    assert all(name.count("/") == 1 and not name.startswith("round/") for name in names)


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_run_that_is_resumed_stays_one_run_with_every_round_once(tracker, small_run):
    folder = small_run(f"tracker={tracker}", rounds=1)
    first = (folder / "tracker.json").read_text() if tracker == "mlflow" else None
    check_same(Read(tracker, folder), folder)
    go_on(folder, rounds=3)
    read = Read(tracker, folder)
    check_same(read, folder)
    totals = summary_of(folder)["totals"]
    assert {name: points[-1] for name, points in read.points.items() if name.startswith("total/")} == {
        f"total/{name.removesuffix('_bytes')}": (3, value) if value else (1, 0) for name, value in totals.items()
    }
    if tracker == "mlflow":
        assert (folder / "tracker.json").read_text() == first
        assert read.status == "FINISHED"
        experiment = load((folder / "config.yaml").read_text())
        assert read.settings == {name: str(value) for name, value in hyper_parameters(experiment).items()}
        assert read.settings["train.steps"] == "2"
    else:
        assert read.status == ["finished", "finished"]
        assert "steps: 2" in read.settings
    before = read.points
    go_on(folder, rounds=3)  # nothing is left to do, and nothing to tell
    assert Read(tracker, folder).points == before


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_tracker_that_comes_later_is_told_of_the_rounds_before(tracker, small_run):
    folder = small_run(rounds=2)
    assert main(["run", f"resume={folder}", "rounds=3", f"tracker={tracker}"]) == 0
    check_same(Read(tracker, folder), folder)


@pytest.mark.slow
def test_killed_runs_lose_no_round_and_tell_none_twice(tmp_path):
    folders = {"tensorboard": tmp_path / "other" / "run", "mlflow": tmp_path / "run"}
    command = [sys.executable, "-m", "fedtune", "run", *SMALL, "rounds=5000"]
    running = {
        folder: forked.Popen([*command, f"tracker={tracker}", f"out={folder}"], stdout=subprocess.DEVNULL)
        for tracker, folder in folders.items()
    }
    deadline = time.monotonic() + 100
    try:
        while any(process.poll() is None for process in running.values()):
            assert time.monotonic() < deadline
            for folder, process in running.items():
                if len(rows(folder, "metrics.csv")) > 4:
                    process.kill()
            time.sleep(0.001)
    finally:
        for process in running.values():
            process.kill()
    for tracker, folder in folders.items():
        assert summary_of(folder)["status"] == "running"
        go_on(folder, rounds=len(rows(folder, "metrics.csv")) + 2)
        assert summary_of(folder)["status"] == "finished"
        check_same(Read(tracker, folder), folder)


def test_an_interrupted_run_is_called_that(small_run, tmp_path, monkeypatch):
    from fedtune.server.synchronous import SynchronousRounds

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SynchronousRounds, "play", interrupted)
    with pytest.raises(Exception, match="interrupted after round 0"):
        small_run("tracker=mlflow")
    assert Read("mlflow", tmp_path / "run").status == "KILLED"


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_tracker_that_cant_begin_is_named_once_and_the_run_goes_on(tracker, tmp_path, capsys):
    """Where its files should be, there is something else."""
    folder = tmp_path / "run"
    if tracker == "tensorboard":
        folder.mkdir()
        (folder / "tensorboard").write_text("not a folder")
    else:
        (tmp_path / "mlflow.db").write_text("not a database" * 100)
    run_local(small("rounds=2", f"tracker={tracker}", out=folder))
    out = capsys.readouterr().out
    assert out.count(f"tracker={tracker} failed, and is told no more of this run: ") == 1
    assert f"fedtune run resume={folder}" in out
    assert summary_of(folder)["status"] == "finished"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_breaks_midway_is_named_once_and_told_later(small_run, tmp_path):
    """A disk with no room for TensorBoard's file, for a while; what it missed is told on resume."""
    folder = small_run(rounds=2)
    experiment = load((folder / "config.yaml").read_text())
    said = []
    tracking = Tracking(TrackerSpec("tensorboard"), said.append)
    tracking.begin(experiment, folder, [ROW], done=0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limit[1]))
    try:
        for number in (1, 2):
            tracking.log({**ROW, "round": number})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    tracking.end("finished", {})
    (note,) = said
    assert note.startswith("tracker=tensorboard failed, and is told no more of this run: OSError: ")
    go_on(folder, rounds=2, tracker="tensorboard")
    assert {step for step, _ in Read("tensorboard", folder).points["time/seconds"]} == {0, 1, 2}


def test_a_store_that_was_made_anew_gets_a_new_run(small_run, tmp_path):
    folder = small_run(rounds=1)
    where = f"mlflow sqlite:///{tmp_path / 'mlflow.db'}"
    (folder / "tracker.json").write_text(json.dumps({where: "0" * 32, "wandb fedtune": "other"}))
    go_on(folder, rounds=2, tracker="mlflow")
    known = json.loads((folder / "tracker.json").read_text())
    assert known[where] != "0" * 32
    assert known["wandb fedtune"] == "other"
    check_same(Read("mlflow", folder), folder)


@pytest.mark.parametrize(
    ("tracker", "packages"),
    [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny sqlalchemy alembic"), ("wandb", "wandb")],
)
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    tracker, packages, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ConfigError, match=f"tracker={tracker} needs {tracker}.*: pip install {packages}$"):
        check_installed(TrackerSpec(tracker))
    assert main(["run", *SMALL, f"tracker={tracker}"]) == 1
    assert capsys.readouterr().err.endswith(f"pip install {packages}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}  # the fixture's
