"""Local only: every client goes on from its own last turn, and nothing but words crosses the wire.

With one client, or with a cohort of which each client has always been alone, this is FedIT of that client alone: its
average is the client's own update. That is the oracle here, to the last bit.
"""

import pytest
import torch
from conftest import SMALL, rows, summary_of
from fedtune.workspace.workspace import Party
from safetensors.torch import load_file

from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import SERVER, ClientInfo, Update
from fedtune.lowrank.algebra import lora_factors
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.local import run_local
from strategies.local_only import LocalOnly, State

RUN = "0" * 16
ALL = ("method=local_only", "population.cohort=4")


def kept(folder, round):
    return {int(file.parent.name): load_file(file) for file in folder.glob(f"clients/*/*/{round}.safetensors")}


def test_each_client_ends_where_it_would_have_ended_alone(small_run, tmp_path):
    folder = small_run(*ALL, rounds=3)
    held = kept(folder, 3)
    assert sorted(held) == [0, 1, 2, 3]
    for index, adapter in held.items():
        workspace = Party(compose([*SMALL, "method=fedit", f"out={tmp_path / 'alone'}"]))
        state = workspace.strategy.init(workspace.model.layout)
        for round in (1, 2, 3):
            peer = ClientInfo(index, workspace.samples(index))
            update = workspace.turn(RUN, index, round, workspace.strategy.configure(state, round, peer))
            state = workspace.strategy.aggregate(state, round, [(peer, update)])
        assert state_sha256(state.adapter) == state_sha256(adapter)
    assert len({state_sha256(adapter) for adapter in held.values()}) == 4


def test_no_tensor_crosses_the_wire(small_run):
    folder = small_run(*ALL)
    payloads = {int(row["payload_bytes"]) for row in rows(folder, "ledger.csv") if row["part"] == "train"}
    assert max(payloads) <= 16  # an empty safetensors file
    fedit = small_run("method=fedit", "population.cohort=4", name="fedit")
    assert summary_of(folder)["totals"]["up_wire_bytes"] < summary_of(fedit)["totals"]["up_wire_bytes"] / 10


def test_it_is_evaluated_where_the_models_are_and_learns(small_run):
    folder = small_run(*ALL, rounds=4)
    losses = [float(row["eval_loss"]) for row in rows(folder, "metrics.csv")]
    assert losses[0] > losses[2] > losses[4]
    assert all(row["aggregation_error"] == "" for row in rows(folder, "metrics.csv"))
    last = [row for row in rows(folder, "clients.csv") if row["round"] == "4"]
    assert len({row["eval_loss"] for row in last}) == 4
    with pytest.raises(ConfigError, match=r"data\.client_heldout=0"):
        Party(compose([*SMALL, *ALL, "data.client_heldout=0"]))


def test_who_was_not_drawn_still_holds_what_it_had(small_run):
    folder = small_run("method=local_only", "population.cohort=1", rounds=3)
    table = rows(folder, "clients.csv")
    drawn = {row["round"]: row["peer"] for row in rows(folder, "ledger.csv") if row["part"] == "train"}
    for round in ("1", "2", "3"):
        before, after = (
            {row["peer"]: row["eval_loss"] for row in table if row["round"] == number}
            for number in (str(int(round) - 1), round)
        )
        assert {peer for peer in after if after[peer] != before[peer]} == {drawn[round]}


def test_a_resumed_run_goes_on_from_every_clients_own(small_run):
    whole = small_run("method=local_only", name="whole", rounds=4)
    parts = small_run("method=local_only", name="parts", rounds=2)
    run_local(compose([*SMALL, "method=local_only", "rounds=4", f"out={parts}"]), resume=str(parts))
    assert state_sha256([kept(whole, 4)[i] for i in sorted(kept(whole, 4))]) == state_sha256(
        [kept(parts, 4)[i] for i in sorted(kept(parts, 4))]
    )
    assert (whole / "clients.csv").read_text() == (parts / "clients.csv").read_text()


@pytest.mark.parametrize("scaling", ["equal", "per_rank"])
def test_every_client_has_the_rank_that_it_was_given(small_run, scaling):
    folder = small_run(*ALL, "population.ranks=[4,2]", f"population.scaling={scaling}")
    start = Party(compose([*SMALL, *ALL, "population.ranks=[4,2]"])).model.layout.initial
    for index, adapter in kept(folder, 2).items():
        assert {product.rank for product in lora_factors(adapter).values()} == {(4, 2)[index % 2]}
        for name, product in lora_factors(adapter).items():
            first = lora_factors(start)[name].a[: product.rank]
            assert (product.a - first).abs().max() < 0.05  # two turns of AdamW away from the first rows of the start


def test_nothing_is_sent_and_anything_that_comes_is_refused():
    workspace = Party(compose([*SMALL, "method=local_only"]))
    method, state = LocalOnly(), LocalOnly().init(workspace.model.layout)
    assert method.configure(state, 1, ClientInfo(0, 1)).tensors == {}
    method.validate(state, 1, ClientInfo(0, 1), Update({}, 1))
    with pytest.raises(WireError, match="'x' was not asked for"):
        method.validate(state, 1, ClientInfo(0, 1), Update({"x": torch.zeros(1)}, 1))
    assert method.aggregate(state, 1, [(ClientInfo(0, 1), Update({}, 1))]) == State(state.start)
    workspace.install(method.configure(state, 1, ClientInfo(SERVER, 1)), {})
    assert state_sha256(workspace.model.adapter()) == state_sha256(workspace.model.layout.initial)
