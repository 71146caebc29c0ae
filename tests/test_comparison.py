"""Which runs stand side by side, and what is said of them: every number again from the files, by csv and by hand."""

import csv
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from conftest import rows, small
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, RunFolderError
from fedtune.report.comparison import (
    Entry,
    Protocol,
    compare,
    curve,
    estimate,
    load,
    protocols,
    reached,
    table,
    target,
    write_results,
)
from fedtune.report.intervals import paired_p
from fedtune.report.labels import labels
from fedtune.runs.read import Clients, read
from fedtune.runtime.local import run_local

METHODS, SEEDS = ("fedit", "ffa_lora"), (0, 1, 2)
T2 = 4.302652729749462  # Student's t, two degrees of freedom, 97.5 %: the table's 4.303


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two methods with three seeds each."""
    parent = tmp_path_factory.mktemp("out")
    for method in METHODS:
        for seed in SEEDS:
            run_local(small(f"method={method}", f"seed={seed}", "rounds=3", "train.lr=5e-3",
                            out=parent / method / f"seed-{seed}"))  # fmt: skip
    return parent


@pytest.fixture
def copy(out, tmp_path):
    """Folders that a test may write to."""
    return Path(shutil.copytree(out, tmp_path / "copy"))


def losses(folder):
    return [float(row["eval_loss"]) for row in rows(folder, "metrics.csv")]


def sent(folder, last, way=None):
    return sum(
        int(row["wire_bytes"])
        for row in rows(folder, "ledger.csv")
        if row["part"] != "evaluate" and int(row["round"]) <= last and way in (None, row["direction"])
    )


def edited(run, status="finished", error=None, **columns):
    """A run with other numbers; `rounds` shortens it."""
    count = columns.pop("rounds", len(run.rounds))
    metrics = {name: column[:count] for name, column in run.metrics.items()}
    metrics |= {name: np.array(values, float) for name, values in columns.items()}
    wire = {key: sizes[:count] for key, sizes in run.wire.items()}
    return replace(run, status=status, error=error, metrics=metrics, wire=wire)


def test_six_runs_are_two_entries_of_a_group(out):
    found = load([out])
    assert (found.failures, found.notes, found.command) == ((), (), None)
    (group,) = found.groups
    assert group.title == "tiny on pairs.jsonl, 4 clients"
    assert [(entry.label, entry.seeds) for entry in group.entries] == [("fedit", SEEDS), ("ffa_lora", SEEDS)]
    shown = dict(group.common)
    assert shown["train.lr"] == "0.005"
    assert shown["clients"] == "4"
    assert "method" not in shown


def test_a_table_by_hand(out):
    """Means, t intervals with two degrees of freedom, mean ± 4.3027 s / sqrt(3), and differences paired by seed. One
    comparison, so nothing is adjusted; its p is Student's by the closed form for two degrees of freedom,
    1 - |t| / sqrt(2 + t²)."""
    (group,) = load([out]).groups
    found = table(group, Protocol("rounds", 3))
    last = {method: [losses(out / method / f"seed-{seed}")[3] for seed in SEEDS] for method in METHODS}
    best, other = sorted(METHODS, key=lambda method: statistics.mean(last[method]))
    assert [standing.entry.label for standing in found.standings] == [best, other]
    assert (found.reference, found.notes) == (best, ())
    for standing in found.standings:
        method = standing.entry.label
        folders = [out / method / f"seed-{seed}" for seed in SEEDS]
        assert standing.at == (3, 3, 3)
        half = T2 * statistics.stdev(last[method]) / math.sqrt(3)
        mean = statistics.mean(last[method])
        loss = standing.scores["eval_loss"]
        assert loss.values == tuple(last[method])
        assert (loss.mean, loss.low, loss.high) == pytest.approx((mean, mean - half, mean + half))
        for way, bytes in (("up", standing.up_bytes), ("down", standing.down_bytes)):
            assert bytes.values == tuple(sent(folder, 3, way) for folder in folders)
        took = [sum(float(row["seconds"]) for row in rows(folder, "metrics.csv")) for folder in folders]
        assert standing.seconds.values == pytest.approx(took)
        memory = [json.loads((folder / "summary.json").read_text())["memory_bytes"] for folder in folders]
        assert standing.memory_bytes.values == tuple(memory)
        assert not {"seconds", "clients", "up_wire_bytes", "merge_error"} & standing.scores.keys()
        assert {"eval_accuracy", "train_loss", "aggregation_error"} <= standing.scores.keys()
    first, second = found.standings
    assert (first.behind, first.verdict) == (None, "reference")
    apart = [a - b for a, b in zip(last[other], last[best], strict=True)]
    assert second.behind.values == pytest.approx(apart)
    t = statistics.mean(apart) / (statistics.stdev(apart) / math.sqrt(3))
    assert second.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))
    assert second.verdict == ("worse" if second.p <= 0.05 else "within noise")
    turned = table(group, Protocol("rounds", 3), reference=other)
    assert turned.reference == other
    assert turned.standings[0].behind.mean == pytest.approx(-statistics.mean(apart))
    with pytest.raises(ConfigError, match="reference=flora is none of the entries: expected one of fedit, ffa_lora"):
        table(group, Protocol("rounds", 3), reference="flora")


def test_within_bytes_a_run_counts_between_the_rounds_around_the_limit(out):
    """A tenth of the way from round 1 to round 2 of seed 0: each number is that of round 1, and a tenth of what round 2
    adds. ffa_lora sends one factor of two, and is further with as much."""
    (group,) = load([out]).groups
    one, two = (sent(out / "fedit" / "seed-0", last) for last in (1, 2))
    limit = one + 0.1 * (two - one)
    found = {standing.entry.label: standing for standing in table(group, Protocol("bytes", limit)).standings}
    for method, standing in found.items():
        assert standing.used == 1
        for place, (seed, at) in enumerate(zip(SEEDS, standing.at, strict=True)):
            folder, done = out / method / f"seed-{seed}", int(at)
            before, after = sent(folder, done), sent(folder, done + 1)
            assert before <= limit < after
            assert at - done == pytest.approx((limit - before) / (after - before))
            loss = losses(folder)
            expected = loss[done] + (at - done) * (loss[done + 1] - loss[done])
            assert standing.scores["eval_loss"].values[place] == pytest.approx(expected)
            assert standing.up_bytes.values[place] + standing.down_bytes.values[place] == pytest.approx(limit)
    assert found["fedit"].at[0] == pytest.approx(1.1)
    assert min(found["ffa_lora"].at) > 1.1


def made_of(group, **entries):
    """The group with other entries: by label, seeds' (losses by round, bytes by round)."""
    run = group.entries[0].runs[0]

    def entry(label, seeds):
        runs = []
        for seed, (loss, bytes) in enumerate(seeds):
            experiment = replace(run.experiment, seed=seed, rounds=max(len(loss) - 1, 1))
            metrics = {name: np.full(len(loss), math.nan) for name in run.metrics}
            metrics |= {"round": np.arange(len(loss), dtype=float), "eval_loss": np.array(loss)}
            wire = {("up", "train"): np.array(bytes, float)}
            runs.append(replace(run, experiment=experiment, metrics=metrics, wire=wire))
        return Entry(label, tuple(runs))

    return replace(group, entries=tuple(entry(label, seeds) for label, seeds in entries.items()))


def test_a_few_bytes_more_a_round_are_not_worse(out):
    """Both lose 1 a round; `more` sends 100.8 B in each instead of 100, its seeds -0.1, 0 and 0.1 apart. Within 1000 B
    it is at round 1000 / 100.8 = 9.921, with a loss of 10 - 9.921 = 0.079: t = 0.0794 / (0.1 / sqrt(3)) = 1.375, and
    with two degrees of freedom p = 1 - 1.375 / sqrt(2 + 1.375²) = 0.303. With its last whole round, the ninth, it would
    be 1.0 behind: t = 17.3, p = 0.003."""
    curve = 10 - np.arange(12.0)
    seeds = [-0.1, 0.0, 0.1]
    (group,) = load([out]).groups
    group = made_of(
        group,
        less=[(curve, [0] + [100] * 11)] * 3,
        more=[(curve + apart, [0] + [100.8] * 11) for apart in seeds],
    )
    first, second = table(group, Protocol("bytes", 1000)).standings
    assert first.at == (10, 10, 10)
    assert second.at == pytest.approx((1000 / 100.8,) * 3)
    assert second.behind.values == pytest.approx([0.0794 + apart for apart in seeds], abs=1e-4)
    assert second.p == pytest.approx(0.303, abs=1e-3)
    assert second.verdict == "within noise"


def test_who_could_not_spend_the_last_of_a_budget_is_compared_where_it_ended(out):
    """Equal by bytes, 10 - B / 100. `coarse` ended at 9 · 105 = 945 B, as a tenth round didn't fit into 1000 B; there
    the other is at round 9.45, and no better. What ended at 400 B isn't called worse for what it couldn't spend. What
    is better with less is better, and what is worse with as much is worse."""
    (group,) = load([out]).groups

    def line(step, rounds, apart=0.0):
        return [(10 + apart * (1 + noise) - step * np.arange(rounds + 1) / 100, [0] + [step] * rounds)
                for noise in (-0.01, 0.0, 0.01)]  # fmt: skip

    made = made_of(group, fine=line(100, 10), coarse=line(105, 9))
    found = table(made, Protocol("bytes", 1000))
    shown = {standing.entry.label: standing for standing in found.standings}
    assert shown["fine"].at == pytest.approx((9.45,) * 3)
    assert shown["coarse"].at == (9, 9, 9)
    assert found.standings[1].behind.values == pytest.approx((0, 0, 0), abs=1e-12)
    assert found.notes == ("compared within 945 B: there the first ended of those that came near the limit",)
    made = made_of(group, fine=line(100, 10), coarsest=line(200, 2), good=line(200, 3, -6.0))
    found = table(made, Protocol("bytes", 1000))
    assert {standing.entry.label: standing.verdict for standing in found.standings} == {
        "good": "reference", "fine": "worse", "coarsest": "unspent",
    }  # fmt: skip
    assert "coarsest used 40 % of the bytes: rounds ended it" in found.notes
    turned = table(made, Protocol("bytes", 1000), "coarsest")
    assert {standing.entry.label: standing.verdict for standing in turned.standings} == {
        "good": "unspent", "fine": "unspent", "coarsest": "reference",
    }  # fmt: skip
    made = made_of(group, fine=line(200, 3), good=line(200, 3, -6.0))
    assert [one.verdict for one in table(made, Protocol("bytes", 1000)).standings] == ["reference", "worse"]


def test_a_limit_between_evaluated_rounds(out):
    """Evaluated at 0, 2, 4 and at 0, 3, 6: after 3 rounds one is half of the way from 8 to 6. Within less than its
    first round takes, an entry is on the way there, and a note says so."""
    nan = math.nan
    (group,) = load([out]).groups
    group = made_of(
        group,
        twos=[([10, nan, 8, nan, 6], [0, 10, 10, 10, 10])] * 2,
        threes=[([10, nan, nan, 7, nan, nan, 4], [0, 10, 10, 10, 10, 10, 10])] * 2,
    )
    found = {one.entry.label: one for one in table(group, Protocol("rounds", 3)).standings}
    assert (found["twos"].at, found["twos"].scores["eval_loss"].mean) == ((3, 3), 7)
    assert (found["threes"].at, found["threes"].scores["eval_loss"].mean) == ((3, 3), 7)
    early = table(group, Protocol("bytes", 5))
    assert [one.at for one in early.standings] == [(0.5, 0.5)] * 2
    assert [one.scores["eval_loss"].mean for one in early.standings] == [9.5, 9.5]
    assert "twos: its first round doesn't fit; what is shown lies on the line to what that came to" in early.notes


def test_protocols_that_fit(out):
    """The bytes are those of the cheapest, ffa_lora, to the next of three digits, and a little more: within these it
    has all its rounds, and nobody's last round is lost for a few bytes."""
    (group,) = load([out]).groups
    rounds, sizes, seconds = protocols(group)
    assert rounds == Protocol("rounds", 3)
    assert rounds.title == "after 3 rounds"
    cheapest = max(sent(out / "ffa_lora" / f"seed-{seed}", 3) for seed in SEEDS)
    assert cheapest * 1.01 <= sizes.limit <= cheapest * 1.02
    assert sizes.title == f"within {sizes.limit / 1000:.1f} kB"
    assert seconds.kind == "seconds"
    assert Protocol("bytes", 40e6).title == "within 40.0 MB"
    assert Protocol("seconds", 60).title == "within 60 s"
    # Where a method is too dear to do a round within the other's bytes, its own are the limit
    wire = {("up", "train"): np.array([0, 1e9, 1e9, 1e9])}
    dear = replace(group.entries[0], runs=tuple(replace(run, wire=wire) for run in group.entries[0].runs))
    group = replace(group, entries=(dear, group.entries[1]))
    assert protocols(group)[1] == Protocol("bytes", 3.03e9)
    assert table(group, protocols(group)[1]).notes[0].startswith("ffa_lora used 0.00")
    # Nobody knows what one of them sent
    wire = {("up", "train"): np.full(4, math.nan)}
    lost = replace(dear, runs=tuple(replace(run, wire=wire) for run in dear.runs))
    assert [p.kind for p in protocols(replace(group, entries=(lost, group.entries[1])))] == ["rounds", "seconds"]


def test_who_did_not_use_up_a_limit_is_named(out):
    (group,) = load([out]).groups
    used = statistics.mean(sent(out / "ffa_lora" / f"seed-{seed}", 3) for seed in SEEDS)
    notes = table(group, Protocol("bytes", 200 * used)).notes
    assert "ffa_lora used 0.5 % of the bytes: rounds ended it" in notes


def test_a_target_and_what_reached_it(out):
    (group,) = load([out]).groups
    means = {m: np.mean([losses(out / m / f"seed-{seed}") for seed in SEEDS], axis=0) for m in METHODS}
    best = min(METHODS, key=lambda method: means[method].min())
    goal = target(group)
    assert goal == pytest.approx((means[best][0] + means[best].min()) / 2)
    found = {one.entry.label: one for one in reached(group, goal)}
    for method in METHODS:
        expected = []
        for seed in SEEDS:
            folder = out / method / f"seed-{seed}"
            there = [number for number, loss in enumerate(losses(folder)) if loss <= goal]
            expected += [(there[0], sent(folder, there[0]))] if there else []
        assert found[method].missed == 3 - len(expected)
        assert list(zip(found[method].rounds.values, found[method].bytes.values, strict=True)) == expected
    nobody = reached(group, 0.0)
    assert [one.missed for one in nobody] == [3, 3]
    assert all(math.isnan(one.rounds.mean) for one in nobody)


def test_curves(out):
    (entry, _) = load([out]).groups[0].entries
    values = np.array([losses(out / "fedit" / f"seed-{seed}") for seed in SEEDS])
    found = curve(entry, "eval_loss", "bytes")
    np.testing.assert_allclose(found.mean, values.mean(0))
    np.testing.assert_allclose(found.high - found.mean, T2 * values.std(0, ddof=1) / math.sqrt(3))
    np.testing.assert_allclose(found.x, [np.mean([sent(run.path, r) for run in entry.runs]) for r in range(4)])
    # Train losses begin with round 1; one seed alone has no interval
    train = curve(Entry("one", entry.runs[:1]), "train_loss")
    assert train.x.tolist() == [1, 2, 3]
    assert np.isnan(train.low).all()
    assert len(curve(entry, "rouge").x) == len(curve(Entry("none", ()), "eval_loss").x) == 0
    with pytest.raises(ConfigError, match="over=days: expected rounds, bytes, seconds"):
        curve(entry, "eval_loss", "days")


def test_an_interval_by_hand():
    """2, 4, 9: mean 5, s² = (9 + 1 + 16) / 2 = 13, half the interval 4.3027 sqrt(13 / 3) = 8.9567."""
    found = estimate([2, 4, math.nan, 9])
    assert (found.mean, found.low, found.high) == pytest.approx((5, -3.9567, 13.9567), abs=1e-4)
    assert str(found.values) == "(2.0, 4.0, nan, 9.0)"
    assert math.isnan(estimate([]).mean)
    one = estimate([3.0])
    assert one.mean == 3
    assert math.isnan(one.low)


def test_a_paired_t_by_hand():
    """1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641; p = 1 - 3.4641 / sqrt(2 + 12) = 0.0742."""
    assert paired_p([1, 2, 3]) == pytest.approx(0.0742, abs=1e-4)
    assert paired_p([-1, -2, -3]) == pytest.approx(0.0742, abs=1e-4)
    assert math.isnan(paired_p([1]))
    assert (paired_p([0, 0]), paired_p([1, 1])) == (1, 0)


def test_verdicts(out):
    """Four entries: the best; one behind it by 1.0, 1.1, 1.2, t = 1.1 / (0.1 / sqrt(3)) = 19.05, p = 0.00274, times
    the three pairs of those with seeds in common, times two as the range is another test; one by -1, 0, 1.2, whose
    noise hides the other from the range; one with a single seed."""
    run = read(out / "fedit" / "seed-0")

    def entry(label, *ends):
        return Entry(label, tuple(
            edited(replace(run, experiment=replace(run.experiment, seed=seed)), eval_loss=[5, 4, 4, end])
            for seed, end in enumerate(ends)))  # fmt: skip

    (group,) = compare([run]).groups
    ends = {"best": (1, 2, 3), "clear": (2, 3.1, 4.2), "alike": (0, 2, 4.2), "lone": (9,)}
    group = replace(group, entries=tuple(entry(*(label, *values)) for label, values in ends.items()))
    found = {standing.entry.label: standing for standing in table(group, Protocol("rounds", 3)).standings}
    assert list(found) == ["best", "alike", "clear", "lone"]
    assert [one.verdict for one in found.values()] == ["reference", "within noise", "worse", "one seed"]
    assert found["clear"].p == pytest.approx(6 * 0.00274, abs=6e-5)
    assert found["lone"].behind.values == (8.0,)
    turned = {one.entry.label: one.verdict for one in table(group, Protocol("rounds", 3), "clear").standings}
    assert turned == {"best": "better", "alike": "within noise", "clear": "reference", "lone": "one seed"}


def test_scores_on_other_data_are_no_reference(out):
    """The lowest loss is one on clients' own data: the others are compared with the best of their own kind."""
    own = Clients(3, np.arange(2), np.zeros(2), np.ones(2))
    (group,) = load([out]).groups
    runs = tuple(replace(edited(run, eval_loss=[5, 0, 0, 0]), clients=own) for run in group.entries[0].runs)
    found = table(replace(group, entries=(Entry("local_only", runs), group.entries[1])), Protocol("rounds", 3))
    assert [one.entry.label for one in found.standings] == ["local_only", "ffa_lora"]
    assert found.reference == "ffa_lora"
    assert found.notes == ("local_only: scored on each client's own held-out data, the others on the server's",)


def test_who_ended_early_is_left_out_and_named(out):
    """A seed that diverged after round 1 doesn't end the table for the others, and doesn't count with its last good
    round. One that is going on is left out where it hasn't come so far."""
    runs = [read(out / method / f"seed-{seed}") for method in METHODS for seed in SEEDS]
    runs[1] = edited(runs[1], "failed", "DivergedError: the loss became nan", rounds=2)
    runs[4] = edited(runs[4], "running", rounds=3)
    runs[5] = edited(runs[5], "failed", "QuorumError: nobody came", rounds=0)
    found = compare(runs)
    assert [(f.label, f.seed, f.reason) for f in found.failures] == [
        ("fedit", 1, "DivergedError: the loss became nan"), ("ffa_lora", 2, "QuorumError: nobody came"),
    ]  # fmt: skip
    (group,) = found.groups
    assert protocols(group)[0] == Protocol("rounds", 3)
    shown = table(group, Protocol("rounds", 3))
    assert {one.entry.label: one.entry.seeds for one in shown.standings} == {"fedit": (0, 2), "ffa_lora": (0,)}
    assert {one.verdict for one in shown.standings} == {"reference", "one seed"}
    assert set(shown.notes) == {
        "fedit seed 1 is left out: failed after round 1: DivergedError: the loss became nan",
        "ffa_lora seed 1 is left out: running after round 2",
        "ffa_lora seed 2 is left out: failed before round 0 was done: QuorumError: nobody came",
    }
    earlier = {one.entry.label: one for one in table(group, Protocol("rounds", 1)).standings}
    assert earlier["fedit"].at == (1, 1, 1)
    # Nothing to show is a table too
    nothing = replace(group, entries=(Entry("none", (runs[5],)),))
    assert table(nothing, protocols(nothing)[0]).standings == ()
    assert math.isnan(target(nothing))
    assert [one.missed for one in reached(nothing, 1.0)] == [1]


def test_another_task_is_another_group(out, tmp_path):
    """Unequal shares instead of equal ones. What lost its summary belongs where its settings say."""
    other = tmp_path / "other"
    run_local(small("data.partition=linear", "rounds=1", "train.lr=5e-3", out=other))
    runs = [read(out / "fedit" / "seed-0"), read(out / "fedit" / "seed-1"), read(other)]
    runs[1] = replace(runs[1], summary={}, status="cut off")
    found = compare(runs)
    assert [[entry.seeds for entry in group.entries] for group in found.groups] == [[(0, 1)], [(0,)]]
    assert found.groups[0].title != found.groups[1].title
    assert any("data.partition: iid -> linear" in note for note in found.notes)


def test_of_two_runs_with_one_seed_the_one_that_got_further_counts(out):
    run = read(out / "fedit" / "seed-0")
    short = replace(edited(run, rounds=2), path=Path("short"))
    found = compare([short, run])
    assert found.groups[0].entries[0].runs == (run,)
    assert found.notes == (f"short is left out: it has the settings and the seed of {run.path}, which got further",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["", "codec=compeft", "codec_up=compeft", "codec=compeft codec.density=0.1"],
         ["fedit", "fedit compeft codec.density=0.2", "fedit up compeft", "fedit compeft codec.density=0.1"]),
        (["", "train.lr=3e-3", "method=ffa_lora train.lr=0.01"], ["fedit", "fedit train.lr=0.003", "ffa_lora"]),
        (["", "server_optimizer=fedadam", "adapter=dora"], ["fedit", "fedit fedadam", "fedit dora"]),
        (["", "method=fedkseed", "method=fedkseed codec=raw"], ["fedit", "fedkseed", "fedkseed raw"]),
        (["", "adapter.rank=4"], ["fedit r8", "fedit r4"]),
        (["population.cohort=5", "method=centralized population.cohort=5"], ["fedit", "centralized"]),
        (["method=fedprox", "method=fedprox method.client.mu=1"], None),
    ],
)  # fmt: skip
def test_labels_say_what_differs_and_no_more(words, expected):
    found = labels([compose(["model=tiny", *line.split()]) for line in words])
    assert len(set(found)) == len(words)
    if expected is not None:
        assert found == expected
    else:
        assert all(label.startswith("fedprox method.client.mu=") for label in found)


def test_a_method_that_repeats_the_seed_in_its_settings_is_one_entry(out):
    """fed_sb's basis follows from method.strategy.basis_seed=${seed}."""
    run = read(out / "fedit" / "seed-0")
    runs = [replace(run, experiment=compose(["model=tiny", "method=fed_sb", f"seed={seed}"])) for seed in SEEDS]
    (entry,) = compare(runs).groups[0].entries
    assert (entry.label, entry.seeds) == ("fed_sb", SEEDS)
    given = compose(["model=tiny", "method=fed_sb", "seed=3", "method.strategy.basis_seed=7"])
    assert len(compare([*runs, replace(run, experiment=given)]).groups[0].entries) == 2
    constant = [replace(r, experiment=compose([*r.experiment.overrides, "method.strategy.basis_seed=0"])) for r in runs]
    assert [entry.seeds for entry in compare(constant).groups[0].entries] == [SEEDS], "0 is no repeated seed here"


def test_pooled_controls_learn_the_same_task(out, tmp_path):
    run_local(small("method=centralized", "rounds=1", "train.lr=5e-3", out=tmp_path / "pooled"))
    (group,) = load([out / "fedit", tmp_path / "pooled"]).groups
    assert [entry.label for entry in group.entries] == ["centralized", "fedit"]
    assert group.title == "tiny on pairs.jsonl, 4 clients"


def test_what_comparison_json_says(copy):
    """Labels, wherever a folder is named from; cells that failed; and nothing that isn't as it should be."""
    cells = [{"label": "mine\x1b[31m", "folder": f"fedit/seed-{seed}", "seed": seed, "status": "finished"}
             for seed in SEEDS]  # fmt: skip
    cells += [{"label": "flora", "folder": "flora/seed-0", "seed": 0, "status": "failed", "error": "too\nlarge"}]
    hostile = [None, 3, {"label": 3}, {"label": "x", "folder": "\0"}, {"label": "x", "folder": "\ud800"},
               {"label": "y" * 9999, "folder": "../.." * 2000, "seed": "7", "error": ["?"]}]  # fmt: skip
    path = copy / "comparison.json"
    path.write_text(json.dumps({"command": "fedtune compare x", "cells": cells + hostile, "tuned": 7, "more": {}}))
    found = load([copy])
    assert found.command == "fedtune compare x"
    assert [entry.label for entry in found.groups[0].entries] == ["ffa_lora", "mine [31m"]
    assert [(f.label[:5], f.seed, f.reason) for f in found.failures] == [
        ("flora", 0, "too large"), ("yyyyy", None, "it failed, and didn't say why"),
    ]  # fmt: skip
    tuned = {"fedit": {"chosen": ["train.lr=0.1", "train.steps=2"]}, "x": {"chosen": [1]}, "y": 7, "z": {"chosen": []}}
    path.write_text(json.dumps({"command": "fedtune compare x", "cells": cells, "tuned": tuned}))
    assert "tuned by held-out loss on a seed of its own: fedit train.lr=0.1 train.steps=2" in load([copy]).notes
    alone = load([copy / "fedit" / "seed-1"])
    assert (alone.groups[0].entries[0].label, alone.failures, alone.command) == ("mine [31m", (), None)
    for content in ("[]", "{", '{"cells": {"a": 1}}', '{"cells": null, "command": []}', "\xff", "[" * 10**5):
        path.write_text(content, encoding="latin-1")
        assert [entry.label for entry in load([copy]).groups[0].entries] == list(METHODS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@example(
    name="config.yaml", share=0.59375, garbage=b""
)  # between two settings: what is left is a config of another run
@given(
    name=st.sampled_from(("config.yaml", "metrics.csv", "ledger.csv", "summary.json")),
    share=st.floats(0, 1),
    garbage=st.sampled_from([b"", b"\xff\n", b'"', b"9" * 400 + b"\n"]),
)
def test_one_cut_file_leaves_the_other_runs_to_compare(copy, name, share, garbage):
    path = copy / "fedit" / "seed-1" / name
    content = path.read_bytes()
    try:
        path.write_bytes(content[: int(share * len(content))] + garbage)
        found = load([copy])
        for group in found.groups:
            for protocol in protocols(group):
                table(group, protocol)
            reached(group, target(group))
            for entry in group.entries:
                curve(entry, "eval_loss", "bytes")
        write_results(found, copy / "report")
    finally:
        path.write_bytes(content)
    standings = table(found.groups[0], Protocol("rounds", 3)).standings
    assert {one.entry.label: {0, 2} <= set(one.entry.seeds) for one in standings} == dict.fromkeys(METHODS, True)


def test_a_bad_folder_is_noted_and_no_run_at_all_is_an_error(copy, tmp_path):
    (copy / "fedit" / "seed-0" / "config.yaml").write_text("a: [")
    found = load([copy])
    assert [entry.seeds for entry in found.groups[0].entries] == [(1, 2), SEEDS]
    assert "left out: " in found.notes[0]
    assert "seed-0" in found.notes[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="holds no run"):
        load([tmp_path / "empty"])
    assert compare([]).groups == ()
    assert len(write_results(compare([]), tmp_path / "empty")) == 3


def test_results_are_what_the_files_say(out, tmp_path):
    found = load([out])
    paths = write_results(found, tmp_path / "report")
    assert [path.name for path in paths] == ["results.csv", "results.parquet", "summary.csv"]
    with paths[0].open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    typed = parquet.read_table(paths[1]).to_pylist()
    assert len(lines) == len(typed) == 24
    for line, cells in zip(lines, typed, strict=True):
        assert list(line) == list(cells)
        folder = (tmp_path / "report" / line["folder"]).resolve()
        row = rows(folder, "metrics.csv")[int(line["round"])]
        assert folder == out / line["label"] / f"seed-{line['seed']}"
        assert (cells["method"], cells["codec_up"], cells["virtual"]) == (line["label"], "raw", False)
        for name, cell in row.items():
            assert (line[name] == "") == (cell == "") == (cells[name] is None)
            assert not cell or float(cell) == float(line[name]) == cells[name]
        for way in ("up", "down"):
            assert cells[f"spent_{way}_bytes"] == sent(folder, cells["round"], way)
    with paths[2].open(newline="") as stream:
        summary = list(csv.DictReader(stream))
    (group,) = found.groups
    shown = [(found, one) for found in (table(group, p) for p in protocols(group)) for one in found.standings]
    assert len(summary) == len(shown) == 6
    for line, (one, standing) in zip(summary, shown, strict=True):
        assert (line["protocol"], line["label"]) == (one.protocol.kind, standing.entry.label)
        assert (line["verdict"], int(line["seeds"])) == (standing.verdict, 3)
        assert float(line["eval_loss_mean"]) == standing.scores["eval_loss"].mean
        assert (line["p"] == "") == math.isnan(standing.p)
