"""Changes of the base: counted, kept, and sent to whoever lacks them. Truth is the dense sum of all changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import SHAPES, distance, factors

from fedtune.core.errors import ClientError
from fedtune.core.protocol import Instruction
from fedtune.lowrank.algebra import lora_factors
from fedtune.lowrank.residual import FROM, VERSION, BaseResidual, base_version, from_residual, size_of, update_residual
from fedtune.runs.checkpoint import state_sha256

WIDE = {"one": (30, 20), "two": (16, 24)}


def change(seed, rank, shapes=WIDE):
    return lora_factors(factors(rank, seed, shapes))


def whole(residual):
    return {m: p.b.double() @ p.a.double() for m, p in from_residual(residual).items()}


def after(ranks, limit=256, shapes=WIDE):
    """The states after merging changes of these ranks, and the dense sums."""
    states, sums = [BaseResidual()], [{m: torch.zeros(shape, dtype=torch.float64) for m, shape in shapes.items()}]
    for seed, rank in enumerate(ranks):
        made = change(seed, rank, shapes)
        states.append(states[-1].merge(made, limit))
        sums.append({m: sums[-1][m] + p.b @ p.a for m, p in made.items()})
    return states, sums


def test_the_residual_is_the_sum_of_all_changes():
    states, sums = after([2, 1, 3])
    for version, (state, total) in enumerate(zip(states, sums, strict=True)):
        assert state.version == version
        assert state.error == 0
        if version:
            assert distance(whole(state.total), total) < 1e-6
    assert {name: tuple(t.shape) for name, t in states[-1].total.items()} == {
        "one.residual_B": (30, 6), "one.residual_A": (6, 20), "two.residual_B": (16, 6), "two.residual_A": (6, 24),
    }  # fmt: skip


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=9),
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=10, max_size=10),
    st.sampled_from([1, 2, 5, 256]),
)
def test_whoever_was_away_holds_the_servers_bits_after_one_message(ranks, present, limit):
    """Three clients, each there or not in every round, with merges that are cut back and merges that aren't."""
    states, _ = after(ranks, limit)
    memories, known = [{}, {}, {}], [0, 0, 0]
    for state, there in zip(states, present, strict=False):
        for client, memory in enumerate(memories):
            if not there[client]:
                continue
            told = state.missing_merges(known[client])
            assert size_of(told.tensors) <= size_of(state.total)
            residual, rest = update_residual(told, memory)
            assert not rest
            assert residual.keys() == state.total.keys()
            assert all(torch.equal(residual[name], tensor) for name, tensor in state.total.items())
            known[client] = int(told.settings[VERSION])
            assert known[client] == state.version == base_version(memory)
            assert {name for name in memory if name != "version"} == state.total.keys()


def test_a_present_client_is_sent_the_last_merge_alone_and_a_newcomer_all():
    """Ranks 2, 1, 3 of layers with 30 + 20 and 16 + 24: 90 numbers a rank."""
    states, _ = after([2, 1, 3])
    state = states[-1]
    sizes = [size_of(state.missing_merges(version).tensors) for version in range(4)]
    assert sizes == [90 * 6, 90 * (1 + 3), 90 * 3, 0]
    assert [state.missing_merges(v).settings for v in range(4)] == [{FROM: v, VERSION: 3} for v in range(4)]


def test_a_client_from_the_future_is_sent_all():
    """It kept more than a server that was resumed from an older checkpoint knows of."""
    states, _ = after([2, 1, 3])
    told = states[2].missing_merges(3)
    memory = {}
    update_residual(states[3].missing_merges(0), memory)
    residual, _ = update_residual(told, memory)
    assert base_version(memory) == 2
    assert all(torch.equal(residual[name], tensor) for name, tensor in states[2].total.items())


def test_what_is_cut_is_the_least_and_is_reported():
    """limit 2 and changes of rank 2: the third makes 6 > 4, so 6 is cut to 2. The truth is the dense sum's SVD."""
    states, sums = after([2, 2, 2], limit=2)
    assert [state.error for state in states[:3]] == [0, 0, 0]
    cut = states[3]
    values = {m: torch.linalg.svdvals(total) for m, total in sums[3].items()}
    lost = sum(float(s[2:].square().sum()) for s in values.values()) ** 0.5
    all_of_it = sum(float(s.square().sum()) for s in values.values()) ** 0.5
    assert cut.error == pytest.approx(lost / all_of_it, rel=1e-6)
    assert cut.error == pytest.approx(distance(whole(cut.total), sums[3]), rel=1e-5)
    assert {t.shape for name, t in cut.total.items() if name.endswith("A")} == {(2, 20), (2, 24)}


@pytest.mark.slow
def test_the_order_of_layers_changes_no_bit():
    """Decoded tensors come in any order: safetensors keeps none."""
    shapes = {f"layer{place}": (12, 9) for place in range(30)}
    found = set()
    for shift in range(6):
        state = BaseResidual()
        for seed in range(3):
            made = list(change(seed, 2, shapes).items())
            state = state.merge(dict(made[5 * shift :] + made[: 5 * shift]), 2)
        assert state.error > 0
        found.add(state_sha256(state))
    assert len(found) == 1


def test_after_a_cut_everybody_is_sent_the_whole():
    states, _ = after([2, 2, 2, 1], limit=2)
    for version in range(3):
        told = states[3].missing_merges(version)
        assert told.settings == {FROM: 0, VERSION: 3}
        assert size_of(told.tensors) == 90 * 2
    assert size_of(states[4].missing_merges(3).tensors) == 90
    assert states[4].missing_merges(2).settings == {FROM: 0, VERSION: 4}


def test_a_layer_narrower_than_the_limit_loses_nothing():
    states, sums = after([3] * 6, limit=4, shapes={"thin": (3, 50)})
    assert all(state.error < 1e-12 for state in states)
    assert distance(whole(states[-1].total), sums[-1]) < 1e-6


def test_a_change_wider_than_its_layer_is_sent_as_the_layer():
    """A stack of rank 9 on 5 x 3 and 4 x 7: no more than rank 3 and 4."""
    states, sums = after([9], shapes=SHAPES)
    assert {name: tuple(t.shape) for name, t in states[1].total.items()} == {
        "one.residual_B": (5, 3), "one.residual_A": (3, 3), "two.residual_B": (4, 4), "two.residual_A": (4, 7),
    }  # fmt: skip
    assert distance(whole(states[1].total), sums[1]) < 1e-6


@pytest.mark.parametrize("limit", [1, 4, 16])
def test_history_is_bounded(limit):
    states, _ = after([1, 2] * 30, limit)
    for state in states:
        assert size_of(state.total) <= 90 * 2 * limit
        assert sum(map(size_of, state.recent)) <= max(90 * 2 * limit, 90 * 2)


def test_merges_that_build_on_others_are_refused():
    states, _ = after([1, 1, 1])
    memory = {}
    update_residual(states[1].missing_merges(0), memory)
    with pytest.raises(ClientError, match="build on version 2 of the base; this client holds 1"):
        update_residual(states[3].missing_merges(2), memory)


def test_what_else_is_sent_and_kept_stays_as_it_is():
    states, _ = after([1, 2])
    told = states[2].missing_merges(0)
    adapter = {"x.lora_A.weight": torch.ones(1, 2), "x.residual_Bx.1": torch.zeros(1)}
    memory = {"mine": torch.ones(3)}
    _, rest = update_residual(Instruction({**told.tensors, **adapter}, told.settings), memory)
    assert rest.keys() == adapter.keys()
    assert torch.equal(memory["mine"], torch.ones(3))


def test_without_a_version_nothing_changes():
    states, _ = after([1])
    memory = {}
    held, _ = update_residual(states[1].missing_merges(0), memory)
    again, rest = update_residual(Instruction({"x": torch.ones(1)}), memory)
    assert again.keys() == held.keys()
    assert rest.keys() == {"x"}
