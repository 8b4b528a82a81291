"""A loaded model. Every part of the package takes this one type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..storage.fingerprints import model_fingerprint, tokenizer_fingerprint
from .generate import context_limit, pad_token_id
from .memory import fitting_tokens
from .stored_dtype import as_stored, stored_dtype


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model of transformers on its device, its tokenizer, and the fingerprints that identify both."""

    model: Any
    tokenizer: Any
    #: The user's name for the model: a folder, a hub id, or its class if the caller had loaded it.
    name: str
    #: Tokens of one batch at most, including padding.
    max_tokens: int
    #: SHA-256 over the parameters when the model was opened. Cache keys contain it.
    fingerprint: str
    #: The same over the weights as they would be written, possibly in another dtype (`stored_dtype`).
    saved_fingerprint: str
    #: The same over the tokenizer.
    tokenizer_fingerprint: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any, name: str, max_tokens: int = 0) -> LoadedModel:
        """A model and its tokenizer as they are now. max_tokens: 0 takes what memory has room for."""
        fingerprint = model_fingerprint(model)
        with as_stored(model):
            saved = fingerprint if stored_dtype(model) is None else model_fingerprint(model)
        return cls(
            model=model,
            tokenizer=tokenizer,
            name=name,
            max_tokens=max_tokens or fitting_tokens(model),
            fingerprint=fingerprint,
            saved_fingerprint=saved,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )

    @property
    def pad_id(self) -> int:
        """The token for padding."""
        return pad_token_id(self.model, self.tokenizer)

    @property
    def context(self) -> int:
        """The number of tokens that the model accepts at most."""
        return context_limit(self.model)
