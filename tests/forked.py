"""Processes that have imported everything already: a server imports torch, transformers, the engine and Flower once for
all tests, and forks.

A command takes 7 CPU seconds to import what it needs, and a toy run half a second; each message takes a node of Flower
a process of 3. What is tested here is what the command does in a process of its own: its words, environment, folder,
pipes, signals, exit code. What starts with bare imports (locales, flags of Python, the time of a start) takes
`subprocess`, and test_fleet_ends.py has Flower's commands as they are installed.

    Popen -> server: words, folder, environment, ends -> process id; at its end, its exit code
    the process: `subprocess.Popen` is the one below, so that what it starts is forked from the server as well
"""

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.metadata
import json
import os
import random
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from fedtune.comparisons.processes import IMPORTED, take_environment

FOLDER = "FORKED_FROM"  # the environment variable with the folder of the server's socket
ACCOUNT = "FORKED_FOR"  # that with the process whose tests a process is for
PADDING = "FORKED_PADDING"
REAL = subprocess.Popen
COMMANDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-clientapp", "flwr-serverapp", "flwr")


def small_files() -> None:
    """The system refuses to let files grow past 16 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))


def cpu_seconds() -> float:
    """What the processes that were forked for this process's tests, and have ended, have taken."""
    if not Popen.used:
        return 0.0
    with _connect() as line:
        line.send(json.dumps({"cpu_of": os.environ.get(ACCOUNT, "")}).encode())
        return float(json.loads(line.recv(1 << 10)))


def _words(args: Any) -> list[str] | None:
    """What a command line of Python's or of Flower's does: `-m` or `-c`, what, and its words; None of another."""
    if isinstance(args, str | bytes) or not args:
        return None
    first, *rest = map(str, args)
    if first == sys.executable and rest:
        bare = rest[1:] if rest[0] == "-P" else rest
        return rest if bare[0] in ("-m", "-c") else None
    return ["", first, *rest] if Path(first).name in COMMANDS else None


class Popen(subprocess.Popen):
    """subprocess.Popen; Python's `-m` and `-c` and Flower's commands are forked from the server."""

    used = False

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, *ends: Any) -> None:  # fmt: skip
        words = None if shell or sys.platform != "linux" else _words(args)
        self._line: Any = None
        if words is None:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                                   creationflags, shell, *ends)  # fmt: skip
            return
        Popen.used = True
        inner, outer = [ends[0], ends[3], ends[5]], ends[:6]
        # Standard input is empty where nothing was asked: pytest's own is
        null = os.open(os.devnull, os.O_RDWR)
        given = [end if end != -1 else (null, 1, 2)[number] for number, end in enumerate(inner)]
        what = {
            "words": words,
            "folder": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "first": preexec_fn.__name__ if preexec_fn else None,
            "alone": ends[-2],
            "parent": os.getpid(),
        }
        self._line = _connect()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))]
        self._line.sendmsg([json.dumps(what).encode()], rights)
        os.close(null)
        self.pid = json.loads(self._line.recv(1 << 10))
        self._child_created = True
        self._close_pipe_fds(*outer)

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if getattr(self, "_line", None) is None:
            return super()._internal_poll(*args, **options)
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self._hear()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._line is None:
            return super()._wait(timeout)
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._hear()
        return self.returncode

    def _hear(self) -> None:
        said = self._line.recv(1 << 10)
        self.returncode = json.loads(said) if said else -signal.SIGKILL  # the server itself is gone
        self._line.close()


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


@contextlib.contextmanager
def everywhere():
    """`subprocess` starts processes this way."""
    subprocess.Popen = Popen
    try:
        yield
    finally:
        subprocess.Popen = REAL


def prepare() -> None:
    """Name a folder for the server, if the process that started this one hasn't, and this process as one that tests."""
    if FOLDER not in os.environ:
        folder = tempfile.mkdtemp(prefix="forked-")
        Path(folder, "owner").write_text(str(os.getpid()))
        os.environ[FOLDER] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[ACCOUNT] = str(os.getpid())


def _connect() -> socket.socket:
    folder = Path(os.environ[FOLDER])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one that starts it, while others wait
        if not (folder / "ready").exists():
            _start(folder)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(str(folder / "socket"))
    return line


def _start(folder: Path) -> None:
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), PADDING: " " * 8000}
    with (folder / "log").open("w") as log:
        server = REAL(
            [sys.executable, __file__, str(folder), " " * 4000],  # room for other command lines
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not (folder / "ready").exists():
        if server.poll() is not None:
            raise RuntimeError(f"the server that forks ended: {(folder / 'log').read_text()}")
        time.sleep(0.05)


class Server:
    """Forks a process for whoever asks, until the process that named its folder is gone."""

    def __init__(self, folder: Path):
        self.folder, self.owner = folder, int((folder / "owner").read_text())
        self.children: dict[int, tuple[int, socket.socket, str]] = {}  # pidfd -> pid, who waits, whose account
        self.spent: dict[str, float] = defaultdict(float)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(64)
        scripts = importlib.metadata.entry_points(group="console_scripts")
        self.commands = {name: scripts[name] for name in COMMANDS}
        for entry in self.commands.values():
            entry.load()
        for module in (*IMPORTED, "fedtune.commands.main", "fedtune.server.round_loop"):
            importlib.import_module(module)
        # A thousand patterns, which a process compiles for its first adapter
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
        assert threading.active_count() == 1
        gc.collect()
        gc.freeze()
        (folder / "ready").touch()

    def serve(self) -> None:
        while psutil.pid_exists(self.owner):
            ready, _, _ = select.select([self.listener, *self.children], [], [], 1.0)
            for one in ready:
                if one is not self.listener:
                    self._ended(one)
                elif (asked := self._next()) is not None:
                    self._become(*asked)  # in the process that was forked, which never returns

    def _next(self) -> Any:
        line, _ = self.listener.accept()
        said, ends, _, _ = socket.recv_fds(line, 1 << 20, 3)
        if not said:
            line.close()
            return None
        what = json.loads(said)
        if "cpu_of" in what:
            line.send(json.dumps(self.spent[what["cpu_of"]]).encode())
            line.close()
            return None
        if not (pid := os.fork()):
            return what, ends
        for end in ends:
            os.close(end)
        self.children[os.pidfd_open(pid)] = pid, line, what["environment"].get(ACCOUNT, "")
        with contextlib.suppress(OSError):
            line.send(json.dumps(pid).encode())
        return None

    def _ended(self, descriptor: int) -> None:
        pid, line, account = self.children.pop(descriptor)
        os.close(descriptor)
        _, status, used = os.wait4(pid, 0)
        self.spent[account] += used.ru_utime + used.ru_stime
        with contextlib.suppress(OSError):
            line.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
        line.close()

    def _become(self, what: dict[str, Any], ends: list[int]) -> None:
        code = 1
        try:
            for descriptor, (_, line, _) in self.children.items():
                os.close(descriptor)
                line.close()
            self.listener.close()
            code = _run(what, ends, self.commands)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                threading._shutdown()
                atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)


def _run(what: dict[str, Any], ends: list[int], commands: dict[str, Any]) -> int:
    if what["alone"]:
        os.setsid()
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)
    words, environment = what["words"], what["environment"]
    take_environment(environment)
    _show(words[1:] if words[0] == "" else [sys.executable, *words], environment)
    os.chdir(what["folder"])
    os.getppid = lambda: what["parent"]  # as Flower and a worker see it
    random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # its own
    subprocess.Popen = Popen
    safe = words[0] == "-P"
    flag, name, *rest = words[safe:]
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    here = [] if safe else [str(Path(name).parent)] if flag == "" else [""]
    sys.path[:] = [*here, *given, *(path for path in sys.path if path not in OWN)]
    if what["first"]:
        globals()[what["first"]]()
    if flag == "" or name == "fedtune.runtime.worker":  # an app comes with code of its own
        for module in [each for each in sys.modules if each.partition(".")[0] == "fedtune"]:
            del sys.modules[module]
    sys.argv = [name if flag == "" else flag, *rest]
    try:
        if flag == "":
            return int(commands[Path(name).name].load()() or 0)
        if flag == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    return 0


def _show(words: list[str], environment: dict[str, str]) -> None:
    """Have the system tell this command line and environment, by which a fleet finds its processes, in place of those
    that the server was started with."""
    _, _, after = Path("/proc/self/stat").read_text().rpartition(")")
    places = [int(number) for number in after.split()[45:49]]
    said = [f"{key}={value}" for key, value in sorted(environment.items(), key=lambda item: len(item[1]))]
    for begin, end, texts in ((places[0], places[1], words), (places[2], places[3], said)):
        text = b"".join(part.encode(errors="replace") + b"\0" for part in texts)[: end - begin - 1]
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, text, len(text))


if __name__ == "__main__":
    os.environ.pop(PADDING)
    OWN = {str(Path(__file__).parent), *os.environ["PYTHONPATH"].split(os.pathsep)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Server(Path(sys.argv[1])).serve()
    shutil.rmtree(sys.argv[1], ignore_errors=True)
