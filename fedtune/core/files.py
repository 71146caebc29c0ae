"""Files and folders that appear whole or not at all, and folders that one process at a time writes to."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fedtune.core.errors import ExportError, RunFolderError

LOCK = ".lock"  # in a folder that is held, and afterwards


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by a file with that content, on disk before it gets its name."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names of new files on disk. A system that can't do that for folders has other ways."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hold(folder: Path) -> FileLock:
    """Hold the folder for this process, until what is returned is released. The system lets go when the process ends,
    however it ends, and whatever it has forked.

    Raises:
        RunFolderError: if another process holds it.
        OSError: if the folder can't be written to, or its file system has no locks.
    """
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0.1, poll_interval=0.02)  # who only asks whether it is held has it for an instant
    except Timeout as error:
        raise RunFolderError(f"{folder} is being written by another fedtune: wait for it, or stop it first") from error
    return lock


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the folder; None where locks don't tell (on Windows, or where it can't be read).

    FileLock has no way to ask: it would write to what may be another's folder, and take the lock from others who ask.
    So this takes the same lock, a `flock`, together with them.
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


def new_folder(out: str) -> Path:
    """Where to write a folder, as `beside` does.

    Raises:
        ExportError: if something is there.
    """
    target = Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{out} is there already, and not empty: name a new folder")
    return target


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` by one rename when all is in it.

    Raises:
        ExportError: if it can't be written; nothing is left of it then.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
        try:
            yield unfinished
            unfinished.chmod(0o755)  # mkdtemp's is for the owner alone, and so is what safetensors writes
            for file in unfinished.iterdir():
                file.chmod(0o644)
            if target.exists():
                target.rmdir()  # empty, or it fails
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{target} can't be written: {error}. Make room, or name another folder") from error
