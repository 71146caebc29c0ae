"""fedtune from Python: a run, what is read of it, its model, a comparison; and docs/python.md from top to bottom."""

import csv
import inspect
import json
import multiprocessing.spawn
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, summary_of

import fedtune
from fedtune.comparisons.processes import without_script
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, ExportError, RunFolderError
from fedtune.python_api.overrides import list_word, word, words_of
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.runs.data_frames import WHOLE
from fedtune.runs.ledger import COLUMNS
from fedtune.runs.metrics_columns import CLIENTS, CLOCK, FAILURES, METRICS, SIMILARITY
from fedtune.workspace.downlink import Downlink
from fedtune.workspace.workspace import Workspace

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With something in every table but that of failures."""
    return fedtune.run(
        "method=fedit",
        *SMALL,
        rounds=2,
        train__lr=0.02,
        quiet=True,
        evaluate__peers="last",
        evaluate__similarity=True,
        data__client_heldout=0.2,
        population__devices=["raspberry_pi_5"],
        out=tmp_path_factory.mktemp("it's") / "a run",
    )


@pytest.fixture
def copy(run, tmp_path):
    """The run's folder, for a test to harm."""
    return shutil.copytree(run.path, tmp_path / "copy")


def lines(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


class TestWords:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rounds", 7),
            ("rounds", np.int64(7)),
            ("train.lr", 1e-05),
            ("train.lr", np.float32(0.5)),
            ("runtime.timeout", float("inf")),
            ("evaluate.similarity", True),
            ("budget.bytes", None),
            ("population.ranks", [8, 4, 4, 2]),
            ("adapter.targets", ["q_proj", "v_proj"]),
            ("population.devices", {"galaxy_a55": 0.25, "raspberry_pi_5": 1}),
            ("name", "null"),
            ("name", ""),
            ("name", "5"),
            ("name", "it's [a, \"b\"]=c: \\ $d 'e'"),
            ("name", "'quoted'"),
            ("evaluate.extract", r"#### (\d+)\s"),
            ("data.path", ["a file.jsonl", "it's,[one].jsonl"]),
            ("data.path", "{not}a list.jsonl"),
        ],
    )
    def test_a_value_arrives_as_it_is(self, key, value):
        experiment = compose(["model=tiny", "population.clients=4", word(key, value)])
        for part in key.split("."):
            experiment = getattr(experiment, part)
        assert experiment == (None if value is None else value)

    def test_what_is_no_text_is_as_one_would_type_it(self):
        assert words_of(["a=1"], {"method": "fedit", "train__lr": "1e-3", "population__ranks": "[8,4]"}) == [
            "a=1", "method=fedit", "train.lr=1e-3", "population.ranks=[8,4]"
        ]  # fmt: skip
        assert word("method.strategy._target_", "x") == words_of([], {"method__strategy___target_": "x"})[0]
        assert word("out", Path("a") / "b c") == "out=a/b c"

    @pytest.mark.parametrize(
        ("key", "value", "text"),
        [
            ("methods", ["fedit", 'slow: fedit name="a b"'], 'methods=["fedit", "slow: fedit name=\\"a b\\""]'),
            ("methods", "all", "methods=all"),
            ("seeds", range(3), "seeds=[0, 1, 2]"),
            ("seeds", np.arange(2), "seeds=[0, 1]"),
            ("tune.lr", ["0.3x", 1e-4], 'tune.lr=["0.3x", 0.0001]'),
            ("jobs", 2, "jobs=[2]"),
        ],
    )
    def test_a_comparisons_lists(self, key, value, text):
        assert list_word(key, value) == text

    def test_what_no_setting_can_be(self):
        with pytest.raises(ConfigError, match=r"train\.lr: expected None, a boolean, a number.* got object"):
            word("train.lr", object())
        with pytest.raises(ConfigError, match="seeds: expected a list of names or numbers, got None"):
            list_word("seeds", [None])
        with pytest.raises(ConfigError, match=r"\{'rounds': 2\}: expected key=value in a string"):
            fedtune.run({"rounds": 2})


class TestRun:
    @pytest.mark.slow
    def test_it_is_the_folders(self, run):
        assert repr(run).startswith(f"Run({str(run.path)!r}: fedit, finished, round 2 of 2, held-out loss 5.")
        assert (run.name, run.status, run.error, run.notes) == ("run", "finished", None, ())
        assert run.summary == summary_of(run.path)
        assert run.config["train"]["lr"] == 0.02
        assert run.config["out"] == str(run.path)
        assert run.adapter_path == run.path / "adapter"

    @pytest.mark.parametrize(
        ("name", "columns"),
        [
            ("metrics", METRICS),
            ("ledger", COLUMNS),
            ("clients", CLIENTS),
            ("clock", CLOCK),
            ("similarity", SIMILARITY),
        ],
    )
    def test_a_frame_is_its_file(self, run, name, columns):
        frame, told = getattr(run, name), lines(run.path / f"{name}.csv")
        assert tuple(frame.columns) == columns
        assert len(frame) == len(told) > 0
        for column in columns:
            cells = [line[column] for line in told]
            if pd.api.types.is_numeric_dtype(frame[column]):
                np.testing.assert_array_equal(frame[column], [float(cell) if cell else np.nan for cell in cells])
                counts = column in WHOLE or column.endswith("_bytes")
                assert frame[column].dtype == (np.int64 if counts and all(cells) else np.float64), column
            else:
                assert frame[column].tolist() == cells

    def test_every_count_is_a_column(self):
        assert set(WHOLE) <= {*METRICS, *COLUMNS, *CLIENTS, *CLOCK, *SIMILARITY, *FAILURES}

    def test_the_ledger_sums_to_the_totals(self, run):
        sums = run.ledger.groupby("direction")[["payload_bytes", "wire_bytes"]].sum()
        assert {f"{way}_{name}": int(sums.loc[way, name]) for way in sums.index for name in sums.columns} == {
            name: count for name, count in run.summary["totals"].items() if name.startswith(("up_", "down_"))
        }

    def test_what_it_does_not_have_is_an_empty_frame(self, run):
        assert tuple(run.failures.columns) == FAILURES
        assert len(run.failures) == 0
        assert run.failures["round"].dtype == np.int64

    @pytest.mark.slow
    def test_it_goes_on(self, copy, capsys):
        again = fedtune.run(resume=copy, rounds=3)
        assert again.metrics["round"].tolist() == [0, 1, 2, 3]
        assert "resumed after round 2" in capsys.readouterr().out
        with pytest.raises(ConfigError, match="seed: 0 -> 1"):
            fedtune.run(resume=copy, seed=1)

    def test_quiet_prints_nothing(self, copy, capsys):
        fedtune.run(f"resume={copy}", quiet=True)
        assert capsys.readouterr().out == ""

    def test_errors_are_the_command_lines(self, tmp_path):
        with pytest.raises(ConfigError, match="unknown setting 'rouns'; did you mean rounds"):
            fedtune.run(model="tiny", rouns=2)
        with pytest.raises(fedtune.FedtuneError, match="holds no run"):
            fedtune.run(resume=tmp_path)


class TestDamage:
    def test_no_run(self, tmp_path):
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(RunFolderError, match="holds no run"):
                fedtune.load_run(path)

    def test_a_config_that_can_not_be_read(self, copy):
        (copy / "config.yaml").write_text("rounds: [")
        with pytest.raises(RunFolderError, match=r"config\.yaml can't be read"):
            fedtune.load_run(copy)

    def test_what_is_left_is_read_and_the_rest_is_said(self, copy):
        whole = lines(copy / "ledger.csv")
        content = (copy / "ledger.csv").read_text()
        (copy / "ledger.csv").write_text(content[: content.rindex("\n") - 5])
        (copy / "failures.csv").write_text('round,client,error\n1,2,"\'=a, b"\n2,x,y\n')
        (copy / "clients.csv").unlink()
        (copy / "summary.json").unlink()
        run = fedtune.load_run(copy)
        assert len(run.ledger) == len(whole) - 1
        assert run.failures.values.tolist() == [[1, 2, "=a, b"]]
        assert len(run.clients) == 0
        assert (run.status, run.summary) == ("cut off", {})
        said = "\n".join(run.notes)
        for note in ("summary.json is missing", "ledger.csv: the last line is cut off", "failures.csv: 1 line can't"):
            assert note in said


class TestModel:
    @staticmethod
    def served(run):
        """The logits of the server's own model after the last round."""
        workspace = Workspace(compose(run.config["overrides"]))
        checkpoint = load_checkpoint(
            run.path / "checkpoint" / "state.safetensors", workspace.strategy.init(workspace.model.layout)
        )
        workspace.install(
            Downlink(workspace).broadcast(checkpoint.sent, checkpoint.state, checkpoint.round + 1), memory={}
        )
        return TestModel.logits(workspace.model.module)

    @staticmethod
    def logits(model):
        with torch.no_grad():
            return model.eval()(TOKENS).logits

    def test_it_is_the_runs_and_generates(self, run):
        model, tokenizer = run.load_model()
        assert not model.training
        torch.testing.assert_close(self.logits(model), self.served(run), atol=1e-6, rtol=0)
        answer = model.generate(TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), max_new_tokens=3)
        assert answer.shape[1] in range(13, 16)
        assert isinstance(tokenizer.decode(answer[0]), str)

    @pytest.mark.parametrize(
        "words",
        [
            ("method=flora",),
            ("method=fedit", "adapter=none"),
            ("method=fedit", "adapter=prompt_tuning"),
        ],
    )
    def test_other_kinds_are_the_runs_too(self, shared_run, words):
        run = fedtune.load_run(shared_run(*words, "train.lr=0.02"))
        model, _ = run.load_model()
        torch.testing.assert_close(self.logits(model), self.served(run), atol=1e-5, rtol=0)
        assert (run.adapter_path is None) == (run.config["adapter"]["kind"] == "none")

    def test_what_is_no_one_model_is_refused(self, shared_run):
        run = fedtune.load_run(shared_run("method=fedsa_lora", "data.client_heldout=0.2"))
        with pytest.raises(ExportError, match="as many models as clients"):
            run.load_model()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page's blocks leave, run one after the other in an empty folder."""
    names, here = {}, Path.cwd()
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(tmp_path_factory.mktemp("page"))
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        yield names
    finally:
        monkeypatch.undo()
    assert Path.cwd() == here


@pytest.mark.slow
def test_the_page_does_what_it_says(page):
    assert page["run"].metrics.shape == (4, len(METRICS))
    assert set(page["bytes_by_part"].index) == {
        (way, part) for way in ("up", "down") for part in ("handshake", "train")
    }
    assert isinstance(page["text"], str)
    found = page["found"]
    assert found.page.is_file()
    assert page["curves"].shape == (2, 2)
    assert set(found.results.columns) >= {*METRICS, "label", "method", "seed", "folder"}
    assert set(found.summary["protocol"]) >= {"rounds", "bytes"}
    assert list(found.runs) == [("fedit", 0), ("slow", 0)]
    assert len(found.runs["slow", 0].metrics) == 2
    assert found.failures.shape == (0, 3)
    assert inspect.isfunction(fedtune.compare)  # and not the subpackage, which is imported by now


@pytest.mark.slow
def test_a_comparison_says_what_failed(page, tmp_path):
    found = json.loads((page["found"].path / "comparison.json").read_text())
    found["cells"][1] |= {"status": "failed", "error": "the loss is nan"}
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    failures = fedtune.Comparison(tmp_path).failures
    assert failures.values.tolist() == [["slow", 0, "the loss is nan"]]


def test_processes_of_a_comparison_do_not_begin_with_the_script(monkeypatch):
    """multiprocessing's own word for what a process is told to import first."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "script.py", raising=False)  # a process of pytest-xdist has none
    assert any(key.startswith("init_main") for key in multiprocessing.spawn.get_preparation_data("x"))
    with without_script():
        assert not any(key.startswith("init_main") for key in multiprocessing.spawn.get_preparation_data("x"))
    assert sys.modules["__main__"] is main


def test_importing_costs_nothing():
    code = (
        "import sys, time; begun = time.process_time(); import fedtune; took = time.process_time() - begun; "
        "print(took, [name for name in ('torch', 'numpy', 'pandas', 'hydra') if name in sys.modules], dir(fedtune))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, rest = done.stdout.split(" ", 1)
    assert float(took) < 0.1
    assert rest == f"[] {sorted(fedtune.__all__)}\n"


def test_what_is_public_is_there_and_documented():
    for name in set(fedtune.__all__) - {"__version__"}:
        assert (getattr(fedtune, name).__doc__ or "").strip(), name
    for function in (fedtune.run, fedtune.compare, fedtune.load_run, fedtune.Run.load_model):
        assert function.__annotations__["return"], function
        assert {"Args:", "Raises:", "Example:"} <= {line.strip() for line in (function.__doc__ or "").splitlines()}
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        fedtune.rum  # noqa: B018
