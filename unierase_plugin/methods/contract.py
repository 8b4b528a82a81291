"""What an unlearning method is: a name, settings, and one function that edits or trains a loaded model in place.

`unlearn` and `unierase run` do the rest for every method alike: they read and check the requests, load the model, ask
it before and after, write the folder with its record, and take the change back where something fails after it.
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
    #: One a step, oldest first, with the keys that later steps protect.
    edits: tuple[WeightEdit, ...]
    #: SHA-256 over the parameters before the first of them, and over the tokenizer.
    fingerprint: str
    tokenizer_fingerprint: str
    #: Questions that they forgot, in `request.one_spelling`: those of steps in memory; a folder's are in its ledger.
    questions: frozenset[str] = frozenset()

    def after(self, changes: Changes, requests: Iterable[ForgetRequest] = ()) -> History:
        """These edits and one more."""
        edits = self.edits if changes.edit is None else (*self.edits, changes.edit)
        forgotten = self.questions.union(one_spelling(request.question) for request in requests)
        return replace(self, token=changes.token or self.token, edits=edits, questions=forgotten)


@dataclass(frozen=True)
class Job(Generic[H]):
    """One run of a method. Facts and settings are checked; the model is as it was loaded, or as the caller gave it."""

    #: The model is in evaluation mode, and no parameter has a gradient. Methods change this very object and may set
    #: modes and gradients as they need them: both are put back afterwards.
    loaded: LoadedModel
    #: At least one, no question twice; subjects filled where the method needs them.
    requests: tuple[ForgetRequest, ...]
    #: Facts to keep; may be empty.
    retain: tuple[ForgetRequest, ...]
    hparams: H
    #: Folder for phases that are expensive, gone once the output is written; the same for the same job, so that a run
    #: that was killed finds them again. None where nothing is to be written.
    work: Path | None
    #: What this method did to the model before, which this run goes on from.
    history: History | None
    progress: Progress
    #: The solvers that the settings can name, plugins' among them; empty for those of this package.
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
        """What the user calls the model: a folder, a hub id, or a class where it came loaded."""
        return self.loaded.name

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.hparams.seed

    @cached_property
    def contexts(self: Job[UniEraseHyperParams]) -> tuple[str, ...]:
        """Texts before prompts, written by the model as it is when they are first asked for: before the edit."""
        from ..locate_then_edit.targets import context_texts

        lengths = self.hparams.context_template_length_params
        return context_texts(self.model, self.tokenizer, lengths, self.loaded.pad_id)

    @property
    def max_tokens(self) -> int:
        """The device's budget: tokens of one batch at most, padding included."""
        return self.loaded.max_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model's parameters as they came."""
        return self.loaded.fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """The same over the tokenizer."""
        return self.loaded.tokenizer_fingerprint


@dataclass(frozen=True)
class Changes:
    """What a method did to the model, for the record. Everything may be left out."""

    #: The update as low-rank factors, where the method has it as data: what `export` and a later step go by.
    edit: WeightEdit | None = None
    #: What `edit` overwrote: what `revert` goes by.
    originals: Originals | None = None
    #: The unlearning token, where the method has one.
    token: UnlearningToken | None = None
    #: The token's largest probability on ordinary text, learned but before the edit.
    token_leak: float | None = None
    #: How many parameters may differ from before; None for all of them.
    parameters: int | None = None
    #: Seconds by phase.
    seconds: Mapping[str, float] = field(default_factory=dict)
    #: How well the method did what it meant to: numbers, lists and mappings of them, for the report's `edit`.
    figures: Mapping[str, Any] = field(default_factory=dict)
    #: Questions that the method found around the facts to forget, with the model's answers, and kept as well.
    neighbours: tuple[ForgetRequest, ...] = ()
    #: Puts the weights back, where the method can.
    undo: Callable[[], None] | None = None


@dataclass(frozen=True)
class Method(Generic[H]):
    """An unlearning method. Raises PluginError for a name that the command line could not take."""

    #: What `--method` takes: lower-case letters, digits and underscores.
    name: str
    #: One line that says what it does.
    title: str
    #: The work to cite.
    paper: str
    #: Its settings: a frozen dataclass that derives from HyperParams.
    hparams: type[H]
    #: Edits or trains `job.model` in place; None where there is nothing to record. Raises a UniEraseError that names
    #: value and remedy; an edit is then to be undone.
    run: Callable[[Job[H]], Changes | None] = field(repr=False)
    #: Raises a UniEraseError for what can be told without work, before the model is asked anything.
    check: Callable[[Job[H]], None] = field(default=lambda job: None, repr=False)
    #: Settings that depend on the model; raises HyperParamsError where they do not fit it.
    settle: Callable[[Any, H], H] = field(default=lambda model, hparams: hparams, repr=False)
    #: Whether every request must name its subject; found by rule where it is not given.
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
