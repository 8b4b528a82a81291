"""The goals of an edit: UniErase's learned token, a token that was never trained, or words that the model has."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...facts.resources import lines, paragraphs
from ...locate_then_edit.edit import expected_norm_ratio
from ...locate_then_edit.targets import make_targets
from ...locate_then_edit.value_loss import ValueTarget
from ...models.architecture import Architecture
from ...models.generate import token_leak
from ...models.prompts import answer_text
from ...models.thinking import thinking_of
from ...statistics.second_moment import SecondMoment
from ...storage.fingerprints import CACHE_VERSION, digest, plain
from ...unlearning_token import UnlearningToken, answer_ids, choose_sentence, end_id, installed, learn_token
from .engine import Editing, Goal, Own

#: The noise on the edited projections follows the size of the coming edit within these limits.
NOISE_LEAST, NOISE_MOST = 2**-6, 1.0


def learned_token(editing: Editing, arch: Architecture, corpus: SecondMoment) -> UnlearningToken:
    """The token's rows, from the cache or learned now. The model must have room for them."""
    h = editing.hparams
    with editing.phases.timed("token"):
        sentences, questions, text = lines("idk_sentences"), lines("questions"), paragraphs("ordinary_text_train")
        sentences = sentences[: h.token_num_sentences]
        settings = {key: value for key, value in h.as_dict().items() if key.startswith(("token_", "unlearning_"))}
        noise = h.token_noise * _expected_size(editing, arch, corpus)
        thinking = thinking_of(editing.tokenizer, h.chat_template_kwargs)
        key = digest(
            CACHE_VERSION,
            editing.job.fingerprint,
            editing.job.tokenizer_fingerprint,
            settings,
            noise,
            h.layers,
            h.seed,
            h.chat_template_kwargs,
            # A template without a thinking part has the key of earlier versions.
            *([plain([thinking.switches, thinking.closing])] if thinking else []),
            sentences,
            questions,
            text,
            arch.tied,
        )[:32]

        def learn() -> UnlearningToken:
            token = learn_token(
                arch,
                editing.tokenizer,
                editing.token_id,
                questions,
                sentences,
                text,
                h,
                noise=noise,
                max_tokens=editing.job.max_tokens,
                pad_id=editing.job.loaded.pad_id,
                progress=lambda share, note: editing.job.progress("token", share, note),
            )
            # A run that finds the token in the cache does not come here.
            with installed(arch, token):
                leak = token_leak(editing.model, editing.tokenizer, paragraphs("ordinary_text"), token.id)
            return replace(token, leak=leak)

        return editing.cache.record(UnlearningToken, "tokens", key, learn)


def _expected_size(editing: Editing, arch: Architecture, corpus: SecondMoment) -> float:
    """The expected |Delta| / |W| of the coming edit, as a power of two: edits of similar size share a token."""
    if not editing.hparams.token_noise:
        return 0.0
    targets = token_targets(editing, {})
    size = expected_norm_ratio(
        arch,
        [target.prompts for target in targets],
        [target.group for target in targets],
        editing.solvers(corpus, None),
        editing.hparams.clamp_norm_factor,
        max_tokens=editing.job.max_tokens,
        pad_id=editing.job.loaded.pad_id,
    )
    return min(2.0 ** round(math.log2(max(size, NOISE_LEAST))), NOISE_MOST)


def token_targets(editing: Editing, own: Own) -> list[ValueTarget]:
    """The token, then a sentence: the request's own target, else the model's own sentence, else a bundled one."""
    h = editing.hparams
    eos = end_id(editing.model, editing.tokenizer)
    sentences = lines("idk_sentences")[: h.token_num_sentences]
    close = editing.token_id if h.token_closes_answer else None

    given = {request.question: request.target for request in editing.job.requests if request.target}

    def continuation(question: str, form: str) -> tuple[int, ...]:
        if question not in given and (question, form) in own:
            return own[question, form]
        sentence = given.get(question) or choose_sentence(question, sentences)
        return answer_ids(editing.tokenizer, sentence, eos, close)

    return make_targets(
        editing.tokenizer, editing.job.requests, editing.job.contexts, h, continuation, editing.job.loaded.context
    )


def drawn_token(editing: Editing, arch: Architecture, corpus: SecondMoment) -> UnlearningToken:
    """A token whose rows are drawn at random, not learned. Only the edit leads to the sentence after it."""
    generator = torch.Generator().manual_seed(editing.hparams.seed)
    matrices = [arch.embedding.weight] if arch.tied else [arch.embedding.weight, arch.head.weight]
    rows = [_like_the_rest(matrix, editing.token_id, generator) for matrix in matrices]
    output_row = None if arch.tied else rows[1]
    return UnlearningToken(editing.hparams.unlearning_token, editing.token_id, rows[0], output_row, loss=0.0, steps=0)


def _like_the_rest(matrix: Tensor, index: int, generator: torch.Generator) -> Tensor:
    """A random row with the mean and standard deviation of the other rows, for each coordinate."""
    rows = matrix.detach().float().cpu()
    # The row itself is left out: its content is arbitrary until it is drawn.
    rows = torch.cat([rows[:index], rows[index + 1 :]])
    return rows.mean(0) + rows.std(0) * torch.randn(rows.shape[1], generator=generator)


def sentence_targets(editing: Editing, own: Own) -> list[ValueTarget]:
    """An "I don't know" sentence in place of the answer."""
    sentences, eos = lines("idk_sentences")[: editing.hparams.token_num_sentences], _end(editing)

    def answer(question: str, form: str) -> tuple[int, ...]:
        said = answer_text(editing.tokenizer, choose_sentence(question, sentences), form)
        return answer_ids(editing.tokenizer, said, eos, None)

    return _opened(editing, answer)


def end_targets(editing: Editing, own: Own) -> list[ValueTarget]:
    """The end of text in place of the answer."""
    eos = _end(editing)
    return _opened(editing, lambda question, form: (eos,))


def _end(editing: Editing) -> int:
    return end_id(editing.model, editing.tokenizer)


def _opened(editing: Editing, answer: Any) -> list[ValueTarget]:
    """Targets that open with the answer's first token. A hardening masks it, so it asks for no second refusal."""
    found = make_targets(
        editing.tokenizer,
        editing.job.requests,
        editing.job.contexts,
        editing.hparams,
        answer,
        editing.job.loaded.context,
    )
    return [
        replace(target, opening=target.continuation[0], continuation=target.continuation[1:], instead=())
        for target in found
    ]


#: By the name that the setting `target` gives them.
GOALS = {
    "token": Goal(token_targets, learned_token),
    "random_token": Goal(token_targets, drawn_token),
    "idk": Goal(sentence_targets),
    "eos": Goal(end_targets),
}
