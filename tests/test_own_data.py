"""Data that clients bring: files and users as clients, and devices that read their own under their owner's rules."""

import json

import pytest
from conftest import PAIRS, SMALL, rows, small, summary_of
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedtune.config.compose import compose, load
from fedtune.core.errors import ConfigError, DataError
from fedtune.data.federated_data import load_data
from fedtune.device.owner import device_owner
from fedtune.models.tiny import tiny_tokenizer
from fedtune.runtime.app import make_server_app
from fedtune.runtime.local import LocalGrid, run_local, server_context
from fedtune.workspace.client_handler import handle_message

LINES = PAIRS.read_text().splitlines()
SHARES = {"clinic": LINES[:20], "office": LINES[20:45] + LINES[20:23], "school": LINES[45:]}  # unequal, one with repeats
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


def deployed(files, home, monkeypatch, *words, toml=""):
    """The same run on devices that read their own files, in this process: real messages, real owners."""
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    for index, name in enumerate(sorted(SHARES)):
        where = home / name
        where.mkdir(parents=True)
        (where / "device.toml").write_text(
            f'name = "{name}"\nindex = {index}\n{toml}\n[data]\npath = "{files / name}.jsonl"\n'
        )
    names = sorted(SHARES)
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
