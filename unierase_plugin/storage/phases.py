"""Times the phases of a long run, and keeps finished phases for the next start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from .cache import Store
from .tensor_files import Packed, pack, unpack

R = TypeVar("R")


class Phases:
    """Times a run's phases, and keeps finished ones beside the output folder, readable for the owner alone.

    They may hold answers of the model, and so what is to be forgotten.
    """

    def __init__(self, work: Path | None) -> None:
        self.work = None if work is None else Store(work, private=True)
        self.seconds: dict[str, float] = {}

    def resumed(self, kind: str, key: str, compute: Callable[[], Packed]) -> Packed:
        """What `compute` gives, from the work folder if an earlier start finished it."""
        return compute() if self.work is None else self.work.cached(kind, key, compute)

    def record(self, record: type[R], kind: str, key: str, compute: Callable[[], R]) -> R:
        """The same for a dataclass. It is read back in any case, so that a cold run gives what a warm one does."""
        return unpack(record, *self.resumed(kind, key, lambda: pack(compute())))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
