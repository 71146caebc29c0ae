"""A round's updates, held in little memory."""

import errno
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, overload

from fedtune.core.errors import RunFolderError
from fedtune.core.protocol import ClientInfo, Codec, Tensors, Update, size_of
from fedtune.wire.delta_coding import decode, with_feedback

MEMORY_BYTES = 64 << 20  # updates beyond this wait in a temporary file, encoded


@dataclass(frozen=True)
class _Stored:
    """An update whose tensors are in the file."""

    start: int
    length: int
    rest: Update  # without tensors
    known: Tensors  # what the client was sent
    lost: Tensors  # and what was left out of that


class Buffered(list[tuple[ClientInfo, Update]]):
    """The updates of a step of an asynchronous server."""

    def drop(self, index: int) -> None:
        """Forget what this client sent."""
        self[:] = [reply for reply in self if reply[0].index != index]


class UpdateSequence(Sequence[tuple[ClientInfo, Update]]):
    """Clients and their updates, each made when it is looked up (`at`)."""

    @abstractmethod
    def at(self, place: int) -> tuple[ClientInfo, Update]:
        """The client and the update at this place."""

    @overload
    def __getitem__(self, place: int) -> tuple[ClientInfo, Update]: ...

    @overload
    def __getitem__(self, place: slice) -> list[tuple[ClientInfo, Update]]: ...

    def __getitem__(self, place: int | slice) -> tuple[ClientInfo, Update] | list[tuple[ClientInfo, Update]]:
        if isinstance(place, slice):
            return [self.at(number) for number in range(*place.indices(len(self)))]
        return self.at(place)


class Replies(UpdateSequence):
    """The valid updates of a round.

    Past the first 64 MB they wait on disk and are decoded when looked up, so a strategy that passes over them one by
    one needs no more memory for 500 clients than for 10.
    """

    def __init__(self, codec: Codec, folder: Path, memory_bytes: int = MEMORY_BYTES):
        self._codec = codec
        self._folder = folder
        self._room = memory_bytes
        self._items: list[tuple[ClientInfo, Update | _Stored]] = []
        self._file: IO[bytes] | None = None

    def add(
        self, peer: ClientInfo, update: Update, blob: bytes, known: Tensors | None = None, lost: Tensors | None = None
    ) -> None:
        """Keep `update`, whose tensors `blob` encodes, given what is `known` of them already.

        Args:
            lost: what the codec left out of what the client was sent: it is added, so that what is handed back is what
                a client that heard all of it would have sent, if it moved by as much.

        Raises:
            RunFolderError: if the disk can't take it.
        """
        self._room -= size_of(update.tensors)
        kept: Update | _Stored
        if self._room >= 0:
            kept = replace(update, tensors=with_feedback(update.tensors, lost or {}))
        else:
            kept = self._store(update, blob, known or {}, lost or {})
        self._items.append((peer, kept))

    def sort(self) -> None:
        """Put them in order of peer index: sums are then the same, whoever came first."""
        self._items.sort(key=lambda item: item[0].index)

    def drop(self, index: int) -> None:
        """Forget what this client sent."""
        self._items = [item for item in self._items if item[0].index != index]

    def close(self) -> None:
        self._items.clear()
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._items)

    def at(self, place: int) -> tuple[ClientInfo, Update]:
        """The client and its update, read from the disk if it waits there."""
        peer, update = self._items[place]
        return peer, self._load(update) if isinstance(update, _Stored) else update

    def _store(self, update: Update, blob: bytes, known: Tensors, lost: Tensors) -> _Stored:
        try:
            if self._file is None:
                self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (closed in close)
            start = self._file.seek(0, 2)
            if self._file.write(blob) != len(blob):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunFolderError(
                f"{self._folder} can't hold the round's updates: {error.strerror or error}. What was written before is "
                f"kept; make room, then: fedtune run resume={self._folder}"
            ) from error
        return _Stored(start, len(blob), replace(update, tensors={}), known, lost)

    def _load(self, stored: _Stored) -> Update:
        assert self._file is not None
        self._file.seek(stored.start)
        tensors = decode(self._codec, self._file.read(stored.length), stored.known)
        return replace(stored.rest, tensors=with_feedback(tensors, stored.lost))


Updates = Replies | Buffered  # of which some may turn out not to be believed
