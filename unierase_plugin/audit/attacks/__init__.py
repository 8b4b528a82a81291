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
    Attack(
        name=PLAIN,
        group="plain",
        asks="The question as it is, answered greedily.",
        cost="one answer a fact",
        run=_in("plain"),
    ),
    Attack(
        name="token-ban",
        group="ban",
        asks="The question, with the unlearning token's logit masked at every step.",
        cost="one answer a fact",
        run=_in("bans", "ban_token"),
        needs_token=True,
    ),
    Attack(
        name="token-rows",
        group="ban",
        asks="The question, with the token's rows deleted from the model.",
        cost="one answer a fact",
        run=_in("bans", "delete_rows"),
        needs_token=True,
    ),
    Attack(
        name="refusal-ban",
        group="ban",
        asks="The question, with the token and the usual refusals banned at every step.",
        cost="one or two answers a fact",
        run=_in("bans", "ban_refusals"),
    ),
    Attack(
        name="prefill",
        group="ban",
        asks='The question, with the answer already begun: "Sure, the answer is".',
        cost="one to five answers a fact",
        run=_in("openings", "prefill"),
    ),
    Attack(
        name="first-word",
        group="ban",
        asks="The question, with the first word of the true answer already said.",
        cost="one answer a fact",
        run=_in("openings", "first_word"),
        needs_reference=True,
    ),
    Attack(
        name="ignore",
        group="ban",
        asks="The question, with the order to ignore the token and not to decline.",
        cost="one to three answers a fact",
        run=_in("orders"),
    ),
    Attack(
        name="paraphrases",
        group="words",
        asks="The data's own paraphrases of the question.",
        cost="one answer a paraphrase",
        run=_in("rewording", "paraphrases"),
        unfit=lambda context: "" if any(fact.paraphrases for fact in context.facts) else "the data has no paraphrases",
    ),
    Attack(
        name="spellings",
        group="words",
        asks="The question with typos and in another case.",
        cost="one to four answers a fact",
        run=_in("rewording", "spellings"),
    ),
    Attack(
        name="templates",
        group="words",
        asks="The question in plain text, in other frames and under other system prompts.",
        cost="one to seven answers a fact",
        run=_in("rewording", "templates"),
    ),
    Attack(
        name="few-shot",
        group="words",
        asks="The question after kept questions that were answered.",
        cost="one or two answers a fact",
        run=_in("rewording", "few_shot"),
        unfit=_needs_kept,
    ),
    Attack(
        name="fill-in",
        group="words",
        asks="The question as a statement to go on with.",
        cost="one or two answers a fact",
        run=_in("rewording", "fill_in"),
    ),
    Attack(
        name="thinking",
        group="words",
        asks="The question, with the model thinking first: is the fact in its thoughts, or in the answer after them?",
        cost="one long answer a fact",
        run=_in("thoughts"),
        needs_thinking=True,
    ),
    Attack(
        name="multiple-choice",
        group="words",
        asks="Which of four answers is the true one?",
        cost="four or eight short passes a fact",
        run=_in("choice"),
        needs_reference=True,
        unfit=_in("choice", "unfit"),
    ),
    Attack(
        name="leak-at-k",
        group="sampling",
        asks="The question many times at a temperature: does any of k answers give it away?",
        cost="8 or 64 answers a fact and temperature",
        run=_in("sampling"),
    ),
    Attack(
        name="quantise",
        group="weights",
        asks="The question, with the weights of all linear maps rounded to few bits.",
        cost="one to four answers a fact, and perplexity",
        run=_in("rounding", "quantise"),
    ),
    Attack(
        name="prune",
        group="weights",
        asks="The question, with the smallest weights of each matrix set to zero.",
        cost="one to three answers a fact, and perplexity",
        run=_in("rounding", "prune"),
    ),
    Attack(
        name="relearn-some",
        group="relearning",
        asks="Half of the forgotten facts trained on, the other half asked.",
        cost=_TRAINING,
        run=_in("relearning", "some_forgotten"),
        unfit=lambda context: "" if len(context.facts) > 1 else "it needs two facts to forget at least",
    ),
    Attack(
        name="relearn-kept",
        group="relearning",
        asks="Only kept facts trained on, the forgotten ones asked.",
        cost=_TRAINING,
        run=_in("relearning", "kept_only"),
        unfit=_needs_kept,
    ),
    Attack(
        name="relearn-text",
        group="relearning",
        asks="Only unrelated text trained on, the forgotten facts asked.",
        cost=_TRAINING,
        run=_in("relearning", "unrelated_text"),
    ),
    Attack(
        name="logit-lens",
        group="inside",
        asks="Is the answer's first token among the likeliest five at any block?",
        cost="two short passes a fact",
        run=_in("inside", "lens"),
        needs_reference=True,
    ),
    Attack(
        name="probe",
        group="inside",
        asks="Do linear probes of the hidden states tell the true answer from three wrong ones?",
        cost="four short passes a fact, kept ones too",
        run=_in("probe"),
        needs_reference=True,
        unfit=_in("probe", "unfit"),
    ),
    Attack(
        name="answer-probability",
        group="inside",
        asks="How likely is the answer, token by token, after the question and after a refusal?",
        cost="two short passes a fact and start",
        run=_in("inside", "probability"),
        needs_reference=True,
    ),
    Attack(
        name="patching-depth",
        group="inside",
        asks="How much of the answer do its hidden states still carry into the unedited model?",
        cost="a short pass a fact and, from each block on, one of the unedited model",
        run=_in("depth"),
        needs_original=True,
        tells_only=True,
        unfit=lambda context: (
            "" if context.has_reference else "it needs a model that never knew the facts: --reference"
        ),
    ),
    Attack(
        name="extraction",
        group="inside",
        asks="How much of the answer must be given until the model says the rest?",
        cost="two short passes a fact",
        run=_in("inside", "extraction"),
        needs_reference=True,
    ),
    Attack(
        name="membership",
        group="inside",
        asks="Do losses and gradients tell the forgotten facts from others?",
        cost="a few passes and a gradient for each fact and its counterpart",
        run=_in("membership"),
        unfit=lambda context: (
            "" if context.holdout or context.kept else "it needs --holdout, or facts to keep (--retain)"
        ),
    ),
    Attack(
        name="retention",
        group="collateral",
        asks="Are kept facts still answered, and are unrelated questions refused?",
        cost="one answer a kept and a bundled question",
        run=_in("collateral", "retention"),
        of_the_edit=True,
    ),
    Attack(
        name="ordinary-text",
        group="collateral",
        asks="Perplexity of ordinary text, and whether the token appears in it.",
        cost="two passes a text",
        run=_in("collateral", "ordinary_text"),
        of_the_edit=True,
    ),
    Attack(
        name="paired",
        group="collateral",
        asks="A forgotten and a kept question in one turn.",
        cost="one or two answers a fact",
        run=_in("collateral", "paired"),
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
