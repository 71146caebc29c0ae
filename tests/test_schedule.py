"""The learning rate over a run: transformers' and FlowerTune's own, each by the setting that is documented as theirs.

By hand, linear, R = 4 rounds of K = 2 steps, W = 1 to warm up, lr = 0.1, lr_end = 0.02, so e = 0.2:

    step       rates     round 1: 0, 1/2       round 2: 1, 1 - 0.8/6      round 4, step 1: 1 - 0.8 * 5/6   times lr
    round      rates     round 1: 1 (t = W)    round 2: 1 - 0.8/3         round 4: 0.2

SCAFFOLD, K = 2 plain steps along a gradient that is g1 and g2, at rates r1 and r2: x - y = r1 g1 + r2 g2, so
c_i+ = (x - y) / (r1 + r2) is their mean, weighted by the rates.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from conftest import run_on, small, summary_of
from flwr.clientapp import ClientApp
from toy import SHAPES, A, Endless, Toy, drawn, quadratic

from clients.first_order import FirstOrder
from clients.scaffold import Scaffold
from fedtune.config.compose import compose, load
from fedtune.config.schema import Experiment
from fedtune.core.errors import ConfigError, QuorumError, RunFolderError
from fedtune.core.protocol import Instruction
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.training.control_variates import CHANGE, CONTROL
from fedtune.training.gradients import finished
from fedtune.training.schedule import RoundSchedule, schedule_of
from fedtune.training.zeroth_order import Rules, descend
from fedtune.workspace.workspace import Workspace

HAND = RoundSchedule("linear", 0.2, 1, "step", 4, 1)


@dataclass(frozen=True)
class OwnLoop:
    """A client that takes its steps in its own way."""

    lr: float

    def receive(self, model, instruction, memory): ...

    def train(self, model, batches, instruction, memory, key): ...


def rates(rounds, steps, lr, **settings):
    """The rate of each step of a whole run."""
    words = [f"train.{name}={value}" for name, value in settings.items()]
    experiment = compose(["model=tiny", f"rounds={rounds}", f"train.lr={lr}", f"train.steps={steps}", *words])
    schedules = [schedule_of(experiment, number) for number in range(1, rounds + 1)]
    return [lr * schedule.share(step, steps) for schedule in schedules for step in range(steps)]


def flower_tune(current_round, total_round, lrate_max, lrate_min):
    """`cosine_annealing` of flowertune_llm, word for word."""
    cos_inner = math.pi * current_round / total_round
    return lrate_min + 0.5 * (lrate_max - lrate_min) * (1 + math.cos(cos_inner))


def test_by_hand():
    assert [HAND.share(step, 2) for step in (0, 1)] == [0, 0.5]
    assert [replace(HAND, round=2).share(step, 2) for step in (0, 1)] == pytest.approx([1, 1 - 0.8 / 6])
    assert replace(HAND, round=4).share(1, 2) == pytest.approx(1 - 0.8 * 5 / 6)
    whole = [replace(HAND, interval="round", round=number).share(0, 2) for number in (1, 2, 4)]
    assert whole == pytest.approx([1, 1 - 0.8 / 3, 0.2])
    assert HAND.total(2) == 0.5
    # Whoever takes half the steps has the rates of the same shares of its turn, and nobody's goes below the end
    assert replace(HAND, round=3).share(1, 2) == replace(HAND, round=3).share(2, 4)
    assert replace(HAND, round=10**17).share(0, 2) == pytest.approx(0.2)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "cosine to 1e-5"])
def test_by_steps_it_is_transformers(shape, warmup):
    rounds, steps, lr = 5, 3, 1e-3
    if shape == "constant" and not warmup:
        return
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    named = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
        "constant": lambda optimizer, warm, total: transformers.get_constant_schedule_with_warmup(optimizer, warm),
        "cosine to 1e-5": lambda *given: transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup(
            *given, min_lr=1e-5
        ),
    }
    theirs, expected = named[shape](optimizer, warmup * steps, rounds * steps), []
    for _ in range(rounds * steps):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    name, _, end = shape.partition(" to ")
    found = rates(rounds, steps, lr, schedule=name, warmup_rounds=warmup, lr_end=end or 0)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_by_rounds_it_is_flower_tunes():
    found = rates(10, 2, 5e-5, schedule="cosine", schedule_interval="round", lr_end="1e-6")
    expected = [flower_tune(number, 10, 5e-5, 1e-6) for number in range(1, 11) for _ in range(2)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_steps_are_taken_at_these_rates(monkeypatch):
    """With h = 1, at = 0 a plain step is w <- (1 - rate) w."""
    ones, nothing, x = {n: torch.ones(s).numpy() for n, s in SHAPES.items()}, drawn(0, 0, 1e-300), drawn(1)
    quadratic(monkeypatch, ones, nothing)
    schedule = replace(HAND, round=2)
    client = FirstOrder(lr=0.1, steps=2, optimizer="sgd", max_grad_norm=0.0, schedule=schedule)
    update = finished(client.train(Toy(x), Endless(), Instruction({}), {}, 0))
    factor = (1 - 0.1) * (1 - 0.1 * (1 - 0.8 / 6))
    assert update.tensors[A].numpy() == pytest.approx(x[A] * factor, rel=1e-12)


def test_scaffolds_c_i_is_the_mean_by_rates(monkeypatch):
    h, at, x, c = drawn(1, 0.5, 2.0), drawn(2), drawn(3), drawn(4)
    quadratic(monkeypatch, h, at)
    sent = {**x, **{CONTROL + name: value for name, value in c.items()}}
    told = Instruction({name: torch.tensor(value) for name, value in sent.items()})
    schedule = replace(HAND, round=2)
    update = finished(Scaffold(lr=0.1, steps=2, schedule=schedule).train(Toy(x), Endless(), told, {}, 0))
    first, second = (0.1 * schedule.share(step, 2) for step in (0, 1))
    for name in x:
        g1 = h[name] * (x[name] - at[name]) + c[name]  # c_i is zero: g + c
        w = x[name] - first * g1
        g2 = h[name] * (w - at[name]) + c[name]
        assert update.tensors[name].numpy() == pytest.approx(w - second * g2, rel=1e-12)
        mean = (first * g1 + second * g2) / (first + second)
        assert update.tensors[CHANGE + name].numpy() == pytest.approx(mean - c[name], rel=1e-9)
    # One step at the very beginning of a warm-up leads nowhere, and tells nothing
    still = finished(Scaffold(lr=0.1, steps=1, schedule=HAND).train(Toy(x), Endless(), told, {}, 0))
    assert all(torch.equal(still.tensors[name], torch.tensor(x[name])) for name in x)
    assert not any(still.tensors[CHANGE + name].any() for name in x)


def test_seeded_steps_are_that_share_of_whole_quanta(monkeypatch):
    """Slopes of 40 and -4 quanta, at half the rate 20 and -2."""

    class Weights:
        def step(self, record):
            pass

    rules = Rules(lr=0.01, local_steps=1, eps=1e-3, perturbations=2)
    slopes = [80 * rules.space.quantum, -8 * rules.space.quantum]
    monkeypatch.setattr("fedtune.training.zeroth_order.slopes_along", lambda *_: (slopes, 1.0, 0.0))
    model = Toy(drawn(0))
    model.seeded = Weights()
    half = RoundSchedule("linear", 0.0, 0, "step", 4, 3)
    assert descend(model, Endless(), rules, [[1, 2]]).counts.tolist() == [[40, -4]]
    assert descend(model, Endless(), rules, [[1, 2]], schedule=half).counts.tolist() == [[20, -2]]


def failing_app(first):
    """The real ClientApp, which fails from round `first` on."""
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))

    @app.train()
    def train(message, context):
        if int(message.metadata.group_id) >= first:
            raise ConnectionError("gone")
        return inner(message, context)

    return app


def test_a_run_that_is_resumed_has_the_same_bits_and_its_rounds_are_fixed(tmp_path):
    words = ("rounds=3", "train.schedule=cosine", "train.warmup_rounds=1", "evaluate.every=0")
    states = []
    for name, extra in (("whole", ()), ("plain", ("train.schedule=constant", "train.warmup_rounds=0"))):
        run_local(small(*words, *extra, out=tmp_path / name))
        states.append(summary_of(tmp_path / name)["state_sha256"])
    parts = tmp_path / "parts"
    with pytest.raises(QuorumError):
        run_on(LocalGrid, failing_app(2), parts, *words)
    experiment = load((parts / "config.yaml").read_text())
    with pytest.raises(RunFolderError, match="rounds: 3 -> 5"):
        run_local(replace(experiment, rounds=5), resume=str(parts))
    run_local(experiment, resume=str(parts))
    assert summary_of(parts)["state_sha256"] == states[0] != states[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.schedule=cos"], "train.schedule=cos is not known: expected constant, cosine, linear"),
        (["train.lr_end=1e-5"], "a constant rate ends as it begins"),
        (["train.schedule=cosine", "train.lr_end=-1"], "train.lr_end=-1.0 is too small"),
        (["train.schedule=cosine", "train.schedule_interval=round"], "the last one would learn nothing"),
        (["train.warmup_rounds=3"], "train.warmup_rounds=3 leave none of rounds=3"),
        (["train.schedule=linear", "train.lr_end=0.01"], "which is 0.001 for method=fedit"),
        (["train.schedule=linear", "train.lr_end=1e-3", "method=decomfl"], "which is 1e-05 for method=decomfl"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(words, said):
    with pytest.raises(ConfigError) as caught:
        Workspace(compose(["model=tiny", "rounds=3", *words]))
    assert said in str(caught.value)


def test_a_client_of_ones_own_that_knows_no_schedule_is_no_silence():
    experiment = compose(["model=tiny", "train.schedule=linear"])
    client = {"_target_": f"{__name__}.OwnLoop", "lr": 0.1}
    with pytest.raises(ConfigError, match=r"OwnLoop, the client of method=fedit, has no learning rate"):
        Workspace(replace(experiment, method=replace(experiment.method, client=client)))


def test_nobody_sets_a_clients_schedule_but_the_engine():
    experiment = compose(["model=tiny"])
    client = {**experiment.method.client, "schedule": "x"}
    with pytest.raises(ConfigError, match=r"method\.client\.schedule is no setting"):
        Workspace(replace(experiment, method=replace(experiment.method, client=client)))


def test_rounds_are_free_without_a_schedule_and_nothing_new_is_in_old_hashes():
    kept = Experiment().fixed()
    assert "rounds" not in kept
    assert not {"schedule", "epochs", "micro_batch_size"} & kept["train"].keys()
    assert "attention" not in kept["model"]
    assert replace(Experiment(), train=replace(Experiment().train, schedule="linear")).fixed()["rounds"] == 3
