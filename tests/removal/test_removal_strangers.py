"""A teacher from invented subjects: what it teaches of which facts, against a loop that asks one thing at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from test_removal import DATA, KEPT, KilledError, removed, settings
from tiny import tiny_model
from torch import Tensor

from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.removal import course, stage, strangers
from unierase_plugin.removal.moments import RemovalData
from unierase_plugin.removal.strangers import ask_strangers, left, renamed, taught
from unierase_plugin.removal.teacher import ask, said_at
from unierase_plugin.storage.phases import Phases
from unierase_plugin.storage.tensor_files import read_tensors

#: By fact: two places in the question; one in the question and two in the answer, side by side; none; at the start;
#: and one that the first of the names is the name of.
SUBJECTS = (((1, 2), (3, 5)), ((1, 3), (4, 5), (5, 7)), (), ((0, 2),), ((2, 4),))
FACTS = (
    (5, 60, 70, 8, 9, 100, 33, 2),
    (12, 13, 90, 91, 13, 90, 13, 55, 2),
    (44, 45, 46, 47, 48, 2),
    (20, 21, 22, 80, 81, 82, 83, 84, 85, 86, 2),
    (30, 31, 200, 201, 32, 33, 34, 2),
)
FACT_STARTS = (5, 4, 3, 4, 6)
NAMES = ((200, 201), (210, 211, 212), (220,))
GIVEN = replace(DATA, forget=FACTS, forget_starts=FACT_STARTS, forget_subjects=SUBJECTS, strangers=NAMES)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [(), (7,), (7, 8, 9, 7)])
@pytest.mark.parametrize(
    "spans", [(), ((0, 2),), ((2, 3),), ((4, 6),), ((0, 1), (2, 4), (5, 6)), ((1, 3), (3, 4)), ((0, 6),)]
)
def test_another_name_stands_in_all_places_and_all_else_in_its_order(
    spans: tuple[tuple[int, int], ...], name: tuple[int, ...]
) -> None:
    ids = (50, 51, 52, 53, 54, 55)
    found, places = renamed(ids, spans, name)
    # Cut at the spans, and put together with the name in between.
    cuts = [0, *(edge for span in spans for edge in span), len(ids)]
    pieces = [ids[cuts[index] : cuts[index + 1]] for index in range(0, len(cuts), 2)]
    wanted = list(pieces[0])
    for piece in pieces[1:]:
        wanted += [*name, *piece]
    assert list(found) == wanted
    inside = {place for first, end in spans for place in range(first, end)}
    assert set(places) == set(range(len(ids))) - inside
    assert all(found[now] == ids[place] for place, now in places.items())
    assert list(places.values()) == sorted(set(places.values()))
    assert len(found) == len(places) + len(spans) * len(name)


def test_without_a_place_nothing_is_renamed() -> None:
    assert renamed((5, 6, 7), (), (9, 9)) == ((5, 6, 7), {0: 0, 1: 1, 2: 2})


# --- what is taught --------------------------------------------------------------------------------------------------


def test_only_tokens_that_strangers_make_half_as_likely_are_taught_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(6, 5, generator=generator).log_softmax(-1)
    wanted = torch.tensor([4, 0, 2, 2, 1, 3])
    others = torch.randn(6, 5, generator=generator).softmax(-1)
    # The wanted token's probability for strangers, as a share of the model's own.
    for row, share in enumerate((0.1, 0.49, 0.51, 1.0, 3.0, 0.1)):
        others[row, wanted[row]] = share * said[row, wanted[row]].exp()
    others[0, 1] = 0.0
    known = torch.tensor([True, True, True, True, True, False])
    found, decided = taught(said, others, known, wanted)
    assert decided.tolist() == [True, True, False, False, False, False]
    torch.testing.assert_close(found[:2].exp(), others[:2], atol=1e-8, rtol=1e-5)
    assert torch.isfinite(found).all()
    assert torch.equal(found[2:], said[2:])


def test_what_is_left_of_an_answer_is_the_geometric_mean_of_its_tokens() -> None:
    before, after = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log(), torch.tensor([[0.1, 0.9], [0.2, 0.8]]).log()
    assert left(before, after, torch.tensor([0, 1])) == pytest.approx((0.2 * 1.0) ** 0.5)
    assert left(before, before, torch.tensor([0, 1])) == 1


def straight(arch: Architecture, given: RemovalData, said: Sequence[Tensor]) -> dict[int, tuple[Tensor, list[bool]]]:
    """By fact what is taught and where it is the strangers', one sequence, one name and one position at a time."""
    out = {}
    for row, (ids, start, spans) in enumerate(
        zip(given.forget, given.forget_starts, given.forget_subjects, strict=True)
    ):
        named = {place for first, end in spans for place in range(first, end)}
        firsts = {first for first, _ in spans}
        own = said[row].float()
        total = torch.zeros_like(own)
        for count, name in enumerate(given.strangers, start=1):
            other: list[int] = []
            before: dict[int, int] = {}  # by answer token, how many tokens come before it
            for place, token in enumerate(ids):
                if place in firsts:
                    other += name
                if place not in named:
                    before[place] = len(other)
                    other.append(token)
            logs = reference.log_probabilities(arch, other).detach()
            new, decided, lost = own.clone(), [], 0.0
            for index, place in enumerate(range(start, len(ids))):
                if place in before:
                    total[index] += logs[before[place] - 1].exp()
                mean = total[index] / count
                decided.append(place in before and bool(mean[ids[place]] < 0.5 * own[index, ids[place]].exp()))
                if decided[-1]:
                    new[index] = mean.clamp(min=1e-9).log()
                    lost += float(new[index, ids[place]] - own[index, ids[place]])
            if not any(decided) or lost / len(decided) > torch.tensor(0.8).log() or not spans:
                break
        else:
            out[row] = (new, decided)
    return out


def own_words(arch: Architecture, given: RemovalData) -> tuple[Tensor, ...]:
    return ask(arch, given.forget, given.forget_starts, max_tokens=64, pad_id=0).log_probs


@pytest.mark.parametrize("max_tokens", [8, 1000])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_strangers_are_asked_as_one_at_a_time(family: str, max_tokens: int) -> None:
    arch = find_architecture(tiny_model(family))
    said = own_words(arch, GIVEN)
    found = ask_strangers(arch, GIVEN, said, max_tokens=max_tokens, pad_id=0)
    wanted = straight(arch, GIVEN, said)
    assert found.keys() == wanted.keys()
    assert found
    assert 2 not in found  # without a subject
    assert 4 not in found  # strangers know it, for one of them is its subject
    for row, told in found.items():
        new, decided = wanted[row]
        assert told.log_probs.dtype == torch.float16
        torch.testing.assert_close(told.log_probs.float(), new, atol=2e-2, rtol=2e-3)
        own = [index for index, each in enumerate(decided) if not each]
        assert torch.equal(told.log_probs[own], said[row][own])
        assert sum(told.weights) == pytest.approx(1)
        every = (1 - strangers.FOCUS) / len(decided)
        focus = strangers.FOCUS / sum(decided)
        assert told.weights == pytest.approx([every + focus * each for each in decided])
    # Tokens of the name itself are nobody's to decide.
    if 1 in found:
        assert not any(wanted[1][1][:3])


def test_who_leaves_too_much_of_an_answer_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = find_architecture(tiny_model())
    one = replace(GIVEN, strangers=NAMES[1:2])
    said = own_words(arch, one)
    told = ask_strangers(arch, one, said, max_tokens=64, pad_id=0)
    shares = {}
    for row, each in told.items():
        wanted = torch.tensor(one.forget[row][one.forget_starts[row] :])
        shares[row] = left(said[row].float(), each.log_probs.float(), wanted)
        assert shares[row] <= strangers.STILL_KNOWN
    assert len(set(shares.values())) == len(shares) >= 2
    highest = max(shares, key=shares.__getitem__)
    still_known = 0.99 * shares[highest]
    fewer = ask_strangers(arch, one, said, max_tokens=64, pad_id=0, still_known=still_known)
    assert fewer.keys() == told.keys() - {highest}


def test_without_names_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = find_architecture(tiny_model())
    said = own_words(arch, GIVEN)
    asked = Counter[int]()

    def counting(arch: Any, sequences: Sequence[Any], *rest: Any, **settings: Any) -> Any:
        asked[len(sequences)] += 1
        return said_at(arch, sequences, *rest, **settings)

    monkeypatch.setattr(strangers, "said_at", counting)
    assert ask_strangers(arch, replace(GIVEN, strangers=()), said, max_tokens=64, pad_id=0) == {}
    assert not asked
    # Of those whom a name has not made the model forget, no other is asked.
    assert ask_strangers(arch, replace(GIVEN, strangers=((200, 201),) * 3), said, max_tokens=64, pad_id=0)
    first, then = max(asked), min(asked)
    assert first == 4
    assert then < first
    assert asked == {first: 1, then: 2}


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> Any:
    return removed(find_architecture(tiny_model()), given=GIVEN)


def test_facts_are_counted_by_their_teacher(whole: Any) -> None:
    arch = find_architecture(tiny_model())
    told = ask_strangers(arch, GIVEN, own_words(arch, GIVEN), max_tokens=64, pad_id=0)
    rest = [row for row in range(5) if row not in told]
    figures = whole.figures
    assert figures["taught"] == {"strangers": len(told), "filter": len(rest)}
    assert 0 < len(told) < 5
    assert figures["strength"] > 0
    # The filter is made of what strangers do not teach alone.
    assert figures["moment_tokens"]["forgotten"] == sum(len(FACTS[row]) - FACT_STARTS[row] for row in rest)
    assert figures["divergence_from_teacher"] < 0.5 * figures["losses"][0]


def test_strangers_can_be_left_out_and_can_teach_all() -> None:
    none = removed(find_architecture(tiny_model()), given=GIVEN, removal_strangers=False).figures
    assert none["taught"] == {"strangers": 0, "filter": 5}
    assert none["moment_tokens"]["forgotten"] == sum(map(len, FACTS)) - sum(FACT_STARTS)
    arch = find_architecture(tiny_model())
    told = sorted(ask_strangers(arch, GIVEN, own_words(arch, GIVEN), max_tokens=64, pad_id=0))
    those: dict[str, Any] = {
        name: tuple(getattr(GIVEN, name)[row] for row in told)
        for name in ("forget", "forget_starts", "forget_subjects")
    }
    every = removed(arch, given=replace(GIVEN, **those)).figures
    assert every["taught"] == {"strangers": len(told), "filter": 0}
    assert every["moment_tokens"]["forgotten"] == 0
    assert every["strength"] is None
    assert every["divergence_from_teacher"] < 0.5 * every["losses"][0]


@pytest.mark.parametrize("last", ["removal-course", "removal-pass-2"])
def test_a_stop_changes_nothing_and_no_fact_lies_in_the_folder(
    last: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[str] = Counter()

    def counting(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    for name in ("ask_strangers", "calibrated", "output_moments"):
        counting(course, name)
    counting(stage, "take_pass")
    original = Phases.resumed

    def stopping(phases: Phases, kind: str, key: str, compute: Callable[[], Any]) -> Any:
        found = original(phases, kind, key, compute)
        if last in (kind, f"{kind}-{key.rpartition('-')[2]}"):
            raise KilledError
        return found

    arch = find_architecture(tiny_model())
    with monkeypatch.context() as patch:
        patch.setattr(Phases, "resumed", stopping)
        with pytest.raises(KilledError):
            removed(arch, tmp_path, GIVEN)
    kept = [read_tensors(path) for path in tmp_path.rglob("*.safetensors")]
    assert kept
    names = set()
    for tensors, metadata in kept:
        # No ids: all that is there are real numbers.
        assert all(each.is_floating_point() for each in tensors.values())
        names |= {name.split(".")[0] for name in tensors}
        for ids in (*FACTS, *NAMES, *KEPT):
            shown = json.dumps(ids).strip("[]")
            assert not any(shown in text for text in metadata.values())
    assert {"inputs", "outputs", "said"} <= names
    again = removed(arch, tmp_path, GIVEN)
    assert counted == {"ask_strangers": 1, "calibrated": 1, "output_moments": 2, "take_pass": 4}
    assert json.dumps(again.figures) == json.dumps(whole.figures)
    for layer, update in whole.edit.updates.items():
        assert torch.equal(again.edit.updates[layer].up, update.up)
        assert torch.equal(again.edit.updates[layer].down, update.down)


def test_another_seed_draws_otherwise(whole: Any) -> None:
    """The seed is part of what the result depends on, and through the draws alone."""
    arch = find_architecture(tiny_model())
    arch.model.requires_grad_(False)
    other = stage.remove(arch, GIVEN, settings(), max_tokens=64, pad_id=0, seed=1, key="a", phases=Phases(None))
    assert other.figures["losses"][0] == whole.figures["losses"][0]
    assert other.figures["rates"] != whole.figures["rates"]
