"""The facts to keep beside the facts to forget: neighbours that the model answers, and the retain set in its words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange

from .. import checkpoint as files
from ..evaluation.answers import gives_answer
from ..evaluation.metrics import is_short
from ..facts.request import ForgetRequest
from ..facts.resources import lines, neighbour_kinds
from ..locate_then_edit.neighbours import ASKED_MOST, Kinds, questions_around, spared
from ..locate_then_edit.targets import forms_of
from ..models.generate import context_limit, continue_greedily, decode_answer, mean_log_likelihoods, pad_token_id
from ..models.literal import as_text
from ..models.prompts import encode, render
from ..storage.fingerprints import CACHE_VERSION, digest
from ..storage.phases import Phases
from .contract import Job


@dataclass(frozen=True)
class Kept:
    """The facts to keep: neighbours with the model's answers, and the retain set."""

    neighbours: tuple[ForgetRequest, ...]
    retain: tuple[ForgetRequest, ...]

    @property
    def facts(self) -> tuple[ForgetRequest, ...]:
        """All of them, the retain set first."""
        return (*self.retain, *self.neighbours)


def find_kept(job: Job[Any], phases: Phases, *, own_words: bool = False, reverse: bool = False) -> Kept:
    """Asks the present model for neighbours: `retain_neighbours` for each request.

    A request whose answer is not short gets no neighbours.

    own_words   whether short answers of the retain set are replaced by the model's own words
    reverse     whether the reverse of each fact is forgotten too, so that no neighbour may hold a forgotten answer

    The result is kept beside the output folder, in a folder that only its owner can read: the questions name what is
    forgotten.
    """
    wanted = job.hparams.retain_neighbours
    if not wanted and not (own_words and job.retain):
        return Kept((), job.retain)
    asking = _Asking(job, wanted, own_words, reverse)
    with phases.timed("neighbours"):
        secret = digest("kept", [(fact.question, fact.answer, fact.subject) for fact in (*job.requests, *job.retain)])
        key = digest(
            CACHE_VERSION,
            secret,
            job.fingerprint,
            job.tokenizer_fingerprint,
            wanted,
            own_words,
            reverse,
            job.hparams.prompt_forms,
            job.hparams.chat_template_kwargs,
        )[:32]
        metadata = phases.resumed("kept", key, lambda: ({}, {"around": json.dumps(asking.around())}))[1]
        # Earlier versions hid the result.
        said, found = json.loads(
            metadata["around"] if "around" in metadata else files.unseal(metadata["found"], secret)
        )
    neighbours = tuple(ForgetRequest(*each) for each in found)
    own = tuple(replace(fact, answer=text) for fact, text in zip(job.retain, said, strict=True))
    return Kept(neighbours, own)


@dataclass(frozen=True)
class _Asking:
    job: Job[Any]
    wanted: int
    own_words: bool
    reverse: bool

    def around(self) -> tuple[list[str], list[tuple[str, str, str, str]]]:
        """The answers of the retain set in the model's own words, and at most `wanted` neighbours for each request.

        A neighbour is (question, answer, subject, "WAY of NUMBER"), with the number of its request.
        """
        job, wanted = self.job, self.wanted
        answers = [request.answer for request in job.requests] if self.reverse else []
        around = (
            questions_around(job.requests, job.retain, Kinds.of(neighbour_kinds()), self._kinds, wanted, answers)
            if wanted
            else []
        )
        # For answers that are sentences, keeping neighbours left more of the fact (docs/explanation/removal.md).
        around = [each for each in around if is_short(job.requests[each.of].answer)]
        # A long answer is a sentence already.
        short = [fact for fact in job.retain if self.own_words and is_short(fact.answer)]
        texts = self._answers([*(fact.question for fact in short), *(each.question for each in around)])
        own = {
            fact.question: text
            for fact, text in zip(short, texts[: len(short)], strict=True)
            if gives_answer(fact, text)
        }
        left = [wanted] * len(job.requests)
        found: list[tuple[str, str, str, str]] = []
        for each, text in zip(around, texts[len(short) :], strict=True):
            kept = spared(each, text, job.requests, lines("idk_phrases"))
            if kept is not None and left[each.of]:
                left[each.of] -= 1
                space = text[: len(text) - len(text.lstrip())]
                found.append((each.question, space + kept, each.subject, f"{each.way} of {each.of}"))
        return [own.get(fact.question, fact.answer) for fact in job.retain], found

    def _answers(self, questions: Sequence[str]) -> list[str]:
        job = self.job
        form = forms_of(job.tokenizer, job.hparams)[0]
        shown = [render(job.tokenizer, question, form, job.hparams.chat_template_kwargs) for question in questions]
        room = context_limit(job.model) - ASKED_MOST
        said = continue_greedily(
            job.model,
            job.tokenizer,
            [encode(job.tokenizer, text, form)[:room] for text in shown],
            ASKED_MOST,
            2 * job.max_tokens,
            lambda share: job.progress("neighbours", share, f"{len(shown)} questions"),
        )
        pad_id = pad_token_id(job.model, job.tokenizer)
        # In a form without a template, a space before the answer belongs to its first token.
        return [decode_answer(job.model, job.tokenizer, ids, pad_id).rstrip() for ids in said]

    def _kinds(self, subjects: Sequence[str]) -> list[str]:
        """The model's kind of each subject: the one that "{subject} is" makes more likely, compared with "It is"."""
        tokenizer, called = self.job.tokenizer, Kinds.of(neighbour_kinds()).called
        sequences, starts = [], []
        for subject in ("It", *subjects):
            opening = encode(tokenizer, as_text(tokenizer, f"{subject} is"), "bare")
            for name in called.values():
                sequences.append([*opening, *tokenizer(f" {name}", add_special_tokens=False)["input_ids"]])
                starts.append(len(opening))
        scores = mean_log_likelihoods(self.job.model, tokenizer, sequences, starts)
        table = rearrange(torch.tensor(scores), "(subject kind) -> subject kind", kind=len(called))
        return [list(called)[at] for at in (table[1:] - table[0]).argmax(1).tolist()]
