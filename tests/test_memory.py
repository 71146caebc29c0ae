"""What clients keep between rounds: theirs alone, and exact after whatever happens."""

import signal
import sys
import tempfile
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import SMALL, run_on, summary_of
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from remembering import WORDS

from fedtune.config.compose import compose
from fedtune.core.errors import ClientError
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.training.client_state import ClientStateStore

RUN = "0123456789abcdef"


def test_a_memory_comes_back_in_a_later_round_and_to_nobody_else(tmp_path):
    memory = ClientStateStore(tmp_path)
    memory.save(RUN, 3, 1, {"c": torch.ones(2)})
    assert memory.load(RUN, 3, 2)["c"].tolist() == [1, 1]
    assert memory.load(RUN, 3, 1) == {}
    assert memory.load(RUN, 2, 9) == {}
    assert memory.load("f" * 16, 3, 9) == {}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8, unique=True))
def test_any_round_that_may_be_played_again_starts_from_the_same(rounds):
    """After turns in some rounds, the last of them can be played again, and so can any later one."""
    with tempfile.TemporaryDirectory() as folder:
        memory = ClientStateStore(Path(folder))
        before = {}
        for round in sorted(rounds):
            before[round] = memory.load(RUN, 0, round)
            memory.save(RUN, 0, round, {"round": torch.tensor(round)})
        last = max(rounds)
        again = memory.load(RUN, 0, last)
        assert {name: int(t) for name, t in again.items()} == {name: int(t) for name, t in before[last].items()}
        assert int(memory.load(RUN, 0, last + 1)["round"]) == last
        assert len(list(Path(folder).rglob("*.safetensors"))) <= 2


def test_a_round_played_again_undoes_the_future(tmp_path):
    memory = ClientStateStore(tmp_path)
    for round in (1, 2, 3):
        memory.save(RUN, 0, round, {"round": torch.tensor(round)})
    memory.save(RUN, 0, 2, {"round": torch.tensor(22)})
    assert int(memory.load(RUN, 0, 9)["round"]) == 22


@pytest.mark.parametrize("run", ["../../../../tmp/x", "", "0123456789ABCDEF", "0" * 15, "0" * 17])
def test_a_run_id_from_the_network_is_never_a_path(tmp_path, run):
    with pytest.raises(ClientError, match="16 hexadecimal digits"):
        ClientStateStore(tmp_path).save(run, 0, 1, {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_memory_is_named(tmp_path):
    memory = ClientStateStore(tmp_path)
    memory.save(RUN, 0, 1, {"a": torch.ones(3)})
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ClientError, match=r"client 0 can't read what it kept in .*safetensors"):
        memory.load(RUN, 0, 2)


def test_a_disk_that_takes_nothing_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClientError, match="client 0 can't keep its state"):
        ClientStateStore(tmp_path / "file").save(RUN, 0, 1, {"a": torch.ones(3)})


def test_resume_equals_uninterrupted_with_clients_that_remember(small_run, tmp_path):
    whole = small_run(*WORDS, name="whole", rounds=4)
    parts = small_run(*WORDS, name="parts", rounds=2)
    plain = small_run(name="plain", rounds=4)
    run_local(compose([*SMALL, *WORDS, "rounds=4", f"out={parts}"]), resume=str(parts))
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"] != summary_of(plain)["state_sha256"]


def test_a_round_that_was_cut_off_is_played_again_from_the_same_memories(small_run, tmp_path):
    """The third client of round 3 pulls the plug; by then two have already kept what they learnt in round 3."""
    whole = small_run(*WORDS, name="whole", rounds=4)
    inner = make_client_app()
    trained = []
    app = ClientApp()
    app.query()(lambda message, context: inner(message, context))

    @app.train()
    def train(message, context):
        trained.append(message.metadata.group_id)
        if trained.count("3") == 3:
            raise KeyboardInterrupt
        return inner(message, context)

    with pytest.raises(Exception, match="interrupted after round 2"):
        run_on(LocalGrid, app, tmp_path / "parts", *WORDS, "rounds=4")
    run_local(compose([*SMALL, *WORDS, "rounds=4", f"out={tmp_path / 'parts'}"]), resume=str(tmp_path / "parts"))
    assert summary_of(tmp_path / "parts")["state_sha256"] == summary_of(whole)["state_sha256"]


def test_a_new_run_knows_nothing_of_the_one_before(small_run, tmp_path, monkeypatch):
    """On a device all runs share one folder; here two of them do."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    one = small_run(*WORDS, "runtime.name=flower", name="one", rounds=3)
    again = small_run(*WORDS, "runtime.name=flower", name="again", rounds=3)
    assert summary_of(one)["state_sha256"] == summary_of(again)["state_sha256"]
    assert len(list((tmp_path / "home" / "clients").iterdir())) == 2


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_state_with_memories(tmp_path, small_run):
    whole = small_run(*WORDS, name="whole", rounds=30)
    folder = tmp_path / "killed"
    words = [*SMALL, *WORDS, "rounds=30", f"out={folder}"]
    code = (
        "import sys; from fedtune.commands.main import main\n"
        "sys.path[:], words = sys.argv[1].split('|'), sys.argv[2:]; sys.exit(main(['run', *words]))"
    )
    process = forked.Popen([sys.executable, "-c", code, "|".join(sys.path), *words])  # which finds the test's client
    while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().splitlines()) < 8:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert summary_of(folder)["status"] == "running"
    run_local(compose(words), resume=str(folder))
    assert summary_of(folder)["state_sha256"] == summary_of(whole)["state_sha256"]
