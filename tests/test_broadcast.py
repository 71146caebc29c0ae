"""Broadcasts that build on one another: what is left out comes later, and whoever was away is sent what it lacks."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import mischief
import pytest
import torch
from conftest import SMALL, many, rows, summary_of
from hypothesis import given
from hypothesis import strategies as st

from fedtune.codecs.bytes import varint
from fedtune.codecs.compeft import ComPEFT
from fedtune.codecs.int8 import Int8
from fedtune.codecs.stc import STC
from fedtune.codecs.topk import TopK
from fedtune.config.compose import compose
from fedtune.core.errors import ClientError, WireError
from fedtune.core.protocol import Instruction
from fedtune.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedtune.runtime.local import run_local
from fedtune.training.client_state import ClientStateStore
from fedtune.wire.broadcast_chain import BroadcastChain, decode_broadcast
from fedtune.workspace.downlink import Downlink
from fedtune.workspace.workspace import Workspace
from strategies.fedit import FedIT

RUN = "0123456789abcdef"
START = {"a": torch.zeros(40, 5), "b": torch.ones(30)}
CODEC = TopK(density=0.1, values="float32")


def nobody():
    raise AssertionError("nobody holds anything")


def sequence(count, codec=CODEC, start=START):
    """Some broadcasts of a model that walks about: what is meant, and what was sent after each."""
    draw = torch.Generator().manual_seed(0)
    meant, sent, found = dict(start), BroadcastChain(), []
    for number in range(1, count + 1):
        meant = {name: tensor + torch.randn(tensor.shape, generator=draw) for name, tensor in meant.items()}
        sent = sent.follow(codec, meant, number, start)
        found.append((meant, sent))
    return found


def test_two_broadcasts_by_hand():
    """Of ten values the largest change goes, and what was left out goes next."""
    start = {"w": torch.zeros(10)}
    meant = {"w": torch.tensor([5.0, 3.0, *[0.0] * 8])}
    first = BroadcastChain().follow(CODEC, meant, 0, start)
    assert first.told["w"].tolist() == [5, *[0] * 9]
    second = first.follow(CODEC, {"w": meant["w"] + torch.tensor([1.0, *[0.0] * 9])}, 0, start)
    assert second.told["w"].tolist() == [5, 3, *[0] * 8]
    assert (second.number, len(second.links)) == (2, 2)


def test_what_stands_still_is_reached():
    """At 10 %: ten broadcasts of the same model are all of it; ten differences from the start, a tenth."""
    meant = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) for name, tensor in START.items()
    }
    sent = BroadcastChain()
    for number in range(10):
        sent = sent.follow(CODEC, meant, number, START)
    for name, tensor in meant.items():
        assert torch.allclose(sent.held[name], tensor, atol=1e-6)
    assert not torch.allclose(BroadcastChain().follow(CODEC, meant, 0, START).held["a"], meant["a"], atol=0.1)


@pytest.mark.parametrize("codec", [CODEC, STC(), ComPEFT(density=0.3), Int8()], ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("since", range(6))
def test_whoever_was_away_holds_the_same_bits_as_who_was_not(codec, since):
    found = sequence(6, codec)
    _, last = found[-1]
    rest = {"seen": torch.tensor([7])}
    held = (since, found[since - 1][1].held) if since else (0, START)
    heard = decode_broadcast(last.blob(since, rest), codec, START, lambda: held)
    assert heard.number == 6
    assert heard.told.keys() == {"a", "b", "seen"}
    assert int(heard.told["seen"]) == 7
    for name, tensor in last.held.items():
        assert torch.equal(heard.held[name], tensor)
        assert torch.equal(heard.told[name], tensor)


def test_who_lacks_too_much_is_sent_the_whole_and_that_is_no_longer_than_links_would_be():
    _, last = sequence(20)[-1]
    whole = sum(tensor.numel() * 4 for tensor in START.values())
    assert 1 < len(last.links) < 20
    assert sum(map(len, last.links)) <= whole
    sizes = [len(last.blob(since, {})) for since in range(20)]
    assert sizes[0] == sizes[3]
    assert whole < sizes[0] < whole + 40
    assert all(one > other for one, other in itertools.pairwise(sizes[20 - len(last.links) :]))
    assert decode_broadcast(last.blob(3, {}), CODEC, START, nobody).held.keys() == START.keys()


def test_a_broadcast_may_leave_tensors_out():
    sent = BroadcastChain().follow(CODEC, START, 0, START)
    half = sent.follow(CODEC, {"b": START["b"] + 1}, 0, START)
    assert half.names == ["b"]
    for blob in (half.blob(1, {}), half.blob(5, {})):
        heard = decode_broadcast(blob, CODEC, START, lambda: (1, sent.held))
        assert heard.told.keys() == {"b"}
        assert heard.held.keys() == {"a", "b"}


def test_links_for_somebody_else_are_refused_by_name():
    _, last = sequence(4)[-1]
    with pytest.raises(ClientError, match="builds on number 2; this client holds number 1"):
        decode_broadcast(last.blob(2, {}), CODEC, START, lambda: (1, START))


GOOD = [sequence(3)[-1][1].blob(since, {"n": torch.tensor([1])}) for since in (1, 9)]


@pytest.mark.slow
@given(st.sampled_from(GOOD), st.integers(0, 2000), st.binary(max_size=40))
@many()
def test_damaged_and_made_up_blobs_end_in_an_error_or_in_tensors(blob, kept, tail):
    held = sequence(1)[0][1].held
    try:
        heard = decode_broadcast(blob[:kept] + tail, CODEC, START, lambda: (1, held))
    except (WireError, ClientError):
        return
    assert {name: tensor.shape for name, tensor in heard.held.items()} == {name: t.shape for name, t in START.items()}


def test_lies_are_named():
    _, last = sequence(2)[-1]
    good = last.blob(0, {})
    head = b"fl\1\0"
    for blob, said in (
        (b"", "not a broadcast"),
        (b"fl\2", "not a broadcast"),
        (b"fl\1\2\1", "form 2: expected"),
        (head + b"\0", "broadcast 0 of form 0"),
        (head + varint(1 << 40), "expected one from 1 up"),
        (head + b"\2\2", "can't build on number 2"),
        (head + varint((1 << 31) - 1) + b"\0", "it ends within the length of a link"),
        (b"fl\1\1\1\2\0", "expected 0 or 1 for each tensor, got 2"),
        (good[:-1], "it ends within"),
        (good + b"xx", "not a packed blob"),
    ):
        with pytest.raises(WireError, match=said):
            decode_broadcast(blob, CODEC, START, nobody)


def train_rows(folder, direction="down"):
    return [
        (int(row["round"]), int(row["client"]), int(row["payload_bytes"]))
        for row in rows(folder, "ledger.csv")
        if row["direction"] == direction and row["part"] == "train"
    ]


WORDS = ("codec_down=stc", "codec_down.density=0.02", "train.lr=0.01")


def sent_of(folder):
    workspace = Workspace(compose([*SMALL, *WORDS]))
    state = FedIT().init(workspace.model.layout)
    return load_checkpoint(folder / "checkpoint" / "state.safetensors", state).sent


def size_of_links(sent, since, number):
    """Of a blob with these links, in which every number takes a byte."""
    links = [len(link) for link in sent.links[since:number]]
    return 6 + sum(links) + sum(len(varint(length)) for length in links)


def test_a_run_sends_absent_clients_the_links_that_they_lack(small_run):
    """The ledger has, of each client, the bytes of the links since its last turn; the model evaluated is what the
    chain came to."""
    folder = small_run(*WORDS, rounds=6)
    sent = sent_of(folder)
    assert sent.number == len(sent.links) == 7
    last_turn: dict[int, int] = {}
    gaps = set()
    for number, peer, size in train_rows(folder):
        since = last_turn.get(peer, 0)
        gaps.add(number - since)
        assert size == size_of_links(sent, since, number)
        last_turn[peer] = number
    assert {1, 2} <= gaps
    workspace = Workspace(compose([*SMALL, *WORDS]))
    workspace.install(Instruction(sent.told), memory={})
    found = workspace.evaluate()
    assert found is not None
    assert found.loss == pytest.approx(float(rows(folder, "metrics.csv")[-1]["eval_loss"]), abs=1e-9)


def test_a_resumed_run_ends_in_the_same_bits_and_sends_the_same_bytes(small_run):
    once = small_run(*WORDS, rounds=5)
    parts = small_run(*WORDS, rounds=3, name="parts")
    run_local(compose([*SMALL, *WORDS, "rounds=5", f"out={parts}"]), resume=str(parts))
    assert summary_of(parts)["state_sha256"] == summary_of(once)["state_sha256"]
    assert train_rows(parts) == train_rows(once)
    metrics = [[row["eval_loss"] for row in rows(run, "metrics.csv")] for run in (once, parts)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"harm")], ids=["gone", "damaged"])
def test_a_client_that_lost_what_it_kept_says_so_when_asked_and_is_sent_the_whole(small_run, harm):
    folder = small_run(*WORDS, rounds=3)
    kept = sorted((folder / "broadcasts").rglob("*.safetensors"))
    assert kept
    for path in kept:
        harm(path)
    run_local(compose([*SMALL, *WORDS, "rounds=5", f"out={folder}"]), resume=str(folder))
    assert not rows(folder, "failures.csv")
    assert rows(folder, "metrics.csv")[-1]["clients"] == "3"


def test_a_client_whose_turn_failed_is_sent_all_of_it(small_run, monkeypatch):
    monkeypatch.setenv("MISCHIEF", " ".join(f"raise:0:3:{index}" for index in range(1, 4)))
    folder = small_run(*WORDS, *mischief.WORDS, "population.clients=3", "population.quorum=0.1", rounds=4)
    assert {(row["round"], row["client"]) for row in rows(folder, "failures.csv")} == {("3", "1"), ("3", "2")}
    sent = sent_of(folder)
    sizes = {peer: size for number, peer, size in train_rows(folder) if number == 4}
    assert sizes == {0: size_of_links(sent, 3, 4), 1: size_of_links(sent, 0, 4), 2: size_of_links(sent, 0, 4)}


@dataclass(frozen=True)
class Shrinking(FedIT):
    """What it sends in round 2 has another shape than what everybody starts with."""

    def configure(self, state, round, peer):
        told = super().configure(state, round, peer)
        return replace(told, tensors={name: t[:1] for name, t in told.tensors.items()}) if round == 2 else told


@pytest.mark.slow
def test_a_round_of_another_shape_is_told_from_the_start_and_the_chain_waits():
    workspace = Workspace(compose([*SMALL, *WORDS]))
    workspace.strategy = Shrinking()
    state = workspace.strategy.init(workspace.model.layout)
    first = Downlink(workspace).next_broadcast(BroadcastChain(), state, 1)
    second = Downlink(workspace).next_broadcast(first, state, 2)
    assert (first.number, second.number) == (1, 1)
    assert Downlink(workspace).chained(state, 2) is None
    assert {t.shape[0] for t in Downlink(workspace).broadcast(second, state, 2).tensors.values()} == {1}
    assert Downlink(workspace).next_broadcast(second, state, 3).number == 2


def test_mixed_ranks_are_told_from_the_start(small_run):
    """A narrow client's factors are no leading part of what the others hold, as the codec rounds each for itself."""
    folder = small_run(*WORDS, "method=zero_pad", "population.ranks=[8,4]", rounds=3)
    assert not rows(folder, "failures.csv")


def test_what_several_keep_alike_is_on_the_disk_once(tmp_path):
    memory = ClientStateStore(tmp_path)
    tensors = {"w": torch.ones(100_000)}
    for index in range(5):
        memory.save(RUN, index, 1, tensors, alike="1")
    paths = list(tmp_path.rglob("*.safetensors"))
    assert len(paths) == 5
    assert len({path.stat().st_ino for path in paths}) == 1
    memory.save(RUN, 0, 1, tensors, alike="1")  # the round is played again
    memory.save(RUN, 0, 2, {"w": torch.zeros(3)}, alike="2")
    assert memory.load(RUN, 0, 3)["w"].tolist() == [0, 0, 0]
    assert torch.equal(memory.load(RUN, 4, 3)["w"], tensors["w"])
    assert not [path for path in tmp_path.rglob("*") if "link" in path.name or "unfinished" in path.name]


def test_a_sent_is_data(tmp_path):
    """It goes through a checkpoint unchanged."""
    _, sent = sequence(3)[-1]
    path = tmp_path / "state"
    save_checkpoint(path, Checkpoint(3, "x", {}, RUN, sent))
    found = load_checkpoint(path, {}).sent
    assert (found.number, found.names) == (sent.number, sent.names)
    assert found.blob(1, {}) == sent.blob(1, {})
    assert replace(found, links=[]).blob(1, {}) == replace(sent, links=[]).blob(1, {})
