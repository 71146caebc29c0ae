"""What a person sees."""

import io

import pytest
from rich.console import Console

from fedtune.core.text import clock, first_line, rate, size
from fedtune.server import round_loop as rounds
from fedtune.server.progress import LineView, LiveView, make_view


def test_a_terminal_shows_a_bar_a_table_and_what_came_of_it(small_run, monkeypatch):
    class Refreshing(LiveView):
        """Draws after each reply, not eight times a second: these rounds are over before the first drawing."""

        def reply(self, *told):
            super().reply(*told)
            self._live.refresh()

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110, color_system=None)
    monkeypatch.setattr(rounds, "make_view", lambda: Refreshing(console))
    small_run(rounds=2)
    text = screen.getvalue()
    for part in (
        "round 2/2",
        "3/3 clients",
        "left",
        "held-out loss",
        "run: fedit, 4 clients, 3 a round (3 trained at once), 2 rounds",
        "adapter",
    ):
        assert part in text, part


def test_a_pipe_gets_a_line_a_round(small_run, capsys):
    small_run(rounds=2)
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("round ")] == ["0", "1", "2"]
    assert "\x1b" not in out


def test_a_failed_client_is_shown_with_its_reason():
    screen = io.StringIO()
    view = LiveView(Console(file=screen, force_terminal=True, width=110, color_system=None))
    view.failure(3, 7, "the loss became nan [at once]")
    view.close()
    assert "round 3: client 7 failed: the loss became nan [at once]" in screen.getvalue()


def test_no_time_left_is_shown_before_anything_was_timed():
    view = LiveView(Console(file=io.StringIO(), force_terminal=True))
    view.round_begins(1, 8)
    assert view._bar.tasks[0].fields["note"] == ""
    view.reply(2.5, 0, {"up_wire_bytes": 0, "down_wire_bytes": 0})
    assert "left" in view._bar.tasks[0].fields["note"]
    view.close()


def test_the_view_follows_the_terminal():
    assert isinstance(make_view(Console(file=io.StringIO())), LineView)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (18_587_440, "18.6 MB"), (2.5e12, "2.5 TB")]
)
def test_sizes(count, shown):
    assert size(int(count)) == shown


def test_sizes_of_another_precision_and_of_none():
    assert size(1483, 3) == "1.483 kB"
    assert size(2.6) == "3 B"
    assert size(float("inf")) == size(float("nan")) == "\u2013"
    assert rate(2.804e9) == "2.80 GB/s"


def test_the_first_line_of_an_error_or_what_it_is():
    assert first_line(ValueError("\n this \nand that")) == "this "
    assert first_line(ValueError(" ")) == first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown
