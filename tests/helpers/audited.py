"""A tiny model to attack, with an unlearning token that it can be made to love, and sizes that take no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from small import FORGET, FORGET_MORE, RETAIN
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin.audit.contract import EDITED, FULL, Audited, Context
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.models.added_token import add_token
from unierase_plugin.models.loaded import LoadedModel

TOKEN = "<unlearn_0>"
SIZES = replace(
    FULL,
    unrelated=2,
    texts=2,
    answer_room=1,
    answer_least=6,
    answer_most=6,
    samples=4,
    temperatures=(1.0,),
    relearn_steps=(1, 2),
    relearn_some_steps=(2, 3),
    relearn_batch=2,
)


def fact(record: dict[str, str], **changes: Any) -> ForgetRequest:
    return ForgetRequest(record["question"], record["answer"], record["subject"], **changes)


FACTS = tuple(
    fact(record, paraphrases=(f"Tell me: {record['question']}",), wrong_answers=("Ann", "Ben", "Cid"))
    for record in (*FORGET, *FORGET_MORE)
)
NAMES = (
    *("Ada", "Bob", "Cleo", "Dora", "Emil", "Finn", "Gwen", "Hugo", "Iris", "Jack"),
    *("Kira", "Leon", "Maud", "Nils", "Olga", "Pia", "Quim", "Rosa", "Sven", "Tilda"),
)
#: As many as a probe needs.
KEPT = tuple(ForgetRequest(f"What colour is the hat of {name}?", f"A shade of {name[::-1].lower()}") for name in NAMES)
CONTEXT = Context(FACTS, tuple(map(fact, RETAIN)), SIZES, token=TOKEN, layers=(1, 2))


def subject(family: str = "llama", tied: bool = True, *, obsessed: bool = False, chat: bool = True) -> Audited:
    """A tiny model with the token; `obsessed` makes it the likeliest first token of every answer."""
    tokenizer, model = tiny_tokenizer(chat=chat), tiny_model(family, tied)
    # The new row is drawn.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        index = add_token(model, tokenizer, TOKEN)
    made = Audited(EDITED, LoadedModel.of(model, tokenizer, "tiny"), index)
    if obsessed:
        _obsess(made)
    return made


@torch.no_grad()
def _obsess(made: Audited) -> None:
    """The token's row along what every state in front of the head has in common."""
    states: list[torch.Tensor] = []
    hook = made.arch.head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    from unierase_plugin.audit.prompts import prompt_for

    for each in FACTS:
        made.model(input_ids=torch.tensor([prompt_for(made, CONTEXT, each.question).ids]))
    hook.remove()
    ends = torch.cat([state[0, -1:] for state in states])
    wanted = torch.linalg.lstsq(ends, torch.full((len(ends), 1), 50.0)).solution[:, 0]
    made.arch.head.weight[made.token_id] = wanted
