"""Whether a process is at a folder: the lock that `run_folder.lock` takes says so, however a process ended."""

from pathlib import Path

LOCK = ".lock"


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the folder's lock; None where locks don't tell (on Windows, or where it can't be read).

    To ask takes the lock together with others who ask, for an instant; `run_folder.lock` tries again.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        with (folder / LOCK).open("rb") as handle:
            fcntl.flock(handle.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
