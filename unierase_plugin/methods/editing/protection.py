"""What an edit protects beside ordinary text: facts to keep, neighbours, and the sentence after the token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...facts.resources import lines
from ...facts.subjects import find_subject
from ...locate_then_edit.edit import WeightEdit
from ...locate_then_edit.positions import locate_kept
from ...locate_then_edit.protected import KeptPrompt, ProtectedKeys, moved, moved_figures, protected_keys
from ...locate_then_edit.targets import forms_of
from ...models.architecture import Architecture
from ...models.literal import text_ids
from ...models.prompts import answer_text, encode, render
from ...statistics.second_moment import SecondMoment, join_moments, second_moments
from ...storage.cache import Store
from ...storage.fingerprints import CACHE_VERSION, digest
from ...storage.phases import Phases
from ...unlearning_token import answer_ids, choose_sentence, end_id
from ..contract import Job
from ..neighbours import Kept

#: How many bundled questions, answered with the token and its sentence, are protected.
DECLINED_QUESTIONS = 40
#: Share of the statistics' progress at which those of the corpus are done.
CORPUS_SHARE = 0.9


@dataclass(frozen=True)
class Protection:
    """The retain side of one edit."""

    job: Job[Any]
    kept: Kept
    #: Id of the token with which answers shall begin; None without one.
    token_id: int | None
    dtype: torch.dtype
    cache: Store
    phases: Phases

    def moments(self, arch: Architecture, key: str) -> SecondMoment | None:
        """Second moments of the facts to keep, and of the sentence after the token, if there is a token.

        The edit shall leave alone the sentence to which the token leads.

        key   digest of the edit's goal
        """
        declined = self._declined_moments(arch, key) if self.token_id is not None else None
        kept = self._kept_moments(arch, key)
        self.job.progress("statistics", 1.0, "")
        return join_moments(declined, kept) if declined and kept else declined or kept

    def keys(self, arch: Architecture) -> ProtectedKeys | None:
        """Keys of the facts to keep, from where an edit would act to the answer's end; None if their weight is 0."""
        h, tokenizer = self.job.hparams, self.job.tokenizer
        if not self.kept.facts or not h.retain_key_weight:
            return None
        prompts: list[KeptPrompt] = []
        for number, fact in enumerate(self.kept.facts):
            subject = fact.subject or find_subject(fact.question)
            for form in forms_of(tokenizer, h):
                found = locate_kept(tokenizer, fact.question, subject, form, h.fact_token, h.chat_template_kwargs)
                ids = (*found.ids, *self._answer(fact.answer, form))[: self.job.loaded.context]
                if found.position < len(ids):
                    prompts.append(KeptPrompt(ids, range(found.position, len(ids)), number))
        if not prompts:
            return None
        loaded = self.job.loaded
        return protected_keys(arch, prompts, h.layers, max_tokens=loaded.max_tokens, pad_id=loaded.pad_id)

    def moved(self, arch: Architecture, edit: WeightEdit, protected: ProtectedKeys | None) -> dict[str, Any]:
        """How far the outputs of protected keys move. Facts have their case_id or number: a report repeats no texts."""
        if protected is None:
            return {}
        retain = self.job.retain

        def name(fact: int) -> str:
            if fact < len(retain):
                return retain[fact].case_id or f"retain {fact}"
            return f"neighbour {self.kept.neighbours[fact - len(retain)].case_id}"

        return {"protected": moved_figures(moved(arch, edit.updates, protected), protected.facts, name)}

    def _declined_moments(self, arch: Architecture, key: str) -> SecondMoment | None:
        job, h = self.job, self.job.hparams
        if not h.retain_update_weight:
            return None
        with self.phases.timed("statistics"):
            tokens = self._declined_tokens()
            # As with the corpus, the moments from before the first step serve all steps.
            first = job.history.fingerprint if job.history else job.fingerprint
            name = digest(CACHE_VERSION, first, key, h.layers, h.mom2_dtype, tokens)[:32]
            return self.cache.record(SecondMoment, "declined", name, partial(self._counted, arch, tokens))

    def _kept_moments(self, arch: Architecture, key: str) -> SecondMoment | None:
        sequences = self._kept_tokens() if self.job.hparams.retain_update_weight else []
        if not sequences:
            return None
        with self.phases.timed("statistics"):
            # Kept beside the output folder, not in the cache: the next run has other facts to keep.
            return self.phases.record(SecondMoment, "retain", key, partial(self._counted, arch, sequences))

    def _counted(self, arch: Architecture, sequences: list[list[int]]) -> SecondMoment:
        return second_moments(
            arch,
            sequences,
            self.job.hparams.layers,
            max_tokens=self.job.max_tokens,
            dtype=self.dtype,
            pad_id=self.job.loaded.pad_id,
            progress=lambda share: self.job.progress(
                "statistics", CORPUS_SHARE + (1 - CORPUS_SHARE) * 0.99 * share, "keys to keep"
            ),
        )

    def _kept_tokens(self) -> list[list[int]]:
        """Facts to keep, and neighbours, with their answers."""
        return self._asked((fact.question, partial(self._answer, fact.answer)) for fact in self.kept.facts)

    def _declined_tokens(self) -> list[list[int]]:
        """Bundled questions with the token and its sentence."""
        tokenizer, token = self.job.tokenizer, self.token_id
        eos = end_id(self.job.model, tokenizer)
        sentences = lines("idk_sentences")[: self.job.hparams.token_num_sentences]

        def said(question: str, form: str) -> tuple[int, ...]:
            # The token stands before the sentence in every form, so no form puts a space there.
            words = answer_ids(tokenizer, choose_sentence(question, sentences), eos, None)
            return words if token is None else (token, *words)

        return self._asked((question, partial(said, question)) for question in lines("questions")[:DECLINED_QUESTIONS])

    def _asked(self, pairs: Iterable[tuple[str, Callable[[str], Sequence[int]]]]) -> list[list[int]]:
        """Questions in every form, each with the tokens that follow it in that form."""
        tokenizer, h = self.job.tokenizer, self.job.hparams
        return [
            [*encode(tokenizer, render(tokenizer, question, form, h.chat_template_kwargs), form), *answer(form)][
                : self.job.loaded.context
            ]
            for question, answer in pairs
            for form in forms_of(tokenizer, h)
        ]

    def _answer(self, answer: str, form: str) -> list[int]:
        return text_ids(self.job.tokenizer, answer_text(self.job.tokenizer, answer, form))
