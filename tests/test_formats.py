"""Files as people have them: each format, each way to name columns, and each fault by file and line."""

import bz2
import gzip
import json
import lzma

import pytest
from conftest import many
from hypothesis import given
from hypothesis import strategies as st
from test_data import TOKENIZER, load, write

from fedtune.config.compose import compose
from fedtune.config.compose import load as load_config
from fedtune.config.schema import DataSpec
from fedtune.core.errors import ConfigError, DataError, FedtuneError
from fedtune.data.federated_data import load_data
from fedtune.data.sources import describe_source, load_examples

ROWS = [{"prompt": f"{n}+{n}?", "completion": str(2 * n)} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def said(path, **spec):
    """What each row of a source asks and answers, and its other columns."""
    found = load_examples(DataSpec(path=path if isinstance(path, list) else str(path), **spec))
    return [tuple(turn["content"] for turn in example.messages) for example in found], [e.columns for e in found]


EXPECTED = [("0+0?", "0"), ("1+1?", "2"), ("2+2?", "4"), ("3+3?", "6")]
COLUMNAR = {"prompt": [row["prompt"] for row in ROWS], "completion": [row["completion"] for row in ROWS]}
CELLS = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]


def joined(delimiter):
    return "".join(delimiter.join(cells) + "\n" for cells in CELLS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.JSONL.GZ", gzip.compress(LINES.encode(), mtime=0)),
        ("a.csv.bz2", bz2.compress(joined(",").encode())),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("A.JSONL", LINES),
        ("a.tsv", joined("\t")),
        ("a.csv", joined(";")),
        ("a.csv", "\ufeff" + joined(";").replace("\n", "\r\n")),
        ("a.Csv", joined("\t")),
        ("a.csv", '"prompt";"completion"\n"0+0?";"0"\n' + joined(";").split("\n", 2)[2]),
        ("a.json", json.dumps(COLUMNAR)),
        ("a.json", json.dumps({"train": ROWS})),
        ("a.json", json.dumps({"train": ROWS, "test": [{"prompt": "x", "completion": "y"}]})),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"train": COLUMNAR, "test": COLUMNAR})),
        ("a.json", json.dumps({key: dict(enumerate(values)) for key, values in COLUMNAR.items()})),
    ],
)
def test_every_kind_of_file_is_read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert said(path)[0] == EXPECTED


def test_rows_by_user_keep_the_user_as_a_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"alice": ROWS[:1] * 4, "bob": ROWS[1:] * 2}))
    turns, columns = said(path)
    assert (turns[0], turns[4:7]) == (EXPECTED[0], EXPECTED[1:])
    assert [row["user"] for row in columns] == ["alice"] * 4 + ["bob"] * 6
    whole = {"duplicates": "keep", "heldout": 0, "client_heldout": 0}
    spec = DataSpec(path=str(path), partition="natural", partition_by="user", **whole)
    assert [len(rows) for rows in load_data(spec, 2, TOKENIZER, 0).train] == [4, 6]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ("q", "a")),
        ({"conversations": [{"role": "Human", "content": "q"}, {"role": "GPT", "content": "a"}]}, ("q", "a")),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}, ("q", "a")),
        ({"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}, ("q", "a")),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ("s", "q", "a"),
        ),
        ({"question": "q", "answer": "a"}, ("q", "a")),
        ({"question": "q", "answer": "a", "text": "q a"}, ("q", "a")),
        ({"question": "q", "context": "c", "answer": "a"}, ("q\n\nc", "a")),
        ({"system_prompt": "s", "question": "q", "response": "a"}, ("s", "q", "a")),
        ({"instruction": "q", "response": "a"}, ("q", "a")),
        ({"instruction": "q", "context": "c", "response": "a"}, ("q\n\nc", "a")),
        ({"instruction": "q", "context": "", "response": "a"}, ("q", "a")),
        ({"prompt": "q", "response": "a"}, ("q", "a")),
        ({"input": "q", "output": "a"}, ("q", "a")),
        ({"prompt": "q", "completion": "a", "messages": None}, ("q", "a")),
        ({"prompt": "q", "completion": 1}, ("q", "1")),
        ({"prompt": "q", "completion": True}, ("q", "true")),
        ({"prompt": "q", "completion": 2.5}, ("q", "2.5")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
            ("q!", "a"),
        ),
    ],
)  # fmt: skip
def test_every_way_to_name_columns(tmp_path, row, expected):
    turns, columns = said(write(tmp_path / "a.jsonl", [{**row, "id": 3}]))
    assert turns == [expected]
    assert {key: value for key, value in columns[0].items() if key != "text"} == {"id": 3}
    roles = [turn["role"] for turn in load_examples(DataSpec(path=str(tmp_path / "a.jsonl")))[0].messages]
    assert roles == [*["system"] * (len(expected) - 2), "user", "assistant"]


def test_a_column_within_a_column_can_be_named(tmp_path):
    rows = [{"q": {"text": f"{n}?"}, "meta": {"src": "ab"[n % 2], "out": {"a": n}}} for n in range(8)]
    path = write(tmp_path / "a.jsonl", rows)
    named = {"prompt_column": "q.text", "completion_column": "meta.out.a"}
    turns, _ = said(path, **named)
    assert turns[3] == ("3?", "3")
    spec = DataSpec(path=str(path), partition="natural", partition_by="meta.src", heldout=0, client_heldout=0, **named)
    assert [len(rows) for rows in load_data(spec, 2, TOKENIZER, 0).train] == [4, 4]
    dotted = write(tmp_path / "b.jsonl", [{"q.text": "x", "completion": "y"}])  # a column of that very name
    assert said(dotted, prompt_column="q.text")[0] == [("x", "y")]


@pytest.mark.parametrize(
    ("labels", "sizes"),
    [
        (["a", "b", None, None], [1, 1, 2]),
        ([1, "1", "b", "b"], [2, 2]),
        ([["x"], ["x"], ["y"], {"z": 1}], [2, 1, 1]),
        ([True, False, False, 0.5], [1, 2, 1]),
        ([3, 1, 1, 3], [2, 2]),
        (["a", "absent", "absent", "a"], [2, 2]),
    ],
)
def test_a_partition_goes_by_labels_of_any_kind(tmp_path, labels, sizes):
    rows = [{**ROWS[n], **({} if label == "absent" else {"label": label})} for n, label in enumerate(labels)] * 3
    spec = DataSpec(
        path=str(write(tmp_path / "a.jsonl", rows)),
        partition="natural",
        partition_by="label",
        duplicates="keep",
        heldout=0,
        client_heldout=0,
    )
    data = load_data(spec, len(sizes), TOKENIZER, 0)
    assert sorted(len(rows) for rows in data.train) == sorted(3 * size for size in sizes)


def test_folders_patterns_and_lists(tmp_path):
    for place, name in enumerate(("b.jsonl", "a.JSONL", "deep/c.jsonl")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(ROWS[place]) + "\n")
    (tmp_path / "README.md").write_text("#")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.jsonl").write_text("nonsense")
    order = [EXPECTED[1], EXPECTED[0], EXPECTED[2]]
    assert said(tmp_path)[0] == order
    assert said(tmp_path / "**" / "*")[0] == order
    assert said(tmp_path / "[bc].json*")[0] == [EXPECTED[0]]
    both = [str(tmp_path / "b.jsonl"), str(tmp_path / "deep")]
    assert said(both)[0] == [EXPECTED[0], EXPECTED[2]]
    experiment = compose(["model=tiny", f"data.path=[{','.join(both)}]"])
    assert experiment.data.path == both
    assert load_config(experiment.text()).data == experiment.data
    assert experiment.data.name == "custom"
    assert describe_source(experiment.data) == ", ".join(f"file:{path}" for path in both)
    (tmp_path / "deep" / "c.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"deep/c.jsonl line 1 is not JSON"):
        said(tmp_path)


def test_a_folder_with_splits_gives_the_one_that_is_asked_for(tmp_path):
    for place, name in enumerate(("train-00000.jsonl", "train-00001.jsonl", "test.jsonl", "validation/x.jsonl")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(ROWS[place]) + "\n")
    assert said(tmp_path)[0] == EXPECTED[:2]
    assert said(tmp_path, split="test")[0] == [EXPECTED[2]]
    assert said(tmp_path, split="val")[0] == [EXPECTED[3]]
    with pytest.raises(DataError, match=r"no files of the split 'other': set data.split= to one of test, train, valid"):
        said(tmp_path, split="other")


def test_folders_that_datasets_saved(tmp_path):
    import datasets

    labels = datasets.ClassLabel(names=["bad", "good"])
    kind = datasets.Features({"text": datasets.Value("string"), "label": labels})
    one = datasets.Dataset.from_dict({"text": ["t", "u"], "label": [1, 0]}, features=kind)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "many")
    named = {"prompt_column": "text", "completion_column": "label"}
    assert said(tmp_path / "one", **named)[0] == [("t", "good"), ("u", "bad")]
    assert said(tmp_path / "many", split="test", **named)[0] == [("t", "good")]
    with pytest.raises(DataError, match=r"many has no split 'dev': set data.split= to one of train, test"):
        said(tmp_path / "many", split="dev", **named)
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="one can't be read as a folder that datasets saved"):
        said(tmp_path / "one", **named)


def turns(*pairs):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": null}', "a.jsonl line 1: column 'completion' is null"),
        ("a.jsonl", '{"question": null, "answer": "b"}', "a.jsonl line 1: column 'question' is null"),
        ("a.jsonl", '{"text": null}', "a.jsonl line 1: column 'text' is null"),
        ("a.jsonl", '{"messages": null}', "a.jsonl line 1: column 'messages' is null"),
        ("a.jsonl", turns(("user", "a"), ("assistant", None)), "turn 2 (assistant): the content is null"),
        ("a.jsonl", '{"prompt": "a\\ud800", "completion": "b"}', "a.jsonl line 1: character 2 of a text is U+D800"),
        ("a.jsonl", turns(("user", "a"), ("assistant", "\udc00x")), "a.jsonl line 1: character 1 of a text is U+DC00"),
        ("a.jsonl", '{"text": "\\ude00"}', "a.jsonl line 1: character 1 of a text is U+DE00, half of a surrogate pair"),
        ("a.json", '[{"prompt": "a", "completion": "\\ud800"}]', "a.json item 1: character 1 of a text is U+D800"),
        ("a.jsonl", turns(("user", "a")), "none of 1 rows has an assistant turn"),
        ("a.jsonl", turns(("alice", "a"), ("bob", "b")), "the roles found are alice, bob; expected user and assistant"),
        ("a.jsonl", turns(("user", [{"type": "image_url"}])), "turn 1: a part of its content is of type image_url"),
        ("a.jsonl", turns(("user", [7])), "turn 1: a part of its content is of type int"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "tool_calls' has no function name"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": 7}]}', "'tool_calls' should be a list"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "tools": 7}', "'tools' should be a list, got int"),
        ("a.json", '{"prompt": ["a", "b"], "completion": ["c"]}', "unequal length: 'prompt' has 2, 'completion' has 1"),
        ("a.json", '{"test": [{"text": "a"}]}', "a.json has no split 'train': set data.split= to one of test"),
        ("a.json", '{"text": "a"}\n{"text": ', "a.json line 2 is not JSON"),
        ("a.jsonl.gz", b"no gzip", "is damaged, or not .gz"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:40], "is damaged, or not .gz"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:60], "is damaged, or not .xz"),
        ("a.jsonl.bz2", b"BZh9nonsense", "a.jsonl.bz2"),
        ("a.parquet.gz", b"", "expected one of .jsonl, .ndjson"),
    ],
)  # fmt: skip
def test_a_fault_names_the_file_and_the_line(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load(path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{folder}", "is a folder without data: expected files that end in .jsonl"),
        ("{folder}/*.jsonl", "matches no file that ends in .jsonl"),
        ("{folder}/a.jsonl.gz", "does not exist: expected a file"),
        ("{folder}/a.NDJSON", "does not exist: expected a file"),
    ],
)
def test_a_source_that_is_not_there_is_named(tmp_path, path, expected):
    with pytest.raises(DataError, match=expected):
        said(path.format(folder=tmp_path))


@pytest.mark.parametrize("path", [[], {"a": 1}, [1], ["a.jsonl", None]])
def test_a_path_is_a_word_or_a_list_of_words(path):
    with pytest.raises(ConfigError, match=r"data.path=.*: expected a file, a folder, a pattern, a hub id, or a list"):
        DataSpec(path=path)
    assert compose(["model=tiny", "data.path=2024"]).data.path == "2024"


TURN = ["role", "content", "from", "value", "text", "tool_calls", "function", "name"]
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(TURN), inner),
    max_leaves=10,
)  # fmt: skip
COLUMNS = ["messages", "conversations", "prompt", "completion", "question", "answer", "instruction", "input", "output"]


@pytest.mark.slow
@many()
@given(st.dictionaries(st.sampled_from([*COLUMNS, "text", "system", "tools", "choices", "train"]), NESTED, max_size=4))
def test_whatever_stands_in_a_row_or_a_file_is_read_or_refused(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("fuzz") / "a.json"
    for content in (row, [row], {"train": [row]}, {"u": [row], "v": [row]}):
        path.write_text(json.dumps(content))
        try:
            found = load_examples(DataSpec(path=str(path), partition_by="prompt"))
        except FedtuneError:
            continue
        for example in found:
            assert all(
                isinstance(turn["content"], str) and turn["content"].encode() is not None for turn in example.messages
            )


@given(st.binary(max_size=60))
def test_random_bytes_in_compressed_files_are_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.jsonl.gz", "a.csv.bz2", "a.json.xz", "a.tsv"):
        (folder / name).write_bytes(content)
        try:
            load_examples(DataSpec(path=str(folder / name)))
        except FedtuneError:
            continue
