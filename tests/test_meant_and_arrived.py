"""Lossy messages on the real engine: the sum of what arrives follows the sum of what was meant, both ways.

Clients that always move by the same d (tests/moving.py) make the server's model after t rounds known beforehand, x0 +
t d for whatever averages. A server that took what its clients train from for what it had sent would lose, each round,
what the codec left out.
"""

import moving
import pytest
import torch
from conftest import SMALL, of_each_kind, rows, small, traits_of_method
from moving import move

from fedtune.config.compose import choices, compose
from fedtune.core.errors import ConfigError
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.runtime.local import run_local
from fedtune.training.client_state import ClientStateStore
from fedtune.workspace.workspace import Workspace

TOLD_LOSSILY = of_each_kind(
    name for name in choices("method") if name != "local_only" and traits_of_method(name).lossy_down
)
EVERYBODY = ("population.cohort=4", "evaluate.every=0", "evaluate.exactness=false")
SPARSE = ("codec_down=topk", "codec_down.density=0.05")
UNEQUAL = "".join(f"d{k},{1 + k}e9,inf,inf,inf,inf,true,1\n" for k in range(4))


def start_of(*words):
    return Workspace(compose([*SMALL, *words])).model.layout.initial


def checkpoint_of(folder, *words):
    workspace = Workspace(compose([*SMALL, *words]))
    state = workspace.strategy.init(workspace.layout)
    return load_checkpoint(folder / "checkpoint" / "state.safetensors", state)


def adapter_of(folder, *words):
    state = checkpoint_of(folder, *words).state
    return getattr(state, "base", state).adapter


@pytest.mark.parametrize("method", TOLD_LOSSILY)
def test_what_a_broadcast_leaves_out_is_not_lost_to_the_server(method, small_run):
    """The server's model after four rounds is the same whether clients heard all of it or a twentieth."""
    words = (f"method={method}", *moving.WORDS, *EVERYBODY)
    exact, sparse = (
        adapter_of(small_run(*words, *codec, name=name, rounds=4), *words)
        for name, codec in (("exact", ()), ("sparse", SPARSE))
    )
    start = start_of()
    for name, tensor in exact.items():
        assert (tensor - start.get(name, torch.zeros(()))).abs().max() > 0.02
        assert torch.allclose(sparse[name], tensor, atol=2e-6), name


@pytest.mark.parametrize(
    "words",
    [
        ("method=fedit", "codec_down.feedback=false"),
        ("method=zero_pad", "population.ranks=[8,4]"),
        ("method=fedit", "server_optimizer=fedavgm"),
        ("method=fedit", "server_optimizer=fedadam"),
        ("method=fedit", "codec_up=topk", "codec_up.density=1", "codec_up.values=float32"),
    ],
    ids=lambda words: words[-1],
)
def test_nor_where_it_is_told_from_the_start_or_the_server_has_an_optimizer(words, small_run):
    plain = [word for word in words if not word.startswith("codec_")]
    exact = adapter_of(small_run(*plain, *moving.WORDS, *EVERYBODY, rounds=4), *plain, *moving.WORDS, *EVERYBODY)
    told = (*SPARSE, *words, *moving.WORDS, *EVERYBODY)
    sparse = adapter_of(small_run(*told, name="sparse", rounds=4), *told)
    for name, tensor in exact.items():
        assert torch.allclose(sparse[name], tensor, atol=2e-6), name


@pytest.mark.parametrize("method", ["fedasync", "fedbuff"])
def test_nor_where_answers_wait_for_their_time(method, small_run, devices):
    """On unequal devices: answers to older broadcasts, some of which lay in a checkpoint meanwhile."""
    buffer = ("method.strategy.buffer=2",) if method == "fedbuff" else ()
    words = (*devices(UNEQUAL), f"method={method}", *buffer, *moving.WORDS, "evaluate.every=0")
    exact, sparse = (
        adapter_of(folder := small_run(*words, *codec, name=name, rounds=6), *words)
        for name, codec in (("exact", ()), ("sparse", SPARSE))
    )
    assert any(int(row["staleness"]) for row in rows(folder, "clock.csv"))
    for name, tensor in exact.items():
        assert torch.allclose(sparse[name], tensor, atol=2e-6), name


def test_both_ways_by_hand(small_run):
    """4 rounds of x0 + t d, a tenth of the values each way. Down, x is what was meant and w what arrived: x - w is what
    the next broadcast is made from. Up, each client's remains e are the same, since all are alike: x + e = x0 + 4 d.
    """
    words = (
        "codec=topk",
        "codec.density=0.1",
        "codec.values=float32",
        "codec.feedback=true",
        *moving.WORDS,
        *EVERYBODY,
    )
    folder = small_run(*words, rounds=4)
    found = checkpoint_of(folder, *words)
    kept = ClientStateStore(folder / "residuals").load(found.run, 0, 5)
    for name, first in start_of().items():
        x, meant = found.state.adapter[name], first + 4 * move(name, first.shape)
        assert not torch.allclose(x, meant, atol=1e-3), "a tenth at a time, something is always under way"
        assert torch.allclose(x + kept[name], meant, atol=2e-6)
        assert (found.sent.held[name] - first).count_nonzero() > 0


def test_a_broadcast_that_nobody_moves_from_arrives_whole(small_run, monkeypatch):
    """Clients move once, in round 1, by d. At 10 %, ten broadcasts later w is x0 + d, where it was a tenth of it for
    ever when the server went on from what its clients had heard."""
    words = ("codec_down=topk", "codec_down.density=0.1", "codec_down.values=float32", *moving.WORDS, *EVERYBODY)
    begun = small_run(*words, rounds=1)
    monkeypatch.setattr(moving, "move", lambda name, shape: torch.zeros(shape))
    run_local(small(*words, "rounds=11", out=begun), resume=str(begun))
    found = checkpoint_of(begun, *words)
    for name, first in start_of().items():
        assert torch.allclose(found.state.adapter[name], first + move(name, first.shape), atol=2e-6)
        assert torch.allclose(found.sent.held[name], first + move(name, first.shape), atol=2e-6)


@pytest.mark.slow
def test_what_a_client_trains_and_was_not_told_of_has_to_come_whole():
    with pytest.raises(ConfigError, match="what method=rolora sends down has to come as it is"):
        Workspace(compose([*SMALL, "method=rolora", "codec_down=stc"]))
