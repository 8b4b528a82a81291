"""Runs the code of other packages: it cannot end the program, and prints nothing into the output of a command."""

from __future__ import annotations

import copy
import functools
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any

from ..errors import PluginError, UniEraseError, reason

#: Modules whose exceptions end a command.
COMMAND_ENDS = ("click", "typer")


@contextmanager
def kept_in(what: str, told: bool = True) -> Iterator[None]:
    """Turns whatever the code raises into a PluginError that names `what` and the line, but for errors of this package.

    SystemExit and the like too. A full disk is told as such. What a command raises to end itself goes on.

    told   whether exceptions are turned too, and not only what would end the program

    Ctrl-C and other signals end the program as always. The handler of SIGINT is put back at the end.
    """
    with _ctrl_c_noted() as pressed:
        try:
            yield
        except Exception as error:
            from ..storage.atomic import is_full  # here, since it imports torch

            if (
                not told
                or isinstance(error, UniEraseError)
                or is_full(error)
                or type(error).__module__.startswith(COMMAND_ENDS)
            ):
                raise
            raise PluginError(
                f"{what} failed: {type(error).__name__}: {reason(error)} ({place_of(error)}). Ask its authors to mend "
                "it, or leave it out."
            ) from error
        except BaseException as error:
            # Other signals raise exceptions of their own (cli/signals.py).
            own = isinstance(error, KeyboardInterrupt) and type(error) is not KeyboardInterrupt
            if own or pressed:
                raise
            raise PluginError(
                f"{what} tried to end the program ({type(error).__name__}: {error}). Only a command may do that. Ask "
                "its authors to raise an error instead, or leave it out."
            ) from error


def place_of(error: Exception) -> str:
    """File and line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "no line is known"


@contextmanager
def quiet() -> Iterator[None]:
    """Sends what is printed to the error stream. A program may read standard output."""
    with redirect_stdout(sys.stderr):
        yield


def guarded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The function, run within `kept_in`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with kept_in(what):
            return function(*args, **kwargs)

    return call


def guarded_parts(thing: Any, names: tuple[str, ...], what: str) -> Any:
    """A copy of a frozen dataclass. Its functions of those names run within `kept_in`."""
    copied = copy.copy(thing)
    for name in names:
        object.__setattr__(copied, name, guarded(getattr(thing, name), what))
    return copied


def guarded_maker(make: Callable[..., Any], methods: tuple[str, ...], what: str) -> Callable[..., Any]:
    """The function, run within `kept_in`. The object that it makes must have `methods`, and they run so too."""

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        with kept_in(what):
            made = make(*args, **kwargs)
        lacking = [name for name in methods if not callable(getattr(made, name, None))]
        if lacking:
            raise PluginError(f"{what} made {made!r}, which has no {', '.join(lacking)}. Ask its authors to add them.")
        return _Guarded(made, methods, what)

    return call


class _Guarded:
    """An object some of whose methods run within `kept_in`. An object that they return with all of them is another."""

    def __init__(self, thing: Any, methods: tuple[str, ...], what: str) -> None:
        self._thing, self._methods, self._what = thing, methods, what

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._thing, name)
        if name not in self._methods:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            found = guarded(value, self._what)(*args, **kwargs)
            like = all(callable(getattr(found, each, None)) for each in self._methods)
            return _Guarded(found, self._methods, self._what) if like else found

        return call


@contextmanager
def _ctrl_c_noted() -> Iterator[list[int]]:
    """A list that stays empty until Ctrl-C is pressed. Only the main thread gets signals."""
    pressed: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield pressed
        return
    call: Callable[[int, FrameType | None], Any] = handler

    def note(number: int, frame: FrameType | None) -> Any:
        pressed.append(number)
        return call(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)
