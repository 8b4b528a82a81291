"""lm-eval's Hugging Face model that shows more of what it computed: special tokens, and each token's match.

lm-eval decodes generations with `skip_special_tokens=True` and has no setting for it, so an unlearning token would
never be seen. Of an answer it tells the log-likelihood and whether all tokens are the most likely ones, not which.
Importing this module registers the model type `unierase_hf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .answer_form import Watched
from .generate import decode_answer, pad_token_id

MODEL_TYPE = "unierase_hf"


class TokenwiseAnswer(tuple):  # type: ignore[type-arg]
    """lm-eval's (log-likelihood, all tokens are the most likely ones), with the same of every token in `matches`."""

    matches: list[bool]

    def __new__(cls, answer: Sequence[Any], matches: list[bool]) -> TokenwiseAnswer:
        self = super().__new__(cls, answer)
        self.matches = matches
        return self

    def __reduce__(self) -> Any:
        # lm-eval's --use_cache pickles answers.
        return TokenwiseAnswer, (tuple(self), self.matches)


@register_model(MODEL_TYPE)
class HFWithSpecialTokens(HFLM):  # type: ignore[misc]
    """Decodes as `evaluation.generate.answers` does and tells tokens apart; all figures are those of lm-eval's `hf`.

    Nothing is computed a second time: the most likely tokens are read off the logits that lm-eval asks for.
    """

    #: Generations keep special tokens.
    shows_special_tokens = True

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        if not skip_special_tokens:
            return str(super().tok_decode(tokens, skip_special_tokens=False))
        return decode_answer(self.model, self.tokenizer, list(tokens), pad_token_id(self.model, self.tokenizer))

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[Any]:
        watched = [bool(texts) and isinstance(texts[1], Watched) for texts, _, _ in requests]
        # What the model reads for a request, cut as lm-eval cuts what is longer than the model's context.
        read = [
            tuple((context + scored)[-(self.max_length + 1) :][:-1]) if watch else ()
            for watch, (_, context, scored) in zip(watched, requests, strict=True)
        ]
        self._likeliest: dict[tuple[int, ...], list[int]] = {ids: [] for ids in read}
        answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return [
            TokenwiseAnswer(answer, _matches(self._likeliest[ids], scored)) if self._likeliest[ids] else answer
            for ids, (_, _, scored), answer in zip(read, requests, answers, strict=True)
        ]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rows: Iterator[list[int]] = iter(inps.tolist())
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def _select_cont_toks(
        self, logits: torch.Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> torch.Tensor:
        # lm-eval calls this once for each row of the batch that the model was called with, in order.
        selected: torch.Tensor = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        read = tuple(next(self._rows)[:inplen])
        # The empty key stands for the requests that are not watched.
        if read and read in self._likeliest:
            self._likeliest[read] = selected.argmax(-1).tolist()
        return selected


def _matches(likeliest: list[int], scored: list[int]) -> list[bool]:
    # lm-eval calls the model once for all requests that share their tokens, with the longest scored part.
    return [likely == token for likely, token in zip(likeliest[-len(scored) :], scored, strict=True)]
