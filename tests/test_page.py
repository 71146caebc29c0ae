"""The page: what it says is what the comparison says, it needs nothing else, and it lets no stranger's text through."""

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from comparisons import comparison, made_up
from hypothesis import given
from hypothesis import strategies as some

from fedtune.commands.main import main
from fedtune.core.errors import ConfigError, RunFolderError
from fedtune.core.text import duration, listed, number
from fedtune.report import axes, page, text
from fedtune.report.comparison import Estimate, Failure, compare, protocols, reached, table, target
from fedtune.report.figures import columns, figures
from fedtune.report.sections import Question

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\"'&{{7*7}}"


@pytest.fixture(scope="module")
def shown() -> str:
    return page.render(comparison())


def drawn(text: str) -> list[dict]:
    """The charts that the page's data has."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return [figure for group in json.loads(data)["groups"] for figure in group["figures"]]


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.slow
def test_it_needs_nothing_else(shown):
    """No element names another file, but for the page's own anchors."""
    for tag, attributes in Elements(shown).found:
        for name in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in shown
    assert "url(" not in shown.partition("</style>")[0]


def test_only_the_pages_own_scripts_may_run_and_none_may_ask_the_network(shown):
    """The policy names the SHA-256 of each of the two scripts: of the text between the tags, as a browser has it."""
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', shown).group(1))
    scripts = re.findall(r"<script>(.*?)</script>", shown, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2
    assert f"script-src {' '.join(f'{chr(39)}sha256-{value}{chr(39)}' for value in hashes)};" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe-eval" not in policy


def test_a_strangers_text_stays_text():
    """A label, a failure and a command that try to be markup: the page has as many scripts and images as without."""
    hostile = comparison((HOSTILE, "b", "c"))
    failed = Failure(HOSTILE, None, HOSTILE)
    hostile = replace(hostile, failures=(failed,), notes=(HOSTILE,), command=HOSTILE)
    text = page.render(hostile)
    tags = [tag for tag, _ in Elements(text).found]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert "{{7*7}}" in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data)["groups"][0]["names"][0] == HOSTILE
    assert "\u2028" not in data


def test_the_table_says_what_the_comparison_says(shown):
    """Entry e ends at 3 - 0.4 + 0.2 e + 0.005 on average over seeds 0 and 1, after 50 + 4 x 1000 (e + 1) bytes up."""
    rows = re.findall(r'<tr data-entry="(\d)">(.*?)</tr>', shown.partition('data-protocol="rounds"')[2], re.DOTALL)[:3]
    assert [int(entry) for entry, _ in rows] == [0, 1, 2]
    for e, (_, row) in enumerate(rows):
        values = [float(value) for value in re.findall(r'data-value="([^"]*)"', row)]
        loss = 2.605 + 0.2 * e
        assert values[0] == pytest.approx(loss)
        assert 50 + 4000.0 * (e + 1) in values
        assert number(loss) in row
        assert ("reference" in row) == (e == 0)


def test_the_answer_names_the_best_and_what_cannot_be_told_from_it(shown):
    """The differences are 0.2 and 0.4 for either seed, so they have no spread: both are worse."""
    (group,) = comparison().groups
    (answer, *_) = re.findall(r'<p class="answer">(.*?)</p>', shown)
    assert answer.startswith(
        f"After 4 rounds {group.entries[0].label} had the lowest held-out loss of 3: 2.605 (2 seeds"
    )
    assert "Every other is worse by more than the noise between seeds." in answer


def test_with_one_seed_it_says_that_nothing_can_be_told():
    answer = re.search(r'<p class="answer">(.*?)</p>', page.render(comparison(seeds=1))).group(1)
    assert "With one seed nobody can say which differences are chance" in answer


def test_every_figure_has_words_numbers_and_a_chart(shown):
    names = [figure["name"] for figure in drawn(shown)]
    assert names == [
        "loss-bytes", "loss-time", "loss-memory", "loss", "accuracy", "bytes-by-part", "clients", "exactness",
    ]  # fmt: skip
    labels = [attributes["aria-label"] for tag, attributes in Elements(shown).found if attributes.get("role") == "img"]
    assert len(labels) == len(names)
    assert all(re.search(r"\d", label) for label in labels)
    assert shown.count("<figcaption>") == shown.count("<summary>Numbers</summary>") == len(names)


def test_the_front_is_of_those_that_nothing_beats():
    """By bytes the first entry is cheapest and best; by memory each worse one is cheaper, so all are on it."""
    (group,) = comparison().groups
    by_name = {figure.name: figure for figure in figures(group, table(group, protocols(group)[0]))}
    assert [row[-1] for row in by_name["loss-bytes"].rows] == ["yes", "", ""]
    assert [row[-1] for row in by_name["loss-memory"].rows] == ["yes", "yes", "yes"]


@given(some.lists(some.tuples(some.integers(1, 6), some.integers(1, 6)), min_size=1, max_size=12))
def test_on_the_front_nothing_is_as_cheap_and_as_good(points):
    """Against the definition: a point is off it if another is no dearer and no worse, and differs; of equal points
    one is on it."""
    from fedtune.report.figures import _unbeaten

    kept = _unbeaten(points)
    on = {points[index] for index in kept}
    assert len(on) == len(kept)
    for point in points:
        beaten = any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)
        assert (point in on) == (not beaten)


def test_a_figure_without_data_is_said_and_not_drawn():
    runs = [replace(run, clients=None, memory_bytes=math.nan) for run in made_up()]
    shown = page.render(compare(runs))
    assert not {"clients", "loss-memory"} & {figure["name"] for figure in drawn(shown)}
    assert "Not drawn: no run scored its clients one by one" in shown
    assert "Not drawn: no run says its peak memory" in shown


def test_runs_without_any_round_give_a_page():
    runs = [
        replace(
            run,
            status="running",
            metrics={name: values[:0] for name, values in run.metrics.items()},
            wire={},
            payload={},
            clients=None,
        )
        for run in made_up(entries=2)
    ]
    shown = page.render(compare(runs), live=True)
    assert drawn(shown) == []
    assert "0 of 4 rounds" in shown


def test_nothing_at_all_gives_a_page():
    assert "No run has begun here yet" in page.render(compare([]), live=True)


@pytest.mark.slow
def test_more_entries_than_hues_are_there_in_grey():
    """Of 35, eight are in colour: the reference, which is the best, and the seven after it."""
    shown = page.render(comparison(entries=35, seeds=1))
    assert len(re.findall(r'<input type="checkbox"', shown)) == 35
    assert len(re.findall(r'<input type="checkbox" value="\d+" checked', shown)) == 8
    for figure in drawn(shown):
        assert {row["e"] for row in figure["spec"]["data"]["values"]} >= set(range(1, 35))


@pytest.mark.slow
def test_long_runs_of_many_are_thinned():
    """60 entries of 600 rounds are 36 060 points, of which at most 20 000 are drawn, the first and the last among
    them."""
    (loss,) = [
        figure for figure in drawn(page.render(comparison(entries=60, seeds=1, rounds=600))) if figure["name"] == "loss"
    ]
    rows = loss["spec"]["data"]["values"]
    assert len(rows) <= 20_000
    assert {row["r"] for row in rows} >= {0, 600}
    assert len(json.dumps(loss, separators=(",", ":"))) < 2_500_000


def test_the_controls_are_in_colour_whatever_they_score():
    runs = made_up(entries=12, seeds=1)
    control = replace(runs[-1].experiment.method, strategy={"_target_": "strategies.local_only.LocalOnly"})
    runs[-1] = replace(runs[-1], experiment=replace(runs[-1].experiment, method=control))
    (part,) = page.lay_out(compare(runs)).sections
    (group,) = compare(runs).groups
    worst = next(index for index, entry in enumerate(group.entries) if entry.runs[0].path == runs[-1].path)
    assert worst in part.slots
    assert len(part.slots) == 8


@pytest.mark.slow
def test_files_for_papers(tmp_path):
    out = tmp_path / "out"
    path = page.write(comparison(), out)
    assert path == out / "report.html"
    stems = {figure["name"] for figure in drawn(path.read_text())}
    assert {file.name for file in (out / "figures").iterdir()} == {
        f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")
    }
    assert {"results.csv", "results.parquet", "summary.csv"} <= {file.name for file in out.iterdir()}
    svg = (out / "figures" / "loss.svg").read_text()
    (group,) = comparison().groups
    assert all(html.escape(entry.label) in svg for entry in group.entries)  # its legend
    assert (out / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")

    # Again, with less to draw: what was drawn before and isn't now goes away
    page.write(compare([replace(run, clients=None) for run in made_up()]), out)
    assert not (out / "figures" / "clients.svg").exists()
    assert (out / "figures" / "loss.svg").exists()


@pytest.mark.parametrize("name", ["report.html", "figures/loss.svg", "results.csv"])
def test_it_replaces_no_file_but_its_own(tmp_path, name):
    (tmp_path / "figures").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunFolderError, match="no report wrote it"):
        page.write(comparison(), tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.slow
def test_a_list_of_files_that_points_elsewhere_is_not_believed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / ".fedtune-report").write_text(f"../mine\n{tmp_path}/mine\n")
    page.write(comparison(entries=1, seeds=1), tmp_path / "out")
    assert (tmp_path / "mine").exists()


def test_an_unknown_reference_is_named_with_the_known_ones():
    (group,) = comparison().groups
    with pytest.raises(ConfigError, match=re.escape(group.entries[0].label)):
        page.render(comparison(), Question(reference="flora"))


@pytest.mark.slow
def test_the_command(small_run, tmp_path, capsys, monkeypatch):
    """Two real runs: the page goes where both are, with the seeds as one entry."""
    for seed in (0, 1):
        small_run(f"seed={seed}", name=f"runs/{seed}", rounds=1)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/0", "runs/1", "--rounds", "1", "--target", "9"]) == 0
    assert "wrote    runs/report.html" in capsys.readouterr().out
    shown = (tmp_path / "runs" / "report.html").read_text()
    assert "After 1 round " in shown
    assert "To a held-out loss of 9" in shown
    assert main(["report", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--bytes", "nan"], ["--target", "inf"]])
def test_a_limit_has_to_be_one(words):
    with pytest.raises(SystemExit):
        main(["report", "runs", *words])


@given(some.floats(1e-9, 1e15), some.floats(1.0001, 1e12), some.sampled_from(["", "bytes", "seconds"]))
def test_log_axes_have_few_ticks(low, times, unit):
    ticks = axes.log_ticks(low, low * times, unit)
    assert len(ticks) <= 9
    assert all(low <= tick <= low * times * (1 + 1e-5) for tick in ticks)
    if times > 10:
        assert ticks


@pytest.mark.parametrize(
    ("value", "said"),
    [(2.1354, "2.135"), (0.00012, "0.0001200"), (3e-8, "3e-08"), (0, "0"), (math.nan, "\u2013"), (12345678, "1.2e+07")],
)
def test_numbers_as_people_read_them(value, said):
    assert number(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0.35, "0.350 s"), (125, "2 min 5 s"), (12_000, "3 h 20 min"), (math.nan, "\u2013")]
)
def test_times_as_people_read_them(value, said):
    assert duration(value) == said


def test_an_interval_has_as_many_decimals_as_it_is_good_for():
    """Of 2.10 to 2.18 half the width is 0.04, which begins in the second decimal; one more is shown."""
    assert text.interval(Estimate(2.14, 2.10, 2.18, ())) == "2.100 to 2.180"
    assert text.interval(Estimate(2.14, math.nan, math.nan, ())) == ""


def test_long_lists_are_counted():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5 and 4 others"


def test_the_way_to_the_target_is_the_cheapest_of_those_that_all_got_there():
    (group,) = comparison().groups
    loss = target(group)
    said = text.answers([], reached(group, loss), loss)
    assert said[0].startswith(f"To a loss of {number(loss)}, {group.entries[0].label} took the fewest bytes: ")


def test_scores_come_with_the_loss_first():
    (group,) = comparison().groups
    assert columns(group) == ["eval_loss", "eval_accuracy"]
    assert np.isfinite(group.entries[0].runs[0].metrics["eval_seconds"]).all()  # and isn't one


def test_the_folder_of_a_single_run_is_where_its_page_goes(tmp_path):
    from fedtune.report.page import _around

    assert _around([tmp_path / "a"]).resolve() == (tmp_path / "a").resolve()
    assert _around([tmp_path / "a" / "b", tmp_path / "a" / "c"]).resolve() == (tmp_path / "a").resolve()
    assert isinstance(_around([tmp_path]), Path)
