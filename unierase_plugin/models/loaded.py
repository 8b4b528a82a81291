"""A model at hand: the one type for it that every part of the package takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..storage.fingerprints import model_fingerprint, tokenizer_fingerprint
from .generate import context_limit, pad_token_id
from .memory import fitting_tokens
from .stored_dtype import as_stored, stored_dtype


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model of transformers on its device, with its tokenizer, and what tells them from others."""

    model: Any
    tokenizer: Any
    #: What the user calls it: a folder, a hub id, or a class where it came loaded.
    name: str
    #: Tokens of one batch at most, padding included.
    max_tokens: int
    #: SHA-256 over the parameters as they were when it was opened, which keys whatever is kept of them.
    fingerprint: str
    #: The same over the weights as they would be written, which may be in another dtype (`stored_dtype`).
    saved_fingerprint: str
    #: The same over the tokenizer.
    tokenizer_fingerprint: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any, name: str, max_tokens: int = 0) -> LoadedModel:
        """A model and its tokenizer as they are now; max_tokens: what memory has room for where it is 0."""
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
        """The token that fills batches up."""
        return pad_token_id(self.model, self.tokenizer)

    @property
    def context(self) -> int:
        """Tokens that the model can take at most."""
        return context_limit(self.model)
