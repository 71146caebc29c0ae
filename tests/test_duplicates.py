"""Rows that say the same: what is held out is not trained on, however often the data repeat themselves."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import rows, small, summary_of
from hypothesis import given
from hypothesis import strategies as st

from fedtune.commands.evaluate import Request, evaluate
from fedtune.commands.plan import plans
from fedtune.config.compose import CONF, compose
from fedtune.config.schema import DataSpec
from fedtune.core.caches import sharing
from fedtune.core.errors import ConfigError, DataError, FedtuneError
from fedtune.data.corpus import Corpus
from fedtune.data.duplicates import distinct, groups, hold_out, texts
from fedtune.data.federated_data import FederatedData, load_data
from fedtune.data.sources import Example, load_examples
from fedtune.models.tiny import tiny_tokenizer
from fedtune.runtime.local import run_local
from fedtune.workspace.workspace import Workspace

TOKENIZER = tiny_tokenizer()


def written(path, pairs):
    """A file of (prompt, completion) or (prompt, completion, label)."""
    lines = (json.dumps(dict(zip(("prompt", "completion", "by"), map(str, pair), strict=False))) for pair in pairs)
    path.write_text("\n".join(lines) + "\n")
    return path


def spoken(data, row):
    """What row number `row` asks and answers."""
    text = TOKENIZER.decode(data.corpus.span(row)[0])
    prompt, _, answer = text.partition("<|assistant|>")
    return prompt.removeprefix("<|user|>").removesuffix("<|end|>"), answer.removesuffix("<|end|>")


def all_of(parts):
    return np.concatenate([np.zeros(0, np.int64), *parts])


def leaks(data):
    """Held-out rows, the server's and the clients', whose prompt or text some client trains on; by their words."""
    trained = {spoken(data, row) for row in all_of(data.train)}
    prompts = {prompt.casefold() for prompt, _ in trained}
    return [
        [row for row in held if spoken(data, row) in trained or spoken(data, row)[0].casefold() in prompts]
        for held in (data.server, all_of(data.heldout))
    ]


@st.composite
def corpora(draw):
    """Rows with few prompts and fewer answers, so that many repeat others; and how they are divided."""
    prompts, answers = draw(st.integers(3, 12)), draw(st.integers(1, 4))
    row = st.tuples(st.integers(0, prompts), st.integers(0, answers), st.booleans())
    # The label follows from the answer, so that a text has one; half of the prompts differ in upper case alone
    pairs = [(f"{'P' if upper else 'p'}{prompt}", f"a{answer}", answer) for prompt, answer, upper in draw(
        st.lists(row, min_size=25, max_size=60)
    )]  # fmt: skip
    spec = DataSpec(
        partition=draw(st.sampled_from(["iid", "dirichlet", "linear"])),
        partition_by="by",
        alpha=draw(st.sampled_from([0.1, 10.0])),
        heldout=draw(st.sampled_from([0.0, 0.1, 0.3])),
        client_heldout=draw(st.sampled_from([0.0, 0.2, 0.4])),
        duplicates=draw(st.sampled_from(["drop", "keep"])),
    )
    return pairs, spec, draw(st.integers(1, 4)), draw(st.integers(0, 5))


@pytest.mark.slow
@given(corpora())
def test_no_prompt_stands_on_both_sides_of_a_split(tmp_path_factory, drawn):
    pairs, spec, clients, seed = drawn
    spec = replace(spec, path=str(written(tmp_path_factory.mktemp("rows") / "a.jsonl", pairs)))
    try:
        data = load_data(spec, clients, TOKENIZER, seed)
    except FedtuneError as error:  # few distinct rows are left of some
        if "too few for" in str(error) or "does not work for" in str(error):
            return
        raise
    parts = [data.server, *data.train, *data.heldout]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(data.corpus)))
    assert (len(data.train), len(data.heldout)) == (clients, clients)
    assert all(len(train) for train, own in zip(data.train, data.heldout, strict=True) if len(own))
    again = load_data(spec, clients, TOKENIZER, seed)
    assert again.identity == data.identity
    assert len(data.corpus) == (len(pairs) if spec.duplicates == "keep" else len(set(pairs)))
    assert (data.distinct, data.repeated) == (len(set(pairs)), len(pairs) - len(data.corpus))
    assert data.in_training == (0, 0)
    common = Counter(spoken(data, row)[0].casefold() for row in range(len(data.corpus))).most_common(1)[0][1]
    if 2 * common <= len(data.corpus):
        assert leaks(data) == [[], []]
    # Of every label something is left for the clients
    labels = [spoken(data, row)[1] for row in range(len(data.corpus))]
    assert {labels[row] for row in all_of([*data.train, *data.heldout])} == set(labels)
    held = sum(map(len, data.heldout))
    assert data.asked[0] == round(spec.heldout * len(data.corpus))
    assert len(data.server) <= 2 * data.asked[0]
    assert held <= 2 * data.asked[1]


@given(st.data())
def test_groups_are_held_out_whole_and_up_to_the_quota(drawn):
    """No group is split, nobody is more than its quota beyond its quota, of every kind something is left, and no group
    that is left would have fitted. Where each row is a group of its own and of one kind, the quota is met exactly."""
    count = drawn.draw(st.integers(1, 40))
    column = st.lists(st.integers(0, 7), min_size=count, max_size=count)
    single = drawn.draw(st.booleans())
    group = np.arange(count) if single else np.array(drawn.draw(column))
    owner = [number % 3 for number in drawn.draw(column)]
    kind = [0] * count if single else drawn.draw(column)
    quota = {who: drawn.draw(st.integers(0, 10)) for who in range(3)}
    order = np.array(drawn.draw(st.permutations(range(count))))
    aside = hold_out(order, group, owner, quota, kind)
    assert len(np.unique(aside)) == len(aside)
    left = np.setdiff1d(order, aside)
    assert not set(group[aside]) & set(group[left])
    held, remaining = Counter(owner[row] for row in aside), Counter(kind[row] for row in left)
    assert all(held[who] <= 2 * quota[who] for who in quota)
    assert all(remaining[what] for what in kind)
    for number in set(group[left]):
        mine = [row for row in left if group[row] == number]
        owned, kinds = Counter(owner[row] for row in mine), Counter(kind[row] for row in mine)
        room = all(count <= quota[who] - held[who] for who, count in owned.items())
        assert not (room and all(count < remaining[what] for what, count in kinds.items()))
    if single:
        wanted = {who: min(quota[who], owner.count(who)) for who in quota}
        assert all(held[who] == wanted[who] for who in quota) or len(left) == 1


def test_the_row_with_the_rarest_label_stays():
    """Of texts 0 0 1 1 with labels x y x x: y's only row stays for the first text, the first row for the second."""
    assert distinct(np.array([0, 0, 2, 2]), ["x", "y", "x", "x"]).tolist() == [1, 2]


def turns(*said):
    roles = ("user", "assistant")
    return Example(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(said)), "", {})


def test_what_a_prompt_is():
    """White space and upper case apart; a dialogue belongs with what it begins with; plain text is its own prompt."""
    examples = [
        turns("Tell me a joke", "one"), turns(" tell me\na JOKE", "two"),
        turns("tell me a joke", "one", "more", "three"),
        turns("other", "one"), Example((), "Once  upon", {}), Example((), "once upon", {}), Example((), "twice", {}),
    ]  # fmt: skip
    assert groups(examples, np.arange(7)).tolist() == [0, 0, 0, 1, 2, 2, 3]


def test_a_prompt_that_most_rows_share_tells_nothing():
    """Three of five rows have one prompt: they are told apart by their texts, of which the last two are the same."""
    examples = [turns("write", "a"), turns("write", "b"), turns("write", "b"), turns("x", "c"), turns("x", "d")]
    assert groups(examples, np.array([0, 1, 1, 3, 4])).tolist() == [0, 1, 1, 2, 2]


def test_what_leaks_is_counted():
    """Rows 0 ... 5 say a b a c b a. The server holds 0 and 3 out, the clients 4 and 5; 1 and 2 are trained on. Of the
    server's, 0 stands in training data; of the clients', both do."""
    said = np.array([7, 8, 7, 9, 8, 7], dtype=np.int32)
    corpus = Corpus(said, np.ones(6, bool), np.arange(7))
    train, own = (np.array([1]), np.array([2])), (np.array([4]), np.array([5]))
    data = FederatedData(corpus, train, own, np.array([0, 3]), 0, 0)
    assert texts(corpus).tolist() == [0, 1, 0, 3, 1, 0]
    assert (data.in_training, data.pooled().in_training) == ((1, 2), (1, 2))
    assert "2 rows by the server, 2 by clients; 1 and 2 of them stand in training data" in data.describe(DataSpec())[1]


@pytest.mark.slow
def test_the_defaults_leak_nothing():
    """Every experiment of conf/, by its words as well as by its own count."""
    named = (f"experiment={file.stem}" for file in (CONF / "experiment").glob("*.yaml"))
    experiments = [compose([word]) for word in ("rounds=1", *named)]
    several = {
        (json.dumps(vars(spec)), clients): (spec, clients)
        for spec, clients in ((e.data, e.population.pooled or e.population.clients) for e in experiments)
    }
    with sharing():
        for spec, clients in several.values():
            data = load_data(spec, clients, TOKENIZER, 0)
            assert data.in_training == (0, 0)
            assert leaks(data) == [[], []]
            assert len(data.server) == round(spec.heldout * len(data.corpus))


REPEATED = [(f"p{n}", f"a{n % 7}") for n in range(40)] + [("p0", "a0")] * 30


@pytest.mark.parametrize(("duplicates", "examples"), [("drop", 40), ("keep", 70)])
def test_a_run_says_how_many_rows_repeat_others_and_what_leaks(tmp_path, small_run, capsys, duplicates, examples):
    path = written(tmp_path / "a.jsonl", REPEATED)
    said = summary_of(small_run(f"data.path={path}", f"data.duplicates={duplicates}", rounds=1))["data"]
    assert (said["rows"], said["distinct"], said["examples"]) == (70, 40, examples)
    assert said["duplicates_dropped"] == 70 - examples
    assert (said["heldout_in_training"], said["client_heldout_in_training"]) == (0, 0)
    out = capsys.readouterr().out
    assert out.count("30 of 70 rows say what another says, word for word") == 1
    assert "0 and 0 of them stand in training data word for word" in out


def test_what_can_not_be_held_out_is_said(tmp_path):
    """Two prompts of 20 rows each: no whole one is as few as the 4 rows that a tenth comes to."""
    path = written(tmp_path / "a.jsonl", [(f"p{n % 2}", n) for n in range(40)])
    spec = DataSpec(path=str(path))
    data = load_data(spec, 2, TOKENIZER, 0)
    assert len(data.server) == 0
    assert any("data.heldout=0.1 asks for 4 rows, and 0 are held out" in line for line in data.describe(spec))


def test_four_rows_are_enough_for_four_clients(tmp_path):
    spec = DataSpec(path=str(written(tmp_path / "a.jsonl", [(n, n) for n in range(4)])), heldout=0.0)
    data = load_data(spec, 4, TOKENIZER, 0)
    assert sorted(map(len, data.train)) == [1] * 4
    with pytest.raises(DataError, match=r"4 examples, 1 of them the server's own .* are too few for 4 clients"):
        load_data(replace(spec, heldout=0.25), 4, TOKENIZER, 0)
    with pytest.raises(DataError, match="4 examples are too few for 5 clients"):
        load_data(spec, 5, TOKENIZER, 0)


PAIRS = [(f"p{n}", f"a{n}", n % 2) for n in range(40)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (PAIRS[:20], "its data are 20 examples and were 40"),
        ([("p0", "edited", 0), *PAIRS[1:]], "its data are 40 examples with other tokens"),
        ([(prompt, answer, n < 20) for n, (prompt, answer, _) in enumerate(PAIRS)], "divided otherwise than they were"),
    ],
)
def test_other_data_are_no_continuation(tmp_path, small_run, changed, said):
    path = written(tmp_path / "a.jsonl", PAIRS)
    words = (f"data.path={path}", "data.partition=dirichlet", "data.partition_by=by")
    folder = small_run(*words, rounds=1)
    written(path, changed)
    with pytest.raises(DataError, match=said):
        run_local(small(*words, "rounds=2", out=folder), resume=str(folder))
    with pytest.raises(DataError, match=said):
        evaluate(Request(str(folder)))
    written(path, [*PAIRS, PAIRS[0]])  # says nothing new
    run_local(small(*words, "rounds=3", out=folder), resume=str(folder))
    assert summary_of(folder)["rounds"] == 3


@pytest.fixture
def skewed(tmp_path):
    """800 rows with 20 labels, and words that divide them by alpha 0.01."""
    path = written(tmp_path / "skewed.jsonl", [(f"p{n}", f"a{n}", n % 20) for n in range(800)])
    return (
        f"data.path={path}", "data.partition=dirichlet", "data.partition_by=by", "data.alpha=0.01", "train.steps=1",
    )  # fmt: skip


def divided(words, clients):
    return load_data(compose([*words]).data, clients, TOKENIZER, 0)


def asked_of(folder):
    return {int(row["client"]) for row in rows(folder, "ledger.csv") if row["part"] != "handshake"}


def test_clients_without_rows_are_never_asked(skewed, small_run, capsys):
    """alpha 0.01 over 200 clients, all that have rows in each round and all of them needed: the others answer the
    handshake and no more."""
    words = ("population.clients=200", "population.cohort=200", "population.quorum=1.0", "evaluate.peers=last")
    folder = small_run(*skewed, *words, rounds=1)
    idle = divided(skewed, 200).idle
    assert 50 < len(idle) < 150
    assert f"{len(idle)} of 200 clients have no rows, and are never asked" in capsys.readouterr().out
    assert asked_of(folder) == set(range(200)) - set(idle)
    assert int(rows(folder, "metrics.csv")[1]["clients"]) == 200 - len(idle)
    assert rows(folder, "failures.csv") == []
    assert summary_of(folder)["data"]["clients_without_rows"] == len(idle)


@pytest.mark.parametrize(
    "words",
    [
        ("population.selection=power_of_choice", "population=mixed"),
        ("method=fedasync", "population=mixed"),
        ("method=local_only", "data.client_heldout=0.3"),
    ],
)
def test_other_rounds_do_without_them_as_well(skewed, small_run, words):
    folder = small_run(*skewed, *words, "population.clients=60", "population.cohort=10", rounds=1)
    idle = set(divided(skewed, 60).idle)
    assert len(idle) > 5
    assert asked_of(folder)
    assert not asked_of(folder) & idle
    assert rows(folder, "failures.csv") == []


def test_what_they_would_have_had_is_trained_on_centrally(skewed, small_run):
    folder = small_run(*skewed, "population.clients=60", "method=centralized", rounds=1)
    assert summary_of(folder)["data"]["train"] == sum(map(len, divided(skewed, 60).train))


def test_a_client_without_rows_that_is_asked_says_so(skewed):
    data = divided(skewed, 60)
    with pytest.raises(DataError, match=rf"client {data.idle[0]} has no rows to train on"):
        data.batches(data.idle[0], 4, 0)


@pytest.mark.slow
def test_the_plan_leaves_them_out(skewed):
    workspace = Workspace(compose(["model=tiny", *skewed, "population.clients=60", "population=phones"]))
    planned, trouble = plans(workspace)
    assert trouble is None
    idle = [one.peer.index for one in planned if one.reason == "has no rows to train on"]
    assert idle == workspace.data.idle


def test_a_minimum_of_rows_that_was_asked_for_is_kept_or_refused(skewed):
    """The user's own min_partition_size is no setting to fall back from."""
    with pytest.raises(ConfigError, match="does not work for"):
        divided((*skewed, "data.partition_options={min_partition_size: 1}"), 200)


def test_the_sample_corpus_is_897_pairs():
    pairs = {tuple(turn["content"] for turn in example.messages) for example in load_examples(DataSpec("chatterbot"))}
    assert len(pairs) == 897
