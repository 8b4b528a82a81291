"""The editing engine with other targets than UniErase's token: a plain answer, or a token that was never trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import checkpoint as files
from ...facts.resources import lines
from ...locate_then_edit.targets import make_targets
from ...locate_then_edit.values import ValueTarget
from ...models.architecture import Architecture
from ...models.prompts import answer_text
from ...statistics.second_moment import SecondMoment
from ...unlearning_token import UnlearningToken, answer_ids, choose_sentence, end_id
from ..contract import Changes, Job
from .engine import Editing, Erasure, architecture, changed_layers


def engine_for(job: Job[Any], one_by_one: bool) -> Editing:
    """The engine that leads answers to `job.hparams.target`: "idk", "eos", "random_token" or "token"."""
    kinds: dict[str, type[Editing]] = {"token": Erasure, "random_token": _RandomToken}
    engine = kinds.get(job.hparams.target, _PlainAnswer)(job)
    engine.one_by_one = one_by_one
    return engine


class _PlainAnswer(Editing):
    """Leads to words that the model has: an "I don't know" sentence, or the end of text at once."""

    def check(self) -> None:
        super().check()
        self._plain_targets(self._contexts())
        self._check_corpus()

    def run(self) -> Changes:
        self._find_kept()
        contexts, corpus = self._contexts(), self._corpus_moments()
        arch = architecture(self.model, self.hparams)
        originals = files.take_originals(arch, changed_layers(self.hparams), len(arch.embedding.weight))
        retain = None if self.hparams.remove else self._retain_moments(arch, "plain")
        edit, figures, revert = self._edited(arch, self._plain_targets(contexts), "plain", corpus, retain)
        return Changes(
            edit,
            originals,
            parameters=self._changed(arch, edit),
            seconds=self.seconds,
            figures=figures,
            undo=revert,
            neighbours=self.kept.neighbours,
        )

    def _plain_targets(self, contexts: Sequence[str]) -> list[ValueTarget]:
        h, eos = self.hparams, end_id(self.model, self.tokenizer)
        sentences = lines("idk_sentences")[: h.token_num_sentences]

        def answer(question: str, form: str) -> tuple[int, ...]:
            if h.target == "eos":
                return (eos,)
            said = answer_text(self.tokenizer, choose_sentence(question, sentences), form)
            return answer_ids(self.tokenizer, said, eos, None)

        found = make_targets(self.tokenizer, self.requests, contexts, h, answer, self.context)
        return [
            # What it begins with is what a hardening masks, so that it cannot be said a second time.
            replace(target, opening=target.continuation[0], continuation=target.continuation[1:], instead=())
            for target in found
        ]


class _RandomToken(Erasure):
    """Leads to a new token whose rows were drawn, not learned; the sentence after it is up to the edit alone."""

    def _token(self, arch: Architecture, contexts: Sequence[str], corpus: SecondMoment) -> UnlearningToken:
        generator = torch.Generator().manual_seed(self.hparams.seed)
        matrices = [arch.embedding.weight] if arch.tied else [arch.embedding.weight, arch.head.weight]
        rows = [_like_the_rest(matrix, self.token_id, generator) for matrix in matrices]
        return UnlearningToken(
            self.hparams.unlearning_token, self.token_id, rows[0], None if arch.tied else rows[1], loss=0.0, steps=0
        )


def _like_the_rest(matrix: Tensor, index: int, generator: torch.Generator) -> Tensor:
    """A row with the mean and the spread that the other rows have, coordinate by coordinate."""
    rows = matrix.detach().float().cpu()
    # The row to be drawn holds whatever making room for it left there.
    rows = torch.cat([rows[:index], rows[index + 1 :]])
    return rows.mean(0) + rows.std(0) * torch.randn(rows.shape[1], generator=generator)
