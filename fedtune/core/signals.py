"""What else ends a process is taken as Ctrl-C: a scheduler's TERM, a terminal that went away (HUP)."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Within it TERM and HUP do what Ctrl-C does, once: what that ends is being written down. What is ignored (by
    nohup, say) stays so."""
    if current_thread() is not main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDINGS}
    caught = [number for number in ENDINGS if before[number] is not signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:
        for one in caught:
            signal.signal(one, signal.SIG_IGN)
        ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(ctrl_c):  # a shell lets what it starts in the background ignore Ctrl-C, but not these
            raise KeyboardInterrupt
        ctrl_c(signal.SIGINT, frame)

    try:
        for number in caught:
            signal.signal(number, end)
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number] or signal.SIG_DFL)
