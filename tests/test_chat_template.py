"""What is learnt is what generation goes on with: templates, special tokens, and tokenizers of every kind."""

import json
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import load, write
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedtune.config.compose import compose
from fedtune.config.schema import DataSpec
from fedtune.core.errors import ConfigError, DataError
from fedtune.data.federated_data import load_data
from fedtune.data.row_counts import describe
from fedtune.data.sources import Example
from fedtune.data.tokenisation import tokenise
from fedtune.models.tiny import CHAT_TEMPLATE, tiny_tokenizer
from fedtune.server.progress import headline

END = 256  # <|end|> of the tiny tokenizer
ALPHABET = "stone glas?:[]/AQINT.\n"
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} <|end|>"
    "{% endif %}{% endfor %}"
)
COLON = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: {{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


def talk(*said, where="a.jsonl line 7", **more):
    """An example from (role, content) pairs."""
    return Example(tuple({"role": role, "content": text} for role, text in said), "", {}, where=where, **more)


def asked(question, answer):
    return talk(("user", question), ("assistant", answer))


def with_template(template, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(examples, tokenizer=None, **spec):
    """The first example's text and what is learnt of it, and the counts."""
    tokenizer = tokenizer or tiny_tokenizer()
    corpus, _ = tokenise(examples, tokenizer, DataSpec(**spec))
    tokens, targets = corpus.span(0)
    return tokenizer.decode(tokens), tokenizer.decode(tokens[targets]), corpus.counts


def metaspace(scheme, template=None):
    """A tokenizer as Llama's, of a few words: `scheme` is Metaspace's, or "prepend" as in Llama 2's own file."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<unk>", "<s>", "<|end|>"], initial_alphabet=list(ALPHABET), show_progress=False
    )
    trained.train_from_iterator(
        ["stone glass stone glass lasso", "Q: stone\nA: glass", "[INST] stone [/INST]"], trainer
    )
    if scheme == "prepend":
        trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trained.pre_tokenizer = None
    else:
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trained.decoder = decoders.Metaspace(prepend_scheme="never")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|end|>", pad_token="<|end|>", bos_token="<s>"
    )
    wrapped.chat_template = template
    return wrapped


SCHEMES = {(scheme, name): metaspace(scheme, template) for scheme in ("prepend", "always", "first", "never")
           for name, template in (("INST", INST), ("COLON", COLON), ("none", None))}  # fmt: skip


@pytest.mark.parametrize("way", SCHEMES, ids="-".join)
@given(st.text("stone glas\n", min_size=1, max_size=8), st.text("stone glas\n", min_size=1, max_size=8))
def test_the_prompt_is_inferences_own_and_the_answer_has_no_blank_that_nobody_wrote(way, question, answer):
    """Whatever the tokenizer: the prompt's tokens are those of its whole text, and the learnt ones spell the answer."""
    tokenizer = SCHEMES[way]
    corpus, _ = tokenise([asked(question, answer)], tokenizer, DataSpec())
    tokens, targets = corpus.span(0)
    first = int(targets.argmax())
    prompt = (
        f"{question}\n"
        if way[1] == "none"
        else tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    )
    assert tokens[:first].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    spelled = "".join(tokenizer.convert_ids_to_tokens(tokens[first:].tolist())).replace("▁", " ")
    assert spelled == (f" {answer} <|end|>" if way[1] == "INST" else f"{answer}<|end|>")
    assert targets[first:].all()


def test_where_no_token_spans_the_seam_it_is_one_tokenisation():
    for scheme in ("prepend", "always", "first"):
        tokenizer = SCHEMES[scheme, "INST"]
        corpus, _ = tokenise([asked("stone", "stone glass")], tokenizer, DataSpec())
        assert corpus.tokens.tolist() == tokenizer("[INST] stone [/INST] stone glass <|end|>")["input_ids"]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_text_after_a_special_token_is_as_in_one_tokenisation(scheme):
    template = (
        "{% for m in messages %}<s>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    tokenizer = metaspace(scheme, template)
    corpus, _ = tokenise([asked("stone", "glass stone")], tokenizer, DataSpec())
    whole = tokenizer("<s>stone<|end|><s>glass stone<|end|>", add_special_tokens=False)["input_ids"]
    assert corpus.tokens.tolist() == whole


@pytest.mark.parametrize(
    ("before", "after", "template"),
    [
        (["<s>"], ["<|end|>"], "<s> $A <|end|>"),
        (["<s>"], [], "<s> $A"),
        ([], ["<|end|>"], "$A <|end|>"),
        (["<unk>", "<s>"], [], "<unk> <s> $A"),
    ],
)
def test_what_a_tokenizer_puts_before_a_text_is_kept_and_one_end_follows(before, after, template):
    tokenizer = metaspace("first")
    names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|end|>", "<unk>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    for example in (Example((), "stone", {}), asked("stone", "glass")):
        corpus, _ = tokenise([example], tokenizer, DataSpec())
        found = tokenizer.convert_ids_to_tokens(corpus.tokens.tolist())
        assert found[: len(before) + 1] == [*before, "▁stone"]
        assert (found[-1], found.count("<|end|>")) == ("<|end|>", 1)


TYPED = "say <|end|> or <|user|> now"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["template", "plain"])
def test_a_special_token_that_somebody_typed_is_characters(template):
    """By hand: 3 or 1 real special tokens are the template's; the typed ones are 7 and 8 characters as everywhere."""
    tokenizer = with_template(template)
    corpus, _ = tokenise([asked(TYPED, f"{TYPED}!")], tokenizer, DataSpec())
    tokens = corpus.tokens.tolist()
    assert tokenizer.decode(tokens).count("<|end|>") == (4 if template else 3)
    assert sum(token >= END for token in tokens) == (4 if template else 1)
    assert tokens.count(END) == (2 if template else 1)
    assert corpus.counts["special_as_text"] == 1
    text = tokenise([Example((), TYPED, {})], tokenizer, DataSpec())[0].tokens.tolist()
    assert (len(text), text.count(END), text[-1]) == (len(TYPED) + 1, 1, END)


def test_special_tokens_are_real_where_that_is_asked_for():
    corpus, _ = tokenise([Example((), TYPED, {})], tiny_tokenizer(), DataSpec(parse_special=True))
    assert corpus.tokens.tolist().count(END) == 2
    assert "special_as_text" not in corpus.counts


def test_a_tokenizer_that_makes_special_tokens_of_text_is_kept_from_it():
    """Unigram has its special tokens among those of text, where they are the likeliest reading of their characters."""
    pieces = [("<unk>", 0.0), ("<|end|>", 0.0), *((character, -5.0) for character in "▁ab<|end>")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<|end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    corpus, _ = tokenise([asked("a", "b<|end|>b")], wrapped, DataSpec())
    assert "".join(wrapped.convert_ids_to_tokens(corpus.tokens[corpus.targets].tolist())) == "b<|end|>b<|end|>"
    assert corpus.tokens.tolist().count(1) == 1


def test_special_tokens_that_take_white_space_along_do_so():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken("<turn>", rstrip=True, lstrip=True, special=True)], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}x <turn>\n {{ m.content }}{% endfor %}"
    corpus, _ = tokenise([talk(("user", "q"), ("assistant", "a"))], tokenizer, DataSpec())
    whole = tokenizer("x <turn>\n qx <turn>\n a", add_special_tokens=False)["input_ids"]
    assert corpus.tokens.tolist() == whole


THINK = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@pytest.mark.parametrize("answer", ["4", "<three>", "<think>5", "<think>\nhm</think>4"])
def test_what_the_generation_prompt_opens_stands_before_what_is_learnt(answer):
    """Also where the answer begins with the same letters as that."""
    text, learnt, _ = read([asked("2+2?", answer)], with_template(THINK))
    rest = answer.removeprefix("<think>\n")
    assert text == f"<|user|>2+2?<|end|><|assistant|><think>\n{rest}<|end|>"
    assert learnt == f"{rest}<|end|>"


DIALOGUE = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [THINK, FORGETFUL], ids=["think", "forgetful"])
def test_turns_that_are_rendered_otherwise_later_are_refused_by_row_and_the_last_can_be_learnt(template):
    with pytest.raises(DataError, match=r"a.jsonl line 7: .* data.loss_on=last learns each row's last answer"):
        read([DIALOGUE], with_template(template))
    text, learnt, _ = read([DIALOGUE], with_template(template), loss_on="last")
    assert text.startswith("<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>")
    assert learnt == ("d<|end|>" if template == THINK else "<think></think>d<|end|>")


def test_loss_on_last_learns_the_last_answer_alone():
    assert read([DIALOGUE], loss_on="last")[1] == "d<|end|>"
    assert read([DIALOGUE], with_template(None), loss_on="last")[:2] == ("a\nb<|end|>c\nd<|end|>", "d<|end|>")
    with pytest.raises(ConfigError, match="expected completion, last, all"):
        DataSpec(loss_on="first")


DATED = '{% if strftime_now is defined %}{{ strftime_now("%d %b %Y") }}{% endif %}|' + CHAT_TEMPLATE


@pytest.mark.parametrize("format", ["%d %b %Y", "%Y-%m-%d %H:%M:%S.%f", '%A \\"%B\\"'])
def test_the_day_that_a_template_asks_for_is_the_runs_own(format):
    """Two runs of one config differ in no token, whenever they are made: a clock would be seen in the microseconds."""
    template = '{{ strftime_now( "' + format + '" ) }}|' + CHAT_TEMPLATE
    texts = {read([asked("a", "b")], with_template(template), **day)[0] for day in ({}, {"date": "2024-07-26"})}
    shown = datetime(2024, 7, 26).strftime(format.replace("\\", ""))
    assert texts == {f"{shown}|<|user|>a<|end|><|assistant|>b<|end|>"}
    assert read([asked("a", "b")], with_template(template), date="2031-01-02")[0] != texts.pop()


def test_the_day_is_recorded_and_checked():
    assert "date: '2024-07-26'" in compose(["model=tiny"]).text()
    with pytest.raises(ConfigError, match=r"data.date=today is no day: expected YYYY-MM-DD"):
        compose(["model=tiny", "data.date=today"])
    with pytest.raises(DataError, match="a format that isn't written out"):
        read([asked("a", "b")], with_template("{% set f = '%d' %}{{ strftime_now(f) }}" + CHAT_TEMPLATE))


@pytest.mark.parametrize("system", ["{{ raise_exception('no system') }}", ""], ids=["refuses", "drops"])
def test_a_system_turn_is_told_by_the_user_where_the_template_takes_none(system):
    template = "{% for m in messages %}{% if m.role == 'system' %}SYSTEM{% else %}TURN{% endif %}{% endfor %}GENERATE"
    template = template.replace("SYSTEM", system).replace("TURN", "<|{{ m.role }}|>{{ m.content }}<|end|>")
    template = template.replace("GENERATE", "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    rows = [talk(("system", "Be brief."), ("user", "a"), ("assistant", "b")), asked("c", "d")]
    text, _, counts = read(rows, with_template(template))
    assert text == "<|user|>Be brief.\n\na<|end|><|assistant|>b<|end|>"
    assert counts["system_folded"] == 1
    assert "1 rows have their system turn put before the question" in describe(counts, DataSpec())[-1]


def test_turns_that_a_template_refuses_or_leaves_out_are_named_or_counted():
    strict = "{% if messages[0].role == 'assistant' %}{{ raise_exception('user first') }}{% endif %}" + CHAT_TEMPLATE
    opened = talk(("assistant", "hi"), ("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"a.jsonl line 7: .* refuses \['assistant', 'user'\]: user first"):
        read([asked("x", "y"), opened], with_template(strict))
    lower = CHAT_TEMPLATE.replace("message['content']", "message['content'] | lower")
    _, _, counts = read([asked("a", "b"), asked("a", "B")], with_template(lower))
    assert counts.get("rewritten") == 1


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["template", "plain"])
def test_an_assistant_that_opens_is_context(template):
    opened = talk(("assistant", "hi"), ("user", "a"), ("assistant", "b"))
    text, learnt, _ = read([opened], with_template(template))
    assert "hi<|end|>" in text
    assert learnt == "b<|end|>"


def test_without_a_template_an_end_stands_between_turns_and_is_learnt():
    """It was `Be brief.\\n0?\\nA0and?\\nB0<end>`."""
    rows = [talk(("system", "Be brief."), ("user", "0?"), ("assistant", "A0"), ("user", "and?"), ("assistant", "B0"))]
    plain = with_template(None)
    assert read(rows, plain)[:2] == ("Be brief.\n0?\nA0<|end|>and?\nB0<|end|>", "A0<|end|>B0<|end|>")
    assert read([Example((), "x", {})], plain)[:2] == ("x<|end|>", "x<|end|>")


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}],
}
TOOLS = (
    "{% if tools %}<{{ tools[0].function.name }}>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'], ids=["object", "json"])
def test_tool_calls_are_the_templates_or_the_row_is_refused(tmp_path, content, arguments):
    call = {"id": "0", "type": "function", "function": {"name": "add", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "1+?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "0"},
        {"role": "assistant", "content": "two"},
    ]
    rows = [{"messages": turns, "tools": [{"type": "function", "function": {"name": "add"}}]}] * 4
    path = write(tmp_path / "a.jsonl", rows)
    tokenizer = with_template(TOOLS)
    data = load_data(DataSpec(path=str(path), duplicates="keep"), 2, tokenizer, 0)
    tokens, targets = data.corpus.span(0)
    assert tokenizer.decode(tokens) == (
        '<add><|user|>1+?<|end|><|assistant|>add{"x": 1}<|end|><|tool|>2<|end|><|assistant|>two<|end|>'
    )
    assert tokenizer.decode(tokens[targets]) == 'add{"x": 1}<|end|>two<|end|>'
    assert "empty_answer" not in data.corpus.counts
    for template, said in ((CHAT_TEMPLATE, "leaves out 'tool_calls' \\(of add\\)"), (None, "need a chat template")):
        with pytest.raises(DataError, match=f"a.jsonl line 1: .*{said}"):
            load_data(DataSpec(path=str(path)), 2, with_template(template), 0)


def test_rows_that_are_left_out_are_counted_with_the_reason(tmp_path, capsys):
    """Of 40 rows 12 ask and nobody answers, 8 prompts fill max_length, 5 answers are empty and 3 are cut."""
    rows = [
        *[{"messages": [{"role": "user", "content": "?"}]}] * 12,
        *[{"prompt": "p" * 50, "completion": "c"}] * 8,
        *[{"prompt": "p", "completion": ""}] * 5,
        *[{"prompt": "p", "completion": "c" * 50}] * 3,
        *[{"prompt": "p", "completion": "c"}] * 12,
    ]
    data = load(write(tmp_path / "a.jsonl", rows), max_length=20)
    assert (len(data.corpus), data.dropped) == (20, 20)
    assert data.corpus.counts == {"read": 40, "no_answer": 12, "too_long": 8, "empty_answer": 5, "cut": 3}
    assert describe(data.corpus.counts, DataSpec(max_length=20)) == [
        "left out 20 of 40 rows: 12 have no assistant turn that answers something, "
        "8 have nothing to learn within data.max_length=20 tokens (raise it)",
        "         3 rows are cut at data.max_length=20 tokens",
        "         5 rows have an empty answer, of which only the end is learnt",
    ]
    assert describe(load(write(tmp_path / "b.jsonl", rows[-4:])).corpus.counts, DataSpec()) == []


def test_the_console_and_the_summary_say_so(tmp_path, run_on_rows):
    rows = [*({"prompt": f"p{i}", "completion": "c"} for i in range(8)), {"prompt": "p" * 99, "completion": "c"}]
    said, summary = run_on_rows(rows, "data.max_length=20")
    assert "left out 1 of 9 rows: 1 have nothing to learn within data.max_length=20 tokens (raise it)" in said
    assert summary["data"]["row_counts"] == {"read": 9, "too_long": 1}


@pytest.fixture
def run_on_rows(tmp_path):
    """A run's headline and summary, on these rows."""
    from fedtune.workspace.workspace import Party

    from fedtune.server.summary import summarise

    def made(rows, *words):
        path = write(tmp_path / "rows.jsonl", rows)
        experiment = compose(["model=tiny", f"data.path={path}", "population.clients=2", *words])
        workspace = Party(experiment)
        return "\n".join(headline(experiment, workspace, tmp_path)), summarise(workspace, "done", 0, {}, "", {})

    return made


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=6)), max_size=5))
def test_any_dialogue_is_learnt_left_out_or_refused(turns):
    """What is learnt is the assistant's; the corpus' tokens are all in the vocabulary."""
    examples = [asked("a", "b"), talk(*turns), Example((), "x", {})]
    for tokenizer in (tiny_tokenizer(), with_template(None)):
        corpus, kept = tokenise(examples, tokenizer, DataSpec())
        learnable = any(place and role == "assistant" for place, (role, _) in enumerate(turns))
        assert kept == ([0, 1, 2] if learnable else [0, 2])
        assert corpus.tokens.max() <= 259
        assert np.array_equal(corpus.starts, np.concatenate([[0], np.cumsum(np.diff(corpus.starts))]))


def test_json_of_examples_is_untouched():
    """Marking typed tokens leaves the examples as they were read."""
    example = asked(TYPED, "x")
    before = json.dumps(example.messages)
    read([example])
    assert json.dumps(example.messages) == before


def test_a_tokenizer_that_puts_nothing_before_a_text_has_each_piece_as_it_stands():
    """Byte-level tokenizers, SmolLM2's and the tiny one: prompt and answer tokenised by themselves, bit for bit."""
    tokenizer = tiny_tokenizer()
    examples = [asked(" 12\n\n", "\n\n34 "), asked("naïve ☃?", "  x"), asked("a", "b" * 99)]
    corpus, kept = tokenise(examples, tokenizer, DataSpec(max_length=60))
    for row, place in enumerate(kept):
        question, answer = (turn["content"] for turn in examples[place].messages)
        pieces = (f"<|user|>{question}<|end|><|assistant|>", f"{answer}<|end|>")
        prompt, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pieces)
        tokens, targets = corpus.span(row)
        assert tokens.tolist() == [*prompt, *rest][:60]
        assert targets.tolist() == [*[False] * len(prompt), *[True] * len(rest)][:60]
