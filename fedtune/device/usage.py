"""How much a device has done for runs today, and whether its owner lets it do more."""

import json
from contextlib import suppress
from datetime import date
from pathlib import Path

from fedtune.core.errors import CapacityError
from fedtune.core.files import write_atomically
from fedtune.core.text import size
from fedtune.device.device_file import Limits

FILE = "usage.json"


class Usage:
    """The day's rounds and bytes, kept in the device's home.

    A file that can't be read counts as used up: a limit that a damaged file would lift is none.
    """

    def __init__(self, home: Path, limits: Limits):
        self._path = home / FILE
        self._limits = limits
        self._counts = limits.rounds_a_day is not None or limits.bytes_a_day is not None

    def begin(self, bytes: int) -> None:
        """Count a round and the message that asks for it, before anything is done.

        Raises:
            CapacityError: if it is one too many for today, or the message is too long.
        """
        self.check_message(bytes)
        if not self._counts:
            return
        rounds, before = self._today()
        for name, value in (("rounds_a_day", rounds + 1), ("bytes_a_day", before + bytes)):
            most = getattr(self._limits, name)
            if most is not None and value > most:
                raise CapacityError(
                    f"this device's owner allows {name} = {most:,} (device.toml), and this message would make it "
                    f"{value:,}. Ask again tomorrow"
                )
        self._write(rounds + 1, before + bytes)

    def count(self, bytes: int) -> None:
        """Count an answer, or a message that asks for no training.

        Raises:
            CapacityError: if it is longer than a message may be.
        """
        self.check_message(bytes)
        if self._counts:
            rounds, before = self._today()
            self._write(rounds, before + bytes)

    def check_message(self, bytes: int) -> None:
        """Check how long a message is.

        Raises:
            CapacityError: if a message, either way, is longer than the owner allows.
        """
        most = self._limits.message_bytes
        if most is not None and bytes > most:
            raise CapacityError(
                f"a message of {size(bytes)}: this device's owner allows message_bytes = {most:,} (device.toml)"
            )

    def _today(self) -> tuple[int, int]:
        day = date.today().isoformat()
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            known, rounds, bytes = str(found["day"]), int(found["rounds"]), int(found["bytes"])
        except FileNotFoundError:
            return 0, 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CapacityError(
                f"what this device did today can't be read from {FILE} in its home ({type(error).__name__}): its owner "
                "may delete the file"
            ) from error
        return (rounds, bytes) if known == day else (0, 0)

    def _write(self, rounds: int, bytes: int) -> None:
        entry = {"day": date.today().isoformat(), "rounds": rounds, "bytes": bytes}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            write_atomically(self._path, json.dumps(entry).encode())
