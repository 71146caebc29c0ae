"""fedtune compare: what words become, that each cell is the run that it says, and what stops and damage do to it."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PAIRS

from fedtune.commands.main import main
from fedtune.comparisons.plan import PlannedRun, plan, slug
from fedtune.comparisons.play import Outcome, Processes, asked, is_done
from fedtune.core.errors import ConfigError, RunFolderError
from fedtune.core.files import hold

SMALL = (
    "model=tiny", "rounds=2", "population.clients=3", "population.cohort=2", "train.steps=1", "evaluate.examples=8",
    "evaluate.exactness=false", f"data.path={PAIRS}", "data.partition=iid",
)  # fmt: skip


def record(out: Path) -> dict:
    return json.loads((out / "comparison.json").read_text())


def lines(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


class TestPlan:
    def test_the_product_with_a_folder_for_each(self):
        made = plan(["methods=[fedit,flora]", "codecs=[raw,int8]", "seeds=[3,5]", "out=x", "rounds=7", "jobs=2"])
        assert [entry.label for entry in made.entries] == ["fedit raw", "fedit int8", "flora raw", "flora int8"]
        cell = made.cell(made.entries[1], 5)
        assert cell.folder == Path("x/fedit-int8/seed-5")
        assert cell.words == ("runtime.threads=1", "rounds=7", "method=fedit", "codec=int8", "seed=5")
        assert (
            cell.command
            == "fedtune run runtime.threads=1 rounds=7 method=fedit codec=int8 seed=5 out=x/fedit-int8/seed-5"
        )
        assert (made.seeds, made.jobs, made.tuning_seed) == ((3, 5), 2, 6)

    @pytest.mark.slow
    def test_items_with_settings_and_labels(self):
        made = plan(
            ["methods=[fedit,'slow: fedit train.lr=1e-4','fedit server_optimizer=fedadam']", "codecs=[default]"]
        )
        assert [(entry.label, entry.words) for entry in made.entries] == [
            ("fedit", ("method=fedit",)),
            ("slow", ("method=fedit", "train.lr=1e-4")),
            ("fedit server_optimizer=fedadam", ("method=fedit", "server_optimizer=fedadam")),
        ]
        assert len({slug(entry.label) for entry in made.entries}) == 3

    def test_all_methods(self):
        made = plan(["methods=all", "model=tiny"])
        assert {"fedit", "fedkseed", "local_only"} <= {entry.label for entry in made.entries}

    @pytest.mark.slow
    def test_trials_are_as_many_for_each_and_relative_to_its_own(self):
        """fedit's clients step by train.lr=1e-3, scaffold's by 0.1 and fedkseed's, in the server's rules, by 1e-5."""
        made = plan(["methods=[fedit,scaffold,fedkseed]", "tune.lr=[0.3x,2]", "seeds=[0,1]", "out=x"])
        words = {entry.label: [chosen for chosen, _ in made.trials(entry)] for entry in made.entries}
        assert words == {
            "fedit": [("method.client.lr=0.0003",), ("method.client.lr=2",)],
            "scaffold": [("method.client.lr=0.03",), ("method.client.lr=2",)],
            "fedkseed": [("method.strategy.rules.lr=3e-06",), ("method.strategy.rules.lr=2",)],
        }
        _, trial = made.trials(made.entries[0])[0]
        assert trial.folder == Path("x/tune/fedit/method.client.lr=0.0003")
        assert trial.seed == 2
        assert trial.words[-1] == "seed=2"

    def test_several_settings_are_tuned_together(self):
        made = plan(["tune.lr=[1,2]", "tune.train.steps=[3,4]"])
        assert [chosen for chosen, _ in made.trials(made.entries[0])] == [
            ("method.client.lr=1", "train.steps=3"),
            ("method.client.lr=1", "train.steps=4"),
            ("method.client.lr=2", "train.steps=3"),
            ("method.client.lr=2", "train.steps=4"),
        ]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["fedit"], "expected key=value"),
            (["methods=[fedti]"], "did you mean 'fedit'|fedit"),
            (["methods=[fedit,fedit]"], "twice"),
            (["methods=[]"], "expected a list"),
            (["methods=[[fedit]]"], "single values"),
            (["methods=[fedit"], "can't be read"),
            (["methods=['fedit lr']"], "expected key=value after the name"),
            (['methods=["fedit \'x"]'], "can't be split"),
            (["codecs=[zip]"], "codecs: 'zip' is not known"),
            (["seeds=[a]"], "seeds=.*whole numbers"),
            (["seeds=[-1]"], "seeds=.*whole numbers"),
            (["jobs=0"], "jobs=0"),
            (["tune.lr=[1]", "tune.rounds=a"], "tune.rounds"),
            (["method=fedit"], "'methods="),
            (["codec=int8"], "'codecs="),
            (["seed=1"], "'seeds="),
            (["rouns=3"], "rouns.*rounds"),
            (["tune.lr=[1e-3]", "tune.seed=1"], "tune.seed=1 is among"),
            (["tune.lr=[ax]"], "got ax"),
            (["tune.lr=[-1]"], "above 0"),
            (["tune.lr=[x]"], "got x"),
        ],
    )
    def test_what_can_not_be_read(self, words: list[str], said: str):
        def read() -> None:
            made = plan(words)
            made.trials(made.entries[0])

        with pytest.raises(ConfigError, match=said):
            read()

    @pytest.mark.slow
    def test_one_entry_that_can_not_be_does_not_stop_the_others(self):
        made = plan(["methods=['fedit adapter.rank=0',flora]"])
        with pytest.raises(ConfigError, match=r"adapter\.rank"):
            asked(made.cell(made.entries[0], 0))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods that work and one that is refused when it starts, two seeds, tuned; one process."""
    out = tmp_path_factory.mktemp("compare") / "out"
    words = ["methods=[fedit,flora,'refused: flora codec=compeft']", "seeds=[0,1]", "tune.lr=[1e-4,1e-2]", "jobs=1"]
    assert main(["compare", *words, *SMALL, f"out={out}"]) == 1, "one entry fails"
    return out


@pytest.mark.slow
class TestCompare:
    def test_each_cell_is_the_run_that_its_command_makes(self, compared: Path, tmp_path: Path):
        told = [cell for cell in record(compared)["cells"] if cell["folder"] == "flora/seed-1"]
        assert [cell["status"] for cell in told] == ["done"]
        words = told[0]["command"].removeprefix("fedtune run ").split()
        assert main(["run", *[word for word in words if not word.startswith("out=")], f"out={tmp_path / 'again'}"]) == 0
        states = [summary(folder)["state_sha256"] for folder in (tmp_path / "again", compared / "flora/seed-1")]
        assert states[0] == states[1], "sharing a process with other runs changes nothing"

    def test_the_lowest_loss_on_the_tuning_seed_is_taken(self, compared: Path):
        for label in ("fedit", "flora"):
            tuned = record(compared)["tuned"][label]
            losses = {words: summary(compared / "tune" / label / words)["last_eval_loss"] for words in tuned["losses"]}
            assert losses == tuned["losses"]
            assert len(losses) == 2
            best = min(losses, key=lambda words: losses[words])
            assert tuned["chosen"] == [best]
            used = summary(compared / label / "seed-0")
            assert best in used["command"].split()
            assert used["seed"] == 0
            assert all(summary(compared / "tune" / label / words)["seed"] == 2 for words in losses)

    def test_what_fails_is_written_down_and_the_others_go_on(self, compared: Path):
        failed = [
            cell for cell in record(compared)["cells"] if cell["status"] == "failed" and "tune" not in cell["folder"]
        ]
        assert {(cell["label"], cell["seed"]) for cell in failed} == {("refused", 0), ("refused", 1)}
        assert all("flora" in cell["error"] for cell in failed)
        done = {cell["folder"] for cell in record(compared)["cells"] if cell["status"] == "done"}
        assert {"fedit/seed-0", "fedit/seed-1", "flora/seed-0", "flora/seed-1"} <= done
        log = (compared / "fedit/seed-0/log.txt").read_text()
        assert log.startswith("$ fedtune run ")
        assert "round 2" in log

    def test_a_page_and_tables_are_made(self, compared: Path):
        page = (compared / "report.html").read_text()
        assert "fedit" in page
        with (compared / "results.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert {(row["label"], row["seed"], row["round"]) for row in rows} == {
            (label, seed, number) for label in ("fedit", "flora") for seed in "01" for number in "012"
        }

    def test_the_pages_numbers_are_those_of_the_files(self, compared: Path):
        """After 2 rounds: the mean held-out loss over the seeds, what went each way by the ledger's lines, and the mean
        paired difference from the best, each to six digits."""
        page = (compared / "report.html").read_text()
        (shown,) = re.findall(r'<table class="results" data-protocol="rounds">.*?</table>', page, re.DOTALL)
        assert "After 2 rounds" in shown
        numbers = {}
        for label, row in re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', shown, re.DOTALL):
            numbers[label] = [float(value) for value in re.findall(r'data-value="([^"]+)"', row)]
        losses, sent = {}, {}
        for label in ("fedit", "flora"):
            folders = [compared / label / f"seed-{seed}" for seed in (0, 1)]
            losses[label] = [float(lines(folder, "metrics.csv")[2]["eval_loss"]) for folder in folders]
            sent[label] = [
                sum(
                    int(line["wire_bytes"])
                    for folder in folders
                    for line in lines(folder, "ledger.csv")
                    if line["direction"] == way and line["part"] != "evaluate"
                )
                / 2
                for way in ("up", "down")
            ]
        means = {label: sum(found) / 2 for label, found in losses.items()}
        best, other = sorted(means, key=lambda label: means[label])
        behind = sum(b - a for a, b in zip(losses[best], losses[other], strict=True)) / 2
        assert numbers[best][0] == pytest.approx(means[best], rel=1e-5)
        assert numbers[other][:2] == pytest.approx([means[other], behind], rel=1e-4)
        for label in (best, other):
            for size in sent[label]:
                assert any(value == pytest.approx(size, rel=1e-5) for value in numbers[label]), (label, size)

    def test_what_is_there_is_not_run_again_and_more_seeds_are_added(
        self, compared: Path, capsys: pytest.CaptureFixture[str]
    ):
        before = {path: path.stat().st_mtime_ns for path in compared.glob("*/seed-*/metrics.csv")}
        words = ["methods=[fedit]", "seeds=[0,1,3]", "tune.lr=[1e-4,1e-2]", "tune.seed=2", "jobs=1"]
        assert main(["compare", *words, *SMALL, f"out={compared}"]) == 0
        assert "2 of 3 runs are there already" in capsys.readouterr().out
        after = {path: path.stat().st_mtime_ns for path in compared.glob("*/seed-*/metrics.csv")}
        assert {path: after[path] for path in before} == before
        assert set(after) - set(before) == {compared / "fedit/seed-3/metrics.csv"}
        assert "flora/seed-1" in {cell["folder"] for cell in record(compared)["cells"]}, "what was there stays"

    def test_other_settings_in_the_same_folder_are_refused(self, compared: Path, capsys: pytest.CaptureFixture[str]):
        words = ["methods=[fedit]", "seeds=[0]", "train.steps=2", "jobs=1"]
        others = [word for word in SMALL if not word.startswith("train.steps")]
        assert main(["compare", *words, *others, f"out={compared}"]) == 1
        assert "train.steps: 1 -> 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_where_it_stood(tmp_path: Path, forking: None):
    """Killed while its second run goes on: its processes end with it, and the same command ends in the bits of runs
    that were never stopped."""
    out, words = tmp_path / "out", ["methods=[fedit]", "seeds=[0,1]", "jobs=1", *SMALL[:1], "rounds=40", *SMALL[2:]]
    command = [sys.executable, "-m", "fedtune", "compare", *words, f"out={out}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        second = out / "fedit/seed-1/metrics.csv"
        deadline = time.monotonic() + 120
        while not (second.exists() and len(second.read_text().splitlines()) > 3):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    deadline = time.monotonic() + 20
    while b"multiprocessing" in b"".join(_command_lines(process.pid)):
        assert time.monotonic() < deadline, "its processes go on without it"
        time.sleep(0.2)
    assert summary(out / "fedit/seed-0")["status"] == "finished"
    assert summary(out / "fedit/seed-1")["status"] == "running"
    first = (out / "fedit/seed-0/metrics.csv").stat().st_mtime_ns
    assert main(["compare", *words, f"out={out}"]) == 0
    assert (out / "fedit/seed-0/metrics.csv").stat().st_mtime_ns == first
    whole = tmp_path / "whole"
    cell = plan([*words, f"out={out}"]).cell(plan(words).entries[0], 1)
    assert main(["run", *cell.words, f"out={whole}"]) == 0
    assert summary(out / "fedit/seed-1")["state_sha256"] == summary(whole)["state_sha256"]


def _command_lines(group: int) -> list[bytes]:
    """Of the processes in this group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append((path / "cmdline").read_bytes())
        except (OSError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
def test_a_process_that_dies_takes_nobody_along(tmp_path: Path):
    """One run's process is killed both times that it runs, and its neighbour with it; the others end well."""
    made = plan(["methods=[fedit]", "seeds=[0]", "jobs=2", *SMALL, f"out={tmp_path}"])
    cells = [made.cell(made.entries[0], seed) for seed in made.seeds]
    long = PlannedRun("long", tmp_path / "long", 0, (*cells[0].words, "rounds=2000"))
    ended: dict[str, Outcome] = {}
    killed: list[int] = []

    def kill() -> None:
        """Whoever holds the long run's folder."""
        if not (long.folder / "metrics.csv").exists() or ended.get("long"):
            return
        for path in Path("/proc").glob("[0-9]*/fd"):
            try:
                held = any(link.resolve() == (long.folder / ".lock").resolve() for link in path.iterdir())
            except OSError:
                continue
            if held and int(path.parent.name) not in killed:
                killed.append(int(path.parent.name))
                os.kill(killed[-1], signal.SIGKILL)

    with Processes(2) as processes:
        processes.run(
            [long, *cells],
            lambda cell: None,
            lambda cell, outcome: ended.update({"long" if cell is long else str(cell.seed): outcome}),
            kill,
        )
    assert len(killed) == 2
    assert ended["long"].status == "failed"
    assert "died" in ended["long"].error
    assert ended["0"].status == "done"


def test_a_folder_that_another_comparison_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    held = hold(tmp_path)
    try:
        assert main(["compare", "methods=[fedit]", *SMALL, f"out={tmp_path}"]) == 1
    finally:
        held.release()
    assert "another fedtune" in capsys.readouterr().err


def test_a_run_that_is_there_with_other_settings_is_no_cell(tmp_path: Path):
    made = plan(["methods=[fedit]", *SMALL, f"out={tmp_path}"])
    cell = made.cell(made.entries[0], 0)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(asked(cell)[0].text().replace("lr: 0.001", "lr: 0.5"))
    with pytest.raises(RunFolderError, match=r"train\.lr: 0\.5 -> 0\.001"):
        is_done(cell)
