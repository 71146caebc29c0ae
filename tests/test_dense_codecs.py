"""The lossy codecs bf16, int8, nf4 and signsgd: bytes by hand, errors within their bounds, lengths by their formulas,
and nothing for a hostile blob to gain."""

import hashlib
import math
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from conftest import many
from hypothesis import given
from hypothesis import strategies as st

from fedtune.codecs.bf16 import Bf16
from fedtune.codecs.blob import LARGEST
from fedtune.codecs.int8 import MOST, Int8
from fedtune.codecs.nf4 import MIDPOINTS, TABLE, Nf4
from fedtune.codecs.signsgd import SignSGD
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.workspace.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("error")

CODECS = [Bf16(), Int8(), Nf4(), Nf4(block=3), SignSGD()]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)
NAMES = {Bf16: "bf16", Int8: "int8", Nf4: "nf4", SignSGD: "signsgd"}
OWN = {Bf16: b"fb\x01", Int8: b"fi\x01", Nf4: b"fn\x01", SignSGD: b"fs\x01"}
TINY = 2.0**-149  # float32's least
TERA = 1 << 40


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def through(codec, tensors, key=0):
    decoded = codec.decode(codec.encode(tensors, key), shapes_of(tensors))
    expect_form(decoded, shapes_of(tensors))
    return decoded


def expect_form(decoded, shapes):
    assert list(decoded) == sorted(shapes)
    for name, tensor in decoded.items():
        assert tensor.dtype == torch.float32
        assert tuple(tensor.shape) == shapes[name]
        assert tensor.is_contiguous()
        assert torch.isfinite(tensor).all()
        tensor *= 1  # owned and writable


def rows_of(shape):
    return math.prod(shape[:-1]) if len(shape) > 1 else 1


def length(codec, shapes):
    """The formulas of the docstrings."""
    filled = [shape for shape in shapes if math.prod(shape)]
    return 3 + sum(
        {
            Bf16: lambda shape, n: 2 * n,
            Int8: lambda shape, n: 4 * rows_of(shape) + n,
            Nf4: lambda shape, n: 4 * math.ceil(n / codec.block) + math.ceil(n / 2),
            SignSGD: lambda shape, n: 4 + math.ceil(n / 8),
        }[type(codec)](shape, math.prod(shape))
        for shape in filled
    )


def bound(codec, tensor):
    """The largest error that a codec's docstring allows each value, float64 numpy."""
    x = np.abs(tensor.double().numpy())
    if not x.size:
        return x
    if isinstance(codec, Bf16):
        return np.maximum(x * 2**-8, 2.0**-134)
    if isinstance(codec, Int8):
        most = x.reshape(rows_of(x.shape), -1).max(axis=1, keepdims=True)
        scale = np.maximum(most / 127 * (1 + 2**-23), TINY * (most > 0))
        # Twice TINY for a scale that is denormal, and so rounded up by up to that
        scale = np.where(scale < 2.0**-126, scale + TINY, scale) * (most > 0)
        return np.broadcast_to((1 + 2**-16) * scale, (len(scale), x.size // len(scale))).reshape(x.shape)
    if isinstance(codec, Nf4):
        flat = x.reshape(-1)
        most = np.concatenate(
            [np.full(len(f), f.max()) for f in np.split(flat, range(codec.block, len(flat), codec.block))]
        )
        return (0.152 * most + TINY * (most > 0)).reshape(x.shape)
    return np.full(x.shape, x.max())


def expect_within(codec, tensors, key=0):
    blob = codec.encode(tensors, key)
    assert len(blob) == length(codec, shapes_of(tensors).values())
    assert blob[:3] == OWN[type(codec)]
    decoded = codec.decode(blob, shapes_of(tensors))
    expect_form(decoded, shapes_of(tensors))
    for name, tensor in tensors.items():
        x = tensor.detach().float()
        error = np.abs(decoded[name].double().numpy() - x.double().numpy())
        assert (error <= bound(codec, x)).all(), (name, error.max())
    return decoded


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# --- each codec by hand


def test_bf16_by_hand():
    """1 is 3f80. 1 + 2^-8 is half way to 3f81 = 1 + 2^-7: to the even 3f80. 1 + 3 2^-8 is half way from 3f81 to 3f82:
    to 3f82. A little above half way, 1 + 2^-8 + 2^-23, goes up. -0 is 8000, and float32's largest saturates at 7f7f."""
    x = torch.tensor([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, -0.0, LARGEST, -LARGEST, 2.0**-133, 2.0**-134])
    halves = struct.pack("<9H", 0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x8000, 0x7F7F, 0xFF7F, 1, 0)
    assert Bf16().encode({"b": x, "a": torch.tensor(2.0)}, 0) == b"fb\x01" + b"\x00\x40" + halves


def test_bf16_rounds_every_half_way_and_its_neighbours_as_whole_numbers_do():
    """The upper half plus one if the lower is above 8000, or equal and the upper odd; 7f80 would be infinite."""
    upper = np.arange(0x7F80, dtype=np.uint32)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        nearest = np.minimum(upper + ((lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1))), 0x7F7F)
        x = torch.from_numpy((upper << 16 | lower).view(np.float32))
        for sign in (1, -1):
            decoded = through(Bf16(), {"x": sign * x})["x"]
            assert np.array_equal((sign * decoded).numpy().view(np.uint32), nearest << 16)


def test_every_bf16_comes_back_as_it_was():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[torch.isfinite(x)]
    assert torch.equal(through(Bf16(), {"x": x})["x"].bfloat16().view(torch.int16), x.view(torch.int16))


def test_int8_by_hand():
    """Whole multiples of the scale aren't rounded, whatever is drawn. Rows of 127 and 254 have the scales 1 and 2, and
    the third row, all zeros, 0: 00 00 80 3f, 00 00 00 40, 00 00 00 00; then 127 -1 0, 127 -127 1, 0 0 0."""
    x = torch.tensor([[127, -1, 0], [254, -254, 2], [0, 0, 0]])
    expected = b"fi\x01" + struct.pack("<3f9b", 1, 2, 0, 127, -1, 0, 127, -127, 1, 0, 0, 0)
    for dtype in (torch.float32, torch.float64, torch.float16):
        for key in range(20):
            assert Int8().encode({"x": x.to(dtype)}, key) == expected
    vector = {"v": x[0].float(), "s": torch.tensor(-127.0)}
    assert Int8().encode(vector, 0) == b"fi\x01" + struct.pack("<fbf3b", 1, -127, 1, 127, -1, 0)


def test_int8_adds_its_draws_by_hand(monkeypatch):
    """Four of a word, from its lowest bits, as (j + 1/2) / 2^16, at a scale of 1: 127 + 1 - 2^-17 stays 127;
    1/2 + 1/2 - 2^-17 is 0 and 1/2 + 1/2 + 2^-17 is 1; 1/2 + 2^-17 and 1/2 - 2^-17 are just 1."""
    word = 0xFFFF | 0x7FFF << 16 | 0x8000 << 32 | 0x7FFF << 48
    monkeypatch.setattr("fedtune.core.seeds.bits", lambda key, count: np.full(count, word, np.uint64))
    x = torch.tensor([127, 0.5, 0.5, 0.5 + 2**-17, -127])
    assert through(Int8(), {"x": x})["x"].tolist() == [127, 0, 1, 1, -127]


def test_int8_rounds_up_with_the_probability_of_what_is_left():
    """From -127 to 127 in steps of 1/4, scale 1: a value of q + 1/4 is q + 1 in a quarter of the draws. The mean over
    `keys` draws of each is within 5 standard deviations, sqrt(f (1 - f) / keys), and so is the mean of all errors."""
    x = torch.arange(-127, 127.25, 0.25)
    keys = 400
    decoded = torch.stack([through(Int8(), {"x": x}, key)["x"] for key in range(keys)]).double()
    assert ((decoded == x.floor()) | (decoded == x.ceil())).all()
    left = (x - x.floor()).double()
    sigma = (left * (1 - left) / keys).sqrt()
    assert ((decoded.mean(0) - x).abs() <= 5 * sigma + 2**-16).all()
    assert abs(float((decoded - x).mean())) <= 5 * float(sigma.square().sum().sqrt()) / len(x) + 2**-16


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1,), (301,), (50, 7), (5, 3, 20)])
def test_the_mean_of_int8_over_keys_is_what_was_encoded(shape):
    """The error of one draw is below the scale with a deviation of at most half of it: 5 sigma of `keys` draws."""
    x, keys = normal(*shape, seed=4), 900
    mean = sum(through(Int8(), {"x": x}, key)["x"].double() for key in range(keys)) / keys
    scale = torch.from_numpy(bound(Int8(), x).copy())
    assert ((mean - x).abs() <= scale * (5 * 0.5 / keys**0.5 + 2**-16)).all()


def test_int8_draws_by_key_and_name_and_the_same_everywhere():
    """Two tensors of the same values err apart, as two keys do. The digest is of what any machine should make."""
    x = normal(64, 64)
    blob = Int8().encode({"a": x, "b": x}, 3)
    assert blob == Int8().encode({"b": x.clone(), "a": x.T.contiguous().T}, 3)
    one, other = (np.frombuffer(blob, np.uint8)[3:].reshape(2, -1)[i, 4 * 64 :] for i in (0, 1))
    again = np.frombuffer(Int8().encode({"a": x}, 4), np.uint8)[3 + 4 * 64 :]
    assert 0.2 < (one != other).mean() < 0.5
    assert 0.2 < (one != again).mean() < 0.5
    ramp = torch.arange(-500, 524, dtype=torch.float32).reshape(32, 32) / 77
    digest = hashlib.sha256(Int8().encode({"w": ramp}, 2**63 - 1)).hexdigest()
    assert digest == "8fac253e61717ff54569ff17760a46626a76b9a4b85e62145d5d375bddaa7754"


def test_the_scale_of_int8_is_the_least_that_127_of_reach():
    """By whole numbers: float32s are multiples of TINY, so 127 scale >= max is exact there."""
    bits = np.random.default_rng(0).integers(1, 0x7F7FFFFE, 20_000, dtype=np.uint32)
    bits[:200] = np.arange(1, 201)
    x = torch.from_numpy(bits.view(np.float32))[:, None]
    x = x[x[:, 0] <= 127 * float(MOST)]
    blob = Int8().encode({"x": x}, 0)
    scales = np.frombuffer(blob[3 : 3 + 4 * len(x)], np.float32)
    below = np.nextafter(scales, np.float32(0)).astype(np.float64)
    assert (scales.astype(np.float64) * 127 >= x[:, 0].numpy()).all()
    assert (below * 127 < x[:, 0].numpy()).all()
    assert set(np.frombuffer(blob[3 + 4 * len(x) :], np.int8)) <= set(range(1, 128))


def test_int8_of_denormals_is_exact_where_its_scale_is_the_least_there_is():
    """Up to 127 TINY the scale is TINY and every value a multiple of it; 128 TINY takes a scale of 2 TINY."""
    x = torch.arange(-127, 128).double() * TINY
    assert torch.equal(through(Int8(), {"x": x})["x"].double(), x)
    expect_within(Int8(), {"x": torch.arange(-128, 129).double() * TINY, "y": torch.tensor([190 * TINY, TINY])})


def test_int8_up_to_the_largest_it_has():
    """Of float32s all but the last two, for which 127 scale would be infinite."""
    last = [float(LARGEST) - two * 2.0**104 for two in range(3)]
    expect_within(Int8(), {"x": torch.tensor([1.0, -last[2]])})
    for beyond in last[:2]:
        with pytest.raises(WireError, match="tensor 'x' has values too close to float32's largest for codec=int8"):
            Int8().encode({"x": torch.tensor([1.0, -beyond])}, 0)
    for codec in (Bf16(), Nf4(), SignSGD()):
        expect_within(codec, {"x": torch.full((9,), float(LARGEST)), "y": torch.tensor([1.0, -float(LARGEST)])})


def test_nf4_by_hand():
    """Scale 2: 2 is 1.0, place 15; -2 place 0; 0 place 7; 1 / 2 = 0.5 is between 0.4407 (12) and 0.5626 (13), nearer to
    the former: 0.0593 < 0.0626; -0.09 / 2 = -0.045 is between -0.0911 (6) and 0 (7), and 0.045 < 0.046. Bytes f0, 7c,
    and 7 with a zero after it: 70. In blocks of 2 the third, -0.09 alone, has its own scale and place 0."""
    x = {"x": torch.tensor([2, -2, 0, 1, -0.09])}
    assert Nf4().encode(x, 0) == b"fn\x01" + struct.pack("<f", 2) + bytes.fromhex("f07c70")
    scales = struct.pack("<3f", 2, 1, np.float32(0.09))
    assert Nf4(block=2).encode(x, 0) == b"fn\x01" + scales + bytes.fromhex("f07f00")
    expected = torch.tensor([2, -2, 0, 2 * 0.44070982933044434, 0])
    assert torch.equal(through(Nf4(), x)["x"], expected)


def test_a_quotient_on_a_midpoint_takes_the_lower_number():
    middle = torch.from_numpy(MIDPOINTS)
    above = torch.nextafter(middle, torch.tensor(2.0))
    for scale in (1.0, 0.25):
        for x, expected in ((middle, TABLE[:-1]), (above, TABLE[1:])):
            decoded = through(Nf4(), {"x": torch.cat([x, torch.ones(1)]) * scale})["x"]
            assert np.array_equal(decoded.numpy(), np.append(expected, np.float32(1)) * np.float32(scale))


def test_the_table_is_that_of_bitsandbytes():
    assert np.array_equal(TABLE, get_4bit_type("nf4", device="cpu").numpy())
    assert np.diff(TABLE).max() / 2 < 0.152


@pytest.mark.parametrize("block", [64, 128, 1024])
@pytest.mark.parametrize("values", [64 * 1024, 64 * 1024 - 6, 64 * 1024 - 7, 10])
def test_nf4_is_the_same_as_that_of_bitsandbytes(block, values):
    """Scales, bytes and decoded values. After an odd number of them it has 7 in the last byte, the place of zero, and
    wants a compiler to decode."""
    x = normal(values, seed=block, scale=0.03)
    packed, state = quantize_4bit(x, blocksize=block, quant_type="nf4")
    places = packed.numpy().reshape(-1).copy()
    if values % 2:
        places[-1] &= 0xF0
    blob = Nf4(block=block).encode({"x": x}, 0)
    assert blob == b"fn\x01" + state.absmax.numpy().tobytes() + places.tobytes()
    if values % 2 == 0:
        theirs = dequantize_4bit(packed, state).reshape(-1)
        assert torch.equal(Nf4(block=block).decode(blob, {"x": (values,)})["x"], theirs)


def test_signsgd_by_hand():
    """Of 1, -2, 0, -0, 3, -4, 0, 2, -6: mean 18 / 9 = 2. Below zero are 1, 5 and 8: 2 + 32 = 22, and 01."""
    x = torch.tensor([[1, -2, 0], [-0.0, 3, -4], [0, 2, -6]])
    blob = b"fs\x01" + struct.pack("<f", 2) + bytes.fromhex("2201")
    assert SignSGD().encode({"x": x}, 0) == blob
    assert SignSGD().decode(blob, {"x": (3, 3)})["x"].tolist() == [[2, -2, 2], [2, 2, -2], [2, 2, -2]]


def test_the_scale_of_signsgd_is_the_one_with_the_least_squared_error():
    """|d - x|^2 = |x|^2 - n scale^2."""
    x = normal(40, 30)
    decoded = through(SignSGD(), {"x": x})["x"]
    scale = x.abs().double().mean()
    assert torch.equal(decoded, torch.where(x < 0, -1, 1) * scale.float())
    error = (decoded.double() - x.double()).square().sum()
    torch.testing.assert_close(error, x.double().square().sum() - 1200 * scale**2)


# --- all of them


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_comes_back_is_within_the_bound_and_the_blob_as_long_as_it_should_be(codec, dtype):
    tensors = {
        "scalar": torch.tensor(-0.7),
        "empty": torch.zeros(0),
        "no rows": torch.zeros(0, 5),
        "no columns": torch.zeros(3, 0),
        "one": torch.ones(1),
        "odd": normal(7, 13),
        "long": normal(1031, scale=1e-3),
        "column": normal(9, 1),
        "deep": normal(2, 3, 5),
        "zeros": torch.zeros(5, 9),
        "minus zeros": -torch.zeros(9),
        "constant": torch.full((4, 17), -0.3),
        "row of zeros": torch.stack([torch.zeros(8), normal(8)]),
        "small": normal(67, scale=1e-6),
        "wide": normal(200) * torch.logspace(-4, 4, 200),
        "transposed": normal(6, 10).T,
        "every other": normal(6, 10)[:, ::2],
        "é": torch.nn.Parameter(normal(3)),
    }
    decoded = expect_within(codec, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert not decoded["zeros"].any()
    assert not decoded["minus zeros"].any()
    # Sign and 16 levels have a constant's magnitude; int8 is a rounding away from it
    torch.testing.assert_close(decoded["constant"], tensors["constant"], rtol=2**-7, atol=0)


@every_codec
def test_denormals_are_within_the_bound(codec):
    draw = np.random.default_rng(1)
    for most in (2, 60, 64, 130, 1000, 1 << 22):
        bits = draw.integers(0, most, 301, dtype=np.uint32) | draw.integers(0, 2, 301, dtype=np.uint32) << 31
        expect_within(codec, {"x": torch.from_numpy(bits.view(np.float32)), "y": torch.tensor([[TINY, 0], [0, 0]])})


@every_codec
def test_no_tensors_are_a_head(codec):
    assert codec.encode({}, 0) == codec.encode({"a": torch.zeros(0)}, 0) == OWN[type(codec)]
    assert codec.decode(OWN[type(codec)], {}) == {}


@every_codec
def test_what_was_decoded_is_encoded_alike_and_nothing_given_is_changed(codec):
    """Except by int8, which draws again; the others round what is already round to itself."""
    x = normal(33, 7)
    before = x.clone()
    blob = codec.encode({"x": x}, 0)
    assert torch.equal(x, before)
    decoded = codec.decode(blob, shapes_of({"x": x}))
    if not isinstance(codec, Int8):
        assert codec.encode(decoded, 1) == blob


@every_codec
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.tensor([1, math.inf]), "tensor 'b' (float32 (2,)) has values that are not finite as float32"),
        (torch.tensor([[-math.inf]]), "tensor 'b' (float32 (1, 1)) has"),
        (torch.tensor([math.nan], dtype=torch.bfloat16), "tensor 'b' (bfloat16 (1,)) has"),
        (torch.tensor(1e300, dtype=torch.float64), "tensor 'b' (float64 ()) has"),
        (torch.tensor([1]), "tensor 'b' is int64 (1,): a lossy codec takes floats only"),
        (torch.tensor([True]), "tensor 'b' is bool (1,)"),
        (torch.zeros(1, dtype=torch.complex64), "tensor 'b' is complex64 (1,)"),
    ],
)
def test_what_has_no_place_is_refused_when_sent(codec, tensor, said):
    with pytest.raises(WireError) as caught:
        codec.encode({"a": torch.ones(2), "b": tensor}, 0)
    assert said in str(caught.value)


def built(*words):
    workspace = Workspace(compose(words))
    assert workspace.codec_up == workspace.codec_down
    return workspace.codec_up


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "int8", "nf4", "signsgd"])
def test_it_is_built_by_its_name_in_the_config(name):
    codec = built(f"codec={name}")
    assert codec in CODECS
    assert NAMES[type(codec)] == name
    assert not codec.lossless


def test_the_block_is_a_setting():
    assert built("codec=nf4", "codec.block=256") == Nf4(block=256)
    for block in (0, -1, 2.0, True, "64", None):
        with pytest.raises(ConfigError) as caught:
            Nf4(block=block)
        assert str(caught.value) == f"codec.block={block!r}: expected a whole number from 1 up"
    for block in (1, 2, 5, 10**30):
        expect_within(Nf4(block=block), {"x": normal(5, 3), "y": torch.zeros(2), "z": torch.tensor(3.0)})


# --- hostile blobs


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize(
    ("codec", "body", "shape", "said"),
    [
        (Bf16(), b"\x80\x7f", (1,), "tensor 'a': a value is not finite"),
        (Bf16(), b"\x00\x00\x81\xff", (2,), "a value is not finite"),
        (Bf16(), b"\x00", (1,), "1 tensors of these shapes take 5 bytes, got 4"),
        (Bf16(), b"\x00\x00", (0,), "take 3 bytes, got 5"),
        (
            Int8(),
            floats(math.inf) + b"\x01",
            (1,),
            "tensor 'a': a scale should be a number from 0 up to 2.67939e+36, got inf",
        ),
        (Int8(), floats(math.nan) + b"\x01", (1,), "got nan"),
        (Int8(), floats(1, -1) + b"\x01\x01", (2, 1), "got -1"),
        (Int8(), floats(-0.0) + b"\x00", (1,), "got -0"),
        (Int8(), floats(3e36) + b"\x00", (1,), "got 3e+36"),
        (Int8(), floats(1) + b"\x80", (1,), "a value is -128, they go from -127 to 127"),
        (Int8(), floats(1) + b"\x01\x01", (2, 1), "take 13 bytes, got 9"),
        (Nf4(), floats(math.nan) + b"\x70", (1,), "a scale should be a number from 0 up to 3.40282e+38, got nan"),
        (Nf4(), floats(-2) + b"\x70", (1,), "got -2"),
        (Nf4(), floats(1) + b"\x77", (1,), "tensor 'a': the bits after its last value should be zero"),
        (Nf4(), floats(1) + b"\x77\x71", (3,), "the bits after its last value should be zero"),
        (Nf4(), floats(1) + b"\x77" * 33, (66,), "take 44 bytes, got 40"),
        (SignSGD(), floats(-math.inf) + b"\x00", (1,), "got -inf"),
        (SignSGD(), floats(-0.0) + b"\x00", (8,), "got -0"),
        (SignSGD(), floats(1) + b"\x02", (1,), "the bits after its last value should be zero"),
        (SignSGD(), floats(1) + b"\x00\x80", (15,), "the bits after its last value should be zero"),
        (SignSGD(), floats(1) + b"\x00\x00", (8,), "take 8 bytes, got 9"),
    ],
)
def test_a_hostile_body_is_refused_by_name(codec, body, shape, said):
    blob = OWN[type(codec)] + body
    with pytest.raises(WireError) as caught:
        codec.decode(blob, {"a": shape})
    assert str(caught.value).startswith(f"not a blob of codec={NAMES[type(codec)]} ({len(blob)} bytes): ")
    assert said in str(caught.value)


@every_codec
def test_a_hostile_head_is_refused_by_name(codec):
    own = OWN[type(codec)][:2]
    for blob, said in [
        (b"", f"it should begin with {own!r}, got b''"),
        (b"f", "got b'f'"),
        (b"fp\x01", "got b'fp'"),
        (own, "expected version 1, got none"),
        (own + b"\x02", "expected version 1, got 2"),
        (own + b"\x01\x00", "0 tensors of these shapes take 3 bytes, got 4"),
    ]:
        with pytest.raises(WireError) as caught:
            codec.decode(blob, {})
        assert said in str(caught.value)


@every_codec
def test_a_length_that_does_not_fit_costs_nothing(codec):
    """Shapes of a terabyte with a blob of a few bytes, and those of a few values with a blob of ten megabytes."""
    long = OWN[type(codec)] + bytes(10_000_000)
    for blob, shape in ((long[:99], (TERA, 8)), (long, (3, 3))):
        tracemalloc.start()
        with pytest.raises(WireError, match="tensors of these shapes take"):
            codec.decode(blob, {"a": shape})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 10


@every_codec
def test_memory_is_a_few_times_the_tensor(codec):
    x = {"x": normal(500, 2000)}
    tracemalloc.start()
    blob = codec.encode(x, 0)
    up = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    codec.decode(blob, shapes_of(x))
    down = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert max(up, down) < 3.5 * 4_000_000


SHAPES = {"a": (3, 5), "b": (), "c": (0, 4), "d": (67,)}
SAMPLE = {name: normal(*shape, seed=len(name)) for name, shape in SHAPES.items()}


def decodes(codec, blob, shapes=SHAPES):
    """Whether the blob decoded; then to finite values of these shapes. Anything but WireError is a failure."""
    try:
        decoded = codec.decode(blob, shapes)
    except WireError:
        return False
    assert len(blob) == length(codec, shapes.values())
    expect_form(decoded, shapes)
    if isinstance(codec, Bf16):
        assert codec.encode(decoded, 0) == blob
    return True


@every_codec
def test_no_cut_and_nothing_added_gets_past_the_decoder(codec):
    blob = codec.encode(SAMPLE, 0)
    assert decodes(codec, blob)
    assert not any(decodes(codec, blob[:end]) for end in range(len(blob)))
    assert not any(decodes(codec, blob[start:]) for start in range(1, len(blob)))
    assert not any(decodes(codec, blob + more) for more in (b"\x00", b"\xff", blob))
    others = [other.encode(SAMPLE, 0) for other in CODECS if other != codec]
    assert not any(decodes(codec, other) for other in others)
    # Its own head on the others' values
    for other in others:
        decodes(codec, blob[:3] + (other[3:] * 9)[: len(blob) - 3])


@pytest.mark.slow
@every_codec
def test_every_flipped_bit_is_refused_or_another_value(codec):
    blob = codec.encode(SAMPLE, 0)
    passed = 0
    for place in range(len(blob)):
        for bit in range(8):
            flipped = bytearray(blob)
            flipped[place] ^= 1 << bit
            came = decodes(codec, bytes(flipped))
            assert not (came and place < 3)
            passed += came
    assert 0 < passed < 8 * (len(blob) - 3)


@pytest.mark.slow
@every_codec
def test_thousands_of_damaged_and_random_blobs(codec):
    source = random.Random(7)
    whole = codec.encode(SAMPLE, 0)
    counts = dict.fromkeys(("anything", "damaged", "random body"), 0)
    for _ in range(600):
        counts["anything"] += decodes(codec, source.randbytes(source.randint(0, 200)))
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 5)):
            damaged[source.randrange(len(whole))] = source.choice([0, 127, 128, 255, source.randrange(256)])
        counts["damaged"] += decodes(codec, bytes(damaged))
        # Few values and no padding: then a scale from 0 up is all that is needed, or a finite value
        body = source.randbytes(length(codec, [(8,)]) - 3)
        counts["random body"] += decodes(codec, whole[:3] + body, {"b": (8,)})
    assert counts["anything"] == 0
    assert 0 < counts["damaged"] < 600
    assert 0 < counts["random body"] < 600


some_shape = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@pytest.mark.slow
@many()
@given(st.sampled_from(CODECS), st.dictionaries(st.text(max_size=4), some_shape, max_size=4), st.data())
def test_any_bytes_for_any_shapes(codec, shapes, data):
    """Mostly with the codec's head and the right length, so that what is behind the checks is met."""
    body = data.draw(st.binary(max_size=64))
    size = length(codec, shapes.values())
    decodes(codec, data.draw(st.sampled_from([OWN[type(codec)], b"", body[:3]])) + body, shapes)
    decodes(codec, OWN[type(codec)] + ((body or b"\x00") * size)[: size - 3], shapes)


@pytest.mark.slow
@many()
@given(
    st.sampled_from(CODECS),
    st.dictionaries(st.text(max_size=4), some_shape, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.integers(0, 2**63 - 1),
)
def test_any_finite_bits_come_back_within_the_bound(codec, shapes, dtype, key):
    """Random bits: every exponent alike, denormals among them, but none beyond int8's largest."""
    source = random.Random(key)
    tensors = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        flat = torch.frombuffer(bytearray(source.randbytes(count * 8) + bytes(8)), dtype=dtype)[:count]
        flat = torch.where(torch.isfinite(flat.float()), flat, torch.tensor(0.5, dtype=dtype))
        tensors[name] = flat.double().clamp(-3.4e38, 3.4e38).to(dtype).reshape(shape)
    expect_within(codec, tensors, key)
