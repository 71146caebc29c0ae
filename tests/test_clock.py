"""The virtual clock, against a round of three devices by hand.

The clients are the three rows of a CSV, and take K steps of b = 4 examples each on the toy model:

    device   flop_per_s   read_bytes_per_s   up_bytes_per_s   down_bytes_per_s
    fast     1e9                             1e6              1e6
    mid      5e8          1e9                1e6              2e6
    slow     1e8                             1e5              1e5

With P trained numbers and the printed equations (fedtune/core/costs.py), l = 0 being the lowest block with an adapter
and a base in 32 bits, which is no slower than in 16,

    T         = sum (input_bytes columns_j + inner_bytes r_j)
    flop      = b (forward_flop + backward_flop[0] + 6 typical_tokens P)
    compute   = K (flop / flop_per_s + read_bytes[0] / read_bytes_per_s)      no limit: nothing
    memory    = base_bytes[32] + fixed_bytes + b (saved_bytes[0] + head_bytes + tokens T) + 16 P
    seconds   = down / down_bytes_per_s + compute + up / up_bytes_per_s

where down and up are what crossed the grid, less the addresses. flop is 2.85e7, and both messages are just below 12 kB,
so that K = 4 steps come to 0.14 s, 0.25 s and 1.38 s, of which the slow one's messages are 0.24 s and a step 0.28 s.

    wait      a round lasts 1.38 s, and its end is when the next begins
    drop      by 0.9 s: the slow one is asked and sends its bytes, and doesn't count; a round lasts 0.9 s
    partial   by 0.9 s: it takes floor((0.9 - 0.24) / 0.28) = 2 steps, and counts; a round lasts 0.81 s
"""

import json
import math
from dataclasses import dataclass, replace

import pytest
from conftest import rows, run_on, small, summary_of
from flwr.common.serde import message_to_proto
from hypothesis import given
from hypothesis import strategies as st
from test_contract import CapturingGrid, tampering_app

from clients.first_order import FirstOrder
from fedtune.core.errors import ConfigError, QuorumError
from fedtune.core.protocol import ClientInfo, DeviceProfile, Instruction
from fedtune.core.seeds import bits, derive_seed
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.server.virtual_clock import Clock
from fedtune.workspace.workspace import Workspace
from strategies.fedit import FedIT

THREE = "fast,1e9,,1e6,1e6,,,\nmid,5e8,1e9,1e6,2e6,,,\nslow,1e8,,1e5,1e5,,,\n"
RATES = {0: (1e9, math.inf, 1e6, 1e6), 1: (5e8, 1e9, 1e6, 2e6), 2: (1e8, math.inf, 1e5, 1e5)}
DEADLINE = 0.9
SEEDED = ("method=fedkseed", "method.strategy.rules.local_steps=2", "method.strategy.directions=64")


class Weighing(CapturingGrid):
    """Keeps, of each message, its bytes without the addresses."""

    def keep(self, message, direction, node):
        super().keep(message, direction, node)
        proto = message_to_proto(message)
        proto.ClearField("metadata")
        self.contents = getattr(self, "contents", {})
        place = (int(message.metadata.group_id), self.index[node], direction)
        self.contents.setdefault(place, []).append(len(proto.SerializeToString()))


def by_hand(workspace, rates, steps, down, up):
    """Seconds down, of the steps and up, and bytes of memory."""
    c, batch, numbers, rank = workspace.costs, 4, 2688, workspace.experiment.adapter.rank
    flop = batch * (c.forward_flop + c.backward_flop[0] + 6 * c.typical_tokens * numbers)
    compute = steps * (flop / rates[0] + c.read_bytes[0] / rates[1])
    per_token = sum(c.input_bytes * weight.columns + c.inner_bytes * rank for weight in workspace.weights)
    memory = c.base_bytes["32"] + c.fixed_bytes + batch * (c.saved_bytes[0] + c.head_bytes + c.tokens * per_token)
    return down / rates[3], compute, up / rates[2], memory + 16 * numbers


def clock_of(folder):
    return {(int(row["round"]), int(row["client"])): row for row in rows(folder, "clock.csv")}


@pytest.mark.parametrize("straggler", ["wait", "drop", "partial"])
def test_three_devices_by_hand(straggler, tmp_path, devices):
    folder = tmp_path / "run"
    late = () if straggler == "wait" else (f"population.straggler={straggler}", f"population.deadline={DEADLINE}")
    words = devices(THREE, "train.steps=4", "rounds=2", *late)
    grid = run_on(Weighing, make_client_app(), folder, *words)
    workspace, clock, seconds = Workspace(small(*words, out=folder)), clock_of(folder), 0.0
    booked = {
        (int(row["round"]), int(row["client"]), row["direction"]): row
        for row in rows(folder, "ledger.csv")
        if row["part"] in ("train", "failed")
    }
    metrics = rows(folder, "metrics.csv")
    assert metrics[0]["virtual_seconds"] == ""
    for number in (1, 2):
        lasted = 0.0
        for index, name in enumerate(("fast", "mid", "slow")):
            row = clock[number, index]
            ((down,), (up,)) = (grid.contents[number, index, way] for way in ("down", "up"))
            for way, size in (("down", down), ("up", up)):
                assert int(row[f"{way}_bytes"]) == size
                assert 0 < int(booked[number, index, way]["wire_bytes"]) - size < 150  # the addresses
            cut = straggler == "partial" and index == 2
            expected = by_hand(workspace, RATES[index], 2 if cut else 4, down, up)
            got = [float(row[key]) for key in ("download_seconds", "compute_seconds", "upload_seconds", "memory_bytes")]
            assert got == pytest.approx(list(expected), rel=1e-12)
            assert (row["device"], row["steps"], row["trainable_params"]) == (name, "2" if cut else "4", "2688")
            assert (row["bits"], row["batch_size"], row["limit_bytes"]) == ("32", "4", "")
            assert float(row["begun_seconds"]) == pytest.approx(seconds, rel=1e-12)
            missed = straggler == "drop" and index == 2
            assert bool(row["excluded_reason"]) == missed
            assert (booked[number, index, "up"]["part"] == "failed") == missed
            lasted = max(lasted, DEADLINE if missed else sum(expected[:3]))
        seconds += lasted
        assert float(metrics[number]["virtual_seconds"]) == pytest.approx(seconds, rel=1e-12)
        assert metrics[number]["clients"] == ("2" if straggler == "drop" else "3")
        assert lasted == pytest.approx({"wait": 1.38, "drop": 0.9, "partial": 0.81}[straggler], abs=0.01)
    assert summary_of(folder)["virtual_seconds"] == float(metrics[2]["virtual_seconds"])


def test_who_is_dropped_changes_nothing_but_the_time(tmp_path, devices, small_run):
    """The state is, to the last bit, that of a run in which the slow one never answers."""
    words = devices(THREE, "train.steps=4", "rounds=2")
    late = (*words, "population.straggler=drop", f"population.deadline={DEADLINE}")
    dropped = small_run(*late, name="dropped")

    def silent(index, reply):
        if index == 2:
            raise ConnectionError("the battery is flat")
        return reply

    run_on(LocalGrid, tampering_app(silent), tmp_path / "silent", *words)
    whole = small_run(*words, name="whole")
    states = [summary_of(folder)["state_sha256"] for folder in (dropped, tmp_path / "silent", whole)]
    assert states[0] == states[1] != states[2]
    failures = rows(dropped, "failures.csv")
    assert [(row["round"], row["client"]) for row in failures] == [("1", "2"), ("2", "2")]
    assert "virtual seconds, and population.deadline is 0.9" in failures[0]["error"]
    sent = [int(row["wire_bytes"]) for row in rows(dropped, "ledger.csv") if row["part"] == "failed"]
    assert len(sent) == 2
    assert min(sent) > 11_000


def test_nobody_waits_longer_than_the_deadline_for_who_never_answers(tmp_path, devices):
    def silent(index, reply):
        if index == 0:
            raise ConnectionError("the battery is flat")
        return reply

    words = devices(THREE, "rounds=1", "population.deadline=7")
    run_on(LocalGrid, tampering_app(silent), tmp_path / "run", *words)
    assert rows(tmp_path / "run", "metrics.csv")[1]["virtual_seconds"] == "7.0"


def unit(purpose, number, index):
    return (int(bits(derive_seed(0, purpose, number, index), 1)[0]) >> 11) * 2.0**-53


def test_who_drops_out_is_drawn_by_the_seed(small_run):
    words = ("population.cohort=4", "population.dropout=0.4")
    folder = small_run(*words, "population.quorum=0.1", rounds=2)
    drawn = [(n, k) for n in (1, 2) for k in range(4) if unit("dropout", n, k) < 0.4]
    failures = rows(folder, "failures.csv")
    assert [(int(row["round"]), int(row["client"])) for row in failures] == drawn
    assert {row["error"] for row in failures} == {"it dropped out, as population.dropout=0.4 has it"}
    first = next(n for n in (1, 2) if any(number == n for number, _ in drawn))
    with pytest.raises(QuorumError, match=rf"round {first}: . of 4 .* asks for 4; client \d: it dropped out"):
        small_run(*words, "population.quorum=1", name="strict", rounds=2)


def asked(folder):
    """The clients of each round."""
    found = {}
    for row in rows(folder, "ledger.csv"):
        if (row["direction"], row["part"]) == ("down", "train"):
            found.setdefault(int(row["round"]), set()).add(int(row["client"]))
    return found


def test_who_is_there_is_drawn_by_the_seed_and_the_device(small_run, devices):
    words = devices("a,,,,,,,\nb,,,,,,,0.5\nc,,,,,,,0.5\nd,,,,,,,\n")
    folder = small_run(*words, rounds=4)
    there = {n: {0, 3} | {k for k in (1, 2) if unit("available", n, k) < 0.5} for n in range(1, 5)}
    assert asked(folder) == there
    assert len(set(map(frozenset, there.values()))) > 1
    assert not rows(folder, "failures.csv")
    assert not rows(folder, "clock.csv")  # nothing is slow
    with pytest.raises(QuorumError, match=r"asks for 4; \d are away in this round, by their devices' availability"):
        small_run(*words, "population.quorum=1", name="strict", rounds=4)


def test_devices_that_are_too_small_are_named_and_left_out(small_run, devices, capsys):
    words = devices("big,1e9,,,,1e9,,\nold,1e9,,,,1e6,,\nolder,1e9,,,,1e6,,\nbig,1e9,,,,1e9,,\n")
    folder = small_run(*words)
    said = capsys.readouterr().out
    assert said.count("left out from round 1: client 1, which needs 111.6 MB of memory and has 1.0 MB: ") == 1
    assert said.count("2,688 trainable numbers, a batch of 4, a base in 32 bits (older)") == 1
    assert "from round 2" not in said
    assert summary_of(folder)["excluded"].keys() == {"1", "2"}
    assert asked(folder) == {1: {0, 3}, 2: {0, 3}}
    with pytest.raises(QuorumError, match=r"2 of 4 clients can .* asks for 4; client 1 needs 111.6 MB of memory"):
        small_run(*words, "population.quorum=1", name="strict")
    with pytest.raises(QuorumError, match=r"none of the 1 clients can take part; client 0 needs 111.6 MB"):
        small_run(*devices("old,1e9,,,,1e6,,\n"), name="nobody")


class Returning(LocalGrid):
    """After round 1 client 1 is back on another node, whose owner declares less memory."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._old = list(self._contexts)[1]
        self._new = self._old - 1
        node_config = {**self._contexts[self._old].node_config, "memory-bytes": 1e6}
        self._contexts[self._new] = replace(self._contexts[self._old], node_id=self._new, node_config=node_config)
        self._trained = False

    def push_messages(self, messages):
        messages = list(messages)
        self._trained |= any(message.metadata.message_type == "train" for message in messages)
        return super().push_messages(messages)

    def get_node_ids(self):
        gone = self._old if self._trained else self._new
        return [node for node in super().get_node_ids() if node != gone]


def test_a_device_may_come_back_as_another(tmp_path, devices, capsys):
    run_on(Returning, make_client_app(), tmp_path / "run", *devices(THREE, "rounds=2"))
    assert asked(tmp_path / "run") == {1: {0, 1, 2}, 2: {0, 2}}
    said = capsys.readouterr().out
    assert "client 1 is back, on another node" in said
    assert "left out from round 2: client 1, which needs 111.6 MB of memory" in said


def test_forward_only_devices_take_part_where_no_gradient_is_needed(small_run, devices, capsys):
    words = devices("a,1e9,,,,,,\nb,1e9,,,,,false,\n")
    assert asked(small_run(*words)) == {1: {0}, 2: {0}}
    assert "client 1, which can compute forward only" in capsys.readouterr().out
    folder = small_run(*words, *SEEDED, name="seeded")
    assert asked(folder) == {1: {0, 1}, 2: {0, 1}}
    row, workspace = clock_of(folder)[1, 1], Workspace(small(*words, *SEEDED, out=folder))
    c = workspace.costs  # 2 steps of 2 passes, and 10 bytes a weight
    assert float(row["compute_seconds"]) == pytest.approx(2 * 2 * 4 * c.forward_flop / 1e9, rel=1e-12)
    memory = c.base_bytes["32"] + c.fixed_bytes + 4 * c.head_bytes + 10 * workspace.model.trainable
    assert float(row["memory_bytes"]) == pytest.approx(memory, rel=1e-12)


@pytest.mark.parametrize("straggler", ["drop", "partial"])
def test_a_deadline_that_nobody_can_meet_is_refused(straggler, small_run, devices):
    late = (f"population.straggler={straggler}", "population.deadline=1e-3")
    with pytest.raises(
        QuorumError, match=r"deadline=0.001 virtual .* the fastest, client 0 \(fast\), needs 0.0[0-9]+\."
    ):
        small_run(*devices(THREE, *late))


TWO_SPEEDS = "fast,1e10,,1e7,1e7,,,\nslow,1e8,,1e5,1e5,,,\n" * 4


def test_clients_of_one_speed_wait_for_nobody(small_run, devices):
    words = (*devices(TWO_SPEEDS), "population.cohort=2")
    tiers = small_run(*words, "population.selection=speed_tier", "population.tiers=2", name="tiers", rounds=6)
    uniform = small_run(*words, name="uniform", rounds=6)
    assert all(len({index % 2 for index in cohort}) == 1 for cohort in asked(tiers).values())
    assert {min(cohort) % 2 for cohort in asked(tiers).values()} == {0, 1}
    assert summary_of(tiers)["virtual_seconds"] < summary_of(uniform)["virtual_seconds"]


def test_power_of_choice_takes_those_with_the_highest_losses_also_after_a_resume(small_run, tmp_path):
    words = ("population.selection=power_of_choice", "population.candidates=4", "population.cohort=2")
    whole, parts = small_run(*words, name="whole", rounds=5), small_run(*words, name="parts", rounds=3)
    losses = progress_of(parts).losses
    assert len(losses) == 4
    run_local(small(*words, "rounds=5", out=parts), resume=str(parts))
    assert asked(parts)[4] == {int(index) for index in sorted(losses, key=lambda index: -losses[index])[:2]}
    assert asked(parts) == asked(whole)
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"]


def progress_of(folder):
    state = FedIT().init(Workspace(small(out=folder)).model.layout)
    return load_checkpoint(folder / "checkpoint" / "state.safetensors", state).progress


def without_real_seconds(folder):
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "eval_seconds")} for row in rows(folder, "metrics.csv")
    ]


def bytes_of(folder):
    keys = ("round", "client", "direction", "part", "payload_bytes", "wire_bytes")
    return [tuple(row[key] for key in keys) for row in rows(folder, "ledger.csv") if row["part"] != "handshake"]


def test_a_resumed_run_has_the_same_time_to_the_last_bit(small_run, devices):
    """With broadcasts that build on one another, of which who dropped out is sent the whole afterwards, and with steps
    that follow from what messages took so far."""
    words = devices(
        THREE, "train.steps=4", "population.straggler=partial", "population.deadline=0.9", "population.dropout=0.3",
        "population.quorum=0.1", "codec=stc", "train.lr=0.01",
    )  # fmt: skip
    whole, parts = small_run(*words, name="whole", rounds=6), small_run(*words, name="parts", rounds=3)
    assert progress_of(parts).state_unknown
    with (parts / "clock.csv").open("a") as stream:
        stream.write((parts / "clock.csv").read_text().splitlines()[-1].replace("3,", "4,", 1) + "\n4,0,0.1\n")
    run_local(small(*words, "rounds=6", out=parts), resume=str(parts))
    assert without_real_seconds(parts) == without_real_seconds(whole)
    assert (parts / "clock.csv").read_text() == (whole / "clock.csv").read_text()
    assert bytes_of(parts) == bytes_of(whole)
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"]
    assert progress_of(parts) == progress_of(whole)


@pytest.mark.parametrize("method", ["full_delta", "flora", "scaffold", "fedpipe"])
def test_time_does_not_depend_on_what_the_base_has_come_to(method, small_run, devices):
    """Costs are taken from the model when the clock first asks, which after a resume is another moment."""
    words = devices(THREE, f"method={method}", "population.dropout=0.2", "population.quorum=0.1")
    whole, parts = small_run(*words, name="whole", rounds=3), small_run(*words, name="parts", rounds=2)
    run_local(small(*words, "rounds=3", out=parts), resume=str(parts))
    assert (parts / "clock.csv").read_text() == (whole / "clock.csv").read_text()
    assert bytes_of(parts) == bytes_of(whole)
    assert summary_of(parts)["state_sha256"] == summary_of(whole)["state_sha256"]


def test_a_device_whose_turn_would_never_end_is_left_out(small_run, devices, capsys):
    """Numbers that overflow, from a stranger, break neither the run nor its files."""
    tiny = "fast,1e9,,1e6,1e6,,,\nx,1e-300,,,,,,\nx,1e9,,5e-324,1e6,,,\nx,1e9,1e-300,,,,,\nx,1e9,,,1e-12,,,1e-300\n"
    late = ("population.straggler=partial", "population.deadline=9", "population.quorum=0.1")
    folder = small_run(*devices(tiny, *late))
    assert asked(folder) == {1: {0}, 2: {0}}
    assert capsys.readouterr().out.count("which would need more than 1e+09 virtual seconds for a turn") == 1
    for name in ("clock.csv", "metrics.csv"):
        assert not {"inf", "nan"} & {cell for row in rows(folder, name) for cell in row.values()}

    def refuse(word):
        raise AssertionError(word)

    json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


@dataclass(frozen=True)
class Silent(FirstOrder):
    """Doesn't say what a turn takes."""

    work = None


def test_clients_that_do_not_say_what_a_turn_takes_have_no_clock(small_run, devices, capsys):
    words = devices(THREE, "method.client._target_=test_clock.Silent")
    folder = small_run(*words)
    assert capsys.readouterr().out.count("Silent doesn't say what a turn takes (it has no `work`)") == 1
    assert [row["virtual_seconds"] for row in rows(folder, "metrics.csv")] == ["", "", ""]
    for more in ("population.deadline=1", "population.selection=speed_tier"):
        with pytest.raises(ConfigError, match=f"Silent, this method's client, doesn't say .* {more}"):
            small_run(*words, more, name="refused")


def test_a_deadline_without_limits_is_said_to_mean_nothing(small_run, capsys):
    small_run("population.deadline=1", "population.straggler=drop", rounds=1)
    assert "no device has a limit, so nobody is slow: population.deadline" in capsys.readouterr().out


PLANS = ("method=fedpipe", "population.ranks=[4,2]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (PLANS, r"method=fedpipe gives each client ranks by what its device can do: leave out population.ranks"),
        (("method=fedbuff", "population.deadline=9"), "method=fedbuff takes updates as they come and waits for nobody"),
        ((*SEEDED, "population.deadline=9", "population.straggler=partial"), "method=fedkseed has no number of steps"),
    ],
)
def test_what_means_nothing_to_a_method_is_refused_at_start(words, said, small_run):
    with pytest.raises(ConfigError, match=said):
        small_run(*words)


RATE = st.floats(1e3, 1e15) | st.just(math.inf)


@pytest.fixture(scope="module")
def clock(tmp_path_factory):
    return Clock(Workspace(small(out=tmp_path_factory.mktemp("clock"))))


@pytest.mark.slow
@given(
    st.sampled_from(["flop_per_s", "read_bytes_per_s", "up_bytes_per_s", "down_bytes_per_s", "memory_bytes"]),
    st.fixed_dictionaries(dict.fromkeys(("flop_per_s", "read_bytes_per_s", "up_bytes_per_s"), RATE)),
    st.floats(1, 1e6),
    st.integers(1, 10**9),
)
def test_a_better_device_never_takes_longer(clock, name, given_rates, times, size):
    told = Instruction(clock._workspace.model.layout.initial)
    can = DeviceProfile(**given_rates)
    before = min(getattr(can, name), 1e12)
    worse, better = (replace(can, **{name: rate}) for rate in (before, before * times))
    one, other = (clock.turn(ClientInfo(0, 50, able), told, size, size) for able in (worse, better))
    assert other.seconds <= one.seconds < math.inf
    assert other.memory_bytes == one.memory_bytes
    assert clock.turn(ClientInfo(0, 50), told, size, size).seconds == 0


def test_a_rank_of_zero_is_the_layouts(clock):
    """As local_only says it, which sends no tensors."""
    assert clock.turn(ClientInfo(0, 50), Instruction({}, {"rank": 0}), 0, 0).trainable_params == 2688


def test_a_frozen_factor_is_not_counted_as_trained(clock):
    told = Instruction(clock._workspace.model.layout.initial)
    counts = [
        clock.turn(ClientInfo(0, 50), replace(told, settings=more), 0, 0)
        for more in ({"train": "lora_A"}, {"train": "lora_B"})
    ]
    both = clock.turn(ClientInfo(0, 50), told, 0, 0)
    assert sum(turn.trainable_params for turn in counts) == both.trainable_params == 2688
    assert all(turn.memory_bytes < both.memory_bytes for turn in counts)
