"""Losses of unlearning: each against a computation position by position, and what must hold at its limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unierase_plugin.methods.finetuning import losses

N, V, B = 7, 11, 3
ROWS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
#: Counts of the rows above.
LENGTHS = torch.tensor([2, 3, 2])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, TEACHER = drawn(N, V), drawn(N, V, seed=1)
WANTED = torch.tensor([3, 0, 10, 5, 5, 2, 7])
POLICY, REFERENCE, OTHER, OTHER_REFERENCE = (-drawn(B, seed=seed).abs() for seed in (2, 3, 4, 5))


def probabilities(logits: Tensor) -> list[list[float]]:
    return [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits.tolist()]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_(True)
    return torch.autograd.grad(loss(leaf), leaf)[0]


# --- against a straight line ------------------------------------------------------------------------------------------


def test_likelihoods_add_up_by_sequence() -> None:
    logs = [math.log(row[token]) for row, token in zip(probabilities(LOGITS), WANTED.tolist(), strict=True)]
    wanted = [sum(log for log, row in zip(logs, ROWS.tolist(), strict=True) if row == which) for which in range(B)]
    assert losses.log_likelihoods(LOGITS, WANTED, ROWS, B).tolist() == pytest.approx(wanted)
    assert losses.descent(LOGITS, WANTED).item() == pytest.approx(-sum(logs) / N)
    assert losses.ascent(LOGITS, WANTED).item() == pytest.approx(sum(logs) / N)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.5])
def test_npo(beta: float) -> None:
    """2/beta E log(1 + (pi/pi_ref)^beta)."""
    ratios = [math.exp(p - r) for p, r in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True)]
    wanted = 2 / beta * sum(math.log(1 + ratio**beta) for ratio in ratios) / B
    assert losses.npo(POLICY, REFERENCE, beta).item() == pytest.approx(wanted)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_simnpo(margin: float) -> None:
    means = [p / n for p, n in zip(POLICY.tolist(), LENGTHS.tolist(), strict=True)]
    wanted = 2 / 2.5 * sum(softplus(2.5 * mean + margin) for mean in means) / B
    assert losses.simnpo(POLICY, LENGTHS, 2.5, margin).item() == pytest.approx(wanted)


def test_dpo() -> None:
    gaps = [
        (w - wr) - (p - r)
        for w, wr, p, r in zip(
            OTHER.tolist(), OTHER_REFERENCE.tolist(), POLICY.tolist(), REFERENCE.tolist(), strict=True
        )
    ]
    wanted = 2 / 0.3 * sum(softplus(-0.3 * gap) for gap in gaps) / B
    assert losses.dpo(OTHER, OTHER_REFERENCE, POLICY, REFERENCE, 0.3).item() == pytest.approx(wanted)


def test_answer_preservation() -> None:
    wanted = 1 / 0.3 * sum(softplus(-0.3 * (a - d)) for a, d in zip(POLICY.tolist(), OTHER.tolist(), strict=True)) / B
    assert losses.answer_preservation(POLICY, OTHER, 0.3).item() == pytest.approx(wanted)


def test_maximum_entropy() -> None:
    wanted = sum(sum(math.log(1 / V / p) / V for p in row) for row in probabilities(LOGITS)) / N
    assert losses.to_uniform(LOGITS).item() == pytest.approx(wanted)


def test_kl() -> None:
    pairs = zip(probabilities(LOGITS), probabilities(TEACHER), strict=True)
    wanted = sum(sum(q * math.log(q / p) for p, q in zip(now, before, strict=True)) for now, before in pairs) / N
    assert losses.divergence(LOGITS, TEACHER).item() == pytest.approx(wanted)


def test_self_distillation() -> None:
    lowered = TEACHER.clone()
    for row, token in enumerate(WANTED.tolist()):
        lowered[row, token] -= 10
    pairs = zip(probabilities(LOGITS), probabilities(lowered), strict=True)
    wanted = sum(sum(-q * math.log(p) for p, q in zip(now, goal, strict=True)) for now, goal in pairs) / N
    assert losses.self_distillation(LOGITS, TEACHER, WANTED, 10.0).item() == pytest.approx(wanted)


def test_distance_of_states_weighs_sequences_alike() -> None:
    """Not positions: a long text counts as much as a short one."""
    single = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / V
        for x, y in zip(LOGITS.tolist(), TEACHER.tolist(), strict=True)
    ]
    wanted = (sum(single[:2]) / 2 + sum(single[2:5]) / 3 + sum(single[5:]) / 2) / 3
    assert losses.state_distance(LOGITS, TEACHER, ROWS, B).item() == pytest.approx(wanted, rel=1e-5)
    one = losses.state_distance(LOGITS, TEACHER[0], ROWS, B)
    assert one.item() == pytest.approx(losses.state_distance(LOGITS, TEACHER[:1].expand(N, V), ROWS, B).item())


# --- limits -----------------------------------------------------------------------------------------------------------


def test_npo_is_gradient_ascent_where_it_begins_and_for_a_small_beta() -> None:
    ascent = torch.full((B,), 1 / B, dtype=torch.float64)
    assert torch.allclose(gradient(lambda p: losses.npo(p, REFERENCE, 5.0), REFERENCE), ascent)
    assert torch.allclose(gradient(lambda p: losses.npo(p, REFERENCE, 1e-9), POLICY), ascent)
    assert not torch.allclose(gradient(lambda p: losses.npo(p, REFERENCE, 1.0), POLICY), ascent)


def test_npo_lets_go_of_what_is_forgotten() -> None:
    assert gradient(lambda p: losses.npo(p, REFERENCE, 0.5), REFERENCE - 200).abs().max() < 1e-40


def test_preference_at_the_reference_is_two_log_two_by_beta() -> None:
    assert losses.npo(REFERENCE, REFERENCE, 0.1).item() == pytest.approx(20 * math.log(2))
    at_reference = losses.dpo(OTHER_REFERENCE, OTHER_REFERENCE, REFERENCE, REFERENCE, 2.0)
    assert at_reference.item() == pytest.approx(math.log(2))


def test_dpo_without_a_move_of_the_declined_answer_is_npo() -> None:
    half = losses.dpo(OTHER_REFERENCE, OTHER_REFERENCE, POLICY, REFERENCE, 0.7)
    assert half.item() == pytest.approx(losses.npo(POLICY, REFERENCE, 0.7).item())


def test_maximum_entropy_rests_at_uniform_alone() -> None:
    flat = torch.full((N, V), 3.0, dtype=torch.float64)
    assert losses.to_uniform(flat).item() == pytest.approx(0, abs=1e-6)
    assert gradient(losses.to_uniform, flat).abs().max() < 1e-7
    pull = gradient(losses.to_uniform, LOGITS)
    assert torch.allclose(pull, (LOGITS.softmax(-1) - 1 / V) / N, atol=1e-7)


def test_kl_and_its_pull_are_zero_on_the_unchanged_model() -> None:
    assert losses.divergence(TEACHER, TEACHER).item() == pytest.approx(0, abs=1e-7)
    assert gradient(lambda x: losses.divergence(x, TEACHER), TEACHER).abs().max() < 1e-7
    assert losses.divergence(LOGITS, TEACHER) > 0.1


def test_self_distillation_without_strength_rests_at_the_teacher_and_takes_the_token_away_with_it() -> None:
    assert gradient(lambda x: losses.self_distillation(x, TEACHER, WANTED, 0.0), TEACHER).abs().max() < 1e-7
    pull = gradient(lambda x: losses.self_distillation(x, TEACHER, WANTED, 10.0), TEACHER)
    assert bool((pull.gather(1, WANTED[:, None]) > 0).all())
    assert torch.allclose(pull.sum(1), torch.zeros(N, dtype=torch.float64), atol=1e-7)


def test_teachers_are_left_as_they_are() -> None:
    before = TEACHER.clone()
    losses.self_distillation(LOGITS, TEACHER, WANTED, 10.0)
    assert torch.equal(TEACHER, before)
