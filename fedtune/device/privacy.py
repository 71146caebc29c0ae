"""What a device says of itself when something fails: the reason, and not where its files are."""

import os
import re
import sys
import tempfile
from pathlib import Path

MAX_TEXT = 4000  # characters; the end of a worker's log is 2,000
PATH = re.compile(r"(?<![\w:/.~-])~?(?:/[^\s/:'\",;()\[\]<>]+){2,}/?")


def for_the_server(text: str, asked: str) -> str:
    """The text with what is before the last name taken out of paths, unless the server has named them itself.

    Args:
        asked: the run's config.
    """
    given = set(re.findall(r"(?:path|devices): ['\"]?([^'\"\n]+)", asked))
    for folder in _own():
        if folder not in given:
            text = re.sub(re.escape(folder) + r"(?=/)", "...", text)
    text = PATH.sub(lambda found: found[0] if found[0] in given else f".../{found[0].rstrip('/').split('/')[-1]}", text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def _own() -> list[str]:
    """Folders whose names may have anything in them, longest first."""
    known = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(sys.prefix), Path(__file__).parents[1]]
    named = [os.environ.get(name, "") for name in ("FEDTUNE_HOME", "FLWR_HOME", "FEDTUNE_CACHE", "XDG_RUNTIME_DIR")]
    folders = {str(path) for path in known} | {name.rstrip("/") for name in named}
    return sorted((folder for folder in folders if len(folder) > 1), key=len, reverse=True)
