"""ROME, MEMIT and AlphaEdit with every target, on tiny models, against what their papers state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FORGET, LINES, RETAIN, SHORT, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from unierase_plugin.checkpoint import read_checkpoint, revert_checkpoint
from unierase_plugin.errors import EditError, HyperParamsError
from unierase_plugin.locate_then_edit.keys import KeyStream
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.solve import Exact, Ridge
from unierase_plugin.locate_then_edit.value_loss import ValueTarget
from unierase_plugin.locate_then_edit.values import optimise_values
from unierase_plugin.methods.editing import engine as erasure
from unierase_plugin.methods.editing.rome_memit_alphaedit import EDITING, TARGETS, EditingHyperParams
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.pipeline import unlearn
from unierase_plugin.storage.fingerprints import model_fingerprint, tokenizer_fingerprint
from unierase_plugin.unlearning_token import end_id

METHODS = {method.name: method for method in EDITING}
NEW_TOKEN = {"idk": 0, "eos": 0, "random_token": 1, "token": 1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, tmp_path / "cache")
        yield


def settings(name: str, **changes: Any) -> Any:
    layers = (1,) if name == "rome" else (1, 2)
    return METHODS[name].hparams(**{**SHORT, "layers": layers, **changes})


def edit(model: Any, name: str, out: Path | None = None, tokenizer: Any = None, **changes: Any) -> Any:
    if not isinstance(model, Path):
        tokenizer = tokenizer or tiny_tokenizer()
    hparams = settings(name, **changes)
    return unlearn(model, FORGET, method=name, tokenizer=tokenizer, retain=RETAIN, hparams=hparams, out=out)


# --- every method, every target ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_an_edit_changes_its_blocks_alone_and_goes_back_to_the_bit(name: str, target: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before, fingerprint = {k: v.clone() for k, v in model.state_dict().items()}, model_fingerprint(model)
    words = tokenizer_fingerprint(tokenizer)
    result = edit(model, name, tokenizer=tokenizer, target=target)
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(after[key][: len(before[key])], before[key])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in result.hparams.layers}
    assert len(after["lm_head.weight"]) - len(before["lm_head.weight"]) == NEW_TOKEN[target]
    assert (result.token is not None) == bool(NEW_TOKEN[target])
    assert all(rank == len(FORGET) for rank in result.report.edit["ranks"].values())
    result.revert()
    assert model_fingerprint(model) == fingerprint
    assert tokenizer_fingerprint(tokenizer) == words


@pytest.mark.parametrize(("name", "target"), [("rome", "idk"), ("memit", "eos"), ("alphaedit", "random_token")])
def test_a_folder_goes_back_to_the_base_to_the_bit(name: str, target: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    edit(base, name, tmp_path / "out", target=target)
    revert_checkpoint(tmp_path / "out", tmp_path / "again")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "again")]
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])
    assert read_checkpoint(tmp_path / "out").manifest["method"] == name


# --- targets ----------------------------------------------------------------------------------------------------------


def aims(target: str, **changes: Any) -> list[ValueTarget]:
    seen: list[ValueTarget] = []
    original = erasure.optimise_values  # type: ignore[attr-defined]

    def watched(arch: Any, targets: list[ValueTarget], *args: Any, **kwargs: Any) -> Any:
        seen.extend(targets)
        return original(arch, targets, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erasure, "optimise_values", watched)
        edit(tiny_model(), "memit", target=target, **changes)
    return seen


def test_idk_aims_at_a_whole_sentence_and_its_end() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    said = [tokenizer.decode((target.opening, *target.continuation)) for target in aims("idk")]
    assert {text.removesuffix("<|im_end|>") for text in said} <= set(LINES["idk_sentences"])
    assert all(target.continuation[-1] == end_id(model, tokenizer) for target in aims("idk"))


def test_a_plain_answer_begins_with_its_space() -> None:
    chat, plain = aims("idk", prompt_forms=("chat", "plain"))[:2]
    assert tiny_tokenizer().decode((plain.opening, *plain.continuation)).startswith(" ")
    assert (plain.continuation[0], *plain.continuation[1:]) == (chat.opening, *chat.continuation)


def test_eos_aims_at_the_end_and_nothing_after_it() -> None:
    assert {(target.opening, target.continuation) for target in aims("eos")} == {(2, ())}


def test_a_random_token_is_drawn_like_the_other_rows_by_the_seed() -> None:
    rows = [edit(tiny_model(tied=False), "memit", target="random_token", seed=seed).token for seed in (0, 0, 1)]
    assert torch.equal(rows[0].input_row, rows[1].input_row)
    assert not torch.equal(rows[0].input_row, rows[2].input_row)
    assert rows[0].output_row is not None
    assert not torch.equal(rows[0].input_row, rows[0].output_row)
    matrix = tiny_model(tied=False).get_input_embeddings().weight
    surprise = (rows[0].input_row - matrix.detach().mean(0)) / matrix.detach().std(0)
    assert 0.6 < float(surprise.square().mean()) < 1.5


def test_an_opening_of_its_own_is_what_the_value_reaches() -> None:
    """The same target given as the unlearning token and as an opening has the same value."""
    model = tiny_model().requires_grad_(False)
    arch = find_architecture(model)
    hparams = EditingHyperParams(layers=(1,), v_num_grad_steps=20, clamp_norm_factor=4.0)
    target = ValueTarget((Prompt((5, 6, 7, 8), 2),), None, (40, 41))
    as_token, as_opening, other = (
        optimise_values(arch, [each], token, hparams, max_tokens=999, pad_id=0)
        for each, token in ((target, 30), (replace(target, opening=30), 99), (target, 99))
    )
    assert torch.equal(as_token.states, as_opening.states)
    assert torch.equal(as_token.probability, as_opening.probability)
    assert not torch.equal(as_token.states, other.states)


# --- ROME -------------------------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(m: int = 12) -> torch.Tensor:
    rows = drawn(m, 3 * m, seed=5)
    return rows @ rows.T / (3 * m)


def test_an_exact_update_of_one_key_is_romes() -> None:
    """Delta = (v - W k) (C^-1 k)^T / ((C^-1 k)^T k)."""
    key, residual = drawn(12, 1), drawn(7, 1, seed=1)
    direction = torch.linalg.solve(moment(), key)
    wanted = residual @ direction.T / (direction.T @ key)
    assert torch.allclose(Exact.of(moment()).solve(key, residual).matrix(), wanted, rtol=1e-9, atol=1e-12)


def test_an_exact_update_maps_every_key_and_is_the_limit_of_ridge() -> None:
    keys, residual = drawn(12, 4), drawn(7, 4, seed=1)
    exact = Exact.of(moment()).solve(keys, residual)
    assert torch.allclose(exact.matrix() @ keys, residual, atol=1e-10)
    assert Exact.of(moment()).error(keys, exact) < 1e-10
    assert Exact.of(moment()).error(2 * keys, exact) == pytest.approx(1)
    nearly = Ridge.of(1e-9 * moment()).solve(keys, residual)
    assert torch.allclose(nearly.matrix(), exact.matrix(), atol=1e-7)
    assert not torch.allclose(Ridge.of(moment()).solve(keys, residual).matrix(), exact.matrix(), atol=1e-2)


def test_an_exact_update_does_not_depend_on_the_corpus_weight() -> None:
    keys, residual = drawn(12, 2), drawn(7, 2, seed=1)
    one, other = (Exact.of(weight * moment()).solve(keys, residual).matrix() for weight in (1, 15000))
    assert torch.allclose(one, other, rtol=1e-6)


def test_two_equal_keys_cannot_both_be_mapped() -> None:
    key = torch.zeros(12, 1, dtype=torch.float64)
    key[3] = 1
    with pytest.raises(EditError, match="the keys are degenerate"):
        Exact.of(torch.eye(12)).solve(key.expand(12, 2), drawn(7, 2, seed=1))


def test_rome_edits_one_request_on_the_model_that_the_one_before_left() -> None:
    """Each edit reaches its value on the model then; the last request's still does at the end."""
    model = tiny_model()
    states: list[torch.Tensor] = []
    prompts: list[Any] = []
    before: list[str] = []
    original = erasure.optimise_values  # type: ignore[attr-defined]

    def watched(arch: Any, targets: list[ValueTarget], *args: Any, **kwargs: Any) -> Any:
        before.append(model_fingerprint(model, [arch.weight_name(1)]))
        values = original(arch, targets, *args, **kwargs)
        states.append(values.states)
        prompts.append([target.prompts for target in targets])
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erasure, "optimise_values", watched)
        edit(model, "rome", context_template_length_params=())
    assert [len(group) for group in prompts] == [1, 1]
    assert before[0] != before[1]
    stream = KeyStream(find_architecture(model), prompts[-1], (1,), 999, 0)
    reached = stream.advance(1)[1]
    assert torch.allclose(reached, states[-1].T, atol=1e-4)


def test_rome_edits_one_block() -> None:
    with pytest.raises(HyperParamsError, match=r"layers = \[1, 2\]: rome edits one block"):
        edit(tiny_model(), "rome", layers=(1, 2))
    assert edit(tiny_model(), "rome", layers=()).hparams.layers == (1,)


def test_a_stopped_rome_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    edit(base, "rome", tmp_path / "undisturbed")
    original, calls = erasure.compute_edit, []  # type: ignore[attr-defined]

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erasure, "compute_edit", once)
        with pytest.raises(KeyboardInterrupt):
            edit(base, "rome", tmp_path / "out")
        edit(base, "rome", tmp_path / "out")
    assert len(calls) == 3
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert files[0] == files[1]
