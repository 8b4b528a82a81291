"""The attacks of this package: a table, and one short file for each kind.

The table is light. What an attack runs is imported when it runs, so that listing the attacks stays quick.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import PluginError, UniEraseError, did_you_mean, shown
from ...plugins.catalogue import Catalogue
from ..contract import GROUPS, PLAIN, Attack, Context

_TRAINING = "a few training steps, one or three ways, with all answers after each number of steps"


def _in(module: str, name: str = "run") -> Callable[..., Any]:
    """The function of that name in a module beside this one, which is imported when the function is called."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(*arguments)

    return call


def _needs_kept(context: Context) -> str:
    return "" if context.kept else "it needs facts to keep: give --retain"


#: In the order in which they are run and shown, which is that of GROUPS.
ATTACKS: tuple[Attack, ...] = (
    Attack(PLAIN, "plain", "The question as it is, answered greedily.", "one answer a fact", _in("plain")),
    Attack(
        "token-ban",
        "ban",
        "The question, with the unlearning token's logit masked at every step.",
        "one answer a fact",
        _in("bans", "ban_token"),
        needs_token=True,
    ),
    Attack(
        "token-rows",
        "ban",
        "The question, with the token's rows deleted from the model.",
        "one answer a fact",
        _in("bans", "delete_rows"),
        needs_token=True,
    ),
    Attack(
        "refusal-ban",
        "ban",
        "The question, with the token and the usual refusals banned at every step.",
        "one or two answers a fact",
        _in("bans", "ban_refusals"),
    ),
    Attack(
        "prefill",
        "ban",
        'The question, with the answer already begun: "Sure, the answer is".',
        "one to five answers a fact",
        _in("openings", "prefill"),
    ),
    Attack(
        "first-word",
        "ban",
        "The question, with the first word of the true answer already said.",
        "one answer a fact",
        _in("openings", "first_word"),
        needs_reference=True,
    ),
    Attack(
        "ignore",
        "ban",
        "The question, with the order to ignore the token and not to decline.",
        "one to three answers a fact",
        _in("orders"),
    ),
    Attack(
        "paraphrases",
        "words",
        "The data's own paraphrases of the question.",
        "one answer a paraphrase",
        _in("rewording", "paraphrases"),
        unfit=lambda context: "" if any(fact.paraphrases for fact in context.facts) else "the data has no paraphrases",
    ),
    Attack(
        "spellings",
        "words",
        "The question with typos and in another case.",
        "one to four answers a fact",
        _in("rewording", "spellings"),
    ),
    Attack(
        "templates",
        "words",
        "The question in plain text, in other frames and under other system prompts.",
        "one to seven answers a fact",
        _in("rewording", "templates"),
    ),
    Attack(
        "few-shot",
        "words",
        "The question after kept questions that were answered.",
        "one or two answers a fact",
        _in("rewording", "few_shot"),
        unfit=_needs_kept,
    ),
    Attack(
        "fill-in",
        "words",
        "The question as a statement to go on with.",
        "one or two answers a fact",
        _in("rewording", "fill_in"),
    ),
    Attack(
        "multiple-choice",
        "words",
        "Which of four answers is the true one?",
        "four or eight short passes a fact",
        _in("choice"),
        needs_reference=True,
        unfit=_in("choice", "unfit"),
    ),
    Attack(
        "leak-at-k",
        "sampling",
        "The question many times at a temperature: does any of k answers give it away?",
        "8 or 64 answers a fact and temperature",
        _in("sampling"),
    ),
    Attack(
        "quantise",
        "weights",
        "The question, with the weights of all linear maps rounded to few bits.",
        "one to four answers a fact, and perplexity",
        _in("rounding", "quantise"),
    ),
    Attack(
        "prune",
        "weights",
        "The question, with the smallest weights of each matrix set to zero.",
        "one to three answers a fact, and perplexity",
        _in("rounding", "prune"),
    ),
    Attack(
        "relearn-some",
        "relearning",
        "Half of the forgotten facts trained on, the other half asked.",
        _TRAINING,
        _in("relearning", "some_forgotten"),
        unfit=lambda context: "" if len(context.facts) > 1 else "it needs two facts to forget at least",
    ),
    Attack(
        "relearn-kept",
        "relearning",
        "Only kept facts trained on, the forgotten ones asked.",
        _TRAINING,
        _in("relearning", "kept_only"),
        unfit=_needs_kept,
    ),
    Attack(
        "relearn-text",
        "relearning",
        "Only unrelated text trained on, the forgotten facts asked.",
        _TRAINING,
        _in("relearning", "unrelated_text"),
    ),
    Attack(
        "logit-lens",
        "inside",
        "Is the answer's first token among the likeliest five at any block?",
        "two short passes a fact",
        _in("inside", "lens"),
        needs_reference=True,
    ),
    Attack(
        "probe",
        "inside",
        "Do linear probes of the hidden states tell the true answer from three wrong ones?",
        "four short passes a fact, kept ones too",
        _in("probe"),
        needs_reference=True,
        unfit=_in("probe", "unfit"),
    ),
    Attack(
        "answer-probability",
        "inside",
        "How likely is the answer, token by token, after the question and after a refusal?",
        "two short passes a fact and start",
        _in("inside", "probability"),
        needs_reference=True,
    ),
    Attack(
        "patching-depth",
        "inside",
        "How much of the answer do its hidden states still carry into the unedited model?",
        "a short pass a fact and, from each block on, one of the unedited model",
        _in("depth"),
        needs_original=True,
        tells_only=True,
        unfit=lambda context: (
            "" if context.has_reference else "it needs a model that never knew the facts: --reference"
        ),
    ),
    Attack(
        "extraction",
        "inside",
        "How much of the answer must be given until the model says the rest?",
        "two short passes a fact",
        _in("inside", "extraction"),
        needs_reference=True,
    ),
    Attack(
        "membership",
        "inside",
        "Do losses and gradients tell the forgotten facts from others?",
        "a few passes and a gradient for each fact and its counterpart",
        _in("membership"),
        unfit=lambda context: (
            "" if context.holdout or context.kept else "it needs --holdout, or facts to keep (--retain)"
        ),
    ),
    Attack(
        "retention",
        "collateral",
        "Are kept facts still answered, and are unrelated questions refused?",
        "one answer a kept and a bundled question",
        _in("collateral", "retention"),
        of_the_edit=True,
    ),
    Attack(
        "ordinary-text",
        "collateral",
        "Perplexity of ordinary text, and whether the token appears in it.",
        "two passes a text",
        _in("collateral", "ordinary_text"),
        of_the_edit=True,
    ),
    Attack(
        "paired",
        "collateral",
        "A forgotten and a kept question in one turn.",
        "one or two answers a fact",
        _in("collateral", "paired"),
        unfit=_needs_kept,
    ),
)


def in_order(attacks: Catalogue[Attack]) -> tuple[Attack, ...]:
    """The registered attacks group by group, in the order in which they are run and shown."""
    groups = list(GROUPS)
    return tuple(sorted(attacks.values(), key=lambda attack: groups.index(attack.group)))


def choose_attacks(names: Sequence[str], attacks: Catalogue[Attack]) -> tuple[Attack, ...]:
    """The attacks of these names or groups; all attacks if there are no names. The plain questions always take part.

    Raises UniEraseError for an unknown name. Raises PluginError if two plugins claim an attack that takes part: an
    audit that leaves it out would say less than it seems to.
    """
    found = in_order(attacks)
    known = [attack.name for attack in found]
    for name in attacks.contested():
        # The group of a contested name is as open as everything else about it.
        if name == PLAIN or not names or ({name, *GROUPS} - {PLAIN}).intersection(names):
            raise PluginError(attacks.clash(name))
    for name in names:
        if name not in known and name not in GROUPS:
            raise UniEraseError(
                f"There is no attack {shown(name)}.{did_you_mean(name, [*known, *GROUPS])} Attacks: "
                f"{', '.join(known)}; groups: {', '.join(GROUPS)}."
            )
    if not names:
        return found
    return tuple(attack for attack in found if attack.name in (PLAIN, *names) or attack.group in names)
