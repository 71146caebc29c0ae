"""Processes that have imported everything already: a server imports torch, transformers and the engine once, and forks.

A command takes 7 CPU seconds to import what it needs, and a toy run half a second. What is tested here is what the
command does in a process of its own: its words, environment, folder, pipes, signals, exit code. What starts with bare
imports (locales, flags of Python, the time of a start) takes `subprocess`.
"""

import atexit
import os
import resource
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import psutil

from fedtune.comparisons.processes import starting, take_environment, without_script


def cpu_seconds() -> float:
    """What this process's server and those of its children that have ended have taken."""
    if (pid := getattr(forkserver._forkserver, "_forkserver_pid", None)) is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def small_files() -> None:
    """The system refuses to let files grow past 16 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))


def _become(
    words: list[str], folder: str, environment: dict[str, str], ends: list[Any], first: Any, alone: bool
) -> None:
    """Run Python's `words` (`-m module ...` or `-c code ...`) as a process of its own would."""
    if alone:
        os.setsid()
    for number, end in enumerate(ends):
        os.dup2(end.detach(), number)
    take_environment(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # its own
    if first:
        first()
    flag, what, *rest = words
    sys.argv = [flag, *rest]
    sys.path[0] = ""  # as both flags do
    try:
        if flag == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()


class Popen(subprocess.Popen):
    """subprocess.Popen for `[sys.executable, "-m" or "-c", what, ...]`, forked from the server."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, *ends: Any) -> None:  # fmt: skip
        inner, outer = [ends[0], ends[3], ends[5]], ends[:6]
        start_new_session = ends[-2]
        python, *words = map(str, args)
        assert python == sys.executable
        # Standard input is empty where nothing was asked: pytest's own is
        null = os.open(os.devnull, os.O_RDWR)
        given = [DupFd(end if end != -1 else (null, 1, 2)[number]) for number, end in enumerate(inner)]
        environment = dict(os.environ if env is None else env)
        self._process = starting().Process(
            target=_become, args=(words, str(cwd or Path.cwd()), environment, given, preexec_fn, start_new_session)
        )
        with without_script():
            self._process.start()
        os.close(null)
        self.pid = self._process.pid
        self._child_created = True
        self._close_pipe_fds(*outer)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


def run(words: list[str], *, timeout: float = 200, check: bool = False, capture_output: bool = False, **options: Any):
    """subprocess.run, likewise."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(words, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(words, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
