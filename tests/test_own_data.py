"""Data that clients bring: files and users as clients, and devices that read their own under their owner's rules."""

import json
import re

import pytest
from conftest import PAIRS, SMALL, rows, summary_of
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedtune.config.compose import compose, load
from fedtune.core.errors import ConfigError, DataError
from fedtune.data.federated_data import load_data
from fedtune.data.own_data import counted
from fedtune.device.owner import device_owner
from fedtune.models.tiny import tiny_tokenizer
from fedtune.runtime.app import make_server_app
from fedtune.runtime.local import LocalGrid, run_local, server_context
from fedtune.workspace.client_handler import handle_message

LINES = PAIRS.read_text().splitlines()
SHARES = {
    "clinic": LINES[:20],
    "office": LINES[20:45] + LINES[20:23],
    "school": LINES[45:],
}  # unequal, one with repeats
WORDS = tuple(word for word in SMALL if not word.startswith(("data.", "population.")))


@pytest.fixture
def files(tmp_path):
    """A folder with a file for each of three clients."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, lines in SHARES.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def simulated(*words, out, **settings):
    experiment = compose([*WORDS, *words, f"out={out}"])
    run_local(experiment)
    return experiment


def deployed(files, home, monkeypatch, *words, rules={}):  # noqa: B006
    """The same run on devices that read their own files, in this process: real messages, real owners."""
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    names = sorted({*SHARES, *rules})
    for index, name in enumerate(names):
        where, share = home / name, files / (name if name in SHARES else "office")
        where.mkdir(parents=True)
        (where / "device.toml").write_text(
            f'name = "{name}"\nindex = {index}\n{rules.get(name, "")}\n[data]\npath = "{share}.jsonl"\n'
        )
    app = ClientApp()

    def answer(message, context):
        config = {"device-file": str(home / names[context.node_config["partition-id"]] / "device.toml")}
        at = message.metadata
        told = handle_message(
            at.message_type, at.group_id, message.content, context.run_config, config, device_owner(config)
        )
        return Message(told.content, reply_to=message)

    app.query()(answer)
    app.train()(answer)
    app.evaluate()(answer)
    experiment = compose([*WORDS, "runtime=flower", "data.partition=own", *words])
    config = {"config": experiment.text()}
    make_server_app()(grid=LocalGrid(app, len(names), config), context=server_context(config))
    return experiment


def same_run(one, other):
    same = ("eval_loss", "train_loss", "clients", "failed", "up_payload_bytes", "down_payload_bytes")
    assert summary_of(one)["state_sha256"] == summary_of(other)["state_sha256"]
    for row, its in zip(rows(one, "metrics.csv"), rows(other, "metrics.csv"), strict=True):
        assert {name: row[name] for name in same} == {name: its[name] for name in same}
    assert rows(one, "clients.csv") == rows(other, "clients.csv")


def test_devices_with_files_of_their_own_end_in_the_bits_of_a_simulation_over_them(files, tmp_path, monkeypatch):
    words = ("rounds=2", "codec=compeft", "codec_up.feedback=true")
    simulated(*words, f"data.path={files}", "data.partition=files", out=tmp_path / "simulated")
    deployed(files, tmp_path / "home", monkeypatch, *words, "population.clients=3", f"out={tmp_path / 'deployed'}")
    same_run(tmp_path / "simulated", tmp_path / "deployed")
    named = {row["client"]: row["name"] for row in rows(tmp_path / "deployed", "clients.csv")}
    assert named == {"0": "clinic", "1": "office", "2": "school"}


def test_a_server_with_a_test_of_its_own_scores_on_it(files, tmp_path, monkeypatch):
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(LINES[:9]) + "\n")
    words = ("rounds=1", f"data.heldout_path={test}")
    simulated(*words, f"data.path={files}/*.jsonl", "data.partition=files", out=tmp_path / "simulated")
    deployed(files, tmp_path / "home", monkeypatch, *words, "population.clients=3", f"out={tmp_path / 'deployed'}")
    same_run(tmp_path / "simulated", tmp_path / "deployed")
    assert summary_of(tmp_path / "simulated")["data"]["server_heldout"] == 9
    assert not rows(tmp_path / "simulated", "clients.csv")


def split(*words):
    experiment = counted(compose([*WORDS, *words]))
    return experiment, load_data(experiment.data, experiment.population.clients, tiny_tokenizer(), experiment.seed)


def test_a_client_trains_on_its_rows_alone_each_of_them_once(files):
    experiment, data = split(f"data.path={files}", "data.partition=files", "data.client_heldout=0.2")
    assert (experiment.population.clients, data.names) == (3, ("clinic", "office", "school"))
    for index, name in enumerate(data.names):
        held = [*data.train[index], *data.heldout[index]]
        assert len(set(held)) == len(held) == len(set(SHARES[name]))
        assert len(data.heldout[index]) == round(0.2 * len(held))
    assert data.repeated == 3  # within one file; what two files share is nobody's to know
    assert len(data.server) == 0


@pytest.mark.parametrize("form", ["a column", "an object of users", "a column within another"])
def test_users_are_clients(tmp_path, form):
    table = [{**json.loads(line), "who": f"u{place % 4}"} for place, line in enumerate(LINES[:40])]
    path, words = tmp_path / "all.json", ["data.user_column=who"]
    if form == "an object of users":
        found = {f"u{n}": [{k: v for k, v in row.items() if k != "who"} for row in table[n::4]] for n in (3, 1, 0, 2)}
        path.write_text(json.dumps(found))
        words = ["data.partition=users"]
    elif form == "a column within another":
        path.write_text(json.dumps([{**row, "meta": {"who": row.pop("who")}} for row in table]))
        words = ["data.user_column=meta.who"]
    else:
        path.write_text(json.dumps(table))
    experiment, data = split(f"data.path={path}", *words)
    assert data.names == ("u0", "u1", "u2", "u3")
    assert [len(data.train[n]) + len(data.heldout[n]) for n in range(4)] == [10] * 4
    assert load(experiment.text()) == experiment
    assert split(f"data.path={path}", *words)[1].sha256 == data.sha256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.partition=own"], r"runtime=local has no devices.*data\.partition=files"),
        (["data.partition=own", "data.path=x.jsonl", "runtime=flower"], "each device reads what its owner names"),
        (["data.heldout_path=x.jsonl"], "elsewhere it is a share, data.heldout"),
        (["data.user_column=who", "data.partition=natural"], "leave one of them out"),
        (["data.partition=files", "method=centralized", "population.clients=3"], "each client keeps its own"),
        (["population.clients=connected"], "clients come and go on devices"),
        (["population.clients=connected", "runtime=flower", "method=scaffold"], "goes by the number of all clients"),
        (["population.clients=connected", "runtime=flower", "population.min_clients=0"], r"population\.min_clients=0"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(words)


def test_what_is_no_folder_of_files_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="is one file: give a folder"):
        split(f"data.path={files}/clinic.jsonl", "data.partition=files")
    with pytest.raises(ConfigError, match="makes 3 clients, not 5: leave"):
        split(f"data.path={files}", "data.partition=files", "population.clients=5")
    with pytest.raises(ConfigError, match=r"data\.user_column=who: clinic.jsonl line 1 has no such column"):
        split(f"data.path={files}/clinic.jsonl", "data.user_column=who")
    with pytest.raises(DataError, match="expected files, a folder"):
        split("data.path=owner/name", "data.partition=files")


LIMITS = {
    'methods = ["flora"]': r"method=fedit: this device's owner allows methods = \['flora'\]",
    'adapters = "dora"': r"adapter=lora: this device's owner allows adapters = \['dora'\]",
    "steps = 1": "2 steps in a round: this device's owner allows steps = 1",
    "examples = 7": "8 examples in a round: this device's owner allows examples = 7",
    "memory_bytes = 1e6": "memory bytes in a round: this device's owner allows memory_bytes = 1e",
    "message_bytes = 3000": "a message of .* this device's owner allows message_bytes = 3,000",
    "rounds_a_day = 1": "allows rounds_a_day = 1 .*and this message would make it 2",
    "bytes_a_day = 20000": "allows bytes_a_day = 20,000",
    "seconds = 1e-9": "training takes longer than seconds = 1e-09",
}


@pytest.mark.slow
def test_a_run_that_asks_for_more_than_an_owner_allows_is_refused_in_words_and_booked(
    files, tmp_path, monkeypatch, capsys
):
    """Of devices that each have one limit beside three that have none; the round goes on with these."""
    rules = {f"limited{place}": f"[limits]\n{limit}\n" for place, limit in enumerate(LIMITS)}
    clients = len(SHARES) + len(rules)
    words = ("rounds=2", f"population.clients={clients}", f"population.cohort={clients}", "population.quorum=0.2")
    words += ("runtime.wait=1", "evaluate.every=0", f"out={tmp_path / 'run'}")
    deployed(files, tmp_path / "home", monkeypatch, *words, rules=rules)
    failures = rows(tmp_path / "run", "failures.csv")
    names = sorted({*SHARES, *rules})
    assert {names[int(row["client"])] for row in failures} == rules.keys()
    assert summary_of(tmp_path / "run")["status"] == "finished"
    printed = capsys.readouterr().out.split()  # what can't take part in any round is said there
    for name, limit in zip(rules, LIMITS, strict=True):
        said = " ".join([*(row["error"] for row in failures if names[int(row["client"])] == name), *printed])
        assert re.search(LIMITS[limit], said), (limit, said)
