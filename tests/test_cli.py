"""The command line: what a person types and reads."""

import pytest
from conftest import PAIRS

from fedtune.commands.main import main
from fedtune.config.compose import choices

FEW = ("model=tiny", f"data.path={PAIRS}")
QUICK = (*FEW, "data.partition=iid", "population.clients=3", "train.steps=1", "evaluate.examples=8")


def said(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_shows_how_to_begin(capsys):
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) if words else _nothing():
            main(words)
        out = capsys.readouterr().out
        assert "fedtune run experiment=demo" in out
        assert "methods" in out


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_run_help_lists_every_group_and_setting(capsys):
    code, out, _ = said(capsys, "run", "--help")
    assert code == 0
    for word in (
        "model=",
        "smollm2",
        "train.lr=",
        "population.cohort=",
        "codec_up=",
        "resume=",
        "server_optimizer=",
        "fedyogi",
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= 150


def test_methods_shows_each_with_its_paper(capsys):
    code, out, _ = said(capsys, "methods")
    assert code == 0
    for name in choices("method"):
        assert name in out
    assert "arXiv:2305.05644" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian.lr=1"], "did you mean train?"),
        (["model=tiny", "data.path=/no/such.jsonl"], "data.path=/no/such.jsonl does not exist"),
        (["model.path=/no/such"], "model.path=/no/such does not exist"),
        ([*FEW, "adapter.targets=[query]"], "has no layer 'query'; it has down_proj"),
        ([*FEW, "population.clients=3000"], "use fewer clients"),
        (
            [*FEW, "data.partition=iid", "train.lr=1e20", "train.optimizer=sgd", "train.max_grad_norm=0"],
            "lower train.lr",
        ),
        (["resume=nowhere"], "resume=nowhere holds no run"),
        (["model=tiny", "runtime.device=cuda:9"], "Try runtime.device=auto"),
    ],
)
def test_a_mistake_is_one_message_and_a_code(capsys, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capsys, "run", *words)
    assert code == 1
    assert err.startswith("fedtune: ")
    assert err.count("\n") == 1
    assert part in err


def test_a_mistake_leaves_no_folder_behind(capsys, tmp_path):
    said(capsys, "run", "model=tiny", "data.path=/no/such.jsonl", f"out={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_its_refusals_and_its_continuation(capsys, tmp_path):
    out = tmp_path / "run"
    code, printed, _ = said(capsys, "run", *QUICK, "rounds=1", f"out={out}")
    assert code == 0
    assert "held-out loss" in printed
    assert str(out / "adapter") in printed

    code, _, err = said(capsys, "run", *QUICK, f"out={out}")
    assert (code, "already holds a run" in err, f"resume={out}" in err) == (1, True, True)

    code, _, err = said(capsys, "run", f"resume={out}", "train.lr=0.5")
    assert (code, "train.lr: 0.001 -> 0.5" in err) == (1, True)

    code, printed, _ = said(capsys, "run", f"resume={out}", "rounds=2")
    assert (code, "resumed after round 1" in printed, "round 2 " in printed) == (0, True, True)

    code, printed, _ = said(capsys, "run", *QUICK, f"resume={out}")  # its own words again change nothing
    assert (code, "resumed after round 2" in printed) == (0, True)


def test_the_real_command_runs_in_a_process_of_its_own(fedtune, tmp_path):
    ended = fedtune("run", *QUICK, "rounds=1")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / "run" / "summary.json").is_file()
    refused = fedtune("run", "model=tny")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
