"""Other packages' code, run so that it ends nothing but itself and prints nothing into what a command prints."""

from __future__ import annotations

import copy
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any

from ..errors import PluginError


@contextmanager
def kept_in(what: str) -> Iterator[None]:
    """Within it a wish to end the program is a PluginError that names `what`.

    Ctrl-C and other signals end the program all the same. The handler of SIGINT is put back at the end.
    """
    with _ctrl_c_noted() as pressed:
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            # Signals of other kinds raise exceptions of their own (cli/signals.py).
            own = isinstance(error, KeyboardInterrupt) and type(error) is not KeyboardInterrupt
            if own or pressed:
                raise
            raise PluginError(
                f"{what} called for the end of the program ({type(error).__name__}: {error}), which is not its to end. "
                "Ask its authors to raise an error instead, or leave it out."
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, what is printed goes to the error stream, since standard output may be read by a program."""
    with redirect_stdout(sys.stderr):
        yield


def guarded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The function, kept in."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with kept_in(what):
            return function(*args, **kwargs)

    return call


def guarded_parts(thing: Any, names: tuple[str, ...], what: str) -> Any:
    """A copy of a frozen dataclass in which the functions of those names are kept in."""
    copied = copy.copy(thing)
    for name in names:
        object.__setattr__(copied, name, guarded(getattr(thing, name), what))
    return copied


def guarded_maker(make: Callable[..., Any], methods: tuple[str, ...], what: str) -> Callable[..., Any]:
    """The function, kept in. So are these methods of what it makes, which has to have them."""

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        with kept_in(what):
            made = make(*args, **kwargs)
        lacking = [name for name in methods if not callable(getattr(made, name, None))]
        if lacking:
            raise PluginError(f"{what} made {made!r}, which has no {', '.join(lacking)}. Tell its authors.")
        return _Guarded(made, methods, what)

    return call


class _Guarded:
    """An object of which some methods are kept in, also where they return another object that has all of them."""

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
    """A list that is empty until Ctrl-C is pressed. Signals reach the main thread alone."""
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
