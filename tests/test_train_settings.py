"""How many steps, of what, and by which optimizer: each setting against plain PyTorch, transformers or a pencil.

train.epochs, batches of b = 4: a client of n = 10 examples takes ceil(E 10 / 4) steps: 3 for E = 1, 2 for E = 0.5,
5 for E = 2. One of n = 3 has batches of 3, and takes E = 2 in 2 steps. Pooled, two of five clients a round with
E = 1: 0.4 epochs of the data of all are as many examples.
"""

from dataclasses import replace

import bitsandbytes
import pytest
import torch
from conftest import SMALL, rows, small, summary_of
from torch.nn import functional
from toy import Endless, Toy, drawn, quadratic

from clients.first_order import FirstOrder
from clients.scaffold import Scaffold
from fedtune.config.compose import compose
from fedtune.config.schema import AdapterSpec, Experiment, ModelSpec
from fedtune.config.train import TrainSpec
from fedtune.core.costs import STATE_BYTES
from fedtune.core.errors import ClientError, ConfigError, ModelError
from fedtune.core.protocol import Batch, ClientInfo, DeviceProfile, Instruction
from fedtune.core.settings import EngineSetting
from fedtune.models.adapted_model import LocalModel
from fedtune.models.attention import attention_of, check_attention, with_attention
from fedtune.models.base import load_base
from fedtune.runtime.local import run_local
from fedtune.server.virtual_clock import Clock
from fedtune.training.apply_instruction import with_steps
from fedtune.training.first_order import fit
from fedtune.training.gradients import finished
from fedtune.training.optimizers import check_optimizer, make_optimizer
from fedtune.training.zeroth_order import _loss
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace

CPU = torch.device("cpu")
RUN = "0" * 16
TINY = ModelSpec(name="tiny", dtype="float32")


def batch(at_once=0):
    """Five examples, of which 1, 9, 2, 6 and 0 tokens count; the last token that counts is in another place in each."""
    tokens = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(3))
    targets = torch.zeros(5, 16, dtype=torch.bool)
    for row, (first, count) in enumerate([(3, 1), (7, 9), (1, 2), (4, 6), (0, 0)]):
        targets[row, first : first + count] = True
    targets[4, 0] = True  # which nothing comes before
    return Batch(tokens, targets, at_once)


def wide():
    """The toy model in float64, with an adapter whose B isn't zero."""
    model = LocalModel(load_base(TINY, CPU), AdapterSpec(rank=2), 0)
    model.module.double()
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(place)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 8)
    return model


@pytest.fixture(scope="module")
def model():
    return wide()


# Micro-batches


def test_parts_have_their_shares_of_what_counts_and_no_more_columns_than_that_takes():
    found = [(len(part.tokens), part.tokens.shape[1], share) for part, share in batch(2).parts()]
    assert found == [(2, 16, pytest.approx(10 / 18)), (2, 10, pytest.approx(8 / 18))]  # nothing counts in the fifth
    for at_once in (0, 5, 9):
        ((whole, share),) = batch(at_once).parts()
        assert share == 1
        assert whole.tokens.shape == (5, 16)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_the_gradient_is_the_whole_batchs(model, at_once):
    """Against plain PyTorch: cross-entropy over all tokens that count."""
    given = batch()
    logits = model.module(input_ids=given.tokens).logits[:, :-1][given.targets[:, 1:]]
    expected = functional.cross_entropy(logits, given.tokens[:, 1:][given.targets[:, 1:]])
    gradients = torch.autograd.grad(expected, model.parameters())
    found = []

    def watch():
        found.extend(parameter.grad.clone() for parameter in model.parameters())

    before = model.read()
    settings = {"optimizer": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0, "key": 0, "lr": 1e-30}
    loss = finished(fit(model, [batch(at_once)], steps=1, watch=watch, **settings))
    model.install(before)
    # The loss itself is taken in float32
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for gradient, mine in zip(gradients, found, strict=True):
        assert torch.allclose(mine, gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    assert _loss(model.module, batch(at_once)) == pytest.approx(expected.item(), rel=1e-6)


def test_a_penalty_counts_once_a_step_however_many_parts_there_are(monkeypatch):
    quadratic(monkeypatch, drawn(1, 0.5, 2.0), drawn(2))
    told, x = Instruction({}), drawn(3)

    class InParts(Endless):
        def __iter__(self):
            while True:
                yield Batch(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool), 1)

    for client in (FirstOrder(lr=0.1, steps=3, optimizer="sgd", mu=0.7), Scaffold(lr=0.1, steps=3)):
        if isinstance(client, Scaffold):
            told = Instruction({**Toy(x).read(), **{f"c/{name}": value for name, value in Toy(x).read().items()}})
        whole, parts = (finished(client.train(Toy(x), given, told, {}, 0)).tensors for given in (Endless(), InParts()))
        assert all(torch.allclose(whole[name], parts[name], rtol=1e-12) for name in whole)


@pytest.mark.slow
def test_memory_is_that_of_a_micro_batch_and_a_step_reads_the_base_for_each():
    """b = 4 in parts of 3: twice through the base."""
    peer = ClientInfo(0, 40, DeviceProfile(device="slow", flop_per_s=1e9, read_bytes_per_s=1e9))
    turns, spaces = [], []
    for micro in (0, 3):
        workspace = Workspace(compose([*SMALL, f"train.micro_batch_size={micro}", "train.steps=5"]))
        state = workspace.strategy.init(workspace.layout)
        spaces.append(workspace)
        turns.append(Clock(workspace).turn(peer, workspace.strategy.configure(state, 1, peer), 0, 0))
    whole, parts = turns
    costs = spaces[1].costs
    low = min(weight.block for weight in spaces[1].weights)
    per_token = sum(costs.input_bytes * w.columns + costs.inner_bytes * 8 for w in spaces[1].weights)
    one = costs.saved_bytes[low] + costs.head_bytes + costs.tokens * per_token
    assert whole.memory_bytes - parts.memory_bytes == pytest.approx(one)
    assert whole.batch_size == parts.batch_size == 4
    flop = costs.forward_flop + costs.backward_flop[low] + 6 * costs.typical_tokens * parts.trainable_params
    assert parts.compute == pytest.approx(5 * (4 * flop / 1e9 + 2 * costs.read_bytes[low] / 1e9))


# Epochs


@pytest.mark.parametrize(
    ("epochs", "samples", "size", "steps"),
    [(1, 10, 4, 3), (0.5, 10, 4, 2), (2, 10, 4, 5), (2, 3, 4, 2), (0.1, 30, 3, 1), (1 / 3, 30, 2, 5), (1e-9, 5, 4, 1)],
)
def test_epochs_are_steps_by_hand(epochs, samples, size, steps):
    assert TrainSpec(epochs=epochs).steps_of(samples, size) == steps


@pytest.mark.slow
def test_a_client_takes_the_steps_of_its_own_examples_and_the_clock_counts_them(monkeypatch):
    words = (*SMALL, "train.epochs=0.7", "data.partition=linear", "population=phones", "method=scaffold")
    workspace = Workspace(compose([word for word in words if not word.startswith("train.steps")]))
    taken = []

    def fit(*given, steps, **named):
        taken.append(steps)
        yield from ()
        return 0.0

    monkeypatch.setattr("clients.scaffold.fit", fit)
    state, expected, clock = workspace.strategy.init(workspace.layout), [], Clock(workspace)
    sizes = [workspace.samples(index) for index in range(4)]
    peers = {i: ClientInfo(i, n, DeviceProfile(device="same", flop_per_s=1e9)) for i, n in enumerate(sizes)}
    timed = clock.eligible_clients(state, 1, peers)
    for index, peer in peers.items():
        local_update(workspace, RUN, index, 1, workspace.strategy.configure(state, 1, peer))
        expected.append(-(-7 * sizes[index] // (10 * min(4, sizes[index]))))
    assert taken == [timed[index].steps for index in range(4)] == expected
    assert len(set(expected)) > 2
    # The server's word goes first, as that of straggler=partial
    assert with_steps(workspace.client, workspace.experiment.train, {EngineSetting.STEPS: 1}, 40).steps == 1
    # Of how many a hostile config may ask
    train = replace(workspace.experiment.train, epochs=1e9)
    workspace.experiment = replace(workspace.experiment, train=train)
    with pytest.raises(ClientError, match="at most 1000000 are taken"):
        local_update(workspace, RUN, 0, 1, workspace.strategy.configure(state, 1, peers[0]))


@pytest.mark.slow
def test_pooled_epochs_see_as_many_examples_as_a_cohort():
    pooled = compose(
        ["model=tiny", "method=centralized", "train.epochs=1", "population.clients=5", "population.cohort=2"]
    )
    assert pooled.train.epochs == pytest.approx(0.4)
    assert pooled.train.steps == TrainSpec().steps == pooled.method.client["steps"]
    again = Experiment(**{name: getattr(pooled, name) for name in ("method", "population", "train")})
    assert again.train == pooled.train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.epochs=1", "train.steps=4"], "train.steps=4 and train.epochs=1 both say how long a client trains"),
        (["train.epochs=1", "method.client.steps=9"], "method.client.steps=9 and train.epochs=1 both say"),
        (["train.epochs=0"], "train.epochs=0.0 must be above 0"),
        (["train.epochs=inf"], "expected a number of passes"),
        (["train.epochs=1", "method=decomfl"], "takes its number of steps from method.strategy.rules.local_steps"),
        (["train.epochs=1", "method=fedpipe"], "plans the same number of steps for all devices"),
        (["train.micro_batch_size=-1"], "train.micro_batch_size=-1 is too small"),
        (["train.optimizer=adamw4bit"], "did you mean adamw8bit"),
        (["train.optimizer=adamw8bit", "method=scaffold"], "without an optimizer that keeps anything"),
        (["model.attention=flash"], "expected auto, eager, sdpa, flash_attention_2, flex_attention"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(words, said):
    with pytest.raises(ConfigError) as caught:
        Workspace(compose(["model=tiny", *words]))
    assert said in str(caught.value)


def test_said_twice_in_code_as_well():
    with pytest.raises(ConfigError, match=r"train\.steps=9 and train\.epochs=2"):
        TrainSpec(steps=9, epochs=2)


# Optimizers


def test_adamw_in_8_bits_is_bitsandbytes_and_near_adamw():
    def steps(make):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192).reshape(64, 128))
        optimizer = make(parameter)
        for _ in range(5):
            (parameter - 0.5).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return parameter.detach()

    mine, again = (steps(lambda p: make_optimizer("adamw8bit", [p], 0.01, 0.1)) for _ in range(2))
    theirs = steps(lambda p: bitsandbytes.optim.AdamW8bit([p], lr=0.01, weight_decay=0.1))
    whole = steps(lambda p: make_optimizer("adamw", [p], 0.01, 0.1))
    assert torch.equal(mine, again)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, whole)
    assert (mine - whole).abs().max() < 5e-3


def test_bytes_of_what_an_optimizer_keeps():
    """Weight and gradient 8; two moments of 4, of 1 with a scale of 4 for each 256, or none."""
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer("adamw8bit", [parameter], 0.01, 0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [optimizer.state[parameter][name] for name in ("state1", "state2", "absmax1", "absmax2")]
    assert 8 + sum(tensor.nbytes for tensor in held) / 8192 == STATE_BYTES["adamw8bit"]
    assert FirstOrder(optimizer="adamw8bit").work({}).state_bytes == STATE_BYTES["adamw8bit"]
    assert FirstOrder().work({}).state_bytes == 16
    assert FirstOrder(optimizer="sgd").work({}).state_bytes == 8


def test_what_is_missing_is_said_before_a_model_is_loaded(monkeypatch):
    workspace = Workspace(compose(["model=tiny", "train.optimizer=paged_adamw8bit", "runtime.device=cpu"]))
    monkeypatch.setattr("fedtune.workspace.workspace.base_for", None)
    with pytest.raises(ConfigError, match="needs a CUDA device, whose driver does the paging, and this is cpu"):
        _ = workspace.model
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        check_optimizer("adamw8bit", CPU)


# Attention


@pytest.mark.slow
def test_eager_and_sdpa_are_the_same_attention_in_another_order(tmp_path):
    found = {}
    load_base(TINY, CPU).model.save_pretrained(tmp_path)
    from fedtune.models.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    for spec in (TINY, ModelSpec(path=str(tmp_path), dtype="float32")):
        for asked in ("eager", "sdpa", "auto"):
            model = load_base(replace(spec, attention=asked), CPU).model
            assert attention_of(model) == ("sdpa" if asked == "auto" else asked)
            with torch.no_grad():
                found[asked] = model(input_ids=batch().tokens).logits
        assert torch.equal(found["sdpa"], found["auto"])
        assert not torch.equal(found["eager"], found["sdpa"])
        assert torch.allclose(found["eager"], found["sdpa"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "dtype", "device", "said"),
    [
        ("flash_attention_2", torch.bfloat16, "cpu", "needs a CUDA device to train on, and this is cpu"),
        ("flex_attention", torch.float32, "cpu", "needs a CUDA device to train on, and this is cpu"),
        ("flash_attention_2", torch.bfloat16, "cuda", "needs the package flash-attn, which isn't installed"),
    ],
)
def test_an_attention_that_this_machine_lacks_is_refused_in_a_line(asked, dtype, device, said):
    with pytest.raises(ModelError) as caught:
        check_attention(asked, torch.device(device), dtype)
    assert said in str(caught.value)
    assert "take model.attention=sdpa, eager or auto" in str(caught.value)


def test_one_that_the_architecture_lacks_is_transformers_word_in_ours(monkeypatch):
    model = load_base(TINY, CPU).model
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"model\.attention=sdpa isn't to be had: .*Way out"), with_attention("sdpa"):
        model.set_attn_implementation("sdpa")


# All together


def test_a_run_with_all_of_them(tmp_path):
    words = ("train.micro_batch_size=3", "train.optimizer=adamw8bit", "train.schedule=linear", "model.attention=eager")
    states = []
    for name in ("one", "two"):
        experiment = small(
            "adapter=none",
            "data.partition=linear",
            "rounds=1",
            "evaluate.every=0",
            *words,
            "population=mixed",
            out=tmp_path / name,
        )
        run_local(replace(experiment, train=replace(experiment.train, steps=4, epochs=0.3), overrides=[]))
        states.append(summary_of(tmp_path / name))
    assert states[0]["state_sha256"] == states[1]["state_sha256"]
    assert states[0]["base"]["attention"] == "eager"
    assert len({row["steps"] for row in rows(tmp_path / "one", "clock.csv")}) > 1
