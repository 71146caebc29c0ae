"""The parts of a deployment: a SuperLink, and a SuperNode for each device."""

import re
import secrets
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.core.errors import DeploymentError
from fedtune.device.device_file import FILE, DataHere, DeviceFile, written
from simulations.fleet import processes
from simulations.fleet.credentials import make_node_key
from simulations.fleet.processes import wait_until
from simulations.fleet.runs import LINK, START_SECONDS, Value, script, write_toml

if TYPE_CHECKING:
    from simulations.fleet import Fleet

PORT_ATTEMPTS = 5


@dataclass(frozen=True)
class Site:
    """What a device is started with.

    Args:
        name: also the name of its folder.
        config: goes into its node config, beside partition-id, num-partitions and name.
        env: environment variables of its own.
        registered: whether the operator tells the SuperLink its public key.
        trusts: the CA certificate it checks the SuperLink against; the fleet's own if None.
        superlink: where it looks for the SuperLink, such as a proxy's address; the SuperLink's own if empty.
        own: the file or folder that its owner's device.toml names as its data; None: it reads what a run names.
    """

    name: str
    config: Mapping[str, Value] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    registered: bool = True
    trusts: Path | None = None
    superlink: str = ""
    own: Path | None = None


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
        """Ask it to end, as a service manager would; what is left when it has, or after `seconds`, is cut off."""
        self.ask_to_end()
        wait_until(lambda: not self.running(), seconds)
        self.kill()

    def ask_to_end(self) -> None:
        """Send SIGTERM to its main process and come back at once. A SuperNode then tells the SuperLink that it goes."""
        if self.running() and self.process is not None:
            self.process.terminate()

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
    """The server's side."""

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
        common: list[str | Path] = ["--host", "127.0.0.1", "--port", str(self.port)]
        common += ["--database", "state.db"] if self.fleet.database else []
        common += ["--log-file", "superlink.log", "--disable-runtime-dependency-installation"]
        if not self.fleet.secure:
            return ["--insecure", *common]
        certificates: list[str | Path] = ["--ssl-ca-certfile", self.fleet.authority, "--ssl-certfile", "server.pem"]
        return [*certificates, "--ssl-keyfile", "server.key", "--enable-supernode-auth", *common]


class Node(Part):
    """One device: a SuperNode, its SuperExec, and the app process of the message it works on."""

    def __init__(self, fleet: "Fleet", site: Site, partition: int, partitions: int):
        super().__init__(fleet, site.name, site.env)
        self.site = site
        self.key = self.home / "key"
        place: dict[str, Value] = {"partition-id": partition, "num-partitions": partitions, "name": site.name}
        write_toml(self.home / "node.toml", {**place, **site.config})
        if site.own is not None:
            self.own(site.own)

    def own(self, data: Path) -> None:
        """Have its owner's device.toml name this as its data, from the next message on."""
        (self.home / "fedtune").mkdir(exist_ok=True)
        file = DeviceFile(self.site.name, data=DataHere((str(data.resolve()),)))
        (self.home / "fedtune" / FILE).write_text(written(file), encoding="utf-8")

    def start(self, new_key: bool = False, wait: bool = True, patience: float = 0) -> None:
        """Start it with the key it had, or with a new one.

        Args:
            new_key: make it a stranger with a new key, which the operator registers if its site is `registered`.
            wait: until it is online.
            patience: seconds to go on trying while it is turned away, as a service manager would. A node that comes
                back with its key is turned away until the SuperLink has missed two heartbeats, about 66 s.

        Raises:
            DeploymentError: if it is turned away or not there in time.
        """
        if self.fleet.secure and (new_key or not self.key.exists()):
            public = make_node_key(self.key)
            if self.site.registered:
                self.fleet.flwr("supernode", "register", str(public), LINK)
        self._open()
        if wait:
            self.wait_online(patience=patience)

    def wait_online(self, seconds: float = START_SECONDS, patience: float = 0) -> None:
        """Wait until the SuperLink has accepted it.

        Args:
            seconds: how long that may take.
            patience: as for `start`.

        Raises:
            DeploymentError: if it is turned away (Flower's exit 305) or not accepted in time.
        """
        deadline = time.monotonic() + patience
        ports = PORT_ATTEMPTS
        while True:
            wait_until(lambda: self.node_id or not self.running(), seconds)
            if self._port_was_taken() and ports:
                ports -= 1
                self.port = 0
            elif not self.running() and "Exit Code: 305" in self.log() and time.monotonic() < deadline:
                time.sleep(2)
            else:
                break
            self._open()
        self._wait(lambda: self.node_id, "online", seconds)

    @property
    def node_id(self) -> int:
        """The SuperLink's name for it since it was last started; 0 before it is accepted."""
        found = re.search(r"SuperNode ID: (\d+)", self.log())
        return int(found[1]) if found else 0

    def _open(self) -> None:
        self.port = self.port or free_port()
        self._launch(script("flower-supernode"), *self._options())

    def client_apps(self) -> list[int]:
        """The process of the message that it works on, if it does: each lives for one message."""
        return self.process_ids("flwr-clientapp")

    def _options(self) -> list[str | Path]:
        address = self.site.superlink or self.fleet.superlink.address
        common: list[str | Path] = ["--superlink", address, "--host", "127.0.0.1"]
        common += ["--port", str(self.port), "--node-config", "node.toml"]
        if not self.fleet.secure:
            return ["--insecure", *common]
        trusted = self.site.trusts or self.fleet.authority
        return ["--root-certificates", trusted, "--auth-supernode-private-key", "key", *common]


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on. Below the range from which outgoing connections get theirs, so that a
    node that calls a dead SuperLink can't be given its port."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
