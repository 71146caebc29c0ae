"""DeComFL and its control MeZO against numbers worked out by hand.

T = 2 steps of P = 2 directions. Two clients whose slopes are [[4, 0], [2, 6]] and [[2, 1], [-8, 6]] quanta:

    mean = [[3, 0.5], [-3, 6]], sent as whole quanta [[3, 0], [-3, 6]]        (halves to even)

A client that was there in every round is sent one round's means, 4 T P = 16 numbers' bytes at most; one that was away
for two rounds is sent three.
"""

import numpy as np
import pytest
import torch
from conftest import rows, summary_of
from directions import values

from clients.shared_directions import seeds_of
from fedtune.config.compose import compose
from fedtune.core.errors import ClientError, ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Update
from fedtune.lowrank.residual import FROM, VERSION
from fedtune.training.zeroth_order import Rules
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.decomfl import DeComFL, State
from strategies.mezo import MeZO

pytestmark = pytest.mark.slow

RULES = Rules(lr=1e-3, local_steps=2, eps=1e-2, perturbations=2)
NOWHERE = Layout((), {})
METHOD = DeComFL(RULES)
RUN = "0" * 16
WORDS = (
    "model=tiny",
    "method=decomfl",
    "adapter=lora",
    "method.strategy.rules.lr=2e-2",
    "method.strategy.rules.eps=1e-2",
    "method.strategy.rules.local_steps=2",
    "method.strategy.rules.perturbations=2",
    "population.clients=2",
)


def update(slopes, examples=1):
    return Update({"slopes": torch.tensor(slopes, dtype=torch.int32)}, examples)


def test_slopes_are_averaged_over_clients():
    replies = [(ClientInfo(0, 9), update([[4, 0], [2, 6]])), (ClientInfo(1, 9), update([[2, 1], [-8, 6]], examples=9))]
    state = METHOD.aggregate(METHOD.init(NOWHERE), 1, replies)
    assert state.slopes.tolist() == [[[3, 0], [-3, 6]]]
    assert METHOD.aggregate(state, 2, replies[:1]).slopes.tolist() == [[[3, 0], [-3, 6]], [[4, 0], [2, 6]]]


def test_a_client_is_sent_the_rounds_that_it_lacks():
    state = State(torch.arange(20).reshape(5, 2, 2).int())
    for held, sent in ((0, 5), (2, 3), (4, 1), (5, 0)):
        told = METHOD.configure(state, 6, ClientInfo(0, 9, base_version=held))
        assert len(told.tensors["slopes"]) == sent
        assert (told.settings[FROM], told.settings[VERSION]) == (held, 5)
    # A version that the server never made: of a run that was resumed from before
    assert len(METHOD.configure(state, 6, ClientInfo(0, 9, base_version=7)).tensors["slopes"]) == 5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (Update({}, 1), "expected the tensor 'slopes'"),
        (Update({"slopes": torch.zeros(2, 2)}, 1), r"expected int32 \(2, 2\), got float32"),
        (update([[1, 2]]), r"expected int32 \(2, 2\), got int32 \(1, 2\)"),
        (update([[1, 2], [3, 2**31 - 1]]), "a slope of 2147483647 quanta is out of range"),
        (update([[1, 2], [2**27, 2**27]]), "'slopes': the slopes add up to a length of"),
    ],
)
def test_what_a_stranger_may_send_is_refused_by_name(given, told):
    with pytest.raises(WireError, match=told):
        METHOD.validate(METHOD.init(NOWHERE), 1, ClientInfo(0, 9), given)


def bits(workspace):
    workspace.model.seeded.render()
    return workspace.model.read()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_always_there_is_away_and_rebuilt_is_the_server(tmp_path):
    """Client 0 takes part in all of six rounds, client 1 in the last alone; each has a device of its own."""
    steady, late, server = (Workspace(compose([*WORDS, f"out={tmp_path}/{name}"])) for name in "abc")
    method = steady.strategy
    state, version = method.init(steady.model.layout), 0
    for round in range(1, 7):
        told = method.configure(state, round, ClientInfo(0, 9, base_version=version))
        replies = [(ClientInfo(0, 9), local_update(steady, RUN, 0, round, told))]
        version = int(told.settings[VERSION])
        assert len(told.tensors["slopes"]) == min(round - 1, 1)
        if round == 6:
            asked = method.configure(state, round, ClientInfo(1, 9))
            assert len(asked.tensors["slopes"]) == 5
            replies.append((ClientInfo(1, 9), local_update(late, RUN, 1, round, asked)))
        state = method.aggregate(state, round, replies)
    for workspace, index, held in ((steady, 0, 5), (late, 1, 5), (server, 0, 0)):
        memory = {} if workspace is server else workspace.client_states.load(RUN, index, 7)
        workspace.install(method.configure(state, 7, ClientInfo(index, 9, base_version=held)), memory)
    assert same(bits(steady), bits(late))
    assert same(bits(steady), bits(server))
    # And all are the formula: w0 - lr sum g z
    rules = method.rules
    for name, tensor in bits(server).items():
        expected = server.model.layout.initial[name].double()
        for number, mean in enumerate(state.slopes.flatten(1).tolist(), 1):
            for seed, count in zip(seeds_of(rules, number), mean, strict=True):
                z = values(seed, name, tensor.shape).double()
                expected = expected - rules.lr * count * rules.space.quantum * z
        assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-6)
        assert (tensor != server.model.layout.initial[name]).any()


def test_slopes_that_go_on_from_elsewhere_are_refused(tmp_path):
    workspace = Workspace(compose([*WORDS, f"out={tmp_path}/x"]))
    told = METHOD.configure(State(torch.ones(3, 2, 2).int()), 4, ClientInfo(0, 9, base_version=2))
    with pytest.raises(ClientError, match="go on from round 2; this client knows 0 rounds"):
        workspace.install(told, {})
    short = Instruction({"slopes": torch.ones(2, 2, 2).int()}, {**told.settings, FROM: 0})
    with pytest.raises(ClientError, match="of 2 rounds, expected 3"):
        workspace.install(short, {})


def test_the_ledger_shows_what_catching_up_costs(small_run):
    folder = small_run(*WORDS[1:-1], "population.cohort=2", rounds=6)
    last: dict[str, int] = {}
    sizes: dict[int, set[int]] = {}
    for row in rows(folder, "ledger.csv"):
        if row["part"] == "train" and row["direction"] == "down":
            missed = int(row["round"]) - 1 - last.get(row["client"], 0)
            last[row["client"]] = int(row["round"]) - 1
            sizes.setdefault(missed, set()).add(int(row["payload_bytes"]))
    assert len(sizes) > 2  # some were away, some were not
    for missed, found in sizes.items():
        assert max(found) <= missed * 4 * 4 + 32
    means = [np.mean(list(sizes[missed])) for missed in sorted(sizes)]
    assert means == sorted(means)


def test_mezo_takes_a_cohorts_steps_on_all_data():
    plain = compose(["model=tiny", "method=decomfl", "population.clients=6"])
    experiment = compose(["model=tiny", "method=mezo", "population.clients=6", "population.cohort=3"])
    assert experiment.method_name == "mezo"
    assert experiment.population.pooled == 6
    assert experiment.method.strategy["rules"]["local_steps"] == 3 * 200
    assert plain.population.pooled == 0
    assert MeZO(RULES).rules.local_steps == 2


@pytest.mark.parametrize("method", ["decomfl", "mezo"])
def test_a_run_learns(small_run, method):
    more = ["adapter=lora", *(word for word in WORDS if "rules" in word and "steps" not in word)]
    folder = small_run(f"method={method}", *more, "method.strategy.rules.local_steps=12", rounds=3)
    metrics = rows(folder, "metrics.csv")
    assert float(metrics[-1]["eval_loss"]) < float(metrics[0]["eval_loss"]) - 0.005
    assert summary_of(folder)["status"] == "finished"


def test_a_clip_below_zero_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="clip"):
        Workspace(compose([*WORDS, "method.client.clip=-1", f"out={tmp_path}/x"]))
