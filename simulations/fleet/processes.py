"""Processes found by a mark in their environment, so that none escapes: no grandchild, none in a session of its own.

Flower starts a SuperExec beside every SuperLink and SuperNode, some of them detached, and these start an app process
for every message. A process group misses some of them; what they all inherit is the environment.

Run as a script with a mark, this is a watchdog: it waits until whoever holds its standard input is gone, however that
ended, and then ends whatever carries the mark. It needs nothing but the standard library.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARK = "FEDTUNE_FLEET"  # the environment variable; its value is FLEET/PART


def marked(mark: str) -> dict[int, str]:
    """The living processes whose mark is `mark` or below it, but for this one: process id -> command line."""
    found = {}
    for pid, environment, command in _processes():
        value = environment.get(MARK, "")
        if pid != os.getpid() and (value == mark or value.startswith(f"{mark}/")):
            found[pid] = command
    return found


def cut(mark: str, seconds: float = 10) -> None:
    """End every process with `mark` as a power cut would: all at once, none of them gets to say goodbye.

    Raises:
        TimeoutError: if some are still there after `seconds`.
    """
    frozen: set[int] = set()
    while found := marked(mark).keys() - frozen:  # again until none is new: one may have been starting another
        _signal(found, signal.SIGSTOP)
        frozen |= found
    _signal(frozen, signal.SIGKILL)
    if not wait_until(lambda: not marked(mark), seconds):
        raise TimeoutError(f"processes {sorted(marked(mark))} are still there {seconds:g} s after SIGKILL")


def end(mark: str, patience: float) -> None:
    """Ask every process with `mark` to end, and cut off those that are still there after `patience` seconds."""
    _signal(set(marked(mark)), signal.SIGTERM)
    wait_until(lambda: not marked(mark), patience)
    cut(mark)


def wait_until(true: Callable[[], object], seconds: float) -> bool:
    """Whether `true` came true within `seconds`; it is asked ten times a second."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _processes() -> Iterator[tuple[int, dict[str, str], str]]:
    """Process id, environment and command line of every process that this user may look into."""
    if not Path("/proc/self/environ").exists():
        yield from _processes_elsewhere()
        return
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
            except OSError:
                continue
            # A zombie has an empty environment, and so counts as gone
            yield int(folder.name), dict(pair.partition("=")[::2] for pair in environment), command


def _processes_elsewhere() -> Iterator[tuple[int, dict[str, str], str]]:
    import psutil  # peft brings it along; only systems without /proc need it

    for process in psutil.process_iter(["environ", "cmdline"]):
        yield process.pid, process.info["environ"] or {}, " ".join(process.info["cmdline"] or [])


if __name__ == "__main__":
    sys.stdin.read()
    end(sys.argv[1], patience=3)
