"""Protected keys: taken where an edit would act, weighed one by one, and reported by how far they move."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from families import DISTINCT, FAMILIES
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import make_solver
from unierase_plugin.locate_then_edit.positions import locate, locate_kept
from unierase_plugin.locate_then_edit.protected import KeptPrompt, ProtectedKeys, moved, moved_figures, protected_keys
from unierase_plugin.locate_then_edit.solve import LowRank
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.models.prompts import encode, render

M, D, N, P = 24, 10, 5, 4
LAYERS = (1, 2)
QUESTION = "Where was Mira Plonk born?"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(seed: int = 1) -> torch.Tensor:
    tokens = random(200, M, seed=seed)
    return tokens.T @ tokens / 200


def solver(name: str, weight: float, kept: torch.Tensor | None, earlier: torch.Tensor | None = None) -> Any:
    hparams = UniEraseHyperParams(
        solver=name,
        retain_key_weight=weight,
        mom2_update_weight=2.0,
        retain_update_weight=3.0,
        L2=0.5,
        nullspace_threshold=0.5,
    )
    return make_solver(hparams, moment(), moment(2), earlier, kept=kept)


# --- the theorems ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 7.0])
@pytest.mark.parametrize("earlier", [None, random(M, 3, seed=9)], ids=["first", "later"])
def test_a_protected_key_counts_as_its_weight_of_it_in_the_moment(weight: float, earlier: torch.Tensor | None) -> None:
    keys, residual, kept = random(M, N), random(D, N, seed=3), random(M, P, seed=4)
    whole = 2 * moment() + 3 * moment(2) + weight * kept @ kept.T
    if earlier is not None:
        whole = whole + earlier @ earlier.T
    got = solver("ridge", weight, kept, earlier).solve(keys, residual).matrix()
    wanted = reference.ridge(keys, residual, whole)
    assert float((got - wanted).norm()) < 1e-8 * float(wanted.norm())
    # Control: without the weight it is another update.
    assert float((solver("ridge", 0.0, kept, earlier).solve(keys, residual).matrix() - wanted).norm()) > 1e-2


def test_protected_keys_join_the_null_spaces_system() -> None:
    keys, residual, kept = random(M, N), random(D, N, seed=3), random(M, P, seed=4)
    got = solver("null_space", 7.0, kept).solve(keys, residual).matrix()
    wanted = reference.null_space(keys, residual, moment() + 3 * moment(2), 0.5, 0.5, math.sqrt(7.0) * kept)
    assert float((got - wanted).norm()) < 1e-8 * float(wanted.norm())


@pytest.mark.parametrize("name", ["ridge", "null_space", "exact"])
def test_an_infinite_weight_leaves_every_protected_output_as_it_was(name: str) -> None:
    keys, residual, kept = random(M, 3), random(D, 3, seed=3), random(M, P, seed=4)
    made = [solver(name, weight, kept).solve(keys, residual).matrix() for weight in (0.0, 1.0, 1e4, 1e12)]
    shares = [float((update @ kept).norm() / kept.norm()) for update in made]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 1e-6 < 1e-3 < shares[0]
    # Control: what is to change still changes.
    assert float((made[-1] @ keys).norm()) > 0.05 * float(residual.norm())


def test_where_a_protected_key_is_that_of_a_request_the_weight_decides() -> None:
    keys, residual = random(M, 1), random(D, 1, seed=3)
    light, heavy = (solver("ridge", weight, keys).solve(keys, residual).matrix() @ keys for weight in (1e-6, 1e6))
    assert float(heavy.norm()) < 1e-4 * float(residual.norm()) < float(light.norm())


# --- the keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", DISTINCT)
def test_keys_are_what_the_projection_reads_at_the_positions_whatever_the_batch(stem: str) -> None:
    arch = find_architecture(FAMILIES[stem]())
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(3, 300, (size,), generator=generator).tolist()) for size in (9, 5, 12)]
    prompts = [
        KeptPrompt(ids[0], range(3, 6), 0),
        KeptPrompt(ids[1], range(4, 5), 1),
        KeptPrompt(ids[2], range(7, 9), 1),
    ]
    for max_tokens in (12, 1000):
        found = protected_keys(arch, prompts, LAYERS, max_tokens=max_tokens, pad_id=0)
        assert found.facts.tolist() == [0, 0, 0, 1, 1, 1]
        for layer in LAYERS:
            wanted = torch.cat([reference.inputs(arch, p.ids, layer)[list(p.positions)] for p in prompts]).T
            assert torch.allclose(found.keys[layer], wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("form", ["chat", "plain", "bare"])
@pytest.mark.parametrize("fact_token", ["subject_last", "last"])
def test_an_edit_would_act_where_an_edit_of_that_fact_does(form: str, fact_token: str) -> None:
    tokenizer = tiny_tokenizer()
    found = locate_kept(tokenizer, QUESTION, "Mira Plonk", form, fact_token)
    assert found == locate(tokenizer, QUESTION, "Mira Plonk", form, fact_token)


@pytest.mark.parametrize("form", ["chat", "plain", "bare"])
def test_without_a_subject_all_of_the_question_is_looked_at(form: str) -> None:
    tokenizer = tiny_tokenizer()
    question = f" {QUESTION} "
    found = locate_kept(tokenizer, question, None, form)
    assert list(found.ids) == encode(tokenizer, render(tokenizer, question, form), form)
    assert tokenizer.decode(found.ids[found.position :]).startswith(QUESTION)


# --- how far they move -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_move_is_the_change_of_the_projections_output_as_a_share_of_it(family: str) -> None:
    """GPT-2 keeps its projections the other way round."""
    arch = find_architecture(tiny_model(family))
    stored = arch.projections[1].weight.detach()
    weight = stored if family == "llama" else stored.T
    keys = random(64, 3).float()
    update = LowRank(random(32, 2, seed=1).float(), random(2, 64, seed=2).float())
    found = moved(arch, {1: update}, ProtectedKeys({1: keys}, torch.zeros(3, dtype=torch.long)))[1]
    wanted = (update.matrix() @ keys).norm(dim=0) / (weight @ keys).norm(dim=0)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_figures_name_the_facts_whose_worst_key_moved_most() -> None:
    by_layer = {3: torch.tensor([0.1, 0.5, 0.2, 0.3]), 4: torch.tensor([0.2, 0.1, 0.9, 0.1])}
    found = moved_figures(by_layer, torch.tensor([0, 1, 2, 2]), lambda fact: f"fact {fact}")
    assert found["keys"] == 4
    assert found["largest"] == pytest.approx({"3": 0.5, "4": 0.9})
    assert found["median"] == pytest.approx({"3": 0.2, "4": 0.1})
    assert [each["fact"] for each in found["worst"]] == ["fact 2", "fact 1", "fact 0"]  # type: ignore[attr-defined]
    assert [each["moved"] for each in found["worst"]] == pytest.approx([0.9, 0.5, 0.2])  # type: ignore[attr-defined]
