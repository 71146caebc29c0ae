"""The wire: what is packed comes back, what isn't well formed is refused, and bytes are what Flower serialises."""

import math

import pytest
import torch
from conftest import many
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from hypothesis import given
from hypothesis import strategies as st

from fedtune.codecs.raw import Raw
from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, DeviceProfile, Instruction, Update
from fedtune.wire import messages as wire
from fedtune.wire.flower_private import assume_identity, set_message_id

RUN = "0123456789abcdef"

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw):
    found = {}
    for name in draw(
        st.lists(st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__"), max_size=4, unique=True)
    ):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        found[name] = values.to(dtype)
    return found


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(one[n].reshape(-1).view(torch.uint8), other[n].reshape(-1).view(torch.uint8))
        for n in one
    )


@given(tensors())
def test_raw_returns_every_bit(given_tensors):
    assert same_bits(Raw().decode(Raw().encode(given_tensors, 0)), given_tensors)


def test_raw_keeps_nan_infinity_and_a_transposed_tensor():
    given_tensors = {"a": torch.tensor([math.nan, math.inf, -0.0]), "t": torch.arange(6.0).reshape(2, 3).T}
    assert same_bits(
        Raw().decode(Raw().encode(given_tensors, 0)), {**given_tensors, "t": given_tensors["t"].contiguous()}
    )


@many()
@given(st.binary(max_size=200))
def test_raw_refuses_random_bytes_by_name(blob):
    try:
        Raw().decode(blob)
    except WireError:
        return
    # Only a well-formed blob decodes: eight bytes of header length and that much JSON
    assert int.from_bytes(blob[:8], "little") <= len(blob) - 8


@many()
@given(st.integers(0, 10_000), st.integers(0, 7), st.integers(0, 10_000))
def test_a_flipped_bit_or_a_cut_never_crashes_the_decoder(place, bit, cut):
    blob = bytearray(Raw().encode({"layer.lora_A.weight": torch.ones(3, 5), "b": torch.zeros(2)}, 0))
    blob[place % len(blob)] ^= 1 << bit
    for damaged in (bytes(blob), bytes(blob[: cut % len(blob)])):
        try:
            decoded = Raw().decode(damaged)
        except WireError:
            continue
        assert sum(t.numel() * t.element_size() for t in decoded.values()) <= len(damaged)


def test_a_blob_that_declares_terabytes_is_refused():
    header = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    with pytest.raises(WireError, match="not a raw blob"):
        Raw().decode(len(header).to_bytes(8, "little") + header)


def test_an_instruction_comes_back():
    sent = Instruction({"a": torch.ones(2, 3)}, {"lr": 0.5, "steps": 3, "name": "x", "flag": True})
    got, run = wire.unpack_instruction(wire.pack_instruction(sent, Raw(), 0, RUN), Raw())
    assert run == RUN
    assert same_bits(got.tensors, sent.tensors)
    assert got.settings == sent.settings


def update_content(examples=3, metrics=None, tensors=None):
    return wire.pack_update(Update(tensors or {"a": torch.ones(2)}, examples, metrics or {"train_loss": 1.5}), Raw(), 0)


def unpack(content):
    return wire.unpack_update(content, wire.blob_of(content), Raw())


def test_an_update_comes_back():
    got = unpack(update_content())
    assert (got.examples, dict(got.metrics), got.tensors["a"].tolist()) == (3, {"train_loss": 1.5}, [1, 1])


def with_blob(array):
    content = update_content()
    content["payload"] = ArrayRecord({"blob": array})
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (RecordDict(), "expected a record"),
        (update_content(examples=0), "positive integer"),
        (update_content(examples=-5), "positive integer"),
        (update_content(metrics={"train_loss": math.nan}), "metric 'train_loss' should be a finite"),
        (update_content(metrics={f"m{i}": 0.0 for i in range(99)}), "too many"),
        (update_content(tensors={"a": torch.tensor([1.0, math.inf])}), "tensor 'a' has values that are not finite"),
        (with_blob(Array("float32", (4,), "x", b"1234")), "should be uint8"),
        (with_blob(Array("uint8", (9,), "x", b"1234")), "should be uint8 of shape (4,)"),
        (with_blob(Array("uint8", (4,), "x", b"1234")), "not a raw blob"),
        (RecordDict({**update_content(), "more": ConfigRecord({"x": 1})}), "'more' was not asked for"),
        (
            RecordDict({"payload": ConfigRecord({"x": 1}), "metrics": MetricRecord({"examples": 1})}),
            "expected a record",
        ),
    ],
)
def test_an_update_of_another_form_is_refused(content, said):
    with pytest.raises(WireError) as caught:
        unpack(content)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"index": 5, "samples": 1, "layout": "x"}, "client index should be 0 ... 3"),
        ({"index": "0", "samples": 1, "layout": "x"}, "client index should be"),
        ({"index": 0, "samples": -1, "layout": "x"}, "a number of samples from 0 up"),
        ({"index": 0, "samples": 1, "layout": "y"}, "other trainable tensors"),
        ({"index": 0, "samples": 1, "layout": "x", "memory_bytes": -5.0}, "memory_bytes should be a number above 0"),
        ({"index": 0, "samples": 1, "layout": "x", "backprop": 1}, "backprop should be true or false"),
        ({"index": 0, "samples": 1, "layout": "x", "colour": "red"}, "not understood"),
    ],
)
def test_a_greeting_is_checked(record, said):
    with pytest.raises(WireError, match=said):
        wire.unpack_greeting(RecordDict({"greeting": ConfigRecord(record)}), 4, "x")


def test_a_greeting_tells_what_a_device_can_do():
    able = DeviceProfile(memory_bytes=8e9, backprop=False, max_rank=4, up_bytes_per_s=1.5e6)
    peer = ClientInfo(2, 10, able)
    assert wire.unpack_greeting(wire.pack_greeting(peer, "x"), 4, "x") == peer
    assert wire.unpack_greeting(wire.pack_greeting(ClientInfo(1, 3), "x"), 4, "x") == ClientInfo(1, 3)


def test_a_runs_id_that_is_no_text_is_refused():
    content = wire.pack_instruction(Instruction({}), Raw(), 0, RUN)
    content["settings"]["run"] = 7
    with pytest.raises(WireError, match="setting 'run' should be the run's id, got 7"):
        wire.unpack_instruction(content, Raw())


PRINTABLE = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=30)


@given(st.integers(0, 5000), st.integers(1, 10**9), st.lists(PRINTABLE, max_size=64, unique=True))
def test_wire_bytes_are_the_length_of_the_serialised_message(size, examples, names):
    assume_identity(2**62 + 11)
    question = Message(RecordDict(), dst_node_id=2**61 + 3, message_type="train", group_id="12")
    set_message_id(question, "a" * 64)
    metrics = {name: 0.25 for name in names[:63] if name != "examples"}
    update = Update({"a": torch.zeros(size, dtype=torch.uint8)}, examples, metrics)
    content = wire.pack_update(update, Raw(), 0)
    reply = Message(content, reply_to=question)
    serialised = message_to_proto(reply).SerializeToString()
    assert wire.wire_bytes(reply) == len(serialised)
    assert wire.wire_bytes(reply, wire.update_bytes(wire.blob_of(content), update)) == len(serialised)
    assert wire.payload_bytes(content) == len(Raw().encode(update.tensors, 0))
    back = message_from_proto(ProtoMessage.FromString(serialised))
    assert unpack(back.content).examples == examples
