"""Lossy codecs on the wire: differences from what the other end knows, and what is left out sent later."""

import numpy as np
import pytest
import torch
from conftest import SMALL, rows, summary_of
from hypothesis import given
from hypothesis import strategies as st

from fedtune.codecs.packed import Packed
from fedtune.codecs.stc import STC
from fedtune.codecs.topk import TopK
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Update
from fedtune.runs.update_store import Replies
from fedtune.runtime.local import run_local
from fedtune.wire.delta_coding import decode, encode, left_out, with_feedback

EXACT = TopK(density=1, values="float32")  # of the lossy codecs the one that loses nothing
# How many times smaller than raw at least, with these settings
LOSSY = {
    "bf16": 1.9,
    "int8": 2.2,
    "nf4": 5,
    "signsgd": 12,
    "topk codec.density=0.2": 5,
    "stc codec.density=0.2": 12,
    "compeft codec.density=0.2 codec_up.alpha=2": 12,
    "compeft codec.density=0.2 codec_up.alpha=2 codec.scale=per_tensor codec.coder=range": 10,
}


def test_what_is_coded_is_the_difference():
    known = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([10.0])}
    meant = {"b": torch.tensor([10.5]), "a": torch.tensor([[1.0, 2.0], [3.0, 104.0]])}
    found = decode(TopK(density=0.2), encode(TopK(density=0.2), meant, 0, known), known)
    assert found["a"].tolist() == [[1, 2], [3, 104]]
    assert found["b"].tolist() == [10]


def test_what_the_other_end_does_not_know_goes_whole():
    """Other names, whole numbers, another dtype, and shapes that are no leading part; a missing one stays missing."""
    known = {"a": torch.ones(8, 4), "cut": torch.ones(8, 4), "gone": torch.ones(3), "count": torch.tensor([1])}
    meant = {
        "a": torch.full((8, 4), 1.25),
        "cut": torch.full((3, 4), 0.5),
        "new": torch.tensor([7.0]),
        "count": torch.tensor([2**40]),
    }
    found = decode(EXACT, encode(EXACT, meant, 0, known), known)
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], meant[name]) for name in meant)
    odd = {"a": torch.ones(9, 4), "cut": torch.ones(8, 4, dtype=torch.float64)}
    found = decode(STC(), encode(STC(), odd, 0, known), known)
    assert all(torch.equal(found[name], odd[name]) for name in odd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_those_of_what_is_known(dtype):
    known = {"w": torch.linspace(-1, 1, 50).to(dtype)}
    meant = {"w": (known["w"] * 1.5).to(dtype)}
    found = decode(EXACT, encode(EXACT, meant, 0, known), known)
    assert found["w"].dtype == dtype
    assert torch.allclose(found["w"].double(), meant["w"].double(), rtol=2e-3 if dtype.itemsize == 2 else 1e-6)


def test_a_lossless_codec_carries_tensors_whole():
    tensors = {"w": torch.ones(3)}
    assert encode(Packed(), tensors, 0, {"w": torch.zeros(3)}) == Packed().encode(tensors, 0)


KNOWN = {"a": torch.ones(4, 3), "b": torch.ones(2), "n": torch.tensor([1])}
GOOD = encode(STC(density=1), {"a": torch.zeros(2, 3), "b": torch.zeros(2), "n": torch.tensor([5])}, 0, KNOWN)


@given(st.binary(max_size=80), st.integers(0, len(GOOD)))
def test_any_bytes_end_in_tensors_or_in_one_error(tail, kept):
    try:
        found = decode(STC(), GOOD[:kept] + tail, KNOWN)
    except WireError:
        return
    assert all(tensor.numel() < 1000 for tensor in found.values())


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "not a difference"),
        (b"fd\1\2", "form 2 is not known"),
        (b"fd\1\1\3", "expected 0, 1 or 2, got 3"),
        (b"fd\1\1\2\2\5\3", r"\(5, 3\) is no part of float32 \(4, 3\)"),
        (b"fd\1\1\2\1\2", r"\(2,\) is no part"),
        (b"fd\1\1\2\2\xff\xff\xff\xff\xff\xff\xff\xff\x7f\1", "is no part"),
        (b"fd\1\1\0\0\1", r"tensor 'n': \(1,\) is no part of int64"),
        (b"fd\1\1\0\0\0\x7f", "it ends within the other tensors"),
    ],
)
def test_lies_are_named(blob, said):
    with pytest.raises(WireError, match=said):
        decode(STC(), blob, KNOWN)


def test_a_tensor_comes_once():
    other = Packed().encode({"b": torch.ones(2)}, 0)
    with pytest.raises(WireError, match="'b' comes twice"):
        decode(STC(), b"fd\1\1\0\1\0" + bytes([len(other)]) + other, KNOWN)


@pytest.mark.slow
def test_with_feedback_the_sum_of_what_was_sent_follows_the_sum_of_what_was_meant():
    """At 2 % density: without, most values are never sent."""
    draw = torch.Generator().manual_seed(0)
    usual = torch.randn(1000, generator=draw)
    codec, known = TopK(density=0.02, values="float32"), {"w": torch.zeros(1000)}
    meant_sum, with_it, without, residual = (torch.zeros(1000) for _ in range(4))
    for number in range(200):
        meant = {"w": usual + 0.1 * torch.randn(1000, generator=draw)}
        meant_sum += meant["w"]
        without += decode(codec, encode(codec, meant, number, known), known)["w"]
        full = with_feedback(meant, {"w": residual})
        sent = decode(codec, encode(codec, full, number, known), known)
        residual = left_out(full, sent)["w"]
        with_it += sent["w"]
        assert torch.allclose(meant_sum, with_it + residual, atol=1e-3)
    assert (without - meant_sum).norm() > 0.8 * meant_sum.norm()
    assert (with_it - meant_sum).norm() < 0.3 * meant_sum.norm()


def test_of_a_residual_the_part_that_fits_is_sent_and_one_that_is_narrower_is_let_go():
    """A pruned adapter has the first components of what it had, and so have its remains."""
    meant = {"w": torch.ones(3, 2)}
    remains = torch.arange(8.0).view(4, 2)
    assert with_feedback(meant, {"w": remains, "x": torch.ones(1)})["w"].tolist() == [[1, 2], [3, 4], [5, 6]]
    for other in (torch.ones(2, 2), torch.ones(3), torch.ones(3, 2, 1)):
        assert with_feedback(meant, {"w": other})["w"].tolist() == [[1, 1]] * 3


def test_replies_that_wait_on_disk_are_decoded_against_what_was_sent(tmp_path):
    known, meant = {"w": torch.full((4,), 5.0)}, {"w": torch.tensor([5.0, 6.0, 5.0, 5.0])}
    blob = encode(STC(density=0.25), meant, 0, known)
    replies = Replies(STC(), tmp_path, memory_bytes=0)
    replies.add(ClientInfo(0, 1), Update(meant, 1), blob, known)
    assert replies[0][1].tensors["w"].tolist() == [5, 6, 5, 5]
    replies.close()


@pytest.mark.parametrize("codec", LOSSY)
def test_runs_learn_with_it_up_and_down_and_the_ledger_has_its_bytes(small_run, shared_run, codec):
    folder = small_run(*f"codec={codec}".split(), "train.lr=0.01", "method=fedit", rounds=3)
    raw = shared_run("train.lr=0.01", "method=fedit", rounds=3)
    losses = [float(row["eval_loss"]) for row in rows(folder, "metrics.csv")]
    assert losses[-1] < losses[0]
    for direction in ("up", "down"):
        mine, theirs = (
            [
                int(row["payload_bytes"])
                for row in rows(run, "ledger.csv")
                if row["direction"] == direction and row["part"] == "train"
            ]
            for run in (folder, raw)
        )
        assert len(mine) == len(theirs)
        assert sum(mine) < sum(theirs) / LOSSY[codec]
    assert min(mine) > 0


@pytest.mark.parametrize("method", ["zero_pad", "hetlora", "ffa_lora", "scaffold", "flexlora", "fedsa_lora", "rolora"])
def test_other_averaging_methods_take_it(small_run, method):
    ranks = [] if method in ("scaffold", "fedsa_lora") else ["population.ranks=[8,4]"]
    way = "codec_up" if method == "rolora" else "codec"  # of what it is sent it trains a part later: that comes whole
    folder = small_run(f"method={method}", f"{way}=topk", f"{way}.density=0.1", *ranks)
    assert summary_of(folder)["status"] == "finished"
    assert not rows(folder, "failures.csv")


def test_feedback_lasts_over_a_resume_and_changes_what_is_sent(small_run):
    words = ("codec_up=topk", "codec_up.density=0.02")
    once = small_run(*words, "codec_up.feedback=true", rounds=4)
    parts = small_run(*words, "codec_up.feedback=true", rounds=2, name="parts")
    run_local(compose([*SMALL, *words, "codec_up.feedback=true", "rounds=4", f"out={parts}"]), resume=str(parts))
    assert summary_of(parts)["state_sha256"] == summary_of(once)["state_sha256"]
    without = small_run(*words, rounds=4, name="without")
    assert summary_of(without)["state_sha256"] != summary_of(once)["state_sha256"]
    assert list((once / "residuals").rglob("*.safetensors"))
    assert not (without / "residuals").exists()


def test_of_several_alphas_each_client_takes_the_one_with_the_lowest_loss(small_run):
    """Of 3, which learns, and 1000, which doesn't, every client takes 3 in every round; of one there is no choice."""
    words = ("codec_up=compeft", "train.lr=0.01", "data.client_heldout=0.3")
    results = {
        alpha: summary_of(small_run(*words, f"codec_up.alpha={alpha}", name=f"run-{number}"))["state_sha256"]
        for number, alpha in enumerate(["3", "[3]", "[1000,3]", "[1000]"])
    }
    assert results["3"] == results["[3]"] == results["[1000,3]"] != results["[1000]"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=flora", "codec_up=stc"], "codec_up=stc is lossy, and what method=flora sends up"),
        (["method=fedex_lora", "codec=topk"], "codec_down=topk is lossy, and what method=fedex_lora sends down"),
        (["method=fedkseed", "codec_up=compeft"], "codec_up=compeft is lossy"),
        (["codec_down=packed", "codec_down.feedback=true"], "feedback"),
        (
            ["codec=compeft", "codec.alpha=[1,2]", "codec_down.feedback=false"],
            "codec_down: several values of a setting are for clients",
        ),
        (["codec_up=compeft", "codec_up.alpha=[1,2]", "data.client_heldout=0"], "client_heldout=0 leaves them nothing"),
        (["codec_up=compeft", "codec_up.alpha=[]"], "expected a number above 0, or several"),
        (["codec_up=raw", "codec_up.feedback=true"], "feedback"),
        (["codec_up=stc", "codec_up.feedback=3"], "expected true or false"),
        (["codec=compeft", "codec.density=2"], "density=2: expected a share"),
    ],
)
def test_what_does_not_go_together_is_said_at_start(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        run_local(compose([*SMALL, f"out={tmp_path / 'run'}", *words]))


def test_another_apps_clients_take_no_lossy_codec():
    from fedtune.server.flower_strategy import as_flower_strategy
    from strategies.fedit import FedIT

    with pytest.raises(ConfigError, match="codec=STC"):
        as_flower_strategy(FedIT(), STC())


def test_the_same_seed_gives_the_same_bits(small_run):
    one, other = (small_run("codec=compeft", name=name) for name in ("one", "other"))
    assert summary_of(one)["state_sha256"] == summary_of(other)["state_sha256"]
    blobs = [[row["payload_bytes"] for row in rows(run, "ledger.csv")] for run in (one, other)]
    assert np.array_equal(*blobs)
