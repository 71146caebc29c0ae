"""Runs that are stopped, resumed, refused and filled up: nothing that was written is lost."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from conftest import SMALL, summary_of
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.compose import compose, load
from fedtune.config.population import PopulationSpec
from fedtune.core.errors import Interrupted, RunFolderError
from fedtune.core.protocol import ClientInfo, Update
from fedtune.data.federated_data import load_data
from fedtune.models.tiny import tiny_tokenizer
from fedtune.runs.checkpoint import Checkpoint, flatten, load_checkpoint, save_checkpoint, state_sha256, unflatten
from fedtune.runs.ledger import COLUMNS, Ledger, LedgerRow, parse
from fedtune.runs.metrics_columns import METRICS
from fedtune.runs.run_folder import RunFolder
from fedtune.runs.update_store import Replies
from fedtune.runtime.local import run_local
from fedtune.server.client_registry import ClientRegistry
from strategies.fedit import State

LONG = [*SMALL, "rounds=40", "train.steps=1", "population.cohort=4"]


def lines(path):
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def wait_for_round(number: int, folder: Path, process: forked.Popen) -> None:
    """Until the round's line is there: it and all before it, round 0 and the header among them."""
    deadline = time.monotonic() + 100
    while not (folder / "metrics.csv").exists() or len(lines(folder / "metrics.csv")) < number + 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)


def check_whole(folder: Path) -> int:
    """Everything in a run folder can be read, whatever stopped the run. Returns the checkpoint's round."""
    load((folder / "config.yaml").read_text())
    metrics, ledger = lines(folder / "metrics.csv"), lines(folder / "ledger.csv")
    assert metrics[0] == list(METRICS)
    assert all(len(row) == len(METRICS) for row in metrics)
    assert [int(row[0]) for row in metrics[1:]] == list(range(len(metrics) - 1))
    assert ledger[0] == list(COLUMNS)
    assert all(parse(row) for row in ledger[1:])
    summary = json.loads((folder / "summary.json").read_text())
    template = State({})
    checkpoint = load_checkpoint(folder / "checkpoint" / "state.safetensors", template)
    assert checkpoint.round >= summary["rounds"]
    assert checkpoint.round <= len(metrics) - 2
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    return checkpoint.round


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(tmp_path):
    run_local(compose([*LONG, f"out={tmp_path / 'whole'}"]))
    folder = tmp_path / "killed"
    words = [*LONG, f"out={folder}"]
    for after in (2, 15):
        process = forked.Popen([sys.executable, "-m", "fedtune", "run", *words], stdout=subprocess.DEVNULL)
        wait_for_round(after, folder, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert check_whole(folder) >= after - 1
        assert summary_of(folder)["status"] == "running"
        words = [f"resume={folder}"]
    finished = forked.run([sys.executable, "-m", "fedtune", "run", *words], capture_output=True, text=True, check=True)
    assert "resumed after round" in finished.stdout
    assert check_whole(folder) == 40
    assert summary_of(folder)["state_sha256"] == summary_of(tmp_path / "whole")["state_sha256"]
    strip = [METRICS.index(name) for name in METRICS if "seconds" not in name]
    assert [[row[i] for i in strip] for row in lines(folder / "metrics.csv")] == [
        [row[i] for i in strip] for row in lines(tmp_path / "whole" / "metrics.csv")
    ]


@pytest.mark.slow
def test_a_full_disk_ends_in_one_message_and_costs_no_finished_round(tmp_path):
    """The system refuses to let files grow past 16 kB, which the ledger reaches after some rounds."""

    folder = tmp_path / "run"
    words = [sys.executable, "-m", "fedtune", "run"]
    stopped = forked.run(
        [*words, *LONG, "rounds=70", f"out={folder}"],
        preexec_fn=forked.small_files,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert stopped.returncode == 1
    assert stopped.stderr.count("\n") == 1
    assert f"{folder}/ledger.csv can't be written" in stopped.stderr
    assert f"fedtune run resume={folder}" in stopped.stderr
    done = check_whole(folder)
    assert done > 5
    assert summary_of(folder)["status"] == "failed"
    resumed = forked.run([*words, f"resume={folder}"], capture_output=True, text=True, check=False, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    assert check_whole(folder) == 70


def test_lines_of_an_unfinished_round_and_a_line_cut_off_are_taken_out_on_resume(small_run):
    folder = small_run(rounds=2)
    sha256 = summary_of(folder)["state_sha256"]
    before = (folder / "metrics.csv").read_text(), (folder / "ledger.csv").read_text()
    with (folder / "metrics.csv").open("a") as stream:
        stream.write("3,1.0,0.5,,0.1,0.1,3,0,1,1,1,1,,\n")
    with (folder / "ledger.csv").open("a") as stream:
        stream.write("3,0,down,train,5,9,0.1\n3,1,do")
    run_local(load((folder / "config.yaml").read_text()), resume=str(folder))
    assert summary_of(folder)["state_sha256"] == sha256
    assert ((folder / "metrics.csv").read_text(), (folder / "ledger.csv").read_text()) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(small_run):
    folder = small_run(rounds=1)
    sha256 = summary_of(folder)["state_sha256"]
    (folder / "checkpoint" / "state.safetensors").unlink()
    run_local(load((folder / "config.yaml").read_text()), resume=str(folder))
    assert summary_of(folder)["state_sha256"] == sha256
    assert len(lines(folder / "metrics.csv")) == 3


def test_a_resumed_run_is_no_longer_called_finished(small_run, monkeypatch):
    folder = small_run(rounds=1)
    assert summary_of(folder)["status"] == "finished"
    seen = []
    gather = ClientRegistry.gather

    def look(self, round):
        seen.append(summary_of(folder)["status"])
        gather(self, round)

    monkeypatch.setattr(ClientRegistry, "gather", look)
    run_local(replace(load((folder / "config.yaml").read_text()), rounds=2), resume=str(folder))
    assert seen == ["running"]
    assert summary_of(folder)["status"] == "finished"


def test_a_damaged_checkpoint_is_named(small_run):
    folder = small_run(rounds=1)
    path = folder / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="is no checkpoint of this method"):
        run_local(load((folder / "config.yaml").read_text()), resume=str(folder))


def test_an_edited_config_is_noticed(small_run):
    folder = small_run(rounds=1)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    with pytest.raises(RunFolderError, match=r"was started with other settings; its config\.yaml was changed"):
        run_local(load(config.read_text()), resume=str(folder))


def test_a_folder_is_held_by_one_process(small_run):
    folder = small_run(rounds=1)
    held = RunFolder.open(str(folder))
    with pytest.raises(RunFolderError, match="is being written by another fedtune"):
        RunFolder.open(str(folder))
    held.close()
    RunFolder.open(str(folder)).close()


def test_free_names_are_found_for_runs_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [RunFolder.create(None, "demo") for _ in range(3)]
    assert [str(folder.path) for folder in made] == ["runs/demo", "runs/demo-2", "runs/demo-3"]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("")), "already holds a run"),
    ],
)
def test_an_out_folder_that_is_taken_is_refused(tmp_path, prepare, said):
    prepare(tmp_path / "out")
    with pytest.raises(RunFolderError, match=said):
        RunFolder.create(str(tmp_path / "out"), "x")


def test_a_write_that_fails_halfway_leaves_whole_lines(tmp_path):
    folder = RunFolder.create(str(tmp_path / "run"), "x")
    entry = LedgerRow(1, 2, "up", "train", 3, 4, 5, 0.5)
    folder.append_ledger([entry])
    (tmp_path / "run" / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"metrics\.csv can't be written: No space left on device"):
        folder.append_metrics({"round": 1})
    assert lines(tmp_path / "run" / "ledger.csv") == [
        list(COLUMNS),
        ["1", "2", "up", "train", "3", "4", "5", "0.500000"],
    ]


def test_a_ledger_line_comes_back():
    entry = LedgerRow(1, 2, "down", "train", 3, 4, 5, 0.5)
    assert parse(entry.line().strip().split(",")) == entry
    ledger = Ledger([entry, LedgerRow(1, 2, "up", "failed", 0, 7, 6, 0.5)])
    assert (ledger.totals["down_wire_bytes"], ledger.totals["up_wire_bytes"], ledger.totals["failed"]) == (4, 7, 1)
    assert ledger.totals["overhead_bytes"] == 11


STATES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(STATES, st.lists(st.integers(0, 5), max_size=3))
def test_any_state_comes_back_from_its_tree(value, shape):
    state = State({"a": torch.randn(shape), "more": [value, torch.ones(2, dtype=torch.bfloat16)]})
    tree, tensors = flatten(state)
    back = unflatten(json.loads(json.dumps(tree)), tensors, State({}))
    assert type(back) is State
    assert state_sha256(back) == state_sha256(state)


def test_what_stands_twice_in_a_state_is_written_once_and_comes_back_twice(tmp_path):
    """A first merge is the whole residual too. Parts of one tensor are kept apart."""
    big, path = torch.randn(1000, 10), tmp_path / "state.safetensors"
    state = State({"a": big, "more": [{"a": big, "rows": big[500:], "again": big[:500]}]})
    save_checkpoint(path, Checkpoint(1, "x", state, "0" * 16))
    assert path.stat().st_size < 2.2 * big.nbytes
    back = load_checkpoint(path, State({})).state
    assert state_sha256(back) == state_sha256(state)


def test_a_state_that_cannot_be_kept_exactly_is_refused_by_place():
    with pytest.raises(TypeError, match="state/adapter/x: a checkpoint can't hold a set"):
        flatten(State({"x": {1, 2}}))
    with pytest.raises(TypeError, match="expected text as keys"):
        flatten(State({1: torch.zeros(1)}))


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, Checkpoint(1, "x", State({"a": torch.ones(3)}), "0" * 16))

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, Checkpoint(2, "x", State({"a": torch.zeros(3)}), "0" * 16))
    assert list(tmp_path.iterdir()) == [path]
    kept = load_checkpoint(path, State({}))
    assert (kept.round, kept.state.adapter["a"].tolist()) == (1, [1, 1, 1])


def test_updates_beyond_the_memory_limit_wait_on_disk_and_come_back(tmp_path):
    from fedtune.codecs.raw import Raw

    replies, start = Replies(Raw(), tmp_path, memory_bytes=1000), {"a": torch.ones(100)}
    for index in (3, 1, 2, 0):
        update = Update({"a": torch.full((100,), float(index))}, index + 1, {"train_loss": 0.5}, start)
        replies.add(ClientInfo(index, 9), update, Raw().encode(update.tensors, 0))
    replies.sort()
    assert [peer.index for peer, _ in replies] == [0, 1, 2, 3]
    assert [float(update.tensors["a"][5]) for _, update in replies] == [0, 1, 2, 3]
    assert [update.examples for _, update in replies[1:3]] == [2, 3]
    assert all(update.start is start for _, update in replies)  # the server's own, which is not written
    assert len(replies) == 4
    replies.close()


def test_updates_that_the_disk_cannot_take_stop_the_run_not_the_client(tmp_path):
    from fedtune.codecs.raw import Raw

    replies = Replies(Raw(), tmp_path / "gone", memory_bytes=0)
    update = Update({"a": torch.ones(3)}, 1)
    with pytest.raises(RunFolderError, match="can't hold the round's updates: No such file"):
        replies.add(ClientInfo(0, 1), update, Raw().encode(update.tensors, 0))


def test_without_held_out_data_there_is_a_run_and_no_score(small_run):
    folder = small_run("data.heldout=0", rounds=1)
    assert [row[1] for row in lines(folder / "metrics.csv")[1:]] == ["", ""]
    assert "first_eval_loss" not in summary_of(folder)


@pytest.mark.parametrize(("quorum", "cohort", "enough"), [(0.5, 3, 2), (0.1, 30, 3), (1, 7, 7), (0.01, 10, 1)])
def test_a_quorum_is_rounded_up(quorum, cohort, enough):
    assert PopulationSpec(clients=100, quorum=quorum).min_replies(cohort) == enough


def test_a_run_that_is_interrupted_in_round_0_names_no_round_that_was_not(small_run, monkeypatch):
    def interrupt(self, round):
        raise KeyboardInterrupt

    monkeypatch.setattr(ClientRegistry, "gather", interrupt)
    with pytest.raises(Interrupted, match="interrupted before round 0 was done; go on with: fedtune run resume="):
        small_run()


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "fedtune", "run", *LONG, "rounds=1000", f"out={folder}"]
    process = forked.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_round(2, folder, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert f"go on with: fedtune run resume={folder}" in err
    assert summary_of(folder)["status"] == "interrupted"
    check_whole(folder)


MEASURE = """
import sys
from fedtune.config.compose import compose
from fedtune.runtime.local import run_local
clients, out = sys.argv[1:]
run_local(compose(["model=tiny", "data.partition=iid", f"population.clients={clients}", f"population.cohort={clients}",
                   "rounds=2", "train.steps=1", "evaluate.examples=16", "runtime.threads=1", f"out={out}"]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("PEAK", int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clients(tmp_path):
    """Peak memory with 200 clients, all of them in every round, within 80 MB of 10 clients."""

    def peak(clients):
        words = [sys.executable, "-c", MEASURE, str(clients), str(tmp_path / str(clients))]
        output = forked.run(words, capture_output=True, text=True, check=True, timeout=200).stdout
        return int(output.split("PEAK ")[1])

    assert peak(200) - peak(10) < 80e6


def test_client_scores_are_reported_on_request(small_run):
    folder = small_run("evaluate.clients=true", rounds=1)
    row = dict(zip(*lines(folder / "metrics.csv")[::2], strict=True))
    assert 5 < float(row["client_eval_loss"]) < 6
    assert 0 <= float(row["client_eval_accuracy"]) <= 1


def test_rounds_between_evaluations_still_leave_an_adapter(small_run):
    folder = small_run("evaluate.every=2", rounds=3)
    scores = [row[1] != "" for row in lines(folder / "metrics.csv")[1:]]
    assert scores == [True, False, True, False]
    every = small_run(rounds=3, name="every")
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (every / name).read_bytes()


def test_the_servers_data_is_nobody_elses():
    data = load_data(compose(["data=chatterbot"]).data, 20, tiny_tokenizer(), 0)
    held = set(data.server.tolist())
    assert len(held) == round(0.1 * len(data.corpus))
    assert not any(held & {*train.tolist(), *own.tolist()} for train, own in zip(data.train, data.heldout, strict=True))
