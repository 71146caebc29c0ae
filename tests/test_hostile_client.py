"""A client that lies in every way we could think of, against the real loop with every kind of method.

Few of a cohort are honest, and each of the others tells its lie in every round, through the real ClientApp and Grid.
Every lie is refused by name, and what comes of the honest is, to the last bit, what comes of them when the others just
fail: so a lie changes nothing. Only what an asynchronous server makes of its clients depends on when one is found out.
"""

import math
from functools import cache

import pytest
import torch
from conftest import rows, run_on, small, summary_of
from fedtune.workspace.workspace import Party
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtune.core.errors import MAX_TEXT
from fedtune.core.protocol import Update
from fedtune.runs.run_folder import RunFolder
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.server.plausibility import not_finite
from fedtune.wire import messages as wire

LONG = "A" * 300_000
SCREEN = "\x1b[2J\x1b]0;all is well\x07\r"  # clears a terminal, names its window, and writes over the line
HONEST = 6  # more than tell lies that are updates in all but size


class Told:
    """An honest answer, and the means to make another of it."""

    def __init__(self, content, workspace):
        self.codec = workspace.codec_up
        self.known = workspace.model.layout.initial
        self.content = content
        self.blob = wire.blob_of(content)
        self.update = wire.unpack_update(content, self.blob, self.codec, self.known)

    def tensors(self, change):
        """The answer with other tensors; one where there should be none."""
        tensors = change(self.update.tensors or {"": torch.zeros(1)})
        update = Update(tensors, self.update.examples, self.update.metrics)
        from fedtune.codecs.raw import Raw

        lossless = getattr(self.codec, "lossless", False)
        return wire.pack_update(update, self.codec if lossless else Raw(), 0)

    def each(self, change):
        return self.tensors(lambda tensors: {name: change(tensor) for name, tensor in tensors.items()})

    def metrics(self, **changes):
        record = {**self.content["metrics"], **changes}
        return self._with(metrics=MetricRecord({k: v for k, v in record.items() if v is not None}))

    def array(self, data=None, dtype="uint8", shape=None, name="blob", **more):
        data = self.blob if data is None else data
        arrays = {name: Array(dtype, (len(data),) if shape is None else shape, "x", data), **more}
        return self._with(payload=ArrayRecord(arrays))

    def _with(self, **records):
        return RecordDict({**self.content, **records})


def extreme(tensor, sign=1):
    """The largest numbers that the dtype has."""
    limits = torch.finfo if tensor.is_floating_point() else torch.iinfo
    return torch.full_like(tensor, sign * limits(tensor.dtype).max)


def one_extreme(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[:1] = extreme(tensor).view(-1)[:1]
    return tensor


def fail(text):
    def lie(told):
        raise ValueError(text)

    return lie


def emptied(tensors):
    first, *rest = tensors
    return {first: tensors[first][:0], **{name: tensors[name] for name in rest}}


def first_renamed(name):
    def change(tensors):
        first, *rest = tensors
        return {name: tensors[first], **{key: tensors[key] for key in rest}}

    return lambda told: told.tensors(change)


def metric(name, value):
    return lambda told: told.metrics(**{name: value})


HEADER = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
LIES = {
    # Of another form
    "nothing": lambda told: RecordDict(),
    "no metrics": lambda told: RecordDict({"payload": told.content["payload"]}),
    "no payload": lambda told: RecordDict({"metrics": told.content["metrics"]}),
    "a record more": lambda told: told._with(more=ConfigRecord({"x": 1})),
    "a record of a long name": lambda told: told._with(**{LONG: ConfigRecord({"x": 1})}),
    "a record that clears the screen": lambda told: told._with(**{SCREEN: ConfigRecord({"x": 1})}),
    "a payload that is a config": lambda told: told._with(payload=ConfigRecord({"blob": b"1"})),
    "two blobs": lambda told: told.array(other=Array("uint8", (1,), "x", b"1")),
    "a blob of a long name": lambda told: told.array(name=LONG),
    "a blob of a long dtype": lambda told: told.array(dtype=SCREEN + LONG),
    "a blob of another dtype": lambda told: told.array(dtype="float32"),
    "a blob of another shape": lambda told: told.array(shape=(7,)),
    "a blob of many dimensions": lambda told: told.array(shape=(1,) * 20_000),
    "no bytes": lambda told: told.array(b""),
    "random bytes": lambda told: told.array(bytes(range(256)) * 40),
    "half": lambda told: told.array(told.blob[: len(told.blob) // 2]),
    "a byte more": lambda told: told.array(told.blob + b"\0"),
    "terabytes": lambda told: told.array(len(HEADER).to_bytes(8, "little") + HEADER),
    # Metrics
    "no example": metric("examples", 0),
    "fewer than no example": metric("examples", -5),
    "all examples of the world": metric("examples", 10**12),
    "an example more": lambda told: told.metrics(examples=told.update.examples + 1),
    "an example less": lambda told: told.metrics(examples=told.update.examples - 1),
    "a list of examples": metric("examples", [1] * 20_000),
    "half an example": metric("examples", 0.5),
    "no word on examples": metric("examples", None),
    "a metric of a long name that is none": metric(LONG, math.nan),
    "a metric of a long name": metric(LONG, 1.0),
    "a metric that clears the screen": metric(SCREEN, 1.0),
    "a metric that turns the writing": metric("\u202egpj.exe", 1.0),
    "a metric without a name": metric("", 1.0),
    "a metric that is a list": metric("train_loss", [1.0] * 20_000),
    "a hundred metrics": lambda told: told.metrics(**{f"m{place}": 0.0 for place in range(100)}),
    "an endless loss": metric("train_loss", 1e308),
    "an endless gain": metric("train_loss", -1e308),
    "a loss that is none": metric("train_loss", math.nan),
    "an infinite loss": metric("train_loss", math.inf),
    "a large loss": metric("train_loss", 1e7),
    "an endless metric": metric("temperature", 1e300),
    "another scaling": metric("scaling", 1e30),
    # Tensors
    "no numbers": lambda told: told.each(lambda t: (t.double() * math.nan).float()),
    "infinities": lambda told: told.each(lambda t: (t.double() + math.inf).float()),
    "the largest numbers": lambda told: told.each(extreme),
    "the least numbers": lambda told: told.each(lambda t: extreme(t, -1)),
    "one largest number": lambda told: told.each(one_extreme),
    "large numbers": lambda told: told.each(lambda t: t.clamp(max=0) + t.new_tensor(1e9).to(t.dtype)),
    "wide numbers": lambda told: told.each(lambda t: t.double()),
    "whole numbers": lambda told: told.each(lambda t: t.long()),
    "truth values": lambda told: told.each(lambda t: t > 0),
    "a dimension more": lambda told: told.each(lambda t: t[None]),
    "an empty tensor": lambda told: told.tensors(emptied),
    "twice as long tensors": lambda told: told.each(lambda t: torch.cat([t, t])),
    "another name": first_renamed("x"),
    "a long name": first_renamed(LONG),
    "a name that clears the screen": first_renamed(SCREEN),
    "a tensor more": lambda told: told.tensors(lambda tensors: {**tensors, "surprise": torch.zeros(3)}),
    # Errors
    "a long complaint": fail(LONG),
    "a complaint that clears the screen": fail(SCREEN),
    "a complaint of many lines": fail("no\n\n\rup\u2028down\x85" * 300),
}
SCORES = (
    {"loss": 1.7e308, "accuracy": 0.5, "tokens": 3},
    {"loss": -1.0, "accuracy": 0.5, "tokens": 3},
    {"loss": math.nan, "accuracy": 0.5, "tokens": 3},
    {"loss": 1.0, "accuracy": 7.0, "tokens": 3},
    {"loss": [1.0] * 20_000, "accuracy": 0.5, "tokens": 3},
    {"loss": 1.0, "accuracy": 0.5, "tokens": 3, LONG: 1.0},
    {"loss": 1.0, "accuracy": 0.5, "tokens": 3, SCREEN: 1.0},
    {"loss": 1.0, "accuracy": 0.5, "tokens": 0},
)

KINDS = {
    "averaging": ("method=fedit",),
    "averaging, lossy": ("method=fedit", "codec_up=int8"),
    "a server optimizer": ("method=fedadam",),
    "control variates": ("method=scaffold",),
    "products": ("method=flexlora",),
    "stacking": ("method=flora",),
    "robust": ("method=krum",),
    "norms as weights": ("method=hetlora",),
    "seeded": ("method=fedkseed", "method.strategy.rules.local_steps=2", "method.strategy.directions=16"),
    "planned": ("method=fedpipe",),
    "personal": ("method=local_only", "evaluate.every=1"),
}
CLIENTS = HONEST + len(LIES)
QUICK = (
    f"population.clients={CLIENTS}", f"population.cohort={CLIENTS}", "population.quorum=0.05", "data.heldout=0",
    "train.steps=1", "evaluate.every=0", "rounds=2",
)  # fmt: skip


class Cast:
    """The real ClientApp for the honest clients, and for the others what `lie` makes of what an honest one said."""

    def __init__(self, words, lie):
        self.app, self.inner, self.lie = ClientApp(), make_client_app(), lie
        self.workspace = Party(small(*words, out="unused"))
        self.heard = None  # the last honest answer to a train message
        self.app.query()(self.inner)
        self.app.train()(self.train)
        self.app.evaluate()(self.evaluate)

    def train(self, message: Message, context: Context) -> Message:
        index = context.node_config["partition-id"]
        if index < HONEST:
            reply = self.inner(message, context)
            self.heard = reply.content
            return reply
        own = {
            **self.heard,
            "metrics": MetricRecord({**self.heard["metrics"], "examples": self.workspace.samples(index)}),
        }
        return Message(self.lie(index, Told(RecordDict(own), self.workspace)), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        index = context.node_config["partition-id"]
        if index < HONEST:
            return self.inner(message, context)
        record = MetricRecord(SCORES[index % len(SCORES)])
        return Message(RecordDict({"metrics": record}), reply_to=message)


def hostile(index, told):
    return list(LIES.values())[index - HONEST](told)


def broken(index, told):
    raise ConnectionError("the battery is flat")


def state_of(folder, words):
    workspace = Party(small(*words, out=folder))
    opened = RunFolder(folder)
    try:
        return opened.load_checkpoint(workspace.strategy.init(workspace.layout)).state
    finally:
        opened.close()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A kind's run with liars, and one in which these just fail."""

    @cache
    def play(kind):
        words = (*KINDS[kind], *(word for word in QUICK if not (kind == "personal" and "every" in word)))
        folders = [tmp_path_factory.mktemp("hostile") / name for name in ("lied", "failed")]
        for folder, lie in zip(folders, (hostile, broken), strict=True):
            run_on(LocalGrid, Cast(words, lie).app, folder, *words)
        return words, *folders

    return play


def is_clean(text):
    return text.isprintable() and len(text) <= MAX_TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_clients_change_nothing_and_are_named(kind, played, capsys):
    words, lied, failed = played(kind)
    out = capsys.readouterr().out
    assert all(line.isprintable() and len(line) < 2 * MAX_TEXT for line in out.split("\n"))
    told = {(row["round"], int(row["peer"])): row["error"] for row in rows(lied, "failures.csv")}
    liars = dict(enumerate(LIES, HONEST))
    assert not [lie for index, lie in liars.items() if ("1", index) not in told or ("2", index) not in told]
    assert {index for _, index in told} == liars.keys()
    assert all(map(is_clean, told.values()))
    summary, other = summary_of(lied), summary_of(failed)
    assert (summary["status"], summary["totals"]["failed"]) == ("finished", other["totals"]["failed"])
    assert summary["state_sha256"] == other["state_sha256"]
    assert [row["train_loss"] for row in rows(lied, "metrics.csv")] == [
        row["train_loss"] for row in rows(failed, "metrics.csv")
    ]
    assert not not_finite(state_of(lied, words))


@pytest.mark.parametrize("kind", ["averaging", "personal"])
def test_a_run_with_hostile_clients_can_be_resumed(kind, played):
    """Flower's own Grid knows no liar here, so that all are honest in the third round."""
    words, lied, _ = played(kind)
    run_local(small(*words, "rounds=3", out=lied), str(lied))
    assert summary_of(lied)["rounds"] == 3
    assert rows(lied, "metrics.csv")[3]["clients"] == str(CLIENTS)


@pytest.mark.parametrize("method", ["fedasync", "fedbuff"])
def test_hostile_clients_of_an_asynchronous_server_are_named(method, tmp_path):
    """Lies that are updates in all but size are found when the clock comes to them; the server goes on with others."""
    devices = "population.devices=[rtx_4090,raspberry_pi_5]"
    words = (f"method={method}", *QUICK, devices, f"population.cohort={HONEST + 4}", "rounds=4")
    run_on(LocalGrid, Cast(words, hostile).app, tmp_path / "run", *words)
    assert summary_of(tmp_path / "run")["status"] == "finished"
    failures = rows(tmp_path / "run", "failures.csv")
    assert {row["peer"] for row in failures} == {str(index) for index in range(HONEST, CLIENTS)}
    assert all(is_clean(row["error"]) for row in failures)
    counted = rows(tmp_path / "run", "clock.csv")
    assert {row["peer"] for row in counted if not row["excluded_reason"]} <= {str(index) for index in range(HONEST)}
    norm = max(float(tensor.norm()) for tensor in state_of(tmp_path / "run", words).adapter.values())
    assert norm < 100
