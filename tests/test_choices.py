"""Multiple-choice questions: how they are read, what is learnt of them, and which choice is the likeliest."""

import json

import numpy as np
import pytest
import torch
from conftest import many
from hypothesis import given
from hypothesis import strategies as st
from test_data import TOKENIZER, load, spoken, write
from test_generation import PAD, local

from fedtune.config.schema import DataSpec, EvaluateSpec
from fedtune.core.errors import DataError
from fedtune.data.corpus import Corpus, Question
from fedtune.data.multiple_choice import read_choices
from fedtune.data.sources import load_examples
from fedtune.data.tokenisation import tokenise
from fedtune.evaluation.scoring import choose, evaluate_all
from fedtune.models.tiny import tiny_tokenizer

LIST = ["red", "green", "7", "C"]
ARC = {"text": ["red", "green", "7"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("choices", "answer", "place"),
    [
        (LIST, 2, 2),
        (LIST, "2", 2),
        (LIST, "B", 1),
        (LIST, "b", 1),
        (LIST, "green", 1),
        (LIST, "7", 2),  # a choice's text goes before a place
        (LIST, "C", 3),  # and before a letter
        (LIST, 0, 0),
        (ARC, "1", 0),  # a label, not a place
        (ARC, 3, 2),
        (ARC, "green", 1),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "B", 1),
        ({"text": ["x", "y"], "label": ["A", "B"]}, 0, 0),
        (json.dumps(ARC), "2", 1),
        ([" x ", "y"], "x", 0),
    ],
)
@pytest.mark.parametrize("column", ["answer", "answerKey", "label"])
def test_the_right_choice_is_a_label_a_place_a_text_or_a_letter(choices, answer, place, column):
    assert read_choices("row", {"choices": choices, column: answer})[1] == place


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": LIST}, "a.jsonl line 1 has 'choices' but none of answer, answerKey, label"),
        ({"choices": LIST, "answer": 4}, "'answer' is '4', which is none of its 4 choices: expected one of A, B, C, D"),
        ({"choices": LIST, "answer": -1}, "'answer' is '-1'"),
        ({"choices": LIST, "label": True}, "'label' is 'True'"),
        ({"choices": LIST, "answer": 1.0}, "'answer' is '1.0'"),
        ({"choices": LIST, "answer": "E"}, "a place from 0 to 3, or a choice's text"),
        ({"choices": LIST, "answer": "x" * 999}, "'answer' is '" + "x" * 80 + "',"),
        ({"choices": ARC, "answer": "9"}, "expected one of 1, 2, 3, a place"),
        ({"choices": ["one"], "answer": 0}, "should be a list of two texts or more"),
        ({"choices": "red, green", "answer": 0}, "should be a list of two texts or more"),
        ({"choices": [1, 2], "answer": 0}, "should be a list of two texts or more"),
        ({"choices": ["x", " "], "answer": 0}, "choice 1 is empty"),
        ({"choices": {"text": ["x", "y"], "label": ["A"]}, "answer": 0}, "a label for each of its 2 texts"),
        ({"choices": LIST, "answer": 0, "question": 5}, "column 'question' should be text, got int"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    path = write(tmp_path / "a.jsonl", [{"question": "which?", **row}])
    with pytest.raises(DataError) as error:
        load_examples(DataSpec(path=str(path)))
    assert str(error.value).startswith("a.jsonl line 1")
    assert said in str(error.value)


@pytest.mark.slow
@many()
@given(
    choices=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "label", "x"]), inner),
        max_leaves=8,
    ),
    answer=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers()),
)
def test_whatever_stands_there_is_read_or_refused(choices, answer):
    try:
        texts, place = read_choices("row", {"choices": choices, "answer": answer})
    except DataError:
        return
    assert 0 <= place < len(texts)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_question_is_learnt_as_its_right_choice(tmp_path, ending):
    row = {"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
    corpus = load(write(tmp_path / f"a{ending}", [row] * 4)).corpus
    assert spoken(corpus, 0) == ("<|user|>2+2?<|end|><|assistant|>4<|end|>", "4<|end|>")
    question = corpus.questions[0]
    assert question.right == 1
    assert [TOKENIZER.decode(tokens) for tokens, _ in question.options] == [
        "<|user|>2+2?<|end|><|assistant|>3",
        "<|user|>2+2?<|end|><|assistant|>4",
    ]
    assert [TOKENIZER.decode(tokens[counts]) for tokens, counts in question.options] == ["3", "4"]


def test_a_column_of_ones_own_and_rows_that_are_no_questions(tmp_path):
    choices = {"choices": ["x", "y"], "answer": 1}
    own = load(write(tmp_path / "a.jsonl", [{"ctx": "q", **choices}] * 4), prompt_column="ctx").corpus
    assert spoken(own, 0)[1] == "y<|end|>"
    assert len(own.questions) == 4
    named = {"question": "q", "completion": "z", "answer": "w", "choices": ["x", "y"]}
    other = load(write(tmp_path / "b.jsonl", [named] * 4), prompt_column="question", completion_column="answer").corpus
    assert (spoken(other, 0)[1], other.questions) == ("w<|end|>", {})


def test_templates_keep_what_they_put_before_and_after_a_choice():
    """A thinking part that every answer opens with belongs to what is given, not to the choice."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<assistant><think></think>{{ m.content | trim }};"
        "{% else %}<user>{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    option = questions(tokenizer, "e?", ["i", "e"])[0].options[1]
    assert TOKENIZER.decode(option[0]) == "<user>e?;<assistant><think></think>e"
    assert TOKENIZER.decode(option[0][option[1]]) == "e"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(DataError, match="changes an answer's text"):
        questions(tokenizer, "e?", ["i", "e"])


def questions(tokenizer, asked, choices, **spec):
    from fedtune.data.sources import Example

    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": choices[0]})
    return tokenise([Example(turns, "", {}, tuple(choices), 0)], tokenizer, DataSpec(**spec))[0].questions


def test_without_a_template_and_what_is_too_long():
    """A prompt of 9 bytes and a choice of 4, in 10 tokens: the last 6 of the prompt stay. A choice of 12 loses its end,
    for something has to stand before it."""
    plain = tiny_tokenizer()
    plain.chat_template = None
    short, long = questions(plain, "abcdefgh", ["wxyz", "0123456789AB"], max_length=10)[0].options
    assert [TOKENIZER.decode(tokens) for tokens, _ in (short, long)] == ["defgh\nwxyz", "\n012345678"]
    assert [int(counts.sum()) for _, counts in (short, long)] == [4, 9]


@pytest.mark.slow
def test_the_likeliest_choice_by_hand():
    """Each option by itself, unpadded: the sum of the log-softmax at each of its tokens, in float64."""
    draw = np.random.default_rng(0)
    asked = {row: [draw.integers(0, 256, length).astype(np.int32) for length in (5, 2, 9)] for row in range(6)}
    prompts = {row: draw.integers(0, 256, 3 + 4 * row).astype(np.int32) for row in asked}
    made = {
        row: Question(
            tuple((np.concatenate([prompts[row], c]), np.arange(len(prompts[row]) + len(c)) >= len(prompts[row]))
                  for c in choices), 0)
        for row, choices in asked.items()
    }  # fmt: skip
    corpus = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), made)
    expected = {}
    for row, choices in asked.items():
        sums = []
        for choice in choices:
            text = torch.from_numpy(np.concatenate([prompts[row], choice]).astype(np.int64))
            with torch.no_grad():
                logs = local().module(input_ids=text[None]).logits[0].double().log_softmax(-1)
            begin = len(prompts[row])
            sums.append(sum(float(logs[place - 1, text[place]]) for place in range(begin, len(text))))
        expected[row] = int(np.argmax(sums))
    for batch_size in (1, 4, 100):
        assert choose(local(), corpus, list(asked), batch_size, PAD) == expected
    assert choose(local(), corpus, [4, 1], 3, PAD) == {4: expected[4], 1: expected[1]}


def test_of_equal_choices_the_first_is_taken():
    assert choose(local(), Corpus(*([np.zeros(1)] * 3), questions(TOKENIZER, "q", ["same", "same"])), [0], 8, PAD) == {
        0: 0
    }


def test_a_score_has_the_share_of_questions_that_were_right(tmp_path):
    """Of questions whose right choice is, in turn, the likeliest and another: one half; plain rows don't count."""
    rows = [{"question": f"{n}?", "choices": ["yes", "nonsense"], "answer": 0} for n in range(4)]
    both = [row | {"answer": answer} for row in rows for answer in (0, 1)]
    corpus = load(write(tmp_path / "a.jsonl", [*both, {"prompt": "a", "completion": "b"}])).corpus
    found = evaluate_all(local(), corpus, range(9), EvaluateSpec(), PAD, 0)
    assert (found.choice_accuracy, found.questions) == (0.5, 8)
    assert (found.exact_match, found.rouge_l, found.answers) == (None, None, 0)
    assert evaluate_all(local(), corpus, [8], EvaluateSpec(), PAD, 0).choice_accuracy is None
