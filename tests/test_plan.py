"""`fedtune plan`: what it prints and writes is what the run then does."""

import csv
import io

import pytest
from conftest import rows, small

from fedtune.commands.main import main
from fedtune.commands.plan import COLUMNS, plans, table_of
from fedtune.config.devices import write_devices
from fedtune.core.errors import QuorumError
from fedtune.core.protocol import DeviceProfile
from fedtune.runtime.local import run_local
from fedtune.workspace.workspace import Workspace

MB = 1e6


@pytest.fixture
def three(tmp_path):
    """A large device, one with room for little, and one that can hold nothing at all."""
    path = tmp_path / "devices.csv"
    write_devices(
        path,
        [
            DeviceProfile(device="large", memory_bytes=1e9, flop_per_s=1e9, up_bytes_per_s=1e6, down_bytes_per_s=1e6),
            DeviceProfile(device="slow", memory_bytes=1e9, flop_per_s=1e7, up_bytes_per_s=1e4, down_bytes_per_s=1e4),
            DeviceProfile(device="watch", memory_bytes=1e6, flop_per_s=1e9, up_bytes_per_s=1e6, down_bytes_per_s=1e6),
            DeviceProfile(device="large", memory_bytes=1e9, flop_per_s=1e9, up_bytes_per_s=1e6, down_bytes_per_s=1e6),
        ],
    )
    return f"population.devices={path}"


def lines_of(workspace):
    planned, trouble = plans(workspace)
    assert trouble is None
    return list(csv.DictReader(io.StringIO(table_of(workspace, planned))))


def test_a_run_does_what_the_plan_said(three, tmp_path):
    """Client by client: layers, batch, numbers, memory and the seconds of its steps are those of clock.csv, and who is
    left out of one is left out of the other. Bytes differ by the messages' framing alone."""
    words, out = (three, "method=fedpipe", "population.cohort=4", "rounds=1"), tmp_path / "run"
    workspace = Workspace(small(*words, out=tmp_path / "unused"))
    steps = workspace.experiment.train.steps
    whole, top = (
        workspace.costs.compute(1, 32, steps, block, numbers, 1e7, float("inf")) + 8 * numbers / 1e4
        for block, numbers in ((0, workspace.model.trainable), (1, workspace.model.trainable / 2))
    )
    words = (*words, f"population.deadline={(whole + top) / 2}")  # the slow one can't do both blocks in that time
    run_local(small(*words, out=out))
    planned = lines_of(Workspace(small(*words, out=tmp_path / "unused")))
    done = rows(out, "clock.csv")
    assert (
        [line["client"] for line in planned if not line["excluded"]]
        == [row["client"] for row in done]
        == ["0", "1", "3"]
    )
    assert "memory" in planned[2]["excluded"]
    for line, row in zip((line for line in planned if not line["excluded"]), done, strict=True):
        for name in (
            "device",
            "layers",
            "batch_size",
            "bits",
            "steps",
            "trainable_params",
            "memory_bytes",
            "compute_seconds",
        ):
            assert line[name] == row[name]
        assert 0 < float(line["upload_seconds"]) < float(row["upload_seconds"])
    assert int(planned[1]["trainable_params"]) < int(planned[0]["trainable_params"])  # the slow one does less


@pytest.mark.slow
def test_it_prints_a_line_for_each_kind_of_device_and_who_is_left_out(three, capsys, tmp_path):
    target = tmp_path / "plan.csv"
    words = ["model=tiny", "population.clients=4", three, "method=fedit"]
    assert main(["plan", "--csv", str(target), *words]) == 0
    said = capsys.readouterr().out
    assert "fedit on tiny: 4 clients" in said
    assert [line.split()[:2] for line in said.splitlines() if line.startswith(("large ", "slow "))] == [
        ["slow", "1"],
        ["large", "2"],
    ]
    assert "left out client 2: needs 1" in said
    assert "(watch)" in said
    with target.open() as stream:
        assert tuple(csv.DictReader(stream).fieldnames) == COLUMNS


@pytest.mark.slow
def test_it_says_so_where_nobody_can_take_part(three, capsys):
    words = ["model=tiny", "population.clients=4", three, "method=fedpipe", "population.deadline=1e-3"]
    assert main(["plan", *words]) == 1
    printed = capsys.readouterr()
    assert "the deadline is 0.001 s" in printed.out
    assert "none of the 4 clients can take part" in printed.err


@pytest.mark.slow
def test_a_deadline_is_suggested_to_a_planner_that_has_none(three, capsys):
    assert main(["plan", "model=tiny", "population.clients=4", three, "method=fedpipe"]) == 0
    assert "try population.deadline=" in capsys.readouterr().out


def test_without_devices_it_says_what_to_set(capsys):
    assert main(["plan", "model=tiny", "population.clients=4"]) == 0
    assert "see population=mixed" in capsys.readouterr().out


def test_nobody_able_is_an_error_of_the_run_too(three, tmp_path):
    words = (three, "method=fedpipe", "population.deadline=1e-3", "rounds=1")
    with pytest.raises(QuorumError, match="none of the 4 clients can take part"):
        run_local(small(*words, out=tmp_path / "run"))
