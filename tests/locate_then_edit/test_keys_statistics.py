"""Keys, states and second moments: batched, cut and stopped early, they are those of whole sequences one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import reference
import torch
from families import FAMILIES, WIDTH
from reference import At
from scarce import Scarce
from torch import Tensor

from unierase_plugin.errors import EditError
from unierase_plugin.locate_then_edit.keys import KeyStream
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.statistics.second_moment import second_moments

STEMS = ["smollm2-135m", "gemma2-9b", "gemma3-1b", "gpt2-xl", "gpt-j-6b", "pythia-6.9b"]
#: Of different lengths and numbers of contexts; facts at the first, a middle and the last token.
PROMPTS = [
    (At((5, 17, 200, 33, 8, 91, 44), 3), At((9, 12, 61, 5, 17, 200, 33, 8, 91, 44), 6)),
    (At((7, 61, 130, 9), 3),),
    (At((250, 3, 4, 5, 6, 7, 8, 9, 10), 0), At((1, 250, 3, 4, 5), 1), At((44, 43, 42, 250, 3), 3)),
]
CORPUS = [[5, 17, 200, 33, 8, 91, 44, 12, 250], [7, 61, 130], [4], [9, 9, 9, 8, 7, 6], [250, 3, 3, 71, 72]]


@pytest.fixture(params=STEMS)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return find_architecture(FAMILIES[request.param]().requires_grad_(False))


@pytest.fixture
def llama() -> Architecture:
    return find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))


def stream(arch: Architecture, layers: tuple[int, ...], max_tokens: int = 4096, pad_id: int = 0) -> KeyStream:
    return KeyStream(
        arch, [[Prompt(*prompt) for prompt in contexts] for contexts in PROMPTS], layers, max_tokens, pad_id
    )


@torch.no_grad()
def change(arch: Architecture, layer: int) -> None:
    weight = arch.projections[layer].weight
    weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer)))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@contextmanager
def counted(arch: Architecture) -> Iterator[list[int]]:
    """How often each block runs; one that is passed over does not reach its MLP."""
    calls = [0] * len(arch.projections)

    def count(index: int) -> None:
        calls[index] += 1

    handles = [
        projection.register_forward_pre_hook(lambda module, args, index=index: count(index))
        for index, projection in enumerate(arch.projections)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# --- keys and states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 3), (2,)], ids=str)
def test_keys_and_states_are_the_references_while_the_blocks_below_are_edited(
    arch: Architecture, layers: tuple[int, ...]
) -> None:
    walk = stream(arch, layers)
    for layer in layers:
        keys, states = walk.advance(layer)
        close(keys, reference.keys(arch, PROMPTS, layer))
        close(states, reference.states(arch, PROMPTS, layers[-1]))
        change(arch, layer)
        # Control: the edit is felt above it, so keys that were kept from before would be wrong.
        assert float((reference.states(arch, PROMPTS, layers[-1]) - states).norm()) > 0.1
    close(walk.final_states(), reference.states(arch, PROMPTS, layers[-1]))


def test_the_state_after_an_edit_is_seen_without_going_on(llama: Architecture) -> None:
    walk = stream(llama, (1, 2))
    walk.advance(1)
    change(llama, 1)
    close(walk.advance(1)[1], reference.states(llama, PROMPTS, 2))


def test_a_key_is_the_mean_over_contexts_and_a_state_is_the_bare_prompts(llama: Architecture) -> None:
    keys, states = stream(llama, (2,)).advance(2)
    each = [[reference.inputs(llama, ids, 2)[at] for ids, at in contexts] for contexts in PROMPTS]
    close(keys, torch.stack([torch.stack(own).mean(dim=0) for own in each], dim=1))
    close(states, torch.stack([reference.state(llama, contexts[0], 2) for contexts in PROMPTS], dim=1))
    # Control: contexts differ.
    assert float((each[0][0] - each[0][1]).norm()) > 1e-2


@pytest.mark.parametrize("max_tokens", [1, 8, 16])
def test_how_prompts_are_batched_does_not_matter(arch: Architecture, max_tokens: int) -> None:
    whole, parts = stream(arch, (1, 2)), stream(arch, (1, 2), max_tokens)
    for layer in (1, 2):
        for a, b in zip(whole.advance(layer), parts.advance(layer), strict=True):
            close(a, b)


def test_keys_that_the_memory_does_not_hold_at_once_are_taken_in_halves(
    llama: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first pass on, and when memory runs out later, with the blocks below behind it."""
    whole = stream(llama, (0, 2))
    wanted = [whole.advance(layer) for layer in (0, 2)]
    scarce = Scarce(llama.blocks[2], 4, monkeypatch)
    halved = stream(llama, (0, 2))
    for limit, layer, (keys, states) in zip((4, 2), (0, 2), wanted, strict=True):
        scarce.rows = limit
        got = halved.advance(layer)
        close(got[0], keys)
        close(got[1], states)
    assert scarce.refused > 1


def test_what_pads_and_what_follows_the_fact_do_not_matter(arch: Architecture) -> None:
    keys, states = stream(arch, (2,), pad_id=0).advance(2)
    others = [[Prompt((*ids[: at + 1], 77), at) for ids, at in contexts] for contexts in PROMPTS]
    for a, b in zip((keys, states), KeyStream(arch, others, (2,), 4096, 123).advance(2), strict=True):
        close(a, b)


def test_blocks_below_the_first_edited_one_run_once(llama: Architecture) -> None:
    assert llama.pads_left  # tried on a few tokens when first asked
    with counted(llama) as calls:
        walk = stream(llama, (1, 2))
        walk.advance(1)
        walk.advance(2)
        walk.final_states()
    assert calls == [1, 2, 3, 0]


def test_keys_of_a_half_precision_model_are_float32(llama: Architecture) -> None:
    llama.model.to(torch.bfloat16)
    keys, states = stream(llama, (2,)).advance(2)
    assert keys.dtype == states.dtype == torch.float32
    assert keys.shape == (WIDTH, len(PROMPTS))
    torch.testing.assert_close(keys, reference.keys(llama, PROMPTS, 2), rtol=0.05, atol=0.05)


# --- second moments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_first", [0, 1, 4])
def test_second_moments_are_the_references(arch: Architecture, skip_first: int) -> None:
    got = second_moments(arch, CORPUS, (0, 2), skip_first=skip_first)
    assert list(got.moments) == [0, 2]
    for layer, moment in got.moments.items():
        wanted, count = reference.second_moment(arch, CORPUS, layer, skip_first)
        assert got.count == count
        close(moment, wanted.float())


@pytest.mark.parametrize("max_tokens", [1, 7, 12, 4096])
def test_the_batch_size_and_what_pads_do_not_matter(llama: Architecture, max_tokens: int) -> None:
    one, other = (
        second_moments(llama, CORPUS, (1,)),
        second_moments(llama, CORPUS, (1,), max_tokens=max_tokens, pad_id=99),
    )
    assert one.count == other.count == sum(map(len, CORPUS))
    close(one.moments[1], other.moments[1])


def test_sequences_without_a_token_count_for_nothing(llama: Architecture) -> None:
    with_empty = second_moments(llama, [[], *CORPUS, []], (1,), max_tokens=1)
    assert with_empty.count == sum(map(len, CORPUS))
    close(with_empty.moments[1], second_moments(llama, CORPUS, (1,)).moments[1])


def test_the_moments_are_symmetric_and_positive(llama: Architecture) -> None:
    moment = second_moments(llama, CORPUS, (1,), dtype=torch.float64).moments[1]
    assert moment.dtype == torch.float64
    torch.testing.assert_close(moment, moment.T)
    assert float(torch.linalg.eigvalsh(moment).min()) > -1e-12
    # No more directions than tokens.
    assert int(torch.linalg.matrix_rank(moment, rtol=1e-9)) <= sum(map(len, CORPUS))


def test_blocks_after_the_last_edited_one_never_run(llama: Architecture) -> None:
    with counted(llama) as calls:
        second_moments(llama, CORPUS, (0, 1))
    assert calls == [1, 1, 0, 0]


def test_progress_counts_tokens_up_to_one(llama: Architecture) -> None:
    seen: list[float] = []
    second_moments(llama, CORPUS, (1,), max_tokens=9, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1] == 1.0


@pytest.mark.parametrize("corpus", [[], [[]], [[], []]])
def test_a_corpus_without_tokens_is_refused(llama: Architecture, corpus: list[list[int]]) -> None:
    with pytest.raises(EditError, match="no tokens"):
        second_moments(llama, corpus, (1,))


def test_a_corpus_of_which_all_is_left_out_is_refused(llama: Architecture) -> None:
    with pytest.raises(EditError, match="longer than the 9 tokens"):
        second_moments(llama, CORPUS, (1,), skip_first=9)


def test_a_model_that_overflows_is_refused_naming_the_block(llama: Architecture) -> None:
    with torch.no_grad():
        llama.blocks[1].mlp.gate_proj.weight.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(EditError, match="block 1 "):
        second_moments(llama, CORPUS, (0, 1))
