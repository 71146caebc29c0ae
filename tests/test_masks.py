"""Ternary updates as bit masks, and how much clients' updates agree, against numpy on dense vectors.

By hand: x = [+ - 0 + 0] and y = [+ + - 0 0] agree at one place and differ at one, so x . y = 0; with z = [+ - - 0 0],
x . z = 2 and both have three values that aren't zero, so their cosine is 2 / 3.
"""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import SMALL, rows, run_on, summary_of
from fedtune.workspace.workspace import Party
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtune.codecs import sparse
from fedtune.codecs.compeft import MAGIC, ComPEFT
from fedtune.codecs.raw import Raw
from fedtune.codecs.topk import TopK
from fedtune.config.compose import compose
from fedtune.core.errors import WireError
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.server.sign_masks import cosine, dot, masks_of, similarity, weighted_sum
from fedtune.server.update_similarity import every_two, signs_of
from fedtune.wire import messages as wire
from fedtune.wire.delta_coding import decode, encode

WORDS = ("evaluate.similarity=true", "population.cohort=3", "train.lr=0.01")


def of(*values):
    return masks_of({"w": torch.tensor(values, dtype=torch.float32)})


def dense(masks):
    """The vector of -1, 0 and 1, and nothing set beyond it."""
    bits = [np.unpackbits(each, bitorder="little").astype(int) for each in (masks.positive, masks.negative)]
    assert not any(each[masks.size :].any() for each in bits)
    return (bits[0] - bits[1])[: masks.size]


def cosine_of(x, y):
    size = math.sqrt((x != 0).sum() * (y != 0).sum())
    return float(x @ y) / size if size else 0.0


def test_by_hand():
    x, y, z = of(0.5, -2, 0, 7, 0), of(1, 1, -1, 0, 0), of(9, -9, -9, 0.0, -0.0)
    assert (dot(x, y), dot(x, z), dot(y, z)) == (0, 2, 1)
    assert (x.size, x.count, x.positive.nbytes) == (5, 3, 8)
    assert cosine(x, z) == 2 / 3
    np.testing.assert_array_equal(similarity([x, y, z]), [[1, 0, 2 / 3], [0, 1, 1 / 3], [2 / 3, 1 / 3, 1]])
    np.testing.assert_array_equal(weighted_sum([x, y, z], [1, 2, 0.25]), [3.25, 0.75, -2.25, 1, 0])


def test_tensors_are_one_vector_by_name_of_any_shape_and_dtype():
    tensors = {
        "b": torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16),
        "a": torch.tensor([-3.0, 0.0, float("nan")], dtype=torch.float64),
        "empty": torch.zeros(0),
        "c": torch.tensor(-(2**40)),
    }
    assert dense(masks_of(tensors)).tolist() == [-1, 0, 0, 1, -1, -1]


def test_a_difference_too_small_to_be_added_counts():
    large = torch.tensor([1e6, 1e6, 1e6])
    above = torch.nextafter(large[:1], torch.tensor([2e6]))
    assert dense(masks_of({"w": torch.cat([above, large[1:]])}, {"w": large})).tolist() == [1, 0, 0]


def test_two_bits_a_value():
    masks = masks_of({"w": torch.randn(64_000)})
    assert (masks.positive.nbytes + masks.negative.nbytes) * 8 == 2 * 64_000


def test_none_are_alike_and_sizes_have_to_be_the_same():
    assert similarity([]).shape == (0, 0)
    assert similarity([of(), of()]).tolist() == [[1, 0], [0, 1]]
    for call in (dot, cosine, lambda one, other: similarity([other, one])):
        with pytest.raises(WireError, match="masks of 3 and of 2 values"):
            call(of(1, 1, 1), of(1, 1))
    with pytest.raises(WireError, match=r"sizes \[1, 2\]"):
        weighted_sum([of(1), of(1, 1)], [1, 1])
    with pytest.raises(WireError, match=r"sizes \[\]"):
        weighted_sum([], [])


@st.composite
def ternary(draw):
    """Up to 6 vectors of one size, some all zeros."""
    size = draw(st.integers(0, 200))
    return draw(arrays(np.int8, (draw(st.integers(1, 6)), size), elements=st.integers(-1, 1)))


@given(ternary(), st.floats(1e-30, 1e30))
def test_as_dense_vectors_whatever_the_size_and_the_scale(vectors, scale):
    masks = [masks_of({"w": torch.from_numpy(each.astype(np.float64) * scale)}) for each in vectors]
    wide = vectors.astype(int)
    for one, x in zip(masks, wide, strict=True):
        np.testing.assert_array_equal(dense(one), x)
        for other, y in zip(masks, wide, strict=True):
            assert dot(one, other) == x @ y
            assert cosine(one, other) == pytest.approx(cosine_of(x, y), abs=1e-12)
    found = similarity(masks)
    assert found.dtype == np.float64
    assert (found == found.T).all()
    assert (np.abs(found) <= 1).all()
    assert (np.diag(found) == 1).all()


@given(ternary(), st.lists(st.floats(-8, 8), min_size=6, max_size=6))
def test_sums_are_those_of_the_dense_vectors(vectors, weights):
    weights = weights[: len(vectors)]
    masks = [masks_of({"w": torch.from_numpy(each)}) for each in vectors]
    np.testing.assert_allclose(weighted_sum(masks, weights), np.array(weights) @ vectors, rtol=1e-6, atol=1e-6)


def test_merging_masks_is_averaging_what_is_decoded():
    codec, shares = ComPEFT(density=0.3), [0.5, 0.3, 0.2]
    draw = torch.Generator().manual_seed(2)
    meant = [{"w": torch.randn(999, generator=draw) * scale} for scale in (1.0, 2.0, 0.1)]
    decoded = [codec.decode(codec.encode(each, 0), {"w": (999,)})["w"].numpy() for each in meant]
    weights = [share * np.abs(each).max() for share, each in zip(shares, decoded, strict=True)]
    found = weighted_sum([masks_of({"w": torch.from_numpy(each)}) for each in decoded], weights)
    np.testing.assert_allclose(found, np.average(decoded, axis=0, weights=shares), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("coder", ["golomb", "range"])
def test_masks_of_compeft_are_those_on_the_wire(coder):
    """Even of values so small beside their starts that the server's sum of both doesn't show them."""
    codec, shapes = ComPEFT(density=0.2, alpha=1e-9, scale="global", coder=coder), {"a": (1001,), "b": (7, 11)}
    draw = torch.Generator().manual_seed(1)
    known = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    blob = encode(codec, {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, 0, known)
    tensors = decode(codec, blob, known)
    signs = signs_of(tensors, blob, codec, known, known)
    assert signs.shapes == tuple(shapes.items())
    # "fd", version, form 0, no other tensors: then what ComPEFT wrote, 4 bytes of magnitude before its signs
    _, places, values = sparse.decode(MAGIC, blob[5:], shapes, lambda count: 4 + (count + 7) // 8)
    expected = np.zeros(1001 + 77)
    expected[places] = sparse.read_signs(values[4:], len(places))
    np.testing.assert_array_equal(dense(signs.masks), expected)
    assert signs.masks.count == len(places) == math.floor(0.2 * (1001 + 77))
    assert (tensors["a"] != known["a"]).sum() < np.count_nonzero(expected[:1001])


def test_what_an_update_is():
    """Only names that both have; a factor that was cut to a lower rank is beside what it was cut from; of what is no
    update, floating tensors as they are."""
    known = {"a": torch.ones(4, 2), "b": torch.ones(3), "unused": torch.ones(9), "count": torch.tensor([5])}
    sent = {"a": torch.tensor([[2.0, 1.0], [0.5, 1.0]]), "new": -torch.ones(5), "count": torch.tensor([6])}
    for codec in (Raw(), TopK(density=1, values="float32")):
        blob = encode(codec, sent, 0, known)
        found = signs_of(sent, blob, codec, known, known)
        assert found.shapes == (("a", (2, 2)),)
        assert dense(found.masks).tolist() == [1, 0, -1, 0]
    found = signs_of(sent, Raw().encode(sent, 0), Raw(), None, {})
    assert [name for name, _ in found.shapes] == ["a", "new"]
    assert dense(found.masks).tolist() == [1] * 4 + [-1] * 5


def test_only_updates_of_the_same_tensors_are_compared():
    def told(shape):
        return signs_of({"w": torch.ones(shape)}, b"", Raw(), None, {})

    nothing = signs_of({}, b"", Raw(), None, {})
    found = list(every_two({7: told((2, 3)), 2: told((2, 3)), 5: told((3, 2)), 9: nothing, 8: nothing}))
    assert [(one, other) for one, other, _ in found] == list(combinations([2, 5, 7, 8, 9], 2))
    assert {(one, other): value for one, other, value in found if value is not None} == {(2, 7): 1.0}


def recorded(folder, *words):
    """Run it, and return the updates that crossed the wire: by round and peer, what was sent and what it became."""
    workspace = Party(compose([*SMALL, *words]))
    found = {}
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))
    app.evaluate()(lambda message, context: inner(message, context))

    @app.train()
    def train(message, context):
        reply = inner(message, context)
        sent = workspace.hear(message.content, 0, 0)[0].tensors
        became = wire.unpack_update(reply.content, wire.blob_of(reply.content), workspace.codec_up, sent).tensors
        found[int(message.metadata.group_id), int(context.node_config["partition-id"])] = sent, became
        return reply

    run_on(LocalGrid, app, folder, *words, "rounds=2")
    return found


def flat(sent, became):
    return np.concatenate([np.sign((became[name] - sent[name]).numpy()).ravel() for name in sorted(became)])


@pytest.mark.parametrize(
    "codecs",
    [
        ("codec=raw",),
        ("codec_up=raw", "codec_down=nf4"),
        ("codec_up=compeft", "codec_up.density=0.2", "codec_up.alpha=2"),
        ("codec_up=compeft", "codec_up.feedback=true", "codec_down=int8"),
    ],
)
def test_a_run_writes_what_numpy_makes_of_the_decoded_updates(tmp_path, codecs):
    sent = recorded(tmp_path / "run", *WORDS, *codecs)
    lines = rows(tmp_path / "run", "similarity.csv")
    expected = [
        (number, one, other, cosine_of(flat(*sent[number, one]), flat(*sent[number, other])))
        for number in (1, 2)
        for one, other in combinations(sorted(peer for when, peer in sent if when == number), 2)
    ]
    assert len(lines) == len(expected) == 2 * 3
    for line, (*place, value) in zip(lines, expected, strict=True):
        assert [int(line[name]) for name in ("round", "peer", "other")] == place
        assert float(line["similarity"]) == pytest.approx(value, abs=1e-12)
    assert all(0.01 < float(line["similarity"]) < 1 for line in lines)


def test_it_is_written_on_request_and_changes_nothing_else(small_run):
    plain, asked = small_run("train.lr=0.01", name="plain"), small_run(*WORDS, name="asked")
    assert not (plain / "similarity.csv").exists()
    assert summary_of(plain)["state_sha256"] == summary_of(asked)["state_sha256"]
    assert summary_of(plain)["totals"] == summary_of(asked)["totals"]


def test_a_resume_takes_the_lines_of_an_undone_round_out(small_run):
    whole = small_run(*WORDS, name="whole", rounds=3)
    parts = small_run(*WORDS, name="parts", rounds=1)
    with (parts / "similarity.csv").open("a") as stream:
        stream.write("2,0,1,0.5\n2,0,")
    run_local(compose([*SMALL, *WORDS, "rounds=3", f"out={parts}"]), resume=str(parts))
    assert len(rows(whole, "similarity.csv")) == 9
    assert (whole / "similarity.csv").read_bytes() == (parts / "similarity.csv").read_bytes()


@pytest.mark.parametrize("codec", ["raw", "compeft"])
def test_of_mixed_ranks_only_the_same_are_compared(small_run, codec):
    folder = small_run(
        *WORDS, "method=zero_pad", "population.ranks=[8,4]", "population.cohort=4", f"codec_up={codec}", rounds=1
    )
    lines = {(row["peer"], row["other"]): row["similarity"] for row in rows(folder, "similarity.csv")}
    assert len(lines) == 6
    assert {pair for pair, value in lines.items() if value} == {("0", "2"), ("1", "3")}


@pytest.mark.parametrize(
    ("method", "compared"),
    [("scaffold", True), ("fedsa_lora", True), ("full_delta", True), ("decomfl", False), ("local_only", False)],
)
def test_methods_whose_answers_are_other_than_an_adapter(small_run, method, compared):
    """SCAFFOLD's control variates, half a model, weight changes; whole numbers, and nothing at all."""
    folder = small_run(*WORDS, f"method={method}", rounds=1)
    assert summary_of(folder)["status"] == "finished"
    assert [bool(row["similarity"]) for row in rows(folder, "similarity.csv")] == [compared] * 3
