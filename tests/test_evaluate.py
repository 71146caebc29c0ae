"""What a run's model is worth: during the run, by its clients, and afterwards by `fedtune evaluate`."""

import json
import math
import sys

import pytest
from conftest import rows, small, summary_of
from flwr.app import MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedtune.commands.main import main
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import Score
from fedtune.evaluation.scoring import mean_score
from fedtune.runtime.local import run_local
from fedtune.wire import messages as wire

MORE = ("exact_match", "rouge_l", "choice_accuracy")
FULL = Score(1.5, 0.25, 8, 0.5, 0.75, 4, 1.0, 2)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The same answer to every question, which is soon learnt."""
    path = tmp_path_factory.mktemp("data") / "yes.jsonl"
    lines = [{"question": f"is {n} a number?", "choices": ["never", "it is"], "answer": "B"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def learning(questions, *more):
    words = ("train.steps=20", "train.lr=0.02", "evaluate.generate=3", "evaluate.max_new_tokens=10")
    return (f"data.path={questions}", "data.client_heldout=0.3", "population.cohort=4", *words, *more)


@pytest.fixture(scope="module")
def learnt(shared_run, questions):
    return shared_run(*learning(questions, "evaluate.peers=last"))


def evaluated(capsys, tmp_path, *words):
    """What the command wrote, and what it printed."""
    out = tmp_path / "scores.json"
    out.unlink(missing_ok=True)
    code = main(["evaluate", *map(str, words), "--out", str(out)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(out.read_text()), captured.out


def refused(capsys, *words):
    code = main(["evaluate", *map(str, words)])
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (1, 1)
    return captured.err


def test_a_run_says_how_its_answers_and_choices_get_better(learnt):
    """The answer is learnt to the letter, and the other choice, which is as long, is not."""
    first, *_, last = rows(learnt, "metrics.csv")
    assert [float(first[f"eval_{name}"]) for name in MORE[:2]] == [0.0, 0.0]
    assert [float(last[f"eval_{name}"]) for name in MORE] == [1.0, 1.0, 1.0]
    summary = summary_of(learnt)
    assert (summary["first_eval_exact_match"], summary["last_eval_rouge_l"]) == (0.0, 1.0)


def test_without_questions_or_answers_nothing_is_said_of_them(small_run):
    folder = small_run(rounds=1)
    assert all(row[f"eval_{name}"] == "" for row in rows(folder, "metrics.csv") for name in MORE)
    assert not any(name in key for key in summary_of(folder) for name in MORE)
    assert not (folder / "clients.csv").exists()


def test_clients_score_the_last_model_and_the_ledger_has_what_that_costs(learnt):
    asked = rows(learnt, "clients.csv")
    assert [(row["round"], row["client"]) for row in asked] == [("2", str(peer)) for peer in range(4)]
    assert all(float(row[f"eval_{name}"]) == 1.0 for row in asked for name in MORE)
    booked = [row for row in rows(learnt, "ledger.csv") if row["part"] == "evaluate"]
    assert [(row["round"], row["direction"]) for row in booked] == [("2", "down")] * 4 + [("2", "up")] * 4
    assert all(int(row["wire_bytes"]) > 0 for row in booked)


@pytest.mark.parametrize("method", ["fedit", "flora"])
def test_asking_clients_changes_nothing_but_what_is_known(small_run, method):
    folders = [small_run(f"method={method}", f"evaluate.peers={peers}", name=peers) for peers in ("none", "every")]
    assert [row["round"] for row in rows(folders[1], "clients.csv")] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert len({summary_of(folder)["state_sha256"] for folder in folders}) == 1
    assert len({(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders}) == 1
    assert len({tuple(row["eval_loss"] for row in rows(folder, "metrics.csv")) for folder in folders}) == 1


def test_a_resumed_run_asks_after_its_own_last_round(small_run):
    """One that is given more rounds has asked before, after what was the last then."""
    whole = small_run("evaluate.peers=last", name="whole", rounds=3)
    parts = small_run("evaluate.peers=last", name="parts", rounds=1)
    with (parts / "clients.csv").open("a") as stream:
        stream.write("2,0,1.0,0.5,9,,,\n")  # of a round that was not finished
    run_local(small("evaluate.peers=last", "rounds=3", out=parts), resume=str(parts))
    last = rows(whole, "clients.csv")
    assert {row["round"] for row in last} == {"3"}
    assert [row for row in rows(parts, "clients.csv") if row["round"] != "1"] == last
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]


def test_a_device_that_can_take_no_part_is_not_asked(small_run, devices):
    able, unable = "a,1e9,,,,1e9,true,1\n", "b,1e9,,,,10,true,1\n"
    folder = small_run(*devices(able + able + unable), "population.cohort=2", "method=fedpipe", "evaluate.peers=every")
    assert [(row["round"], row["client"]) for row in rows(folder, "clients.csv")] == [
        (str(number), str(peer)) for number in range(3) for peer in range(2)
    ]


def test_clients_need_data_to_score_with():
    with pytest.raises(ConfigError, match=r"evaluate.peers=last: data.client_heldout=0 leaves clients nothing"):
        compose(["model=tiny", "data.client_heldout=0", "evaluate.peers=last"])
    with pytest.raises(ConfigError, match="expected none, last, every"):
        compose(["model=tiny", "evaluate.peers=first"])


def test_a_method_with_models_of_clients_answers_there(capsys, shared_run, questions):
    folder = shared_run(*learning(questions, "method=fedsa_lora"))
    own = [row for row in rows(folder, "clients.csv") if row["round"] == "2"]
    assert len(own) == 4
    last = rows(folder, "metrics.csv")[-1]
    assert 0 < float(last["eval_rouge_l"]) <= 1
    assert float(last["eval_rouge_l"]) == pytest.approx(sum(float(row["eval_rouge_l"]) for row in own) / 4)
    assert "is in the run's clients.csv" in refused(capsys, folder)


def test_the_command_finds_what_the_run_did(capsys, tmp_path, learnt):
    found, printed = evaluated(capsys, tmp_path, learnt, "--clients")
    last = rows(learnt, "metrics.csv")[-1]
    assert found["heldout"]["loss"] == float(last["eval_loss"])
    assert [found["heldout"][name] for name in MORE] == [1.0, 1.0, 1.0]
    for row in rows(learnt, "clients.csv"):
        own = found["clients"][row["client"]]
        assert (own["loss"], own["accuracy"]) == (float(row["eval_loss"]), float(row["eval_accuracy"]))
    losses = [own["loss"] for own in found["clients"].values()]
    assert found["mean"]["loss"] == pytest.approx(sum(losses) / 4)  # all have as many samples
    table = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert table["worst"][1] == f"{max(losses):.4f}"
    assert table["best"][1] == f"{min(losses):.4f}"
    assert table["held-out"][-3:] == ["1.0000"] * 3


SEEDED = ("method=fedkseed", "codec=raw", "method.strategy.directions=64", "method.strategy.rules.local_steps=4")


@pytest.mark.parametrize(
    "words",
    [("method=flora",), SEEDED, ("method=full_delta",), ("adapter=prompt_tuning",), ("adapter=prefix_tuning",)],
    ids=lambda words: words[0].split("=")[1],
)
def test_whatever_the_model_is_made_of(capsys, tmp_path, shared_run, words):
    folder = shared_run(*words, "train.lr=0.02", "evaluate.generate=2", "evaluate.max_new_tokens=4")
    found, _ = evaluated(capsys, tmp_path, folder)
    last = rows(folder, "metrics.csv")[-1]
    assert found["heldout"]["loss"] == float(last["eval_loss"])
    assert (found["heldout"]["answers"], found["heldout"]["rouge_l"]) == (2, float(last["eval_rouge_l"]))
    if (file := folder / "model.fedtune").exists():
        assert evaluated(capsys, tmp_path, file)[0]["heldout"] == found["heldout"]


def test_other_data_limits_and_numbers_of_answers(capsys, tmp_path, learnt):
    other = tmp_path / "other.jsonl"
    lines = [{"question": f"is {n}?", "choices": ["it is", "never"], "answer": n % 2} for n in range(6)]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, _ = evaluated(capsys, tmp_path, learnt, "--data", other, "--generate", 0)
    assert (found["heldout"]["choice_accuracy"], found["heldout"]["questions"]) == (0.5, 6)
    assert (found["heldout"]["rouge_l"], found["heldout"]["answers"]) == (None, 0)
    found, _ = evaluated(capsys, tmp_path, learnt, "--data", other, "--generate", 5, "--limit", 4)
    assert (found["heldout"]["questions"], found["heldout"]["answers"]) == (4, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/no/such"], "/no/such does not exist"),
        (["RUN", "--data", "/no/such.jsonl"], "data.path=/no/such.jsonl does not exist"),
        (["RUN", "--data", "x.jsonl", "--clients"], "--clients is about the run's own division"),
        (["RUN", "--tasks", "x", "--include-path", "/no/such"], "--include-path /no/such is no folder"),
        (["RUN", "--generate", "-1"], "evaluate.generate=-1 is too small"),
        (["RUN", "--limit", "2", "--out", "/no/such/file"], "--out /no/such/file can't be written"),
    ],
)
def test_what_can_not_be_evaluated_is_one_message(capsys, learnt, words, said):
    assert said in refused(capsys, *[learnt if word == "RUN" else word for word in words])


def test_without_the_harness_tasks_are_refused_with_the_way_out(capsys, learnt, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "not installed: pip install lm-eval==" in refused(capsys, learnt, "--tasks", "arc_easy")


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: {kind}
doc_to_text: "<|user|>{{{{question}}}}<|end|><|assistant|>"
target_delimiter: ""
"""
CHOICES = "doc_to_choice: choices\ndoc_to_target: right\nmetric_list: [{metric: acc}]\n"
ANSWERS = """\
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["<|end|>"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "prompt_tuning"])
def test_the_harness_finds_the_same(capsys, tmp_path, shared_run, questions, learnt, adapter, monkeypatch):
    """A task of the same questions in the same words: its acc is our choice accuracy, its exact match ours."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = learnt if adapter == "lora" else shared_run(*learning(questions, f"adapter={adapter}"), rounds=1)
    data = tmp_path / "tasks.jsonl"
    lines = [
        {"question": f"is {'x' * n} a number?", "choices": ["it is", "never"][:: (-1) ** n], "right": n % 3 % 2}
        for n in range(10)
    ]
    data.write_text("".join(json.dumps({**line, "answer": line["right"]}) + "\n" for line in lines))
    (tmp_path / "choose.yaml").write_text(TASK.format(name="choose", data=data, kind="multiple_choice") + CHOICES)
    (tmp_path / "answer.yaml").write_text(TASK.format(name="answer", data=data, kind="generate_until") + ANSWERS)
    words = (folder, "--data", data, "--generate", 10, "--tasks", "choose,answer", "--include-path", tmp_path)
    found, printed = evaluated(capsys, tmp_path, *words)
    assert found["tasks"]["choose"]["acc,none"] == pytest.approx(found["heldout"]["choice_accuracy"])
    assert found["tasks"]["answer"]["exact_match,none"] == pytest.approx(found["heldout"]["exact_match"])
    assert 0 < found["heldout"]["choice_accuracy"] < 1
    assert "acc,none" in printed
    if adapter == "lora":
        assert 0 < found["heldout"]["exact_match"] < 1


def test_means_are_weighted_by_samples_over_those_that_have_the_figure():
    """Exact match (30 * 1 + 10 * 0) / 40 = 0.75; choices of client 9 alone, though it has the fewest samples."""
    scores = {
        7: Score(2.0, 0.5, 1, exact_match=1.0, rouge_l=0.5, answers=2),
        8: Score(4.0, 0.1, 9, exact_match=0.0, rouge_l=0.1, answers=5),
        9: Score(3.0, 0.2, 5, choice_accuracy=0.25, questions=4),
    }
    found = mean_score({7: 30, 8: 10, 9: 1}, scores)
    assert (found.exact_match, found.rouge_l) == (0.75, pytest.approx(0.4))
    assert (found.choice_accuracy, found.questions, found.answers, found.tokens) == (0.25, 4, 7, 15)
    assert found.loss == pytest.approx((60 + 40 + 3) / 41)


SHARE = st.floats(0, 1)


@given(st.floats(0, 50), SHARE, st.integers(1, 9), st.none() | st.tuples(SHARE, SHARE), st.none() | SHARE)
def test_scores_cross_the_wire_as_they_are(loss, accuracy, tokens, answered, chosen):
    score = Score(
        loss, accuracy, tokens, *(answered or (None, None)), 3 if answered else 0, chosen, 0 if chosen is None else 2
    )
    assert wire.unpack_score(wire.pack_score(score)) == score


@pytest.mark.parametrize(
    "lie",
    [
        {"exact_match": 1.5},
        {"exact_match": math.nan},
        {"exact_match": -0.1},
        {"exact_match": 1},
        {"rouge_l": math.inf},
        {"rouge_l": None},
        {"answers": 0},
        {"answers": None},
        {"answers": 2.0},
        {"choice_accuracy": 1.01},
        {"choice_accuracy": [0.5, 0.5]},
        {"questions": -3},
        {"questions": None},
        {"bonus": 1.0},
        {"x" * 10000: 1.0},
    ],
    ids=str,
)
def test_a_figure_that_can_not_be_is_refused(lie):
    honest = dict(wire.pack_score(FULL)["metrics"])
    told = {name: value for name, value in {**honest, **lie}.items() if value is not None}
    with pytest.raises(WireError, match=r"expected how many|is not known") as error:
        wire.unpack_score(RecordDict({"metrics": MetricRecord(told)}))
    assert len(str(error.value)) < 300
