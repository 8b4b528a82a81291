"""The result of a run."""

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
    """The result of a run: the changed model in memory, the change as data, and the measurements."""

    model: Any
    tokenizer: Any
    method: str
    requests: tuple[ForgetRequest, ...]
    hparams: Any
    report: Report
    folder: Path | None
    changes: Changes = field(repr=False)
    #: This step and those before it. A later step continues from here.
    history: History = field(repr=False)

    @property
    def token(self) -> UnlearningToken | None:
        """The unlearning token, if the method has one."""
        return self.changes.token

    @property
    def edit(self) -> WeightEdit | None:
        """The edit as low-rank factors, if the method has it as data."""
        return self.changes.edit

    def revert(self) -> None:
        """Restores model and tokenizer as they were before this step, to the bit. A token of this step is removed.

        Raises EditError for a method that trains the whole model and keeps no copy.
        """
        if self.changes.undo is None:
            raise EditError(f"The changes of {self.method!r} cannot be taken back in memory. Load the model again.")
        self.changes.undo()
