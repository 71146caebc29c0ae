"""FedKSeed and FedKSeed-Pro against numbers worked out by hand.

Two clients with 1 and 3 samples, so weights 1/4 and 3/4; K = 3. Client 0 went along direction 0 (slope 4) and 2
(slope -8); client 1 along direction 2 twice (slopes 4 and 4):

    G_0 = 1/4 * 4 = 1        G_1 = 0        G_2 = 1/4 * -8 + 3/4 * (4 + 4) = 4
"""

import math

import numpy as np
import pytest
import torch
from conftest import rows, summary_of
from directions import values

from clients.zeroth_order import drawn
from fedtune.codecs.packed import Packed
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, DivergedError, WireError
from fedtune.core.protocol import SERVER, ClientInfo, Layout, Update
from fedtune.random_directions.weights import pool
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.training.zeroth_order import Rules
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies import fedkseed_pro
from strategies.fedkseed import FedKSeed, State
from strategies.fedkseed_pro import FedKSeedPro, probabilities

RULES = Rules(lr=1e-3, local_steps=4, eps=1e-2)
NOWHERE = Layout((), {})
METHODS = [FedKSeed(RULES, 3), FedKSeedPro(RULES, 3)]
SEEDED = ("adapter=lora", "method.strategy.rules.lr=2e-2", "method.strategy.rules.eps=1e-2")
STEPS = "method.strategy.rules.local_steps=6"
DIRECTIONS = "method.strategy.directions=64"


def update(index, slopes, examples=1):
    return Update(
        {"index": torch.tensor(index, dtype=torch.int32), "slopes": torch.tensor(slopes, dtype=torch.int32)}, examples
    )


def peer(index):
    return ClientInfo(index, 10)


REPLIES = [(peer(0), update([0, 2], [4, -8], 1)), (peer(1), update([2, 2], [4, 4], 3))]


@pytest.mark.parametrize("method", METHODS)
def test_slopes_are_weighed_by_samples(method):
    state = method.aggregate(method.init(NOWHERE), 1, REPLIES)
    assert state.slopes.tolist() == [1, 0, 4]
    assert method.aggregate(state, 2, REPLIES).slopes.tolist() == [2, 0, 8]


def test_the_sum_is_kept_finer_than_it_is_sent():
    """1/3 + 1/3 + 1/3 of a quantum is one, though each alone would have been rounded away."""
    method = FedKSeed(RULES, 3)
    state = method.init(NOWHERE)
    for _ in range(3):
        state = method.aggregate(state, 1, [(peer(0), update([1], [1], 1)), (peer(1), update([], [], 2))])
    assert method.configure(state, 4, peer(0)).tensors["slopes"].tolist() == [0, 1, 0]


def test_probabilities_by_hand():
    """quantum q: H_0 = {4q}, H_1 = {}, H_2 = {-8q, 4q, 4q}: a = (4q, 0, 16q/3), scaled (3/4, 0, 1)."""
    method = FedKSeedPro(RULES, 3)
    state = method.aggregate(method.init(NOWHERE), 1, REPLIES)
    quantum = RULES.space.quantum
    assert state.met.tolist() == pytest.approx([4 * quantum, 0, 16 * quantum])
    assert state.times.tolist() == [1, 0, 3]
    expected = np.exp([0.75, 0, 1]) / np.exp([0.75, 0, 1]).sum()
    p = probabilities(state)
    assert p.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert float(p.sum()) == pytest.approx(1)
    assert float(p.max() / p.min()) == pytest.approx(math.e, rel=1e-6)
    assert torch.equal(method.configure(state, 2, peer(0)).tensors["probabilities"], p)


def test_without_a_history_all_are_as_likely():
    assert probabilities(FedKSeedPro(RULES, 4).init(NOWHERE)).tolist() == [0.25] * 4


def test_slopes_count_for_at_most_the_bound():
    """One slope of 3 and one of 1,000: with a bound of 2 both count 2."""
    method = FedKSeedPro(RULES, 2, bound=2.0)
    counts = RULES.space.counts(np.array([3.0, -1000.0])).tolist()
    state = method.aggregate(method.init(NOWHERE), 1, [(peer(0), update([0, 1], counts))])
    assert state.met.tolist() == [2.0, 2.0]


def test_drawing():
    """Uniform draws of 8 and draws by probability, chi-squared with 7 and 2 degrees of freedom."""
    uniform = np.bincount(drawn(1, 80_000, 8), minlength=8)
    assert ((uniform - 10_000) ** 2 / 10_000).sum() < 26
    p = torch.tensor([0.2, 0.0, 0.5, 0.3])
    found = np.bincount(drawn(1, 100_000, 4, p), minlength=4)
    assert found[1] == 0
    expected = np.array([20_000, 50_000, 30_000])
    assert ((found[[0, 2, 3]] - expected) ** 2 / expected).sum() < 16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (update([0, 3], [1, 1]), r"direction 3 is not in the pool: expected 0 ... 2"),
        (update([-1], [1]), "direction -1 is not in the pool"),
        (update([0] * 5, [1] * 5), r"'index': expected int32 of at most 4, got"),
        (update([0, 1], [1]), r"'slopes': expected int32 \(2,\), got int32 \(1,\)"),
        (update([0], [2**31 - 1]), "a slope of 2147483647 quanta is out of range"),
        (update([0, 1], [2**27, 2**27]), "'slopes': the slopes add up to a length of"),
        (Update({"index": torch.tensor([0]), "slopes": torch.tensor([1])}, 1), "'index': expected int32"),
        (Update({"index": torch.tensor([0], dtype=torch.int32), "slopes": torch.tensor([math.nan])}, 1), "got float32"),
        (Update({"slopes": torch.zeros(1)}, 1), "expected the tensors 'index' and 'slopes'"),
        (Update({}, 1), "expected the tensors"),
    ],
)
def test_what_a_stranger_may_send_is_refused_by_name(method, given, told):
    with pytest.raises(WireError, match=told):
        method.validate(method.init(NOWHERE), 1, peer(0), given)


@pytest.mark.parametrize("method", METHODS)
def test_an_honest_answer_is_taken(method):
    for honest in (update([0, 2], [4, -8]), update([], [])):
        assert method.validate(method.init(NOWHERE), 1, peer(0), honest) is None


def test_a_sum_that_grows_out_of_hand_ends_the_run():
    limit = RULES.space.limit
    method = FedKSeed(RULES, 1)
    with pytest.raises(DivergedError, match="lower lr"):
        method.aggregate(method.init(NOWHERE), 1, [(peer(0), update([0], [limit]))])


@pytest.mark.parametrize("kind", [FedKSeed, FedKSeedPro])
def test_an_empty_pool_is_refused(kind):
    with pytest.raises(ConfigError, match="directions"):
        kind(RULES, 0)


def test_no_message_is_larger_than_the_paper_says():
    """K = 4096 and tau = 200: at most 4 K = 16,384 bytes down and 8 tau = 1,600 up, 17,984 together, and 64 of header.
    Indices take 12 bits instead of 32: 200 of them 300 bytes."""
    rules = Rules(lr=3e-7, local_steps=200, eps=5e-4)
    method = FedKSeed(rules)
    generator = torch.Generator().manual_seed(0)
    limit = rules.space.limit
    full = torch.randint(-limit, limit, (4096,), generator=generator)
    down = Packed().encode(method.configure(State(full.double()), 1, peer(0)).tensors, 0)
    assert len(down) <= 16_384 + 32
    index = torch.randint(0, 4096, (200,), generator=generator).int()
    up = Packed().encode({"index": index, "slopes": full[:200].int()}, 0)
    assert len(up) <= 300 + 800 + 32
    assert len(down) + len(up) <= 17_984 + 64


@pytest.mark.parametrize("method", ["fedkseed", "fedkseed_pro"])
def test_a_run_learns_and_its_ledger_shows_the_bytes(small_run, method):
    more = (f"method={method}", *SEEDED, STEPS, DIRECTIONS, "train.batch_size=4")
    folder = small_run(*more, "method.strategy.rules.local_steps=16", rounds=2)
    metrics = rows(folder, "metrics.csv")
    assert float(metrics[-1]["eval_loss"]) < float(metrics[0]["eval_loss"]) - 0.02
    for row in rows(folder, "ledger.csv"):
        if row["part"] == "train":
            bound = 64 * 8 + 64 if row["direction"] == "down" else 16 * 8 + 64
            assert 0 < int(row["payload_bytes"]) <= bound


def test_the_server_holds_what_the_formula_says(small_run):
    """w0 - lr sum_j G_j z_j in numpy, from the checkpoint alone, against what the server evaluated and exported."""
    folder = small_run("method=fedkseed", *SEEDED, STEPS, DIRECTIONS)
    experiment = compose([*summary_overrides(folder)])
    workspace = Workspace(experiment)
    state = load_checkpoint(
        folder / "checkpoint/state.safetensors", workspace.strategy.init(workspace.model.layout)
    ).state
    workspace.install(workspace.strategy.configure(state, 3, ClientInfo(SERVER, 1)), {})
    rules = workspace.strategy.rules
    slopes = state.slopes.round() * rules.space.quantum
    assert slopes.abs().max() > 0
    for name, held in workspace.model.read().items():
        expected = workspace.model.layout.initial[name].double()
        for seed, slope in zip(pool(rules.pool_seed, 64), slopes.tolist(), strict=True):
            expected = expected - rules.lr * slope * values(seed, name, held.shape).double()
        assert torch.allclose(held.double(), expected, rtol=0, atol=1e-6)


def summary_overrides(folder):
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text())["overrides"]


def test_a_client_that_steps_alone_ends_where_the_replay_does(small_run, tmp_path):
    """One client, one round: what it held after its last step is what the server's G gives, bit for bit."""
    experiment = compose(
        ["model=tiny", "method=fedkseed", *SEEDED, STEPS, DIRECTIONS, "population.clients=1", f"out={tmp_path}/x"]
    )
    workspace = Workspace(experiment)
    method, layout = workspace.strategy, workspace.model.layout
    state = method.init(layout)
    for round in (1, 2):
        update = local_update(workspace, "0" * 16, 0, round, method.configure(state, round, peer(0)))
        workspace.model.seeded.render()
        trained = workspace.model.read()
        state = method.aggregate(state, round, [(peer(0), update)])
        workspace.install(method.configure(state, round + 1, peer(0)), {})
        replayed = workspace.model.read()
        assert all(torch.equal(trained[name], replayed[name]) for name in trained)
        assert any((trained[name] != layout.initial[name]).any() for name in trained)


@pytest.mark.slow
def test_who_was_away_is_where_the_others_are(tmp_path):
    """A device that saw every round and one that comes to the last: the same bits, by fewer passes for the first."""
    words = ["model=tiny", "method=fedkseed", *SEEDED, STEPS, DIRECTIONS, "population.clients=1", f"out={tmp_path}/x"]
    steady, late = Workspace(compose(words)), Workspace(compose(words))
    method = steady.strategy
    state, generator = method.init(steady.model.layout), np.random.default_rng(0)
    for round in range(1, 5):
        chosen = generator.integers(0, 64, 6)
        slopes = method.rules.space.counts(generator.normal(0, 2, 6))
        state = method.aggregate(state, round, [(peer(0), update(chosen.tolist(), slopes.tolist()))])
        before = steady.model.seeded.passes
        steady.install(method.configure(state, round + 1, peer(0)), {})
        assert steady.model.seeded.passes - before <= 6
    late.install(method.configure(state, 5, peer(0)), {})
    one, other = steady.model.read(), late.model.read()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("compiled")
def test_the_same_run_gives_the_same_bits_and_resumes(small_run):
    more = ("method=fedkseed_pro", *SEEDED, STEPS, DIRECTIONS)
    whole, again = small_run(*more), small_run(*more, name="again")
    assert summary_of(whole)["state_sha256"] == summary_of(again)["state_sha256"]
    assert isinstance(
        load_checkpoint(whole / "checkpoint/state.safetensors", FedKSeedPro(RULES, 64).init(NOWHERE)).state,
        fedkseed_pro.State,
    )
