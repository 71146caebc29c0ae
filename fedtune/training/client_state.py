"""What a client keeps for itself between its turns, on the disk of the machine that runs it.

A file per run, client and round. A turn starts from the newest file of an earlier round, so a round that is played
again after a resume, or because a reply got lost, starts from exactly what it started from the first time.

    FOLDER/RUN/INDEX/ROUND.safetensors

A file that was damaged costs its client what it kept, and one turn: it starts anew, and the server tells it everything.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from fedtune.core.errors import ClientError, RunFolderError
from fedtune.core.files import write_atomically
from fedtune.core.protocol import Tensors
from fedtune.core.sealed import seal, unseal

VERSIONS = 2  # the round that the server may have to play again, and the one before it
RUN = re.compile(r"[0-9a-f]{16}")


class ClientStateStore:
    """The memories of all clients that share `folder`: in a simulation the run's own, on a device the node's.

    Args:
        run_folder: the run's own, whose disk is the run's concern and not a client's.
    """

    def __init__(self, folder: Path, run_folder: Path | None = None):
        self._folder = folder
        self._run_folder = run_folder
        self._empty = ("", -1)  # a run and a round before which nobody had kept anything
        self._shared: dict[tuple[str, str], Path] = {}  # where the last one kept what several keep alike

    def load(self, run: str, index: int, round: int) -> Tensors:
        """What client `index` kept before `round`; nothing if that is its first turn.

        Raises:
            ClientError: if the file can't be read, or `run` is no run's id. Of a damaged one this is said once: from
                then on the client has kept nothing.
        """
        if (run, round) == self._empty:
            return {}
        if not os.path.isdir(os.path.dirname(self._place(run, index))):  # noqa: PTH112, PTH120 (asked at every turn)
            self._empty = (run, round)
            return {}
        known = [number for number in self._rounds(run, index) if number < round]
        if not known:
            return {}
        path = self._path(run, index, max(known))
        try:
            return unseal(path)[0]
        except OSError as error:
            raise ClientError(f"client {index} can't read what it kept in {path}: {error.strerror or error}") from error
        except ValueError as error:
            self._forget(run, index, path)
            raise ClientError(
                f"client {index} can't read what it kept in {path}: {error}. It has forgotten all that it kept and "
                "starts anew"
            ) from error

    def save(self, run: str, index: int, round: int, tensors: Tensors, alike: str = "") -> None:
        """Keep `tensors` as what client `index` holds after `round`.

        Args:
            alike: a name for what others keep as well, bit by bit: those of one process then share one file.

        Raises:
            ClientError: if the disk can't take it.
            RunFolderError: if that is the run's own.
        """
        path = self._path(run, index, round)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (alike and self._link(self._shared.get((run, alike)), path)):
                write_atomically(path, seal({name: tensor.detach().cpu() for name, tensor in tensors.items()}))
            if alike:
                self._shared = {(run, alike): path}
            # Later rounds are of a future that a resume undid
            known = self._rounds(run, index)
            earlier = [number for number in known if number <= round]
            for number in set(known) - set(earlier[-VERSIONS:]):
                self._path(run, index, number).unlink(missing_ok=True)
        except OSError as error:
            if self._run_folder is not None:
                raise RunFolderError(
                    f"{path} can't be written: {error.strerror or error}. What was written before is kept; "
                    f"make room, then: fedtune run resume={self._run_folder}"
                ) from error
            raise ClientError(f"client {index} can't keep its state in {path}: {error.strerror or error}") from error

    def _forget(self, run: str, index: int, damaged: Path) -> None:
        """Take out all that a client kept but the damaged file, which gets another name for whoever wants to know."""
        with suppress(OSError):
            damaged.replace(damaged.with_suffix(".damaged"))
            for number in self._rounds(run, index):
                self._path(run, index, number).unlink(missing_ok=True)

    def _link(self, source: Path | None, path: Path) -> bool:
        """Give a file another name, `path`; whether that could be done."""
        if source is None:
            return False
        link = path.with_name(f".{path.name}.link")
        try:
            link.unlink(missing_ok=True)
            link.hardlink_to(source)
            link.replace(path)
            link.unlink(missing_ok=True)  # a rename between names of one file leaves both
        except OSError:  # it has gone, or the file system knows no links
            return False
        return True

    def _path(self, run: str, index: int, round: int) -> Path:
        return Path(self._place(run, index), f"{round}.safetensors")

    def _place(self, run: str, index: int) -> str:
        # The run's id comes from the network: nothing but an id may become a part of a path
        if not RUN.fullmatch(run):
            raise ClientError(f"expected 16 hexadecimal digits as the run's id, got {run[:40]!r}")
        return f"{self._folder}/{run}/{index}"

    def _rounds(self, run: str, index: int) -> list[int]:
        folder = Path(self._place(run, index))
        return sorted(int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdecimal())
