"""What an unlearning method is: a name, settings, and one function that edits or trains a loaded model in place.

`unlearn` and `unierase run` do the rest for every method: they read and check the requests, load the model, ask it
before and after, write the folder with its record, and undo the change if something fails later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import PluginError
from ..facts.request import ForgetRequest, one_spelling
from ..hparams import HyperParams, UniEraseHyperParams

if TYPE_CHECKING:
    from ..checkpoint import Originals
    from ..locate_then_edit.edit import WeightEdit
    from ..locate_then_edit.solvers import MakeSolver
    from ..models.loaded import LoadedModel
    from ..unlearning_token import UnlearningToken

#: Called with (phase, share done from 0 to 1, note).
Progress = Callable[[str, float, str], None]

H = TypeVar("H", bound=HyperParams)


@dataclass(frozen=True)
class History:
    """Edits that earlier calls already applied to this model."""

    token: UnlearningToken | None
    #: One for each step, oldest first, with the keys that later steps protect.
    edits: tuple[WeightEdit, ...]
    #: SHA-256 over the parameters before the first edit, and over the tokenizer.
    fingerprint: str
    tokenizer_fingerprint: str
    #: Questions that steps in memory forgot, after `request.one_spelling`. Those of a folder are in its ledger.
    questions: frozenset[str] = frozenset()

    def after(self, changes: Changes, requests: Iterable[ForgetRequest] = ()) -> History:
        """The history with one more edit."""
        edits = self.edits if changes.edit is None else (*self.edits, changes.edit)
        forgotten = self.questions.union(one_spelling(request.question) for request in requests)
        return replace(self, token=changes.token or self.token, edits=edits, questions=forgotten)


@dataclass(frozen=True)
class Job(Generic[H]):
    """One run of a method. Facts and settings are checked. The model is as it was loaded, or as the caller gave it."""

    #: The model is in evaluation mode, and no parameter has a gradient. Methods change this object itself. They may set
    #: modes and gradients as they need: both are restored afterwards.
    loaded: LoadedModel
    #: At least one request, and no question twice. Subjects are filled in if the method needs them.
    requests: tuple[ForgetRequest, ...]
    #: Facts to keep; may be empty.
    retain: tuple[ForgetRequest, ...]
    hparams: H
    #: Folder for the results of expensive phases, deleted when the output is written. The same job gets the same
    #: folder, so a run that was killed finds them again. None if nothing is to be written.
    work: Path | None
    #: Edits that this method already applied to the model, and that this run continues.
    history: History | None
    progress: Progress
    #: The solvers that the settings can name, including those of plugins; empty for those of this package.
    solvers: Mapping[str, MakeSolver] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """A causal language model of transformers on its device."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    @property
    def name(self) -> str:
        """The user's name for the model: a folder, a hub id, or a class name if it came loaded."""
        return self.loaded.name

    @property
    def seed(self) -> int:
        """The seed of all random choices."""
        return self.hparams.seed

    @cached_property
    def contexts(self: Job[UniEraseHyperParams]) -> tuple[str, ...]:
        """Texts to put before prompts. The model writes them when they are first needed, which is before the edit."""
        from ..locate_then_edit.targets import context_texts

        lengths = self.hparams.context_template_length_params
        return context_texts(self.model, self.tokenizer, lengths, self.loaded.pad_id)

    @property
    def max_tokens(self) -> int:
        """The most tokens of one batch that the device can take, including padding."""
        return self.loaded.max_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model's parameters at the start."""
        return self.loaded.fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the tokenizer."""
        return self.loaded.tokenizer_fingerprint


@dataclass(frozen=True)
class Changes:
    """What a method did to the model, for the record. Every field may be left out."""

    #: The update as low-rank factors, if the method has it as data. `export` and later steps need it.
    edit: WeightEdit | None = None
    #: The weights that `edit` overwrote. `revert` needs them.
    originals: Originals | None = None
    #: The unlearning token, if the method has one.
    token: UnlearningToken | None = None
    #: The token's largest probability on ordinary text, after it was learned and before the edit.
    token_leak: float | None = None
    #: How many parameters may have changed; None for all of them.
    parameters: int | None = None
    #: Seconds by phase.
    seconds: Mapping[str, float] = field(default_factory=dict)
    #: Figures of the method's success for the report's `edit`: numbers, and lists and mappings of numbers.
    figures: Mapping[str, Any] = field(default_factory=dict)
    #: Neighbours of the facts to forget that the method found and kept, with the model's answers.
    neighbours: tuple[ForgetRequest, ...] = ()
    #: Puts the weights back, if the method can.
    undo: Callable[[], None] | None = None


@dataclass(frozen=True)
class Method(Generic[H]):
    """An unlearning method. Raises PluginError for a name that the command line cannot take."""

    #: The name for `--method`: lower-case letters, digits and underscores.
    name: str
    #: One line that says what it does.
    title: str
    #: The work to cite.
    paper: str
    #: Its settings: a frozen dataclass that derives from HyperParams.
    hparams: type[H]
    #: Edits or trains `job.model` in place. Returns None if there is nothing to record. Raises a UniEraseError that
    #: names value and remedy; it must undo an edit before that.
    run: Callable[[Job[H]], Changes | None] = field(repr=False)
    #: Raises a UniEraseError for faults that show without work, before the model is asked anything.
    check: Callable[[Job[H]], None] = field(default=lambda job: None, repr=False)
    #: Fills in settings that depend on the model. Raises HyperParamsError if they do not fit it.
    settle: Callable[[Any, H], H] = field(default=lambda model, hparams: hparams, repr=False)
    #: Whether every request must name its subject. If it is not given, it is found by rule.
    needs_subjects: bool = False

    def __post_init__(self) -> None:
        if not (self.name.isidentifier() and self.name.isascii() and self.name == self.name.casefold()):
            raise PluginError(
                f"A method cannot be called {self.name!r}: use lower-case letters, digits and underscores, a letter "
                "first."
            )
        if not (isinstance(self.hparams, type) and issubclass(self.hparams, HyperParams)):
            raise PluginError(
                f"The hparams of method {self.name!r} must be a class that derives from "
                f"unierase_plugin.hparams.HyperParams, not {self.hparams!r}."
            )
