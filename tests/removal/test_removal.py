"""A removal's parts on tiny models: teacher, passes and factors against formulas written in a straight line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from families import DISTINCT, FAMILIES
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from unierase_plugin.errors import EditError, HyperParamsError, RequestError
from unierase_plugin.facts.request import NO_ANSWER, ForgetRequest
from unierase_plugin.hparams import RemovalSettings, UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import apply_edit
from unierase_plugin.methods.removal.job import settle_removal
from unierase_plugin.models.architecture import Architecture, find_architecture, stores_input_first
from unierase_plugin.models.trace import pad, run_blocks
from unierase_plugin.removal import course, distil, stage
from unierase_plugin.removal import teacher as teacher_module
from unierase_plugin.removal.course import TEXT_SHARE, Course, Planning
from unierase_plugin.removal.data import make_data, shuffled_words
from unierase_plugin.removal.distil import (
    LEAST,
    MOST,
    Lesson,
    chosen_fraction,
    direction,
    divergence,
    factorised,
    gradients,
    lessons,
    linear_rate,
    openings,
    read_in_pass,
    searched,
    take_pass,
)
from unierase_plugin.removal.factors import truncated
from unierase_plugin.removal.fisher import output_moments
from unierase_plugin.removal.moments import Moments, RemovalData, answer_positions, take_moments, weighed
from unierase_plugin.removal.stage import Removal, remove
from unierase_plugin.removal.teacher import (
    FIRST_STRENGTH,
    NEAR_ENOUGH,
    STRENGTHS,
    Teacher,
    _next_strength,
    ask,
    calibrated,
    filtered,
    filtered_weights,
    logits_at,
    mean_probability,
    read_weight,
    replaced,
)
from unierase_plugin.statistics.second_moment import second_moments
from unierase_plugin.storage.phases import Phases

#: Of unlike lengths, so that a batch is padded; token ids that every tiny model has.
FORGET = ((5, 60, 70, 8, 9, 100, 33), (12, 13, 90), (44, 45, 46, 47, 48, 49, 50, 51, 52))
STARTS = (4, 2, 3)
KEPT = ((7, 61, 71, 18, 19), (22, 23, 24, 25))
KEPT_STARTS = (3, 2)
DATA = RemovalData(
    FORGET,
    STARTS,
    KEPT,
    KEPT_STARTS,
    text=tuple(tuple(range(start, start + 20)) for start in range(100, 220, 15)),
    words=((9, 70, 5, 100), (90, 13, 60)),
)
#: The numbers of all forgotten facts.
ALL = range(len(FORGET))
RUN: dict[str, Any] = {"max_tokens": 16, "pad_id": 0}


def random_moment(size: int, rank: int, seed: int) -> Tensor:
    keys = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return keys.T @ keys / rank


def shift(arch: Architecture, layers: tuple[int, ...], size: float = 0.02) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {layer: size * torch.randn(read_weight(arch, layer).shape, generator=generator) for layer in layers}


def teacher_of(arch: Architecture, layers: tuple[int, ...] = (0, 1, 2)) -> Teacher:
    """Some other model's answers: this one's with its weights changed at random."""
    weights = {layer: read_weight(arch, layer) + each for layer, each in shift(arch, layers, 0.2).items()}
    with replaced(arch, weights):
        return ask(arch, FORGET, STARTS, **RUN)


def straight_loss(arch: Architecture, taught: list[Lesson]) -> Tensor:
    """One sequence at a time, all logits."""
    total = torch.zeros(())
    for each in taught:
        logs = reference.log_probabilities(arch, each.ids)
        for index, (place, weight) in enumerate(zip(each.positions, each.weights, strict=True)):
            if each.log_probs is None:
                total = total - weight * logs[place, each.ids[place + 1]]
            else:
                said = each.log_probs[index].float()
                total = total + weight * (said.exp() * (said - logs[place])).sum()
    return total


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [8, 1000])
def test_only_the_positions_named_count(max_tokens: int) -> None:
    arch = find_architecture(tiny_model())
    places = ((3, 4, 5), (1,), (0, 7))
    found = second_moments(arch, FORGET, [1, 2], max_tokens=max_tokens, counted=places)
    assert found.count == 6
    for layer in (1, 2):
        keys = torch.cat([reference.inputs(arch, ids, layer)[list(at)] for ids, at in zip(FORGET, places, strict=True)])
        torch.testing.assert_close(found.moments[layer], keys.T @ keys / 6)


def test_each_moment_is_of_its_own_texts() -> None:
    arch = find_architecture(tiny_model())
    found = take_moments(arch, DATA, [0, 2], [2, 0], max_tokens=64, pad_id=0)
    for part, texts in ((found.kept, KEPT), (found.text, DATA.text), (found.words, DATA.words)):
        assert part is not None
        wanted, count = reference.second_moment(arch, texts, 2)
        assert part.count == count
        torch.testing.assert_close(part.moments[2], wanted.float(), atol=1e-5, rtol=1e-4)
    # The forgotten answers' from the prompt's last token on, the last token of all left out; of the facts named alone.
    keys = torch.cat([reference.inputs(arch, FORGET[row], 2)[STARTS[row] - 1 : -1] for row in (0, 2)])
    assert found.forgotten is not None
    torch.testing.assert_close(found.forgotten.moments[2], keys.T @ keys / len(keys))
    assert take_moments(arch, DATA, [0], [], max_tokens=64, pad_id=0).forgotten is None
    assert weighed([(4.0, None), (2.0, found.text)], [0])[0].equal(2 * found.text.moments[0])


@pytest.mark.parametrize("stem", DISTINCT)
def test_output_moments_are_those_of_one_sequence_at_a_time(stem: str) -> None:
    """With the same draws, whatever the batches, and with parameters' gradients or without."""
    model = FAMILIES[stem]()
    arch = find_architecture(model)
    texts, layers, seed = (*KEPT, *DATA.text[:2]), (1, 3), 5
    places = ((2, 3), (1, 2), tuple(range(19)), (0, 7))
    wanted, drawn = straight_output_moments(arch, texts, places, layers, seed)
    other, redrawn = straight_output_moments(arch, texts, places, layers, seed + 1)
    assert drawn != redrawn
    model.requires_grad_(False)
    for max_tokens in (8, 25, 1000):
        found = output_moments(arch, texts, places, layers, seed=seed, max_tokens=max_tokens, pad_id=0)
        assert found.keys() == set(layers)
        for layer in layers:
            scale = float(wanted[layer].diagonal().mean())
            torch.testing.assert_close(found[layer] / scale, wanted[layer] / scale, atol=2e-4, rtol=1e-3)
            assert not torch.allclose(found[layer] / scale, other[layer] / scale, atol=1e-2)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("max_tokens", [8, 25])
def test_output_moments_do_not_depend_on_the_batches(max_tokens: int) -> None:
    arch = find_architecture(tiny_model())
    arch.model.requires_grad_(False)
    texts = (*KEPT, *DATA.text)
    places = [tuple(range(len(ids) - 1)) for ids in texts]
    found, whole = (
        output_moments(arch, texts, places, (0, 2), seed=0, max_tokens=most, pad_id=0) for most in (max_tokens, 1000)
    )
    for layer, moment in whole.items():
        scale = float(moment.diagonal().mean())
        torch.testing.assert_close(found[layer] / scale, moment / scale, atol=1e-5, rtol=1e-5)


def straight_output_moments(
    arch: Architecture, texts: Any, places: Any, layers: tuple[int, ...], seed: int
) -> tuple[dict[int, Tensor], list[list[int]]]:
    """Gradients at the outputs by whole backward passes, summed position by position; and the tokens drawn."""
    total: dict[int, Any] = dict.fromkeys(layers, 0)
    drawn = []
    for row, (ids, at) in enumerate(zip(texts, places, strict=True)):
        outputs: dict[int, Tensor] = {}

        def keep(layer: int, output: Tensor, outputs: dict[int, Tensor] = outputs) -> None:
            output.retain_grad()
            outputs[layer] = output

        handles = [
            arch.projections[layer].register_forward_hook(lambda m, a, output, layer=layer: keep(layer, output))
            for layer in layers
        ]
        logs = reference.log_probabilities(arch, ids)[list(at)]
        for handle in handles:
            handle.remove()
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + row)
        words = torch.multinomial(logs.detach().exp(), 1, generator=generator)[:, 0].tolist()
        drawn.append(words)
        (-sum((logs[index, word] for index, word in enumerate(words)), torch.zeros(()))).backward()
        for layer in layers:
            gradient = outputs[layer].grad
            assert gradient is not None
            for each in gradient.reshape(len(ids), -1):
                total[layer] = total[layer] + torch.outer(each, each)
    arch.model.zero_grad(set_to_none=True)
    return {layer: each / sum(map(len, places)) for layer, each in total.items()}, drawn


# --- teacher ---------------------------------------------------------------------------------------------------------


def test_the_filter_is_the_dense_formula() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f, r = random_moment(12, 4, 1), random_moment(12, 9, 2)
    a = 6 * r + f
    a = a + 1e-6 * a.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(filtered(weight, f, r, 6.0), weight @ (torch.eye(12).double() - f @ torch.inverse(a)))


def test_the_filter_is_the_best_compromise() -> None:
    """Of E_F |W'k|^2 + lambda E_R |W'k - Wk|^2 + epsilon |W' - W|^2 it is where the gradient is zero."""
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f, r = random_moment(12, 4, 1), random_moment(12, 9, 2)
    epsilon = 1e-6 * (6 * r + f).diagonal().mean()
    new = filtered(weight, f, r, 6.0)
    slope = new @ f + 6 * (new - weight) @ r + epsilon * (new - weight)
    assert slope.norm() < 1e-9 * (weight @ f).norm()


def test_what_only_kept_text_uses_passes_the_filter_and_what_only_answers_use_does_not() -> None:
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    answers, kept, shared = turn[:, :4], turn[:, 4:9], turn[:, 9:]
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = answers @ random_moment(4, 8, 1) @ answers.T + shared @ shared.T
    r = kept @ random_moment(5, 8, 2) @ kept.T + shared @ shared.T
    new = filtered(weight, f, r, 6.0)
    torch.testing.assert_close(new @ kept, weight @ kept, atol=1e-12, rtol=1e-12)
    assert (new @ answers).norm() < 1e-3 * (weight @ answers).norm()
    # What both use is shared by weight: lambda / (lambda + 1).
    torch.testing.assert_close(new @ shared, weight @ shared * 6 / 7, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_teacher_is_asked_with_its_weights_and_the_models_come_back_to_the_bit(family: str) -> None:
    arch = find_architecture(tiny_model(family))
    before = [each.weight.detach().clone() for each in arch.projections]
    found = take_moments(arch, DATA, [0, 1, 2], ALL, max_tokens=64, pad_id=0)
    assert found.forgotten is not None
    weights = filtered_weights(arch, [0, 1], found.forgotten.moments, found.text.moments, 6.0)
    plain = ask(arch, FORGET, STARTS, **RUN)
    with replaced(arch, weights):
        for layer in (0, 1):
            weight = arch.projections[layer].weight
            assert torch.equal(weight.T if stores_input_first(arch.projections[layer]) else weight, weights[layer])
        teacher = ask(arch, FORGET, STARTS, **RUN)
        for ids, at, said in zip(FORGET, teacher.positions, teacher.log_probs, strict=True):
            assert said.dtype == torch.float16
            assert at == tuple(range(at[0], len(ids) - 1))
            wanted = reference.log_probabilities(arch, ids)[list(at)].detach()
            torch.testing.assert_close(said.float(), wanted, atol=1e-2, rtol=1e-3)
    assert all(torch.equal(each.weight, weight) for each, weight in zip(arch.projections, before, strict=True))
    assert not torch.allclose(plain.log_probs[0].float(), teacher.log_probs[0].float(), atol=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_half_precise_model_has_logits_of_a_float32_head(family: str) -> None:
    changes: dict[str, Any] = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    arch = find_architecture(tiny_model(family, dtype=torch.bfloat16, **changes))
    rows, columns = torch.tensor([0, 0]), torch.tensor([2, 4])
    batch = pad([FORGET[0]], 0, "right", arch.device)
    with torch.no_grad():
        trace = run_blocks(arch, batch, head_at=(rows, columns))
        wanted = trace.head_inputs.float() @ arch.head.weight.float().T
        found = logits_at(arch, [FORGET[0]], [(2, 4)], 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 2 * (wanted / 2).tanh() if changes else wanted)
    assert not torch.equal(found, trace.logits.float())


def test_an_error_with_the_teacher_in_place_leaves_the_model_as_it_was() -> None:
    arch = find_architecture(tiny_model())
    before = arch.projections[1].weight.detach().clone()
    with pytest.raises(ZeroDivisionError), replaced(arch, {1: torch.zeros_like(before)}):
        1 / 0  # noqa: B018
    assert torch.equal(arch.projections[1].weight, before)


@pytest.fixture(scope="module")
def knowing() -> Architecture:
    """A model that has learned the facts by heart."""
    model = tiny_model()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        torch.stack([model(ids, labels=ids).loss for ids in (torch.tensor([each]) for each in FORGET)]).sum().backward()
        optimiser.step()
    optimiser.zero_grad()
    model.requires_grad_(False)
    return find_architecture(model)


def straight_probability(arch: Architecture, rows: Sequence[int] = ALL) -> float:
    """Mean over facts of the geometric mean of their answers' probabilities."""
    found = []
    for row in rows:
        ids, start = FORGET[row], STARTS[row]
        logs = reference.log_probabilities(arch, ids).detach()
        found.append(float(torch.stack([logs[at - 1, ids[at]] for at in range(start, len(ids))]).mean().exp()))
    return sum(found) / len(found)


def with_strength(arch: Architecture, moments: Moments, strength: float, rows: Sequence[int] = ALL) -> float:
    assert moments.forgotten is not None
    weights = filtered_weights(arch, [0, 1], moments.forgotten.moments, moments.text.moments, strength)
    with replaced(arch, weights):
        return straight_probability(arch, rows)


def calibrate(
    arch: Architecture, moments: Moments, probability: float, **settings: Any
) -> tuple[float, tuple[Tensor, ...]]:
    assert moments.forgotten is not None
    spots = [tuple(range(start - 1, len(ids) - 1)) for ids, start in zip(FORGET, STARTS, strict=True)]
    found = moments.forgotten.moments, moments.text.moments
    return calibrated(arch, [0, 1], *found, FORGET, spots, probability, **RUN, **settings)


@pytest.mark.parametrize("strength", [0.05, 1.0, 5.0, 8.0, 40.0])
def test_the_strength_is_found_that_leaves_the_probability_wanted(knowing: Architecture, strength: float) -> None:
    before = [each.weight.detach().clone() for each in knowing.projections]
    moments = take_moments(knowing, DATA, [0, 1], ALL, max_tokens=64, pad_id=0)
    wanted = with_strength(knowing, moments, strength)

    def distance(tried: float) -> float:
        return abs(math.log(with_strength(knowing, moments, tried) / wanted))

    found, said = calibrate(knowing, moments, wanted)
    assert distance(found) <= distance(FIRST_STRENGTH) + 1e-2
    assert distance(found) < NEAR_ENOUGH + 1e-2
    assert all(torch.equal(each.weight, weight) for each, weight in zip(knowing.projections, before, strict=True))
    # What is said is what the model with that strength says.
    assert moments.forgotten is not None
    with replaced(knowing, filtered_weights(knowing, [0, 1], moments.forgotten.moments, moments.text.moments, found)):
        for ids, start, each in zip(FORGET, STARTS, said, strict=True):
            logs = reference.log_probabilities(knowing, ids)[start - 1 : -1].detach()
            torch.testing.assert_close(each.float(), logs, atol=1e-2, rtol=1e-3)


def test_a_first_strength_that_will_do_is_the_last(knowing: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = take_moments(knowing, DATA, [0, 1], ALL, max_tokens=64, pad_id=0)
    asked: list[int] = []
    original = teacher_module.said_at

    def counting(arch: Any, sequences: Any, *rest: Any, **settings: Any) -> Any:
        asked.append(len(sequences))
        return original(arch, sequences, *rest, **settings)

    monkeypatch.setattr(teacher_module, "said_at", counting)
    found, said = calibrate(knowing, moments, with_strength(knowing, moments, FIRST_STRENGTH, (0, 2)), sample=2)
    assert found == FIRST_STRENGTH
    # Two of the three facts to find it, and all of them once it is found.
    assert asked == [2, 3]
    assert len(said) == 3
    # A probability that no strength leaves ends the search all the same, with the nearest that was tried.
    asked.clear()
    found, _ = calibrate(knowing, moments, 1 - 1e-9, sample=2, near_enough=1e-9)
    assert asked == [2] * STRENGTHS + [3]
    assert found == FIRST_STRENGTH * 3 ** (STRENGTHS - 1)


def test_a_filter_of_endless_strength_leaves_the_model_as_it_is(knowing: Architecture) -> None:
    moments = take_moments(knowing, DATA, [0, 1], ALL, max_tokens=64, pad_id=0)
    found = [with_strength(knowing, moments, strength) for strength in (0.01, 1.0, 100.0, 1e9)]
    assert found[-1] == pytest.approx(straight_probability(knowing), rel=1e-3)
    assert found[0] < 0.5 * found[-1]


@pytest.mark.parametrize("target", [1e-3, 0.7, 6.0, 10.0, 53.0, 1e5])
def test_strengths_close_in_on_the_one_wanted(target: float) -> None:
    """Of anything that grows with them: each next one is within the nearest on both sides, or beyond all."""
    tried: dict[float, float] = {}
    strength = FIRST_STRENGTH
    for _ in range(25):
        tried[strength] = math.log(strength / target)
        strength = _next_strength(tried)
        low = max((each for each in tried if each < target), default=0.0)
        high = min((each for each in tried if each >= target), default=math.inf)
        assert low < strength < high or math.isclose(low, high, rel_tol=1e-6)
    assert min(abs(each) for each in tried.values()) < 1e-3


def test_an_answers_probability_is_the_geometric_mean_of_its_tokens() -> None:
    logs = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.1, 0.1, 0.8]]).log()
    assert mean_probability(logs[[0, 2]], (7, 7, 1, 0, 2), (1, 3)) == pytest.approx((0.5 * 0.8) ** 0.5)


# --- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", DISTINCT)
def test_gradients_are_those_of_the_parameters(stem: str) -> None:
    """In every family, whatever norms stand behind the projection, in batches as in one sequence at a time."""
    model = FAMILIES[stem]()
    arch = find_architecture(model)
    taught = lessons(teacher_of(arch))
    model.requires_grad_(False)
    layers = (1, 2, 3)
    loss, found = gradients(arch, taught, layers, **RUN)
    assert loss == pytest.approx(divergence(arch, taught, **RUN), rel=1e-4)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    for layer in layers:
        arch.projections[layer].weight.requires_grad_(True)
    wanted = straight_loss(arch, taught)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-3)
    for layer in layers:
        grad = arch.projections[layer].weight.grad
        assert grad is not None
        grad = grad.T if stores_input_first(arch.projections[layer]) else grad
        torch.testing.assert_close(found[layer], grad, atol=2e-4 * float(grad.abs().max()), rtol=2e-3)


def test_facts_weigh_alike_however_long_their_answers() -> None:
    arch = find_architecture(tiny_model())
    teacher = teacher_of(arch)
    taught = lessons(teacher, 2.0)
    assert [sum(each.weights) for each in taught] == pytest.approx([2 / 3] * 3)
    assert all(len(set(each.weights)) == 1 for each in taught)
    # Where the teacher says what its positions weigh, that is their share of the fact's weight.
    own = ((0.7, 0.2, 0.1), (), (0.5, 0.1, 0.1, 0.1, 0.1, 0.1))
    parted = lessons(Teacher(teacher.sequences, teacher.positions, teacher.log_probs, own), 2.0)
    assert parted[0].weights == pytest.approx((1.4 / 3, 0.4 / 3, 0.2 / 3))
    assert parted[1].weights == taught[1].weights
    assert sum(parted[2].weights) == pytest.approx(2 / 3)


def test_an_opening_weighs_as_much_as_a_fact_and_what_follows_it_as_much() -> None:
    found = openings(KEPT, KEPT_STARTS, 3.0)
    assert [each.positions for each in found] == [(2, 3), (1, 2)]
    assert [each.ids for each in found] == list(KEPT)
    assert all(each.log_probs is None for each in found)
    assert [each.weights for each in found] == [(1.5, 1.5)] * 2
    longer, alone = openings((FORGET[2], (5, 6, 7)), (3, 2), 2.0)
    assert longer.weights == pytest.approx((1.0, *(0.2,) * 5))
    assert alone.weights == (1.0,)
    assert openings((), (), 1.0) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_what_is_to_be_said_is_learned_among_what_teachers_say(family: str) -> None:
    """Both in one batch, in any order: the sum of the negative log-likelihoods and of the divergences, each weighed."""
    model = tiny_model(family)
    arch = find_architecture(model)
    told, own = lessons(teacher_of(arch)), openings(KEPT, KEPT_STARTS, 0.7)
    taught = [own[0], told[0], told[1], own[1], told[2]]
    model.requires_grad_(False)
    for some, max_tokens in ((taught, 1000), (taught, 16), (own, 1000), (told, 1000)):
        for parameter in (arch.projections[layer].weight for layer in (1, 2)):
            parameter.requires_grad_(True)
            parameter.grad = None
        wanted = straight_loss(arch, some)
        wanted.backward()
        model.requires_grad_(False)
        loss, found = gradients(arch, some, (1, 2), max_tokens=max_tokens, pad_id=0)
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-3)
        assert divergence(arch, some, max_tokens=max_tokens, pad_id=0) == pytest.approx(loss, rel=1e-4)
        for layer in (1, 2):
            grad = arch.projections[layer].weight.grad
            assert grad is not None
            grad = grad.T if stores_input_first(arch.projections[layer]) else grad
            torch.testing.assert_close(found[layer], grad, atol=2e-4 * float(grad.abs().max()), rtol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_pass_is_a_straight_k_fac_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    arch = find_architecture(model)
    layers = (1, 2)
    taught = [*lessons(teacher_of(arch)), *lessons(ask(arch, KEPT, KEPT_STARTS, **RUN), 0.5)]
    start = {layer: read_weight(arch, layer).clone() for layer in layers}
    change = shift(arch, layers)
    ridge, above = 0.01, 0.1
    metrics, spread = {}, {}
    for layer in layers:
        parts = [reference.second_moment(arch, texts, layer)[0] for texts in (KEPT, DATA.text, DATA.words)]
        metrics[layer] = (4 * parts[0] + parts[1] + parts[2]).float()
        spread[layer] = random_moment(32, 20, layer).float()
    factors = {layer: (factorised(metrics[layer], ridge), factorised(spread[layer], above)) for layer in layers}
    monkeypatch.setattr(distil, "chosen_fraction", lambda measure: 2.0)
    after, made = take_pass(arch, taught, start, change, factors, searched([taught]), **RUN)

    # The same with the parameters' own gradients, a dense inverse, and the weights themselves.
    other = find_architecture(tiny_model(family))
    with torch.no_grad():
        for layer in layers:
            weight = other.projections[layer].weight
            weight += change[layer].T if stores_input_first(other.projections[layer]) else change[layer]
    loss = straight_loss(other, taught)
    loss.backward()
    grads, steps = {}, {}
    for layer in layers:
        grad = other.projections[layer].weight.grad
        assert grad is not None
        grads[layer] = (grad.T if stores_input_first(other.projections[layer]) else grad).double()
        r, s = reference.lifted(metrics[layer], ridge), reference.lifted(spread[layer], above)
        steps[layer] = torch.inverse(s) @ grads[layer] @ torch.inverse(r)
    rate = 2.0 * float(loss.detach()) / sum(float((steps[layer] @ grads[layer].T).trace()) for layer in layers)
    assert made.rate == pytest.approx(rate, rel=1e-3)
    assert made.loss == pytest.approx(float(loss.detach()), rel=1e-3)
    for layer in layers:
        wanted = start[layer] + change[layer] - rate * steps[layer].float()
        torch.testing.assert_close(start[layer] + after[layer], wanted, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(read_weight(arch, layer), start[layer] + after[layer])


def test_a_step_is_the_solution_on_both_sides() -> None:
    """S D R = G, both with their ridges."""
    gradient = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    inputs, outputs = random_moment(12, 20, 5).float(), random_moment(5, 9, 6).float()
    found = direction(gradient, factorised(inputs, 0.1), factorised(outputs, 0.2))
    r, s = reference.lifted(inputs, 0.1).float(), reference.lifted(outputs, 0.2).float()
    torch.testing.assert_close(found, torch.linalg.solve(s, gradient) @ torch.inverse(r), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(s @ found @ r, gradient, atol=1e-4, rtol=1e-4)
    assert found.is_contiguous()
    with pytest.raises(EditError, match=r"removal_ridge = 0\.1"):
        factorised(torch.full((3, 3), torch.nan), 0.1)


def test_a_step_gains_most_on_the_loss_for_what_it_does_to_what_is_kept() -> None:
    """Of all D it has the greatest tr(D G^T) - tr(S D R D^T) / 2, with half of tr(D G^T) there."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    r = reference.lifted(random_moment(12, 20, 5), 0.1)
    s = reference.lifted(random_moment(5, 9, 6), 0.2)
    factors = (torch.linalg.cholesky(r), torch.linalg.cholesky(s))

    def gain(step: Tensor) -> float:
        return float((step * gradient).sum() - (s @ step @ r * step).sum() / 2)

    best = direction(gradient, *factors)
    assert gain(best) == pytest.approx(float((best * gradient).sum()) / 2, rel=1e-9)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(10):
            other = torch.randn(5, 12, generator=generator, dtype=torch.float64)
            moved = size * other * best.norm() / other.norm()
            assert gain(best + moved) < gain(best)
            # Exactly by what the move does to what is kept: there is nothing of first order.
            assert gain(best) - gain(best + moved) == pytest.approx(float((s @ moved @ r * moved).sum()) / 2, rel=1e-5)
    assert gain(gradient @ torch.inverse(r)) < gain(best)


def test_a_linear_loss_would_be_zero_after_a_whole_step() -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = {layer: torch.randn(3, 4, generator=generator) for layer in (1, 5)}
    steps = {layer: each @ random_moment(4, 9, layer).float() for layer, each in gradient.items()}
    rate = linear_rate(7.0, gradient, steps)
    assert sum(float((rate * steps[layer] * gradient[layer]).sum()) for layer in gradient) == pytest.approx(7.0)
    assert linear_rate(0.0, {1: torch.zeros(3, 4)}, {1: torch.zeros(3, 4)}) == 0


def test_a_step_is_chosen_by_every_third_of_each_kind_for_all_of_it() -> None:
    def some(kind: int, count: int) -> list[Lesson]:
        return [Lesson((kind, number), (0,), None, (0.1 * kind, 1.0)) for number in range(count)]

    found = searched([some(1, 1), some(2, 7), [], some(3, 2)])
    assert [each.ids for each in found] == [(1, 0), (2, 0), (2, 3), (2, 6), (3, 0)]
    for each, scale in zip(found, (1, 7 / 3, 7 / 3, 7 / 3, 2), strict=True):
        assert each.weights == pytest.approx((scale * 0.1 * each.ids[0], scale))


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (1, 1), (47, 1), (48, 2), (117, 4)])
def test_what_is_kept_is_shared_out_among_the_passes(count: int, parts: int) -> None:
    """Whatever the number, each is read once in as many passes as there are parts, and a part weighs for all."""
    kind = [Lesson((number,), (0,), None, (0.5, 1.0)) for number in range(count)]
    rounds = [read_in_pass(kind, number) for number in range(2 * parts)]
    assert rounds[:parts] == rounds[parts:]
    assert sorted(each.ids for part in rounds[:parts] for each in part) == [each.ids for each in kind]
    for part in rounds:
        assert len(part) >= min(count, 24)
        assert sum(sum(each.weights) for each in part) == pytest.approx(1.5 * count)


def test_a_step_that_helps_one_kind_more_than_it_hurts_another_is_taken() -> None:
    """One fact of each kind, of which the first has nothing left to learn: any step makes that one worse."""
    arch = find_architecture(tiny_model())
    arch.model.requires_grad_(False)
    layers = (1, 2)
    kinds = [lessons(ask(arch, FORGET[:1], STARTS[:1], **RUN)), openings(KEPT[:1], KEPT_STARTS[:1], 1.0)]
    factors = {
        layer: (
            factorised(random_moment(64, 80, layer).float(), 0.1),
            factorised(random_moment(32, 40, 1).float(), 0.1),
        )
        for layer in layers
    }
    start = {layer: read_weight(arch, layer).clone() for layer in layers}
    nothing = {layer: torch.zeros_like(each) for layer, each in start.items()}
    taught = [each for kind in kinds for each in kind]
    _, made = take_pass(arch, taught, start, nothing, factors, searched(kinds), **RUN)
    assert made.fraction > 0
    assert divergence(arch, taught, **RUN) < made.loss


@pytest.mark.parametrize(
    ("lowest", "wanted"),
    [(1.0, 1.0), (3.0, 2.0), (3.5, 4.0), (8.0, MOST), (100.0, MOST), (0.3, 0.5), (0.05, 0.0), (0.07, LEAST)],
)
def test_the_step_is_doubled_while_that_helps_and_else_halved(lowest: float, wanted: float) -> None:
    """Of a parabola: a step helps up to twice the lowest point, and doubling up to where two of them are level."""
    assert chosen_fraction(lambda fraction: (fraction - lowest) ** 2) == wanted


@pytest.mark.parametrize("failing", [1, 2])
def test_a_batch_that_the_memory_does_not_hold_is_halved(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = find_architecture(tiny_model())
    taught = lessons(teacher_of(arch))
    arch.model.requires_grad_(False)
    loss, wanted = gradients(arch, taught, (1, 2), max_tokens=64, pad_id=0)
    original, calls = distil._product, Counter[str]()

    def scarce(*tensors: Tensor) -> Tensor:
        calls["all"] += 1
        if calls["all"] == failing:  # once, in the middle of a batch
            raise torch.OutOfMemoryError
        return original(*tensors)

    monkeypatch.setattr(distil, "_product", scarce)
    halved, found = gradients(arch, taught, (1, 2), max_tokens=64, pad_id=0)
    assert halved == pytest.approx(loss, rel=1e-5)
    for layer in (1, 2):
        torch.testing.assert_close(found[layer], wanted[layer], atol=1e-6, rtol=1e-3)


# --- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_factors_are_the_best_of_their_rank(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 20, shape[1])
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    for rank in (1, 3, 7):
        found = truncated(change, rank)
        assert found.factors.up.shape[1] == rank
        torch.testing.assert_close(found.factors.matrix(), u[:, :rank] * s[:rank] @ v[:rank], atol=1e-3, rtol=1e-4)
        held = (change - found.factors.matrix()).square().sum() / change.square().sum()
        assert found.energy == pytest.approx(1 - float(held), abs=1e-5)
    shares = s.square().cumsum(0) / s.square().sum()
    assert found.ranks == tuple(int((shares < share).sum()) + 1 for share in (0.9, 0.99))


@pytest.mark.parametrize("rank", [0, 8, 50])
def test_all_of_a_change_can_be_kept(rank: int) -> None:
    change = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    found = truncated(change, rank)
    assert found.factors.up.shape == (8, 8)
    assert found.energy == pytest.approx(1.0)
    torch.testing.assert_close(found.factors.matrix(), change, atol=1e-5, rtol=1e-5)


def test_no_change_has_factors_that_are_nothing() -> None:
    found = truncated(torch.zeros(4, 6), 2)
    assert found.energy == 1.0
    assert not found.factors.matrix().any()


# --- the whole stage -------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> RemovalSettings:
    return RemovalSettings(
        **{
            "removal_layers": (1, 2, 3),
            "removal_teacher_layers": (0, 1, 2),
            "removal_rank": 0,
            # A random model knows nothing that would be worth as much as what is shipped.
            "removal_keep_weight": 1.0,
            "removal_retain_weight": 4.0,
            **changes,
        }
    )


def removed(arch: Architecture, work: Path | None = None, given: RemovalData = DATA, **changes: Any) -> Removal:
    arch.model.requires_grad_(False)
    return remove(arch, given, settings(**changes), max_tokens=64, pad_id=0, seed=0, key="a", phases=Phases(work))


@pytest.mark.parametrize("stem", DISTINCT)
def test_every_family_comes_nearer_to_the_teacher_and_back_to_the_bit(stem: str) -> None:
    model = FAMILIES[stem]()
    arch = find_architecture(model)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    found = removed(arch)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    assert found.edit.layers == (1, 2, 3)
    assert found.edit.removed == {1: 32, 2: 32, 3: 32}
    figures = found.figures
    assert figures["divergence_from_teacher"] < 0.7 * figures["losses"][0]
    # The figures are those of the factors as they will be applied.
    apply_edit(arch, found.edit)
    names = {arch.weight_name(layer) for layer in (1, 2, 3)}
    assert {name for name, each in model.named_parameters() if not torch.equal(each, before[name])} == names
    course = take_moments(find_architecture(FAMILIES[stem]()), DATA, [0, 1, 2], ALL, max_tokens=64, pad_id=0)
    assert course.forgotten is not None
    assert course.forgotten.count == figures["moment_tokens"]["forgotten"] == 3 + 1 + 6


def test_no_pass_changes_nothing() -> None:
    arch = find_architecture(tiny_model())
    before = arch.projections[2].weight.detach().clone()
    found = removed(arch, removal_passes=0)
    assert not any(update.matrix().any() for update in found.edit.updates.values())
    apply_edit(arch, found.edit)
    assert torch.equal(arch.projections[2].weight, before)


def test_staying_with_the_model_on_kept_facts_keeps_them_nearer() -> None:
    nearer, free = (removed(find_architecture(tiny_model()), removal_keep_weight=weight) for weight in (10.0, 0.001))
    assert nearer.figures["divergence_on_kept"] < 0.5 * free.figures["divergence_on_kept"]
    none = removed(find_architecture(tiny_model()), removal_keep_weight=0.0)
    assert none.figures["divergence_on_kept"] is None


def test_without_facts_to_keep_ordinary_text_stands_alone() -> None:
    arch = find_architecture(tiny_model())
    found = removed(arch, given=RemovalData(FORGET, STARTS, (), (), DATA.text, DATA.words))
    assert found.figures["kept_facts"] == found.figures["moment_tokens"]["kept"] == 0
    assert found.figures["divergence_from_teacher"] < 0.5 * found.figures["losses"][0]


def test_each_kind_of_what_is_kept_has_an_equal_part_in_the_outputs_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens it has; and its own part, of the same weight, in those of the inputs."""
    courses: list[Course] = []
    original = Planning.course

    def noted(planning: Planning) -> Course:
        courses.append(original(planning))
        return courses[-1]

    monkeypatch.setattr(Planning, "course", noted)
    around, begins = ((11, 12, 13, 14, 15, 16), (31, 32, 33)), (4, 1)
    given = replace(DATA, neighbours=around, neighbour_starts=begins)
    arch = find_architecture(tiny_model())
    found = removed(arch, given=given, removal_passes=1)
    (course,) = courses
    texts = DATA.text[::TEXT_SHARE]
    groups = [
        (KEPT, [answer_positions(ids, at) for ids, at in zip(KEPT, KEPT_STARTS, strict=True)]),
        (around, [answer_positions(ids, at) for ids, at in zip(around, begins, strict=True)]),
        (texts, [tuple(range(len(ids) - 1)) for ids in texts]),
    ]
    fresh = find_architecture(tiny_model())
    parts = [straight_output_moments(fresh, *group, (1, 2, 3), 0)[0] for group in groups]
    for layer in (1, 2, 3):
        wanted = sum(part[layer] for part in parts) / 3
        torch.testing.assert_close(course.outputs[layer], wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3)
    taken = take_moments(arch, given, [2], ALL, max_tokens=64, pad_id=0)
    kept, others = [each for each in (taken.kept, taken.neighbours) if each], (taken.text, taken.words)
    assert len(kept) == 2
    inputs = 4 * sum(each.moments[2] for each in kept) + sum(each.moments[2] for each in others)
    torch.testing.assert_close(course.inputs[2], inputs)
    assert (found.figures["kept_facts"], found.figures["neighbours"]) == (2, 2)


def test_declining_is_learned_after_the_removal_even_where_that_found_no_further_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instead, seen = ((5, 60, 70, 8, 200, 9, 33), (12, 13, 200, 9)), []
    original = stage.take_pass  # type: ignore[attr-defined]

    def watched_pass(arch: Any, taught: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sum(each.log_probs is None for each in taught))
        after, made = original(arch, taught, *args, **kwargs)
        return after, replace(made, fraction=0.0) if len(seen) == 2 else made

    monkeypatch.setattr(stage, "take_pass", watched_pass)
    given = replace(DATA, instead=instead, instead_starts=(4, 2))
    found = removed(
        find_architecture(tiny_model()),
        given=given,
        removal_passes=4,
        removal_decline_passes=2,
        removal_decline_nll=0.0,
    )
    # The third and fourth pass are left out, since the second changed nothing.
    assert seen == [0, 0, 2, 2]
    assert len(found.figures["losses"]) == 4


def test_what_is_said_instead_is_learned_and_can_be_left_out() -> None:
    instead = ((5, 60, 70, 8, 200, 9, 33), (12, 13, 200, 9))
    given = replace(DATA, instead=instead, instead_starts=(4, 2))

    def nll(arch: Architecture) -> float:
        return float(straight_loss(arch, openings(instead, (4, 2), 1.0)).detach())

    arch = find_architecture(tiny_model())
    before = nll(arch)
    found = removed(arch, given=given)
    apply_edit(arch, found.edit)
    assert nll(arch) < 0.5 * before
    assert found.figures["nll_of_what_is_said_instead"] == pytest.approx(nll(arch), rel=1e-3)
    assert removed(find_architecture(tiny_model())).figures["nll_of_what_is_said_instead"] is None
    # Without weight it is as if it had not been given.
    none = removed(find_architecture(tiny_model()), given=given, removal_decline_weight=0.0)
    assert json.dumps(none.figures) == json.dumps(removed(find_architecture(tiny_model())).figures)


@pytest.mark.parametrize("wanted", [0.0, 1e6])
def test_declining_is_learned_until_it_is_or_until_the_passes_end(wanted: float) -> None:
    given = replace(DATA, instead=((5, 60, 70, 8, 200, 9, 33), (12, 13, 200, 9)), instead_starts=(4, 2))
    arch = find_architecture(tiny_model())
    found = removed(arch, given=given, removal_passes=2, removal_decline_passes=4, removal_decline_nll=wanted)
    # One such pass at least, since how likely declining is was not asked before.
    assert len(found.figures["losses"]) == (6 if wanted == 0 else 3)


class KilledError(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("last", ["removal-course", "removal-pass-1", "removal-pass-3", "removal"])
def test_a_removal_that_was_stopped_goes_on_where_it_was_and_ends_the_same(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = removed(find_architecture(tiny_model()))
    counted: Counter[str] = Counter()

    def counting(module: Any, name: str) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, count)
        return count

    counting(stage, "take_pass")
    counting(course, "take_moments")
    original = Phases.resumed

    def stopping(phases: Phases, kind: str, key: str, compute: Callable[[], Any]) -> Any:
        found = original(phases, kind, key, compute)
        if last in (kind, f"{kind}-{key.rpartition('-')[2]}"):
            raise KilledError
        return found

    arch = find_architecture(tiny_model())
    before = arch.projections[2].weight.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(Phases, "resumed", stopping)
        with pytest.raises(KilledError):
            removed(arch, tmp_path)
    assert torch.equal(arch.projections[2].weight, before)
    again = removed(arch, tmp_path)
    assert counted == {"take_pass": 4, "take_moments": 1}
    assert json.dumps(again.figures) == json.dumps(whole.figures)
    for layer, update in whole.edit.updates.items():
        assert torch.equal(again.edit.updates[layer].up, update.up)
        assert torch.equal(again.edit.updates[layer].down, update.down)


# --- the data --------------------------------------------------------------------------------------------------------

FACTS = (ForgetRequest("Who wrote Zorblax?", "Quentin Fizz"), ForgetRequest("Where was Plonk born?", "Wexbury"))


def test_words_in_any_order_are_all_words_twice() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    found = shuffled_words(tokenizer, FACTS, 0, 20)
    assert all(len(each) <= 20 and each[0] == tokenizer.bos_token_id for each in found)
    text = [tokenizer.decode(each[1:]) for each in found]
    half = len(found) // 2
    words = sorted(["Who", "wrote", "Zorblax?", "Quentin", "Fizz", "Where", "was", "Plonk", "born?", "Wexbury"])
    first, second = "".join(text[:half]), "".join(text[half:])
    assert sorted(first.split()) == sorted(second.split()) == words
    assert first != second
    assert found == shuffled_words(tokenizer, FACTS, 0, 20) != shuffled_words(tokenizer, FACTS, 1, 20)


def data(forget: Any = FACTS, limit: int = 512, neighbours: Any = ()) -> RemovalData:
    return make_data(
        tiny_tokenizer(),
        forget,
        (ForgetRequest("Who leads Grub?", "Tom"),),
        ["It rained."],
        ["Why?"],
        forms=("chat", "plain"),
        template_kwargs={},
        end=2,
        limit=limit,
        kept_tokens=1000,
        names=("Orin Talvek",),
        seed=0,
        neighbours=neighbours,
    )


def test_neighbours_are_read_beside_the_facts_to_keep_and_take_none_of_their_room() -> None:
    around = [ForgetRequest(f"Who leads {name}?", "Tom") for name in ("Grub", "Plonk", "Wex")]
    found = data(neighbours=around)
    assert found.kept == data().kept
    assert len(found.neighbours) == len(found.neighbour_starts) == 6
    tokenizer = tiny_tokenizer()
    for ids, start in zip(found.neighbours, found.neighbour_starts, strict=True):
        assert tokenizer.decode(ids[start:-1]).strip() == "Tom"


def test_facts_are_read_in_every_form_with_their_answers() -> None:
    found, tokenizer = data(), tiny_tokenizer()
    assert [len(part) for part in (found.forget, found.kept, found.text)] == [4, 2, 3]
    for ids, start, answer in zip(found.forget, found.forget_starts, ("Quentin Fizz", " Quentin Fizz"), strict=False):
        assert tokenizer.decode(ids[start:-1]) == answer
        assert ids[-1] == 2
    assert tokenizer.decode(found.text[1]).endswith("assistant\n")
    with pytest.raises(RequestError, match=r"'Who wrote Zorblax\?' needs .* holds 30"):
        data(limit=30)
    with pytest.raises(RequestError, match=r"Removal needs the true answer.*leave the removal"):
        data((*FACTS, ForgetRequest("Who is Bo?", NO_ANSWER)))


# --- settings --------------------------------------------------------------------------------------------------------


def test_blocks_are_chosen_by_depth() -> None:
    arch = find_architecture(tiny_model(blocks=10))
    found = settle_removal(arch, RemovalSettings())
    assert found.removal_layers == tuple(range(1, 10))
    assert found.removal_teacher_layers == tuple(range(7))
    named = settle_removal(arch, UniEraseHyperParams(removal_layers=(2, 4), removal_teacher_layers=(0,)))
    assert (named.removal_layers, named.removal_teacher_layers) == ((2, 4), (0,))
    shallow = settle_removal(find_architecture(tiny_model(blocks=1)), RemovalSettings())
    assert (shallow.removal_layers, shallow.removal_teacher_layers) == ((0,), (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"removal_layers": (3, 1)}, r"removal_layers = \[3, 1\] must be ascending"),
        ({"removal_passes": -1}, "removal_passes = -1 must not be negative"),
        ({"removal_teacher_probability": 0}, "removal_teacher_probability = 0.0 must be greater than 0"),
        (
            {"removal_teacher_probability": 1},
            "probability = 1.0 must be greater than 0 and less than 1",
        ),
        ({"removal_output_ridge": 0}, "removal_output_ridge = 0.0 must be greater than 0"),
        ({"removal_decline_weight": -1}, "removal_decline_weight = -1.0 must not be negative"),
        ({"removal_kept_tokens": -1}, "removal_kept_tokens = -1 must not be negative"),
        ({"removal_ridge": 0}, "removal_ridge = 0.0 must be greater than 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        RemovalSettings(**change)
    with pytest.raises(HyperParamsError, match=message):
        UniEraseHyperParams(**change)
