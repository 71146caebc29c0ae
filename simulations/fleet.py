"""A whole Flower deployment on one machine: a SuperLink, a SuperNode for each device, and the command line.

    with Fleet(Path("runs/fleet"), [Site("site-0"), Site("site-1")], app=Path()) as fleet:
        result = fleet.run({"overrides": "experiment=demo population.clients=2"}, stream=sys.stdout)

Everything listens on 127.0.0.1 only. Each part has a folder of its own under the fleet's, which is its FLWR_HOME and
its working folder, as if it were a machine of its own: Flower unpacks the app there, and two parts that unpack it into
one folder at the same time can import half of it.

python -m simulations.fleet --help
"""

import json
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fedtune.errors import DeploymentError, RunFolderError
from simulations import processes
from simulations.credentials import make_certificates, make_node_key
from simulations.processes import MARK, wait_until

Value = str | int | float | bool

START_SECONDS = 60.0  # for a SuperLink to answer, for a node to be online; about 2 when nothing else runs
PORT_ATTEMPTS = 5
LINK = "fleet"  # the SuperLink's name in the command line's config.toml

# What the caller's environment already says wins
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else Flower calls `uv sync`, which needs a network
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Site:
    """What a device is started with.

    Args:
        name: also the name of its folder.
        config: goes into its node config, beside partition-id, num-partitions and name.
        env: environment variables of its own.
        registered: whether the operator tells the SuperLink its public key.
        trusts: the CA certificate it checks the SuperLink against; the fleet's own if None.
    """

    name: str
    config: Mapping[str, Value] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    registered: bool = True
    trusts: Path | None = None


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        status: Flower's word: finished:completed, finished:failed or finished:stopped.
        exit_code: of `flwr run --stream`, which is 0 even for a run that failed.
        seconds: from the command to its end.
        log: what the command printed.
    """

    run_id: int
    status: str
    details: str
    exit_code: int
    seconds: float
    log: Path

    @property
    def completed(self) -> bool:
        return self.status == "finished:completed"


class Part:
    """A SuperLink or a SuperNode: one command and whatever it starts, in a folder of its own."""

    def __init__(self, fleet: "Fleet", name: str, env: Mapping[str, str]):
        self.fleet, self.name, self.env = fleet, name, env
        self.home = fleet.folder / name
        self.home.mkdir(mode=0o700)
        self.mark = f"{fleet.mark}/{name}"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def log_file(self) -> Path:
        return self.home / "output.log"

    def log(self) -> str:
        """What it printed since it was last started, app processes included."""
        if not self.log_file.exists():
            return ""
        text = self.log_file.read_bytes()[self._log_start :].decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def process_ids(self, command: str = "") -> list[int]:
        """Its living processes, or those with `command` in their command line."""
        return sorted(pid for pid, line in processes.marked(self.mark).items() if command in line)

    def kill(self) -> None:
        """Cut its power: all its processes at once, with SIGKILL."""
        processes.cut(self.mark)
        self._reap()

    def stop(self, seconds: float = 8) -> None:
        """Ask it to end, so that it can say goodbye; cut it off after `seconds`."""
        if self.running() and self.process is not None:
            self.process.terminate()  # the main process alone: the others watch it, and go when it has gone
            wait_until(lambda: not processes.marked(self.mark), seconds)
        self.kill()

    def _launch(self, *words: str | Path) -> None:
        if self.running():
            raise DeploymentError(f"{self.name} runs already (process {self.process and self.process.pid})")
        processes.cut(self.mark)  # what a dead SuperNode left behind still holds its port
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=self.home,
                env=self.fleet.environment(self.home, self.mark, self.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the fleet to handle, in order
            )

    def _wait(self, until: Callable[[], object], what: str, seconds: float) -> None:
        wait_until(lambda: until() or not self.running(), seconds)
        if self.running() and until():
            return
        code = self.process.returncode if self.process else None
        why = f"took more than {seconds:g} s" if self.running() else f"ended with exit code {code} before that"
        raise DeploymentError(f"{self.name} was to be {what}, but {why}. {self._tail()}")

    def _tail(self) -> str:
        lines = self.log().strip().splitlines()[-25:]
        return f"The end of {self.log_file}:\n" + "\n".join(f"    {line}" for line in lines)

    def _port_was_taken(self) -> bool:
        return not self.running() and "address already in use" in self.log().lower()

    def _reap(self) -> None:
        if self.process is not None:
            self.process.wait(10)


class SuperLink(Part):
    """The server's side. Its state is in a database, so that it can be killed and started again."""

    def __init__(self, fleet: "Fleet"):
        super().__init__(fleet, "superlink", {})

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.fleet.secure else 'http'}://{self.address}"

    def start(self, seconds: float = START_SECONDS) -> None:
        """Start it, at the same port if it ran before, and wait until it answers.

        Raises:
            DeploymentError: if it doesn't within `seconds`.
        """
        first = not self.port
        for _ in range(PORT_ATTEMPTS):
            self.port = self.port or free_port()
            self._launch(script("flower-superlink"), *self._options())
            wait_until(lambda: self.healthy() or not self.running(), seconds)
            if not (first and self._port_was_taken()):
                break
            self.port = 0
        self._wait(self.healthy, "ready", seconds)
        self.fleet.write_connection()

    def healthy(self) -> bool:
        """Whether it answers GET /health, with a certificate that the fleet's CA signed."""
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self.fleet.secure:
            trust = ssl.create_default_context(cafile=self.fleet.authority)
            handlers.append(urllib.request.HTTPSHandler(context=trust))
        try:
            with urllib.request.build_opener(*handlers).open(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _options(self) -> list[str | Path]:
        common: list[str | Path] = ["--host", "127.0.0.1", "--port", str(self.port), "--database", "state.db"]
        common += ["--log-file", "superlink.log", "--disable-runtime-dependency-installation"]
        if not self.fleet.secure:
            return ["--insecure", *common]
        certificates = ["--ssl-ca-certfile", self.fleet.authority, "--ssl-certfile", "server.pem"]
        return [*certificates, "--ssl-keyfile", "server.key", "--enable-supernode-auth", *common]


class Node(Part):
    """One device: a SuperNode, its SuperExec, and the app process of the message it works on."""

    def __init__(self, fleet: "Fleet", site: Site, partition: int, partitions: int):
        super().__init__(fleet, site.name, site.env)
        self.site = site
        self.key = self.home / "key"
        place = {"partition-id": partition, "num-partitions": partitions, "name": site.name}
        write_toml(self.home / "node.toml", {**place, **site.config})

    def start(self, new_key: bool = False, wait: bool = True, patience: float = 0) -> None:
        """Start it with the key it had, or with a new one.

        Args:
            new_key: make it a stranger with a new key, which the operator registers if its site is `registered`.
            wait: until it is online.
            patience: seconds to go on trying while it is turned away, as a service manager would. A node that comes back
                with its key is turned away until the SuperLink has missed two heartbeats, about 66 s.

        Raises:
            DeploymentError: if it is turned away or not there in time.
        """
        if self.fleet.secure and (new_key or not self.key.exists()):
            public = make_node_key(self.key)
            if self.site.registered:
                self.fleet.flwr("supernode", "register", str(public), LINK)
        for _ in range(PORT_ATTEMPTS):
            self.port = self.port or free_port()
            self._launch(script("flower-supernode"), *self._options())
            if not wait:
                return
            wait_until(lambda: self.node_id or not self.running(), START_SECONDS)
            if not self._port_was_taken():
                break
            self.port = 0
        deadline = time.monotonic() + patience
        while not self.running() and "Exit Code: 305" in self.log() and time.monotonic() < deadline:
            time.sleep(2)
            self._launch(script("flower-supernode"), *self._options())
            wait_until(lambda: self.node_id or not self.running(), START_SECONDS)
        self.wait_online()

    def wait_online(self, seconds: float = START_SECONDS) -> None:
        """Wait until the SuperLink has accepted it.

        Raises:
            DeploymentError: if it turns it away (Flower's exit 305) or doesn't answer within `seconds`.
        """
        self._wait(lambda: self.node_id, "online", seconds)

    @property
    def node_id(self) -> int:
        """The SuperLink's name for it since it was last started; 0 before it is accepted."""
        found = re.search(r"SuperNode ID: (\d+)", self.log())
        return int(found[1]) if found else 0

    def client_apps(self) -> list[int]:
        """The process of the message that it works on, if it does: each lives for one message."""
        return self.process_ids("flwr-clientapp")

    def _options(self) -> list[str | Path]:
        common: list[str | Path] = ["--superlink", self.fleet.superlink.address, "--host", "127.0.0.1"]
        common += ["--port", str(self.port), "--node-config", "node.toml"]
        if not self.fleet.secure:
            return ["--insecure", *common]
        trusted = self.site.trusts or self.fleet.authority
        return ["--root-certificates", trusted, "--auth-supernode-private-key", "key", *common]


class Run:
    """A run that goes on in the background."""

    def __init__(self, fleet: "Fleet", name: str, config: Mapping[str, Value], stream: TextIO | None):
        self.fleet = fleet
        self.log_file = fleet.operator / f"{name}.log"
        settings = fleet.operator / f"{name}.toml"
        write_toml(settings, config)
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [script("flwr"), "run", str(fleet.app), LINK, "--stream", "--run-config", str(settings)],
            cwd=fleet.operator,
            env=fleet.environment(fleet.operator, f"{fleet.mark}/operator"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._ended = 0.0
        self._pump = threading.Thread(target=self._copy, args=(stream,), daemon=True)
        self._pump.start()

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8") if self.log_file.exists() else ""

    def run_id(self, seconds: float = START_SECONDS) -> int:
        """Flower's name for it; waits for it to be accepted.

        Raises:
            DeploymentError: if it isn't within `seconds`; the message has what `flwr run` printed.
        """

        def found() -> re.Match[str] | None:
            return re.search(r"Successfully started run (\d+)", self.log())

        wait_until(lambda: found() or not self._pump.is_alive(), seconds)
        if not (match := found()):
            code = self._process.poll()
            raise DeploymentError(f"flwr run (exit code {code}) didn't start a run:\n{self.log().strip()}")
        return int(match[1])

    def status(self) -> tuple[str, str]:
        """Flower's status (pending, starting, running, finished:...) and its details."""
        answer = self.fleet.ask("ls", LINK, "--run-id", str(self.run_id()))
        return answer["runs"][0]["status"], answer["runs"][0]["status-details"]

    def wait(self, seconds: float) -> RunResult:
        """Wait for the end.

        Raises:
            DeploymentError: if it goes on for more than `seconds`.
        """
        deadline = time.monotonic() + seconds
        self._pump.join(seconds)
        run_id = self.run_id(1)
        # The stream of the log can break off before the run ends, so its end is not yet the run's
        while not (now := self.status())[0].startswith("finished"):
            if time.monotonic() > deadline:
                raise DeploymentError(f"run {run_id} is still {now[0]} after {seconds:g} s; see {self.log_file}")
            time.sleep(1)
        end = self._ended or time.monotonic()
        return RunResult(run_id, *now, self._process.wait(10), end - self._began, self.log_file)

    def stop(self) -> None:
        """Have Flower stop it."""
        self.fleet.flwr("stop", str(self.run_id()), LINK)

    def _copy(self, stream: TextIO | None) -> None:
        with self.log_file.open("w", encoding="utf-8") as log:
            for line in self._process.stdout or ():
                log.write(line)
                log.flush()
                if stream is not None:
                    stream.write(line)
                    stream.flush()
        self._ended = time.monotonic()


class Fleet:
    """A deployment on loopback; see the module's docstring.

    Args:
        folder: must be new or empty; certificates, keys, logs and the database go there.
        sites: the devices, in the order of their partitions.
        app: the folder of the Flower app to run.
        secure: TLS with a CA of its own, and a registered key for each node; else everything in the open.
        env: environment variables for every process.
        say: told each step, in a line.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[Site],
        *,
        app: Path,
        secure: bool = True,
        env: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.folder, self.app, self.secure = folder.resolve(), app.resolve(), secure
        self.sites, self.env, self.say = tuple(sites), dict(env or {}), say
        self.mark = secrets.token_hex(8)
        self.authority = self.folder / "ca.crt"
        self.operator = self.folder / "operator"
        self.nodes: list[Node] = []
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._runs = 0

    def __enter__(self) -> "Fleet":
        if self.folder.exists() and any(self.folder.iterdir()):
            raise RunFolderError(f"{self.folder} is not empty: a fleet needs a new folder")
        self.operator.mkdir(parents=True, mode=0o700)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        watchdog = [sys.executable, processes.__file__, self.mark]
        self._watchdog = subprocess.Popen(watchdog, stdin=subprocess.PIPE, start_new_session=True)
        self.superlink = SuperLink(self)
        if self.secure:
            make_certificates(self.authority, self.superlink.home / "server.pem", self.superlink.home / "server.key")
            self.say(f"made a CA and a certificate for localhost: {self.authority}")
        self.superlink.start()
        self.say(f"started a SuperLink at {self.superlink.url}")
        for site in self.sites:
            self.add(site).start(wait=False)
            self.say(f"started {site.name}" + (", its key registered" if self.secure and site.registered else ""))
        for node in self.nodes:
            node.wait_online()
        self.say(f"{len(self.nodes)} nodes are online")

    def add(self, site: Site) -> Node:
        """One more device, not started yet. Its partition is the next one; the others aren't told."""
        node = Node(self, site, len(self.nodes), max(len(self.sites), len(self.nodes) + 1))
        self.nodes.append(node)
        return node

    def close(self) -> None:
        """End everything: the nodes say goodbye, then the SuperLink; what is left after a few seconds is cut off."""
        try:
            for node in self.nodes:
                if node.running() and node.process is not None:
                    node.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not any(node.running() for node in self.nodes), 4)
            if hasattr(self, "superlink"):
                self.superlink.stop(3)
        finally:
            processes.cut(self.mark)
            if self._watchdog is not None and self._watchdog.stdin is not None:
                self._watchdog.stdin.close()
                self._watchdog.wait(10)

    def run(self, run_config: Mapping[str, Value], stream: TextIO | None = None, seconds: float = 86_400) -> RunResult:
        """Run the app and wait for its end; a run that failed is a result, not an error.

        Raises:
            DeploymentError: if it can't be started, or goes on for more than `seconds`.
        """
        return self.begin(run_config, stream).wait(seconds)

    def begin(self, run_config: Mapping[str, Value], stream: TextIO | None = None) -> Run:
        """Start a run and come back at once. Each key must be in the app's [tool.flwr.app.config]."""
        self._runs += 1
        return Run(self, f"run-{self._runs}", run_config, stream)

    def online(self) -> dict[int, str]:
        """The status (registered, online, offline, ...) of every node that the SuperLink knows, by node id."""
        return {int(node["node-id"]): node["status"] for node in self.ask("supernode", "ls", LINK)["nodes"]}

    def node_process_ids(self, index: int) -> list[int]:
        """The living processes of a node: SuperNode, SuperExec, and what they started."""
        return self.nodes[index].process_ids()

    def ask(self, *words: str) -> Any:
        """The answer of a `flwr` command that can give it as JSON."""
        return json.loads(self.flwr(*words, "--format", "json"))

    def flwr(self, *words: str, seconds: float = 60) -> str:
        """Call Flower's command line, as the operator; returns what it printed.

        Raises:
            DeploymentError: if it fails or takes longer than `seconds`.
        """
        environment = self.environment(self.operator, f"{self.mark}/operator")
        command = [script("flwr"), *words]
        try:
            done = subprocess.run(
                command,
                cwd=self.operator,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DeploymentError(f"flwr {' '.join(words)} took more than {seconds:g} s") from error
        if done.returncode:
            raise DeploymentError(f"flwr {' '.join(words)} failed: {(done.stderr + done.stdout).strip()}")
        return done.stdout

    def write_connection(self) -> None:
        """Tell the command line where the SuperLink is: $FLWR_HOME/config.toml."""
        trust = f'root-certificates = "{self.authority}"' if self.secure else "insecure = true"
        text = f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "{self.superlink.address}"\n{trust}\n'
        (self.operator / "config.toml").write_text(text)

    def environment(self, home: Path, mark: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a part of the fleet sees. PYTHONPATH stays behind: the app's code comes from its bundle."""
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        own = {
            "FLWR_HOME": str(home),
            MARK: mark,
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), outside.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": ",".join(filter(None, [outside.get("NO_PROXY"), "127.0.0.1,localhost"])),
        }
        return {**QUIET, **outside, **own, **self.env, **(env or {})}


def script(name: str) -> str:
    """The path of a command that was installed beside this Python."""
    return str(Path(sysconfig.get_path("scripts"), name))


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on. Below the range from which outgoing connections get theirs, so that a
    node that calls a dead SuperLink can't be given its port."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def write_toml(path: Path, values: Mapping[str, Value]) -> None:
    """Write flat settings; a string may have any length and any number of lines (JSON's strings are TOML's)."""
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n" for name, value in values.items())
    path.write_text("".join(lines), encoding="utf-8")
