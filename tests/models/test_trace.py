"""Theorems of a partial pass, on every family: in parts, padded or cached, a model computes what it always computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import BLOCKS, DISTINCT, FAMILIES, HIDDEN, VOCABULARY, WIDTH
from hypothesis import given
from hypothesis import strategies as st
from slopes import check_slope
from torch import Tensor

from unierase_plugin.errors import EditError
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.models.prefix import KeysAndValues, cache_prefixes, continue_from, select_suffixes
from unierase_plugin.models.trace import TokenBatch, pad, run_batches, run_blocks, token_batches

#: Longer than the families' sliding windows, and of different lengths.
SEQUENCES = [[5, 17, 200, 33, 8, 91, 44, 12, 250], [7, 61, 130, 9, 77, 102], [250, 3, 3]]
PAD = 0


@pytest.fixture(scope="module", params=DISTINCT)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return find_architecture(FAMILIES[request.param]().requires_grad_(False))


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))


@torch.no_grad()
def full(arch: Architecture, sequence: Sequence[int]) -> Tensor:
    """(T, V) logits of one sequence alone, through nothing but the model itself."""
    return arch.model(torch.tensor([list(sequence)]), use_cache=False).logits[0]


def batch_of(arch: Architecture, sequences: Sequence[Sequence[int]] = SEQUENCES, side: str = "right") -> TokenBatch:
    return pad(sequences, PAD, side, arch.device)


def real(batch: TokenBatch, logits: Tensor) -> list[Tensor]:
    """The rows' logits at real tokens only."""
    mask = batch.mask[:, -batch.ids.shape[1] :].bool()
    return [row[keep] for row, keep in zip(logits, mask, strict=True)]


def every_logit(arch: Architecture, batch: TokenBatch, **settings: Any) -> Tensor:
    """(B, T, V): logits at every position, padding included."""
    rows, columns = torch.ones_like(batch.ids).nonzero(as_tuple=True)
    return run_blocks(arch, batch, head_at=(rows, columns), **settings).logits.reshape(*batch.ids.shape, -1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def fingerprint(arch: Architecture) -> list[Any]:
    """Whatever a pass may have changed on the modules: hooks, and a `forward` of their own."""
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), module.__dict__.get("forward"))
        for name, module in arch.model.named_modules()
    ]


# --- parts make the whole ---------------------------------------------------------------------------------------------


def test_the_random_models_tell_a_wrong_position_from_a_right_one(arch: Architecture) -> None:
    """Control for all that follows: had the comparisons no power, they would hold of a broken pass too."""
    turned = [SEQUENCES[0][1], SEQUENCES[0][0], *SEQUENCES[0][2:]]
    assert (full(arch, SEQUENCES[0])[-1] - full(arch, turned)[-1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("first", range(1, BLOCKS + 1))
def test_blocks_below_and_above_compose_to_the_model(arch: Architecture, first: int) -> None:
    """`first` = the number of blocks runs the final norm and the head alone."""
    batch = batch_of(arch)
    below = run_blocks(arch, batch, last=first - 1)
    assert below.logits is None
    assert below.hidden.shape == (*batch.ids.shape, HIDDEN)
    above = run_blocks(arch, batch, first=first, hidden=below.hidden)
    assert above.hidden is None
    for got, sequence in zip(real(batch, above.logits), SEQUENCES, strict=True):
        close(got, full(arch, sequence))


@torch.no_grad()
def test_a_middle_part_composes_too(arch: Architecture) -> None:
    batch = batch_of(arch)
    low = run_blocks(arch, batch, last=0).hidden
    middle = run_blocks(arch, batch, first=1, hidden=low, last=2, outputs_of=[1, 2])
    close(middle.hidden, run_blocks(arch, batch, last=2).hidden)
    assert set(middle.outputs) == {1, 2}
    assert middle.outputs[2] is middle.hidden


@torch.no_grad()
def test_blocks_that_are_not_asked_for_do_not_run(arch: Architecture) -> None:
    batch, ran = batch_of(arch), []
    hidden = run_blocks(arch, batch, last=0).hidden
    handles = [p.register_forward_hook(lambda *_, at=at: ran.append(at)) for at, p in enumerate(arch.projections)]
    try:
        run_blocks(arch, batch, first=1, hidden=hidden, last=2)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [1, 2]


def test_starting_above_block_0_needs_its_input(llama: Architecture) -> None:
    with pytest.raises(ValueError, match="input of block `first`"):
        run_blocks(llama, batch_of(llama), first=1)


# --- only the logits asked for ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_asked_for_are_the_models_own(arch: Architecture) -> None:
    """Soft caps come after the head, and belong to what the model says."""
    rows, columns = torch.tensor([2, 0, 0, 1, 0]), torch.tensor([2, 8, 0, 3, 0])
    trace = run_blocks(arch, batch_of(arch), head_at=(rows, columns))
    assert trace.logits.shape == (5, VOCABULARY)
    for got, row, column in zip(trace.logits, rows.tolist(), columns.tolist(), strict=True):
        close(got, full(arch, SEQUENCES[row])[column])


@torch.no_grad()
def test_head_inputs_are_what_the_head_was_given(arch: Architecture) -> None:
    trace = run_blocks(arch, batch_of(arch), head_at=(torch.tensor([0, 1]), torch.tensor([8, 5])))
    assert trace.head_inputs.shape == (2, HIDDEN)
    cap = getattr(arch.model.config, "final_logit_softcapping", None)
    logits = arch.head(trace.head_inputs)
    close(trace.logits, logits if cap is None else cap * torch.tanh(logits / cap))


@torch.no_grad()
def test_a_capped_family_is_really_capped() -> None:
    """Control for the two above."""
    arch = find_architecture(FAMILIES["gemma2-9b"]())
    trace = run_blocks(arch, batch_of(arch), head_at=(torch.tensor([0]), torch.tensor([8])))
    assert trace.logits.abs().max() < arch.model.config.final_logit_softcapping
    assert not torch.allclose(trace.logits, arch.head(trace.head_inputs), atol=1e-2)


# --- padding ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(arch: Architecture, side: str) -> None:
    batch = batch_of(arch, side=side)
    for got, sequence in zip(real(batch, every_logit(arch, batch)), SEQUENCES, strict=True):
        close(got, full(arch, sequence))


@torch.no_grad()
def test_a_padded_batch_may_start_at_a_later_block(arch: Architecture) -> None:
    left = batch_of(arch, side="left")
    hidden = run_blocks(arch, left, last=1).hidden
    for got, sequence in zip(real(left, every_logit(arch, left, first=2, hidden=hidden)), SEQUENCES, strict=True):
        close(got, full(arch, sequence))


def test_positions_count_from_the_first_real_token() -> None:
    left = pad([[4, 5, 6], [7]], 9, "left", torch.device("cpu"))
    assert left.ids.tolist() == [[4, 5, 6], [9, 9, 7]]
    assert left.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    right = pad([[4, 5, 6], [7]], 9, "right", torch.device("cpu"))
    assert right.ids.tolist() == [[4, 5, 6], [7, 9, 9]]
    assert right.positions[0].tolist() == [0, 1, 2]
    assert right.positions[1, 0] == 0


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 100))
def test_token_batches_hold_every_sequence_once_and_fit(lengths: list[int], max_tokens: int) -> None:
    sequences = [[1] * length for length in lengths]
    batches = list(token_batches(sequences, max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens


# --- cached prefixes --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(7, 2, 1), (1, 5, 2), (8, 0, 1), (0, 0, 0)], ids=str)
def test_a_cached_prefix_and_its_suffix_make_the_whole(arch: Architecture, cuts: tuple[int, ...]) -> None:
    """Prefixes may be longer than a sliding window, of any lengths, and empty in some rows or in all."""
    prefix = cache_prefixes(arch, [ids[:cut] for ids, cut in zip(SEQUENCES, cuts, strict=True)], PAD)
    suffix = continue_from(prefix, [ids[cut:] for ids, cut in zip(SEQUENCES, cuts, strict=True)], PAD)
    logits = every_logit(arch, suffix, cache=prefix.fresh())
    for got, sequence, cut in zip(real(suffix, logits), SEQUENCES, cuts, strict=True):
        close(got, full(arch, sequence)[cut:])


@torch.no_grad()
def test_a_pass_from_a_cache_may_start_at_any_block(arch: Architecture) -> None:
    cuts = (7, 2, 1)
    prefix = cache_prefixes(arch, [ids[:cut] for ids, cut in zip(SEQUENCES, cuts, strict=True)], PAD)
    suffix = continue_from(prefix, [ids[cut:] for ids, cut in zip(SEQUENCES, cuts, strict=True)], PAD)
    for last in range(BLOCKS):
        hidden = run_blocks(arch, suffix, last=last, cache=prefix.fresh()).hidden
        logits = every_logit(arch, suffix, first=last + 1, hidden=hidden, cache=prefix.fresh())
        for got, sequence, cut in zip(real(suffix, logits), SEQUENCES, cuts, strict=True):
            close(got, full(arch, sequence)[cut:])


@torch.no_grad()
def test_a_prefix_serves_many_passes_unchanged(arch: Architecture) -> None:
    prefix = cache_prefixes(arch, [ids[:2] for ids in SEQUENCES], PAD)
    assert isinstance(prefix, KeysAndValues)
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values)]
    suffix = continue_from(prefix, [ids[2:] for ids in SEQUENCES], PAD)
    once, again = (every_logit(arch, suffix, cache=prefix.fresh()) for _ in range(2))
    assert torch.equal(once, again)
    assert all(torch.equal(a, b) for a, b in zip(before, (*prefix.keys, *prefix.values), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("stay", [[True, False, True], [False, True, True]], ids=["as wide", "narrower"])
def test_rows_of_a_prefix_can_be_selected(arch: Architecture, stay: list[bool]) -> None:
    """Prefixes are longer than sliding windows, before the narrowing and after it."""
    prefix = cache_prefixes(arch, [ids[:cut] for ids, cut in zip(SEQUENCES, (7, 5, 2), strict=True)], PAD)
    suffix = continue_from(prefix, [ids[cut:] for ids, cut in zip(SEQUENCES, (7, 5, 2), strict=True)], PAD)
    rows = torch.tensor(stay)
    chosen = prefix.select(rows)
    fewer = select_suffixes(chosen, suffix, rows)
    logits = every_logit(arch, fewer, cache=chosen.fresh())
    for got, row in zip(real(fewer, logits), rows.nonzero().flatten().tolist(), strict=True):
        close(got, full(arch, SEQUENCES[row])[(7, 5, 2)[row] :])


# --- looking and replacing --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_projection_inputs_and_outputs_are_the_blocks_own(arch: Architecture) -> None:
    batch = batch_of(arch)
    seen: dict[Any, Any] = {}
    handles = [
        arch.projections[1].register_forward_pre_hook(lambda m, args: seen.update(key=args[0])),
        arch.blocks[1].register_forward_hook(lambda m, a, out: seen.update(out=out[0] if type(out) is tuple else out)),
    ]
    arch.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
    for handle in handles:
        handle.remove()
    trace = run_blocks(arch, batch, last=2, inputs_of=[1], outputs_of=[1])
    assert trace.projection_inputs[1].shape == (*batch.ids.shape, WIDTH)
    close(trace.projection_inputs[1], seen["key"])
    close(trace.outputs[1], seen["out"])


@torch.no_grad()
def test_an_edited_output_is_what_the_next_block_reads(arch: Architecture) -> None:
    batch = batch_of(arch)
    shift = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    edited = run_blocks(arch, batch, edit=(1, lambda hidden: hidden + shift)).logits
    by_hand = run_blocks(arch, batch, first=2, hidden=run_blocks(arch, batch, last=1).hidden + shift).logits
    close(edited, by_hand)
    assert not torch.allclose(edited, run_blocks(arch, batch).logits, atol=1e-2)


@torch.no_grad()
def test_a_replaced_embedding_is_what_the_model_reads(arch: Architecture) -> None:
    batch, other = batch_of(arch), batch_of(arch, [[9, *ids[1:]] for ids in SEQUENCES])
    row = arch.embedding(torch.tensor([9]))[0]

    def put(output: Tensor) -> Tensor:
        return torch.cat([row.expand(len(output), 1, -1), output[:, 1:]], dim=1)

    got = run_blocks(arch, batch, embed=put).logits
    for a, b in zip(real(batch, got), real(batch, run_blocks(arch, other).logits), strict=True):
        close(a, b)


@pytest.mark.parametrize("first", [1, 3, BLOCKS])
def test_gradients_flow_to_an_injected_state_and_only_from_the_past(arch: Architecture, first: int) -> None:
    batch = batch_of(arch)
    with torch.no_grad():
        hidden = run_blocks(arch, batch, last=first - 1).hidden
    hidden.requires_grad_(True)
    logits = run_blocks(arch, batch, first=first, hidden=hidden, head_at=(torch.tensor([0]), torch.tensor([4]))).logits
    (gradient,) = torch.autograd.grad(logits[0].log_softmax(-1)[11], hidden)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 4].norm() > 1e-4
    assert not gradient[0, 5:].any()
    assert not gradient[1:].any()
    assert bool(gradient[0, 3].any()) is (first < BLOCKS)


def test_the_gradient_is_the_slope(arch: Architecture) -> None:
    """Against a central difference along a random direction, through a cache as the value optimisation runs it."""
    prefix = cache_prefixes(arch, [ids[:2] for ids in SEQUENCES], PAD)
    suffix = continue_from(prefix, [ids[2:] for ids in SEQUENCES], PAD)
    check_slope(arch, prefix, suffix)


# --- everything is restored -------------------------------------------------------------------------------------------


def test_a_pass_leaves_no_trace(arch: Architecture) -> None:
    batch, before = batch_of(arch), fingerprint(arch)
    with torch.no_grad():
        hidden = run_blocks(arch, batch, last=1, inputs_of=[0], outputs_of=[0], embed=lambda x: x).hidden
        run_blocks(
            arch, batch, first=2, hidden=hidden, edit=(2, lambda x: x), head_at=(torch.tensor([0]), torch.tensor([0]))
        )
    assert fingerprint(arch) == before
    close(arch.model(torch.tensor([SEQUENCES[0]])).logits[0], full(arch, SEQUENCES[0]))


def test_an_exception_leaves_no_trace(arch: Architecture) -> None:
    def fail(hidden: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    batch, before, wanted = batch_of(arch), fingerprint(arch), full(arch, SEQUENCES[0])
    with torch.no_grad():
        hidden = run_blocks(arch, batch, last=1).hidden
        with pytest.raises(RuntimeError, match="on purpose"):
            run_blocks(arch, batch, first=2, hidden=hidden, inputs_of=[2], edit=(2, fail), embed=lambda x: x)
    assert fingerprint(arch) == before
    assert torch.equal(full(arch, SEQUENCES[0]), wanted)


@torch.no_grad()
def test_a_forward_that_someone_else_put_in_place_is_put_back(llama: Architecture) -> None:
    """accelerate dispatches a model over devices by replacing `forward` of its modules."""
    block, batch = llama.blocks[0], batch_of(llama)
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    try:
        wrapped = block.forward
        run_blocks(llama, batch, first=1, hidden=run_blocks(llama, batch, last=0).hidden)
        assert block.forward is wrapped
    finally:
        del block.forward


# --- batches that the memory does not hold ----------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_run_in_halves_and_every_row_once() -> None:
    sequences, runs = [[0] * length for length in (3, 9, 5, 7, 1, 8)], []

    def run(rows: list[int]) -> None:
        if sum(len(sequences[row]) for row in rows) > 12:
            raise torch.OutOfMemoryError
        runs.append(rows)

    run_batches(sequences, 1000, run)
    assert sorted(row for rows in runs for row in rows) == list(range(6))
    assert len(runs) > 2


def test_a_sequence_that_does_not_fit_alone_is_an_error() -> None:
    def run(rows: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(EditError, match="does not hold a single sequence"):
        run_batches([[1], [2, 3]], 1000, run)
