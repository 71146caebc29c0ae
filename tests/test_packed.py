"""The packed codec: bytes by hand, every bit back, one blob per dictionary, and nothing for a hostile blob to gain."""

import math
import random
import struct
import tracemalloc

import pytest
import torch
from conftest import many
from hypothesis import given
from hypothesis import strategies as st

from fedtune.codecs.packed import CHUNK, DTYPES, FREE, Packed
from fedtune.codecs.raw import Raw
from fedtune.config.compose import build, compose
from fedtune.core.errors import WireError
from fedtune.core.protocol import Instruction
from fedtune.wire import messages as wire

BOOL, U8, I8, I16, I32, I64, F16, BF16, F32, F64 = range(10)
HEAD = b"fp\x01"
INTEGERS = [dtype for dtype in DTYPES if not dtype.is_floating_point and dtype != torch.bool]


def encode(tensors):
    return Packed().encode(tensors, 0)


def decode(blob):
    return Packed().decode(blob)


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def one(dtype, *dims, rest=b"", name=b"a"):
    """A blob of one tensor; `rest` is what follows its dimensions."""
    return HEAD + b"\x01" + varint(len(name)) + name + bytes([dtype, len(dims)]) + b"".join(map(varint, dims)) + rest


def same_bits(some, other):
    return list(some) == list(other) and all(
        some[n].dtype == other[n].dtype
        and some[n].shape == other[n].shape
        and torch.equal(some[n].reshape(-1).view(torch.uint8), other[n].contiguous().reshape(-1).view(torch.uint8))
        for n in some
    )


def expect_lossless(tensors):
    blob = encode(tensors)
    decoded = decode(blob)
    assert same_bits(decoded, dict(sorted(tensors.items())))
    assert encode(decoded) == blob
    return blob


def test_bytes_by_hand():
    """Two integer tensors, letter by letter.

    66 70 01           "fp", version 1
    02                 two tensors
    01 61 04 01 03     "a", code 4 = int32, 1 dimension of 3
    02 0a              2 bits a value above zigzag(5) = 10
    01 62 02 00        "b", code 2 = int8, a scalar
    08                 8 bits: as it is, for 0 bits and a least value of one byte wouldn't be smaller
    1b                 a = 8, 6, 5 is 3, 1, 0 above 5, from the lowest bit: 11 + 01 << 2 + 00 << 4 = 7
    ff                 b = -1
    """
    blob = encode({"b": torch.tensor(-1, dtype=torch.int8), "a": torch.tensor([8, 6, 5], dtype=torch.int32)})
    assert blob == bytes.fromhex("667001 02 0161040103 020a 01620200 08 07 ff")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_seeded_updates_are_counted_by_hand(dtype):
    """FedKSeed's two messages, indices below 4096 and slopes as int32.

    Up, 200 pairs: "fp", version and count are 4 bytes. index: 1 + 5 name, dtype, one dimension of 200 (1 + 2), 12 bits,
    least value 0: 12 bytes. slopes, over the whole of int32: 1 + 6 name, 1 dtype, 3 dimensions, 32 bits, and of int64 a
    least value of zigzag 2**32 - 1, 5 bytes: 12, or 17. Bodies: 200 * 12 / 8 = 300, and 200 * 32 / 8 = 800. A header
    of 28 or 33 bytes, 1128 or 1133 in all.
    Down, 4096 indices: 4 + 12 (seeds: a name of 5, two bytes for 4096), 4096 * 12 / 8 = 6144.
    """
    index = torch.arange(200, dtype=dtype) * 20
    index[-1] = 4095
    slopes = torch.zeros(200, dtype=dtype)
    slopes[0], slopes[1] = -(2**31), 2**31 - 1
    least = 5 if dtype == torch.int64 else 0
    assert len(expect_lossless({"index": index, "slopes": slopes})) == 4 + 12 + 12 + least + 300 + 800
    assert len(expect_lossless({"seeds": torch.arange(4096, dtype=dtype)})) == 4 + 12 + 6144


@pytest.mark.parametrize(
    ("tensor", "body"),
    [
        (torch.arange(8), 1 + 3),  # 0 ... 7 at 3 bits, least value 0 in a byte
        (torch.arange(9), 1 + 5),  # 9 * 4 = 36 bits
        (torch.arange(-4, 4), 1 + 3),  # zigzag(-4) = 7
        (torch.arange(1000, 1008), 2 + 3),  # zigzag(1000) = 2000
        (torch.full((FREE,), 7), 1),  # equal: no bits
        (torch.full((FREE + 1,), 7), 1 + 33),  # beyond FREE 1 bit each
        (torch.tensor([-(2**63), 2**63 - 1]), 16),  # the whole range: as they are
        (torch.tensor([-(2**63), 2**62]), 16),  # 64 bits
        (torch.tensor([-(2**63)] * 99 + [-1]), 10 + 788),  # 63 bits, and 10 bytes for zigzag 2**64 - 1: 6300 / 8
        (torch.tensor([0, 127], dtype=torch.uint8), 2),  # 7 bits are 2 bytes as well
        (torch.tensor([0, 127] * 8, dtype=torch.uint8), 1 + 14),
        (torch.tensor(5, dtype=torch.int8), 1),
        (torch.tensor(5, dtype=torch.int16), 1),
        (torch.tensor([True] * 9), 2),
        (torch.zeros(9, dtype=torch.bfloat16), 18),
        (torch.zeros(0, 7, dtype=torch.int32), 0),
    ],
)
def test_a_body_and_its_least_value_are_counted_by_hand(tensor, body):
    bits = 1 if tensor.dtype in INTEGERS else 0
    head = 4 + 2 + 2 + sum(len(varint(size)) for size in tensor.shape) + bits
    assert len(expect_lossless({"a": tensor})) == head + body


def test_floats_keep_nan_payloads_signs_and_denormals():
    words = [0x7FC00001, 0x7F800001, 0xFFC12345, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000]
    single = torch.frombuffer(bytearray(struct.pack("<7I", *words)), dtype=torch.float32)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        expect_lossless({"a": every.view(dtype) if dtype.itemsize == 2 else every.repeat(4).view(dtype), "b": single})
    # The header's 4, the head's 5, and the words as they were
    assert encode({"b": single})[9:] == struct.pack("<7I", *words)


def test_what_is_decoded_is_sorted_owned_and_writable():
    blob = encode({"b": torch.ones(3), "é": torch.tensor([True]), "a": torch.arange(5), "": torch.tensor(300)})
    decoded = decode(blob)
    assert list(decoded) == ["", "a", "b", "é"]
    for tensor in decoded.values():
        tensor.fill_(0)
    assert decode(blob)["a"].tolist() == [0, 1, 2, 3, 4]


def test_views_gradients_and_no_tensors():
    grid = torch.arange(12).reshape(3, 4)
    expect_lossless({"t": grid.T, "s": grid[:, ::2], "f": torch.ones(2, 2, requires_grad=True).detach().T})
    assert decode(encode({"w": torch.nn.Parameter(torch.ones(2))}))["w"].tolist() == [1, 1]
    assert encode({}) == HEAD + b"\x00"
    assert decode(encode({})) == {}


@st.composite
def tensors(draw):
    """Any bits in any of the dtypes; integers also within a range somewhere, as indices are."""
    found = {}
    for name in draw(st.lists(st.text(max_size=12), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        count, source = math.prod(shape), random.Random(draw(st.integers(0, 2**32)))
        if dtype in INTEGERS:
            limits = torch.iinfo(dtype)
            ends = st.one_of(st.integers(limits.min, limits.max), st.integers(max(limits.min, -9), 9))
            low, high = sorted((draw(ends), draw(ends)))
            values = torch.tensor([source.randint(low, high) for _ in range(count)], dtype=dtype)
        elif dtype == torch.bool:
            values = torch.tensor([source.random() < 0.5 for _ in range(count)], dtype=dtype)
        else:
            values = torch.frombuffer(bytearray(source.randbytes(count * dtype.itemsize) + b"\0" * 8), dtype=dtype)
        found[name] = values[:count].reshape(shape)
    return found


@pytest.mark.slow
@many()
@given(tensors())
def test_packed_returns_every_bit_and_is_never_much_larger(given_tensors):
    """At most a head's few bytes above the tensors' own: count 4, and 4 for name and dtype, dimensions, bits."""
    blob = expect_lossless(given_tensors)
    own = sum(tensor.numel() * tensor.element_size() for tensor in given_tensors.values())
    heads = sum(len(name.encode()) + 4 + tensor.ndim for name, tensor in given_tensors.items())
    assert len(blob) <= 4 + heads + own


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("values", [1, 7, FREE, FREE + 1, CHUNK - 1, CHUNK, 2 * CHUNK + 13])
def test_every_width_comes_back(dtype, values):
    """Each number of bits that a dtype has, from its least value up, from around zero, and up to its largest."""
    limits, sizes = torch.iinfo(dtype), set()
    widths = range(limits.bits + 1) if values <= FREE + 1 else (1, 3, limits.bits - 1, limits.bits)
    draw = torch.Generator().manual_seed(0)
    for bits in widths:
        top = (1 << bits) - 1
        above = torch.randint(-(2**63), 2**63 - 1, (values,), generator=draw)
        above = above & top if bits < 64 else above
        for low in {limits.min, limits.max - top, max(limits.min, min(-(top // 2), limits.max - top))}:
            # int64 wraps around as unsigned sums do
            sizes.add(len(expect_lossless({"a": (above + low).to(dtype)})))
    assert values < 7 or len(sizes) > 3


@pytest.mark.slow
def test_it_goes_through_the_wire_by_its_name_in_the_config():
    codec = build(compose(["codec=packed"]).codec_up, "codec_up")
    assert codec == Packed()
    content = wire.pack_instruction(Instruction({"seeds": torch.arange(4096, dtype=torch.int32)}), codec, 0)
    assert wire.payload_bytes(content) == 6160
    assert wire.unpack_instruction(content, codec)[0].tensors["seeds"].tolist() == list(range(4096))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "tensor 'a' is complex64 (2,)"),
        ({"a": torch.zeros(2, dtype=torch.uint16)}, "codec=raw has more"),
        ({"\ud800": torch.zeros(2)}, "not text that UTF-8 has"),
        ({"a": torch.zeros([1] * 65)}, "65 dimensions, at most 64"),
    ],
)
def test_what_has_no_place_is_refused_when_sent(tensors, said):
    with pytest.raises(WireError) as caught:
        encode(tensors)
    assert said in str(caught.value)


TERA = 1 << 40


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "should begin with b'fp', got b''"),
        (b"fq\x01\x00", "should begin with b'fp', got b'fq'"),
        (b"fp", "expected version 1, got none"),
        (b"fp\x02\x00", "expected version 1, got 2"),
        (HEAD, "ends within the number of tensors"),
        (HEAD + b"\x00\x00", "0 tensors should have 0 bytes of values, got 1"),
        (HEAD + varint(2**63), "ends within the length of a name"),
        (HEAD + b"\x80\x00", "the number of tensors is written with more bytes than it needs"),
        (HEAD + b"\xff" * 9 + b"\x01", "ends within the length of a name"),
        (HEAD + b"\xff" * 9 + b"\x02", "the number of tensors has more than 64 bits"),
        (HEAD + b"\xff" * 11, "the number of tensors has more than 64 bits"),
        (HEAD + b"\x01" + varint(TERA) + b"a", "ends within a name"),
        (one(F32, name=b"\xff"), "a name is not UTF-8"),
        (one(F32, name=b"\xed\xa0\x80"), "a name is not UTF-8"),
        (one(F32, name=b"\xc0\x80"), "a name is not UTF-8"),
        (HEAD + b"\x01\x01a", "ends within the dtype of tensor 'a'"),
        (one(10), "tensor 'a': no dtype has code 10, the last is 9"),
        (one(255, 1, rest=b"\x00" * 8), "no dtype has code 255"),
        (HEAD + b"\x01\x01a\x08" + varint(TERA), f"{TERA} dimensions, at most 64"),
        (one(F32, *[1] * 65), "65 dimensions, at most 64"),
        (HEAD + b"\x01\x01a\x08\x02\x05", "ends within a dimension of tensor 'a'"),
        (one(F32, TERA), f"1 tensors should have {4 * TERA} bytes of values, got 0"),
        (one(BOOL, TERA), f"should have {TERA // 8} bytes"),
        (one(I64, TERA, rest=b"\x40"), f"should have {8 * TERA} bytes"),
        (one(I64, TERA, rest=b"\x01\x00"), f"should have {TERA // 8} bytes"),
        (one(I64, TERA, rest=b"\x00\x00"), f"{TERA} values at 0 bits, at most 256"),
        (one(I64, FREE + 1, rest=b"\x00\x00"), "257 values at 0 bits, at most 256"),
        (one(F32, 2**31, 2**31, 2**31), "more than a tensor can have"),
        (one(F32, 0, 2**62), "more than a tensor can have"),
        (one(F32, 2**64 - 1), "more than a tensor can have"),
        (one(I32, 3, rest=b""), "ends within the bits of tensor 'a'"),
        (one(I32, 3, rest=b"\x02"), "ends within the least value of tensor 'a'"),
        (one(I32, 3, rest=b"\x21"), "33 bits a value, but int32 has 32"),
        (one(I8, 3, rest=b"\xff"), "255 bits a value, but int8 has 8"),
        (one(I8, 9, rest=b"\x01" + varint(256) + b"\x01\x00"), "its least value 128 is no int8"),
        (one(U8, 9, rest=b"\x01\x01" + b"\x01\x00"), "its least value -1 is no uint8"),
        (one(I64, 9, rest=b"\x01" + b"\xff" * 9 + b"\x02"), "the least value of tensor 'a' has more than 64 bits"),
        (one(I8, 16, rest=b"\x02" + varint(250) + b"\x03\x00\x00\x00"), "its largest value 128 is no int8"),
        (one(U8, 16, rest=b"\x01" + varint(510) + b"\x01\x00"), "its largest value 256 is no uint8"),
        (one(I32, 3, rest=b"\x02\x0a\x47"), "bits after its last value should be zero"),
        (one(BOOL, 3, rest=b"\x08"), "bits after its last value should be zero"),
        (one(I32, 3, rest=b"\x02\x0a\x07\x00"), "should have 1 bytes of values, got 2"),
        (one(F32, 2, rest=b"1234567"), "should have 8 bytes of values, got 7"),
        # As it could have been made, but isn't
        (one(I32, 3, rest=b"\x03\x0a" + b"\x0b\x00"), "3 bits a value above 5, where 2 above 5"),
        (one(I32, 3, rest=b"\x02\x08" + b"\x1b"), "2 bits a value above 4, where"),
        (one(I32, 3, rest=b"\x20" + struct.pack("<3i", 5, 6, 8)), "32 bits a value above 0, where 2 above 5"),
        (one(I8, rest=b"\x00\x0a"), "0 bits a value above 5, where 8 above 0"),
        (one(I64, 300, rest=b"\x02\x00" + b"\x00" * 75), "2 bits a value above 0, where 1 above 0"),
        (one(I64, 0, rest=b"\x00\x00"), "0 bits a value above 0, where 64 above 0"),
        (HEAD + b"\x02" + b"\x01a\x08\x01\x00" * 2, "names should come once and in order, got 'a' after 'a'"),
        (HEAD + b"\x02\x01b\x08\x01\x00\x01a\x08\x01\x00", "got 'a' after 'b'"),
    ],
)
def test_a_hostile_blob_is_refused_by_name_and_costs_nothing(blob, said):
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            decode(blob)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"not a packed blob ({len(blob)} bytes): ")
    assert said in str(caught.value)


def test_no_blob_decodes_to_more_than_256_times_its_length():
    """The densest there are: heads of 8 bytes for 256 equal int64, and 1 bit for each int64 of one tensor."""
    equal = {chr(name): torch.full((FREE,), 1) for name in range(128)}
    for dense in (equal, {**equal, "": torch.full((FREE,), 1)}, {"a": torch.arange(10**6) % 2}):
        blob = encode(dense)
        tracemalloc.start()
        decoded = decode(blob)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = sum(tensor.numel() * 8 for tensor in decoded.values())
        assert 60 * len(blob) < size <= 256 * len(blob)
        # Bits spread out for a chunk, and what Python needs for a tensor
        assert peak <= 2 * size + 200 * CHUNK


@pytest.mark.parametrize("top", [2, 4096, 2**31 - 1])
def test_memory_is_a_few_times_the_tensor(top):
    large = {"a": torch.randint(0, top, (2_000_000,), dtype=torch.int32)}
    tracemalloc.start()
    blob = encode(large)
    up = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    decoded = decode(blob)
    down = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert torch.equal(decoded["a"], large["a"])
    assert max(up, down) < 3 * 8_000_000


def one_of_two(blob):
    """Whether the blob decoded; then it must be the one blob of what came out. Anything but WireError is a failure."""
    try:
        decoded = decode(blob)
    except WireError:
        return False
    assert encode(decoded) == blob
    assert sum(tensor.numel() * tensor.element_size() for tensor in decoded.values()) <= 256 * len(blob)
    return True


@pytest.mark.slow
def test_no_cut_and_no_flipped_bit_gets_past_the_decoder():
    """Every cut and every single bit of a message with all dtypes: refused, or the blob of another dictionary."""
    ramp = torch.arange(-3, 9)
    blob = encode({f"t{code}": ramp.clamp(min=0).to(dtype) for code, dtype in enumerate(DTYPES)} | {"s": ramp[4]})
    assert one_of_two(blob)
    assert not any(one_of_two(blob[:length]) for length in range(len(blob)))
    assert not any(one_of_two(blob + more) for more in (b"\x00", b"\xff", blob))
    passed = 0
    for place in range(len(blob)):
        for bit in range(8):
            flipped = bytearray(blob)
            flipped[place] ^= 1 << bit
            passed += one_of_two(bytes(flipped))
    # Other letters in names, other floats, a value between the least and the largest
    assert 0 < passed < 8 * len(blob)


def mutate(source, blob):
    blob = bytearray(blob)
    for _ in range(source.randint(1, 4)):
        place, length = source.randrange(len(blob) + 1), source.randint(1, 6)
        kind = source.randrange(5)
        if kind == 0:
            blob[place : place + 1] = bytes([source.choice([0, 1, 2, 8, 32, 64, 127, 128, 255, source.randrange(256)])])
        elif kind == 1:
            del blob[place : place + length]
        elif kind == 2:
            blob[place:place] = source.randbytes(length)
        elif kind == 3:
            blob[place:place] = blob[source.randrange(len(blob) + 1) :][:length]
        else:
            blob[place:place] = varint(source.getrandbits(source.choice([7, 16, 40, 63, 64, 70])))
    return bytes(blob)


def made_up(source):
    """A blob with the right form and mostly the right length, and anything in its fields."""
    heads, size = [], 0
    for name in sorted({source.choice([b"", b"a", b"b", b"index", b"\xc3\xa9"]) for _ in range(source.randint(0, 3))}):
        code = source.randrange(10)
        dims = [source.choice([0, 1, 2, 3, 8, 17]) for _ in range(source.randint(0, 2))]
        width = 8 * DTYPES[code].itemsize
        head = varint(len(name)) + name + bytes([code, len(dims), *dims])
        bits = 1 if code == BOOL else width
        if U8 <= code <= I64:
            bits = source.choice([0, 1, 2, width - 1, width, source.randint(0, width)])
            head += bytes([bits])
            if bits < width:
                head += varint(source.choice([0, 1, 9, source.getrandbits(source.randint(1, width))]))
        heads.append(head)
        size += (math.prod(dims) * bits + 7) // 8
    body = source.choice([source.randbytes, bytes])(size)
    return HEAD + varint(len(heads)) + b"".join(heads) + body


@pytest.mark.slow
def test_thousands_of_damaged_and_made_up_blobs():
    source = random.Random(7)
    seeds = [
        encode({"index": torch.randint(0, 4096, (20,), dtype=torch.int32), "slopes": torch.arange(-9, 11)}),
        encode({"w": torch.randn(3, 2).bfloat16(), "x": torch.tensor([True, False, True]), "y": torch.tensor(9)}),
        encode({"a": torch.full((40,), 3), "b": torch.zeros(0, 3), "c": torch.arange(256, dtype=torch.uint8)}),
    ]
    counts = {
        "random": sum(one_of_two(HEAD + source.randbytes(source.randint(0, 40))) for _ in range(4000)),
        "anything": sum(one_of_two(source.randbytes(source.randint(0, 40))) for _ in range(2000)),
        "damaged": sum(one_of_two(mutate(source, source.choice(seeds))) for _ in range(9000)),
        "made up": sum(one_of_two(made_up(source)) for _ in range(6000)),
    }
    # Both outcomes are seen, so the fuzz reaches past the header
    assert counts["anything"] == 0
    assert 100 < counts["damaged"] < 8900
    assert 100 < counts["made up"] < 5900


@pytest.mark.slow
def test_heads_whose_bodies_are_missing_cost_their_own_memory():
    """4096 heads that declare 2**62 bytes each, in 70 kB: what Python needs for as many heads, and nothing else."""
    heads = b"".join(b"\x03" + f"{i:03x}".encode() + bytes([F64, 1]) + varint(2**59) for i in range(4096))
    blob = HEAD + varint(4096) + heads
    tracemalloc.start()
    assert not one_of_two(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * len(blob)


def test_it_is_smaller_than_raw_where_it_should_be():
    """The same two tensors cost raw its 8-byte length and JSON besides 1600 bytes."""
    update = {
        "index": torch.randint(0, 4096, (200,), dtype=torch.int32),
        "slopes": torch.randint(-(2**31), 2**31 - 1, (200,), dtype=torch.int32),
    }
    assert len(encode(update)) < 0.7 * len(Raw().encode(update, 0))
