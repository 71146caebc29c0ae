"""A device against whatever a server may send it: Flower's own messages to the ClientApp that devices run.

Whatever it is, the device answers with one named error, writes nothing, opens nothing that its owner has not allowed,
says nothing of itself, and works on for the next who asks properly. The same through a worker process:
tests/test_worker.py::test_a_hostile_server_learns_nothing_from_a_worker_and_ends_none.
"""

import math
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PAIRS, SMALL
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.codecs.packed import Packed
from fedtune.codecs.raw import Raw
from fedtune.config.compose import compose
from fedtune.core.errors import ClientError, FedtuneError
from fedtune.core.protocol import Instruction
from fedtune.device.privacy import for_the_server
from fedtune.runtime.app import make_device_app
from fedtune.wire import messages as wire
from fedtune.wire.flower_private import assume_identity
from fedtune.workspace.workspace import workspace_of

SECRET = "hunter2-of-this-device"
RUN = "0" * 16
SEEDED = ("method=fedkseed", "method.strategy.directions=8", "method.strategy.rules.local_steps=2")


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """What a device's owner has set up: a home, a folder for data, and beside them what is nobody's business."""
    device = tmp_path_factory.mktemp("device")
    private, shared = device / "owner", device / "shared"
    private.mkdir()
    shared.mkdir()
    (private / "diary.jsonl").write_text(PAIRS.read_text().replace("plus", SECRET))
    (private / "devices.csv").write_text(f"{SECRET},x\n")
    (private / "model").mkdir()
    (shared / "link.jsonl").symlink_to(private / "diary.jsonl")
    assume_identity(99)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(private)
        patch.setenv("SECRET", SECRET)
        patch.setenv("FEDTUNE_HOME", str(device / "home"))
        patch.setenv("FEDTUNE_FOLDERS", f"{PAIRS.parent}:{shared}")
        yield device


@pytest.fixture(scope="module")
def texts():
    return {words: compose(["runtime=flower", *SMALL, *words]).text() for words in ((), SEEDED)}


@pytest.fixture(scope="module")
def honest(texts):
    return workspace_of({"config": texts[()]}).model.layout.initial


def ask(kind, content, run_config, group="1"):
    context = Context(99, 7, {"partition-id": 1, "worker": False}, RecordDict(), run_config)
    return make_device_app()(message=Message(content, 7, kind, group_id=group), context=context).content


def refused(device, kind, content, run_config, group="1"):
    """The device's words, which must be of one named error, soon, and of nothing that is its own."""
    before, begun = files(device), time.monotonic()
    with pytest.raises(ClientError) as caught:
        ask(kind, content, run_config, group)
    said = str(caught.value)
    assert isinstance(caught.value.__cause__, FedtuneError), said
    assert time.monotonic() - begun < 30
    assert SECRET not in said
    assert str(device) not in said
    assert len(said) < 5000
    assert files(device) == before
    return said


def files(device):
    return sorted(path for path in device.rglob("*") if device / "home" not in (path, *path.parents))


def put(*path, value):
    """The config with `value` in this place, as YAML."""

    def change(text):
        config = yaml.safe_load(text)
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return yaml.safe_dump(config)

    return change


def client(**spec):
    return put("method", "client", value=spec)


def written(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new, 1)

    return change


FEDIT = {"_target_": "strategies.fedit.FedIT"}
FIRST = "clients.first_order.FirstOrder"
CONFIGS = {
    "overwrites a file": (client(_target_="shutil.copy", src="diary.jsonl", dst="copy"), "wants 'shutil.copy' made"),
    "fetches": (client(_target_="urllib.request.urlretrieve", url="file:///etc/passwd", filename="x"), "made"),
    "opens a log": (client(_target_="logging.FileHandler", filename="log"), "wants 'logging.FileHandler' made"),
    "a shell": (client(_target_="os.system", command="touch owned"), "wants 'os.system' made"),
    "a shell behind our name": (client(_target_="fedtune.models.base.os.system", command="touch owned"), "made"),
    "a class of ours that makes folders": (client(_target_="fedtune.runs.run_folder.RunFolder", path="x"), "made"),
    "a function of ours": (client(_target_="fedtune.core.files.write_atomically", path="x", content="y"), "made"),
    "a target that is a list": (client(_target_=["os.system"]), "made"),
    "no target": (client(lr=1.0), "wants None made"),
    "a client that is none": (client(_target_="strategies.fedit.FedIT"), "it has no 'receive'"),
    "words of Hydra's": (client(_target_=FIRST, _partial_=True), "has no setting '_partial_'"),
    "arguments by place": (client(_target_=FIRST, _args_=[1]), "has no setting '_args_'"),
    "a setting that it hasn't got": (client(_target_=FIRST, evil=1), "it has no setting 'evil'"),
    "a setting of another type": (client(_target_=FIRST, lr="x"), "lr should be float"),
    "a number that is a truth": (client(_target_=FIRST, steps=True), "expected a whole number"),
    "code within": (client(_target_=FIRST, lr={"_target_": "builtins.eval"}), "should be a plain value"),
    "code in a list": (client(_target_=FIRST, lr=[{"_target_": "builtins.eval"}]), "should be a plain value"),
    "code as a base": (
        put("method", "strategy", value={"_target_": "strategies.fedavgm.FedAvgM", "base": {"_target_": "os.abort"}}),
        "method.strategy.base wants 'os.abort' made",
    ),
    "a strategy without end": (
        put("method", "strategy", value={**FEDIT, "base": {**FEDIT, "base": {**FEDIT, "base": FEDIT}}}),
        "should be a class",
    ),
    "code as a server optimizer": (put("server_optimizer", value={"_target_": "os.abort"}), "wants 'os.abort' made"),
    "code as a codec": (put("codec_up", "_target_", value="os.abort"), "codec_up wants 'os.abort' made"),
    "asks for a secret": (put("data", "path", value="${oc.env:SECRET}"), "'data.path' has '${' in it"),
    "asks in a list": (put("adapter", "targets", value=["${oc.env:SECRET}"]), "'adapter.targets' has '${' in it"),
    "asks in a key": (put("data", "partition_options", value={"${oc.env:SECRET}": 1}), "has '${' in it"),
    "asks in a class": (client(_target_="${oc.env:SECRET}"), "'method.client._target_' has '${' in it"),
    "another's file": (put("data", "path", value="diary.jsonl"), "opens only files in folders that its owner"),
    "by a link": (put("data", "path", value=str(PAIRS.parent / "../../../etc/hostname")), "opens only files"),
    "a file of no kind": (put("data", "path", value="/etc/passwd"), "data.path=/etc/passwd: this device opens only"),
    "a file of the user's home": (put("data", "path", value="~/.ssh/id_ed25519"), "opens only files"),
    "the working folder": (put("data", "path", value="text"), "opens only files"),
    "a path with a nul": (put("data", "path", value="a\0b"), "opens only files|can't be read"),
    "an adapter of its own": (put("adapter", "path", value="adapter"), "adapter.path=adapter: this device opens only"),
    "a model of its own": (put("model", "path", value="model"), "model.path=model: this device opens only"),
    "a table of devices": (put("population", "devices", value="devices.csv"), "population.devices=devices.csv: this"),
    "a device of torch's": (put("runtime", "device", value="meta"), "runtime.device='meta': expected"),
    "works for ever": (put("runtime", "timeout", value=1e18), "works on one message for"),
    "steps without end": (put("method", "client", "steps", value=10**12), "method.client.steps: expected a whole"),
    "no steps": (put("method", "client", "steps", value=-1), "method.client.steps: expected a whole number from 1"),
    "a batch of everything": (put("train", "batch_size", value=10**12), "train.batch_size: expected a whole number"),
    "a length without end": (put("data", "max_length", value=10**12), "data.max_length: expected a whole number"),
    "an adapter that fills the machine": (put("adapter", "rank", value=10**9), "adapter.rank: expected a whole"),
    "clients without end": (put("population", "clients", value=10**9), "population.clients: expected a whole"),
    "answers without end": (put("evaluate", "max_new_tokens", value=10**9), "max_new_tokens: expected a whole"),
    "a seed of 70 bits": (put("seed", value=1 << 70), "seed: it has more than 64 bits"),
    "a number of 5,000 digits": (written("seed: 0", f"seed: {'7' * 5000}"), "the run's config can't be read"),
    "no number": (put("train", "lr", value=math.nan), "train.lr=nan must be above 0"),
    "an infinite rate": (put("train", "lr", value=math.inf), "train.lr: expected a finite number"),
    "a list instead": (put("train", value=[1]), "the run's config can't be read|train"),
    "a text without end": (put("data", "subset", value="x" * 100_000), "data.subset: it has 100000 characters"),
    "an unknown setting": (put("train", "evil", value=1), "evil"),
    "brackets that end the parser": (lambda text: "[" * 90_000, "deeper than 50 levels"),
    "items that end the parser": (lambda text: "- " * 90_000, "deeper than 50 levels"),
    "a text that grows": (lambda text: "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", "refers to parts of itself"),
    "five megabytes": (lambda text: "#" * 5_000_000, "5000000 characters"),
    "a list": (lambda text: "- 1", "expected settings as 'key: value'"),
    "no YAML": (lambda text: "{", "can't be read"),
    "an object of Python's": (lambda text: "!!python/object/apply:os.system ['touch owned']", "can't be read"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "part"), CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_server_has_nothing_made_or_opened_by_a_runs_config(device, texts, change, part):
    said = refused(device, "query", RecordDict(), {"config": change(texts[()])})
    assert any(word in said for word in part.split("|")), said


def test_a_hostile_server_gets_no_further_by_a_link_that_the_owner_made(device, texts):
    text = put("data", "path", value=str(device / "shared" / "link.jsonl"))(texts[()])
    with pytest.raises(ClientError, match="opens only files in folders that its owner has named"):
        ask("query", RecordDict(), {"config": text})


WORDS = {
    "another folder of settings": ("hydra.searchpath=[file:///tmp] experiment=x", "is no setting"),
    "a file by a choice's name": ("experiment=../../../../etc/x", "is not known: expected demo"),
    "asks for a secret": ("name=${oc.env:SECRET}", "asks this machine for a value"),
    "asks by a name that it makes": ("name=${${seed}:SECRET}", "asks this machine for a value"),
    "a new key": ("+method.client.evil=1", "is no setting"),
    "code": ("method.client._target_=os.system", "wants 'os.system' made"),
    "quotes that don't end": ("name='", "can't be split into words"),
    "digits": (f"seed={'1' * 5000}", "can't be read"),
    "lists in lists": (f"population.ranks={'[' * 5000}", "is too long"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "part"), WORDS.values(), ids=WORDS)
def test_a_hostile_server_has_nothing_looked_up_by_words(device, words, part):
    assert part in refused(device, "query", RecordDict(), {"overrides": words})


def told(settings=None, tensors=None, start=None, **more):
    """A message to train, with some of it replaced; None takes a setting out."""
    given = {**(start or {}), **(settings or {}), **more}
    settings = {name: value for name, value in given.items() if value is not None}
    return lambda honest, codec: wire.pack_instruction(
        Instruction(honest if tensors is None else tensors(honest), settings), codec, 0, RUN
    )


def each(change):
    return lambda honest: {name: change(tensor) for name, tensor in honest.items()}


MESSAGES = {
    "steps without end": (told(steps=10**12), "setting 'steps': expected a whole number from 1 to 1000000"),
    "no steps": (told(steps=0), "setting 'steps': expected a whole number"),
    "steps that are text": (told(steps="x"), "setting 'steps': expected a whole number"),
    "steps that are a truth": (told(steps=True), "setting 'steps': expected a whole number"),
    "half a step": (told(steps=1.5), "setting 'steps': expected a whole number"),
    "no step of a number": (told(steps=math.nan), "setting 'steps': expected a finite number"),
    "a batch of less than nothing": (told(batch_size=-4), "setting 'batch_size': expected a whole number"),
    "a batch of everything": (told(batch_size=1 << 62), "setting 'batch_size': expected a whole number"),
    "a base of 3 bits": (told(bits=3), "this base can't be held in 3 bits"),
    "a base of no bits": (told(bits=-8), "setting 'bits': expected a whole number"),
    "a rank below none": (told(rank=-1), "setting 'rank': expected a whole number"),
    "a rank without end": (told(rank=1 << 40), "setting 'rank': expected a whole number"),
    "a rank above this run's": (told(rank=64), "asks for rank 64; the adapters of this run have 8"),
    "a scaling that is none": (told(scaling=math.nan), "setting 'scaling': expected a finite number"),
    "a scaling that is text": (told(scaling="x"), "setting 'scaling': expected a number"),
    "training of what there isn't": (told(train="everything"), "there is no 'everything' to train"),
    "merges on others": (told(version=9, builds_on=7), "merges build on version 7"),
    "a version below none": (told(version=-1, builds_on=0), "setting 'version': expected a whole number"),
    "a version on nothing": (told(version=1), "KeyError: 'builds_on'"),
    "a text without end": (told(note="x" * 100_000), "setting 'note': it has 100000 characters"),
    "a name without end": (told({"x" * 300_000: 1}), "a setting is called 'xxx"),
    "settings without end": (
        told({f"x{number}": 1 for number in range(1000)}),
        "1000 settings in one",
    ),
    "tensors that are none": (told(tensors=each(lambda tensor: tensor * math.nan)), "values that are not finite"),
    "tensors of others": (told(tensors=lambda honest: {"evil": torch.zeros(1)}), "no trainable tensor 'evil'"),
    "tensors of another shape": (told(tensors=each(lambda tensor: tensor[:1, :1])), "tensor "),
    "tensors of another type": (told(tensors=each(torch.Tensor.double)), "expected float32"),
    "factors that don't go together": (
        told(tensors=each(lambda tensor: tensor[:3] if tensor.shape[0] == 8 else tensor)),
        "has rank 3",
    ),
    "a change of layers that aren't": (
        told(
            version=1, builds_on=0, tensors=lambda honest: {f"x.residual_{side}.1": torch.zeros(2, 2) for side in "AB"}
        ),
        "can't be done here",
    ),
    "a change of another width": (
        told(version=1, builds_on=0, tensors=lambda honest: {**honest, **residual(next(iter(honest)))}),
        "can't be done here",
    ),
    "no settings": (lambda honest, codec: RecordDict(), "expected a record 'payload'"),
    "no tensors": (lambda honest, codec: RecordDict({"settings": ConfigRecord({"run": RUN})}), "payload"),
    "no blob": (lambda honest, codec: with_blob(b"\x00" * 100), "not a raw blob"),
    "a run that is a path": (
        lambda honest, codec: wire.pack_instruction(Instruction(honest), codec, 0, "../../../etc"),
        "16 hexadecimal digits",
    ),
}


def residual(name):
    module = name.removesuffix(".lora_A.weight")
    return {f"{module}.residual_B.1": torch.zeros(3, 2), f"{module}.residual_A.1": torch.zeros(2, 3)}


def with_blob(blob):
    array = Array("uint8", (len(blob),), "numpy.ndarray", blob)
    return RecordDict({"payload": ArrayRecord({"blob": array}), "settings": ConfigRecord({"run": RUN})})


@pytest.mark.slow
@pytest.mark.parametrize(("make", "part"), MESSAGES.values(), ids=MESSAGES)
def test_a_hostile_server_has_no_turn_taken_that_makes_no_sense(device, texts, honest, make, part):
    content = make(honest, Raw())
    assert part in refused(device, "train", content, {"config": texts[()]})


@pytest.mark.parametrize("group", ["", "x", "-1", "1.5", "9" * 5000, "²"])
def test_a_hostile_server_names_no_round_that_is_none(device, texts, honest, group):
    content = told()(honest, Raw())
    assert "expected the round's number" in refused(device, "train", content, {"config": texts[()]}, group)


RULES = {
    "local_steps": 2,
    "lr": 1e-4,
    "eps": 1e-3,
    "perturbations": 1,
    "two_sided": True,
    "noise": "normal",
    "sparsity": 0.0,
    "pool_seed": 0,
}
EIGHT = {"slopes": torch.zeros(8, dtype=torch.int32)}
SLOPES = {
    "steps without end": (told(local_steps=1 << 50), "setting 'local_steps': expected a whole number"),
    "no steps": (told(local_steps=-1), "setting 'local_steps': expected a whole number"),
    "slopes without end": (told(local_steps=10**6, perturbations=10**4), "more than a round can have"),
    "a distance of nothing": (told(eps=0.0), "eps=0.0: expected a number above 0"),
    "a distance that is none": (told(eps=math.nan), "setting 'eps': expected a finite number"),
    "a distance that is text": (told(eps="x"), "setting 'eps': expected a number"),
    "a rate below nothing": (told(lr=-1.0), "lr=-1.0: expected a number above 0"),
    "a truth that is text": (told(two_sided="no"), "two_sided='no' is missing or wrong"),
    "no seed": (told(pool_seed=0.5), "pool_seed=0.5 is missing or wrong"),
    "an unknown noise": (told(noise="brown"), "brown"),
    "no rules": (told(noise=None), "'noise' is missing or wrong"),
    "no slopes": (told(tensors=lambda honest: {}), "expected the tensor 'slopes'"),
    "no direction": (told(tensors=lambda honest: {"slopes": torch.zeros(0, dtype=torch.int32)}), "got int32 (0,)"),
    "slopes in two dimensions": (told(tensors=lambda honest: {"slopes": torch.zeros(2, 4)}), "got float32 (2, 4)"),
    "odds of others": (told(tensors=lambda honest: {**EIGHT, "probabilities": torch.ones(3, 3)}), "expected 8 prob"),
    "odds below none": (told(tensors=lambda honest: {**EIGHT, "probabilities": -torch.ones(8)}), "-8 in all"),
}


@pytest.mark.parametrize(("make", "part"), SLOPES.values(), ids=SLOPES)
def test_a_hostile_server_has_no_direction_taken_that_makes_no_sense(device, texts, make, part):
    def content(settings):
        packed = make(EIGHT, Packed())
        record = {**settings, **dict(packed["settings"])}
        if part == "'noise' is missing or wrong":
            del record["noise"]
        packed["settings"] = ConfigRecord(record)
        return packed

    assert part in refused(device, "train", content(RULES), {"config": texts[SEEDED]})


@pytest.mark.slow
def test_a_hostile_server_says_not_where_a_device_writes(device, honest):
    """A run that says it is a simulation, with a folder of the device's: what clients keep lies in its home all the
    same."""
    words = [*SMALL, "method=rolora", f"out={device / 'owner' / 'taken'}"]
    text = compose(words).text()
    assert "name: local" in text
    run = "1" * 16
    told = Instruction(honest, {"train": "lora_B", "builds_on": 0, "version": 1})
    ask("train", wire.pack_instruction(told, Raw(), 0, run), {"config": text})
    assert not (device / "owner" / "taken").exists()
    assert (device / "home" / "clients" / run / "1" / "1.safetensors").is_file()


def test_a_device_works_on_after_a_hostile_server(device, texts, honest):
    config = {"config": texts[()]}
    greeting = dict(ask("query", RecordDict(), config)["greeting"])
    assert (greeting["index"], greeting["samples"] > 0) == (1, True)
    content = told(steps=1)(honest, Raw())
    assert wire.blob_of(ask("train", content, config))


def test_an_owner_allows_classes_by_name(device, texts, monkeypatch):
    config = {"config": put("method", "client", "_target_", value="mischief.Mischief")(texts[()])}
    said = refused(device, "query", RecordDict(), config)
    assert "say so to the process that refuses: FEDTUNE_TARGETS=mischief.Mischief" in said
    monkeypatch.setenv("FEDTUNE_TARGETS", "some.Other, mischief.Mischief")
    assert ask("query", RecordDict(), config)["greeting"]["index"] == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/srv/data/x.jsonl line 3", "/srv/data/x.jsonl line 3"),  # the server's own word
        ("/srv/other/x.jsonl line 3", ".../x.jsonl line 3"),
        (f"{Path.home()}/my notes/a.txt", ".../my notes/a.txt"),
        ('File "/usr/lib/x.py", line 3', 'File ".../x.py", line 3'),
        ("~/.ssh/id_ed25519 isn't", ".../id_ed25519 isn't"),
        ("https://example.org/a/b and a hub's owner/name", "https://example.org/a/b and a hub's owner/name"),
        ("3/4 of a/b/c", "3/4 of a/b/c"),
        ("x" * 100_000, "x" * 4000 + " ..."),
    ],
)
def test_what_a_device_says_has_no_folders_of_its_own(text, told):
    assert for_the_server(text, "data:\n  path: /srv/data/x.jsonl\n") == told
