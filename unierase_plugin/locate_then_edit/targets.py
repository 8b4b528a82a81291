"""Turns requests into the engine's targets: prompts with positions, contexts before them, and the words to say."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import RequestError
from ..evaluation.metrics import SHORT_ANSWER_WORDS, is_short
from ..facts.request import NO_ANSWER, ForgetRequest, one_spelling
from ..hparams import PROMPT_FORMS, EngineSettings, HyperParams, UniEraseHyperParams
from ..models.generate import generate
from ..models.literal import as_text, literal_ids
from ..models.prompts import answer_text, begun, has_chat_template
from ..models.trace import pad
from .positions import Prompt, locate, locate_in_text
from .reverse import REVERSED, reversed_questions
from .rewording import REWORDINGS, reworded
from .value_loss import ValueTarget

#: First words of the texts before a prompt, as in MEMIT.
CONTEXT_STARTS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def context_texts(model: Any, tokenizer: Any, lengths: Sequence[tuple[int, int]], pad_id: int) -> tuple[str, ...]:
    """Short texts to put before prompts, for each pair [length in tokens, how many]. Greedy, so always the same."""
    texts: list[str] = []
    device = model.get_input_embeddings().weight.device
    for length, count in lengths:
        starts = [CONTEXT_STARTS[index % len(CONTEXT_STARTS)] for index in range(count)]
        if not starts:
            continue
        batch = pad([begun(tokenizer, start) for start in starts], pad_id, "left", device)
        ids = generate(model, batch.ids, batch.mask, length, pad_id)
        written = tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts += [
            " ".join(f"{start}{text}".split()).rstrip(".") + "." for start, text in zip(starts, written, strict=True)
        ]
    return tuple(texts)


def forms_of(tokenizer: Any, hparams: HyperParams) -> tuple[str, ...]:
    """The prompt forms for this tokenizer. Without a chat template, plain replaces chat."""
    forms = hparams.prompt_forms
    if isinstance(hparams, EngineSettings) and "forms" in hparams.harden:
        forms = tuple(dict.fromkeys((*forms, *PROMPT_FORMS)))
    if has_chat_template(tokenizer):
        return forms
    return tuple(dict.fromkeys("plain" if form == "chat" else form for form in forms))


def targets_a_request(tokenizer: Any, hparams: UniEraseHyperParams) -> int:
    """How many targets `make_targets` makes for one request."""
    spoken = 1 + ("paraphrases" in hparams.harden) * REWORDINGS + ("answer_span" in hparams.harden)
    spoken += hparams.reverse * REVERSED
    return spoken * len(forms_of(tokenizer, hparams))


def make_targets(
    tokenizer: Any,
    requests: Sequence[ForgetRequest],
    contexts: Sequence[str],
    hparams: UniEraseHyperParams,
    continuation: Callable[[str, str], tuple[int, ...]],
    max_length: int,
) -> list[ValueTarget]:
    """One target for each request and prompt form; with `harden`, more for each form.

    Targets follow the order of the requests; all forms of a request are together. continuation gives the token ids
    that follow the unlearning token for a question in a form; max_length is the model's context.
    Raises RequestError that names a request that does not fit.
    """
    targets: list[ValueTarget] = []
    for request in requests:
        for form in forms_of(tokenizer, hparams):
            found = _of_form(tokenizer, request, form, contexts, hparams, continuation(request.question, form))
            longest = max(
                len(prompt.ids) + max(len(target.continuation) + 1, len(target.unwanted))
                for target in found
                for prompt in target.prompts
            )
            if longest > max_length:
                raise RequestError(
                    f"Request {request.label} needs {longest} tokens with its contexts "
                    f"and answer, but the model's context holds {max_length}. Shorten the question or lower "
                    "context_template_length_params."
                )
            targets += found
    return targets


def _of_form(
    tokenizer: Any,
    request: ForgetRequest,
    form: str,
    contexts: Sequence[str],
    hparams: UniEraseHyperParams,
    follow: tuple[int, ...],
) -> list[ValueTarget]:
    """The target of the question itself first, then those that `harden` adds."""
    subject, h = request.subject or "", hparams

    def asked(question: str, name: str, context: str = "") -> Prompt:
        return locate(tokenizer, question, name, form, h.fact_token, context, h.chat_template_kwargs)

    def group(kind: str) -> Hashable:
        return (form, kind, one_spelling(subject)) if subject and h.v_share_subject else None

    prompts = tuple(asked(request.question, subject, context) for context in ("", *contexts))
    kl = locate_in_text(tokenizer, f"{subject} is a", subject) if subject else None
    if request.answer == NO_ANSWER and {"unlikely_answer", "answer_span"} & set(h.harden):
        raise RequestError(
            f"harden = {list(h.harden)} needs the true answer of every request, but {request.label} has none. Give "
            "it, or leave unlikely_answer and answer_span out."
        )
    answer, inside = _answer(tokenizer, request, form)
    unwanted = answer if "unlikely_answer" in h.harden else ()
    instead = follow if "second_refusal" in h.harden else ()
    found = [ValueTarget(prompts, kl, follow, group("asked"), unwanted=unwanted, instead=instead)]
    if "paraphrases" in h.harden:
        for kind, (question, name) in enumerate(reworded(request.question, subject)):
            changed = (asked(question, name),)
            found.append(replace(found[0], prompts=changed, kl_prompt=None, group=group(f"reworded {kind}")))
    if "answer_span" in h.harden:
        said = Prompt(prompts[0].ids + answer[: inside + 1], len(prompts[0].ids) + inside)
        found.append(
            replace(found[0], prompts=(said,), kl_prompt=None, group=group("inside"), unwanted=unwanted[inside + 1 :])
        )
    if h.reverse:
        found += _reversed(tokenizer, request, form, h, found[0])
    return found


def _reversed(
    tokenizer: Any, request: ForgetRequest, form: str, hparams: UniEraseHyperParams, asked: ValueTarget
) -> list[ValueTarget]:
    """Targets of the questions from the answer back to the subject. The answer's last token carries each edit."""
    answer = request.answer.strip().rstrip(".")
    label = request.label
    if request.answer == NO_ANSWER or not request.subject or not is_short(answer):
        raise RequestError(
            f"The reverse of request {label} cannot be asked: that needs its subject and an answer of at most "
            f"{SHORT_ANSWER_WORDS} words. Shorten the answer to the name that it gives, or leave reverse (--reverse) "
            "out."
        )
    group = (form, "reverse", one_spelling(answer)) if hparams.v_share_subject else None
    kl = locate_in_text(tokenizer, f"{answer} is a", answer)
    return [
        replace(
            asked,
            prompts=(locate(tokenizer, question, answer, form, hparams.fact_token, "", hparams.chat_template_kwargs),),
            kl_prompt=kl,
            group=group,
            unwanted=(),
            instead=(),
        )
        for question in reversed_questions(request.question, request.subject, answer)
    ]


def _answer(tokenizer: Any, request: ForgetRequest, form: str) -> tuple[tuple[int, ...], int]:
    """Token ids of the true answer, and the number of the token that carries an edit inside it.

    This token ends the answer's first mention of the subject. If there is none in the first half, it ends the first
    quarter of the answer.
    """
    text = answer_text(tokenizer, request.answer, form)
    ids, offsets = literal_ids(tokenizer, as_text(tokenizer, text))
    subject = (request.subject or "").strip()
    end = text.find(subject) + len(subject) if subject and subject in text else len(text)
    holders = [index for index, (start, stop) in enumerate(offsets) if start < end <= stop]
    named = holders[-1] if holders else len(ids)
    return tuple(ids), named if named < len(ids) // 2 else len(ids) // 4
