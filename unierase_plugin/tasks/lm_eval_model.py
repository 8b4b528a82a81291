"""lm-eval's Hugging Face model, with figures per token, and with prompts as in the rest of this package.

lm-eval decodes generations with `skip_special_tokens=True` and has no setting for it, so that nobody would see an
unlearning token. For an answer it gives the log-likelihood, and whether all tokens are the most likely ones, but not
which of them. Three of its habits change the measurement. It generates with the beams and penalties of the model's own
settings. It keeps the end token that some tokenizers put after a prompt. It evaluates a model with random weights where
the checkpoint lacks some. Importing this module registers the model type `unierase_hf`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..errors import UniEraseError, listed, shown
from ..models.adapters import adapter_base, check_tokenizer, first_base, merged
from ..models.auto_class import auto_class
from ..models.generate import decode_answer, ends_alone, pad_token_id
from ..models.literal import Rendered, literal_ids, names_in_spans
from ..models.loading import open_weights, refuse_drawn, tokenizer_place
from ..models.prompts import closing
from ..models.trace import pad
from ..models.tying import has_head_unlike_config, settle_config
from .answer_form import Watched
from .task_manager import MODEL_TYPE

logger = logging.getLogger(__name__)


class TokenwiseAnswer(tuple):  # type: ignore[type-arg]
    """lm-eval's pair (log-likelihood, whether all tokens are the most likely ones), with figures per token."""

    #: For each token of a `Watched` text: whether it is the most likely one.
    matches: list[bool] | None
    #: How many tokens were scored, if that differs from the tokenizer's own count.
    tokens: int | None

    def __new__(cls, answer: Sequence[Any], matches: list[bool] | None, tokens: int | None = None) -> TokenwiseAnswer:
        self = super().__new__(cls, answer)
        self.matches, self.tokens = matches, tokens
        return self

    def __reduce__(self) -> Any:
        # lm-eval's --use_cache pickles answers.
        return TokenwiseAnswer, (tuple(self), self.matches, self.tokens)


@dataclass(frozen=True)
class _Whole:
    """One of transformers' Auto classes that opens the whole model: with all weights, and adapters merged."""

    kind: Any

    def from_pretrained(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        base = adapter_base(str(name), exported=True)
        if base:
            whole = merged(str(name), self.from_pretrained(base, *args, **kwargs))
            logger.warning("The adapter %s is merged into its base model %s. The merged model is measured.", name, base)
            return whole
        model, found = open_weights(str(name), self.kind, *args, **kwargs)
        refuse_drawn(str(name), model, found)
        if has_head_unlike_config(model):
            # lm-eval ties the weights that the config says are tied.
            settle_config(model)
        return model


class WholeHF(HFLM):  # type: ignore[misc]
    """lm-eval's `hf`, but it opens whole models: an adapter is merged into its base, a head of its own is kept.

    Raises a UniEraseError for a checkpoint that lacks weights, and for an adapter that cannot be merged.
    """

    def _get_config(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        base = first_base(pretrained)
        named = {key: kwargs.get(key) for key in ("revision", "subfolder") if kwargs.get(key) not in (None, "", "main")}
        if base != pretrained and named:
            raise UniEraseError(
                f"{shown(pretrained)} is an adapter, and {listed(named)} would be looked up in its base model. "
                "Download that version of the adapter into a folder, and give the folder."
            )
        super()._get_config(base, *args, **kwargs)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(pretrained, str) and not tokenizer:
            place = tokenizer_place(pretrained)
            tokenizer = place if place != pretrained else tokenizer
        super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        kind: Any = self.AUTO_MODEL_CLASS
        # lm-eval opens an image-text model without its vision part, or not at all.
        self.AUTO_MODEL_CLASS: Any = _Whole(auto_class(self.config) if self.backend == "causal" else kind)
        try:
            super()._create_model(pretrained, *args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = kind
        if first_base(pretrained) != pretrained:
            check_tokenizer(pretrained, self.model, self.tokenizer)


@register_model(MODEL_TYPE)
class HFWithSpecialTokens(WholeHF):
    """Decodes as `models.generate.answers` does, and gives figures per token.

    All figures are those of lm-eval's `hf`, with two exceptions: beams and penalties of the model's own settings, and
    an end token that a tokenizer puts after a text, are ignored here. Nothing is computed twice: the most likely tokens
    are read off the logits that lm-eval asks for.
    """

    #: Generations keep special tokens.
    shows_special_tokens = True
    #: Names of special tokens in texts of users (`literal.Rendered`) are read as text.
    reads_names_as_text = True

    @cached_property
    def _closing(self) -> int:
        """The number of tokens that the tokenizer puts after a text."""
        return closing(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        literal = names_in_spans(self.tokenizer, string)
        # lm-eval looks only at the start of a text, which belongs to the template.
        read = f"{string[: string.spans[0][0]]}a" if literal and isinstance(string, Rendered) else string
        ids = list(super().tok_encode(read, add_special_tokens, **kwargs))
        # A tokenizer that puts tokens after the text has put those before it as well.
        whole = bool(literal or self._closing) and ids == list(self.tokenizer(read)["input_ids"])
        if literal:
            ids = literal_ids(self.tokenizer, string, add_special_tokens=whole)[0]
        if whole and self._closing:
            ids = ids[: -self._closing]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ours = [bool(self._closing) or names_in_spans(self.tokenizer, string) for string in strings]
        theirs = functools.partial(
            super().tok_batch_encode,
            padding_side=padding_side,
            left_truncate_len=left_truncate_len,
            truncation=truncation,
        )
        if not any(ours):
            found: tuple[torch.Tensor, torch.Tensor] = theirs(strings)
            return found
        rows = [
            self.tok_encode(string, left_truncate_len=left_truncate_len) if own else theirs([string])[0][0].tolist()
            for own, string in zip(ours, strings, strict=True)
        ]
        batch = pad(rows, pad_token_id(self.model, self.tokenizer), padding_side, torch.device("cpu"))
        return batch.ids, batch.mask

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with ends_alone(self.model, pad_token_id(self.model, self.tokenizer)):
            written: torch.Tensor = super()._model_generate(*args, **kwargs)
        return written

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        if not skip_special_tokens:
            return str(super().tok_decode(tokens, skip_special_tokens=False))
        return decode_answer(self.model, self.tokenizer, list(tokens), pad_token_id(self.model, self.tokenizer))

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[Any]:
        watched = [bool(texts) and isinstance(texts[1], Watched) for texts, _, _ in requests]
        # The tokens that the model reads for a request, cut as lm-eval cuts texts longer than the context.
        read = [
            tuple((context + scored)[-(self.max_length + 1) :][:-1]) if watch else ()
            for watch, (_, context, scored) in zip(watched, requests, strict=True)
        ]
        self._likeliest: dict[tuple[int, ...], list[int]] = {ids: [] for ids in read}
        answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return [
            self._tokenwise(answer, texts, ids, scored)
            for ids, (texts, _, scored), answer in zip(read, requests, answers, strict=True)
        ]

    def _tokenwise(self, answer: Any, texts: Any, read: tuple[int, ...], scored: list[int]) -> Any:
        likeliest = self._likeliest[read]
        matches = _matches(likeliest, scored) if likeliest else None
        literal = any(names_in_spans(self.tokenizer, text) for text in texts or ())
        tokens = len(scored) if literal else None
        return TokenwiseAnswer(answer, matches, tokens) if likeliest or literal else answer

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
        # The empty key stands for requests that are not watched.
        if read and read in self._likeliest:
            self._likeliest[read] = selected.argmax(-1).tolist()
        return selected


def _matches(likeliest: list[int], scored: list[int]) -> list[bool]:
    # lm-eval calls the model once for all requests that share their tokens, with the longest scored part.
    return [likely == token for likely, token in zip(likeliest[-len(scored) :], scored, strict=True)]
