"""Shared by the commands: options, the terminal, progress, and the package's warnings."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ..errors import visible
from ..storage.phase_names import PHASES

if TYPE_CHECKING:
    from ..methods.contract import Progress

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto (all GPUs). Default: chosen for you.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16, for the work and for the output. Default: that of the checkpoint; a CPU "
        "works in float32."
    ),
]
AllowOverlap = Annotated[
    bool,
    typer.Option(
        "--allow-overlap",
        help="Go on even if a fact to keep is also a fact to forget, now or in an earlier edit.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that this package wrote.")]


class Screen(Console):
    """A terminal that prints every text as it is: no markup, no emoji codes, no control sequences.

    Facts, model names and paths are shown with escapes in the place of control characters. For a style, use `styled`.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        # Before the layout, which counts the characters that will be seen.
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Texts made elsewhere, such as lines of the log, pass only through here."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def json(self, value: Any) -> None:
        """Prints a value as JSON, with JSON's own escapes for control characters."""
        text = json.dumps(value, default=dict, ensure_ascii=False)
        self.print_json(text, ensure_ascii=visible(text) != text)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Joins parts, each a plain text or a pair of text and style."""
    return Text.assemble(*(visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts))


def tell(text: str | Text) -> None:
    """Prints a text on the error stream."""
    # Without line breaks, so that a path can be copied.
    Screen(stderr=True).print(text, soft_wrap=True)


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Shows progress: bars on a terminal, else lines for a log."""
    with our_log(console), _bars(console) if console.is_terminal else nullcontext(_log_lines(console)) as report:
        yield report


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    """One line for each phase, with a bar and the time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:28}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>4.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def report(phase: str, share: float, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(visible(PHASES.get(phase, phase)), total=1.0, note="")
            bars.update(tasks[phase], completed=share, note=visible(note))

        yield report


def _log_lines(console: Console) -> Progress:
    """Prints a line when a phase begins, and at every quarter of it, with the seconds since the start.

    A share that falls means that the phase begins again: a run within a comparison goes through it several times.
    """
    start = time.monotonic()
    reached: dict[str, int] = {}

    def report(phase: str, share: float, note: str = "") -> None:
        quarter = int(4 * share)
        if quarter != reached.get(phase, -1):
            reached[phase] = quarter
            title = PHASES.get(phase, phase)
            # One line each, even if it is wide.
            line = f"{time.monotonic() - start:6.0f} s  {title:28} {25 * quarter:3} %  {note}"
            console.print(line, soft_wrap=True)

    return report


@contextmanager
def our_log(console: Console) -> Iterator[None]:
    """Shows this package's warnings above the bars, and switches transformers' own bars off.

    Warnings with an attribute `one_of` are counted by that kind, and shown at the end in one line for each kind.
    """
    from rich.logging import RichHandler
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    kinds: dict[str, dict[str, logging.LogRecord]] = {}

    class Lines(RichHandler):
        def emit(self, record: logging.LogRecord) -> None:
            kind: str = getattr(record, "one_of", "")
            if kind:
                kinds.setdefault(kind, {}).setdefault(record.getMessage(), record)
            else:
                super().emit(record)

        def tell_kinds(self) -> None:
            for kind, found in kinds.items():
                first = copy.copy(next(iter(found.values())))
                if len(found) > 1:
                    first.msg, first.args = f"{len(found)} {kind}. The first: {first.getMessage()}", ()
                super().emit(first)

        def format(self, record: logging.LogRecord) -> str:
            return visible(super().format(record))

    handler = Lines(console=console, show_time=False, show_path=False, markup=False)
    ours = logging.getLogger(__name__.partition(".")[0])
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        handler.tell_kinds()
