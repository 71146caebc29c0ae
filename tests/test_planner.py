"""Plans against every plan that there is, and what holds of them whatever the device."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import many
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.costs import Costs, Weight
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import DeviceProfile
from fedtune.planning import planner
from fedtune.planning.knapsack import selections
from fedtune.planning.planner import Plan, Rules, plan
from fedtune.runs.checkpoint import flatten, unflatten
from simulations.benchmarks import planner as benchmark

COSTS = Costs(
    base_bytes={"4": 300.0, "8": 500.0, "16": 1000.0},
    slowdown={"4": 0.75, "8": 2.0, "16": 1.0},
    tokens=10.0,
    typical_tokens=5.0,
    forward_flop=2000.0,
    backward_flop=[1000.0],
    read_bytes=[500.0],
    saved_bytes=[400.0],
    head_bytes=100.0,
    fixed_bytes=100.0,
)
SIDES = [(8, 8), (4, 8), (16, 8), (8, 16), (8, 32)]
LIMITS = ("memory_bytes", "flop_per_s", "read_bytes_per_s", "up_bytes_per_s", "down_bytes_per_s")


def takes(costs, weights, rules, device, ranks, batch, bits):
    """Memory, compute and transfer from the equations in the planner's docstring, written again."""
    adapted = [(weight, ranks[weight.module]) for weight in weights if weight.module in ranks]
    block = min(weight.block for weight, _ in adapted)
    p = sum(rank * (weight.rows + weight.columns) for weight, rank in adapted)
    t = costs.input_bytes * sum(w.columns for w, _ in adapted) + costs.inner_bytes * sum(rank for _, rank in adapted)
    kept = batch * (costs.saved_bytes[block] + costs.head_bytes + costs.tokens * t)
    memory = costs.base_bytes[str(bits)] + costs.fixed_bytes + kept + rules.state_bytes * p
    flop = costs.forward_flop + costs.backward_flop[block] + 6 * costs.typical_tokens * p
    step = batch * flop / device.flop_per_s + costs.read_bytes[block] / device.read_bytes_per_s
    compute = rules.steps * costs.slowdown[str(bits)] * step
    transfer = rules.wire_bytes_per_number * p * (1 / device.down_bytes_per_s + 1 / device.up_bytes_per_s)
    return memory, compute, transfer, p, block


def expect_true(one, costs, weights, rules, device, rel=1e-12):
    """That a plan breaks no limit, and says of itself what is so."""
    memory, compute, transfer, p, block = takes(costs, weights, rules, device, one.ranks, one.batch_size, one.bits)
    assert one.memory_bytes == pytest.approx(memory, rel=rel)
    assert (one.parameters, one.block) == (p, block)
    assert memory <= device.memory_bytes
    assert compute + transfer <= rules.deadline
    assert max(one.ranks.values()) <= device.max_rank


def test_the_plan_in_the_docstring():
    """By pencil: see `plan`. There 8 and 4 bits are not on offer."""
    weights = [Weight("w", 0, 30, 20)]
    rules = Rules(ranks=[1, 2], batches=[1, 2], bits=[16], steps=2, deadline=3.6)
    made = selections(weights, rules.ranks, np.array([[5.0, 6.0]]))
    device = DeviceProfile(memory_bytes=5000, flop_per_s=1e4, down_bytes_per_s=1000, up_bytes_per_s=500)
    found = plan(made, COSTS, weights, rules, [device, replace(device, memory_bytes=6000)])
    first = Plan(1, 16, {"w": 2}, 6.0, 4080.0, 100, 0)
    assert found == [first, replace(first, batch_size=2, memory_bytes=5460.0)]
    late = replace(rules, deadline=3.5)
    assert plan(made, COSTS, weights, late, [replace(device, memory_bytes=6000)]) == [first]
    # With half the memory a rank of 1 is all there is room for, and that only beside a batch of 1
    little = plan(made, COSTS, weights, rules, [replace(device, memory_bytes=4000)])[0]
    assert (little.batch_size, little.ranks, little.memory_bytes) == (1, {"w": 1}, 3240.0)


@st.composite
def problems(draw):
    """Whole numbers, so that ties are many and sums exact; limits that some plan just meets."""
    whole = st.integers(0, 50).map(float)
    blocks = draw(st.integers(1, 3))
    count = draw(st.integers(1, 4))
    weights = [Weight(f"w{i}", draw(st.integers(0, blocks - 1)), *draw(st.sampled_from(SIDES))) for i in range(count)]
    ranks = sorted(draw(st.sets(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1, max_size=5 if count < 4 else 4)))
    steps = st.lists(st.sampled_from([0, 0, 1, 1, 2, 5]), min_size=len(ranks), max_size=len(ranks))
    values = np.array([draw(steps) for _ in weights], np.float64).cumsum(axis=1)
    falling = st.lists(whole, min_size=blocks, max_size=blocks).map(lambda of: sorted(of, reverse=True))
    per_bits = st.fixed_dictionaries({"4": whole, "8": whole, "16": whole})
    costs = Costs(
        base_bytes=draw(per_bits),
        slowdown=draw(st.fixed_dictionaries({bits: st.sampled_from([0.5, 1.0, 2.0]) for bits in ("4", "8", "16")})),
        tokens=draw(st.sampled_from([1.0, 4.0])),
        typical_tokens=draw(st.sampled_from([1.0, 2.0])),
        forward_flop=draw(whole),
        backward_flop=draw(falling),
        read_bytes=draw(falling),
        saved_bytes=draw(falling),
        head_bytes=draw(whole),
        fixed_bytes=draw(whole),
    )
    rules = Rules(
        ranks=ranks,
        batches=sorted(draw(st.sets(st.sampled_from([1, 2, 3]), min_size=1))),
        bits=sorted(draw(st.sets(st.sampled_from([4, 8, 16]), min_size=1))),
        steps=draw(st.integers(1, 3)),
        deadline=math.inf,
        state_bytes=draw(st.sampled_from([8, 16])),
    )
    power = st.sampled_from([0.25, 1.0, 16.0, math.inf])
    device = DeviceProfile(
        max_rank=draw(st.sampled_from([1, 2, 8, math.inf])),
        flop_per_s=draw(power),
        read_bytes_per_s=draw(power),
        up_bytes_per_s=draw(power),
        down_bytes_per_s=draw(power),
    )
    some = {weight.module: rank for weight in weights if (rank := draw(st.sampled_from([0, *ranks])))}
    if some:
        batch, bits = draw(st.sampled_from(rules.batches)), draw(st.sampled_from(rules.bits))
        memory, compute, transfer, *_ = takes(costs, weights, rules, device, some, batch, bits)
        if draw(st.booleans()):
            device = replace(device, memory_bytes=memory)
        if compute + transfer > 0 and draw(st.booleans()):
            rules = replace(rules, deadline=compute + transfer)
    return weights, values, costs, rules, device


@pytest.mark.slow
@many()
@given(problems())
def test_no_plan_is_better_than_the_one_found(problem):
    """Over all b, q and choices: by value, then the larger b, the larger q, and less P."""
    weights, values, costs, rules, device = problem
    offered = [0, *rules.ranks]
    picks = np.array(list(itertools.product(range(len(offered)), repeat=len(weights))))[1:]
    ranks = np.array(offered, np.float64)[picks]
    picks, ranks = (each[ranks.max(axis=1) <= device.max_rank] for each in (picks, ranks))
    sides, columns = (np.array(of) for of in ([w.rows + w.columns for w in weights], [w.columns for w in weights]))
    p, t = ranks @ sides, 4 * ((ranks > 0) @ columns) + 4 * ranks.sum(axis=1)
    block = np.where(ranks > 0, [weight.block for weight in weights], 99).min(axis=1, initial=99)
    value = np.pad(values, ((0, 0), (1, 0)))[np.arange(len(weights)), picks].sum(axis=1)
    best = None
    for batch, bits in itertools.product(rules.batches, rules.bits) if len(picks) else ():
        kept = batch * (np.array(costs.saved_bytes)[block] + costs.head_bytes + costs.tokens * t)
        memory = costs.base_bytes[str(bits)] + costs.fixed_bytes + kept + rules.state_bytes * p
        flop = costs.forward_flop + np.array(costs.backward_flop)[block] + 6 * costs.typical_tokens * p
        step = batch * flop / device.flop_per_s + np.array(costs.read_bytes)[block] / device.read_bytes_per_s
        seconds = rules.steps * costs.slowdown[str(bits)] * step
        seconds += rules.wire_bytes_per_number * p * (1 / device.down_bytes_per_s + 1 / device.up_bytes_per_s)
        for i in np.flatnonzero((memory <= device.memory_bytes) & (seconds <= rules.deadline)):
            key = (value[i], batch, bits, -p[i])
            best = key if best is None else max(best, key)
    (found,) = plan(selections(weights, rules.ranks, values), costs, weights, rules, [device])
    if best is None:
        assert isinstance(found, str)
    else:
        assert isinstance(found, Plan), found
        assert (found.value, found.batch_size, found.bits, -found.parameters) == best
        expect_true(found, costs, weights, rules, device)


SIZE = benchmark.Size(devices=60, weights=60, ranks=(1, 2, 4, 8, 16, 32))


@pytest.fixture(scope="module", params=["concave", "jumps"])
def large(request):
    """Too much for an exact list."""
    weights, costs, rules = benchmark.made_up(SIZE)
    made = selections(weights, rules.ranks, benchmark.worths(SIZE, request.param))
    assert any(run.ladder >= 0 for run in made.runs)
    return made, costs, weights, rules


def worth(plans):
    return [one.value if isinstance(one, Plan) else -1.0 for one in plans]


@pytest.mark.slow
def test_large_plans_break_no_limit(large):
    made, costs, weights, rules = large
    devices = benchmark.fleet(SIZE)
    devices += [DeviceProfile(), *(replace(one, max_rank=4.0) for one in devices[:5])]
    plans = plan(made, costs, weights, rules, devices)
    assert sum(isinstance(one, Plan) for one in plans) > 60
    for one, device in zip(plans, devices, strict=True):
        if isinstance(one, Plan):
            expect_true(one, costs, weights, rules, device)
            asked = [rules.ranks.index(rank) for rank in one.ranks.values()]
            of = [[w.module for w in weights].index(module) for module in one.ranks]
            assert one.value == pytest.approx(made.values[of, asked].sum(), rel=1e-12)
    unlimited = plans[60]
    assert unlimited.value == made.value.max()
    assert (unlimited.batch_size, unlimited.bits) == (8, 16)


@pytest.mark.slow
def test_a_plan_is_the_best_of_all_selections_on_the_list(large):
    """Also of those that were not looked at because of a bound."""
    made, costs, weights, rules = large
    devices = benchmark.fleet(SIZE, seed=1)
    for device, found in zip(devices, worth(plan(made, costs, weights, rules, devices)), strict=True):
        best = -1.0
        for bits in rules.bits:
            kept = np.array(costs.saved_bytes)[made.block] + costs.head_bytes + costs.tokens * made.per_token_bytes
            memory = costs.base_bytes[str(bits)] + costs.fixed_bytes + kept + rules.state_bytes * made.parameters
            passes = costs.forward_flop + np.array(costs.backward_flop)[made.block]
            flop = passes + 6 * costs.typical_tokens * made.parameters
            step = flop / device.flop_per_s + np.array(costs.read_bytes)[made.block] / device.read_bytes_per_s
            links = 1 / device.down_bytes_per_s + 1 / device.up_bytes_per_s
            seconds = (
                rules.steps * costs.slowdown[str(bits)] * step + rules.wire_bytes_per_number * made.parameters * links
            )
            fits = (memory <= device.memory_bytes) & (seconds <= rules.deadline)
            best = max(best, made.value[fits].max(initial=-1.0))
        assert found == best


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["concave", "jumps"])
def test_a_bound_leaves_out_no_better_plan(kind, monkeypatch):
    """The same without bounds, for devices whose memory leaves room for few weights."""
    size = benchmark.Size()
    weights, costs, rules = benchmark.made_up(size)
    made = selections(weights, rules.ranks, benchmark.worths(size, kind))
    devices = [replace(one, memory_bytes=3e9 + one.memory_bytes / 10) for one in benchmark.fleet(size)[:150]]
    plans = plan(made, costs, weights, rules, devices)
    monkeypatch.setattr(planner, "ROUNDING", math.inf)
    assert plans == plan(made, costs, weights, rules, devices)
    assert len(set(worth(plans))) > 50


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_value_never_falls_as_a_limit_rises(large, limit):
    made, costs, weights, rules = large
    for device in benchmark.fleet(SIZE)[:3]:
        low = 1e7 if limit == "read_bytes_per_s" else 1e-3 * getattr(device, limit)  # where it limits anything
        rising = [replace(device, **{limit: low * more}) for more in np.geomspace(1, 5e4, 60)]
        values = worth(plan(made, costs, weights, rules, [*rising, replace(device, **{limit: math.inf})]))
        assert values == sorted(values)
        assert len(set(values)) > 2


@pytest.mark.slow
def test_value_never_falls_as_the_deadline_rises(large):
    made, costs, weights, rules = large
    devices = benchmark.fleet(SIZE)[:5]
    rising = [*np.geomspace(1, 1e4, 12).tolist(), math.inf]
    values = [worth(plan(made, costs, weights, replace(rules, deadline=deadline), devices)) for deadline in rising]
    assert (np.diff(values, axis=0) >= 0).all()
    assert values[0] != values[-1]


@pytest.mark.slow
@given(problems(), st.sampled_from([*LIMITS, "deadline"]), st.floats(1, 10))
def test_small_value_never_falls_either(problem, limit, more):
    weights, values, costs, rules, device = problem
    made = selections(weights, rules.ranks, values)
    if limit == "deadline":
        less, much = (plan(made, costs, weights, each, [device]) for each in (rules, replace(rules, deadline=math.inf)))
    else:
        other = replace(device, **{limit: getattr(device, limit) * more})
        less, much = ([one] for one in plan(made, costs, weights, rules, [device, other]))
    assert worth(less) <= worth(much)


def test_near_the_best_there_could_be(large):
    """Within 2 % of the bound here, where a weight is much of the whole; the benchmark says how near."""
    made, costs, weights, rules = large
    devices = benchmark.fleet(SIZE)[:10]
    for one, device in zip(plan(made, costs, weights, rules, devices), devices, strict=True):
        bound = benchmark.bound(weights, costs, rules, device, made.values)
        assert 0.98 * bound <= one.value <= bound * (1 + 1e-9)


def test_of_equal_value_the_least_parameters_are_taken():
    """Of a in the last block and b before it, worth the same, neither has less of both P and T:

    a: P = 100, T = 4 * 10 + 4;    memory = 1100 + (300 + 440) + 1600 = 3440
    b: P = 60, T = 4 * 50 + 4;     memory = 1100 + (500 + 2040) + 960 = 4600;    both: 6640
    """
    weights = [Weight("a", 1, 90, 10), Weight("b", 0, 10, 50)]
    rules = Rules(ranks=[1], batches=[1], bits=[16], steps=1, deadline=math.inf)
    costs = replace(COSTS, backward_flop=[1000.0, 500.0], read_bytes=[9.0, 8.0], saved_bytes=[400.0, 200.0])
    made = selections(weights, rules.ranks, np.ones((2, 1)))
    found = plan(made, costs, weights, rules, [DeviceProfile(memory_bytes=4600), DeviceProfile(memory_bytes=4599)])
    assert [(one.ranks, one.memory_bytes) for one in found] == [({"b": 1}, 4600.0), ({"a": 1}, 3440.0)]


def test_equal_devices_have_equal_plans(large):
    made, costs, weights, rules = large
    device, other = benchmark.fleet(SIZE)[:2]
    one, _, again = plan(made, costs, weights, rules, [device, other, replace(device)])
    assert one is again
    assert plan(made, costs, weights, rules, [device])[0] == one


def test_why_a_device_can_take_no_part():
    """Of two weights the smaller, in the last block, with rank 2, a batch of 1 and 4 bits is the least:

    P = 2 * 12, T = 4 * 8 + 4 * 2;    memory = 300 + 100 + (200 + 100 + 10 T) + 16 P = 1484
    flop = 3 * (2000 + 500 + 30 P) = 9660, times 0.75 at 4 bits
    """
    weights = [Weight("a", 0, 30, 20), Weight("b", 1, 4, 8)]
    costs = replace(COSTS, backward_flop=[1000.0, 500.0], read_bytes=[9.0, 8.0], saved_bytes=[400.0, 200.0])
    rules = Rules(ranks=[2, 4], batches=[2, 1], bits=[16, 4], steps=3, deadline=10.0)
    made = selections(weights, rules.ranks, np.ones((2, 2)))
    enough = DeviceProfile(memory_bytes=1484, flop_per_s=724.5)
    reasons = {
        DeviceProfile(backprop=False): "can compute forward only, and adapters are trained with gradients",
        DeviceProfile(max_rank=1): "trains ranks up to 1, and the smallest on offer is 2",
        replace(enough, memory_bytes=1483.0): "needs at least 1.484 kB of memory (at a batch of 1 and 4 bits) and has "
        "1.483 kB",
        replace(enough, flop_per_s=300): "has the memory but needs at least 24.15 s (at a batch of 1 and 4 bits) and "
        "the deadline is 10 s",
        # 16 bits would take less memory than this one has, and no less time
        DeviceProfile(memory_bytes=1e9, flop_per_s=300, up_bytes_per_s=96): "has the memory but needs at least 25.15 s "
        "(at a batch of 1 and 4 bits) and the deadline is 10 s",
    }
    assert plan(made, costs, weights, rules, list(reasons)) == list(reasons.values())
    (just,) = plan(made, costs, weights, rules, [enough])
    assert (just.ranks, just.memory_bytes) == ({"b": 2}, 1484.0)


def test_a_device_of_small_ranks_has_a_plan_of_those(large):
    made, costs, weights, rules = large
    capped, fewer = plan(made, costs, weights, rules, [DeviceProfile(max_rank=5), DeviceProfile(max_rank=4)])
    assert set(capped.ranks.values()) <= {1, 2, 4}
    assert capped == fewer
    assert capped.value == pytest.approx(made.values[:, 2].sum(), rel=1e-12)


def test_costs_survive_a_checkpoint():
    tree, tensors = flatten(COSTS)
    assert not tensors
    blank = Costs(**{item.name: 0.0 for item in fields(Costs)})
    assert unflatten(tree, tensors, blank) == COSTS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"costs": replace(COSTS, backward_flop=[])}, "backward_flop should tell of blocks 0 to 0"),
        ({"costs": replace(COSTS, saved_bytes=[1.0, 2.0])}, r"saved_bytes should never rise.*\[1.0, 2.0\]"),
        ({"costs": replace(COSTS, input_bytes=2.0)}, "make them again"),
        ({"rules": Rules([1, 2], [1], [32], 1, 1.0)}, "bits should be among 4, 8, 16.*got 32"),
        (
            {"rules": Rules([1, 4], [1], [16], 1, 1.0)},
            r"with ranks \[1, 2\], and the plan is for 1 with ranks \[1, 4\]",
        ),
        ({"weights": [Weight("v", 0, 30, 20)]}, "make the selections again"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, told):
    weights = [Weight("w", 0, 30, 20)]
    made = selections(weights, [1, 2], np.ones((1, 2)))
    good = {"costs": COSTS, "weights": weights, "rules": Rules([1, 2], [1], [16], 1, 1.0)}
    with pytest.raises(ConfigError, match=told):
        plan(made, **{**good, **change}, capabilities=[DeviceProfile()])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ranks": []}, "ranks should be"),
        ({"batches": [0]}, r"batches should be whole numbers above 0, got \[0\]"),
        ({"bits": []}, "bits should be"),
        ({"steps": 0}, "steps should be whole numbers above 0, got 0"),
        ({"deadline": math.nan}, "deadline should be"),
        ({"deadline": 0.0}, "deadline should be"),
        ({"state_bytes": -1}, "state_bytes should be"),
        ({"wire_bytes_per_number": math.inf}, "wire_bytes_per_number should be"),
    ],
)
def test_rules_that_make_no_sense_are_refused(change, told):
    good = {"ranks": [1], "batches": [1], "bits": [16], "steps": 1, "deadline": 1.0}
    with pytest.raises(ConfigError, match=told):
        Rules(**{**good, **change})


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    assert benchmark.main(["--quick"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("8 devices, 20 weights, 3 ranks", "concave", "jumps", "at most 2 s"))
