"""Cells of CSV files that a spreadsheet would take for a formula: names and reasons in them may be anybody's."""

import re

# What spreadsheets begin a formula with; a tab or a line's end they skip. A text that begins with quotes before one of
# these is marked too, so that the mark can be taken off again
FORMULA = r"^'*[=+\-@\t\r\n]"
_FORMULA = re.compile(FORMULA)


def guarded(text: str) -> str:
    """The text as a cell that stays text: with a quote before it if it would be a formula. A number stays a number."""
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def unguarded(cell: str) -> str:
    """What `guarded` was given."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell[1:]) and not _is_number(cell[1:]) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not text[:1].isspace()
