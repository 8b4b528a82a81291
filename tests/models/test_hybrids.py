"""Theorems of passes over models that keep more than keys and values, or that no pass can continue from a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import HYBRIDS, installed, jamba, qwen3_5, recurrent_gemma
from safetensors.torch import load_file
from slopes import check_slope
from small import FORGET, HPARAMS, save_base, shrink
from torch import Tensor
from transformers import AutoModelForCausalLM

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import revert_checkpoint
from unierase_plugin.locate_then_edit.edit import apply_edit, compute_edit
from unierase_plugin.locate_then_edit.keys import KeyStream
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.solve import Ridge
from unierase_plugin.locate_then_edit.values import Values
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.models.generate import generate
from unierase_plugin.models.prefix import PrefixCache, cache_prefixes, continue_from, select_suffixes
from unierase_plugin.models.served import check_served
from unierase_plugin.models.trace import TokenBatch, pad, run_blocks

#: Longer than the windows of sliding attention and the kernels of convolutions, and of different lengths.
SEQUENCES = [[5, 17, 200, 33, 8, 91, 44, 12, 250], [7, 61, 130, 9, 77, 102], [250, 3, 3]]
PAD = 0
NEWER = pytest.mark.skipif(not installed(qwen3_5), reason="needs transformers 5")


@pytest.fixture(scope="module", params=HYBRIDS)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return find_architecture(HYBRIDS[request.param]().requires_grad_(False))


@torch.no_grad()
def full(arch: Architecture, sequence: Sequence[int]) -> Tensor:
    """(T, V) logits of one sequence alone, through nothing but the model itself."""
    return arch.model(torch.tensor([list(sequence)]), use_cache=False).logits[0]


def cut(arch: Architecture, cuts: Sequence[int]) -> tuple[PrefixCache, TokenBatch]:
    prefix = cache_prefixes(arch, [ids[:at] for ids, at in zip(SEQUENCES, cuts, strict=True)], PAD)
    return prefix, continue_from(prefix, [ids[at:] for ids, at in zip(SEQUENCES, cuts, strict=True)], PAD)


def inner(arch: Architecture) -> list[int]:
    """Two blocks with an MLP, neither the first nor the last."""
    return [layer for layer in arch.editable if 0 < layer < len(arch.blocks) - 1][:2]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def agrees(arch: Architecture, batch: TokenBatch, logits: Tensor, cuts: Sequence[int] = (0, 0, 0)) -> None:
    """The logits (B, S, V) at a batch's real tokens are those of each sequence alone."""
    real = batch.mask[:, -batch.ids.shape[1] :].bool()
    for row, keep, sequence, at in zip(logits, real, SEQUENCES, cuts, strict=True):
        close(row[keep], full(arch, sequence)[at:])


def every_logit(arch: Architecture, batch: TokenBatch, **settings: Any) -> Tensor:
    rows, columns = torch.ones_like(batch.ids).nonzero(as_tuple=True)
    return run_blocks(arch, batch, head_at=(rows, columns), **settings).logits.reshape(*batch.ids.shape, -1)


# --- parts make the whole ---------------------------------------------------------------------------------------------


def test_every_hybrid_is_served(arch: Architecture) -> None:
    check_served(arch, range(1, len(arch.blocks)))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(7, 2, 1), (8, 0, 1), (0, 0, 0)], ids=str)
def test_a_prefix_and_its_suffix_make_the_whole(arch: Architecture, cuts: tuple[int, ...]) -> None:
    """Of any lengths, empty in some rows or in all, and from any block on; with and without a choice of positions."""
    prefix, suffix = cut(arch, cuts)
    agrees(arch, suffix, every_logit(arch, suffix, cache=prefix.fresh()), cuts)
    for last in range(len(arch.blocks)):
        mlp = [last] if last in arch.editable else []
        below = run_blocks(arch, suffix, last=last, cache=prefix.fresh(), inputs_of=mlp, outputs_of=[last])
        assert below.hidden.shape == (*suffix.ids.shape, arch.hidden_size)
        for layer in mlp:
            assert below.projection_inputs[layer].shape == (*suffix.ids.shape, arch.mlp_width(layer))
        close(below.outputs[last], below.hidden)
        logits = run_blocks(arch, suffix, first=last + 1, hidden=below.hidden, cache=prefix.fresh()).logits
        agrees(arch, suffix, logits, cuts)


@torch.no_grad()
def test_a_prefix_serves_many_passes_and_rows_of_it_can_be_chosen(arch: Architecture) -> None:
    prefix, suffix = cut(arch, (7, 2, 0))
    once, again = (every_logit(arch, suffix, cache=prefix.fresh()) for _ in range(2))
    assert torch.equal(once, again)
    for rows in (torch.tensor([True, False, True]), torch.tensor([False, True, True]), torch.tensor([2, 1, 1, 0])):
        chosen = prefix.select(rows)
        fewer = select_suffixes(chosen, suffix, rows)
        close(every_logit(arch, fewer, cache=chosen.fresh()), once[rows][:, : fewer.ids.shape[1]])
    assert torch.equal(every_logit(arch, suffix, cache=prefix.fresh()), once)


@torch.no_grad()
def test_what_replaces_a_part_replaces_it_at_the_suffix_alone(arch: Architecture) -> None:
    cuts = (7, 2, 1)
    prefix, suffix = cut(arch, cuts)
    whole = pad(SEQUENCES, PAD, "right", arch.device)
    own = torch.stack([torch.arange(whole.ids.shape[1]) >= at for at in cuts])[..., None]
    shift = torch.randn(arch.hidden_size, generator=torch.Generator().manual_seed(1))
    for way in ("embed", "edit"):

        def put(change: Any, way: str = way) -> dict[str, Any]:
            return {"embed": change} if way == "embed" else {"edit": (1, change)}

        wanted = run_blocks(arch, whole, **put(lambda seen: torch.where(own, seen + shift, seen))).logits
        found = run_blocks(arch, suffix, cache=prefix.fresh(), **put(lambda seen: seen + shift)).logits
        for row, at in enumerate(cuts):
            length = len(SEQUENCES[row]) - at
            close(found[row, :length], wanted[row, at : at + length])


def test_the_gradient_is_the_slope(arch: Architecture) -> None:
    """Against a central difference along a random direction, as the optimisation of values runs it."""
    prefix, suffix = cut(arch, (2, 2, 2))
    check_slope(arch, prefix, suffix)


# --- padding ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keys_are_those_of_each_prompt_alone(arch: Architecture) -> None:
    prompts = [[Prompt(tuple(ids), len(ids) - 1)] for ids in SEQUENCES]
    layers = inner(arch)
    keys, states = KeyStream(arch, prompts, layers, 100, PAD).advance(layers[0])
    for row, ids in enumerate(SEQUENCES):
        alone = run_blocks(arch, pad([ids], PAD, "left", arch.device), last=layers[1], inputs_of=layers[:1])
        close(keys[:, row], alone.projection_inputs[layers[0]][0, -1])
        close(states[:, row], alone.hidden[0, -1])


@torch.no_grad()
def test_a_batch_is_continued_as_each_prompt_alone(arch: Architecture) -> None:
    batch = pad(SEQUENCES, PAD, "left", arch.device)
    written = generate(arch.model, batch.ids, batch.mask, 4, PAD).tolist()
    for ids, got in zip(SEQUENCES, written, strict=True):
        whole = list(ids)
        for token in got:
            assert token == int(full(arch, whole)[-1].argmax())
            if token == arch.model.config.eos_token_id:
                break
            whole.append(token)


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "earlier", "left"),
    [
        pytest.param(qwen3_5, "states", True, marks=NEWER),
        (jamba, "tokens", True),
        pytest.param(recurrent_gemma, "tokens", False, marks=NEWER),
    ],
)
def test_the_way_is_found_by_trying_whatever_the_precision(
    build: Any, earlier: str, left: bool, dtype: torch.dtype
) -> None:
    """A half-precision model's rounding is larger than some errors of a wrong cache. Trying changes nothing."""
    model = build().to(dtype).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    arch = find_architecture(model)
    assert (arch.earlier, arch.pads_left) == (earlier, left)
    assert model.training
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


# --- an edit ----------------------------------------------------------------------------------------------------------


def test_an_edit_reaches_its_states_and_is_taken_back_to_the_bit(arch: Architecture) -> None:
    """Measured from outside: the state at each fact in a plain pass, before and after, against the state wanted."""
    layers, prompts = inner(arch), [[Prompt(tuple(ids), len(ids) - 2)] for ids in SEQUENCES]

    def states() -> Tensor:
        seen: list[Tensor] = []
        handle = arch.blocks[layers[1]].register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for ids in SEQUENCES:
            full(arch, ids)
        handle.remove()
        return torch.stack([each[0, -2] for each in seen])

    start = states()
    way = torch.randn(start.shape, generator=torch.Generator().manual_seed(7))
    wanted = start + 0.1 * start.norm(dim=1, keepdim=True) * way / way.norm(dim=1, keepdim=True)
    figures = {field.name: torch.ones(len(start)) for field in dataclasses.fields(Values)}
    values = Values(**{**figures, "states": wanted, "steps": torch.ones(len(start), dtype=torch.long)})
    solvers = {layer: Ridge.of(1e-4 * torch.eye(arch.mlp_width(layer))) for layer in layers}
    before = {name: weight.clone() for name, weight in arch.model.state_dict().items()}
    edit = compute_edit(arch, prompts, values, solvers, max_tokens=64, pad_id=PAD)
    originals = apply_edit(arch, edit)
    left = (states() - wanted).norm(dim=1) / (start - wanted).norm(dim=1)
    originals.restore()
    assert left.max() < 0.05
    assert all(torch.equal(weight, before[name]) for name, weight in arch.model.state_dict().items())


@pytest.mark.parametrize("build", [pytest.param(qwen3_5, marks=NEWER, id="states"), pytest.param(jamba, id="tokens")])
def test_a_run_writes_a_folder_that_loads_by_name_and_goes_back_to_the_bit(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    base = save_base(tmp_path / "base", build(vocab_size=260))
    result = unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    assert result.edit is not None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor(SEQUENCES[:1])
    assert torch.equal(loaded(ids, use_cache=False).logits, result.model(ids, use_cache=False).logits)
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    back, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", base))
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], weight) for name, weight in before.items())
