"""Data: every format and column style comes out as the same conversation, every fault names file and line."""

import csv
import json
from collections import defaultdict

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import many
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.compose import compose
from fedtune.config.schema import DataSpec
from fedtune.core.errors import ConfigError, DataError, FedtuneError
from fedtune.data.federated_data import load_data
from fedtune.data.sources import load_examples
from fedtune.data.tokenisation import tokenise
from fedtune.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = {
    "prompt and completion": {"prompt": "2+2?", "completion": "4"},
    "messages": {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    "instruction": {"instruction": "2+2?", "output": "4"},
    "conversational prompt": {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": "4"}],
    },
}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, flat[0])
            writer.writeheader()
            writer.writerows(flat)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def load(path, **settings):
    """The rows as they stand, repeated or not: these files have the same row several times."""
    return load_data(DataSpec(path=str(path), **{"duplicates": "keep", **settings}), 2, TOKENIZER, 0)


def spoken(corpus, row):
    """A corpus row as text, and the part of it that is learnt."""
    batch = corpus.batch([row], TOKENIZER.pad_token_id)
    return TOKENIZER.decode(batch.tokens[0]), TOKENIZER.decode(batch.tokens[0][batch.targets[0]])


@pytest.mark.parametrize(
    ("ending", "style"),
    [
        (ending, style)
        for ending in (".jsonl", ".json", ".csv", ".parquet")
        for style in ROWS
        if (ending, style) != (".csv", "conversational prompt")  # a cell is text there, whatever it looks like
    ],
)
def test_every_format_and_column_style_is_read_alike(tmp_path, ending, style):
    data = load(write(tmp_path / f"data{ending}", [ROWS[style]] * 8))
    assert len(data.corpus) == 8
    assert spoken(data.corpus, 0) == ("<|user|>2+2?<|end|><|assistant|>4<|end|>", "4<|end|>")


def test_input_is_part_of_the_instruction_where_there_is_one(tmp_path):
    rows = [
        {"instruction": "Add", "input": "2 2", "output": "4"},
        {"instruction": "Add", "input": "", "output": "4"},
    ] * 4
    corpus = load(write(tmp_path / "a.jsonl", rows)).corpus
    assert spoken(corpus, 0)[0] == "<|user|>Add\n\n2 2<|end|><|assistant|>4<|end|>"
    assert spoken(corpus, 1)[0] == "<|user|>Add<|end|><|assistant|>4<|end|>"


def test_all_assistant_turns_are_learnt_and_nothing_else(tmp_path):
    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in talk]}
    text, learnt = spoken(load(write(tmp_path / "a.jsonl", [row] * 4)).corpus, 0)
    assert text == "<|system|>s<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>d<|end|>"
    assert learnt == "b<|end|>d<|end|>"


def test_loss_on_all_learns_the_prompt_too(tmp_path):
    corpus = load(write(tmp_path / "a.jsonl", [ROWS["messages"]] * 4), loss_on="all").corpus
    assert spoken(corpus, 0)[1] == "<|user|>2+2?<|end|><|assistant|>4<|end|>"


def test_plain_text_is_learnt_whole_and_ended(tmp_path):
    assert spoken(load(write(tmp_path / "a.jsonl", [{"text": "once"}] * 4)).corpus, 0) == ("once<|end|>", "once<|end|>")


def test_columns_of_ones_own(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "2+2?", "answer": "4", "text": "x"}] * 4)
    corpus = load(path, prompt_column="question", completion_column="answer").corpus
    assert spoken(corpus, 0)[1] == "4<|end|>"


def test_without_a_chat_template_prompt_and_answer_are_lines():
    plain = tiny_tokenizer()
    plain.chat_template = None
    examples = load_examples(DataSpec(name="chatterbot"))[:1]
    corpus, _ = tokenise(examples, plain, DataSpec())
    question, answer = (turn["content"] for turn in examples[0].messages)
    assert spoken(corpus, 0) == (f"{question}\n{answer}<|end|>", f"{answer}<|end|>")


def test_a_template_whose_generation_prompt_is_no_prefix_is_cut_where_they_part():
    thinking = tiny_tokenizer()
    thinking.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think></think>{% endif %}"
    )
    corpus, _ = tokenise(load_examples(DataSpec(name="chatterbot"))[:1], thinking, DataSpec())
    assert spoken(corpus, 0)[1].startswith("Artificial Intelligence")


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    forgetful = tiny_tokenizer()
    forgetful.chat_template = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %};{% endfor %}"
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in talk]}
    spec = DataSpec(path=str(write(tmp_path / "a.jsonl", [row] * 4)))
    with pytest.raises(DataError, match="renders earlier turns differently"):
        tokenise(load_examples(spec), forgetful, spec)


def test_long_examples_are_cut_and_those_with_nothing_left_to_learn_dropped(tmp_path):
    rows = [{"prompt": "p" * 50, "completion": "c"}, *[{"prompt": "p", "completion": "c" * 50}] * 4]
    data = load(write(tmp_path / "a.jsonl", rows), max_length=20)
    assert (len(data.corpus), data.dropped) == (4, 1)
    assert all(data.corpus.length(row) == 20 for row in range(4))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n',
            "a.jsonl line 3: expected columns 'messages'",
        ),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt":', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl line 1 should be an object"),
        ("a.jsonl", '{"prompt": 1, "completion": "b"}\n', "column 'prompt' should be text, got int"),
        ("a.jsonl", '{"messages": "hello"}\n', "column 'messages' should be a list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "column 'messages' should be a list"),
        ("a.jsonl", "", "no usable rows"),
        ("a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", '{"prompt": "a"', "a.json is not JSON"),
        ("a.json", '"text"', "should hold a list"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv line 3: column 'completion' is null or empty"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv line 2 has more cells"),
        ("a.parquet", "nonsense", "a.parquet is not Parquet"),
        (
            "a.docx",
            "x",
            "expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet (and .gz, .bz2, .xz after them), got '.docx'",
        ),
    ],
)
def test_a_fault_names_the_file_and_the_line(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load(path)
    assert said in str(caught.value)


@pytest.mark.slow
@many()
@given(st.binary(max_size=120))
def test_random_bytes_in_a_file_are_refused_or_read_but_never_crash(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    for ending in (".jsonl", ".json", ".csv", ".parquet"):
        path = folder / f"x{ending}"
        path.write_bytes(content)
        try:
            read = load_examples(DataSpec(path=str(path)))
        except FedtuneError:
            continue
        assert all(isinstance(example.text, str) for example in read)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/no/such.jsonl", "does not exist"),
        ("missing.csv", "does not exist"),
        ("some/dataset", "nor to be had from the Hugging Face hub"),
    ],
)
def test_a_source_that_is_not_there_is_named(path, said):
    with pytest.raises(DataError, match=said):
        load_examples(DataSpec(path=path))


CHATTERBOT = compose(["data=chatterbot"]).data


def test_chatterbot_is_about_two_thousand_pairs_in_21_topics():
    examples = load_examples(CHATTERBOT)
    assert 2000 <= len(examples) <= 2100
    assert len({example.columns["topic"] for example in examples}) == 21
    assert all([turn["role"] for turn in example.messages] == ["user", "assistant"] for example in examples)


def divided(clients, **settings):
    return load_data(
        compose(["data=chatterbot", *[f"data.{k}={v}" for k, v in settings.items()]]).data, clients, TOKENIZER, 0
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "clients"),
    [
        ("iid", 7),
        ("dirichlet", 20),
        ("natural", 21),
        ("pathological", 3),
        ("shard", 10),
        ("linear", 8),
        ("square", 5),
        ("exponential", 5),
    ],
)
def test_every_row_has_one_holder(partition, clients):
    data = divided(clients, partition=partition)
    parts = [data.server, *data.train, *data.heldout]
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert len(data.train) == len(data.heldout) == clients
    assert all(len(rows) for rows in data.train)
    if partition not in ("pathological", "shard"):  # those leave out what their classes and shards don't take
        assert len(together) == len(data.corpus)


@pytest.mark.slow
def test_natural_gives_each_client_one_topic():
    data = divided(21, partition="natural")
    topics = defaultdict(set)  # of a text: some stand in the files of two topics, and one row of them stays
    corpus, kept = tokenise(examples := load_examples(CHATTERBOT), TOKENIZER, CHATTERBOT)
    for row, place in enumerate(kept):
        topics[corpus.span(row)[0].tobytes()].add(examples[place].columns["topic"])
    held = [
        set.intersection(*(topics[data.corpus.span(row)[0].tobytes()] for row in (*train, *heldout)))
        for train, heldout in zip(data.train, data.heldout, strict=True)
    ]
    assert all(len(found) == 1 for found in held)
    assert len(set.union(*held)) == 21


@pytest.mark.slow
def test_a_division_follows_from_the_seed():
    spec = CHATTERBOT
    one, again, other = (load_data(spec, 5, TOKENIZER, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one.train, again.train, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one.train, other.train, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "clients", "error", "said"),
    [
        ({"partition": "natural"}, 10, ConfigError, "makes 21 clients, not 10: set population.clients=21"),
        ({"partition": "foo"}, 10, ConfigError, "data.partition=foo is not known"),
        (
            {"partition_by": "colour"},
            10,
            ConfigError,
            "data.partition_by=colour: no such column in every row; there are topic",
        ),
        ({"partition_by": "null"}, 10, ConfigError, "goes by a column: set data.partition_by="),
        ({"partition": "pathological", "classes": 30}, 10, ConfigError, "does not work for"),
        ({"partition_options": "{wrong: 1}"}, 5, ConfigError, "wrong"),
        ({"partition": "iid"}, 3000, DataError, "too few for 3000 clients"),
        ({"max_length": 4}, 5, DataError, "cuts every example"),
    ],
)
def test_a_division_that_does_not_work_says_what_would(settings, clients, error, said):
    with pytest.raises(error) as caught:
        divided(clients, **settings)
    assert said in str(caught.value)


@pytest.mark.slow
def test_batches_pass_over_all_rows_before_any_comes_again():
    data = divided(5, partition="iid")
    batches = iter(data.batches(0, 4, key=1))
    count = len(data.train[0])
    seen = [tuple(row.tolist()) for _ in range(count // 4) for row in next(batches).tokens]
    whole = {tuple(data.corpus.batch([row], data.pad).tokens[0].tolist()) for row in data.train[0]}
    stripped = [tuple(token for token in row if token != data.pad) for row in seen]
    assert len(stripped) == count // 4 * 4
    assert set(stripped) <= {tuple(token for token in row if token != data.pad) for row in whole}
    again = iter(data.batches(0, 4, key=1))
    assert next(again).tokens.equal(next(iter(data.batches(0, 4, key=1))).tokens)


@pytest.mark.slow
def test_a_client_with_fewer_rows_than_a_batch_gets_small_batches():
    data = divided(500, partition="iid")
    assert next(iter(data.batches(0, 64, key=1))).tokens.shape[0] == len(data.train[0])
