"""A PEFT adapter as a small file and back, and what a stranger's file can't do."""

import hashlib
import json
import math
import shutil
import struct

import pytest
import torch
from conftest import setting
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fedtune.codecs.packed import Packed
from fedtune.codecs.raw import Raw
from fedtune.commands.main import main
from fedtune.core.errors import ConfigError, ExportError, FedtuneError
from fedtune.export.compressed_adapter import (
    BEGIN,
    MAGIC,
    MAX_FILE,
    MAX_HEAD,
    MAX_VALUES,
    PACKED,
    WEIGHTS,
    compress,
    decompress,
    read,
)
from fedtune.models.tiny import tiny_model

CONFIG = "adapter_config.json"
LOSSY = ("compeft", "topk", "stc")
LOSSLESS = ("raw", "packed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two adapters on the toy model, as PEFT writes them: fresh, and moved by little."""
    folder = tmp_path_factory.mktemp("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), LoraConfig(r=8, target_modules="all-linear"))
        model.save_pretrained(folder / "start")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.003 * torch.randn_like(parameter)
        model.save_pretrained(folder / "trained")
    return folder


@pytest.fixture
def start(made, tmp_path):
    return shutil.copytree(made / "start", tmp_path / "start")


@pytest.fixture
def trained(made, tmp_path):
    return shutil.copytree(made / "trained", tmp_path / "trained")


def adapter(folder, tensors):
    """A folder with these tensors, as far as compress minds."""
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def equal(one, other):
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape) and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def minus(ones, others):
    return {name: tensor.double() - others[name].double() for name, tensor in ones.items()}


MIXED = {
    "a": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
    "b": torch.linspace(-1, 1, 33).bfloat16(),
    "c": torch.linspace(-1, 1, 9).half(),
    "d": torch.linspace(-1, 1, 4).double().reshape(2, 2),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(-2.0),
}


def test_a_runs_adapter_as_the_difference_from_where_it_began(small_run, tmp_path):
    folder = small_run("train.lr=0.01")
    done = compress(str(folder / "adapter"), str(tmp_path / "small"), "compeft", start=str(folder / "start"))
    assert done.after < done.before / 3
    assert done.of_difference is not None
    assert 0 < done.of_difference < 1
    began, learnt = (load_file(folder / place / WEIGHTS) for place in ("start", "adapter"))
    assert not any(tensor.any() for name, tensor in began.items() if "lora_B" in name)
    assert all(learnt[name].any() for name in began)


@pytest.mark.slow
@pytest.mark.parametrize("codec", LOSSLESS)
def test_lossless_codecs_keep_every_bit(trained, tmp_path, codec):
    done = compress(str(trained), str(tmp_path / "small"), codec)
    decompress(str(tmp_path / "small"), str(tmp_path / "again"))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_bytes() == (trained / CONFIG).read_bytes()
    assert (done.error, done.of_difference, done.before) == (0, None, (trained / WEIGHTS).stat().st_size)
    whole = adapter(tmp_path / "mixed", MIXED | {"whole": torch.arange(9), "flags": torch.tensor([True, False])})
    compress(str(whole), str(tmp_path / "s"), codec)
    decompress(str(tmp_path / "s"), str(tmp_path / "t"))
    assert equal(load_file(tmp_path / "t" / WEIGHTS), load_file(whole / WEIGHTS))


@pytest.mark.slow
@pytest.mark.parametrize("codec", LOSSY)
def test_lossy_codecs_keep_names_shapes_dtypes_and_the_direction(tmp_path, codec):
    folder = adapter(tmp_path / "mixed", MIXED)
    done = compress(str(folder), str(tmp_path / "small"), codec, ["codec.density=0.5"])
    decompress(str(tmp_path / "small"), str(tmp_path / "again"))
    found = load_file(tmp_path / "again" / WEIGHTS)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (t.dtype, t.shape) for n, t in MIXED.items()}
    assert 0 < done.error < 0.9
    assert done.error == pytest.approx(norm(minus(found, MIXED)) / norm(MIXED))


@pytest.mark.parametrize("codec", LOSSY)
def test_of_a_difference_little_is_lost(start, trained, tmp_path, codec):
    """The errors are those of what is decoded, and far below those without the start."""
    given = str(trained), str(tmp_path / "small"), codec, ["codec.density=0.2"]
    done = compress(*given, start=str(start))
    decompress(str(tmp_path / "small"), str(tmp_path / "again"), str(start))
    found, x, first = (load_file(folder / WEIGHTS) for folder in (tmp_path / "again", trained, start))
    assert done.error == pytest.approx(norm(minus(found, x)) / norm(x))
    assert done.of_difference == pytest.approx(norm(minus(found, x)) / norm(minus(x, first)))
    assert done.of_difference < 0.8
    assert done.after == (tmp_path / "small" / PACKED).stat().st_size < done.before / 5
    without = compress(str(trained), str(tmp_path / "other"), codec, ["codec.density=0.2"])
    assert without.error > 5 * done.error
    assert without.of_difference is None


def test_all_values_as_they_are_come_back_within_rounding(start, trained, tmp_path):
    words = ["codec.density=1", "codec.values=float32", "codec.coder=range"]
    done = compress(str(trained), str(tmp_path / "small"), "topk", words, str(start))
    assert done.error < 1e-7


def test_an_adapter_in_another_dtype_than_its_start(start, trained, tmp_path):
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(trained / WEIGHTS).items()}
    save_file(narrow, trained / WEIGHTS)
    words = ["codec.density=1", "codec.values=float32"]
    assert compress(str(trained), str(tmp_path / "small"), "topk", words, str(start)).error < 1e-7
    decompress(str(tmp_path / "small"), str(tmp_path / "again"), str(start))
    assert equal(load_file(tmp_path / "again" / WEIGHTS), narrow)


def test_an_adapter_that_is_its_start(start, tmp_path):
    done = compress(str(start), str(tmp_path / "small"), start=str(start))
    assert (done.error, done.of_difference) == (0, 0)
    decompress(str(tmp_path / "small"), str(tmp_path / "again"), str(start))
    assert equal(load_file(tmp_path / "again" / WEIGHTS), load_file(start / WEIGHTS))


def test_peft_loads_it_and_it_does_what_it_did(start, trained, tmp_path):
    words = ["codec.density=1", "codec.values=float32"]
    compress(str(trained), str(tmp_path / "small"), "topk", words, str(start))
    decompress(str(tmp_path / "small"), str(tmp_path / "again"), str(start))
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain, right, found = (
            model.eval()(tokens).logits
            for model in (
                tiny_model(),
                PeftModel.from_pretrained(tiny_model(), trained),
                PeftModel.from_pretrained(tiny_model(), tmp_path / "again"),
            )
        )
    assert torch.allclose(found, right, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4)


def test_the_file_by_hand(tmp_path):
    """The same for the same adapter, and as its module says."""
    folder = adapter(tmp_path / "a", {"w": torch.tensor([[1.0, -2.0, 0.5]])})
    for name in ("x", "y"):
        compress(str(folder), str(tmp_path / name), "topk", ["codec.density=0.7"])
    content = (tmp_path / "x" / PACKED).read_bytes()
    assert content == (tmp_path / "y" / PACKED).read_bytes()
    assert {path.name for path in (tmp_path / "x").iterdir()} == {CONFIG, PACKED}
    (length,) = struct.unpack("<I", content[40:44])
    assert content[:8] == b"fedtune\1"
    assert content[8:40] == hashlib.sha256(content[40:]).digest()
    assert json.loads(content[44 : 44 + length]) == {
        "codec": {
            "_target_": "fedtune.codecs.topk.TopK",
            "density": 0.7,
            "values": "bfloat16",
            "coder": "golomb",
        },
        "tensors": {"w": ["float32", [1, 3]]},
        "start": None,
    }
    decompress(str(tmp_path / "x"), str(tmp_path / "z"))
    assert load_file(tmp_path / "z" / WEIGHTS)["w"].tolist() == [[1, -2, 0]]


# What a person does wrong


@pytest.mark.parametrize(
    ("codec", "words", "part"),
    [
        ("compfet", [], "did you mean compeft"),
        ("../model/tiny", [], "is not known"),
        ("compeft", ["codec.densty=0.1"], "unknown setting 'densty' in 'codec'.*did you mean density"),
        ("compeft", ["codec.density=2"], "codec.density=2: expected a share"),
        ("compeft", ["codec.density=much"], "codec.density should be float, got .much."),
        ("compeft", ["codec.feedback=true"], "no later message"),
        ("compeft", ["codec._target_=os.system"], "'os.system' is not known"),
        ("compeft", ["codec.density"], "expected a setting"),
        ("compeft", ["density=0.1"], "density=0.1: expected a setting"),
    ],
)
def test_codecs_and_settings_that_there_are_not(trained, tmp_path, codec, words, part):
    with pytest.raises(ConfigError, match=part):
        compress(str(trained), str(tmp_path / "small"), codec, words)
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_starts_that_do_not_fit(start, trained, tmp_path):
    small = str(tmp_path / "small")
    with pytest.raises(ConfigError, match="keeps every bit"):
        compress(str(trained), small, "raw", start=str(start))
    tensors = load_file(start / WEIGHTS)
    name = sorted(tensors)[0]
    for change, part in (
        ({name: torch.zeros(3, 4)}, r"is \(3, 4\) there, \(8, 96\) here"),
        ({"more": torch.zeros(3)}, r"'more' is \(3,\) there, missing here"),
        ({name: torch.full_like(tensors[name], math.nan)}, "not finite"),
    ):
        save_file(tensors | change, start / WEIGHTS)
        with pytest.raises(ExportError, match=part):
            compress(str(trained), small, start=str(start))
    with pytest.raises(ExportError, match="is not there"):
        compress(str(trained), small, start=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"start", "trained"}


def test_another_start_is_refused_by_its_hash(start, trained, tmp_path):
    compress(str(trained), str(tmp_path / "small"), start=str(start))
    sha256 = hashlib.sha256((start / WEIGHTS).read_bytes()).hexdigest()
    for given, part in ((None, f"sha256 {sha256}: name its folder with --start"), (trained, f"expected {sha256}")):
        with pytest.raises(ExportError, match=part):
            decompress(str(tmp_path / "small"), str(tmp_path / "again"), given and str(given))
    compress(str(trained), str(tmp_path / "whole"))
    with pytest.raises(ExportError, match="leave --start out"):
        decompress(str(tmp_path / "whole"), str(tmp_path / "again"), str(start))
    assert not (tmp_path / "again").exists()


def test_adapters_that_cannot_be_coded(tmp_path):
    for name, tensor, part in (
        ("nan", torch.tensor([math.nan]), "not finite"),
        ("whole", torch.arange(3), r"int64 \(3,\), and this codec takes float16"),
        ("eighth", torch.zeros(3).to(torch.float8_e4m3fn), "and this codec takes float16, bfloat16"),
        ("over", torch.tensor([60_000.0] * 5 + [-60_000.0] * 5).half() * 1.09, "not finite"),
    ):
        folder = adapter(tmp_path / name, {"w": tensor})
        words = ["codec.density=1", "codec.alpha=1.1"]
        with pytest.raises(ExportError, match=part) as caught:
            compress(str(folder), str(tmp_path / "small"), "compeft", words)
        assert ".unfinished" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"nan", "whole", "eighth", "over"}


def test_folders_that_are_no_adapters(trained, tmp_path):
    small = str(tmp_path / "small")
    compress(str(trained), small)
    with pytest.raises(ExportError, match=f"{PACKED} is not there"):
        decompress(str(trained), str(tmp_path / "again"))
    with pytest.raises(ExportError, match=f"{WEIGHTS} is not there"):
        compress(small, str(tmp_path / "again"))
    (trained / WEIGHTS).write_bytes(b"none")
    with pytest.raises(ExportError, match="SafetensorError"):
        compress(str(trained), str(tmp_path / "again"))
    for content in ("[]", "{", "\xff"):
        (tmp_path / "small" / CONFIG).write_text(content, encoding="latin-1")
        with pytest.raises(ExportError, match=f"{CONFIG} can't be used"):
            decompress(small, str(tmp_path / "again"))
    (tmp_path / "small" / CONFIG).unlink()
    with pytest.raises(ExportError, match=f"{CONFIG} is not there"):
        decompress(small, str(tmp_path / "again"))
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "small"}


def test_what_is_there_already_is_left_alone(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    compress(str(trained), str(tmp_path / "small"))
    for taken in (tmp_path / "out", tmp_path / "out" / "mine", trained):
        with pytest.raises(ExportError, match="is there already"):
            compress(str(trained), str(taken))
        with pytest.raises(ExportError, match="is there already"):
            decompress(str(tmp_path / "small"), str(taken))
    (tmp_path / "empty").mkdir()
    decompress(str(tmp_path / "small"), str(tmp_path / "empty"))
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "small", "out", "empty"}


def test_a_disk_that_fills_up_leaves_nothing_half_written(trained, tmp_path, monkeypatch):
    compress(str(trained), str(tmp_path / "small"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.export.compressed_adapter.save_file", full)
    with pytest.raises(ExportError, match="No space left"):
        decompress(str(tmp_path / "small"), str(tmp_path / "again"))
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "small"}


# Files from strangers


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    tensors = {"v": torch.linspace(-1, 1, 20).reshape(4, 5), "w": torch.linspace(-1, 2, 30)}
    return compress(str(adapter(folder / "a", tensors)), str(folder / "b"), words=["codec.density=0.3"]).path


@pytest.fixture
def small(compressed, tmp_path):
    """A compressed adapter, for a test to harm."""
    return shutil.copytree(compressed, tmp_path / "small")


def refused(small, part, kind=ExportError):
    with pytest.raises(kind, match=part):
        decompress(str(small), str(small.parent / "again"))
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_every_cut_and_every_flipped_bit_is_refused(small):
    whole = (small / PACKED).read_bytes()
    for place in range(len(whole)):
        with pytest.raises(ExportError):
            read(whole[:place], small / PACKED)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(ExportError):
            read(bytes(flipped), small / PACKED)
    for content, part in (
        (b"", "is no compressed adapter"),
        (whole[:-1], "is damaged"),
        (whole + b"\0", "is damaged"),
        (b"fedtune\2" + whole[8:], "is of version 2; this fedtune reads 1"),
        (b"PK" + whole, "is no compressed adapter"),
    ):
        (small / PACKED).write_bytes(content)
        refused(small, part)
    with (small / PACKED).open("wb") as stream:
        stream.truncate(MAX_FILE + 1)  # takes no room
    refused(small, "more than any adapter")


def signed(length, rest):
    hashed = struct.pack("<I", length) + rest
    return MAGIC + hashlib.sha256(hashed).digest() + hashed


def forge(small, change, body=None):
    """The file with its head changed by `change`, which alters it or returns another, and with the right hash."""
    content = (small / PACKED).read_bytes()
    (length,) = struct.unpack("<I", content[BEGIN - 4 : BEGIN])
    head = json.loads(content[BEGIN : BEGIN + length])
    head = change(head) or head
    text = (head if isinstance(head, str) else json.dumps(head)).encode()
    (small / PACKED).write_bytes(signed(len(text), text + (content[BEGIN + length :] if body is None else body)))


def shape(value):
    return setting("tensors", "w", value=["float32", value])


def called(name):
    return setting("tensors", name, value=["float32", [1]])


HOSTILE = {
    "no object": (lambda head: "[]", "expected a head"),
    "no JSON": (lambda head: "{", "JSONDecodeError"),
    "no text": (lambda head: '"\\ud800"', "expected a head"),
    "deep JSON": (lambda head: "[" * 100_000, "RecursionError"),
    "an endless number": (lambda head: "[" + "9" * 10_000 + "]", "ValueError"),
    "a part that is missing": (lambda head: head.pop("start") and None, "sha256|start"),
    "a part too many": (setting("more", value=1), "expected a head"),
    "a hash that is none": (setting("start", value="../../etc"), "expected the start's sha256"),
    "a hash that is a number": (setting("start", value=10**63), "expected the start's sha256"),
    "a start that is asked for": (setting("start", value="0" * 64), "name its folder with --start"),
    "tensors that are a list": (setting("tensors", value=[]), "expected tensors by name"),
    "a huge dimension": (shape([MAX_VALUES + 1]), "more than any adapter"),
    "huge dimensions": (shape([1 << 20, 1 << 20]), "more than any adapter"),
    "a huge dimension of nothing": (shape([0, 1 << 62]), "more than any adapter"),
    "huge tensors": (
        lambda head: setting("tensors", value={name: ["bool", [MAX_VALUES]] for name in "vw"})(head),
        "4294967296 values are declared",
    ),
    "many dimensions": (shape([1] * 65), "more than any adapter"),
    "less than nothing": (shape([-1, -30]), "known dtype and a shape"),
    "a fraction": (shape([30.0]), "known dtype and a shape"),
    "a truth value": (shape([True, 30]), "known dtype and a shape"),
    "a shape that is text": (shape("30"), "known dtype and a shape"),
    "fewer values than positions": (shape([3]), "can't be used"),
    "no shape": (setting("tensors", "w", value=["float32"]), "known dtype and a shape"),
    "an unknown dtype": (setting("tensors", "w", value=["object", [30]]), "known dtype and a shape"),
    "a dtype that is a list": (setting("tensors", "w", value=[["float32"], [30]]), "known dtype and a shape"),
    "a name that is no text": (called("\ud800"), "can't be called"),
    "a name of two lines": (called("a\nb"), "can't be called"),
    "a name that moves the cursor": (called("a\x1b[2J"), "can't be called"),
    "a name that safetensors has": (called("__metadata__"), "can't be called"),
}


@pytest.mark.parametrize(("change", "part"), HOSTILE.values(), ids=HOSTILE)
def test_a_lying_head_ends_in_one_message(small, capsys, change, part):
    forge(small, change)
    refused(small, part)
    assert main(["decompress", str(small), str(small.parent / "again")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fedtune: ")
    assert said.count("\n") == 1


CODECS = {
    "code": ({"_target_": "os.system", "command": "touch owned"}, "'os.system' is not known"),
    "code behind our name": ({"_target_": "fedtune.models.base.os.system"}, "is not known"),
    "a class of ours that is no codec": ({"_target_": "strategies.fedit.FedIT"}, "is not known"),
    "no class": ({}, "'None' is not known"),
    "a class that is a list": ({"_target_": ["os.system"]}, "is not known"),
    "text": ("compeft", "'None' is not known"),
    "words of Hydra's": ({"_target_": "fedtune.codecs.raw.Raw", "_partial_": True}, "has no setting '_partial_'"),
    "an unknown setting": ({"_target_": "fedtune.codecs.stc.STC", "alpha": 1}, "has no setting 'alpha'"),
    "feedback": ({"_target_": "fedtune.codecs.stc.STC", "feedback": True}, "can't be made"),
    "code deeper down": (
        {"_target_": "fedtune.codecs.stc.STC", "coder": {"_target_": "os.getcwd"}},
        "has no setting 'coder'",
    ),
    "secrets": ({"_target_": "fedtune.codecs.stc.STC", "coder": "${oc.env:HOME}"}, "has no setting 'coder'"),
    "what a terminal obeys": ({"_target_": "fedtune.codecs.stc.STC", "coder": "\x1b[2J"}, "has no setting 'coder'"),
    "a setting out of range": ({"_target_": "fedtune.codecs.stc.STC", "density": math.inf}, "density=inf"),
    "a setting that is text": ({"_target_": "fedtune.codecs.stc.STC", "density": "1"}, "should be float, got .1."),
}


@pytest.mark.parametrize(("codec", "part"), CODECS.values(), ids=CODECS)
def test_only_codecs_of_ours_are_made(small, codec, part):
    forge(small, setting("codec", value=codec))
    refused(small, part, ConfigError)


def test_names_are_names_and_no_paths(tmp_path):
    name = "../../../etc/passwd"
    compress(str(adapter(tmp_path / "a", {name: torch.ones(4)})), str(tmp_path / "small"), "raw")
    decompress(str(tmp_path / "small"), str(tmp_path / "again"))
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == {name}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "small", "again"}


def lossless(kind):
    return setting("codec", value={"_target_": f"{kind.__module__}.{kind.__name__}"})


@pytest.mark.parametrize("kind", [Raw, Packed])
def test_a_body_of_other_tensors_is_refused(small, kind):
    right = {"v": torch.ones(4, 5), "w": torch.ones(30)}
    for tensors in (
        {"v": right["v"]},
        right | {"x": torch.ones(2)},
        right | {"w": torch.ones(15, 2)},
        right | {"w": torch.ones(30).bfloat16()},
        {},
    ):
        forge(small, lossless(kind), kind().encode(tensors, 0))
        refused(small, "other tensors than its head declares")
    forge(small, lossless(kind), kind().encode(right | {"w": torch.full((30,), math.inf)}, 0))
    refused(small, "not finite")
    for body in (b"", b"fp\1", kind().encode(right, 0)[:-1]):
        forge(small, lossless(kind), body)
        refused(small, "can't be used")
    forge(small, lossless(kind), kind().encode(right, 0))
    decompress(str(small), str(small.parent / "again"))


def test_few_bytes_that_would_be_many_are_not_decoded(small, monkeypatch):
    """Packed values may take a bit each of 64: its heads are read before any of them is made."""
    monkeypatch.setattr(Packed, "decode", lambda *_: pytest.fail("decoded"))
    forge(small, lossless(Packed), Packed().encode({"v": torch.zeros(1_000_000, dtype=torch.int64)}, 0))
    refused(small, "other tensors than its head declares")


def test_a_head_longer_than_there_is_room_for(small):
    for length, rest in ((5, b"{}"), (2**32 - 1, b"{}"), (MAX_HEAD + 1, b" " * (MAX_HEAD + 1))):
        (small / PACKED).write_bytes(signed(length, rest))
        refused(small, "a head of")


def test_another_body(small):
    for body in (b"", b"fc", b"\0" * 100, b"fc\1\0" + b"\xff" * 9 + b"\1"):
        forge(small, lambda head: None, body)
        refused(small, "can't be used", FedtuneError)


# The command


def test_the_real_command(fedtune, start, trained, tmp_path):
    words = ["trained", "small", "--codec", "compeft", "codec.density=0.1", "--start", "start"]
    done = fedtune("compress", *words)
    assert done.returncode == 0, done.stderr
    for part in (
        "wrote    small",
        "density=0.1",
        " times smaller",
        "of its difference from start",
        "NEW --start start",
    ):
        assert part in done.stdout
    done = fedtune("decompress", "small", "again", "--start", "start")
    assert done.returncode == 0, done.stderr
    assert 'from_pretrained(base, "again")' in done.stdout
    found, x = load_file(tmp_path / "again" / WEIGHTS), load_file(trained / WEIGHTS)
    assert norm(minus(found, x)) < 0.1 * norm(x)


def test_what_it_says(trained, tmp_path, capsys):
    small = str(tmp_path / "small")
    assert main(["compress", str(trained), small, "codec.density=0.1", "--codec", "stc"]) == 0
    said = capsys.readouterr().out
    assert "codec    stc density=0.1 coder=golomb" in said
    assert "difference" not in said
    assert main(["compress", str(trained), small]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["compress", str(trained), str(tmp_path / "other"), "density=1"]) == 1
    assert "expected a setting of the codec" in capsys.readouterr().err
    for words in (["compress", "a", "b", "--dense"], ["decompress", "a", "b", "c"], ["methods", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_help_says_what_the_start_is_for(capsys):
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    said = capsys.readouterr().out
    assert "ADAPTER OUT [codec.SETTING=VALUE ...]" in said
    assert "meant for updates" in said
