"""Flower's robust aggregations as our methods, against numbers worked out by hand.

Five clients, two tensors of one number each, w_k = (A_k, B_k); the last one attacks:

    w_0 = (-1, 0)   w_1 = (1, 2)   w_2 = (2, 1)   w_3 = (6, 3)   w_4 = (1e6, -1e6)      examples 1, 1, 3, 1, 1

FedMedian, the third of five:            A of -1, 1, 2, 6, 1e6 is 2        B of -1e6, 0, 1, 2, 3 is 1
FedTrimmedAvg, beta 0.2, one each side:  A = (1 + 2 + 6) / 3 = 3           B = (0 + 1 + 2) / 3 = 1
Krum, f = 1, so two neighbours. |w_0 - w_1|^2 = 4 + 4 = 8, |w_0 - w_2|^2 = 9 + 1 = 10, |w_1 - w_2|^2 = 1 + 1 = 2,
|w_1 - w_3|^2 = 25 + 1 = 26, |w_2 - w_3|^2 = 16 + 4 = 20, |w_0 - w_3|^2 = 49 + 9 = 58, and w_4 is 1e12 away:

    s_0 = 8 + 10 = 18     s_1 = 2 + 8 = 10     s_2 = 2 + 10 = 12     s_3 = 20 + 26 = 46     so w = w_1 = (1, 2)

MultiKrum, m = 5 - 1 - 2 = 2: w_1 and w_2 with weights 1/4 and 3/4:  A = 1/4 + 6/4 = 1.75     B = 2/4 + 3/4 = 1.25

Bulyan, f = 1, wants seven: 0, 1, 2, 3, 4, 6 and 1e6. With the four nearest of each, s = 30, 15, 10, 15, 18, 54, 1e12,
so theta = 5 keeps 0, 1, 2, 3, 4. Their median is 2; the beta = 3 nearest to it are 1, 2, 3; their mean is 2 (the median
of all seven would be 3).
"""

import numpy as np
import pytest
import torch
from conftest import SMALL, summary_of
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedtune.codecs.raw import Raw
from fedtune.config.compose import build, compose
from fedtune.core.errors import ConfigError, QuorumError
from fedtune.core.protocol import ClientInfo, Layout, Update
from fedtune.runtime.app import make_client_app, make_server_app
from fedtune.runtime.local import LocalGrid, server_context
from fedtune.server.robust import tolerated
from fedtune.wire import messages as wire
from strategies.bulyan import Bulyan
from strategies.fedmedian import FedMedian
from strategies.fedtrimmedavg import FedTrimmedAvg
from strategies.krum import Krum
from strategies.multikrum import MultiKrum

NAMES = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")
GUARDED = [FedMedian(), FedTrimmedAvg(0.2), Krum(1), MultiKrum(1), Bulyan(1)]  # each against one attacker in seven
by_class = pytest.mark.parametrize("method", GUARDED, ids=lambda method: type(method).__name__)


def aggregate(method, vectors, examples=None, dtype=torch.float32):
    """The vectors' first number is tensor A, the rest is B."""
    vectors = torch.as_tensor(np.array(vectors)).to(dtype)
    updates = [
        Update({"B": vector[1:], "A": vector[:1]}, n)
        for vector, n in zip(vectors, examples or [1] * len(vectors), strict=True)
    ]
    state = method.init(
        Layout((), {"A": torch.zeros(1, dtype=dtype), "B": torch.zeros(len(vectors[0]) - 1, dtype=dtype)})
    )
    replies = [(ClientInfo(index, update.examples), update) for index, update in enumerate(updates)]
    adapter = method.aggregate(state, 1, replies).adapter
    assert list(adapter) == ["A", "B"]
    return torch.cat(list(adapter.values()))


FIVE = [(-1, 0), (1, 2), (2, 1), (6, 3), (1e6, -1e6)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (FedMedian(), [2, 1]),
        (FedTrimmedAvg(0.2), [3, 1]),
        (Krum(1), [1, 2]),
        (MultiKrum(1), [1.75, 1.25]),
        (MultiKrum(1, selected=1), [1, 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_numbers_of_the_docstring(method, expected):
    assert aggregate(method, FIVE, [1, 1, 3, 1, 1]).tolist() == expected


def test_bulyan_takes_the_mean_around_the_median_of_those_that_krum_keeps():
    vectors = [(value, -value) for value in (0, 1, 2, 3, 4, 6, 1e6)]
    assert aggregate(Bulyan(1), vectors, [1, 9, 1, 9, 1, 9, 9]).tolist() == [2, -2]


@pytest.mark.slow
@by_class
@given(st.integers(0, 2**32), st.integers(0, 6), st.sampled_from([1e6, -1e6, 1e30]))
def test_one_attacker_can_not_push_the_result_out_of_the_honest_range(method, seed, place, lie):
    honest = np.random.default_rng(seed).uniform(-1, 1, (6, 4))
    got = aggregate(method, np.insert(honest, place, lie, axis=0)).numpy()
    assert (got >= honest.min(0).astype(np.float32)).all()
    assert (got <= honest.max(0).astype(np.float32)).all()


def reference(method, x, examples):
    """The docstrings' equations in plain numpy, with distances taken directly."""
    n = len(x)
    if isinstance(method, FedMedian):
        return np.sort(x, axis=0)[[(n - 1) // 2, n // 2]].mean(0)
    if isinstance(method, FedTrimmedAvg):
        cut = int(method.beta * n)
        return np.sort(x, axis=0)[cut : n - cut].mean(0)
    distances = ((x[:, None] - x[None]) ** 2).sum(-1)
    ranking = np.argsort(np.sort(distances, axis=1)[:, 1 : n - 1 - 2 + 1].sum(1))
    if isinstance(method, Krum):
        return x[ranking[0]]
    if isinstance(method, MultiKrum):
        chosen = ranking[: n - 1 - 2]
        return np.average(x[chosen], axis=0, weights=np.array(examples)[chosen])
    kept = x[ranking[: n - 2]]
    nearest = np.argsort(np.abs(kept - np.median(kept, axis=0)), axis=0)[: n - 4]
    return np.take_along_axis(kept, nearest, axis=0).mean(0)


@pytest.mark.slow
@by_class
@given(st.integers(0, 2**32), st.integers(7, 12))
def test_it_agrees_with_numpy(method, seed, count):
    rng = np.random.default_rng(seed)
    x, examples = rng.standard_normal((count, 5)).astype(np.float32), rng.integers(1, 100, count).tolist()
    expected = reference(method, x.astype(np.float64), examples)
    assert np.allclose(aggregate(method, x, examples).numpy(), expected, rtol=1e-6, atol=1e-7)


@by_class
def test_clients_that_hardly_differ_are_told_apart(method):
    """Ten thousand numbers near 1 that differ by 1e-5: a squared distance of 1e-6 beside norms of 1e4, which is below
    float32's rounding (6e-4) but not below float64's."""
    rng = np.random.default_rng(0)
    x = (1 + 1e-5 * np.linspace(0.5, 2, 9)[:, None] * rng.standard_normal((9, 10_000))).astype(np.float32)
    expected = reference(method, x.astype(np.float64), [1] * 9)
    assert np.allclose(aggregate(method, x).numpy(), expected, rtol=1e-7, atol=0)


@by_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_adapters_dtype_comes_back(method, dtype):
    x = torch.tensor(np.random.default_rng(1).standard_normal((7, 3))).to(dtype)
    got = aggregate(method, x.double().numpy(), dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, torch.tensor(reference(method, x.double().numpy(), [1] * 7)).to(dtype))


@pytest.mark.parametrize("replies", [1, 2, 3, 4, 5, 8, 11])
def test_null_guards_against_as_many_as_the_proofs_allow(replies):
    assert tolerated(None, replies, each=2) == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 8: 2, 11: 4}[replies]
    assert tolerated(None, replies, each=4) == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 8: 1, 11: 2}[replies]


def test_bulyan_of_a_few_is_the_plain_mean():
    assert aggregate(Bulyan(), [(1, 0), (2, 4)], [1, 9]).tolist() == [1.5, 2]


@pytest.mark.parametrize(
    ("method", "replies", "said"),
    [
        (Krum(1), 4, "4 replies can't outvote 1 attackers: expected at least 5"),
        (MultiKrum(2), 6, "expected at least 7"),
        (Bulyan(1), 6, "expected at least 7"),
        (MultiKrum(1, selected=5), 5, "at most 4 can be selected"),
    ],
)
def test_too_few_replies_are_an_error_with_the_way_out(method, replies, said):
    with pytest.raises(QuorumError, match=said) as caught:
        aggregate(method, [(0, 0)] * replies)
    assert "population.cohort" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("fedtrimmedavg", "beta=0.5"),
        ("fedtrimmedavg", "beta=-0.1"),
        ("krum", "num_malicious=-1"),
        ("bulyan", "num_malicious=1.5"),
        ("multikrum", "num_malicious=true"),
        ("multikrum", "selected=0"),
    ],
)
def test_a_senseless_setting_is_refused_by_its_key(method, setting):
    experiment = compose([f"method={method}", f"method.strategy.{setting}"])
    with pytest.raises(ConfigError, match=r"method\.strategy\." + setting.split("=")[0]):
        build(experiment.method.strategy, "method.strategy")


@by_class
def test_flower_logs_nothing_of_it(method, capfd):
    aggregate(method, [(0, 0)] * 7)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("method", [*NAMES, "fedit"])
def test_a_real_run_is_not_moved_by_a_client_that_sends_a_million(method, tmp_path):
    """Seven clients, one of which sends 1e6 everywhere; FedIT shows that this would otherwise be seen. What would leave
    such a client out before any method looks at it is off."""
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if context.node_config["partition-id"] == 3:
            update = wire.unpack_update(reply.content, wire.blob_of(reply.content), Raw())
            lie = {name: torch.full_like(tensor, 1e6) for name, tensor in update.tensors.items()}
            reply.content = wire.pack_update(Update(lie, update.examples, update.metrics), Raw(), 0)
        return reply

    words = ["population.clients=7", "population.cohort=7", "population.max_norm_ratio=null", "rounds=1"]
    words += [f"method={method}", f"out={tmp_path / 'run'}"]
    config = {"config": compose([*SMALL, *words]).text()}
    make_server_app()(grid=LocalGrid(app, 7, config), context=server_context(config))
    assert summary_of(tmp_path / "run")["totals"]["failed"] == 0
    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    largest = max(tensor.abs().max().item() for tensor in adapter.values())
    assert largest > 1e5 if method == "fedit" else largest < 1
