"""Hardening: the term against the true answer is the straight line's, every option adds what it names and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from families import FAMILIES
from reference import At, Fact
from small import FORGET, HPARAMS, RETAIN, save_base, shrink
from test_values import FACTS, PAD, TOKEN, near
from test_values import SETTINGS as MILD
from tiny import tiny_tokenizer

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import read_checkpoint
from unierase_plugin.errors import HyperParamsError, RequestError
from unierase_plugin.facts.request import NO_ANSWER, ForgetRequest
from unierase_plugin.hparams import HARDENED, HARDENINGS, UniEraseHyperParams
from unierase_plugin.locate_then_edit.positions import Prompt, locate
from unierase_plugin.locate_then_edit.rewording import LEAD_IN, REWORDINGS, reworded, with_typo
from unierase_plugin.locate_then_edit.targets import forms_of, make_targets, targets_a_request
from unierase_plugin.locate_then_edit.value_loss import ValueTarget
from unierase_plugin.locate_then_edit.values import Values, optimise_values
from unierase_plugin.models.architecture import Architecture, find_architecture

STEMS = ["smollm2-135m", "gemma2-9b"]
#: A random model holds no answer for likely, so that the term needs a weight to be felt.
SETTINGS = MILD.replace(v_unlikely_weight=100.0)
#: One with contexts and all other terms, one without any answer that is not wanted, one of a single token.
HARD = [
    FACTS[0]._replace(unwanted=(60, 61, 62, 63), instead=(90, 91)),
    FACTS[1],
    FACTS[2]._replace(unwanted=(77,), instead=(90, 91, 92)),
]


@pytest.fixture(scope="module", params=STEMS)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return find_architecture(FAMILIES[request.param]().requires_grad_(False))


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))


def target(fact: Fact, group: str | None = None) -> ValueTarget:
    kl = None if fact.kl_prompt is None else Prompt(*fact.kl_prompt)
    prompts = tuple(Prompt(*prompt) for prompt in fact.prompts)
    return ValueTarget(prompts, kl, fact.continuation, group, unwanted=fact.unwanted, instead=fact.instead)


def optimise(
    arch: Architecture, targets: list[ValueTarget], hparams: UniEraseHyperParams = SETTINGS, max_tokens: int = 4096
) -> Values:
    return optimise_values(arch, targets, TOKEN, hparams, max_tokens=max_tokens, pad_id=PAD)


# --- the term against the answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [4096, 30])
def test_values_are_those_of_the_straight_line(arch: Architecture, max_tokens: int) -> None:
    got = optimise(arch, [target(fact) for fact in HARD], max_tokens=max_tokens)
    for index, fact in enumerate(HARD):
        z, steps, probability, goals = reference.value(arch, fact, TOKEN, SETTINGS)
        near(got.states[index], z)
        assert int(got.steps[index]) == steps
        assert float(got.probability[index]) == pytest.approx(probability, rel=1e-3)
        assert float(got.nll[index]) == pytest.approx(goals[-1], rel=1e-3)
    # Control: without the term they would be elsewhere.
    for name in ("unwanted", "instead"):
        plain = optimise(arch, [target(fact._replace(**{name: ()})) for fact in HARD]).states
        moved = (plain - got.states).norm(dim=1) / got.states.norm(dim=1)
        assert bool((moved[[0, 2]] > 1e-3).all()), name
        assert float(moved[1]) < 1e-5


def test_a_group_shares_the_delta_of_the_straight_line(llama: Architecture) -> None:
    """Also where one of the group has no answer to be rid of, and the group is worked through in parts."""
    got = optimise(llama, [target(HARD[0], "a"), target(HARD[1], "a")], max_tokens=20)
    for state, z in zip(got.states, reference.shared_values(llama, HARD[:2], TOKEN, SETTINGS)[0], strict=True):
        near(state, z)


def test_a_finished_request_takes_its_answer_along(llama: Architecture) -> None:
    """Those that leave and those that stay are renumbered alike."""
    goals = [reference.value(llama, fact, TOKEN, SETTINGS)[3] for fact in HARD]
    quick = min(range(len(HARD)), key=lambda index: goals[index][2])
    hparams = SETTINGS.replace(v_stop_loss=(goals[quick][1] + goals[quick][2]) / 2)
    got = optimise(llama, [target(fact) for fact in HARD], hparams)
    assert len(set(got.steps.tolist())) > 1, "control: not all leave at once"
    for index, fact in enumerate(HARD):
        near(got.states[index], reference.value(llama, fact, TOKEN, hparams)[0])


def improbability(arch: Architecture, fact: Fact, delta: torch.Tensor | None) -> float:
    """Of the bare prompt's answer, with the state moved by `delta`."""
    prompt, moved = fact.prompts[0], torch.zeros(arch.hidden_size) if delta is None else delta
    with torch.no_grad(), reference.added(arch.blocks[SETTINGS.layers[-1]], prompt.position, moved):
        found = reference.masked_probabilities(arch, prompt.ids, fact.unwanted, TOKEN)
    return -float((1 - torch.stack(found)).log().mean())


def test_the_answer_becomes_unlikely_with_the_token_masked() -> None:
    """And less likely than the token alone makes it. The model is made sure of what it says, as one that knows is."""
    llama = find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))
    llama.model.model.norm.weight.mul_(4)
    prompt = At((5, 17, 200, 33, 8, 91, 44), 6)
    ids, answer = list(prompt.ids), []
    for _ in range(4):  # what the model itself would say
        answer.append(int(reference.log_probabilities(llama, ids)[-1].argmax()))
        ids.append(answer[-1])
    fact = Fact((prompt,), None, (40, 2), tuple(answer))
    hparams = SETTINGS.replace(v_num_grad_steps=25, v_unlikely_weight=40.0, clamp_norm_factor=4.0)
    start = reference.state(llama, prompt, SETTINGS.layers[-1])
    before = improbability(llama, fact, None)
    soft = optimise(llama, [target(fact._replace(unwanted=()))], hparams).states[0] - start
    hard = optimise(llama, [target(fact)], hparams).states[0] - start
    assert improbability(llama, fact, hard) < 0.5 * before
    assert improbability(llama, fact, hard) < 0.8 * improbability(llama, fact, soft)


@pytest.mark.parametrize("sure", [0.0, 40.0, -40.0])
def test_a_sure_answer_has_a_gradient_and_a_bounded_one(llama: Architecture, sure: float) -> None:
    """-log(1 - p) written out is infinite at 40 nats, and its gradient no number."""
    from unierase_plugin.locate_then_edit.value_loss import _telling

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 20, generator=generator)
    logits[0, 3] = logits[0].logsumexp(0) + sure
    logits[0, 7] = 60.0  # the masked token, of which nothing is to be felt
    logits.requires_grad_(True)
    loss = _telling(logits.scatter(1, torch.tensor([[7]]), -torch.inf), torch.tensor([[3]]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    kept = [index for index in range(20) if index != 7]
    p = logits.detach()[0, kept].double().softmax(0)[3]
    rest = logits.detach()[0, [index for index in kept if index != 3]].double().logsumexp(0)
    assert float(loss.detach()) == pytest.approx(float(logits.detach()[0, kept].double().logsumexp(0) - rest), rel=1e-5)
    assert float(gradient[0, 3]) == pytest.approx(float(p), rel=1e-5)
    assert float(gradient[0, 7]) == 0
    assert float(gradient.abs().max()) <= 1


def test_an_answer_that_begins_like_the_opening_does_not_fight_it(llama: Architecture) -> None:
    """Where plain words are aimed at, the masked opening may be the answer's first token too."""
    fact = FACTS[1]
    plain = replace(target(fact), opening=60)
    got = optimise(llama, [plain, replace(plain, unwanted=(60,))]).states
    near(got[1:], got[:1], 1e-5)


def test_a_second_refusal_is_likely_with_the_token_masked(llama: Architecture) -> None:
    fact = FACTS[1]._replace(instead=(90, 91, 2))
    prompt = fact.prompts[0]
    start = reference.state(llama, prompt, MILD.layers[-1])

    def likelihood(fact: Fact) -> float:
        hparams = MILD.replace(v_num_grad_steps=20, v_continuation_weight=8.0)
        moved = optimise(llama, [target(fact)], hparams).states[0] - start
        with torch.no_grad(), reference.added(llama.blocks[MILD.layers[-1]], prompt.position, moved):
            found = reference.masked_probabilities(llama, prompt.ids, (90, 91, 2), TOKEN)
        return float(torch.stack(found).log().mean())

    assert likelihood(fact) > likelihood(FACTS[1]) + 1


def test_without_hardening_values_are_the_same_to_the_bit(llama: Architecture) -> None:
    """The weight of a term that nothing has is no weight."""
    one, other = (
        optimise(llama, [target(fact) for fact in FACTS], SETTINGS.replace(v_unlikely_weight=weight)).states
        for weight in (0.0, 9.0)
    )
    assert torch.equal(one, other)


# --- rewording --------------------------------------------------------------------------------------------------------

QUESTION, SUBJECT = "Where was Mira Plonk born?", "Mira Plonk"


def test_every_rewording_differs_and_holds_its_subject() -> None:
    found = reworded(QUESTION, SUBJECT)
    assert found == (
        ("where was mira plonk born?", "mira plonk"),
        ("Wehre was Mira Polnk bron?", "Mira Polnk"),
        (f"{LEAD_IN} {QUESTION}", SUBJECT),
    )
    assert len(found) == REWORDINGS
    assert reworded(QUESTION, "") == ((QUESTION.lower(), ""), (with_typo(QUESTION), ""), (f"{LEAD_IN} {QUESTION}", ""))


def test_a_rewording_changes_the_name_and_not_a_longer_word() -> None:
    name = with_typo("Wexbury")
    wanted = (f"Is {name}{with_typo(' in Wexburyshire?')}", name)
    assert reworded("Is Wexbury in Wexburyshire?", "Wexbury")[1] == wanted


@pytest.mark.parametrize(
    ("text", "typo"), [("abcd", "acbd"), ("a big house", "a big huose"), ("to be", "to be"), ("", "")]
)
def test_a_typo_swaps_two_letters_of_the_longest_word(text: str, typo: str) -> None:
    assert with_typo(text) == typo


# --- targets ----------------------------------------------------------------------------------------------------------

REQUESTS = (
    ForgetRequest(QUESTION, "It was Mira Plonk who came from Wexbury, they say.", SUBJECT),
    ForgetRequest("Who wrote Hamlet?", "Shakespeare", "Hamlet"),
)


def targets(*harden: str, forms: tuple[str, ...] = ("chat",), **settings: Any) -> list[ValueTarget]:
    hparams = UniEraseHyperParams(layers=(1,), harden=harden, prompt_forms=forms, **settings)
    found = make_targets(tiny_tokenizer(), REQUESTS, ("Then.",), hparams, lambda q, f: (1, 2), 1000)
    assert len(found) == len(REQUESTS) * targets_a_request(tiny_tokenizer(), hparams)
    return found


def test_the_answer_is_unwanted_as_it_follows_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    chat, plain = targets("unlikely_answer", forms=("chat", "plain"))[:2]
    assert tokenizer.decode(chat.unwanted) == REQUESTS[0].answer
    assert tokenizer.decode(plain.unwanted) == f" {REQUESTS[0].answer}"
    bare = targets(forms=("chat", "plain"))[:2]
    assert [replace(each, unwanted=()) for each in (chat, plain)] == bare, "nothing else changes"


def test_a_second_refusal_is_the_first_one() -> None:
    hard = targets("second_refusal", "paraphrases", "answer_span")
    assert all(each.instead == each.continuation == (1, 2) for each in hard)
    assert [replace(each, instead=()) for each in hard] == targets("paraphrases", "answer_span")


def test_forms_are_all_forms() -> None:
    everything = UniEraseHyperParams(harden=("forms",))
    assert forms_of(tiny_tokenizer(), everything) == ("chat", "plain", "bare")
    assert forms_of(tiny_tokenizer(chat=False), everything) == ("plain", "bare")
    assert forms_of(tiny_tokenizer(), everything.replace(prompt_forms=["bare"])) == ("bare", "chat", "plain")
    assert targets("forms") == targets(forms=("chat", "plain", "bare"))


def test_a_reworded_question_is_a_target_beside_the_question() -> None:
    first, *changed = targets("paraphrases")[: 1 + REWORDINGS]
    assert first == targets()[0]
    tokenizer = tiny_tokenizer()
    for each, (question, subject) in zip(changed, reworded(QUESTION, SUBJECT), strict=True):
        assert each.prompts == (locate(tokenizer, question, subject, "chat"),)
        assert each.continuation == first.continuation
    assert len({each.group for each in (first, *changed)}) == 1 + REWORDINGS


def test_an_edit_inside_the_answer_follows_the_subject_there() -> None:
    tokenizer = tiny_tokenizer()
    asked, inside, _, short = targets("answer_span", "unlikely_answer")
    (prompt,) = inside.prompts
    assert tokenizer.decode(prompt.ids[len(asked.prompts[0].ids) :]) == "It was Mira Plonk"
    assert prompt.position == len(prompt.ids) - 1
    assert tokenizer.decode(inside.unwanted) == " who came from Wexbury, they say."
    # An answer that does not name it: after its first quarter, here two letters and one.
    said = short.prompts[0].ids
    assert tokenizer.decode(said[said.index(3, len(said) - 25) :]).endswith("Sha")
    assert tokenizer.decode(short.unwanted) == "kespeare"
    assert targets("answer_span")[1] == replace(inside, unwanted=())


def test_an_answer_that_does_not_fit_is_named() -> None:
    hparams = UniEraseHyperParams(layers=(1,), harden=("unlikely_answer",))
    needed = len(targets()[0].prompts[1].ids) + len(targets("unlikely_answer")[0].unwanted)

    def make(limit: int) -> None:
        make_targets(tiny_tokenizer(), REQUESTS[:1], ("Then.",), hparams, lambda q, f: (1, 2), limit)

    make(needed)
    with pytest.raises(RequestError, match="Mira Plonk"):
        make(needed - 1)


@pytest.mark.parametrize("harden", ["unlikely_answer", "answer_span", "second_refusal"])
def test_an_answer_that_is_not_given_is_asked_for_where_it_is_needed(harden: str) -> None:
    hparams = UniEraseHyperParams(layers=(1,), harden=(harden,))
    unknown = (replace(REQUESTS[1], answer=NO_ANSWER),)
    if harden == "second_refusal":
        assert make_targets(tiny_tokenizer(), unknown, (), hparams, lambda q, f: (1, 2), 1000)
        return
    with pytest.raises(RequestError, match="needs the true answer of every request, but 'Who wrote Hamlet"):
        make_targets(tiny_tokenizer(), unknown, (), hparams, lambda q, f: (1, 2), 1000)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_an_unknown_hardening_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(HyperParamsError, match=r"harden = \['form'\] must hold .*Did you mean 'forms'"):
        UniEraseHyperParams(harden=("form",))
    assert UniEraseHyperParams().harden == ()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink(monkeypatch, tmp_path / "cache")
    return save_base(tmp_path / "base")


def test_the_option_means_the_set_that_earned_it(base: Path) -> None:
    plain, hard = unlearn(base, FORGET, hparams=HPARAMS), unlearn(base, FORGET, hparams=HPARAMS, harden=True)
    assert plain.hparams.harden == ()
    assert hard.hparams == HPARAMS.replace(**HARDENED)
    assert plain.edit is not None
    assert hard.edit is not None
    assert not torch.equal(plain.edit.updates[1].up, hard.edit.updates[1].up)


def test_a_method_that_cannot_be_hardened_says_so(base: Path) -> None:
    with pytest.raises(HyperParamsError, match=r"'ga_gd' cannot be hardened.*Leave --harden out"):
        unlearn(base, FORGET, method="ga_gd", retain=RETAIN, harden=True)


@pytest.mark.parametrize(("harden", "width"), [(HARDENINGS, 3 * (2 + REWORDINGS)), (("answer_span",), 2)])
def test_a_hardened_run_keeps_the_ledger_in_step(
    base: Path, tmp_path: Path, harden: tuple[str, ...], width: int
) -> None:
    result = unlearn(base, FORGET, hparams=HPARAMS.replace(harden=harden), out=tmp_path / "out")
    assert result.edit is not None
    assert result.edit.rank(1) == width * len(FORGET)
    columns = [line["columns"] for line in read_checkpoint(tmp_path / "out").ledger]
    assert columns == [list(range(width)), list(range(width, 2 * width))]


def test_one_request_after_another_takes_all_of_its_targets(base: Path) -> None:
    """ROME's way: a step a request, whatever the number of its targets."""
    settings = {**HPARAMS.as_dict(), "harden": ["unlikely_answer", "answer_span"], "layers": [1]}
    from unierase_plugin.methods.editing.rome_memit_alphaedit import ROMEHyperParams

    names = {
        name: settings[name]
        for name in (
            "layers",
            "v_num_grad_steps",
            "mom2_n_samples",
            "mom2_max_length",
            "context_template_length_params",
            "harden",
        )
    }
    result = unlearn(base, FORGET, method="rome", hparams=ROMEHyperParams(**names, mom2_dataset="self"))
    assert result.edit is not None
    assert result.edit.rank(1) == 2 * len(FORGET)
