"""The edit: computed without a trace, applied and taken back to the bit, and the straight-line one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import reference
import torch
from families import FAMILIES, HIDDEN, VOCABULARY, WIDTH
from reference import At
from torch import Tensor

from unierase_plugin.errors import EditError, PluginError
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import WeightEdit, apply_edit, compute_edit, expected_norm_ratio, make_solver
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.solve import JITTERS, LowRank, Ridge
from unierase_plugin.locate_then_edit.values import Values
from unierase_plugin.models.architecture import Architecture, find_architecture, stores_input_first
from unierase_plugin.models.weights import restored

STEMS = ["smollm2-135m", "gemma2-9b", "gpt2-xl"]
#: Those that add the projection's output as it is. For the others, see test_reach.
PLAIN = ["smollm2-135m", "gpt2-xl"]
LAYERS = (0, 1, 2)
#: lambda is small, since random keys of a tiny model share most of their directions with its corpus.
RIDGE = UniEraseHyperParams(layers=LAYERS, solver="ridge", mom2_update_weight=0.05)
NULL = UniEraseHyperParams(layers=LAYERS, solver="null_space", nullspace_threshold=0.3, L2=0.01)
PROMPTS = [
    (At((5, 17, 200, 33, 8, 91, 44), 3), At((9, 12, 61, 5, 17, 200, 33, 8, 91, 44), 6)),
    (At((7, 61, 130, 9), 3),),
    (At((250, 3, 4, 5, 6), 1), At((1, 250, 3, 4, 5), 2)),
]


def corpus(tokens: int = 400) -> list[list[int]]:
    ids = torch.randint(3, VOCABULARY, (tokens // 20, 20), generator=torch.Generator().manual_seed(5))
    return ids.tolist()


@pytest.fixture(params=STEMS)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return find_architecture(FAMILIES[request.param]().requires_grad_(False))


@pytest.fixture(params=PLAIN)
def plain(request: pytest.FixtureRequest) -> Architecture:
    return find_architecture(FAMILIES[request.param]().requires_grad_(False))


@pytest.fixture
def llama() -> Architecture:
    return find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))


def moments_of(arch: Architecture) -> dict[int, Tensor]:
    return {layer: reference.second_moment(arch, corpus(), layer)[0].float() for layer in LAYERS}


def wanted_of(arch: Architecture, size: float = 0.3) -> Tensor:
    """Z (d, n): the states moved by a share of their norm in random directions."""
    start = reference.states(arch, PROMPTS, LAYERS[-1])
    way = torch.randn(start.shape, generator=torch.Generator().manual_seed(7))
    return start + size * way / way.norm(dim=0) * start.norm(dim=0)


def values_of(wanted: Tensor) -> Values:
    """What an edit reads of values is z alone."""
    figures = {field.name: torch.ones(wanted.shape[1]) for field in dataclasses.fields(Values)}
    steps = torch.ones(wanted.shape[1], dtype=torch.long)
    return Values(**{**figures, "states": wanted.T.contiguous(), "steps": steps})


def compute(
    arch: Architecture,
    wanted: Tensor,
    moments: Mapping[int, Tensor],
    hparams: UniEraseHyperParams = RIDGE,
    earlier: Mapping[int, Tensor] | None = None,
    prompts: Sequence[Sequence[At]] = PROMPTS,
) -> WeightEdit:
    solvers = {
        layer: make_solver(hparams, moments[layer], None, None if earlier is None else earlier[layer])
        for layer in hparams.layers
    }
    packed = [[Prompt(*prompt) for prompt in contexts] for contexts in prompts]
    return compute_edit(arch, packed, values_of(wanted), solvers, max_tokens=4096, pad_id=0)


def snapshot(arch: Architecture) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in arch.model.state_dict().items()}


def changed(arch: Architecture, before: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in arch.model.state_dict().items() if not torch.equal(before[name], value)}


def weight_names(arch: Architecture) -> set[str]:
    return {arch.weight_name(layer) for layer in LAYERS}


# --- the size expected of an edit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hparams", [RIDGE, NULL], ids=["ridge", "null_space"])
@pytest.mark.parametrize("groups", [(None, None, None), ("a", None, "a")], ids=["apart", "shared"])
def test_the_size_expected_is_that_of_an_edit_whose_deltas_are_unrelated(
    plain: Architecture, hparams: UniEraseHyperParams, groups: tuple[str | None, ...]
) -> None:
    """One block, and deltas of the length named at right angles to one another; those of a group the same."""
    hparams, reach = hparams.replace(layers=(1,)), 0.7
    moments, start = moments_of(plain), reference.states(plain, PROMPTS, 1)
    ways = torch.linalg.qr(torch.randn(start.shape, generator=torch.Generator().manual_seed(3))).Q
    length = start.norm(dim=0)
    if groups[0] == groups[2] == "a":
        ways[:, 2] = ways[:, 0]
        length[[0, 2]] = length[[0, 2]].mean()
    edit = compute(plain, start + reach * ways * length, moments, hparams)
    packed = [[Prompt(*prompt) for prompt in contexts] for contexts in PROMPTS]
    solvers = {1: make_solver(hparams, moments[1], None)}
    got = expected_norm_ratio(plain, packed, groups, solvers, reach, max_tokens=4096, pad_id=0)
    assert got == pytest.approx(edit.norm_ratios[1], rel=1e-3)
    # Control: it is no constant.
    assert expected_norm_ratio(plain, packed, groups, solvers, 2 * reach, max_tokens=99, pad_id=0) == pytest.approx(
        2 * got
    )


# --- the edit is the reference's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hparams", [RIDGE, NULL], ids=["ridge", "null_space"])
def test_every_update_is_the_references(plain: Architecture, hparams: UniEraseHyperParams) -> None:
    moments, wanted = moments_of(plain), wanted_of(plain)
    slow = copy.deepcopy(plain)
    deltas = reference.edit(slow, PROMPTS, wanted, moments, hparams, JITTERS[0])
    edit = compute(plain, wanted, moments, hparams)
    assert edit.layers == LAYERS
    for layer in LAYERS:
        assert edit.updates[layer].up.shape == (HIDDEN, len(PROMPTS))
        assert edit.updates[layer].down.shape == (len(PROMPTS), WIDTH)
        assert edit.rank(layer) == len(PROMPTS)
        error = edit.updates[layer].matrix().double() - deltas[layer]
        assert float(error.norm()) < 2e-3 * float(deltas[layer].norm())
        size = float(plain.projections[layer].weight.norm())
        assert edit.norm_ratios[layer] == pytest.approx(float(deltas[layer].norm()) / size, rel=2e-3)
    apply_edit(plain, edit)
    for name in weight_names(plain):
        fast = plain.model.get_parameter(name)
        torch.testing.assert_close(fast, slow.model.get_parameter(name), rtol=2e-3, atol=2e-3)


def test_updates_lie_as_their_weights_do(arch: Architecture) -> None:
    """Delta is (out, in); Conv1D stores (in, out)."""
    edit, before = compute(arch, wanted_of(arch), moments_of(arch)), snapshot(arch)
    apply_edit(arch, edit)
    for layer in LAYERS:
        difference = arch.projections[layer].weight - before[arch.weight_name(layer)]
        delta = edit.updates[layer].matrix()
        turned = delta.T if stores_input_first(arch.projections[layer]) else delta
        torch.testing.assert_close(difference, turned, rtol=1e-4, atol=1e-6)


def test_conv1d_is_among_the_models() -> None:
    """Control for the above."""
    assert stores_input_first(find_architecture(FAMILIES["gpt2-xl"]()).projections[0])


def test_keys_are_kept_for_later_edits(arch: Architecture) -> None:
    edit = compute(arch, wanted_of(arch), moments_of(arch))
    torch.testing.assert_close(edit.keys[0], reference.keys(arch, PROMPTS, 0), rtol=1e-4, atol=1e-4)
    assert {layer: tuple(keys.shape) for layer, keys in edit.keys.items()} == dict.fromkeys(LAYERS, (WIDTH, 3))


# --- it reaches the values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hparams", [RIDGE, NULL], ids=["ridge", "null_space"])
def test_the_residual_falls_at_every_block(arch: Architecture, hparams: UniEraseHyperParams) -> None:
    edit = compute(arch, wanted_of(arch, 0.1), moments_of(arch), hparams)
    norms = edit.residual_norms
    assert len(norms) == len(LAYERS) + 1
    assert list(norms) == sorted(norms, reverse=True)
    assert len(set(norms)) == len(norms)


def test_the_state_at_the_fact_is_then_near_z(arch: Architecture) -> None:
    """And as near as the edit says it is. One context each, so that a key is what the prompt itself gives."""
    bare = [contexts[:1] for contexts in PROMPTS]
    start, wanted = reference.states(arch, bare, LAYERS[-1]), wanted_of(arch, 0.1)
    tight = RIDGE.replace(mom2_update_weight=1e-4)
    edit = compute(arch, wanted, moments_of(arch), tight, prompts=bare)
    apply_edit(arch, edit)
    left = (wanted - reference.states(arch, bare, LAYERS[-1])).norm(dim=0)
    assert edit.residual_norms[0] == pytest.approx(float((wanted - start).norm(dim=0).mean()), rel=1e-4)
    assert edit.residual_norms[-1] == pytest.approx(float(left.mean()), rel=1e-2, abs=1e-3)
    assert float(left.mean()) < 0.01 * edit.residual_norms[0]


# --- earlier edits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hparams", [RIDGE, NULL], ids=["ridge", "null_space"])
def test_earlier_keys_move_less_the_more_they_weigh(llama: Architecture, hparams: UniEraseHyperParams) -> None:
    earlier = torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(11))
    keys, residual = reference.keys(llama, PROMPTS, 1), torch.ones(HIDDEN, len(PROMPTS))
    moment = moments_of(llama)[1]
    moved = []
    for weight in (None, 0.3, 1.0, 10.0, 1000.0):
        solver = make_solver(hparams, moment, None, None if weight is None else weight * earlier)
        moved.append(float((solver.solve(keys, residual).matrix() @ earlier.double()).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-3 * moved[0]


def test_a_retain_moment_protects_the_retained_keys(llama: Architecture) -> None:
    kept = torch.randn(WIDTH, 5, generator=torch.Generator().manual_seed(12)).double()
    keys, residual = reference.keys(llama, PROMPTS, 1), torch.ones(HIDDEN, len(PROMPTS))
    moment, retain = moments_of(llama)[1], (kept @ kept.T / 5).float()
    moved = []
    for weight in (0.0, 1.0, 100.0):
        solver = make_solver(RIDGE.replace(retain_update_weight=weight), moment, retain)
        moved.append(float((solver.solve(keys, residual).matrix() @ kept).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.1 * moved[0]


def test_a_second_edit_that_knows_the_first_undoes_less_of_it(llama: Architecture) -> None:
    first, second = PROMPTS[:1], PROMPTS[1:]
    moments, wanted = moments_of(llama), wanted_of(llama)
    tight = RIDGE.replace(mom2_update_weight=1e-3)
    edit = compute(llama, wanted[:, :1], moments, tight, prompts=first)
    apply_edit(llama, edit)
    reached = reference.states(llama, first, LAYERS[-1])
    drift = []
    for earlier in (None, {layer: 30 * keys for layer, keys in edit.keys.items()}):
        later = compute(llama, wanted[:, 1:], moments, tight, earlier, second)
        applied = apply_edit(llama, later)
        drift.append(float((reference.states(llama, first, LAYERS[-1]) - reached).norm()))
        applied.restore()
    assert drift[1] < 0.5 * drift[0]


# --- no trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_leaves_the_model_as_it_was(arch: Architecture, dtype: torch.dtype) -> None:
    arch.model.to(dtype)
    moments, wanted, before = moments_of(arch), wanted_of(arch), snapshot(arch)
    compute(arch, wanted, moments)
    assert not changed(arch, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_changes_the_edited_weights_alone_and_revert_takes_it_back(
    arch: Architecture, dtype: torch.dtype
) -> None:
    edit = compute(arch, wanted_of(arch), moments_of(arch))
    arch.model.to(dtype)
    before = snapshot(arch)
    applied = apply_edit(arch, edit)
    assert changed(arch, before) == weight_names(arch)
    assert all(arch.projections[layer].weight.dtype == dtype for layer in LAYERS)
    applied.restore()
    assert not changed(arch, before)


def test_two_edits_taken_back_in_turn_leave_nothing(llama: Architecture) -> None:
    before, moments = snapshot(llama), moments_of(llama)
    first = apply_edit(llama, compute(llama, wanted_of(llama), moments))
    between = snapshot(llama)
    second = apply_edit(llama, compute(llama, wanted_of(llama, 0.5), moments))
    second.restore()
    assert not changed(llama, between)
    first.restore()
    assert not changed(llama, before)


def test_an_edit_read_back_gives_the_same_bytes(llama: Architecture) -> None:
    """The factors are float32, so nothing is lost by writing them down."""
    edit = compute(llama, wanted_of(llama), moments_of(llama))
    assert all(u.up.dtype == u.down.dtype == torch.float32 for u in edit.updates.values())
    applied = apply_edit(llama, edit)
    once = snapshot(llama)
    applied.restore()
    again = WeightEdit({layer: LowRank(u.up.clone(), u.down.clone()) for layer, u in edit.updates.items()})
    apply_edit(llama, again)
    assert not changed(llama, once)


def test_an_exception_on_the_way_leaves_the_model_as_it_was(llama: Architecture) -> None:
    before = snapshot(llama)

    def stop(share: float) -> None:
        assert changed(llama, before)  # control: the model is being edited at this moment
        raise RuntimeError("on purpose")

    values = values_of(wanted_of(llama))
    solvers = {layer: make_solver(RIDGE, moment, None) for layer, moment in moments_of(llama).items()}
    packed = [[Prompt(*prompt) for prompt in contexts] for contexts in PROMPTS]
    with pytest.raises(RuntimeError, match="on purpose"):
        compute_edit(llama, packed, values, solvers, max_tokens=4096, pad_id=0, progress=stop)
    assert not changed(llama, before)


def test_restored_undoes_whatever_was_done(llama: Architecture) -> None:
    before = snapshot(llama)
    with restored(llama.projections[layer].weight for layer in LAYERS):
        llama.projections[1].weight.fill_(torch.nan)
        assert changed(llama, before)
    assert not changed(llama, before)


def test_values_of_nan_are_refused_and_nothing_is_changed(llama: Architecture) -> None:
    moments, wanted, before = moments_of(llama), wanted_of(llama), snapshot(llama)
    wanted[0, 1] = torch.nan
    with pytest.raises(EditError, match="block 0 holds NaN"):
        compute(llama, wanted, moments)
    assert not changed(llama, before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda up, down: None, "A solver gave None. It must give a LowRank"),
        (lambda up, down: up @ down, "It must give a LowRank"),
        (lambda up, down: LowRank(down.T, up.T), r"They must be \(32, n\) and \(n, 64\)"),
        (lambda up, down: LowRank(up, down[:, 1:]), r"They must be \(32, n\) and \(n, 64\)"),
    ],
)
def test_a_solver_that_gives_no_update_is_refused(llama: Architecture, given: Any, said: str) -> None:
    """A plugin may bring a solver. Its fault shall be named, and the model stay as it was."""

    class Odd(Ridge):
        def solve(self, keys: Tensor, residual: Tensor) -> Any:
            right = super().solve(keys, residual)
            return given(right.up, right.down)

    packed = [[Prompt(*prompt) for prompt in contexts] for contexts in PROMPTS]
    solvers, before = {0: Odd.of(moments_of(llama)[0])}, snapshot(llama)
    with pytest.raises(PluginError, match=said):
        compute_edit(llama, packed, values_of(wanted_of(llama)), solvers, max_tokens=4096, pad_id=0)
    assert not changed(llama, before)


def test_a_solver_that_protects_by_giving_nothing_is_refused() -> None:
    class Odd(Ridge):
        def protecting(self, keys: Tensor) -> Any:
            return None

    moment = torch.eye(4)
    with pytest.raises(PluginError, match="`protecting` of the solver 'ridge' gave None"):
        make_solver(RIDGE, moment, None, torch.ones(4, 1), solvers={"ridge": lambda system: Odd.of(system.corpus)})


@pytest.mark.parametrize("broken", ["nan", "shape"])
def test_an_edit_that_fails_half_way_changes_nothing(llama: Architecture, broken: str) -> None:
    edit, before = compute(llama, wanted_of(llama), moments_of(llama)), snapshot(llama)
    up, down = edit.updates[2].up, edit.updates[2].down
    bad = LowRank(up * torch.nan, down) if broken == "nan" else LowRank(up, down[:, 1:])
    with pytest.raises((EditError, RuntimeError)):
        apply_edit(llama, WeightEdit({**edit.updates, 2: bad}))
    assert not changed(llama, before)
