"""What error feedback takes: codecs that leave out less than they are given, whatever that is.

|x - C(x)|^2 <= (1 - delta) |x|^2 for every x, with a delta above 0. If so, what was left out stays below 2 / delta of
what is meant in a turn; if not it may grow without end. Of d values every codec here has a delta of at least 1 / d: the
largest comes over nearly whole (bf16, int8, nf4, top-k), or is among k that come as their mean S / k, which leaves out
S^2 / k less than |x|^2, and S^2 >= |x|^2 k / d.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import SMALL, many
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedtune.codecs.int8 import Int8
from fedtune.codecs.sparse import shapes_of
from fedtune.config.compose import CONF, choices, compose
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import is_lossless
from fedtune.wire.delta_coding import build_codec
from fedtune.workspace.workspace import Workspace

SPARSE = [{"density": 0.05}, {"density": 0.5}, {"density": 1}]
OPTIONS = {
    "compeft": [{**some, "scale": scale} for some in SPARSE for scale in ("global", "per_tensor")],
    "stc": SPARSE,
    "topk": [*SPARSE, {"values": "float32"}],
    "nf4": [{"block": 64}, {"block": 1000}],
}


def with_feedback(name, **options):
    spec = {**OmegaConf.load(CONF / "codec" / f"{name}.yaml"), **options, "feedback": True}
    return build_codec(spec, "codec_up")[0]


LOSSY = [
    name
    for name in choices("codec")
    if not is_lossless(build_codec(dict(OmegaConf.load(CONF / "codec" / f"{name}.yaml")), name)[0])
]
CODECS = [with_feedback(name, **options) for name in LOSSY for options in OPTIONS.get(name, [{}])]
each = pytest.mark.parametrize("codec", CODECS, ids=repr)


def squared(tensors):
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values())


def left_out(codec, tensors, key=0):
    sent = codec.decode(codec.encode(tensors, key), shapes_of(tensors))
    return {name: tensor.double() - sent[name].double() for name, tensor in tensors.items()}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HARD = {
    "normal": {"w": drawn(40, 50)},
    "heavy-tailed": {"w": drawn(40, 50) ** 7},
    "few large": {"w": torch.cat([torch.tensor([1e4]), 1e-3 * drawn(999)])},
    "few": {"w": torch.nn.functional.pad(drawn(30), (0, 1970))},
    "equal": {"w": torch.full((300, 7), -0.3)},
    "equal but for sign": {"w": drawn(1000).sign()},
    "one value": {"w": torch.tensor([-2.0]), "v": torch.full((60,), 1e-3)},
    "unlike scales": {"a": 1e-6 * drawn(900), "b": drawn(70), "c": 1e5 * drawn(3, 11), "d": torch.zeros(20)},
    # Of rows longer than 8 127^2, rounding at random leaves out more than there is: at 1 / 4 of a scale 3 times as much
    "a long row": {"w": torch.cat([torch.ones(1), torch.full((199_999,), 0.25 / 127)])},
    # As AdamW's updates are: of such, 5 % at the length of all are 4.5 times too much
    "nearly equal": {"w": 1e-2 * drawn(50, 50).sign() + 1e-4 * drawn(50, 50, seed=1)},
}


@each
@pytest.mark.parametrize("kind", HARD)
def test_less_is_left_out_than_there_was(codec, kind):
    tensors = HARD[kind]
    size = sum(tensor.numel() for tensor in tensors.values())
    assert squared(left_out(codec, tensors)) <= (1 - 0.99 / size) * squared(tensors)


values = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6), st.sampled_from([1.0, -1.0, 1e6, 1e-6]))


@pytest.mark.slow
@many()
@given(
    st.sampled_from(CODECS),
    st.dictionaries(st.sampled_from("abc"), st.lists(values, max_size=60), max_size=3),
    st.integers(1, 4),
    st.integers(0, 2**64 - 1),
)
def test_whatever_is_coded(codec, lists, rows, key):
    """Of as many values that at least one is sent at any of the densities; some of them several times, in rows."""
    tensors = {name: torch.tensor(listed * rows).view(rows, -1) for name, listed in lists.items()}
    tensors["z"] = torch.full((20,), 1e-6)
    size = sum(tensor.numel() for tensor in tensors.values())
    assert squared(left_out(codec, tensors, key)) <= (1 - 0.99 / size) * squared(tensors)


@each
def test_what_is_left_out_stays_within_bounds(codec):
    """A steady update with some noise, 100 times: |e| <= 2 / delta of it, with the least delta that was seen."""
    draw = torch.Generator().manual_seed(0)
    usual = {"a": 0.01 * drawn(40, 20).sign(), "b": drawn(300) ** 3}
    residual = {name: torch.zeros_like(tensor) for name, tensor in usual.items()}
    delta, most = 1.0, 0.0
    for number in range(100):
        noisy = {name: t + 0.1 * t.abs() * torch.randn(t.shape, generator=draw) for name, t in usual.items()}
        most = max(most, squared(noisy) ** 0.5)
        meant = {name: tensor + residual[name] for name, tensor in noisy.items()}
        left = left_out(codec, meant, number)
        delta = min(delta, 1 - squared(left) / squared(meant))
        residual = {name: tensor.float() for name, tensor in left.items()}
    assert delta > 0
    assert squared(residual) ** 0.5 <= 2 / delta * most


def test_int8_rounds_at_random_without_feedback_and_to_nearest_with_it():
    """The long row above, in the mean: (1/4) (3/4) scale^2 of each value, where (1/4)^2 scale^2 was, beside 127^2."""
    tensors = HARD["a long row"]
    lost = sum(squared(left_out(Int8(), tensors, key)) for key in range(4)) / 4
    assert lost * 127**2 == pytest.approx(199_999 * 3 / 16, rel=0.01)
    assert lost > squared(tensors)
    assert not Int8().contracts
    ramp = {"w": torch.tensor([127.0, 0.49, 0.51, -0.49, -0.51, 3.4])}
    assert left_out(with_feedback("int8"), ramp)["w"].tolist() == pytest.approx([0, 0.49, -0.49, -0.49, 0.49, 0.4])


@dataclass(frozen=True)
class Sixteenths:
    """A codec of somebody's own, which says nothing of what it leaves out."""

    lossless: ClassVar[bool] = False

    def encode(self, tensors, key):
        return b""

    def decode(self, blob, shapes):
        return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("where", ["codec_up", "codec_down"])
def test_others_codecs_have_to_say_so(where):
    spec = {"_target_": "test_contraction.Sixteenths"}
    assert build_codec(spec, where) == (Sixteenths(), False)
    with pytest.raises(ConfigError, match=f"{where}.feedback=true: Sixteenths doesn't say that it leaves out less"):
        build_codec({**spec, "feedback": True}, where)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["codec_up=compeft", "codec_up.alpha=1", "codec_up.feedback=true"], "codec_up: codec.alpha=1 with feedback"),
        (
            ["codec_up=compeft", "codec_up.alpha=[1,2]", "codec_up.feedback=true"],
            r"codec_up: codec.alpha=\(1, 2\) with",
        ),
        (["codec=compeft", "codec.alpha=2"], "codec_down: codec.alpha=2 with feedback: .*Leave alpha out"),
        (["codec_down=compeft", "codec_down.alpha=2", "codec_down.feedback=true"], "codec_down: codec.alpha=2 with"),
    ],
)
def test_multiples_of_the_standard_deviation_are_refused_with_feedback(words, said):
    """Of "equal" above the standard deviation is 0: that tensor would never be sent."""
    with pytest.raises(ConfigError, match=said):
        Workspace(compose([*SMALL, *words]))


def test_without_feedback_they_are_not():
    words = ["codec=compeft", "codec.alpha=2", "codec_down.feedback=false"]
    workspace = Workspace(compose([*SMALL, *words]))
    assert (workspace.codec_up.alpha, workspace.feedback, workspace.chained) == (2, False, False)
    workspace = Workspace(compose([*SMALL, "codec=compeft"]))
    assert (workspace.codec_up.feedback, workspace.codec_down.feedback, workspace.chained) == (False, True, True)
