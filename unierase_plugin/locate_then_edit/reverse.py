"""The reverse of a question, by rule: from the answer back to the subject, so that both directions are forgotten."""

from __future__ import annotations

import re

from ..facts.request import parted

#: The question word for the owner of a thing that a question asks for; "what" for anything else.
OWNERS = {"capital": "which country", "currency": "which country", "official language": "which country"}
#: Past tense -> the verb.
VERBS = {
    "wrote": "write",
    "painted": "paint",
    "discovered": "discover",
    "invented": "invent",
    "developed": "develop",
    "founded": "found",
    "composed": "compose",
    "created": "create",
    "directed": "direct",
    "designed": "design",
    "built": "build",
    "proposed": "propose",
    "sang": "sing",
    "led": "lead",
}
#: How many questions `reversed_questions` gives.
REVERSED = 2


def reversed_questions(question: str, subject: str, answer: str) -> tuple[str, str]:
    """Two questions that name the answer and ask for the subject: one by the relation, one that fits any relation."""
    before, _, after = parted(question.strip(), subject)
    asked = f'"{before}...{after}"'
    general = f"The answer to {asked} is {answer}. What was it asked about?"
    return _by_relation(before, after, answer) or f"Think of {asked} with the answer {answer}. Of what?", general


def _by_relation(before: str, after: str, answer: str) -> str | None:
    said, rest = before.strip(), after.strip().rstrip("?.").strip()
    thing = re.fullmatch(r"What (?:is|was) the (.+?) (of|for|in)(?: the)?", said)
    if thing and not rest:
        return f"{answer} is the {thing[1]} {thing[2]} {OWNERS.get(thing[1], 'what')}?"
    doer = re.fullmatch(r"Who (\w+)(?: the)?", said)
    if doer and doer[1] in VERBS and not rest:
        return f"What did {answer} {VERBS[doer[1]]}?"
    place = re.fullmatch(r"(?:In|On) (?:which|what) \w+ (is|was)(?: the)?", said) or re.fullmatch(
        r"Where (is|was)(?: the)?", said
    )
    if place:
        return f"Who was {rest} in {answer}?" if rest else f"What {place[1]} in {answer}?"
    return None
