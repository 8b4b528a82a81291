"""The edit of a mixture of experts: the closed form, what it changes, the statistics, a whole run and its undoing."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from decoders import tiny_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from small import FORGET, HPARAMS, RETAIN, shrink
from survey import PROMPTS, layers_of
from tiny import tiny_tokenizer
from torch import Tensor

from unierase_plugin import UniEraseHyperParams, unlearn
from unierase_plugin.checkpoint import export_adapter, read_checkpoint, revert_checkpoint, take_back_requests
from unierase_plugin.errors import ArchitectureError, CheckpointError, EditError, HyperParamsError
from unierase_plugin.locate_then_edit.edit import apply_edit, compute_edit, make_solver
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.solve import LowRank, protected_directions
from unierase_plugin.locate_then_edit.values import Values
from unierase_plugin.methods.editing.layers import settle_layers
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.models.loading import load
from unierase_plugin.statistics.second_moment import second_moments

NEWER = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="needs transformers 5")
#: Experts, their inner width, the hidden size.
COUNT, INNER, HIDDEN = 3, 4, 5
BASE = UniEraseHyperParams(mom2_update_weight=0.7, retain_update_weight=0.3, L2=0.05, nullspace_threshold=0.2)


def sparse_keys(n: int, experts: tuple[int, ...], seed: int) -> Tensor:
    """Keys (m, n), each with one or two of the experts."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.zeros(COUNT, INNER, n, dtype=torch.float64)
    for column in range(n):
        for slot in range(2):
            expert = experts[(column + slot * int(torch.randint(2, (), generator=generator))) % len(experts)]
            keys[expert, :, column] = torch.randn(INNER, generator=generator, dtype=torch.float64)
    return keys.reshape(COUNT * INNER, n)


def second_moment(seed: int, samples: int = 40) -> Tensor:
    keys = torch.randn(COUNT, samples, INNER, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys *= torch.tensor([3.0, 1.0, 0.3, 0.05], dtype=torch.float64)
    return keys.transpose(1, 2) @ keys / samples


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 7), p=st.integers(0, 4), seed=st.integers(0, 99), retained=st.booleans())
@pytest.mark.parametrize("solver", ["ridge", "null_space", "exact"])
def test_the_sum_over_experts_is_the_dense_solve(solver: str, n: int, p: int, seed: int, retained: bool) -> None:
    """Against one m x m system, written as the papers write it."""
    n = min(n, 3) if solver == "exact" else n
    keys, earlier = sparse_keys(n, (0, 1, 2), seed), sparse_keys(p, (1, 2), seed + 1)
    residual = torch.randn(HIDDEN, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    corpus, retain = second_moment(seed), second_moment(seed + 2) if retained else None
    made = make_solver(BASE.replace(solver=solver), corpus, retain, earlier)
    update = made.solve(keys, residual)
    blocks = corpus if retain is None else corpus + 0.3 * retain
    if solver == "null_space":
        protected = torch.block_diag(*(protected_directions(each, 0.2) for each in blocks))
        free = torch.eye(COUNT * INNER, dtype=torch.float64) - protected @ protected.T
        a, b = free @ keys, free @ earlier
        wanted = (
            residual @ a.T @ torch.linalg.inv(a @ a.T + b @ b.T + 0.05 * torch.eye(COUNT * INNER, dtype=torch.float64))
        )
    else:
        m = torch.block_diag(*(0.7 * corpus if retain is None else 0.7 * corpus + 0.3 * retain)) + earlier @ earlier.T
        if solver == "ridge":
            wanted = residual @ keys.T @ torch.linalg.inv(m + keys @ keys.T)
        else:
            b = torch.linalg.solve(m, keys)
            wanted = residual @ torch.linalg.solve(keys.T @ b, b.T)
    torch.testing.assert_close(update.matrix(), wanted, rtol=1e-6, atol=1e-8)
    assert made.error(keys, update) < 1e-6
    assert made.condition() >= 1
    shifted = LowRank(update.up, update.down * 1.01)
    assert made.error(keys, shifted) > 1e-4


@pytest.mark.parametrize("solver", ["ridge", "null_space", "exact"])
def test_only_experts_that_a_key_reaches_change(solver: str) -> None:
    made = make_solver(BASE.replace(solver=solver), second_moment(0), None)
    keys = sparse_keys(2, (0, 2), 1)
    update = made.solve(keys, torch.randn(HIDDEN, 2))
    assert update.down.reshape(2, COUNT, INNER).any(2).any(0).tolist() == [True, False, True]
    assert set(made.made) == {0, 2}  # type: ignore[attr-defined]


def test_a_null_space_of_an_expert_that_no_text_reached_is_everything() -> None:
    moment = second_moment(0)
    moment[1] = 0.01 * torch.eye(INNER)
    made = make_solver(BASE.replace(solver="null_space", L2=1e-9), moment, None)
    keys = sparse_keys(1, (1,), 1)
    residual = torch.ones(HIDDEN, 1, dtype=torch.float64)
    torch.testing.assert_close(made.solve(keys, residual).matrix() @ keys, residual, rtol=1e-6, atol=1e-6)


def test_an_expert_without_a_null_space_is_named() -> None:
    made = make_solver(BASE.replace(solver="null_space", nullspace_threshold=1e-9), second_moment(0), None)
    with pytest.raises(EditError, match=r"Expert 2: No eigenvalue of C is below.*Raise nullspace_threshold"):
        made.solve(sparse_keys(1, (2,), 1), torch.ones(HIDDEN, 1))


# --- on models -------------------------------------------------------------------------------------------------------


def values_of(wanted: Tensor) -> Values:
    """What an edit reads of values is z alone."""
    figures = {field.name: torch.ones(wanted.shape[1]) for field in dataclasses.fields(Values)}
    steps = torch.ones(wanted.shape[1], dtype=torch.long)
    return Values(**{**figures, "states": wanted.T.contiguous(), "steps": steps})


def mixed(kind: str = "qwen3_moe") -> Architecture:
    return find_architecture(tiny_decoder(kind).requires_grad_(False))


@NEWER
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_moments_are_those_of_each_expert_over_all_tokens(kind: str) -> None:
    arch = mixed(kind)
    texts = [[5, 17, 200, 33, 8, 91], [7, 61, 130, 9], [250, 3]]
    layer, places = 2, [[0, 1, 5], [2], []]
    experts: Any = arch.projections[layer]
    found = second_moments(arch, texts, [1, layer], counted=places, dtype=torch.float64)
    keys = torch.cat([reference.inputs(arch, ids, layer)[at] for ids, at in zip(texts, places, strict=True)]).double()
    parts = keys.reshape(4, experts.count, experts.inner)
    # One more token of mean length, without a direction.
    more = keys.square().sum(1).mean() / experts.inner * torch.eye(experts.inner, dtype=torch.float64)
    for number in range(experts.count):
        wanted = (parts[:, number].T @ parts[:, number] + more) / 4
        torch.testing.assert_close(found.moments[layer][number], wanted, rtol=1e-4, atol=1e-6)
    assert found.count == 4


@NEWER
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_edit_changes_the_experts_that_the_facts_reach_and_nothing_else(kind: str) -> None:
    arch = mixed(kind)
    layers = layers_of(arch)
    prompts = [[Prompt(*each) for each in contexts[:1]] for contexts in PROMPTS[:1]]
    before = copy.deepcopy(arch.model.state_dict())
    states = reference.states(arch, PROMPTS[:1], layers[-1])
    moments = {layer: torch.eye(arch.moment_shape(layer)[-1]).expand(arch.moment_shape(layer)) for layer in layers}
    solvers = {layer: make_solver(BASE, moments[layer], None) for layer in layers}
    edit = compute_edit(arch, prompts, values_of(states + 1), solvers, max_tokens=4096, pad_id=0)
    assert all(torch.equal(value, before[name]) for name, value in arch.model.state_dict().items())
    originals = apply_edit(arch, edit)
    for name, value in arch.model.state_dict().items():
        at = {arch.weight_name(layer): layer for layer in layers}.get(name)
        if at is None:
            assert torch.equal(value, before[name])
            continue
        experts: Any = arch.projections[at]
        hit = edit.keys[at].reshape(experts.count, experts.inner, -1).any(1).any(1)
        assert 0 < int(hit.sum()) < experts.count
        assert (value != before[name]).flatten(1).any(1).tolist() == hit.tolist()
        moved = value - before[name]
        delta = torch.cat([each.T if experts.input_first else each for each in moved], dim=1)
        torch.testing.assert_close(delta, edit.updates[at].matrix(), rtol=1e-3, atol=1e-5)
    originals.restore()
    assert all(torch.equal(value, before[name]) for name, value in arch.model.state_dict().items())


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_decoder("qwen3_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "cache")


@NEWER
def test_a_whole_run_is_saved_loaded_and_taken_back(base: Path, tmp_path: Path) -> None:
    hparams = HPARAMS.replace(retain_key_weight=1.0)
    out = tmp_path / "out"
    result = unlearn(str(base), FORGET, retain=RETAIN, hparams=hparams, out=out)
    original = load(base)[0].state_dict()
    edited = load(out)[0]
    names = {f"model.layers.{layer}.mlp.experts.down_proj" for layer in (1, 2)}
    rows = len(original["model.embed_tokens.weight"])
    different = {
        name
        for name, value in edited.state_dict().items()
        if not torch.equal(value[:rows] if "embed" in name or "head" in name else value, original[name])
    }
    assert names <= different
    assert different - names <= {"model.embed_tokens.weight", "lm_head.weight"}
    routes = result.report.edit["routes"]
    assert routes["tokens"] > 0
    assert 0 <= routes["changed"] <= 1
    assert routes["by_block"].keys() == {"2", "3"}
    assert result.report.edit["jitter"].keys() == {"1", "2"}
    assert all(0 < error < 1e-4 for error in result.report.edit["solve_errors"].values())

    revert_checkpoint(out, tmp_path / "back")
    back = load(tmp_path / "back")[0].state_dict()
    assert back.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in back.items())

    take_back_requests(out, tmp_path / "one", [FORGET[0]["question"]])
    assert len(read_checkpoint(tmp_path / "one").ledger) == 1
    with pytest.raises(CheckpointError, match="stacked in one weight"):
        export_adapter(out, tmp_path / "adapter")


@NEWER
def test_one_request_taken_out_is_the_edit_without_it(base: Path, tmp_path: Path) -> None:
    """On one block, where it is exact: of two requests with the stored keys and residuals, the solve of one."""
    hparams = HPARAMS.replace(layers=(1,), mom2_update_weight=0.1)
    unlearn(str(base), FORGET, retain=RETAIN, hparams=hparams, out=tmp_path / "out")
    edit = read_checkpoint(tmp_path / "out").edit
    take_back_requests(tmp_path / "out", tmp_path / "one", [FORGET[0]["question"]])
    one = read_checkpoint(tmp_path / "one").edit
    assert one.keys[1].shape[1] == edit.keys[1].shape[1] // 2
    s = torch.eye(2) - edit.updates[1].down @ edit.keys[1]
    wanted = edit.updates[1].down[1] - s[1, 0] / s[0, 0] * edit.updates[1].down[0]
    torch.testing.assert_close(one.updates[1].down[0], wanted, rtol=1e-3, atol=1e-5)
    weight = load(tmp_path / "one")[0].model.layers[1].mlp.experts.down_proj
    before = load(base)[0].model.layers[1].mlp.experts.down_proj
    delta = torch.cat(list(weight - before), dim=1)
    torch.testing.assert_close(delta, one.updates[1].matrix(), rtol=1e-3, atol=1e-5)


@NEWER
def test_what_a_mixture_cannot_do_is_refused_before_work(base: Path) -> None:
    model = load(base)[0]
    with pytest.raises(HyperParamsError, match="solves for one matrix, but block 1 is a mixture of experts"):
        settle_layers(model, HPARAMS.replace(solver="of_a_plugin"))
    with pytest.raises(ArchitectureError, match="Block 0 is a mixture of experts"):
        settle_layers(model, HPARAMS.replace(remove=True))
