"""The in-process Grid, and a round loop that waits no longer than it was told to."""

import re
import time
from collections.abc import Iterable

import pytest
from conftest import SMALL, run_on, summary_of
from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config.compose import compose
from fedtune.core.errors import ClientError, ClientTimeout, QuorumError, WireError
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid


def run(grid_class, folder, *overrides, app=None):
    return run_on(grid_class, app or make_client_app(), folder, "population.cohort=4", "rounds=1", *overrides)


class Unreliable(LocalGrid):
    """A Grid on the way of which train replies get lost, doubled, or joined by a stranger's."""

    takes_turns = False

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        return [kept for reply in replies for kept in self.carry(reply)]

    def carry(self, reply):
        return [reply]


class Losing(Unreliable):
    def carry(self, reply):
        lost = (
            reply.metadata.message_type == MessageType.TRAIN and reply.metadata.src_node_id == list(self._contexts)[2]
        )
        return [] if lost else [reply]


class Doubling(Unreliable):
    def carry(self, reply):
        return [reply, reply]


class Crowded(Unreliable):
    def carry(self, reply):
        stranger = Message(reply.content, reply_to=reply)  # answers something that nobody asked
        stranger.metadata.__dict__["_reply_to_message_id"] = "f" * 64
        return [stranger, reply]


def test_a_reply_that_never_comes_is_booked_when_time_is_up(tmp_path):
    begun = time.monotonic()
    run(Losing, tmp_path / "run", "runtime.timeout=4")
    assert time.monotonic() - begun < 30
    assert "no reply within 4 s" in (tmp_path / "run" / "failures.csv").read_text()
    assert "1,2,up,failed,0,0,0," in (tmp_path / "run" / "ledger.csv").read_text()
    assert summary_of(tmp_path / "run")["totals"]["failed"] == 1


@pytest.mark.parametrize("grid", [Doubling, Crowded])
def test_a_reply_that_comes_twice_or_from_a_stranger_changes_nothing(tmp_path, grid):
    run(LocalGrid, tmp_path / "plain")
    run(grid, tmp_path / "odd")
    assert summary_of(tmp_path / "odd")["state_sha256"] == summary_of(tmp_path / "plain")["state_sha256"]
    assert summary_of(tmp_path / "odd")["totals"]["failed"] == 0


class Deserted(LocalGrid):
    def get_node_ids(self):
        return list(super().get_node_ids())[:3]


def test_clients_that_never_come_are_waited_for_no_longer_than_told(tmp_path):
    with pytest.raises(QuorumError, match=r"3 of 4 clients came within runtime\.wait=1 s.* asks for 4; not there: 3"):
        run(Deserted, tmp_path / "run", "runtime.wait=1", "population.quorum=1")


def test_a_quorum_goes_on_without_those_who_never_came(tmp_path, capsys):
    run(Deserted, tmp_path / "run", "runtime.wait=1")
    assert "going on without client 3" in capsys.readouterr().out
    assert "1,3,its node is not connected" in (tmp_path / "run" / "failures.csv").read_text()
    assert "1,3,up,failed,0,0,0," in (tmp_path / "run" / "ledger.csv").read_text()
    assert summary_of(tmp_path / "run")["totals"]["failed"] == 1


class Returning(LocalGrid):
    """The third node is gone in round 2 and back, as another node, in round 3."""

    round = 0

    def get_node_ids(self):
        nodes = list(super().get_node_ids())
        return [node for node in nodes if node != self.absent()]

    def absent(self):
        return self.third() if self.round == 2 else None

    def third(self):
        return list(self._contexts)[2]

    def push_messages(self, messages):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == MessageType.TRAIN:
            self.round = int(messages[0].metadata.group_id) + 1
            if self.round == 3:  # back without its key
                self._contexts[777] = self._contexts.pop(self.third())
                self._contexts[777].node_id = 777
        return super().push_messages(messages)


def test_a_client_that_comes_back_as_another_node_is_the_same_client(tmp_path, capsys):
    run(Returning, tmp_path / "run", "rounds=3")
    assert "client 2 is back, on another node" in capsys.readouterr().out
    failures = (tmp_path / "run" / "failures.csv").read_text().splitlines()[1:]
    assert failures == ["2,2,its node is not connected"]


def greeting_app(change):
    app, inner = ClientApp(), make_client_app()

    @app.query()
    def greet(message, context):
        reply = inner(message, context)
        change(reply.content["greeting"])
        return reply

    app.train()(inner)
    return app


def changed_for(place, change):
    """Has one client, of that place, greet otherwise."""
    return greeting_app(lambda greeting: change(greeting) if greeting["index"] == place else None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": 0}, "two nodes say they are client 0"),
        ({"index": 7}, r"client index should be 0 \.\.\. 3, got 7"),
        ({"samples": 0}, "client 3 says it has 0 samples; the division gives it"),
        ({"samples": 10**6}, "client 3 says it has 1000000 samples; the division gives it"),
        ({"layout": "0" * 64}, "client 3 has other trainable tensors"),
        ({"memory_bytes": "a\x1b[2J"}, "client 3 describes what it can do in a way that is not understood"),
    ],
    ids=[
        "another's index",
        "an index that isn't",
        "no samples",
        "all samples",
        "another model",
        "a limit that is none",
    ],
)
def test_one_node_that_is_set_up_wrongly_is_left_out(tmp_path, capsys, change, said):
    """At once, for in one process nobody else will come; and named, where the rest is no quorum."""
    app = changed_for(3, lambda greeting: greeting.update(change))
    run(LocalGrid, tmp_path / "run", app=app)
    out = capsys.readouterr().out
    assert re.search(f"a node that came can't take part: {said}", out)
    assert "3 of 4 clients came" in out
    assert "\x1b" not in out
    assert summary_of(tmp_path / "run")["totals"]["failed"] == 1
    with pytest.raises(WireError, match=f"1 of the 4 clients .* population.quorum asks for 4: {said}"):
        run(LocalGrid, tmp_path / "all", "population.quorum=1", app=app)


def test_a_node_that_is_too_slow_at_first_is_asked_again(tmp_path, capsys, monkeypatch):
    """A device whose worker has to load the base first may take longer than it is given; that is no wrong setup."""
    monkeypatch.setattr("fedtune.server.client_registry.AGAIN_SECONDS", 0.2)
    tries = []

    def change(greeting):
        if greeting["index"] == 3 and len(tries) < 2:
            tries.append(1)
            raise ClientTimeout("the worker did not answer within 600 s; it was stopped")

    run(LocalGrid, tmp_path / "run", "population.quorum=1", app=greeting_app(change))
    assert capsys.readouterr().out.count("ClientTimeout: the worker did not answer within 600 s") == 2
    assert summary_of(tmp_path / "run")["totals"]["failed"] == 0


def test_two_nodes_with_one_index_are_refused(tmp_path):
    with pytest.raises(WireError, match="two nodes say they are client 0"):
        run(LocalGrid, tmp_path / "run", app=greeting_app(lambda greeting: greeting.update(index=0)))


def test_a_client_with_another_model_is_refused_at_the_handshake(tmp_path):
    with pytest.raises(WireError, match="client 0 has other trainable tensors than the server"):
        run(LocalGrid, tmp_path / "run", app=greeting_app(lambda greeting: greeting.update(layout="0" * 64)))


@pytest.mark.parametrize(
    "change", [lambda greeting: greeting.update(data="0" * 64), lambda greeting: greeting.pop("data")]
)
def test_a_client_with_other_data_is_refused_at_the_handshake(tmp_path, change):
    with pytest.raises(WireError, match="client 0 holds other data than the server"):
        run(LocalGrid, tmp_path / "run", app=greeting_app(change))


def test_a_client_that_fails_at_the_handshake_says_why(tmp_path):
    def fail(greeting):
        raise ValueError("no such camera")

    with pytest.raises(ClientError, match="ValueError: no such camera"):
        run(LocalGrid, tmp_path / "run", app=greeting_app(fail))


def test_a_message_to_nobody_is_answered_with_an_error():
    grid = LocalGrid(make_client_app(), 2, {"config": compose([*SMALL]).text()})
    message = Message(RecordDict(), 12345, MessageType.QUERY, group_id="0")
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert "no node 12345" in reply.error.reason


def test_what_a_client_does_to_its_instruction_reaches_nobody_else(tmp_path):
    """Every client is handed tensors and settings of its own, whatever it does to them."""
    from fedtune.workspace import client_handler

    run(LocalGrid, tmp_path / "plain")
    original = client_handler._train

    def spoil(workspace, asked, beside):
        update = yield from original(workspace, asked, beside)
        for tensor in asked.told.tensors.values():
            tensor.fill_(1e9)
        asked.told.tensors.clear()
        return update

    client_handler._train = spoil
    try:
        run(LocalGrid, tmp_path / "spoilt")
    finally:
        client_handler._train = original
    assert summary_of(tmp_path / "plain")["state_sha256"] == summary_of(tmp_path / "spoilt")["state_sha256"]
