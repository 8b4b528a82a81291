"""Turns requests into what the engine optimises: prompts with positions, contexts before them, what is to be said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import RequestError
from ..hparams import UniEraseHyperParams
from ..request import ForgetRequest
from .positions import has_chat_template, locate, locate_in_text
from .trace import pad
from .values import ValueTarget

#: First words of the texts put before a prompt, the ones MEMIT starts from.
CONTEXT_STARTS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def context_texts(model: Any, tokenizer: Any, lengths: Sequence[tuple[int, int]], pad_id: int) -> tuple[str, ...]:
    """Short texts to put before prompts: [length in tokens, how many], written greedily, so the same in every run."""
    texts: list[str] = []
    device = model.get_input_embeddings().weight.device
    for length, count in lengths:
        starts = [CONTEXT_STARTS[index % len(CONTEXT_STARTS)] for index in range(count)]
        if not starts:
            continue
        batch = pad([tokenizer(start)["input_ids"] for start in starts], pad_id, "left", device)
        ids = model.generate(
            input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=length, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=pad_id,
        )  # fmt: skip
        written = tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True)
        texts += [
            " ".join(f"{start}{text}".split()).rstrip(".") + "." for start, text in zip(starts, written, strict=True)
        ]
    return tuple(texts)


def forms_of(tokenizer: Any, hparams: UniEraseHyperParams) -> tuple[str, ...]:
    """The prompt forms that this tokenizer can write: plain in the place of chat where it has no chat template."""
    if has_chat_template(tokenizer):
        return hparams.prompt_forms
    return tuple(dict.fromkeys("plain" if form == "chat" else form for form in hparams.prompt_forms))


def make_targets(
    tokenizer: Any,
    requests: Sequence[ForgetRequest],
    contexts: Sequence[str],
    hparams: UniEraseHyperParams,
    continuation: Callable[[str, str], tuple[int, ...]],
    max_length: int,
) -> list[ValueTarget]:
    """One target a request and prompt form, requests in order, forms together.

    continuation gives the token ids that follow the unlearning token for a question in a form; max_length is the
    model's context.
    Raises RequestError naming the request that does not fit.
    """
    targets = []
    for request in requests:
        for form in forms_of(tokenizer, hparams):
            follow = continuation(request.question, form)
            prompts = tuple(
                locate(tokenizer, request.question, request.subject or "", form, hparams.fact_token, context,
                       hparams.chat_template_kwargs)
                for context in ("", *contexts)
            )  # fmt: skip
            longest = max(len(prompt.ids) for prompt in prompts) + len(follow) + 1
            if longest > max_length:
                raise RequestError(
                    f"Request {request.case_id or request.question[:60]!r} needs {longest} tokens with its contexts "
                    f"and answer; the model's context holds {max_length}. Shorten the question or lower "
                    "context_template_length_params."
                )
            kl = locate_in_text(tokenizer, f"{request.subject} is a", request.subject) if request.subject else None
            shared = request.subject and hparams.v_share_subject
            group = (form, " ".join(str(request.subject).split()).casefold()) if shared else None
            targets.append(ValueTarget(prompts, kl, follow, group))
    return targets
