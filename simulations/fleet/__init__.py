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
import secrets
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fedtune.core.errors import DeploymentError, RunFolderError
from simulations.fleet import processes
from simulations.fleet.credentials import make_certificates
from simulations.fleet.parts import Node, Site, SuperLink
from simulations.fleet.processes import MARK, wait_until
from simulations.fleet.runs import LINK, Run, RunResult, Value, script

__all__ = ["Fleet", "Node", "Run", "RunResult", "Site", "SuperLink"]

# What the caller's environment already says wins
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else Flower calls `uv sync`, which needs a network
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


# All devices here are this user's, who may open any file on them already. A real one names folders (docs/security.md)
OWNER = {"FEDTUNE_FOLDERS": os.sep}


class Fleet:
    """A deployment on loopback; see the module's docstring.

    Args:
        folder: must be new or empty; certificates, keys, logs and the database go there.
        sites: the devices, in the order of their partitions.
        app: the folder of the Flower app to run.
        secure: TLS with a CA of its own, and a registered key for each node; else everything in the open.
        database: keep the SuperLink's state in a file, so that it can be killed and started again. A busy machine's
            database is locked at times, above all when messages of hundreds of megabytes are written to it.
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
        database: bool = True,
        env: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.folder, self.app, self.secure = folder.resolve(), app.resolve(), secure
        self.database = database
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
        watchdog = [sys.executable, "-I", processes.__file__, self.mark]
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
            processes.cut(f"{self.mark}/operator")
            for node in self.nodes:
                node.ask_to_end()
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
        (self.operator / "config.toml").write_text(text, encoding="utf-8")

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
        return {**QUIET, **OWNER, **outside, **own, **self.env, **(env or {})}
