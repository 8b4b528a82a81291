"""What a run leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import EditError
from .evaluation.report import Report
from .facts.request import ForgetRequest
from .locate_then_edit.edit import WeightEdit
from .methods.contract import Changes, History
from .unlearning_token import UnlearningToken


@dataclass(frozen=True)
class UnlearnResult:
    """What a run leaves: the changed model in memory, the change as data, and what was measured."""

    model: Any
    tokenizer: Any
    method: str
    requests: tuple[ForgetRequest, ...]
    hparams: Any
    report: Report
    folder: Path | None
    changes: Changes = field(repr=False)
    #: This step and those before it: what a later one goes on from.
    history: History = field(repr=False)

    @property
    def token(self) -> UnlearningToken | None:
        """The unlearning token, where the method has one."""
        return self.changes.token

    @property
    def edit(self) -> WeightEdit | None:
        """The edit as low-rank factors, where the method has it as data."""
        return self.changes.edit

    def revert(self) -> None:
        """Model and tokenizer as they were before this step, to the bit; a token that came with it goes.

        Raises EditError for a method that trains the whole model and keeps no copy.
        """
        if self.changes.undo is None:
            raise EditError(f"What {self.method!r} did cannot be taken back in memory. Load the model again.")
        self.changes.undo()
