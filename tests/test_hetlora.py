"""HetLoRA against numbers worked out by hand.

Two clients, one layer with in = 2, out = 3, r = 1, s = 2. B_k A_k is the outer product of

    client 0: [3, 0, 4] and [0, 2], so ||s B A||_F = 2 * 5 * 2 = 20        client 1: [0, 6, 8] and [3, 0], so 60

Weights 20/80 and 60/80, whatever the clients' samples are:

    A = 1/4 [0, 2] + 3/4 [3, 0] = [2.25, 0.5]        B = 1/4 [3, 0, 4] + 3/4 [0, 6, 8] = [0.75, 4.5, 7]

The tail of head = 1 of a rank 3 adapter with B[:, 1:] = [[3, 0], [0, 4]] and A[1:, :] = [[1, 2, 2], [0, 4, 0]] is
||.||_F ||.||_F = 5 * 5 = 25. Its gradient by B[:, 1:] is ||A[1:]|| B[:, 1:] / ||B[:, 1:]|| = B[:, 1:], for both
norms are 5.
"""

import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL, summary_of
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, dense, factors, layout, reply

from clients.self_pruning import tail
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import SERVER, ClientInfo, Layout, Slot, Update
from fedtune.lowrank.algebra import lora_factors, name_of
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.runtime.local import run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.hetlora import HetLoRA, State, _weights, rank_of

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
RUN = "0" * 16
FEW = f"data.path={Path(__file__).with_name('pairs.jsonl')}"  # few and short examples


def by_hand():
    start = {A: torch.zeros(1, 2), B: torch.zeros(3, 1)}
    slots = tuple(Slot(name, tuple(t.shape), "float32", name.split(".")[1], "layer", 2.0) for name, t in start.items())
    replies = [
        (ClientInfo(k, n), Update({A: torch.tensor([a]), B: torch.tensor(b)[:, None]}, n, {"rank": 1.0}))
        for k, n, a, b in [(0, 9, [0.0, 2.0], [3.0, 0.0, 4.0]), (1, 1, [3.0, 0.0], [0.0, 6.0, 8.0])]
    ]
    return Layout(slots, start), replies


@pytest.mark.parametrize("norm", ["model", "layer"])
def test_clients_count_by_what_they_change(norm):
    start, replies = by_hand()
    method = HetLoRA(norm=norm)
    state = method.aggregate(method.init(start), 1, replies)
    torch.testing.assert_close(state.adapter[A], torch.tensor([[2.25, 0.5]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(state.adapter[B], torch.tensor([[0.75], [4.5], [7.0]]), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["model", "layer"])
@given(data=st.data())
def test_weights_sum_to_one_and_are_the_norms_of_whole_matrices(norm, data):
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    scalings = data.draw(st.lists(st.sampled_from([1.0, 2.0, 8.0]), min_size=len(ranks), max_size=len(ranks)))
    replies = [reply(index, rank, s) for index, (rank, s) in enumerate(zip(ranks, scalings, strict=True))]
    weights = _weights(replies, SCALING, norm)
    squares = [
        {m: float(w.square().sum()) for m, w in dense(update.tensors, peer.scaling).items()} for peer, update in replies
    ]
    for module in ("one", "two"):
        norms = [math.sqrt(sum(each.values()) if norm == "model" else each[module]) for each in squares]
        for role in ("lora_A", "lora_B"):
            found = weights[name_of(module, role)]
            assert found == pytest.approx([one / sum(norms) for one in norms], rel=1e-12)
            assert sum(found) == pytest.approx(1, abs=1e-12)


def test_the_norm_is_the_trace_of_gram_matrices():
    """||B A||_F^2 = tr((B^T B)(A A^T))."""
    replies = [reply(0, 3, 2.0), reply(1, 2, 1.0)]
    traces = [
        peer.scaling**2
        * sum(float(((p.b.T @ p.b) @ (p.a @ p.a.T)).trace()) for p in lora_factors(update.tensors).values())
        for peer, update in replies
    ]
    roots = [math.sqrt(trace) for trace in traces]
    expected = [root / sum(roots) for root in roots]
    assert _weights(replies, SCALING, "model")[name_of("one", "lora_A")] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm", ["model", "layer"])
def test_where_nobody_changed_anything_samples_decide(norm):
    replies = []
    for index, examples in ((0, 1), (1, 3)):
        tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in factors(4, index).items()}
        replies.append((ClientInfo(index, examples), Update(tensors, examples, {"rank": 4.0})))
    method = HetLoRA(norm=norm)
    state = method.aggregate(method.init(layout()), 1, replies)
    for module, product in lora_factors(state.adapter).items():
        zero, one = (lora_factors(update.tensors)[module] for _, update in replies)
        assert torch.allclose(product.a, 0.25 * zero.a + 0.75 * one.a, rtol=1e-12)


@pytest.mark.parametrize(
    ("gamma", "rank", "head"),
    [
        (0.99, 8, 7),
        (0.99, 50, 49),
        (0.99, 200, 198),
        (0.5, 8, 4),
        (0.5, 7, 3),
        (1.0, 4, 3),
        (0.29, 100, 29),
        (0.9, 1, 0),
    ],
)
def test_the_tail_has_floor_gamma_r_in_front_and_at_least_one_component(gamma, rank, head):
    assert HetLoRA(gamma=gamma).head(rank) == head


def tailed():
    b = torch.tensor([[7.0, 3, 0], [7, 0, 4]])
    a = torch.tensor([[9.0, 9, 9], [1, 2, 2], [0, 4, 0]])
    return {"layer.lora_A.weight": a.requires_grad_(), "layer.lora_B.weight": b.requires_grad_()}


def test_the_tail_is_the_product_of_norms_summed_over_layers_and_reaches_the_factors():
    adapter = tailed()
    loss = tail(adapter, 1)
    assert loss.item() == 25
    loss.backward()
    assert torch.equal(adapter[B].grad, torch.tensor([[0.0, 3, 0], [0, 0, 4]]))
    assert torch.equal(adapter[A].grad, torch.tensor([[0.0, 0, 0], [1, 2, 2], [0, 4, 0]]))
    twice = {name.replace("layer", layer): t for layer in ("x", "y") for name, t in tailed().items()}
    assert tail(twice, 1).item() == 50


def test_a_tail_of_zeros_has_no_gradient_rather_than_nan():
    adapter = tailed()
    adapter[B] = torch.zeros(2, 3, requires_grad=True)
    tail(adapter, 1).backward()
    assert adapter[B].grad.isfinite().all()
    assert adapter[A].grad.isfinite().all()


def workspace_with(*overrides):
    return Workspace(compose([*SMALL, "method=hetlora", FEW, "adapter.rank=4", *overrides]))


def turn(workspace, state, **hyper):
    """Client 0's second round; with gamma 1/2 its tail is the last two of four components."""
    method = HetLoRA(gamma=0.5, **hyper)
    return local_update(workspace, RUN, 0, 2, method.configure(state, 2, ClientInfo(0, workspace.samples(0))))


def with_a_tail(workspace):
    """The start, but for B, which is normal and small."""
    state = HetLoRA().init(workspace.model.layout)
    draw = torch.Generator().manual_seed(0)
    filled = {
        name: t if "lora_A" in name else 0.02 * torch.randn(t.shape, generator=draw)
        for name, t in state.adapter.items()
    }
    return State(filled, state.scaling)


@pytest.mark.slow
def test_a_client_whose_tail_shrank_gives_it_up_and_one_whose_tail_grew_does_not():
    workspace = workspace_with("train.steps=4")
    method, peer, state = HetLoRA(gamma=0.5), ClientInfo(0, workspace.samples(0)), with_a_tail(workspace)
    shrank = turn(workspace, state, lam=100.0)
    assert shrank.metrics["rank"] == 2
    assert {p.rank for p in lora_factors(shrank.tensors).values()} == {2}
    method.validate(state, 2, peer, shrank)
    start = method.init(workspace.model.layout)
    grew = turn(workspace, start, lam=0.0)  # from B = 0 there is no other way
    assert grew.metrics["rank"] == 4
    assert {p.rank for p in lora_factors(grew.tensors).values()} == {4}
    method.validate(start, 2, peer, grew)


@pytest.mark.slow
def test_the_penaltys_gradient_reaches_the_factors():
    """One step of plain gradient descent with the penalty, less one without, is -lr times the penalty's gradient:
    -lr lam ||A[t:]|| B[:, t:] / ||B[:, t:]|| in the tail of B, and nothing in front of it. A regulariser computed on
    `.data` would make no difference."""
    lr, lam = 0.01, 3.0
    workspace = workspace_with("train.optimizer=sgd", f"train.lr={lr}", "train.max_grad_norm=0", "train.steps=1")
    state, after = with_a_tail(workspace), {}
    for strength in (0.0, lam):
        turn(workspace, state, lam=strength)
        after[strength] = lora_factors(workspace.model.adapter())
    for module, before in lora_factors(state.adapter).items():
        b, a = before.b[:, 2:].double(), before.a[2:].double()
        moved = (after[lam][module].b - after[0.0][module].b).double()
        torch.testing.assert_close(moved[:, 2:], -lr * lam * a.norm() * b / b.norm(), rtol=1e-3, atol=1e-7)
        assert moved[:, :2].abs().max() < 1e-7
        moved = (after[lam][module].a - after[0.0][module].a).double()
        torch.testing.assert_close(moved[2:], -lr * lam * b.norm() * a / a.norm(), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_at_the_least_rank_nothing_is_penalised_or_pruned():
    workspace = workspace_with()
    state = with_a_tail(workspace)
    without, with_ = (turn(workspace, state, lam=lam, r_min=4) for lam in (0.0, 100.0))
    assert without.metrics["rank"] == with_.metrics["rank"] == 4
    assert all(torch.equal(tensor, with_.tensors[name]) for name, tensor in without.tensors.items())


def test_a_pruned_rank_lasts():
    method = HetLoRA(gamma=0.5)
    state = method.init(layout())
    replies = [(ClientInfo(k, 1), Update(factors(rank, k), 1, {"rank": float(rank)})) for k, rank in [(0, 2), (3, 4)]]
    state = method.aggregate(state, 1, replies)
    assert state.ranks == {"0": 2}
    told = method.configure(state, 2, ClientInfo(0, 1))
    assert told.settings["rank"] == 2
    assert {p.rank for p in lora_factors(told.tensors).values()} == {2}
    assert method.configure(state, 2, ClientInfo(3, 1)).settings["rank"] == 4
    assert rank_of(state, ClientInfo(SERVER, 1)) == 4
    later = method.aggregate(state, 2, [(ClientInfo(0, 1), Update(factors(1, 0), 1, {"rank": 1.0}))])
    assert later.ranks == {"0": 1}
    assert rank_of(later, ClientInfo(0, 1, rank=3)) == 1
    assert rank_of(later, ClientInfo(5, 1, rank=3)) == 3


@pytest.mark.parametrize("claimed", [3.0, 1.0, 5.0, 2.5, None])
def test_a_rank_that_pruning_cannot_lead_to_is_refused(claimed):
    method = HetLoRA(gamma=0.5)
    metrics = {} if claimed is None else {"rank": claimed}
    with pytest.raises(WireError, match="of rank 4 it may keep 2 or all"):
        method.validate(method.init(layout()), 1, ClientInfo(0, 1), Update(factors(4, 0), 1, metrics))


def test_tensors_of_another_rank_than_the_one_that_is_named_are_refused():
    method = HetLoRA(gamma=0.5)
    with pytest.raises(WireError, match=r"expected float64 \(2, 3\), got float64 \(4, 3\)"):
        method.validate(method.init(layout()), 1, ClientInfo(0, 1), Update(factors(4, 0), 1, {"rank": 2.0}))


def test_a_run_in_which_ranks_shrink_resumes_to_the_same_state(small_run):
    """With this lam every client gives up half its rank once it has one to lose, so bytes fall from round to round."""
    words = ["method=hetlora", FEW, "adapter.rank=8", "method.strategy.gamma=0.5", "method.strategy.lam=100.0",
             "population.cohort=4", "train.lr=5e-3"]  # fmt: skip
    whole = small_run(*words, name="whole", rounds=4)
    parts = small_run(*words, name="parts", rounds=2)
    run_local(compose([*SMALL, *words, "rounds=4", f"out={parts}"]), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]
    template = HetLoRA().init(Workspace(compose([*SMALL, *words])).model.layout)
    (path,) = (whole / "checkpoint").iterdir()
    ranks = load_checkpoint(path, template).state.ranks
    assert ranks.keys() == {"0", "1", "2", "3"}
    assert max(ranks.values()) <= 4


def test_hyper_parameters_out_of_range_are_named():
    for wrong in ({"gamma": 1.5}, {"lam": -1.0}, {"r_min": 0}, {"norm": "rows"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            HetLoRA(**wrong)


def test_an_adapter_that_holds_a_part_of_the_base_is_not_pruned():
    """PiSSA's W0 is the weight less s B A."""
    start = layout()
    moved = Layout(start.slots, {name: t + 1 for name, t in start.initial.items()})
    with pytest.raises(ConfigError, match="have to start as nothing"):
        HetLoRA().init(moved)
