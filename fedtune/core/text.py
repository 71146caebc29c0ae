"""Numbers, sizes, times and errors in the words that people read."""

import math
from collections.abc import Sequence

from rich import filesize

NOTHING = "\N{EN DASH}"  # where there is no number
NAMED = 6  # names in a sentence; the rest are counted


def size(value: float, digits: int = 1) -> str:
    """Bytes in decimal units, as "312 B" or "4.9 kB"; a dash where there are none known.

    Args:
        digits: after the point, from a kB on.
    """
    if not math.isfinite(value):
        return NOTHING
    count = round(value)
    return f"{count} B" if count < 1000 else filesize.decimal(count, precision=digits)


def rate(value: float) -> str:
    """Bytes a second, as "12.30 MB/s"."""
    return f"{size(value, 2)}/s"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def duration(value: float) -> str:
    """Seconds as "0.35 s", "2 min 5 s", "3 h 20 min"; a dash where there are none known."""
    if not math.isfinite(value):
        return NOTHING
    if value < 100:
        return f"{number(value, 3)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours:,} h {rest} min" if hours else f"{minutes} min {seconds} s"


def number(value: float, digits: int = 4) -> str:
    """As "2.135", "0.00012", "3e-08"; a dash where there is none.

    Args:
        digits: that count, of numbers which are neither tiny nor huge.
    """
    if not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.2g}"
    return f"{value:.{max(digits - 1 - magnitude(value), 0)}f}"


def magnitude(value: float) -> int:
    """The power of ten that its first digit stands at; 0 of 0."""
    return math.floor(math.log10(abs(value))) if value else 0


def plural(count: int, word: str) -> str:
    """As "1 seed", "3 seeds"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def listed(names: Sequence[str]) -> str:
    """As "a, b and c", or "a, b, c, d, e, f and 12 others"."""
    if len(names) > NAMED + 1:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} others"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def sentence(text: str) -> str:
    """With a capital at its start."""
    return text[:1].upper() + text[1:]


def first_line(error: object) -> str:
    """What an exception says first, or what it is where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
