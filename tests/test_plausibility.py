"""What the server believes of updates, by hand.

Weights. Of 1, 2, 10 and 10 examples none may have more than 0.3: the two largest are cut to c with
c = 0.3 (2 c + 1 + 2), so c = 2.25 and the shares are 1, 2, 2.25, 2.25 of 7.5. Cutting one alone, to 0.3 * 13 / 0.7 =
5.57, would leave the other above it. Of 1, 1, 1 and 7 with 0.5 the largest is cut to 0.5 * 3 / 0.5 = 3.

Norms. From (1, 2) and a start of (1, 0) the change is (0, 2); with a tensor (3, 6) that has no start, its norm is
hypot(2, 3, 6) = 7.
"""

import math
from itertools import pairwise

import pytest
import torch
from conftest import rows, run_on, small, summary_of
from fedtune.workspace.workspace import Party
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from hypothesis import example, given
from hypothesis import strategies as st
from test_hostile_client import Told, extreme

from fedtune.core.errors import MAX_TEXT, ClientError, DivergedError, WireError, printable, short
from fedtune.core.protocol import ClientInfo, Update, share
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.server.plausibility import (
    Weighed,
    effective_examples,
    norm_of_change,
    not_finite,
    out_of_proportion,
    outlier,
)
from fedtune.wire import messages as wire
from fedtune.wire.http_overhead import KEY_BYTES, Link, Objects, _pushed, _remembered

COUNTS = st.lists(st.integers(1, 10**9), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("examples", "most", "shares"),
    [
        ([1, 2, 10, 10], 0.3, [1 / 7.5, 2 / 7.5, 0.3, 0.3]),
        ([1, 1, 1, 7], 0.5, [1 / 6, 1 / 6, 1 / 6, 0.5]),
        ([1, 1, 8], 0.25, [1 / 3] * 3),  # who are so few can't have less than a third each
        ([3], 0.1, [1]),
        ([1, 10**9], 0.5, [0.5, 0.5]),
    ],
)
def test_a_share_of_the_weight_is_cut(examples, most, shares):
    counted = effective_examples(examples, "samples", most)
    assert [n / sum(counted) for n in counted] == pytest.approx(shares, rel=1e-5)


@given(COUNTS, st.floats(0.01, 1))
def test_nobody_has_more_than_may_be_and_order_is_kept(examples, most):
    counted = effective_examples(examples, "samples", most)
    assert max(counted) / sum(counted) <= max(most, 1 / len(examples)) * (1 + 1e-5)
    assert min(counted) >= 1
    for (n, m), (other, its) in pairwise(sorted(zip(examples, counted, strict=True))):
        assert n < other or m == its
        assert m <= its


@given(COUNTS)
def test_without_a_limit_examples_are_weights_as_they_are(examples):
    assert effective_examples(examples, "samples", 1.0) == examples
    assert effective_examples(examples, "equal", 1.0) == [1] * len(examples)


def test_weighed_replies_are_the_same_but_for_their_examples():
    tensors = {"a": torch.ones(2)}
    replies = [(ClientInfo(index, 5), Update(tensors, 5, {"m": 1.0})) for index in range(3)]
    weighed = Weighed(replies, [1, 1, 2])
    assert share(weighed) == [0.25, 0.25, 0.5]
    assert [peer.index for peer, _ in weighed[1:]] == [1, 2]
    assert weighed[0][1].tensors is tensors


def test_a_norm_is_that_of_the_change():
    start = {"a": torch.tensor([1.0, 0.0]), "n": torch.tensor([9.0])}
    assert norm_of_change({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3, 6])}, start) == 7
    assert norm_of_change({}, start) == 0
    huge = norm_of_change({"a": torch.full((2,), 3e38)}, {})
    assert huge == pytest.approx(3e38 * math.sqrt(2))


def test_who_is_out_of_proportion():
    told = {index: {"a": torch.tensor([3.0, 4.0])} for index in range(5)}

    def left_out(norms, most=10.0):
        return set(out_of_proportion(dict(enumerate(norms)), told, most))

    assert left_out([1, 2, 3, 31]) == {3}  # the lower median is 2, and 20 is the most
    assert left_out([1, 2, 3, 20]) == set()
    assert left_out([1, 1, 1e30, 1e30]) == {2, 3}
    assert left_out([0, 0, 0, 1]) == set()  # one that moves among those that don't
    assert left_out([1, 1, 1, math.inf]) == {3}
    assert left_out([1, 1, 1, math.inf], None) == set()
    assert left_out([501, 1]) == {0}  # of two, none is the measure of the other; what they were sent has norm 5
    assert left_out([499, 1]) == set()
    assert left_out([]) == set()
    assert outlier({0: 1.0, 1: 2.0, 2: 30.0}) == 2
    assert outlier({0: 1.0, 1: 2.0, 2: 9.0}) is None
    assert outlier({0: 1.0}) is None


def test_where_a_state_is_not_finite():
    state = {"a": torch.tensor([1.0, math.inf]), "b": [1.0, {"c": math.nan}], "d": torch.tensor([3]), "e": "inf"}
    assert not_finite(state) == {"/a", "/b/1/c"}


@given(st.text(max_size=2000), st.integers(20, 600))
@example("\x1b[2J\x1b]0;mine\x07", 500)
@example("a\r\nb\u2028c\u202e\x85\x00", 500)
@example("\udc80" * 9, 500)
@example("x" * 501, 500)
def test_a_strangers_text_is_a_line_that_can_be_printed(text, most):
    line = printable(text, most)
    assert len(line) <= most
    assert line.isprintable()
    assert printable(line, most) == line
    if text.isprintable() and len(text) <= most and text == " ".join(text.split()):
        assert line == text


@pytest.mark.parametrize("kind", [WireError, ClientError])
def test_errors_that_quote_peers_are_lines_that_can_be_printed(kind):
    said = str(kind("\x1b[2J" + "A" * 300_000))
    assert said.startswith("\\x1b[2JAAA")
    assert len(said) == MAX_TEXT
    assert len(short("A" * 300_000)) == 80


def test_nothing_that_a_client_says_stays_in_memory():
    """What is remembered of 300 updates of 64 letters each, and of errors of 100 kB, is their lengths."""
    wire._update_bytes.cache_clear()
    for number in range(300):
        update = Update({}, 1000 + number, {f"{number:0>64}": 1.0, "train_loss": 1.0})
        wire.update_bytes(b"12345", update)
    assert wire._update_bytes.cache_info().currsize <= 2  # 1000 ... 1299 have 10 and 11 bits
    _pushed.cache_clear()
    objects = Objects((1,) * 10, bytes(KEY_BYTES))
    assert _remembered(_count, Link(), b"x", objects) == KEY_BYTES
    assert _count.asked == 1


class _Count:
    """What measures, if it is asked to remember."""

    asked = 0

    def __call__(self, link, envelope, objects):
        raise AssertionError("this would be remembered")

    def __wrapped__(self, link, envelope, objects):
        self.asked += 1
        return len(objects.tree)


_count = _Count()


def lying(change, words):
    """The real ClientApp, where client 1 answers what `change` makes of its tensors."""
    app, inner, workspace = ClientApp(), make_client_app(), Party(small(*words, out="unused"))
    app.query()(inner)
    app.evaluate()(inner)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if context.node_config["partition-id"] == 1:
            reply.content = Told(reply.content, workspace).each(change)
        return reply

    return app


def fail(tensor):
    raise ConnectionError("the battery is flat")


def play(folder, change, *words):
    run_on(LocalGrid, lying(change, words), folder, "rounds=1", *words)
    return summary_of(folder)["state_sha256"]


TWO = ("population.clients=2", "population.cohort=2")


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (lambda t: t + 1e30, (), "out of all proportion to the median of the round"),
        (lambda t: t + 1e30, TWO, "out of all proportion to that of what it was sent"),
        (extreme, ("population.max_norm_ratio=null", "method=flexlora"), "can't be aggregated: "),
    ],
    ids=["of many", "of two", "a decomposition that is none"],
)
def test_one_that_is_out_of_proportion_is_left_out_and_named(tmp_path, change, words, said):
    words = ("population.cohort=4", *words)
    lied, failed = (play(tmp_path / name, what, *words) for name, what in (("lied", change), ("failed", fail)))
    assert lied == failed
    (failure,) = rows(tmp_path / "lied", "failures.csv")
    assert failure["peer"] == "1"
    assert said in failure["error"]
    booked = [(row["peer"], row["part"]) for row in rows(tmp_path / "lied", "ledger.csv") if row["round"] == "1"]
    assert [peer for peer, part in booked if part == "failed"] == ["1"]
    assert rows(tmp_path / "lied", "metrics.csv")[1]["failed"] == "1"


def test_a_loss_that_is_none_any_more_is_blamed_on_whom_it_came_from(tmp_path):
    """Without a limit nothing is left out that a state can hold: then the error says whose update it was."""
    words = ("population.cohort=4", "population.max_norm_ratio=null")
    with pytest.raises(DivergedError, match=r"round 1: the held-out loss became nan\. Client 1 sent an update of norm"):
        play(tmp_path / "run", lambda t: t + 1e30, *words)
    assert summary_of(tmp_path / "run")["rounds"] == 0


def test_weights_follow_the_settings(tmp_path, capsys):
    """Where nobody may have more than a tenth, all four are equal, and so they are in the mean loss."""
    unlike = ("population.cohort=4", "data.partition=exponential", "rounds=1")
    found = {}
    for name, word in (
        ("plain", ()),
        ("all", ("max_weight=1",)),
        ("tenth", ("max_weight=0.1",)),
        ("equal", ("weights=equal",)),
    ):
        folder = tmp_path / name
        run_local(small(*unlike, *(f"population.{each}" for each in word), out=folder))
        found[name] = summary_of(folder)["state_sha256"], rows(folder, "metrics.csv")[1]["train_loss"]
        out = capsys.readouterr().out
        assert ("client 3 has 6" in out) == (name in ("plain", "all")), out
    assert found["plain"] == found["all"]
    assert found["tenth"] == found["equal"]
    assert found["plain"] != found["equal"]
