"""Greedy answers are those of the plainest loop there is, for every kind of adapter; how answers are compared."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.compose import compose
from fedtune.config.schema import ADAPTERS, AdapterSpec, DataSpec, ModelSpec
from fedtune.core.errors import ConfigError
from fedtune.core.seeds import derive_seed, uniform
from fedtune.data.sources import Example
from fedtune.data.tokenisation import tokenise
from fedtune.evaluation.generation import Answer, answerable, answers, exact, greedy, rouge_l
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.models.tiny import tiny_tokenizer

pytestmark = pytest.mark.slow

NEW = 20
PAD = 256


@cache
def local(kind="lora"):
    """The tiny model with an adapter that is far from its start."""
    base = load_base(ModelSpec(name="tiny", dtype="float32"), torch.device("cpu"))
    model = LocalModel(base, AdapterSpec(kind=kind, **({"block_size": 8} if kind == "oft" else {})), 0)
    model.install(
        {name: start + uniform(derive_seed(1, name), start.shape, 0.3) for name, start in model.adapter().items()}
    )
    return model


def by_hand(model, prompt, stop=frozenset({PAD})):
    """One text at a time, read anew from its beginning for every token."""
    said = []
    while len(said) < NEW:
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits
        if (token := int(logits[0, -1].argmax())) in stop:
            break
        said.append(token)
    return said


def drawn(*lengths):
    draw = np.random.default_rng(4)
    return [draw.integers(0, 256, length).tolist() for length in lengths]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_answers_are_those_of_reading_the_whole_anew_for_every_token(kind):
    """Whatever stands beside them in the batch; and not because all say the same."""
    model, prompts = local(kind), drawn(3, 9, 9, 17, 30)
    expected = [by_hand(model, prompt) for prompt in prompts]
    assert greedy(model, prompts, PAD, NEW) == expected
    assert len({tuple(said) for said in expected}) >= 4


@pytest.mark.parametrize("kind", ["lora", "prompt_tuning"])
def test_an_end_token_ends_an_answer_wherever_it_comes(kind):
    """The model's own settings name another end than the tokenizer: each prompt's fourth token of before."""
    model, prompts = local(kind), drawn(4, 12, 8)
    base = model.module.get_base_model()
    whole = [by_hand(model, prompt) for prompt in prompts]
    kept = base.generation_config.eos_token_id
    base.generation_config.eos_token_id = [PAD, whole[0][3]]
    base.generation_config.repetition_penalty = 5.0  # and what isn't greedy, which is not to matter
    try:
        found = greedy(model, prompts, PAD, NEW)
        assert base.generation_config.repetition_penalty == 5.0
    finally:
        base.generation_config.eos_token_id, base.generation_config.repetition_penalty = kept, 1.0
    assert found == [by_hand(model, prompt, {PAD, whole[0][3]}) for prompt in prompts]
    assert found[0] == whole[0][: whole[0].index(whole[0][3])]


def test_no_answer_goes_beyond_the_positions_that_the_model_has():
    model = local("prompt_tuning")  # 10 of 1024 positions are virtual tokens'
    (said,) = greedy(model, drawn(1010), PAD, NEW)
    assert len(said) <= 4
    assert greedy(model, drawn(1014), PAD, NEW) == [[]]


def talk(*turns):
    return Example(tuple({"role": role, "content": text} for role, text in turns), "", {})


def corpus_of(*examples, tokenizer=None):
    return tokenise(examples, tokenizer or tiny_tokenizer(), DataSpec())[0]


def test_of_a_conversation_the_first_answer_is_asked_for():
    corpus = corpus_of(talk(("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")))
    (answer,) = answers(local(), corpus, [0], 4, PAD, 5)
    assert answer.reference == "b c"
    tokenizer = local().tokenizer
    prompt = tokenizer("<|user|>a<|end|><|assistant|>")["input_ids"]
    assert answer.text == tokenizer.decode(by_hand(local(), prompt)[:5])


def test_what_has_no_prompt_is_not_answered():
    asked, plain = talk(("user", "a"), ("assistant", "b")), Example((), "once", {})
    assert answerable(corpus_of(plain, asked, plain, asked), tiny_tokenizer(), [3, 2, 1]) == [1, 3]
    with pytest.raises(ConfigError, match="loss_on=all what is asked is learnt"):
        compose(["model=tiny", "data.loss_on=all", "evaluate.generate=1"])


def test_answers_do_not_depend_on_the_order_of_rows():
    corpus = corpus_of(*(talk(("user", "x" * length), ("assistant", str(length))) for length in (5, 1, 9, 3, 7)))
    forth, back = (answers(local(), corpus, rows, 2, PAD, 6) for rows in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]))
    assert forth == back[::-1]
    assert [answer.reference for answer in forth] == ["5", "1", "9", "3", "7"]


@pytest.mark.parametrize(
    ("said", "meant", "extract", "same"),
    [
        (" 4\n", "4", None, True),
        ("a  b\tc", "a b\nc", None, True),
        ("4.", "4", None, False),
        ("Four", "four", None, False),
        ("9 - 2 #### 7", "it is 3 + 4 #### 7", r"#### (.*)", True),
        ("#### 5 #### 7", "#### 7", r"#### (\d+)", True),  # the last one
        ("7", "#### 7", r"#### (.*)", False),  # found in one alone
        ("seven", "eight", r"\d+", False),  # found in neither
        ("about 12 or 13", "13", r"\d+", True),  # no group: the whole match
        ("x=1 y=2", "x=1 y=3", r"x=(\d) y=(\d)", True),  # the first group alone
    ],
)
def test_exact_match(said, meant, extract, same):
    assert exact(Answer(said, meant), extract) is same


def test_a_pattern_that_is_none_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"evaluate.extract=\( is no regular expression"):
        compose(["model=tiny", "evaluate.extract='('"])


def test_rouge_l_by_hand():
    """the cat [sat] on [the] mat / the cat on [a] mat: 4 words in common, 4/5 of the answer's and 4/6 of the
    reference's, F1 = 2 (4/5)(4/6) / (4/5 + 4/6) = 8/11."""
    assert rouge_l(Answer("The cat on a mat.", "the cat sat on the mat")) == pytest.approx(8 / 11)
    assert rouge_l(Answer("", "the cat")) == 0.0
    assert rouge_l(Answer("that is 3 plus 4 #### 7", "It is 3 + 4 #### 7")) == pytest.approx(8 / 11)  # as in the docs


def longest_common(one, other):
    """The table of the longest common subsequence."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd"]), min_size=1, max_size=8)


@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(said, meant):
    """2 P R / (P + R) with P = L / |said| and R = L / |meant| is 2 L / (|said| + |meant|)."""
    expected = 2 * longest_common(said, meant) / (len(said) + len(meant))
    assert rouge_l(Answer(" ".join(said), " ".join(meant))) == pytest.approx(expected)
