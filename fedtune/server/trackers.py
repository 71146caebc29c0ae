"""Who else is told of a run's figures: TensorBoard, MLflow, or Weights & Biases.

Their packages are optional, and imported in the server's process alone. Everything stays on this machine unless a
setting says otherwise. A round is told once its checkpoint is on disk, so none is told twice; what a resumed run's
tracker doesn't know yet it is told from metrics.csv.
"""

import json
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedtune.config.schema import Experiment, TrackerSpec, flat
from fedtune.core.errors import ConfigError
from fedtune.core.files import write_atomically

# The modules that each needs, and what pip calls their packages
NEEDS = {
    "tensorboard": (("tensorboard",), "tensorboard"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "mlflow-skinny sqlalchemy alembic"),
    "wandb": (("wandb",), "wandb"),
}
IDS = "tracker.json"  # in the run folder: by which id which store knows the run
ALWAYS = "time/seconds"  # a figure that every round has


class Tracker(Protocol):
    """One run, as a tracker knows it. Every method may raise whatever its package does."""

    def begin(self, experiment: Experiment, folder: Path, done: int) -> Collection[int]:
        """Start the run, or go on with it.

        Args:
            done: the run's last finished round; -1 for none.

        Returns:
            The rounds that the tracker knows already, none after `done` among them.
        """

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        """Keep a round's figures, and have them on disk or sent when this returns."""

    def end(self, status: str, totals: Mapping[str, int]) -> None:
        """Close the run.

        Args:
            status: finished, interrupted or failed.
        """


class Tracking:
    """The round loop's side: what it is told goes to the tracker. One that fails is left out from then on, with a note;
    the run goes on.

    Args:
        note: shows a line to whoever is watching.

    Raises:
        ConfigError: if the tracker's package is missing, with the command that installs it.
    """

    def __init__(self, spec: TrackerSpec, note: Callable[[str], None]):
        check_installed(spec)
        self._name = spec.name
        self._note = note
        self._folder = Path()
        self._tracker: Tracker | None = TRACKERS[spec.name](spec) if spec.name != "none" else None

    def begin(self, experiment: Experiment, folder: Path, rows: Iterable[Mapping[str, float]], done: int) -> None:
        """Open the tracker, and tell it of the rounds that were played already.

        Args:
            rows: of metrics.csv, up to round `done`.
        """
        self._folder = folder
        with self._guarded():
            if self._tracker is not None:
                known = self._tracker.begin(experiment, folder, done)
                for row in rows:
                    if row["round"] not in known:
                        self._tracker.log(int(row["round"]), figures(row))

    def log(self, row: Mapping[str, Any]) -> None:
        """A round of metrics.csv."""
        with self._guarded():
            if self._tracker is not None:
                self._tracker.log(row["round"], figures(row))

    def end(self, status: str, totals: Mapping[str, int]) -> None:
        """Tell the tracker how the run ended, and close it.

        Args:
            totals: of the ledger, over the whole run.
        """
        with self._guarded():
            if self._tracker is not None:
                self._tracker.end(status, {f"total/{_short(name)}": value for name, value in totals.items()})
        self._tracker = None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises is no reason to lose a run
            self._tracker = None
            said = str(error).strip().splitlines()
            self._note(
                f"tracker={self._name} failed, and is told no more of this run: {type(error).__name__}: "
                f"{said[0] if said else 'no reason given'}. metrics.csv has everything; "
                f"fedtune run resume={self._folder} tells a tracker what it missed"
            )


def check_installed(spec: TrackerSpec) -> None:
    """Check that the chosen tracker's packages are here, without importing them.

    Raises:
        ConfigError: if what the tracker needs can't be imported.
    """
    modules, packages = NEEDS.get(spec.name, ((), ""))
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ConfigError(
            f"tracker={spec.name} needs {' and '.join(missing)}, which fedtune doesn't bring: pip install {packages}"
        )


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round, by group and name: `eval_loss` is eval/loss."""
    return {
        _grouped(name): value
        for name, value in row.items()
        if name != "round" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _grouped(name: str) -> str:
    if name.endswith("seconds"):
        return f"time/{name}"
    for group, end in (("bytes", "_bytes"), ("error", "_error")):
        if name.endswith(end):
            return f"{group}/{name.removesuffix(end)}"
    if name in ("clients", "failed"):
        return f"clients/{'counted' if name == 'clients' else name}"
    for group in ("client_eval", "eval", "train"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return f"round/{name}"


def _short(name: str) -> str:
    return name.removesuffix("_bytes")


def hyper_parameters(experiment: Experiment) -> dict[str, str | int | float | bool]:
    """The settings that hold from a run's first round to its last, as `train.lr`."""
    return {
        key: value if isinstance(value, str | int | float | bool) else json.dumps(value)
        for key, value in flat(experiment.fixed()).items()
        if value != {}
    }


class TensorBoard:
    """Event files in the run's folder, under tensorboard/."""

    def __init__(self, spec: TrackerSpec):
        self._writer: Any = None
        self._ended: Any = None
        self._done = -1
        self._totals: dict[str, float] = {}

    def begin(self, experiment: Experiment, folder: Path, done: int) -> Collection[int]:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        path, known = folder / "tensorboard", set[int]()
        if path.exists():
            before = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
            names = before.Tags()["scalars"]
            if ALWAYS in names:
                known = {event.step for event in before.Scalars(ALWAYS) if event.step <= done}
            self._totals = {name: before.Scalars(name)[-1].value for name in names if name.startswith("total/")}
        self._writer = SummaryWriter(str(path), purge_step=done + 1)
        self._done = done
        *begun, self._ended = hparams(hyper_parameters(experiment), {})  # type: ignore[no-untyped-call]
        if not known:
            for summary in begun:
                self._writer.file_writer.add_summary(summary)
            self._writer.add_text("config", f"```yaml\n{experiment.text()}```", 0)
        self._writer.flush()
        return known

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()
        self._done = max(self._done, round)

    def end(self, status: str, totals: Mapping[str, int]) -> None:
        last = max(self._done, 0)
        if status == "finished":
            for name, value in totals.items():
                if self._totals.get(name) != value:
                    self._writer.add_scalar(name, value, last)
            self._writer.file_writer.add_summary(self._ended)  # there is no such mark for other ends
        self._writer.add_text("status", status, last)
        self._writer.close()


class MLflow:
    """A run in a store beside the run's folder, or wherever `tracker.uri` says."""

    def __init__(self, spec: TrackerSpec):
        # Nothing leaves this machine unasked, and a server that went away is found out in seconds
        for name, value in (
            ("MLFLOW_DISABLE_TELEMETRY", "true"),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
            ("MLFLOW_LOGGING_LEVEL", "WARNING"),
        ):
            os.environ.setdefault(name, value)
        self._spec = spec
        self._client: Any = None
        self._run = ""
        self._done = -1

    def begin(self, experiment: Experiment, folder: Path, done: int) -> Collection[int]:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        store = folder.resolve().parent
        uri = self._spec.uri or f"sqlite:///{store / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        self._done = done
        where = f"mlflow {uri}"
        if known := _ids(folder).get(where):
            try:
                self._client.update_run(known, status="RUNNING")
            except MlflowException:  # of a store that was made anew
                known = None
        if known:
            self._run = known
            return {point.step for point in self._client.get_metric_history(known, ALWAYS) if point.step <= done}
        group = self._client.get_experiment_by_name(self._spec.experiment)
        if group is None:
            files = None if self._spec.uri else (store / "mlflow-files").as_uri()
            number = self._client.create_experiment(self._spec.experiment, artifact_location=files)
        else:
            number = group.experiment_id
        self._run = self._client.create_run(number, run_name=experiment.name, tags={"folder": str(folder)}).info.run_id
        _remember(folder, where, self._run)
        params = [Param(name, str(value)) for name, value in hyper_parameters(experiment).items()]
        self._client.log_batch(self._run, params=params)
        return ()

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._run, [Metric(name, value, now, round) for name, value in figures.items()])
        self._done = max(self._done, round)

    def end(self, status: str, totals: Mapping[str, int]) -> None:
        if status == "finished":
            before = self._client.get_run(self._run).data.metrics
            new = {name: value for name, value in totals.items() if before.get(name) != value}
            self.log(max(self._done, 0), new)
        word = {"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        self._client.set_terminated(self._run, word)


class WandB:
    """Files in the run's folder, under wandb/, or with `tracker.mode=online` a run on the server."""

    def __init__(self, spec: TrackerSpec):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._spec = spec
        self._run: Any = None
        self._folder, self._where = Path(), ""

    def begin(self, experiment: Experiment, folder: Path, done: int) -> Collection[int]:
        import wandb

        self._folder, self._where = folder, f"wandb {self._spec.project}"
        known = _ids(folder).get(self._where)
        if known is None:
            _remember(folder, self._where, known := secrets.token_hex(8))
        self._run = wandb.init(
            project=self._spec.project,
            name=experiment.name,
            id=known,
            resume="allow",
            dir=str(folder),
            mode=self._spec.mode,
            config=experiment.fixed(),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        # Files for `wandb sync` can't be asked which rounds they have
        return range(min(int(_ids(folder).get(f"{self._where} last round", -1)), done) + 1)

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=round, commit=True)
        _remember(self._folder, f"{self._where} last round", str(round))

    def end(self, status: str, totals: Mapping[str, int]) -> None:
        self._run.summary.update({**totals, "status": status})
        self._run.finish(exit_code=0 if status == "finished" else 1)


TRACKERS: dict[str, Callable[[TrackerSpec], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


def _ids(folder: Path) -> dict[str, str]:
    path = folder / IDS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _remember(folder: Path, where: str, known_as: str) -> None:
    write_atomically(folder / IDS, (json.dumps({**_ids(folder), where: known_as}, indent=2) + "\n").encode())
