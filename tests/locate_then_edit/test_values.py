"""Values Z: optimised together, each is what it would be alone, and what the straight-line optimisation gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import reference
import torch
from families import FAMILIES
from reference import At, Fact
from scarce import Scarce
from torch import Tensor

from unierase_plugin.errors import EditError
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit import values
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.value_loss import ValueTarget
from unierase_plugin.locate_then_edit.values import Values, optimise_values
from unierase_plugin.models.architecture import Architecture, find_architecture

#: Tied; untied; soft caps and sliding windows; scaled embeddings; Conv1D with absolute positions; a head with a bias.
STEMS = ["smollm2-135m", "llama3-8b", "gemma2-9b", "gemma3-1b", "gpt2-xl", "gpt-j-6b"]
TOKEN, PAD = 299, 0
SETTINGS = UniEraseHyperParams(
    layers=(1, 2),
    v_num_grad_steps=5,
    v_lr=0.2,
    kl_factor=0.5,
    v_weight_decay=0.5,
    clamp_norm_factor=1.5,
    v_continuation_weight=0.5,
    v_stop_loss=0.0,
)
#: Of different lengths; with and without contexts, a KL term, a continuation; a fact at the first and the last token.
FACTS = [
    Fact(
        (At((5, 17, 200, 33, 8, 91, 44), 3), At((9, 12, 61, 5, 17, 200, 33, 8, 91, 44), 6)),
        At((17, 200, 33, 71, 72), 2),
        (40, 41, 42, 2),
    ),
    Fact((At((7, 61, 130, 9), 3), At((11, 12, 7, 61, 130, 9), 5), At((13, 7, 61, 130, 9), 4)), None, (45, 2)),
    Fact((At((250, 3, 4, 5), 0),), At((250, 71), 0), ()),
]


@pytest.fixture(scope="module", params=STEMS)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return find_architecture(FAMILIES[request.param]().requires_grad_(False))


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))


def target(fact: Fact, group: str | None = None) -> ValueTarget:
    kl = None if fact.kl_prompt is None else Prompt(*fact.kl_prompt)
    return ValueTarget(tuple(Prompt(*prompt) for prompt in fact.prompts), kl, fact.continuation, group)


def optimise(
    arch: Architecture,
    facts: Sequence[Fact],
    hparams: UniEraseHyperParams = SETTINGS,
    max_tokens: int = 4096,
    groups: Sequence[str | None] = (),
) -> Values:
    targets = [target(fact, group) for fact, group in zip(facts, groups or [None] * len(facts), strict=True)]
    return optimise_values(arch, targets, TOKEN, hparams, max_tokens=max_tokens, pad_id=PAD)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """Within a share of the vectors' own size."""
    assert float((a - b).norm(dim=-1).max()) <= tolerance * float(b.norm(dim=-1).max())


# --- against the straight line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"v_continuation_weight": 0.0, "kl_factor": 0.0}], ids=["all terms", "token alone"]
)
def test_values_are_those_of_the_straight_line(arch: Architecture, changes: dict[str, float]) -> None:
    hparams = SETTINGS.replace(**changes)
    got = optimise(arch, FACTS, hparams)
    for index, fact in enumerate(FACTS):
        z, steps, probability, goals = reference.value(arch, fact, TOKEN, hparams)
        near(got.states[index], z)
        assert int(got.steps[index]) == steps == SETTINGS.v_num_grad_steps
        assert float(got.probability[index]) == pytest.approx(probability, rel=1e-3)
        assert float(got.nll[index]) == pytest.approx(goals[-1], rel=1e-3)
        # Control: the steps led somewhere.
        assert goals[-1] < goals[0] - 0.1
        start = reference.state(arch, fact.prompts[0], hparams.layers[-1])
        assert float(got.relative_norm[index]) == pytest.approx(float((z - start).norm() / start.norm()), rel=1e-3)
        assert float(got.relative_norm[index]) > 0.05


@pytest.mark.parametrize(("layer", "facts"), [(0, FACTS[:2]), (3, FACTS[1:2])])
def test_the_first_and_the_last_block_can_carry_the_value(arch: Architecture, layer: int, facts: list[Fact]) -> None:
    """The last one only if the fact is at the prompt's last token."""
    hparams = SETTINGS.replace(layers=(layer,))
    got = optimise(arch, facts, hparams)
    for index, fact in enumerate(facts):
        near(got.states[index], reference.value(arch, fact, TOKEN, hparams)[0])


@pytest.mark.parametrize("name", ["kl_factor", "v_continuation_weight", "v_weight_decay"])
def test_every_term_of_the_objective_is_felt(llama: Architecture, name: str) -> None:
    """Control for the comparison above: a term left out on both sides would go unseen."""
    strong = optimise(llama, FACTS[:1], SETTINGS.replace(**{name: 20.0})).states
    weak = optimise(llama, FACTS[:1], SETTINGS.replace(**{name: 0.0})).states
    assert float((strong - weak).norm()) > 1e-2 * float(weak.norm())


#: On the tiny Gemma 3, the fact lies outside the one sliding window above block 2.
FAR = Fact((At((250, 3, 4, 5, 6, 7, 8, 9, 10), 0),), At((250, 71), 0), ())


def test_rounding_is_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be gained the gradient is rounding alone, which Adam must not blow up to a full step."""
    arch = find_architecture(FAMILIES["gemma3-1b"]().requires_grad_(False))
    monkeypatch.setattr(values._Batch, "_check_reach", lambda batch, doubtful: None)
    # Its own KL term is at its least.
    got = optimise(arch, [FAR], SETTINGS.replace(v_num_grad_steps=1))
    assert int(got.steps[0]) == 1
    assert float(got.relative_norm[0]) < 0.01 * SETTINGS.v_lr


@pytest.mark.parametrize("max_tokens", [4096, 20])
def test_an_answer_that_does_not_depend_on_its_value_is_an_error(max_tokens: int) -> None:
    """Instead of an empty edit."""
    arch = find_architecture(FAMILIES["gemma3-1b"]().requires_grad_(False))
    with pytest.raises(
        EditError, match=r"requests \[1\] do not depend on the state after block 2.*fact_token to 'last'"
    ):
        optimise(arch, [FACTS[1], FAR, FACTS[2]], max_tokens=max_tokens)
    # Block 2 has full attention, so that an edit of block 1 arrives.
    assert float(optimise(arch, [FAR], SETTINGS.replace(layers=(1,))).relative_norm[0]) > 0.05
    # Of those that share a delta, one that it reaches is enough.
    optimise(arch, [FACTS[1], FAR], groups=["a", "a"], max_tokens=max_tokens)


# --- requests do not see one another ----------------------------------------------------------------------------------


def test_together_is_as_alone(arch: Architecture) -> None:
    together = optimise(arch, FACTS)
    alone = torch.cat([optimise(arch, [fact]).states for fact in FACTS])
    near(together.states, alone, 1e-5)


@pytest.mark.parametrize("max_tokens", [1, 20, 45])
def test_how_requests_are_split_into_batches_does_not_matter(llama: Architecture, max_tokens: int) -> None:
    whole, parts = optimise(llama, FACTS * 2), optimise(llama, FACTS * 2, max_tokens=max_tokens)
    for field in dataclasses.fields(Values):
        torch.testing.assert_close(getattr(whole, field.name), getattr(parts, field.name), rtol=1e-4, atol=1e-5)


def test_a_finished_request_leaves_and_the_others_go_on_as_before(arch: Architecture) -> None:
    base = SETTINGS.replace(v_num_grad_steps=6)
    goals = [reference.value(arch, fact, TOKEN, base)[3] for fact in FACTS]
    # Between the quickest request's third goal and its second, where no other has come yet or not all have.
    quick = min(range(len(FACTS)), key=lambda index: goals[index][2])
    hparams = base.replace(v_stop_loss=(goals[quick][1] + goals[quick][2]) / 2)
    got = optimise(arch, FACTS, hparams)
    assert int(got.steps[quick]) == 2
    assert len(set(got.steps.tolist())) > 1
    for index, fact in enumerate(FACTS):
        z, steps, probability, _ = reference.value(arch, fact, TOKEN, hparams)
        assert int(got.steps[index]) == steps
        near(got.states[index], z)
        assert float(got.probability[index]) == pytest.approx(probability, rel=1e-3)


def test_a_request_that_is_there_already_is_not_moved(llama: Architecture) -> None:
    got = optimise(llama, FACTS, SETTINGS.replace(v_stop_loss=1e3))
    assert not got.steps.any()
    assert not got.relative_norm.any()
    for state, fact in zip(got.states, FACTS, strict=True):
        near(state, reference.state(llama, fact.prompts[0], SETTINGS.layers[-1]), 1e-5)


# --- requests that share a delta --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [4096, 20])
def test_a_group_shares_the_delta_of_the_straight_line(arch: Architecture, max_tokens: int) -> None:
    """Also where the group exceeds the budget, so that its gradient is summed over several problems."""
    groups = ["a", None, "a"]
    got = optimise(arch, FACTS, max_tokens=max_tokens, groups=groups)
    shared, steps, probabilities, goals = reference.shared_values(arch, [FACTS[0], FACTS[2]], TOKEN, SETTINGS)
    for index, z, probability, goal in zip((0, 2), shared, probabilities, goals[-1], strict=True):
        near(got.states[index], z)
        assert int(got.steps[index]) == steps
        assert float(got.probability[index]) == pytest.approx(probability, rel=1e-3)
        assert float(got.nll[index]) == pytest.approx(goal, rel=1e-3)
    near(got.states[1], reference.value(arch, FACTS[1], TOKEN, SETTINGS)[0])
    # Control: alone, each would go elsewhere.
    alone = reference.value(arch, FACTS[0], TOKEN, SETTINGS)[0]
    assert float((alone - shared[0]).norm()) > 1e-2 * float(alone.norm())


def test_a_group_goes_on_until_its_last_member_is_there(llama: Architecture) -> None:
    facts = [FACTS[0], FACTS[2]]
    goals = reference.shared_values(llama, facts, TOKEN, SETTINGS)[3]
    hparams = SETTINGS.replace(v_stop_loss=(max(goals[2]) + max(goals[3])) / 2)
    got = optimise(llama, facts, hparams, groups=["a", "a"])
    assert got.steps.tolist() == [3, 3]
    assert min(goals[2]) < hparams.v_stop_loss, "control: one of them was there before"


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [[None, None, None], ["a", "a", "a"]])
def test_what_the_memory_does_not_hold_is_done_in_halves(
    llama: Architecture, monkeypatch: pytest.MonkeyPatch, groups: list[str | None]
) -> None:
    whole = optimise(llama, FACTS, groups=groups)
    scarce = Scarce(llama.blocks[3], 4, monkeypatch)
    halves = optimise(llama, FACTS, groups=groups)
    assert scarce.refused
    for field in dataclasses.fields(Values):
        torch.testing.assert_close(getattr(whole, field.name), getattr(halves, field.name), rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_between_steps_splits_the_batch(
    llama: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process takes the GPU's memory: the problems at hand are halved, steps and all."""
    whole = optimise(llama, FACTS)
    scarce = Scarce(llama.blocks[3], 100, monkeypatch)

    def shrink(share: float) -> None:
        scarce.rows = 3 if share > 0.3 else 100

    targets = [target(fact) for fact in FACTS]
    got = optimise_values(llama, targets, TOKEN, SETTINGS, max_tokens=4096, pad_id=PAD, progress=shrink)
    assert scarce.refused
    near(got.states, whole.states, 1e-5)


def test_a_request_that_no_memory_holds_is_an_error(llama: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    Scarce(llama.blocks[3], 0, monkeypatch)
    with pytest.raises(EditError, match="single sequence"):
        optimise(llama, FACTS)


# --- the clamp --------------------------------------------------------------------------------------------------------


def test_the_clamp_is_kept_and_reached(arch: Architecture) -> None:
    bold = SETTINGS.replace(v_lr=0.5, clamp_norm_factor=0.3)
    got = optimise(arch, FACTS, bold)
    # In front of a norm, delta is as long as the change of the state to first order.
    slack = 0.15 if hasattr(arch.blocks[0], "post_feedforward_layernorm") else 1e-5
    assert float(got.relative_norm.max()) == pytest.approx(0.3, rel=slack)
    for index, fact in enumerate(FACTS):
        near(got.states[index], reference.value(arch, fact, TOKEN, bold)[0])
    # Control: without the clamp they go farther.
    assert float(optimise(arch, FACTS, bold.replace(clamp_norm_factor=100.0)).relative_norm.min()) > 0.3


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_the_model_is_untouched_and_no_parameter_has_a_gradient() -> None:
    """Even where the caller left the parameters trainable."""
    arch = find_architecture(FAMILIES["llama3-8b"]())
    before = {name: value.clone() for name, value in arch.model.state_dict().items()}
    assert all(parameter.requires_grad for parameter in arch.model.parameters())
    frozen = find_architecture(FAMILIES["llama3-8b"]().requires_grad_(False))
    near(optimise(arch, FACTS).states, optimise(frozen, FACTS).states, 1e-6)
    assert all(parameter.grad is None for parameter in arch.model.parameters())
    after = arch.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_progress_rises_from_nothing_to_one(llama: Architecture) -> None:
    seen: list[float] = []
    targets = [target(fact) for fact in FACTS]
    optimise_values(llama, targets, TOKEN, SETTINGS, max_tokens=20, pad_id=PAD, progress=seen.append)
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1]
    assert seen[-1] == pytest.approx(1.0)


def test_a_request_that_becomes_nan_is_named_and_no_other() -> None:
    arch: Any = find_architecture(FAMILIES["llama3-8b"]().requires_grad_(False))
    with torch.no_grad():
        arch.embedding.weight[130] = torch.nan
    with pytest.raises(EditError, match=r"requests \[1\] became NaN"):
        optimise(arch, FACTS)


def test_nan_weights_name_every_request() -> None:
    arch = find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))
    with torch.no_grad():
        arch.projections[3].weight.fill_(torch.nan)
    with pytest.raises(EditError, match=r"requests \[0, 1, 2\] became NaN"):
        optimise(arch, FACTS)
