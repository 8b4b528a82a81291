"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is half done is put away, and a line says what is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

#: What a shell reports of a program that a signal ended is this and the signal's number.
STATUS = 128


class Ended(KeyboardInterrupt):
    """A signal other than Ctrl-C's asks for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise Ended. One that is ignored, as under nohup, or has a handler, keeps it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Ended(number)

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return STATUS + (stop.number if isinstance(stop, Ended) else signal.SIGINT)
