"""Blocks that put a norm or a multiplier after the projection: they are found, and edits reach their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from families import CHANGING, DISTINCT, FAMILIES, HIDDEN, VOCABULARY
from reference import At
from scarce import Scarce
from torch import Tensor

from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit import edit as editing
from unierase_plugin.locate_then_edit.edit import WeightEdit, apply_edit, compute_edit, expected_norm_ratio, make_solver
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.reach import nearest, vectors_for
from unierase_plugin.locate_then_edit.value_loss import ValueTarget
from unierase_plugin.locate_then_edit.values import Values, optimise_values
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.models.response import Response, changes_on_the_way
from unierase_plugin.models.trace import pad, run_blocks

LAYERS = (1, 2)
RIDGE = UniEraseHyperParams(layers=LAYERS, solver="ridge", mom2_update_weight=1e-4)
NULL = UniEraseHyperParams(layers=LAYERS, solver="null_space", nullspace_threshold=0.3, L2=100.0)
#: One context each, so that a key is what the prompt itself gives.
PROMPTS = [(At((5, 17, 200, 33, 8, 91, 44), 3),), (At((7, 61, 130, 9), 3),), (At((250, 3, 4, 5, 6), 1),)]
#: Families with a single RMS norm after the projection, and its name in a block.
NORMS = {"gemma2": "post_feedforward_layernorm", "olmo2": "post_feedforward_layernorm", "glm4": "post_mlp_layernorm"}
PLAIN = [stem for stem in DISTINCT if FAMILIES[stem] not in CHANGING.values()]


def made(build: Callable[[], Any]) -> Architecture:
    return find_architecture(build().requires_grad_(False))


@pytest.fixture(params=CHANGING)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return made(CHANGING[request.param])


@pytest.fixture
def llama() -> Architecture:
    return made(FAMILIES["smollm2-135m"])


def wanted_of(arch: Architecture, size: float, layers: tuple[int, ...] = LAYERS) -> Tensor:
    """Z (d, n): the states moved by a share of their norm in random directions."""
    start = reference.states(arch, PROMPTS, layers[-1])
    way = torch.randn(start.shape, generator=torch.Generator().manual_seed(7))
    return start + size * way / way.norm(dim=0) * start.norm(dim=0)


def compute(arch: Architecture, wanted: Tensor, hparams: UniEraseHyperParams = RIDGE) -> WeightEdit:
    corpus = torch.randint(3, VOCABULARY, (20, 20), generator=torch.Generator().manual_seed(5)).tolist()
    solvers = {
        layer: make_solver(hparams, reference.second_moment(arch, corpus, layer)[0].float(), None)
        for layer in hparams.layers
    }
    figures = {field.name: torch.ones(wanted.shape[1]) for field in dataclasses.fields(Values)}
    steps = torch.ones(wanted.shape[1], dtype=torch.long)
    values = Values(**{**figures, "states": wanted.T.contiguous(), "steps": steps})
    packed = [[Prompt(*prompt) for prompt in contexts] for contexts in PROMPTS]
    return compute_edit(arch, packed, values, solvers, max_tokens=4096, pad_id=0)


def left(arch: Architecture, edit: WeightEdit, wanted: Tensor, layer: int = LAYERS[-1]) -> Tensor:
    """By request: the share of the residual that remains in the edited model, from a plain forward pass."""
    before = (wanted - reference.states(arch, PROMPTS, layer)).norm(dim=0)
    applied = apply_edit(arch, edit)
    after = (wanted - reference.states(arch, PROMPTS, layer)).norm(dim=0)
    applied.restore()
    return after / before


def projection_outputs(arch: Architecture, layer: int) -> Tensor:
    """(n, d): what the MLP output projection of a block gives at the facts."""
    weight, bias = arch.projections[layer].weight, arch.projections[layer].bias
    outputs: Tensor = reference.keys(arch, PROMPTS, layer).T @ weight.T
    return outputs if bias is None else outputs + bias


def response(arch: Architecture, layer: int) -> Response:
    batch = pad([prompt.ids[: prompt.position + 1] for (prompt,) in PROMPTS], 0, "left", arch.device)
    below = run_blocks(arch, batch, last=layer - 1).hidden if layer else None
    return Response(arch, layer, batch, below, -1)


# --- which blocks they are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_or_a_multiplier_is_seen(arch: Architecture, dtype: torch.dtype) -> None:
    arch.model.to(dtype)
    assert changes_on_the_way(arch, (0, 1, 3)) == {0, 1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stem", PLAIN)
def test_a_block_that_adds_the_output_as_it_is_is_seen(stem: str, dtype: torch.dtype) -> None:
    arch = made(FAMILIES[stem])
    arch.model.to(dtype)
    assert not changes_on_the_way(arch, (0, 1, 3))


def test_a_multiplier_of_one_changes_nothing() -> None:
    """It is the block that is asked, not its class."""
    arch = made(CHANGING["granite"])
    arch.blocks[1].residual_multiplier = 1.0  # type: ignore[assignment]
    assert changes_on_the_way(arch, (0, 1, 2)) == {0, 2}


# --- the vector for a wanted output -----------------------------------------------------------------------------------


def closest(norm: Any, present: Tensor, change: Tensor) -> tuple[Tensor, float]:
    """(v, |N(y + v) - N(y) - r|) of the nearest output of y -> g y / rms(y), from the condition of Lagrange.

    Of all x with |x|^2 = d, G x is nearest to t if (G^2 + mu I) x = G t. mu is found by bisection in float64.
    """
    with torch.no_grad():
        gain = norm(torch.ones_like(present)).double()
        y, target = present.double(), (norm(present) + change).double()
    size = len(y)

    def point(mu: float) -> Tensor:
        return gain * target / (gain.square() + mu)

    low, high = -float(gain.square().min()) + 1e-12, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(point(middle).square().sum()) > size else (low, middle)
    x = point(high)
    vector = (x @ y / size) * x - y
    return vector.float(), float((gain * x - target).norm())


@pytest.mark.parametrize("size", [0.05, 0.2])
@pytest.mark.parametrize("name", NORMS)
def test_a_vector_leads_to_the_nearest_output_of_a_norm(name: str, size: float) -> None:
    arch = made(CHANGING[name])
    asked = response(arch, 1)
    start, outputs = asked(asked.zeros()), projection_outputs(arch, 1)
    way = torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
    change = size * way / way.norm(dim=1, keepdim=True) * start.norm(dim=1, keepdim=True)
    found = nearest(asked, change)
    missing = (start + change - asked(found)).norm(dim=1)
    for row in range(len(PROMPTS)):
        vector, least = closest(getattr(arch.blocks[1], NORMS[name]), outputs[row], change[row])
        assert float(missing[row]) == pytest.approx(least, abs=0.03 * float(change[row].norm()))
        # About the shortest: a norm gives the same output for many vectors.
        assert float(found[row].norm()) < 1.5 * float(vector.norm())
        assert float(missing[row]) < 0.9 * float(change[row].norm()), "control: it leads somewhere"


@pytest.mark.parametrize("name", NORMS)
def test_an_output_that_the_norm_can_make_is_made(name: str) -> None:
    arch = made(CHANGING[name])
    asked = response(arch, 1)
    nothing = asked.zeros()
    start = asked(nothing)
    other = asked(0.3 * torch.randn(nothing.shape, generator=torch.Generator().manual_seed(3)))
    found = nearest(asked, other - start)
    assert float((asked(found) - other).norm()) < 2e-3 * float((other - start).norm())


@pytest.mark.parametrize(("name", "multiplier"), [("granite", 0.22), ("minicpm3", None)])
def test_a_vector_makes_up_for_a_multiplier(name: str, multiplier: float | None) -> None:
    arch = made(CHANGING[name])
    factor = multiplier or float(arch.blocks[0].residual_scale)  # type: ignore[arg-type]
    change = torch.randn(HIDDEN, len(PROMPTS), generator=torch.Generator().manual_seed(4))
    asked = response(arch, 0)
    found = vectors_for([(torch.tensor([2, 0]), asked.select(torch.tensor([2, 0])))], change)
    torch.testing.assert_close(found[:, [0, 2]], change[:, [0, 2]] / factor, rtol=1e-3, atol=1e-3)
    assert not found[:, 1].any(), "of which nothing was asked"


def test_a_vector_for_nan_is_nan_and_no_other(llama: Architecture) -> None:
    change = torch.ones(len(PROMPTS), HIDDEN)
    change[1, 3] = torch.nan
    found = nearest(response(llama, 1), change)
    assert torch.isfinite(found).all(1).tolist() == [True, False, True]


def test_what_the_memory_does_not_hold_is_found_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = made(CHANGING["gemma2"])
    change = 0.1 * torch.randn(HIDDEN, len(PROMPTS), generator=torch.Generator().manual_seed(4))
    rows, asked = torch.arange(len(PROMPTS)), response(arch, 1)
    whole = vectors_for([(rows, asked)], change)
    scarce = Scarce(arch.blocks[1], 2, monkeypatch)
    assert float((vectors_for([(rows, asked)], change) - whole).norm()) < 2e-3 * float(whole.norm())
    assert scarce.refused


# --- the edit ---------------------------------------------------------------------------------------------------------


def test_the_values_are_reached(arch: Architecture) -> None:
    wanted = wanted_of(arch, 0.1)
    edit = compute(arch, wanted)
    remains = left(arch, edit, wanted)
    assert float(remains.max()) < 0.01
    # And the edit says so itself.
    start = reference.states(arch, PROMPTS, LAYERS[-1])
    before = float((wanted - start).norm(dim=0).mean())
    after = float((remains * (wanted - start).norm(dim=0)).mean())
    assert edit.residual_norms[0] == pytest.approx(before, rel=1e-4)
    assert edit.residual_norms[-1] == pytest.approx(after, abs=1e-3 * before)
    assert {edit.rank(layer) for layer in LAYERS} == {len(PROMPTS)}, "sweeps add nothing to the rank"


@pytest.mark.parametrize("layers", [(2,), (1, 2)])
@pytest.mark.parametrize("name", ["gemma2", "olmo2", "glm4", "granite"])
def test_far_values_are_reached_too(name: str, layers: tuple[int, ...]) -> None:
    """They are made in front of the norm, so the block can make them, alone or with those below it."""
    arch = made(CHANGING[name])
    targets = [ValueTarget(tuple(Prompt(*prompt) for prompt in contexts), None, ()) for contexts in PROMPTS]
    hparams = RIDGE.replace(layers=layers, v_lr=0.5, v_num_grad_steps=6, v_stop_loss=0.0, clamp_norm_factor=2.0)
    values = optimise_values(arch, targets, VOCABULARY - 1, hparams, max_tokens=4096, pad_id=0)
    assert float(values.relative_norm.max()) > 0.5, "control: they are far"
    wanted = values.states.T.contiguous()
    assert float(left(arch, compute(arch, wanted, hparams), wanted, layers[-1]).max()) < 0.01


def test_the_sweeps_are_what_reaches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the last block alone cannot make every output."""
    arch = made(CHANGING["olmo2"])
    wanted = wanted_of(arch, 0.1)
    monkeypatch.setattr(editing, "SWEEPS", 1)
    assert float(left(arch, compute(arch, wanted), wanted).max()) > 0.05


def test_an_output_that_also_depends_on_earlier_tokens_is_reached(llama: Architecture) -> None:
    """As with a short convolution after the MLP. The update acts at every token, the vector at one."""
    mlp: Any = llama.blocks[2].mlp
    mlp.register_forward_hook(
        lambda module, args, output: 0.8 * output + 0.4 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]
    )
    arch = find_architecture(llama.model)
    assert changes_on_the_way(arch, LAYERS) == {2}
    wanted = wanted_of(arch, 0.1)
    assert float(left(arch, compute(arch, wanted), wanted).max()) < 0.01


@pytest.mark.parametrize("hparams", [RIDGE.replace(mom2_update_weight=30.0), NULL], ids=["ridge", "null_space"])
@pytest.mark.parametrize("stem", ["smollm2-135m", "gpt2-xl"])
def test_on_a_plain_model_vectors_and_sweeps_change_nothing(
    stem: str, hparams: UniEraseHyperParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They make up for the block's own map alone, and leave the solver's trade-off as it is."""
    arch = made(FAMILIES[stem])
    wanted = wanted_of(arch, 0.3)
    plain = compute(arch, wanted, hparams)
    monkeypatch.setattr(editing, "changes_on_the_way", lambda arch, layers: frozenset(layers))
    monkeypatch.setattr(editing, "MISSED", 0.0)
    forced = compute(arch, wanted, hparams)
    assert plain.residual_norms[-1] > 0.1 * plain.residual_norms[0], "control: the solver holds much back"
    for layer in LAYERS:
        one, other = plain.updates[layer].matrix(), forced.updates[layer].matrix()
        assert float((one - other).norm()) < 3e-3 * float(one.norm())


@pytest.mark.parametrize("name", ["granite", "gemma2", "olmo2", "glm4"])
def test_a_solver_that_holds_back_does_so_as_on_a_plain_model(name: str) -> None:
    """The output moves by R K^T (M + K K^T)^{-1} k, or to the nearest output that the norm can make."""
    arch = made(CHANGING[name])
    wanted, start = wanted_of(arch, 0.1, (1,)), reference.states(arch, PROMPTS, 1)
    corpus = torch.randint(3, VOCABULARY, (20, 20), generator=torch.Generator().manual_seed(5)).tolist()
    moment = reference.lifted(30.0 * reference.second_moment(arch, corpus, 1)[0].double(), 0.0)
    keys = reference.keys(arch, PROMPTS, 1).double()
    asked = (reference.ridge(keys, wanted - start, moment) @ keys).float()
    assert float(asked.norm()) < 0.8 * float((wanted - start).norm()), "control: it holds much back"
    applied = apply_edit(arch, compute(arch, wanted, RIDGE.replace(layers=(1,), mom2_update_weight=30.0)))
    missing = (start + asked - reference.states(arch, PROMPTS, 1)).norm(dim=0)
    applied.restore()
    outputs = projection_outputs(arch, 1)
    for row in range(len(PROMPTS)):
        norm = getattr(arch.blocks[1], NORMS[name]) if name in NORMS else None
        least = closest(norm, outputs[row], asked[:, row])[1] if norm else 0.0
        assert float(missing[row]) == pytest.approx(least, abs=0.04 * float(asked[:, row].norm()))


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_the_weights_scale_does_not_matter_in_front_of_a_norm(name: str) -> None:
    """It changes nothing in the model. So the update is larger by the same factor, and reaches as far."""
    arch, factor = made(CHANGING[name]), 8.0
    wanted = wanted_of(arch, 0.1)
    one = compute(arch, wanted)
    with torch.no_grad():
        for projection in arch.projections:
            projection.weight.mul_(factor)
    other = compute(arch, wanted)
    assert float(left(arch, other, wanted).max()) < 0.01
    for layer in LAYERS:
        assert other.norm_ratios[layer] == pytest.approx(one.norm_ratios[layer], rel=0.02)
        assert other.updates[layer].norm() == pytest.approx(factor * one.updates[layer].norm(), rel=0.02)


# --- the size expected of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(None, None, None), ("a", None, "a")], ids=["apart", "shared"])
@pytest.mark.parametrize("name", ["granite", "gemma2", "exaone4"])
def test_the_size_expected_is_about_that_of_an_edit(name: str, groups: tuple[str | None, ...]) -> None:
    """It would be off by the block's gain otherwise: 4.5 on Granite."""
    arch = made(CHANGING[name])
    start, reach = reference.states(arch, PROMPTS, LAYERS[-1]), 0.2
    ways = torch.linalg.qr(torch.randn(start.shape, generator=torch.Generator().manual_seed(3))).Q
    length = start.norm(dim=0)
    if groups[0] is not None:
        ways[:, 2] = ways[:, 0]
        length[[0, 2]] = length[[0, 2]].mean()
    edit = compute(arch, start + reach * ways * length)
    corpus = torch.randint(3, VOCABULARY, (20, 20), generator=torch.Generator().manual_seed(5)).tolist()
    solvers = {
        layer: make_solver(RIDGE, reference.second_moment(arch, corpus, layer)[0].float(), None) for layer in LAYERS
    }
    packed = [[Prompt(*prompt) for prompt in contexts] for contexts in PROMPTS]
    got = expected_norm_ratio(arch, packed, groups, solvers, reach, max_tokens=4096, pad_id=0)
    ratios = torch.tensor([edit.norm_ratios[layer] for layer in LAYERS])
    assert got == pytest.approx(float(ratios.square().mean().sqrt()), rel=0.35)
