"""Runs a part of a model: from the output of one block to the input of another, with only the logits that are needed.

Everything uses hooks on the model's own forward pass, so each family keeps its masks, rotary embeddings, soft caps and
caches. Every change is undone when the pass ends, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, EditError
from .architecture import Architecture
from .earlier import replaced_forward
from .experts import Experts, RoutedKeys, Routing

Edit = Callable[[Tensor], Tensor]
#: Receives a tensor. What it returns, unless None, replaces the tensor.
Look = Callable[[Tensor], "Tensor | None"]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids (B, T), and what the model needs to place them. With a cache of P positions the mask is (B, P + T)."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    def select(self, rows: Tensor | slice) -> TokenBatch:
        return TokenBatch(self.ids[rows], self.mask[rows], self.positions[rows])


@dataclass
class Trace:
    """The results of a partial pass: tensors, or None for parts that the pass did not reach."""

    #: Output (B, T, d) of the last block that ran; None if the pass went through the head.
    hidden: Any = None
    #: Logits (N, V) at the positions asked for.
    logits: Any = None
    #: Input (B, T, m) of the MLP output projection, by layer. For experts, the keys that are indexed.
    projection_inputs: dict[int, Any] = field(default_factory=dict)
    #: Output (B, T, d) of blocks, by layer.
    outputs: dict[int, Tensor] = field(default_factory=dict)
    #: Input (N, d) of the LM head at the positions asked for.
    head_inputs: Any = None


class _Stop(Exception):  # noqa: N818 (no error: it ends a pass)
    """Ends a forward pass from inside a hook."""


def pad(sequences: Sequence[Sequence[int]], fill: int, side: str, device: torch.device) -> TokenBatch:
    """Token ids as one rectangle, padded on the "left" or the "right". Positions count from the first real token."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), fill)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return TokenBatch(ids.to(device), mask.to(device), positions.to(device))


def token_batches(sequences: Sequence[Sequence[int]], max_tokens: int, alike: bool = False) -> Iterator[list[int]]:
    """Indices of sequences, longest first, in batches of at most `max_tokens` padded tokens (at least one sequence).

    alike: whether the sequences of a batch have one length, so that nothing is padded.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    while order:
        longest = len(sequences[order[0]])
        size = max(1, max_tokens // max(1, longest))
        if alike:
            size = min(size, sum(len(sequences[index]) == longest for index in order))
        yield order[:size]
        order = order[size:]


def run_batches(sequences: Sequence[Sequence[int]], max_tokens: int, run: Callable[[list[int]], None]) -> None:
    """Calls `run` with the rows of each batch; if memory runs out, with halves of the batch.

    `run` must leave nothing behind if it fails. Raises EditError if a single sequence does not fit.
    """
    waiting = list(token_batches(sequences, max_tokens))
    while waiting:
        rows = waiting.pop(0)
        try:
            run(rows)
        except torch.OutOfMemoryError:
            waiting[:0] = halves(rows)


def halves(rows: Sequence[int]) -> list[list[int]]:
    """Two halves of a batch that did not fit into memory. Raises EditError for a single sequence."""
    if len(rows) < 2:
        raise EditError(
            "The memory does not hold a single sequence of this length. Shorten it, use fewer contexts "
            "(context_template_length_params), or spread the model over several devices."
        )
    middle = len(rows) // 2
    return [list(rows[:middle]), list(rows[middle:])]


def run_blocks(
    arch: Architecture,
    batch: TokenBatch,
    *,
    first: int = 0,
    hidden: Tensor | None = None,
    last: int | None = None,
    cache: Any = None,
    inputs_of: Sequence[int] = (),
    outputs_of: Sequence[int] = (),
    edit: tuple[int, Edit] | None = None,
    edit_projection: tuple[int, Edit] | None = None,
    embed: Edit | None = None,
    head_at: tuple[Tensor, Tensor] | None = None,
) -> Trace:
    """One pass through blocks `first` to `last`, or on through the head if `last` is None.

    hidden      (B, T, d): the input of block `first`; the blocks below are skipped. Gradients flow through it.
    cache       P earlier positions: a transformers cache, which grows in place, or the tokens themselves.
    inputs_of   layers whose projection input is kept; `outputs_of`: layers whose block output is kept.
    edit        (layer, function): replaces the output of that block.
    edit_projection  the same for the output of that block's MLP output projection.
    embed       replaces the output of the embedding.
    head_at     (rows, columns), each (N,): the only positions for which logits are computed.

    Raises ArchitectureError where a part that is kept or replaced is not (B, T, width).
    """
    if isinstance(cache, EarlierTokens):
        return _run_after(
            cache,
            arch,
            batch,
            first=first,
            hidden=hidden,
            last=last,
            inputs_of=inputs_of,
            outputs_of=outputs_of,
            edit=edit,
            edit_projection=edit_projection,
            embed=embed,
            head_at=head_at,
        )
    trace = Trace()
    rows = _rows_of(arch, batch)
    with ExitStack() as stack:
        if first:
            if hidden is None:
                raise ValueError("run_blocks needs the input of block `first` to start above block 0")
            stack.enter_context(_passed_over(arch, arch.blocks[:first]))
            # As the output of the last skipped block, so that `first` may be any block.
            _hook(stack, arch.blocks[first - 1], post=lambda _: hidden)
        elif hidden is not None:
            _hook(stack, arch.blocks[0], pre=lambda _: hidden)
        if embed is not None:
            stack.callback(arch.embedding.register_forward_hook(lambda m, a, out: embed(out)).remove)
        for layer in inputs_of:
            projection = arch.projections[layer]
            if isinstance(projection, Experts):
                kept = partial(_keep_routing, trace.projection_inputs, layer, projection, batch.ids.shape)
                stack.callback(projection.watch(kept).remove)
            else:
                _hook(stack, projection, pre=_keeping(trace.projection_inputs, layer, rows))
        if edit_projection is not None:
            moved, move = edit_projection
            _hook(stack, arch.projection_module(moved), post=lambda x: _moved(x, move, rows, batch.ids.numel()))
        if edit is not None:
            edited, change = edit
            _hook(stack, arch.blocks[edited], post=lambda x: change(rows(x)))
        for layer in outputs_of:
            _hook(stack, arch.blocks[layer], post=_keeping(trace.outputs, layer, rows))
        if last is not None:
            _hook(stack, arch.blocks[last], post=lambda x: _stop(trace, rows(x)))
        _hook(stack, arch.head, pre=lambda x: _at_head(trace, x, head_at))
        try:
            logits = _call(arch, batch, cache).logits
            # A view has a gradient at no cost; selecting row 0 does not.
            trace.logits = logits.squeeze(0) if head_at is not None else logits
        except _Stop:
            pass
    return trace


def _call(arch: Architecture, batch: TokenBatch, cache: Any) -> Any:
    places = {"position_ids": batch.positions} if arch.accepts_position_ids else {}
    return arch.model(
        input_ids=batch.ids, attention_mask=batch.mask, past_key_values=cache, use_cache=cache is not None, **places
    )


def _rows_of(arch: Architecture, batch: TokenBatch) -> Edit:
    """Gives what a pass shows of each token as (B, T, width). Some models flatten it to (B T, width) on the way."""
    rows, columns = batch.ids.shape

    def view(seen: Tensor) -> Tensor:
        if seen.ndim == 2 and len(seen) == rows * columns:
            return seen.reshape(rows, columns, -1)
        if seen.ndim == 3 and seen.shape[:2] == (rows, columns):
            return seen
        raise ArchitectureError(
            f"In {type(arch.model).__name__}, a part of a block gives {list(seen.shape)} for {rows} texts of "
            f"{columns} tokens, not one vector for each token. UniErase edits decoder-only models whose blocks take "
            "and give (texts, tokens, width), not several streams for each token."
        )

    return view


def _keeping(kept: dict[int, Tensor], layer: int, rows: Edit) -> Callable[[Tensor], None]:
    def keep(seen: Tensor) -> None:
        kept[layer] = rows(seen)

    return keep


def _keep_routing(kept: dict[int, Any], layer: int, experts: Experts, shape: Any, routing: Routing) -> None:
    kept[layer] = RoutedKeys(experts, routing, torch.arange(shape.numel()).reshape(shape))


def _moved(output: Tensor, move: Edit, rows: Edit, tokens: int) -> Tensor:
    """A projection's output, moved. If it holds one output of each expert, which add up, the first ones are moved."""
    if output.ndim == 2 and len(output) > tokens:
        return torch.cat([move(rows(output[:tokens])).reshape(tokens, -1), output[tokens:]])
    return move(rows(output)).reshape(output.shape)


def _stop(trace: Trace, hidden: Tensor) -> None:
    trace.hidden = hidden
    raise _Stop


def _at_head(trace: Trace, hidden: Tensor, head_at: tuple[Tensor, Tensor] | None) -> Tensor | None:
    if head_at is None:
        return None
    chosen = hidden[head_at[0].to(hidden.device), head_at[1].to(hidden.device)]
    trace.head_inputs = chosen
    return chosen[None]


def _hook(stack: ExitStack, module: nn.Module, pre: Look | None = None, post: Look | None = None) -> None:
    """Observes or replaces a module's input (`pre`) or output (`post`). A result of None changes nothing."""

    def before(look: Look, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = not args
        new = look(kwargs["hidden_states"] if named else args[0])
        if new is None:
            return None
        return (args, {**kwargs, "hidden_states": new}) if named else ((new, *args[1:]), kwargs)

    def after(look: Look, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, (tuple, list))
        new = look(output[0] if several else output)
        if new is None:
            return None
        return type(output)([new, *output[1:]]) if several else new

    if pre is not None:
        stack.callback(module.register_forward_pre_hook(partial(before, pre), with_kwargs=True).remove)
    if post is not None:
        stack.callback(module.register_forward_hook(partial(after, post)).remove)


@contextmanager
def _passed_over(arch: Architecture, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Makes blocks return their input unchanged, at no cost."""

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if arch.blocks_return_tuple else hidden

    with replaced_forward(blocks, hand_on):
        yield


# --- without a cache --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EarlierTokens:
    """The tokens (B, P) before a batch, left-padded, and their mask: they run again with every pass.

    It takes the place of a cache where a model's own is wrong for this. The states (B, P', d) that enter the block at
    which passes begin are kept, so the blocks below it run once.
    """

    ids: Tensor
    mask: Tensor
    _entering: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @torch.no_grad()
    def entering(self, arch: Architecture, first: int) -> Tensor:
        """The states of these tokens, right-padded, that enter block `first`."""
        if first not in self._entering:
            none = TokenBatch(self.ids[:, :0], self.mask, self.ids[:, :0])
            found = run_blocks(arch, self.before(none)[0], last=first - 1).hidden
            self._entering.clear()
            self._entering[first] = found
        return self._entering[first]

    def before(self, batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
        """The whole texts, right-padded (B, W), and the columns (B, S) at which the batch's tokens stand in them."""
        lengths, width = self.mask.sum(1, keepdim=True), batch.ids.shape[1]
        columns = lengths + torch.arange(width, device=lengths.device)
        places = torch.arange(int(lengths.max()) + width, device=lengths.device).expand(len(lengths), -1)
        source = (places + self.ids.shape[1] - lengths).clamp(max=self.ids.shape[1] - 1)
        own = batch.mask[:, batch.mask.shape[1] - width :]
        ids = self.ids.gather(1, source).scatter(1, columns, batch.ids)
        mask = (places < lengths).to(own.dtype).scatter(1, columns, own)
        return TokenBatch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0)), columns


def _run_after(
    earlier: EarlierTokens,
    arch: Architecture,
    batch: TokenBatch,
    *,
    first: int,
    hidden: Tensor | None,
    edit: tuple[int, Edit] | None,
    edit_projection: tuple[int, Edit] | None,
    embed: Edit | None,
    head_at: tuple[Tensor, Tensor] | None,
    **settings: Any,
) -> Trace:
    """`run_blocks` over whole texts, with everything that it takes and gives at the batch's own tokens alone."""
    whole, columns = earlier.before(batch)

    def at(seen: Tensor) -> Tensor:
        return columns.to(seen.device)[..., None].expand(*columns.shape, seen.shape[-1])

    def own(seen: Tensor) -> Tensor:
        return seen.gather(1, at(seen))

    def changing(change: Edit) -> Edit:
        return lambda seen: seen.scatter(1, at(seen), change(own(seen)))

    if hidden is not None:
        below = earlier.entering(arch, first)
        room = whole.ids.shape[1] - below.shape[1]
        below = torch.nn.functional.pad(below, (0, 0, 0, room)).to(hidden)
        hidden = below.scatter(1, at(below), hidden)
    if head_at is not None:
        rows, places = (each.to(columns.device) for each in head_at)
        head_at = (rows, columns[rows, places])
    trace = run_blocks(
        arch,
        whole,
        first=first,
        hidden=hidden,
        edit=None if edit is None else (edit[0], changing(edit[1])),
        edit_projection=None if edit_projection is None else (edit_projection[0], changing(edit_projection[1])),
        embed=None if embed is None else changing(embed),
        head_at=head_at,
        **settings,
    )
    if trace.hidden is not None:
        trace.hidden = own(trace.hidden)
    if trace.logits is not None and head_at is None:
        trace.logits = own(trace.logits)
    trace.outputs.update({layer: own(found) for layer, found in trace.outputs.items()})
    for layer, found in trace.projection_inputs.items():
        trace.projection_inputs[layer] = found.at_columns(columns) if isinstance(found, RoutedKeys) else own(found)
    return trace
