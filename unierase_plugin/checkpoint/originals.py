"""The original content of everything that an edit overwrites. The record holds it, and a revert puts it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.architecture import Architecture
from ..models.tying import resize_vocabulary


@dataclass(frozen=True)
class Originals:
    """Projections by layer (d, m), and the padding row if the token took one."""

    projections: Mapping[int, Tensor]
    #: Name of each projection's weight within the model.
    names: Mapping[int, str]
    #: Rows of the embedding before the token was added.
    vocabulary: int
    #: (d,) each, and a scalar; None if the row is new, or if the model has no such part.
    input_row: Tensor | None = None
    output_row: Tensor | None = None
    output_bias: Tensor | None = None

    @torch.no_grad()
    def restore_projections(self, model: Any) -> None:
        """Puts the projections back, to the bit."""
        for layer, weight in self.projections.items():
            model.get_parameter(self.names[layer]).copy_(weight)

    @torch.no_grad()
    def restore_rows(self, model: Any, token_id: int) -> None:
        """Takes the token's rows out: an enlarged vocabulary gets its old size, a padding row its old content."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if embedding.weight.shape[0] > self.vocabulary:
            resize_vocabulary(model, self.vocabulary)
            return
        if self.input_row is not None:
            embedding.weight[token_id] = self.input_row
        if self.output_row is not None:
            head.weight[token_id] = self.output_row
        if self.output_bias is not None:
            head.bias[token_id] = self.output_bias

    def in_dtype(self, dtype: torch.dtype | None) -> Originals:
        """The same in another dtype: that of the checkpoint, if its weights were edited in float32. None: no change."""
        if dtype is None:
            return self

        def cast(row: Tensor | None) -> Tensor | None:
            return None if row is None else row.to(dtype)

        return replace(
            self,
            projections={layer: weight.to(dtype) for layer, weight in self.projections.items()},
            input_row=cast(self.input_row),
            output_row=cast(self.output_row),
            output_bias=cast(self.output_bias),
        )

    def before(self, later: Originals) -> Originals:
        """These originals and those of a later step. If both have a layer, these win: the later step saw it edited."""
        return replace(self, projections={**later.projections, **self.projections}, names={**later.names, **self.names})


def take_originals(
    arch: Architecture, layers: Sequence[int], vocabulary: int, token_id: int | None = None
) -> Originals:
    """Copies, on the CPU, what the edit of `layers` and the token's rows will overwrite.

    Call it after `add_token` and before `install_token`.

    vocabulary   rows of the embedding before `add_token`
    token_id     None without a token
    """
    projections = {layer: _copy(arch.projections[layer].weight) for layer in layers}
    names = {layer: arch.weight_name(layer) for layer in layers}
    if token_id is None or token_id >= vocabulary:
        return Originals(projections, names, vocabulary)
    embedding: Any = arch.embedding
    head: Any = arch.head
    row = _copy(embedding.weight[token_id])
    if arch.tied:
        return Originals(projections, names, vocabulary, row)
    bias, output_row = getattr(head, "bias", None), _copy(head.weight[token_id])
    return Originals(
        projections=projections,
        names=names,
        vocabulary=vocabulary,
        input_row=row,
        output_row=output_row,
        output_bias=None if bias is None else _copy(bias[token_id]),
    )


def _copy(tensor: Any) -> Tensor:
    return torch.Tensor.detach(tensor).cpu().clone()
