"""What an attack of the audit is: a name, what it asks, and one function that runs on one model.

An attack sees one model at a time. The verdict compares its results on the edited model with those on the unedited
model and, if there is one, on a reference model that never knew the facts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .errors import PluginError, did_you_mean, shown
from .evaluation.answers import OF_FULL_AUDITS, OF_QUICK_AUDITS, AnswerLength

if TYPE_CHECKING:
    from .facts.request import ForgetRequest
    from .models.architecture import Architecture
    from .models.loaded import LoadedModel

#: What attacks try, in the order in which they are run and shown.
GROUPS: Mapping[str, str] = {
    "plain": "The questions as they are",
    "ban": "Without the refusal: the token or the usual refusals banned, the answer's opening put in the model's mouth",
    "words": "Other words: paraphrases, other templates and turns, a choice, a gap to fill",
    "sampling": "Sampling: many tries at a temperature",
    "weights": "Weights rounded or pruned",
    "relearning": "Relearning: a few steps of fine-tuning",
    "inside": "Inside: what the hidden states and the probabilities still say",
    "collateral": "Collateral: what else has changed",
}

EDITED, UNEDITED, REFERENCE = "edited", "unedited", "reference"
#: The attack that every audit makes and that the verdict begins with: the questions as they are.
PLAIN = "plain"

#: A share in [0, 1], or None if the attack does not apply to the fact.
Value = float | None


@dataclass(frozen=True)
class Sizes:
    """How much an audit does."""

    name: str
    #: At most so many facts to forget, kept facts, unrelated questions and ordinary texts.
    facts: int
    kept: int
    unrelated: int
    texts: int
    #: How long an answer may be, in tokens (`evaluation.answers.AnswerLength`).
    answer_room: int
    answer_least: int
    answer_most: int
    #: Whether every variant of an attack is made. A small audit leaves some out.
    every_variant: bool
    samples: int
    temperatures: tuple[float, ...]
    #: The answers are measured after these numbers of steps, if kept facts or other text are trained on.
    relearn_steps: tuple[int, ...]
    #: The same if some of the forgotten facts are trained on. They need more steps to show what comes back.
    relearn_some_steps: tuple[int, ...]
    #: Rows of one training step.
    relearn_batch: int

    @property
    def answers(self) -> AnswerLength:
        """How long an answer may be."""
        return AnswerLength(more=self.answer_room, least=self.answer_least, most=self.answer_most)


QUICK = Sizes(
    name="quick",
    facts=8,
    kept=12,
    unrelated=12,
    texts=4,
    answer_room=OF_QUICK_AUDITS.more,
    answer_least=OF_QUICK_AUDITS.least,
    answer_most=OF_QUICK_AUDITS.most,
    every_variant=False,
    samples=4,
    temperatures=(1.0,),
    relearn_steps=(3,),
    relearn_some_steps=(8,),
    relearn_batch=4,
)
FULL = Sizes(
    name="full",
    facts=400,
    kept=100,
    unrelated=60,
    texts=60,
    answer_room=OF_FULL_AUDITS.more,
    answer_least=OF_FULL_AUDITS.least,
    answer_most=OF_FULL_AUDITS.most,
    every_variant=True,
    samples=64,
    temperatures=(0.2, 0.7, 1.0),
    relearn_steps=(5, 10, 20, 40),
    relearn_some_steps=(5, 10, 20, 40),
    relearn_batch=8,
)


@dataclass(frozen=True)
class Audited:
    """One of the audited models: its role, and the id of its unlearning token if it has one."""

    role: str
    loaded: LoadedModel
    token_id: int | None = None

    @property
    def model(self) -> Any:
        """A causal language model of transformers, in evaluation mode."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    @cached_property
    def arch(self) -> Architecture:
        """The model's blocks and projections."""
        from .models.architecture import find_architecture  # here, so that listing the attacks stays quick

        return find_architecture(self.model)


@dataclass(frozen=True)
class Context:
    """What an attack is given beside the model."""

    facts: tuple[ForgetRequest, ...]
    kept: tuple[ForgetRequest, ...]
    sizes: Sizes
    seed: int = 0
    #: Facts that no model was trained on, for the membership attacks. Without them the kept facts take their place.
    holdout: tuple[ForgetRequest, ...] = ()
    form: str = "chat"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    #: Whether the chat template lets the model think before it answers. All other attacks ask behind an empty thought.
    thinks: bool = False
    #: The text of the unlearning token, to name it in prompts and to remove it from answers; "" if there is none.
    token: str = ""
    #: Blocks whose projections were edited, if the folder's record tells them.
    layers: tuple[int, ...] = ()
    #: Whether there is a reference model that never knew the facts.
    has_reference: bool = False
    #: The unedited model, for an attack that `needs_original`.
    original: Audited | None = None
    #: The result of the plain questions on the same model, if they were asked before.
    plain: AttackResult | None = None
    #: Results of the same attack on other models, if they were attacked before, by role.
    earlier: Mapping[str, AttackResult] = field(default_factory=dict)
    progress: Callable[[float], None] = lambda share: None


@dataclass(frozen=True)
class Measure:
    """One variant of an attack on one model."""

    name: str
    #: By fact: 1 if the answer was given, else 0; or a share in between.
    values: tuple[Value, ...]
    #: The same outputs judged against other facts' answers, (shifts, facts). They show what chance gives.
    others: tuple[tuple[Value, ...], ...]
    #: The prompts and the outputs by fact; empty if nothing was generated.
    prompts: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    #: (line, steps) if the measure is a point of a curve.
    curve: tuple[str, int] | None = None


@dataclass(frozen=True)
class AttackResult:
    """What one attack found on one model."""

    measures: tuple[Measure, ...] = ()
    #: Values by item that recover no fact, such as perplexity by text or refusals by question.
    series: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    #: Single figures, and curves by block.
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    #: Why the attack cannot be made on this model; "" if it was made.
    unfit: str = ""
    seconds: float = 0.0

    @property
    def values(self) -> tuple[Value, ...]:
        """The largest value of any variant, by fact."""
        return _best([measure.values for measure in self.measures])

    @property
    def others(self) -> tuple[tuple[Value, ...], ...]:
        """The same against other facts' answers, (shifts, facts)."""
        return tuple(map(_best, zip(*(measure.others for measure in self.measures), strict=True)))


def _best(rows: Sequence[Sequence[Value]]) -> tuple[Value, ...]:
    columns = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
    return tuple(max(column) if column else None for column in columns)


@dataclass(frozen=True)
class Attack:
    """One way to recover a fact. Raises PluginError for a name with other characters, and for an unknown group."""

    #: What `--attacks` takes: letters, digits, hyphens and underscores.
    name: str
    #: A key of GROUPS.
    group: str
    #: What it asks, in one sentence.
    asks: str
    #: What it costs, in words.
    cost: str
    #: Attacks one model. It leaves every weight as it was, to the bit.
    run: Callable[[Audited, Context], AttackResult] = field(repr=False)
    needs_token: bool = False
    #: It needs a chat template that lets the model think first.
    needs_thinking: bool = False
    #: A model that never knew the facts may do well at it, so a result means something only beside a reference model.
    needs_reference: bool = False
    #: It also looks into the unedited model (`Context.original`).
    needs_original: bool = False
    #: It finds traces and no answers. They forbid the word "removed", and are not called a recovery.
    tells_only: bool = False
    #: It asks what the edit changed. It is made on the unedited and the edited model alone.
    of_the_edit: bool = False
    #: Why it cannot be made on these facts; "" if it can.
    unfit: Callable[[Context], str] = field(default=lambda context: "", repr=False)

    def __post_init__(self) -> None:
        if self.name in GROUPS and self.group != self.name:
            raise PluginError(
                f"An attack cannot be called {self.name!r}: a group has that name, and `--attacks` takes that for the "
                "group. Give it another name."
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise PluginError(
                f"An attack cannot be called {shown(self.name)}: use letters, digits, hyphens and underscores."
            )
        if self.group not in GROUPS:
            raise PluginError(
                f"The attack {self.name!r} is in the group {shown(self.group)}, which does not exist."
                f"{did_you_mean(self.group, GROUPS)} Groups: {', '.join(GROUPS)}."
            )


def check_result(attack: Attack, result: Any, facts: int) -> None:
    """Raises PluginError for a result that the verdict and the page cannot read. `facts`: how many were asked."""
    if not isinstance(result, AttackResult):
        raise PluginError(f"The attack {attack.name!r} gave {shown(result)}. It is to give an AttackResult.")
    for measure in result.measures:
        what = f"The attack {attack.name!r} gave, in {measure.name!r},"
        if {len(measure.values), *map(len, measure.others)} != {facts}:
            raise PluginError(
                f"{what} not one value for each of the {facts} facts. Give None for a fact that the attack does not "
                "apply to."
            )
        if len(measure.others) != len(result.measures[0].others):
            raise PluginError(f"{what} another number of rows `others` than in its first measure. Give as many.")
        if (len(measure.prompts), len(measure.texts)) not in ((0, 0), (facts, facts)):
            raise PluginError(f"{what} not one prompt and one text for each of the {facts} facts. Give all or none.")
        known = [value for row in (measure.values, *measure.others) for value in row if value is not None]
        if not all(0.0 <= value <= 1.0 for value in known):
            raise PluginError(f"{what} a value outside [0, 1].")
