"""Standard output and standard error whose other end may close: `fedtune run | head -1` prints a line, and the run goes
on. What nobody reads any more is no reason to lose a run."""

import io
import os
import sys
from typing import Any, TextIO


class _Outlet(io.FileIO):
    """A descriptor that takes everything, and drops it once it can't be passed on."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError:  # a closed pipe; a full disk, where output goes to a file
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self.fileno())
            return len(memoryview(content).cast("B"))


def outlast_readers() -> None:
    """Let nothing that this process prints raise because nobody takes it. Streams that somebody put in place of the
    process's own are left alone."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr)


def _lasting(stream: TextIO | None) -> Any:
    if stream is None:  # closed from the start, and Python prints nothing
        return stream
    try:
        stream.flush()
        outlet = _Outlet(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError):  # it has no descriptor
        return stream
    # Not UTF-8, perhaps, where the terminal isn't: then what it can't show is shown as \\x.. rather than raised
    errors = stream.errors if (stream.encoding or "").lower().replace("-", "") == "utf8" else "backslashreplace"
    buffered = io.BufferedWriter(outlet)
    return io.TextIOWrapper(buffered, stream.encoding, errors, line_buffering=getattr(stream, "line_buffering", False))
