"""Clients trained in one pass over the base: the bits of each alone, PEFT's gradients, and failures of one's own."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from architectures import made
from conftest import SMALL, rows, small, summary_of
from hypothesis import given
from hypothesis import strategies as st
from test_precisions import base as base
from transformers import MistralConfig, MistralForCausalLM

import fedtune.training.gradients as gradients
from clients.first_order import FirstOrder
from fedtune.config.compose import compose
from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.errors import CapacityError, ConfigError
from fedtune.core.protocol import Batch, GradientReply
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.models.packing import MULTIPLE, Passenger, pack, packed_losses
from fedtune.models.stacked_layers import STACKED, LayerShare
from fedtune.runtime.local import run_local
from fedtune.training.cohort import together
from fedtune.training.first_order import loss_of
from fedtune.workspace.workspace import Workspace

CPU = torch.device("cpu")
# Unequal clients: some have fewer rows than a batch, and with epochs they take other numbers of steps
OWN = ("population.clients=5", "population.cohort=5", "data.partition=exponential", "rounds=2")
RANKS = "population.ranks=[8,4,2]"

# Methods of each kind as they are: tests/test_contract.py, where a run one by one and one with some at once agree
KINDS = [
    ("method=fedit", "train.epochs=0.5"),
    ("method=flora", RANKS),
    ("method=hetlora", RANKS),
    ("method=fedpipe", "evaluate.clients=true"),
    ("adapter=rslora",),
    ("adapter=pissa",),
    ("adapter=ia3",),
    ("adapter=vera", "adapter.dropout=0.2"),
    ("adapter=bone", "adapter.dropout=0.2"),
    ("adapter=oft",),
    ("adapter.dropout=0.3", "train.checkpoint_activations=true"),
    ("train.optimizer=sgd", "train.micro_batch_size=2", "codec=compeft", "codec_up.feedback=true"),
    ("model.dtype=bfloat16",),
    ("model.dtype=float16",),
]


def played(out, size, *words):
    """All that must not depend on how many are trained together, of a whole run."""
    if "train.epochs=0.5" in words:  # a client's own number of steps, in place of one for all
        given = compose([*(word for word in SMALL if word != "train.steps=2"), *OWN, *words, f"out={out}"])
    else:
        given = small(*OWN, *words, out=out)
    run_local(replace(given, runtime=replace(given.runtime, cohort=size)))
    figures = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows(out, "metrics.csv")]
    sent = [(row["client"], row["direction"], row["part"], row["wire_bytes"]) for row in rows(out, "ledger.csv")]
    return summary_of(out)["state_sha256"], figures, sorted(sent)


@pytest.fixture
def passes(monkeypatch):
    """How many clients each pass over a base had."""
    found, whole = [], gradients.packed_losses
    monkeypatch.setattr(gradients, "packed_losses", lambda who: (found.append(len(who)), whole(who))[1])
    return found


@pytest.mark.parametrize("words", KINDS, ids=" ".join)
def test_nobody_depends_on_whom_it_is_trained_with(words, tmp_path, passes):
    alone = played(tmp_path / "alone", 1, *words)
    assert set(passes) == {1}
    passes.clear()
    assert played(tmp_path / "three", 3, *words) == alone
    assert max(passes) == 3


def test_whatever_the_cohort(tmp_path):
    found = [played(tmp_path / str(size), size) for size in (1, 2, 4, 5, "auto")]
    assert all(each == found[0] for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_also_over_a_quantized_base(quantization, base, tmp_path, passes):
    words = ("model=custom", f"model.path={base}", f"model.quantization={quantization}", "model.dtype=float32")
    alone, beside = (played(tmp_path / str(size), size, *words) for size in (1, 5))
    assert alone == beside
    assert max(passes) == 5


BATCHES = [
    Batch(torch.arange(36).reshape(3, 12) % 250, torch.arange(12).expand(3, 12) > torch.tensor([[3], [8], [5]])),
    Batch(torch.arange(14).reshape(2, 7) * 7 % 250, torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1, 1]]) > 0),
]


@pytest.mark.parametrize(("kind", "grouped"), [*((kind, False) for kind in STACKED), ("lora", True), ("ia3", True)])
def test_gradients_are_those_of_peft(kind, grouped):
    """Two clients with tensors and batches of their own, and one whose layers are partly switched off, against PEFT's
    own layers holding each in turn, padded, one by one."""
    model = LocalModel(load_base(ModelSpec(name="tiny"), CPU), AdapterSpec(kind=kind), 0)
    assert model.obstacle == ""
    drawn = torch.Generator().manual_seed(1)
    twins = [model.twin() for _ in BATCHES]
    for twin in twins:
        moved = {name: t + 0.1 * torch.randn(t.shape, generator=drawn) for name, t in twin.adapter().items()}
        twin.install(moved)
    if kind == "lora":
        if not grouped:
            twins[1].adapt_only(list(model.by_layer)[1:])
        twins[1].install({name: t[:3] if "lora_A" in name else t[:, :3] for name, t in moved.items()}, scaling=0.7)
    with packed_losses([Passenger(t, b, 0) for t, b in zip(twins, BATCHES, strict=True)], grouped) as losses:
        torch.autograd.backward(losses)
    wanted = None
    for twin, batch, loss in zip(twins, BATCHES, losses, strict=True):
        del wanted  # a graph that is alive knows its tensors' shapes
        model.adopt(twin)
        wanted = loss_of(model.module, batch)
        wanted.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        assert twin.trained().keys() == model.trained().keys()
        for name, parameter in model.trained().items():
            torch.testing.assert_close(twin.trained()[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)
            parameter.grad = None


@dataclass(frozen=True)
class Breaks(FirstOrder):
    """It fails at its second step, in the round and for the client that its key says."""

    how: ClassVar[str] = ""

    def fit(self, model, batches, key, penalty, watch=None):
        steps = super().fit(model, batches, key, penalty, watch)
        request = next(steps)
        if batches.examples % 2:  # some clients
            if self.how == "raise":
                raise ConnectionError("the battery is flat")
            if self.how == "nan":
                for parameter in model.parameters():
                    parameter.data *= torch.nan
            if self.how == "zero":
                for parameter in model.parameters():
                    parameter.data.zero_()
            if self.how == "nothing":
                request = replace(request, batch=Batch(request.batch.tokens, request.batch.targets & False))
        while True:
            try:
                request = steps.send((yield request))
            except StopIteration as end:
                return end.value


class Raises(Breaks):
    how = "raise"


class Nans(Breaks):
    how = "nan"


class Zero(Breaks):
    how = "zero"


class Nothing(Breaks):
    how = "nothing"


@pytest.mark.parametrize("how", ["Raises", "Nans", "Zero", "Nothing"])
def test_who_fails_fails_alone(how, tmp_path):
    """In the same rows of failures.csv, with the same words, and the others' bits are what they are one by one."""
    words = (f"method.client._target_=test_cohort.{how}", "population.quorum=0.1")
    found = []
    for size in (1, 5):
        found.append(played(tmp_path / str(size), size, *words))
        found.append([(row["client"], row["error"]) for row in rows(tmp_path / str(size), "failures.csv")])
    assert found[:2] == found[2:]
    assert 0 < len({client for client, _ in found[1]}) < 5


def test_too_little_memory_halves_the_group_and_changes_nothing(tmp_path, monkeypatch, capsys):
    whole = played(tmp_path / "whole", 5)
    plain = gradients.packed_losses

    def tight(passengers):
        if len(passengers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return plain(passengers)

    monkeypatch.setattr(gradients, "packed_losses", tight)
    assert played(tmp_path / "tight", 5) == whole
    said = capsys.readouterr().err.splitlines()
    assert said.count("too little memory for 5 clients at once: in two parts") == 2  # once a round, not at each step


def test_whoever_cant_be_computed_fails_alone(monkeypatch, tmp_path):
    def turn(model):
        reply = yield gradients.GradientRequest(model, BATCHES[0], 0)
        assert isinstance(reply, GradientReply)

    model, plain = Workspace(small(out=tmp_path)).model, gradients.packed_losses
    twins = [model.twin() for _ in range(4)]
    for error, said in (
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory for a step of this client"),
        (IndexError("token 9999 is out of range"), "token 9999 is out of range"),
    ):

        def breaks(passengers, error=error):
            if any(each.model is twins[2] for each in passengers):
                raise error
            return plain(passengers)

        monkeypatch.setattr(gradients, "packed_losses", breaks)
        found = together([turn(twin) for twin in twins], lambda line: None)
        assert [each for place, each in enumerate(found) if place != 2] == [None] * 3
        assert said in str(found[2])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("adapter=dora",), "adapter.kind=dora has no form for several clients"),
        (("adapter=none", "model.dtype=float32"), "adapter.kind=none has no form for several clients"),
        (("model.attention=eager",), "its attention is eager, and examples are packed for sdpa alone"),
        (("adapter.targets=[lm_head]",), "the vocabulary's own layers are adapted"),
    ],
    ids=str,
)
def test_who_cant_be_trained_with_others_is_said(words, reason, tmp_path, capsys):
    workspace = Workspace(small(*words, out=tmp_path))
    assert workspace.model.obstacle == reason
    assert f"clients are trained one by one: {reason}" in workspace.notes
    assert workspace.cohort == 1


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("phi3", ""),
        ("cohere", ""),
        ("lfm2", "makes something else of packed examples"),  # a convolution goes from one example into the next
        ("falcon_h1", "makes something else of packed examples"),
        ("qwen3_moe", "the base has experts"),
        ("gpt2", "the base has dropout of its own"),
        ("gemma2", "its attention is eager"),
    ],
)
def test_what_an_architecture_makes_of_packed_examples_is_tried(name, obstacle):
    found = on(made(name)).obstacle
    assert found.endswith(obstacle) if obstacle.startswith("makes") else found.startswith(obstacle)
    assert bool(found) == bool(obstacle)


def on(model):
    return LocalModel(
        replace(load_base(ModelSpec(name="tiny"), CPU), model=model, reached=None), AdapterSpec(rank=4), 0
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_a_window_of_attention_ends_where_it_does(grouped):
    """Mistral's, of 4 tokens, against its own forward of each batch; without a window the losses are others."""
    found = []
    for window in (4, None):
        config = MistralConfig(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2, sliding_window=window)  # fmt: skip
        torch.manual_seed(0)
        model = on(MistralForCausalLM(config))
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.mul_(5)  # so that attention says something
            with packed_losses([Passenger(model, batch, 0) for batch in BATCHES], grouped) as losses:
                found.append([loss.item() for loss in losses])
            assert found[-1] == pytest.approx([loss_of(model.module, batch).item() for batch in BATCHES], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("asked", ["0", "-3", "many", "true", "2.5"])
def test_a_cohort_is_a_number_of_clients(asked):
    with pytest.raises(ConfigError, match=r"runtime\.cohort=\S+: expected auto, or a number of clients from 1 on"):
        small(f"runtime.cohort={asked}", out="unused")


def test_a_resumed_run_shares_it_only_where_bits_follow_from_it():
    """On a CPU they don't."""
    plain = small(out="unused").fixed()
    assert "cohort" not in plain["runtime"]
    assert small("runtime.cohort=1", out="unused").fixed() == plain
    assert small("runtime.cohort=8", out="unused").fixed()["runtime"]["cohort"] == 8
    on_cpu = [small("runtime.device=cpu", f"runtime.cohort={size}", out="unused").fixed() for size in (1, 8, "auto")]
    assert on_cpu[0] == on_cpu[1] == on_cpu[2]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("method=fedkseed",), "clients of method=fedkseed compute by themselves"),
        (("adapter=dora",), "adapter=dora has no form for several clients at once"),
        (("runtime=ray",), "is for runtime=local"),
    ],
    ids=str,
)
def test_what_cant_be_is_refused_before_anything_is_loaded(words, reason):
    with pytest.raises(ConfigError, match=f"runtime.cohort=4.*{reason}"):
        Workspace(small(*words, "runtime.cohort=4", out="unused"))


def test_more_than_there_is_memory_for_is_refused(monkeypatch, tmp_path):
    from fedtune.device.memory import MemoryFound
    from fedtune.workspace import cohort_size

    monkeypatch.setattr(cohort_size, "device_memory", lambda device: MemoryFound(1 << 30, 4_000_000, "the machine's"))
    workspace = Workspace(small("population.clients=50", "population.cohort=50", "runtime.cohort=50", out=tmp_path))
    with pytest.raises(CapacityError, match=r"so many take 0\.1 GB at once, and 0\.0 GB are free: take at most 3"):
        workspace.cohort  # noqa: B018


def test_by_default_a_cpu_trains_as_many_as_gain(tmp_path):
    """512 tokens, at most 8 clients: those of the toy have 117 a batch in the mean."""
    workspace = Workspace(small(out=tmp_path))
    lengths = [workspace.data.corpus.length(int(row)) for rows_of in workspace.data.train for row in rows_of]
    assert workspace.cohort == min(8, math.ceil(512 / (4 * sum(lengths) / len(lengths)))) > 1
    assert Workspace(small("runtime.cohort=1", out=tmp_path)).cohort == 1
    assert Workspace(small("method=fedkseed", out=tmp_path)).cohort == 1


def test_dropout_is_by_key_and_keeps_the_mean():
    x = torch.ones(4000, 8)
    one, same, other = (LayerShare({}, dropout=0.25, key=key).dropped(x) for key in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(one.mean()) == pytest.approx(1, abs=0.02)


batches = st.lists(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=9), min_size=1, max_size=3), min_size=1, max_size=3
)


@given(batches)
def test_packing_loses_no_token_that_is_learnt(given_batches):
    """Against a walk over the batches by hand: what is told from what, in order, each example from its own start."""
    made, wanted = [], []
    for rows_of in given_batches:
        width = max(map(len, rows_of))
        targets = torch.tensor([row + [False] * (width - len(row)) for row in rows_of])
        tokens = torch.arange(targets.numel()).reshape(targets.shape) + 1
        made.append(Batch(tokens, targets))
        for row, counts in zip(tokens.tolist(), targets.tolist(), strict=True):
            wanted += [(row[at - 1], at - 1, row[at]) for at in range(1, width) if counts[at]]
    packed = pack(made)
    labels = torch.cat(packed.labels)
    kept = packed.kept[: len(labels)]
    found = zip(packed.tokens[0, kept].tolist(), packed.positions[0, kept].tolist(), labels.tolist(), strict=True)
    assert list(found) == wanted
    assert packed.tokens.shape[1] % MULTIPLE == len(packed.kept) % MULTIPLE == 0
    assert packed.tokens.shape[1] - max(sum(packed.sizes), 1) < MULTIPLE
