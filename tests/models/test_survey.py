"""Every decoder that transformers maps is edited exactly, or is refused before any work with the true reason.

The families that people use most are looked at in every run of the tests, all others with `-m slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import NOT_BUILT, RELEASES, decoders, tiny_decoder, wrappers
from survey import LEFT, Found, check_folder, check_keys, survey
from torch import Tensor
from transformers import CONFIG_MAPPING

from unierase_plugin.locate_then_edit.solve import LowRank, Ridge
from unierase_plugin.models.architecture import find_architecture

MOST_USED = (
    *("llama", "mistral", "ministral3", "mistral3", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("qwen3_next", "qwen3_5", "qwen2_5_vl", "qwen3_vl", "gemma", "gemma2", "gemma3_text", "gemma4_text"),
    *("phi", "phi3", "phimoe", "gpt2", "gptj", "gpt_neox", "gpt_oss", "opt", "bloom", "falcon", "falcon_h1"),
    *("olmo", "olmo2", "olmo3", "olmoe", "granite-3", "granitemoe", "granitemoehybrid", "glm", "glm4", "glm4_moe"),
    *("deepseek_v2", "deepseek_v3", "minimax_m2", "cohere", "cohere2", "starcoder2", "stablelm", "smollm3", "exaone4"),
    *("ernie4_5", "ernie4_5_moe", "nemotron", "nemotron_h", "lfm2", "lfm2_moe", "bamba", "jamba"),
    *("recurrent_gemma", "llama4_text", "llava", "internvl"),
)
#: Refused, with a part of the reason.
REFUSED = {
    "gemma3n_text": "several streams for each token",
    "deepseek_v4": "several streams for each token",
    "hy_v4": "several streams for each token",
    "cpmant": "looks at later tokens",
    # Its attention's values would look like an MLP's output.
    "git": "No MLP output projection was found",
}


#: A fact whose token goes only to experts without a matrix cannot be moved there (docs/explanation/method.md).
PARTLY = ("longcat_flash",)


def looked_at(kind: str, folder: Path) -> Found:
    if RELEASES.get(kind, (kind,))[0] not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    return survey(tiny_decoder(kind), folder)


@pytest.mark.parametrize("kind", MOST_USED)
def test_a_family_that_people_use_is_edited_exactly(kind: str, tmp_path: Path) -> None:
    found = looked_at(kind, tmp_path)
    assert (found.outcome, found.reason) == ("works", "")
    assert found.left is not None
    assert found.left <= LEFT


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_edited_is_refused_with_the_true_reason(kind: str, tmp_path: Path) -> None:
    found = looked_at(kind, tmp_path)
    assert found.outcome == "refused"
    assert REFUSED[kind] in found.reason
    assert not found.reason.startswith("late")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", sorted({*decoders(), *wrappers(), *RELEASES} - {*MOST_USED, *REFUSED, *PARTLY, *NOT_BUILT}), ids=str
)
def test_no_family_is_wrong(kind: str, tmp_path: Path) -> None:
    try:
        tiny_decoder(kind)
    except Exception as error:
        pytest.skip(f"not built: {error}")
    found = looked_at(kind, tmp_path)
    assert found.outcome in ("works", "refused"), found.reason
    assert not found.reason.startswith("late")


# --- the survey itself can fail ---------------------------------------------------------------------------------------


def test_a_wrong_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = find_architecture(tiny_decoder("llama").requires_grad_(False))
    monkeypatch.setattr("survey.reference.keys", lambda *args: torch.zeros(64, 3))
    with pytest.raises(AssertionError):
        check_keys(arch)


def test_an_edit_that_stops_half_way_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    solve = Ridge.solve

    def half(self: Ridge, keys: Tensor, residual: Tensor) -> LowRank:
        found = solve(self, keys, residual)
        return LowRank(found.up / 2, found.down)

    monkeypatch.setattr(Ridge, "solve", half)
    found = survey(tiny_decoder("llama"), tmp_path)
    assert (found.outcome, found.reason) == ("wrong", "the edit does not reach its values")
    assert found.left is not None
    assert found.left > LEFT


def test_a_folder_that_says_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_decoder("llama")
    other: Any = tiny_decoder("mistral")
    monkeypatch.setattr("survey.load", lambda folder: (other, None))
    with pytest.raises(AssertionError):
        check_folder(model, tmp_path)
