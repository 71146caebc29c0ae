"""A report's files in a folder that may hold anything else: only what a report wrote is replaced or taken away."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedtune.core.errors import RunFolderError
from fedtune.core.files import write_atomically

LIST = ".fedtune-report"  # the names of a report's files, a line each


@contextmanager
def owned(folder: Path, names: Sequence[str]) -> Iterator[Callable[[str, bytes], None]]:
    """Make room for these files, and give what writes one of them. Those of the report before that aren't among them
    are taken away at the end.

    Raises:
        RunFolderError: if one is there that no report wrote, or can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _listed(folder)
        strange = [name for name in names if (folder / name).exists() and name not in before]
        if strange:
            raise RunFolderError(
                f"{folder / strange[0]} is there already, and no report wrote it: move it away, or name another "
                "folder with --out"
            )
        for parent in {(folder / name).parent for name in names}:
            parent.mkdir(exist_ok=True)
        # Before the files themselves, so that a report that was cut off can be made again
        write_atomically(folder / LIST, "".join(f"{name}\n" for name in sorted({*before, *names})).encode())
        yield lambda name, content: write_atomically(folder / name, content)
        for name in before - set(names):
            (folder / name).unlink(missing_ok=True)
        write_atomically(folder / LIST, "".join(f"{name}\n" for name in sorted(names)).encode())
    except OSError as error:
        raise RunFolderError(
            f"{error.filename or folder} can't be written: {error.strerror or error}. Make room, or name another "
            "folder with --out"
        ) from error


def _listed(folder: Path) -> set[str]:
    """What the list names, of those within the folder: it's a file that anybody could have changed."""
    path = folder / LIST
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {
        line
        for line in lines
        if line and len(Path(line).parts) <= 2 and ".." not in line and not Path(line).is_absolute()
    }
