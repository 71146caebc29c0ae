"""ComPEFT, top-k and STC against numpy, with every kind of tensor, and on hostile bytes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.codecs import sparse
from fedtune.codecs.compeft import ComPEFT
from fedtune.codecs.sparse import largest, shapes_of
from fedtune.codecs.stc import STC
from fedtune.codecs.topk import TopK
from fedtune.core.errors import ConfigError, WireError

CODERS = ["golomb", "range"]
CODECS = [
    ComPEFT(),
    ComPEFT(density=0.05, scale="global", coder="range"),
    TopK(),
    TopK(values="float32", coder="range"),
    STC(),
]
each = pytest.mark.parametrize("codec", CODECS, ids=repr)


def there_and_back(codec, tensors):
    return codec.decode(codec.encode(tensors, 0), shapes_of(tensors))


@pytest.mark.parametrize("coder", CODERS)
def test_compeft_by_hand(coder):
    """Six values over two tensors, by name: 1, -5, 0 | 3, -3, 2. Half of them are -5, 3 and -3. Their mean is -1/3,
    their mean square 8, and the variance 8 - 1/9 = 71/9."""
    tensors = {"b": torch.tensor([[3.0], [-3.0], [2.0]]), "a": torch.tensor([1.0, -5.0, 0.0])}
    found = there_and_back(ComPEFT(density=0.5, alpha=2.0, scale="global", coder=coder), tensors)
    size = 2 * math.sqrt(71 / 9)
    assert found["a"].tolist() == pytest.approx([0, -size, 0])
    assert found["b"].flatten().tolist() == pytest.approx([size, -size, 0])
    assert found["b"].shape == (3, 1)


def test_a_magnitude_for_each_tensor():
    """std(1, -5, 0) is sqrt(26/3 - 16/9) = sqrt(62)/3, that of 3, -3, 2 is sqrt(22/3 - 4/9) = sqrt(62)/3 as well."""
    tensors = {"a": torch.tensor([1.0, -5.0, 0.0]), "b": torch.tensor([3.0, -3.0, 2.0]) * 10, "none": torch.zeros(0)}
    found = there_and_back(ComPEFT(density=0.5, alpha=1, scale="per_tensor"), tensors)
    assert found["a"].tolist() == [0, 0, 0]
    assert found["b"].tolist() == pytest.approx(
        [10 * math.sqrt(62) / 3, -10 * math.sqrt(62) / 3, 10 * math.sqrt(62) / 3]
    )


def test_without_an_alpha_what_is_sent_is_as_long_as_the_update_and_with_feedback_it_is_their_mean():
    """Of 1, -5, 0 | 3, -3, 2 half are -5 | 3, -3: means 5 | 3, over both 11/3. The squares of all sum to 48, those of
    the means to 25 + 9 + 9 = 43, of the mean over both to 121/3; so c is sqrt(48/43) | 12/11, and 12/11 11/3 is 4."""
    tensors = {"b": torch.tensor([[3.0], [-3.0], [2.0]]), "a": torch.tensor([1.0, -5.0, 0.0])}
    means = {"per_tensor": ([0, -5, 0], [3, -3, 0]), "global": ([0, -11 / 3, 0], [11 / 3, -11 / 3, 0])}
    for scale, longer in (("per_tensor", math.sqrt(48 / 43)), ("global", 12 / 11)):
        for feedback, times in ((True, 1), (False, longer)):
            found = there_and_back(ComPEFT(density=0.5, scale=scale, feedback=feedback), tensors)
            for name, mean in zip("ab", means[scale], strict=True):
                assert found[name].flatten().tolist() == pytest.approx([times * value for value in mean])


values = st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, 1.0, -1.0, 1e-3]))


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(values, min_size=1, max_size=70), min_size=1),
    st.floats(0.02, 1),
    st.sampled_from(["global", "per_tensor"]),
)
def test_whatever_is_sent_is_as_long_as_the_update(lists, density, scale):
    """With one tensor's values all equal too, of which the standard deviation is 0, or only few of a tensor sent."""
    tensors = {name: torch.tensor(listed) for name, listed in lists.items()}
    found = there_and_back(ComPEFT(density=density, scale=scale), tensors)
    was, sent = (math.hypot(*(x for tensor in some.values() for x in tensor.tolist())) for some in (tensors, found))
    count = math.floor(density * sum(map(len, tensors.values())))
    assert sent == pytest.approx(was if count else 0, rel=1e-6, abs=1e-44)


def test_topk_and_stc_by_hand():
    tensors = {"w": torch.tensor([0.1, -4.0, 2.0, 0.0, -1.0])}
    assert there_and_back(TopK(density=0.4), tensors)["w"].tolist() == [0, -4, 2, 0, 0]
    assert there_and_back(STC(density=0.4), tensors)["w"].tolist() == [0, -3, 3, 0, 0]
    third = torch.tensor([1 / 3])
    assert there_and_back(TopK(density=1), {"w": third})["w"] == third.bfloat16().float()
    assert there_and_back(TopK(density=1, values="float32"), {"w": third})["w"] == third
    most = torch.tensor([torch.finfo(torch.float32).max])
    assert torch.isfinite(there_and_back(TopK(density=1), {"w": most})["w"])


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40]), max_size=60), st.floats(0.01, 1))
def test_as_many_as_asked_the_largest_and_of_equals_the_first(values, density):
    flat = np.array(values, np.float32)
    order = sorted((-abs(float(value)), place) for place, value in enumerate(flat) if value)
    assert largest(flat, density).tolist() == sorted(place for _, place in order[: math.floor(density * len(flat))])


@each
@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"none": torch.zeros(0, 3)},
        {"scalar": torch.tensor(-2.0)},
        {"zeros": torch.zeros(7, 5)},
        {"constant": torch.full((9, 9), -0.25), "none": torch.zeros(0)},
        {"tiny": torch.full((40,), 1e-42), "half": torch.linspace(-1, 1, 333).bfloat16()},
        {"odd": torch.randn(13, 7, 3, generator=torch.Generator().manual_seed(0))},
    ],
    ids=lambda tensors: "-".join(tensors) or "nothing",
)
def test_round_trips(codec, tensors):
    found = there_and_back(codec, tensors)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in tensors.items()}
    flat = np.concatenate([tensors[name].float().numpy().reshape(-1) for name in sorted(tensors)] or [np.zeros(0)])
    got = np.concatenate([found[name].numpy().reshape(-1) for name in sorted(found)] or [np.zeros(0)])
    chosen = largest(flat.astype(np.float32), codec.density)
    assert not np.delete(got, chosen).any()
    assert np.all((np.sign(got[chosen]) == np.sign(flat[chosen])) | (got[chosen] == 0))
    assert codec.encode(tensors, 0) == codec.encode(tensors, 1)


@pytest.mark.parametrize(("density", "bits"), [(0.01, 0.0911), (0.05, 0.3393), (0.1, 0.5756), (0.2, 0.9388)])
def test_sizes(density, bits):
    """Bits a parameter as published, and against the entropy."""
    size = 1_000_000
    tensors = {"w": torch.randn(size, generator=torch.Generator().manual_seed(1))}
    entropy = -size * ((1 - density) * math.log2(1 - density) + density * math.log2(density / 2)) / 8
    golomb, ranged = (len(ComPEFT(density=density, coder=coder).encode(tensors, 0)) for coder in CODERS)
    assert golomb * 8 / size == pytest.approx(bits, rel=2e-3)
    assert golomb <= 1.02 * entropy + 64
    assert ranged <= 1.005 * entropy + 64


@each
def test_hostile_bytes_end_in_an_error_or_in_tensors(codec):
    draw = np.random.default_rng(0)
    shapes = {"a": (30, 7), "b": (5,), "c": ()}
    right = codec.encode({name: torch.randn(shape) for name, shape in shapes.items()}, 0)
    refused = 0
    for number in range(600):
        blob = bytearray(right)
        if number % 3 == 0:
            blob[draw.integers(len(blob))] ^= 1 << draw.integers(8)
        elif number % 3 == 1:
            blob = blob[: draw.integers(len(blob))] + draw.bytes(draw.integers(4) if number % 2 else 0)
        else:
            blob = blob[:5] + draw.bytes(draw.integers(60))
        try:
            found = codec.decode(bytes(blob), shapes)
        except WireError:
            refused += 1
        else:
            assert shapes_of(found) == shapes
            assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert refused > 300


@each
def test_another_codecs_blob_is_refused(codec):
    shapes = {"w": (50,)}
    for other in CODECS:
        if type(other) is not type(codec):
            with pytest.raises(WireError, match="begin with"):
                codec.decode(other.encode({"w": torch.ones(50)}, 0), shapes)
    with pytest.raises(WireError, match="50 values are sent, of 8"):
        codec.decode(replace(codec, density=1).encode({"w": torch.ones(50)}, 0), {"w": (8,)})


def test_infinities_are_refused_by_name():
    with pytest.raises(WireError, match="'bad'"):
        ComPEFT().encode({"bad": torch.tensor([1.0, math.inf])}, 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ComPEFT(density=0), "density=0: expected a share"),
        (lambda: TopK(density=1.5), "density=1.5: expected a share"),
        (lambda: STC(coder="zip"), "coder=zip is not known: expected golomb or range"),
        (lambda: ComPEFT(alpha=-1), "alpha=-1: expected a number above 0"),
        (lambda: ComPEFT(scale="row"), "scale=row is not known"),
        (lambda: TopK(values="int8"), "values=int8 is not known"),
    ],
)
def test_settings_out_of_range(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


UNLIKE = {
    "much": 100 * torch.randn(2000, generator=torch.Generator().manual_seed(0)),
    "little": torch.randn(90, 333, generator=torch.Generator().manual_seed(1)),
}
BY_TENSORS = STC().encode(UNLIKE, 0)


def test_golombs_parameter_is_each_tensors_own_where_that_is_shorter():
    """Nearly all of one tensor is sent and little of the other, then as much of one as of the other."""
    assert BY_TENSORS[3] == 2
    chosen = largest(sparse.flattened(UNLIKE), 0.05)
    whole = len(sparse.CODERS["golomb"][0](chosen, 2000 + 90 * 333))
    assert len(BY_TENSORS) < 0.8 * (whole + len(chosen) / 8)
    found, ranged = (there_and_back(STC(coder=coder), UNLIKE) for coder in CODERS)
    assert all(torch.equal(found[name], ranged[name]) for name in UNLIKE)
    assert found["much"].count_nonzero() > 0.7 * 2000
    assert STC().encode({name: torch.randn(50) for name in "abc"}, 0)[3] == 0


@pytest.mark.slow
def test_hostile_positions_by_tensors():
    draw, shapes = np.random.default_rng(0), shapes_of(UNLIKE)
    errors = 0
    for _ in range(2000):
        blob = bytearray(BY_TENSORS)
        for _ in range(draw.integers(1, 4)):
            blob[draw.integers(4, 40 if draw.random() < 0.5 else len(blob))] ^= 1 << draw.integers(8)
        if draw.random() < 0.3:
            del blob[draw.integers(len(blob)) :]
        try:
            found = STC().decode(bytes(blob), shapes)
        except WireError:
            errors += 1
            continue
        assert shapes_of(found) == shapes
    assert errors > 1000


@pytest.mark.parametrize(
    ("where", "count", "said"),
    [
        (b"", 0, "it ends within the number of a tensor's values"),
        (b"\0\0\0\0\0", 0, "1 bytes follow the last tensor's positions"),
        (b"\0\0\0\0", 1, "1 values are sent, and there are 0 positions"),
        (b"\5\0\0\0", 5, "5 positions of 4"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f\0\0\0", 1, "positions of 4"),
        (b"\1\x7f\0\0", 1, "it ends within a tensor's positions"),
    ],
)
def test_lies_about_positions_by_tensors(where, count, said):
    values = b"\0" * (4 + (count + 7) // 8)
    with pytest.raises(WireError, match=said):
        STC().decode(b"ft\1\2" + bytes([count, len(where)]) + where + values, {"a": (4,), "b": (4,)})


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.05, 0.5, 1])
@pytest.mark.parametrize("kind", ["normal", "equal", "steps", "sparse", "the sample is large", "the sample is zero"])
def test_the_largest_wherever_the_sample_leads(kind, density):
    draw = np.random.default_rng(0)
    flat = draw.standard_normal(3 * sparse.BLOCK + 5).astype(np.float32)
    if kind == "equal":
        flat[:] = -0.1
    elif kind == "steps":
        flat = np.round(2 * flat)
    elif kind == "sparse":
        flat[draw.random(len(flat)) > 0.01] = -0.0
    elif kind.startswith("the sample"):
        flat[:: sparse.STRIDE] *= 100 if "large" in kind else 0
    # A stable sort by magnitude, without the zeros
    order = np.argsort(-np.abs(flat), kind="stable")[: math.floor(density * len(flat))]
    assert largest(flat, density).tolist() == sorted(order[flat[order] != 0].tolist())


@pytest.mark.parametrize("size", [1, 2, 1000, sparse.BLOCK, sparse.BLOCK + 1, 5 * sparse.BLOCK - 1])
@pytest.mark.parametrize("mean", [0, -30, 1e4])
def test_a_deviation_is_numpys(size, mean):
    values = (np.random.default_rng(size).standard_normal(size) + mean).astype(np.float32)
    assert sparse.deviation(values) == pytest.approx(values.std(dtype=np.float64), rel=1e-13)
    assert np.float32(sparse.deviation(values)) == np.float32(values.std(dtype=np.float64))
    assert sparse.deviation(values[:0]) == 0
