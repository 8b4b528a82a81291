"""Progress inside a harness. Its own bar does not move while a fact is edited, which can take minutes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..methods.contract import Progress
from ..storage.phase_names import PHASES

#: Seconds between two lines: on a terminal (True), and in a file.
INTERVALS = {True: 0.5, False: 30.0}


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on the error stream, where harnesses show theirs: the phase, the share that is done, and a note."""
    with tqdm(
        total=100,
        leave=False,
        mininterval=INTERVALS[sys.stderr.isatty()],
        miniters=0,
        bar_format="UniErase, {desc}: {percentage:3.0f} % |{bar:20}| {elapsed}{postfix}",
    ) as bar:
        shown: list[str] = []

        def report(phase: str, share: float, note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            if shown[-1:] != [phase]:
                shown.append(phase)
                bar.reset()
                bar.set_description_str(PHASES.get(phase, phase), refresh=True)
            bar.update(100 * share - bar.n)

        yield report
