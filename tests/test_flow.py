"""Asynchronous rounds of three devices, worked out by hand.

Links take no time, so a turn takes what its steps do: 1 unit on the fast device, 2.7 on the middle one and 4.2 on the
slow one. All three are at work at any time. `v` is how often the server had been updated when a client was asked.

FedAsync, whose server takes each answer by itself, so that the u-th is u - 1 - v updates behind when it is there:

    at    0   all are asked, v = 0
          1   fast  v 0   update 1   0 behind   asked again, v = 1
          2   fast  v 1   update 2   0          asked, v = 2
          2.7 mid   v 0   update 3   2          asked, v = 3
          3   fast  v 2   update 4   1          asked, v = 4
          4   fast  v 4   update 5   0          asked, v = 5
          4.2 slow  v 0   update 6   5          asked, v = 6
          5   fast  v 5   update 7   1          asked, v = 7
          5.4 mid   v 3   update 8   4

FedBuff with a buffer of 2. Who has answered to what the server holds waits until that changes:

    at    0   all are asked, v = 0
          1   fast  v 0   2.7 mid   v 0    update 1   0 and 0 behind    fast and mid are asked at 2.7, v = 1
          3.7 fast  v 1   4.2 slow  v 0    update 2   0 and 1           fast and slow are asked at 4.2, v = 2
          5.2 fast  v 2   5.4 mid   v 1    update 3   0 and 1           fast and mid are asked at 5.4, v = 3
          6.4 fast  v 3   8.1 mid   v 3    update 4   0 and 0           (slow, asked at 4.2, ends at 8.4)
"""

from dataclasses import replace

import pytest
from conftest import rows, run_on, small, summary_of
from test_clock import bytes_of, unit, without_real_seconds
from test_contract import tampering_app

from fedtune.core.errors import ConfigError, QuorumError
from fedtune.core.protocol import ClientInfo
from fedtune.runs.checkpoint import load_checkpoint, state_sha256
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace

SLOWER = (1, 2.7, 4.2)
THREE = "".join(f"{name},{1e9 / times!r},,,,,,\n" for name, times in zip(("fast", "mid", "slow"), SLOWER, strict=True))
FOUR = THREE + "last,3e8,,1e5,1e5,,,\n"

# By round: who, asked when, and how many updates behind
ASYNC = [
    [(0, 0, 0)], [(0, 1, 0)], [(1, 0, 2)], [(0, 2, 1)], [(0, 3, 0)], [(2, 0, 5)], [(0, 4, 1)], [(1, 2.7, 4)],
]  # fmt: skip
BUFFERED = [
    [(0, 0, 0), (1, 0, 0)], [(0, 2.7, 0), (2, 0, 1)], [(0, 4.2, 0), (1, 2.7, 1)], [(0, 5.4, 0), (1, 5.4, 0)],
]  # fmt: skip
METHODS = {
    "fedasync": (("method=fedasync",), ASYNC),
    "fedbuff": (("method=fedbuff", "method.strategy.buffer=2"), BUFFERED),
}


@pytest.mark.parametrize("method", METHODS)
def test_three_devices_by_hand(method, devices, small_run, tmp_path):
    """Who answers when, and the state: each turn is played anew, from what the server then held, and folded in."""
    words, expected = METHODS[method]
    folder = small_run(*devices(THREE), *words, rounds=len(expected))
    table = rows(folder, "clock.csv")
    unit = float(table[0]["compute_seconds"])
    metrics = rows(folder, "metrics.csv")
    workspace = Workspace(small(*devices(THREE), *words, out=tmp_path / "again"))
    states = [workspace.strategy.init(workspace.layout)]
    for number, came in enumerate(expected, 1):
        lines = [row for row in table if int(row["round"]) == number]
        read = [(int(row["client"]), float(row["begun_seconds"]) / unit, int(row["staleness"])) for row in lines]
        assert [(peer, stale) for peer, _, stale in read] == [(peer, stale) for peer, _, stale in came]
        assert [begun for _, begun, _ in read] == pytest.approx([begun for _, begun, _ in came], rel=1e-9)
        for row in lines:
            assert float(row["compute_seconds"]) == pytest.approx(SLOWER[int(row["client"])] * unit, rel=1e-9)
            assert row["excluded_reason"] == ""
        end = max(begun + SLOWER[peer] for peer, begun, _ in came)
        assert float(metrics[number]["virtual_seconds"]) == pytest.approx(end * unit, rel=1e-9)
        assert metrics[number]["clients"] == str(len(came))
        replies = []
        for index, _, staleness in came:
            version = number - 1 - staleness
            peer = ClientInfo(index, workspace.samples(index), staleness=staleness)
            told = workspace.strategy.configure(states[version], version + 1, peer)
            update = local_update(workspace, "0" * 16, index, version + 1, told)
            replies.append((peer, replace(update, start=told.tensors)))
        states.append(workspace.strategy.aggregate(states[-1], number, replies))
    assert summary_of(folder)["state_sha256"] == state_sha256(states[-1])


def progress_of(folder, *words):
    workspace = Workspace(small(*words, out=folder))
    return load_checkpoint(
        folder / "checkpoint" / "state.safetensors", workspace.strategy.init(workspace.layout)
    ).progress


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("fedasync", ()),
        ("fedbuff", ("codec=int8", "population.dropout=0.3", "population.quorum=0.1")),
        *(
            (
                method,
                (
                    "codec=stc",
                    "train.lr=0.01",
                    "population.dropout=0.3",
                    "population.quorum=0.1",
                    "population.cohort=3",
                ),
            )
            for method in METHODS
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else (*value, "raw")[0],
)
def test_a_resumed_run_is_the_same_to_the_last_bit(method, more, devices, small_run):
    """Stopped while clients are at work. stc's broadcasts build on one another; who dropped out is sent the whole."""
    words = (*devices(FOUR), *METHODS[method][0], *more)
    whole, parts = small_run(*words, name="whole", rounds=7), small_run(*words, name="parts", rounds=4)
    assert progress_of(parts, *words).pending
    run_local(small(*words, "rounds=7", out=parts), resume=str(parts))
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"]
    assert without_real_seconds(parts) == without_real_seconds(whole)
    assert (parts / "clock.csv").read_text() == (whole / "clock.csv").read_text()
    assert rows(parts, "failures.csv") == rows(whole, "failures.csv")
    assert bytes_of(parts) == bytes_of(whole)


def test_a_client_that_fails_is_asked_once_for_each_state_and_holds_nobody_up(devices, tmp_path):
    def broken(index, reply):
        if index == 0:
            raise ConnectionError("the battery is flat")
        return reply

    words = (*devices(THREE), *METHODS["fedasync"][0], "rounds=5")
    run_on(LocalGrid, tampering_app(broken), tmp_path / "run", *words)
    failures = rows(tmp_path / "run", "failures.csv")
    assert [(row["round"], row["client"]) for row in failures] == [(number, "0") for number in "12345"]
    assert "the battery is flat" in failures[0]["error"]
    assert {row["client"] for row in rows(tmp_path / "run", "clock.csv")} == {"1", "2"}
    assert [row["failed"] for row in rows(tmp_path / "run", "metrics.csv")] == ["0", "1", "1", "1", "1", "1"]


def test_an_update_is_made_of_what_came_if_that_is_a_quorum(devices, tmp_path):
    """Of three clients one never answers, so a buffer of three is never full."""

    def broken(index, reply):
        if index == 0 or (reply.metadata.group_id == "3" and index == 1):
            raise ConnectionError("the battery is flat")
        return reply

    words = (*devices(THREE), "method=fedbuff", "method.strategy.buffer=3", "rounds=3", "population.quorum=0.6")
    folder = tmp_path / "run"
    with pytest.raises(
        QuorumError, match=r"round 3: 1 of 3 .* nobody is left to ask, .* asks for 2; client 0: .* flat"
    ):
        run_on(LocalGrid, tampering_app(broken), folder, *words)
    assert [row["clients"] for row in rows(folder, "metrics.csv")] == ["0", "2", "2"]
    assert [row["round"] for row in rows(folder, "failures.csv")] == ["1", "2", "3", "3"]
    run_local(small(*words, out=folder), resume=str(folder))
    assert rows(folder, "metrics.csv")[3]["clients"] == "3"


def test_who_drops_out_is_drawn_by_the_seed(devices, small_run):
    folder = small_run(*devices(THREE), *METHODS["fedasync"][0], "population.dropout=0.4", rounds=4)
    failures = {(int(row["round"]), int(row["client"])) for row in rows(folder, "failures.csv")}
    asked = {
        (int(row["round"]), int(row["client"]))
        for row in rows(folder, "ledger.csv")
        if (row["direction"], row["part"]) == ("down", "train")
    }
    assert failures == {place for place in asked if unit("dropout", *place) < 0.4} != set()
    assert len([row for row in rows(folder, "clock.csv") if row["excluded_reason"]]) == len(failures)


def test_a_client_that_does_not_come_back_has_answered_all_the_same(devices, tmp_path, small_run):
    """After a resume without the slow one, what it had sent before counts when the clock comes to it."""
    words = (*devices(THREE), *METHODS["fedasync"][0])
    whole, parts = small_run(*words, name="whole", rounds=6), small_run(*words, name="parts", rounds=4)

    class WithoutSlow(LocalGrid):
        def get_node_ids(self):
            return list(super().get_node_ids())[:2]

    from fedtune.runtime.app import make_client_app, make_server_app
    from fedtune.runtime.local import server_context

    config = {"config": small(*words, "runtime.wait=1", "rounds=6", out=parts).text()}
    grid = WithoutSlow(make_client_app(), 3, config)
    make_server_app(resume=str(parts))(grid=grid, context=server_context(config))
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"]
    assert rows(parts, "clock.csv")[-1]["client"] == "2"


def test_two_answers_of_one_client_in_a_round_are_both_written(devices, small_run):
    """Two of three are at work, so one may be asked late, be done soon after the update, and be asked again."""
    words = (*devices("a,5e8,,,,,,\nb,4e8,,,,,,\nc,1e9,,,,,,\n", "method=fedbuff"), "method.strategy.buffer=2")
    folder = small_run(*words, "population.cohort=2", "seed=2", rounds=4)
    came = [[row["client"] for row in rows(folder, "clock.csv") if row["round"] == str(n)] for n in range(1, 5)]
    assert came[1] == ["2", "2"]
    assert [len(peers) for peers in came] == [2, 2, 2, 2]


def test_similarity_is_of_the_updates_that_count(devices, small_run):
    folder = small_run(*devices(THREE), *METHODS["fedbuff"][0], "codec=int8", "evaluate.similarity=true", rounds=3)
    pairs = [(row["round"], row["client"], row["other"]) for row in rows(folder, "similarity.csv")]
    assert pairs == [(str(n), *map(str, sorted(who for who, _, _ in came))) for n, came in enumerate(BUFFERED[:3], 1)]


def test_without_limits_rounds_are_synchronous_and_a_note_says_so(small_run, capsys):
    folder = small_run(*METHODS["fedasync"][0])
    assert [row["clients"] for row in rows(folder, "metrics.csv")] == ["0", "3", "3"]
    assert capsys.readouterr().out.count("nobody is faster than another and rounds are synchronous") == 1


def test_a_buffer_that_can_never_be_full_is_refused(devices, small_run):
    with pytest.raises(ConfigError, match=r"takes 4 updates, and 3 clients with rows .* method.strategy.buffer=3 or"):
        small_run(*devices(THREE), "method=fedbuff")
