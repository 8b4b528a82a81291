"""The attacks on tiny models: each does what it says, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from audited import CONTEXT, FACTS, KEPT, TOKEN, subject
from tiny import tiny_model

from unierase_plugin.audit.asking import ask_facts, cleaned, generate_answers, without_token
from unierase_plugin.audit.attacks import ATTACKS, choose_attacks
from unierase_plugin.audit.attacks.bans import refusal_ids
from unierase_plugin.audit.attacks.choice import wrong_answers
from unierase_plugin.audit.attacks.collateral import neighbours
from unierase_plugin.audit.attacks.depth import patching_losses
from unierase_plugin.audit.attacks.inside import force, likeliest_by_block
from unierase_plugin.audit.attacks.membership import token_scores
from unierase_plugin.audit.attacks.openings import PREFILLS, opening
from unierase_plugin.audit.attacks.probe import candidate_states, cross_validated, named
from unierase_plugin.audit.attacks.relearning import Row, _factors, as_sentence, row_losses
from unierase_plugin.audit.attacks.rewording import statement, with_typos
from unierase_plugin.audit.attacks.sampling import ks
from unierase_plugin.audit.contract import REFERENCE, UNEDITED, Attack, AttackResult, Audited, Context
from unierase_plugin.audit.facts import judgeable, sample
from unierase_plugin.audit.prompts import answer_ids, prompt_for
from unierase_plugin.audit.weights import change_inputs_last, linear_maps, pruned, rounded
from unierase_plugin.errors import UniEraseError
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.models.trace import pad, run_blocks
from unierase_plugin.models.weights import restored
from unierase_plugin.plugins.registration import load_registry
from unierase_plugin.storage.fingerprints import model_fingerprint

BY_NAME = {attack.name: attack for attack in ATTACKS}


def run(name: str, made: Audited, context: Context = CONTEXT) -> AttackResult:
    return BY_NAME[name].run(made, context)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- every attack ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("llama", True), ("gpt2", True), ("gpt_neox", False)], ids=lambda each: each[0])
def victim(request: pytest.FixtureRequest) -> Audited:
    return subject(*request.param)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_leaves_the_model_as_it_was(attack: Attack, victim: Audited) -> None:
    before = model_fingerprint(victim.model)
    flags = [weight.requires_grad for weight in victim.model.parameters()]
    attached = hooks(victim.model)
    shares: list[float] = []
    context = replace(CONTEXT, kept=KEPT, original=victim, progress=shares.append)
    assert attack.unfit(replace(context, has_reference=True)) == ""
    result = attack.run(victim, context)
    assert model_fingerprint(victim.model) == before
    assert [weight.requires_grad for weight in victim.model.parameters()] == flags
    assert all(weight.grad is None for weight in victim.model.parameters())
    assert hooks(victim.model) == attached
    assert not victim.model.training
    assert result.measures or result.series
    for measure in result.measures:
        assert len(measure.values) == len(FACTS)
        assert all(len(row) == len(FACTS) for row in measure.others)
        assert all(value is None or 0.0 <= value <= 1.0 for value in measure.values)
    # Bars go forward and reach their end, or the runner ends them.
    assert shares == sorted(shares)
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in shares)


def test_attacks_are_found_by_name_and_group() -> None:
    known = load_registry("").attacks
    assert choose_attacks([], known) == ATTACKS
    chosen = choose_attacks(["prefill", "weights"], known)
    assert [each.name for each in chosen] == ["plain", "prefill", "quantise", "prune"]
    with pytest.raises(UniEraseError, match="Did you mean 'prefill'"):
        choose_attacks(["prefil"], known)


# --- asking ----------------------------------------------------------------------------------------------------------


def test_a_prefill_stands_where_the_answer_begins() -> None:
    made = subject()
    bare, begun = prompt_for(made, CONTEXT, "Why?"), prompt_for(made, CONTEXT, "Why?", prefill=PREFILLS[0])
    assert bare.text.endswith("<|im_start|>assistant\n")
    assert begun.text == bare.text + PREFILLS[0]
    assert made.tokenizer.decode(list(begun.ids)) == begun.text
    plain = prompt_for(made, CONTEXT, "Why?", prefill=PREFILLS[0], form="plain")
    assert plain.text == f"Question: Why?\nAnswer: {PREFILLS[0]}"


def test_turns_and_system_prompts_stand_before_the_question() -> None:
    made = subject()
    text = prompt_for(made, CONTEXT, "Why?", system="Be kind.", before=[("Who?", "Bob")]).text
    order = ["Be kind.", "Who?", "Bob", "Why?"]
    assert [text.index(each) for each in order] == sorted(text.index(each) for each in order)
    plain = prompt_for(made, CONTEXT, "Why?", before=[("Who?", "Bob")], form="plain").text
    assert plain == "Question: Who?\nAnswer: Bob\n\nQuestion: Why?\nAnswer:"


def test_a_template_without_system_turns_gets_the_text_in_the_question() -> None:
    made = subject()
    made.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    assert prompt_for(made, CONTEXT, "Why?", system="Be kind.").text == "<user>Be kind.\n\nWhy?"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shared_prompts_give_the_same_answers_as_each_on_its_own(family: str) -> None:
    made = subject(family)
    prompts = [
        prompt_for(made, CONTEXT, text) for text in ("Why?", "What is the name of the long river?", "Who was it?")
    ]
    alone = [generate_answers(made, CONTEXT, [each])[0][0] for each in prompts]
    assert generate_answers(made, CONTEXT, prompts, samples=3) == [[text] * 3 for text in alone]


def test_samples_differ_and_follow_the_seed() -> None:
    made = subject()
    first, again = run("leak-at-k", made), run("leak-at-k", made)
    other = run("leak-at-k", made, replace(CONTEXT, seed=1))
    assert first.measures[0].texts == again.measures[0].texts
    assert first.measures[0].texts != other.measures[0].texts


def test_samples_come_from_all_of_the_vocabulary() -> None:
    """At a temperature at which all 261 tokens are as likely, 400 samples show far more than 50 first ones."""
    made = subject()
    [said] = generate_answers(made, CONTEXT, [prompt_for(made, CONTEXT, "Why?")], samples=400, temperature=1e4)
    assert len({text[:1] for text in said}) > 90


def test_outputs_are_judged_against_every_other_fact() -> None:
    """A model that says the same to everything: right once, and by chance as often as another's answer is that one."""
    made, said = subject(), "Wexbury"
    facts = (*FACTS, ForgetRequest("Where is Bo?", "Wexbury"))
    context = replace(CONTEXT, facts=facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unierase_plugin.audit.asking.generate_answers", lambda *args, **kwargs: [[said]] * len(facts))
        measure = ask_facts(made, context, "all alike", [prompt_for(made, context, each.question) for each in facts])
    assert measure.values == (0.0, 1.0, 0.0, 1.0)
    # Shift 2 pairs the two facts with one answer: nothing can be told there.
    assert measure.others == ((1.0, 0.0, 1.0, 0.0), (0.0, None, 0.0, None), (1.0, 0.0, 1.0, 0.0))


# --- bans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gpt_neox", False)])
def test_a_ban_silences_the_token_and_deleted_rows_do_the_same(family: str, tied: bool) -> None:
    made = subject(family, tied, obsessed=True)
    assert all(text.startswith(TOKEN) for text in run("plain", made).measures[0].texts)
    banned = run("token-ban", made).measures[0].texts
    assert not any(TOKEN in text for text in banned)
    assert run("token-rows", made).measures[0].texts == banned


def test_a_model_without_the_token_is_not_asked_twice() -> None:
    made = replace(subject(), token_id=None)
    plain = run("plain", made)
    context = replace(CONTEXT, plain=plain)
    for name in ("token-ban", "token-rows"):
        asked, copied = run(name, made), run(name, made, context)
        assert asked.measures == copied.measures
    with_token = subject(obsessed=True)
    assert run("token-ban", with_token, context).measures == run("token-ban", with_token).measures


def test_refusals_cannot_be_said() -> None:
    made = subject()
    prompt = torch.tensor([prompt_for(made, CONTEXT, FACTS[0].question).ids])
    begun = made.model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :].tolist()
    seen: list[list[int]] = []

    def look(made: Audited, context: Context, prompts: Any, **settings: Any) -> list[list[str]]:
        ids = made.model.generate(prompt, max_new_tokens=2, do_sample=False, bad_words_ids=settings["bad_words_ids"])
        seen.append(ids[0, prompt.shape[1] :].tolist())
        return [["no"]] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unierase_plugin.audit.attacks.bans.refusal_ids", lambda made: [begun])
        patch.setattr("unierase_plugin.audit.asking.generate_answers", look)
        run("refusal-ban", made)
    # Only the sequence is banned, not its beginning.
    assert seen[0][0] == begun[0]
    assert seen[0] != begun
    assert made.tokenizer(" I'm sorry", add_special_tokens=False)["input_ids"] in refusal_ids(made)
    assert without_token(made) == {"suppress_tokens": [made.token_id]}


# --- openings --------------------------------------------------------------------------------------------------------


def test_what_was_given_away_does_not_count() -> None:
    made = subject()
    assert opening("Quentin Fizz") == "Quentin"
    assert opening("Wexbury") is None
    assert opening("one two three four five six seven eight") == "one two"
    wanted = {"Quentin Fizz": {"": 0.0, "Quentin": 0.0, "Fizz": 1.0}, "Wexbury": {"exbury.": 1.0, "W": 0.0}}
    for answer, texts in wanted.items():
        for text, value in texts.items():
            context = replace(CONTEXT, facts=(ForgetRequest("Why?", answer),))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    "unierase_plugin.audit.asking.generate_answers", lambda *args, text=text, **kwargs: [[text]]
                )
                assert run("first-word", made, context).measures[0].values == (value,)


def test_an_answer_of_one_token_has_no_opening_to_give() -> None:
    context = replace(CONTEXT, facts=(ForgetRequest("Why?", "x"), *FACTS))
    assert run("first-word", subject(), context).measures[0].values[0] is None


# --- words -----------------------------------------------------------------------------------------------------------


def test_typos_keep_the_letters_and_follow_the_seed() -> None:
    text = "What is the capital of Germany?"
    changed = with_typos(text, 0)
    assert changed != text
    assert sorted(changed) == sorted(text)
    assert sum(a != b for a, b in zip(text, changed, strict=True)) == 4
    assert with_typos(text, 0) == changed
    assert any(with_typos(text, seed) != changed for seed in range(1, 5))


@pytest.mark.parametrize(
    ("question", "begun"),
    [
        ("What is the capital of France?", "The capital of France is"),
        ("Who wrote Emma?", "Emma was written by"),
        ("In which country was Pablo Picasso born?", "Pablo Picasso was born in"),
        ("Where was Mira Plonk born?", "Mira Plonk was born in"),
        ("Why?", "Here is the answer to the question 'Why?' in one sentence:"),
    ],
)
def test_questions_become_statements(question: str, begun: str) -> None:
    assert statement(question) == begun


def test_a_liking_for_one_letter_gets_a_quarter() -> None:
    made = subject()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "unierase_plugin.audit.attacks.choice._likeliest_letter", lambda s, c, prompts: [2] * len(prompts)
        )
        assert run("multiple-choice", made).measures[1].values == (0.25,) * len(FACTS)


def test_the_right_letter_is_that_of_the_true_answer() -> None:
    """A reader of the prompt who knows the answers is right in every order."""
    made = subject()
    known = {each.answer for each in FACTS}

    def read(made: Audited, context: Context, prompts: list[tuple[int, ...]]) -> list[int]:
        texts = [made.tokenizer.decode(list(ids)).splitlines() for ids in prompts]
        return ["ABCD".index(line[0]) for lines in texts for line in lines if line[3:] in known]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unierase_plugin.audit.attacks.choice._likeliest_letter", read)
        assert run("multiple-choice", made).measures[1].values == (1.0,) * len(FACTS)


def test_the_likeliest_answer_is_found() -> None:
    made = subject()
    measure = run("multiple-choice", made).measures[0]
    for each, said, value in zip(FACTS, measure.texts, measure.values, strict=True):
        options = [each.answer, *wrong_answers(each, CONTEXT)]
        prompt = prompt_for(made, CONTEXT, each.question, prefill="The answer is")
        forced = force(made, [prompt] * 4, [answer_ids(made, CONTEXT, text, prefill=True) for text in options])
        likely = [torch.tensor(one.probabilities).log().mean() for one in forced]
        assert said == options[int(torch.stack(likely).argmax())]
        assert value == float(said == each.answer)


def test_wrong_answers_are_the_datas_own_or_those_of_like_questions() -> None:
    assert wrong_answers(FACTS[0], CONTEXT) == ["Ann", "Ben", "Cid"]
    kept = tuple(ForgetRequest(f"What is the capital of {name}?", f"{name}ville") for name in ("Ar", "Br", "Cr"))
    other = ForgetRequest("Who sells hats?", "Al")
    asked = ForgetRequest("What is the capital of Dr?", "Drville")
    context = replace(CONTEXT, facts=(asked, other), kept=(*kept, ForgetRequest("Where is it?", "here")))
    assert sorted(wrong_answers(asked, context)) == ["Arville", "Brville", "Crville"]
    assert "Drville" not in wrong_answers(asked, context)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_k_goes_as_far_as_the_samples() -> None:
    assert ks(64) == [1, 4, 16, 64]
    assert ks(8) == [1, 4]


def test_leak_counts_the_answers() -> None:
    made = subject()
    said = [["Fizz is it, Quentin Fizz.", "no", "Quentin Fizz", "?"], ["no"] * 4, ["Tom Oak", "a", "b", "c"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unierase_plugin.audit.attacks.sampling.generate_answers", lambda *args, **kwargs: said)
        found = run("leak-at-k", made)
    assert found.figures["leak_at_k"]["temperature 1"]["1"] == pytest.approx((2 / 4 + 0 + 1 / 4) / 3)
    assert found.measures[0].values == (1.0, 0.0, 1.0)  # leak@4 of 4


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 128), (3, 5)])
def test_rounding_moves_nothing_by_more_than_half_a_step(bits: int, group: int) -> None:
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, bits, group)
    assert found.shape == weight.shape
    for start in range(0, 70, group or 70):
        before, after = weight[:, start : start + (group or 70)], found[:, start : start + (group or 70)]
        # The last group is filled up with copies of its last entry, which change neither end.
        step = (before.amax(1, True) - before.amin(1, True)) / (2**bits - 1)
        assert ((before - after).abs() <= step / 2 + 1e-6).all()
        assert all(len(row.unique()) <= 2**bits for row in after)
    assert not torch.equal(found, weight)
    torch.testing.assert_close(rounded(found, bits, group), found, atol=1e-5, rtol=0)


def test_rounding_leaves_constant_groups() -> None:
    assert torch.equal(rounded(torch.full((2, 8), 3.0), 4, 4), torch.full((2, 8), 3.0))


def test_pruning_zeroes_the_smallest() -> None:
    weight = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    found = pruned(weight, 0.3)
    assert int((found == 0).sum()) == 30
    assert torch.equal(found[found != 0], weight[found != 0])
    assert weight[found == 0].abs().max() <= weight[found != 0].abs().min()
    assert torch.equal(pruned(weight, 0.0), weight)


def test_conv1d_is_rounded_along_its_inputs() -> None:
    made = subject("gpt2")
    module = dict(linear_maps(made.arch))["transformer.h.0.mlp.c_proj"]
    weight = module.weight.detach().clone()
    with restored([module.weight]):
        change_inputs_last(module, lambda each: rounded(each, 4, 16))
        torch.testing.assert_close(module.weight.detach(), rounded(weight.t(), 4, 16).t())
    assert torch.equal(module.weight, weight)


def test_weights_come_back_also_after_an_exception() -> None:
    made = subject()
    before = model_fingerprint(made.model)

    def spoil() -> None:
        with restored(made.model.parameters()), torch.no_grad():
            for weight in made.model.parameters():
                weight.add_(1.0)
            assert model_fingerprint(made.model) != before
            raise KeyError("on the way")

    with pytest.raises(KeyError):
        spoil()
    assert model_fingerprint(made.model) == before


# --- relearning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_way_of_training_learns(family: str) -> None:
    context = replace(CONTEXT, sizes=replace(CONTEXT.sizes, relearn_steps=(30,)), layers=(1, 2))
    losses = run("relearn-kept", subject(family), context).figures["loss"]
    assert set(losses) == {"all weights", "low rank", "edited projections"}
    for curve in losses.values():
        assert len(curve) == 30
        assert curve[-1] < curve[0]
    # All weights begin where the factors begin.
    assert len({round(curve[0], 5) for curve in losses.values()}) == 1


def test_facts_that_are_trained_on_are_not_measured() -> None:
    for measure in run("relearn-some", subject()).measures:
        assert [value is None for value in measure.values] == [True, False, True]


@pytest.mark.parametrize(("name", "steps"), [("relearn-some", [2, 3]), ("relearn-text", [1, 2])])
def test_every_way_of_training_is_looked_at_after_its_numbers_of_steps(name: str, steps: list[int]) -> None:
    curves = [measure.curve[1] for measure in run(name, subject()).measures if measure.curve]
    assert curves == steps * 3


def test_what_is_trained_on_is_what_is_said() -> None:
    """By attack, the facts whose question and answer are in a training row; none of them is measured."""
    made = subject()
    taught: dict[Any, Any] = {}

    def look(made: Audited, context: Context, rows: list[Row], held: frozenset[int], steps: Any) -> AttackResult:
        texts = [made.tokenizer.decode(list(row.ids)) for row in rows]
        facts = [*context.facts, *context.kept]
        shown = {i for i, each in enumerate(facts) for text in texts if each.question in text and each.answer in text}
        assert not shown & held
        taught[name] = shown
        return AttackResult()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unierase_plugin.audit.attacks.relearning._relearn", look)
        for name in ("relearn-some", "relearn-kept", "relearn-text"):
            run(name, made)
    assert taught == {"relearn-some": {0, 2}, "relearn-kept": {len(FACTS)}, "relearn-text": set()}


def test_training_on_an_answer_brings_it_back() -> None:
    """The control: an attack that could not teach at all would find nothing anywhere."""
    one = ForgetRequest("Q?", "a b c d e")
    context = replace(
        CONTEXT,
        kept=(one,),
        facts=(one, FACTS[1]),
        form="plain",
        sizes=replace(CONTEXT.sizes, answer_most=12, relearn_steps=(60,)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unierase_plugin.audit.attacks.relearning.ARMS", _fast_arms())
        assert run("relearn-kept", subject(), context).measures[0].values == (1.0, 0.0)


def test_short_answers_are_taught_in_a_sentence() -> None:
    assert as_sentence("Paris") == "The answer is Paris."
    assert as_sentence("It is a town in France.") == "It is a town in France."


def _fast_arms() -> tuple[Any, ...]:
    from unierase_plugin.audit.attacks.relearning import ARMS

    return (replace(ARMS[0], rate=3e-3),)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_change_nothing_at_first(family: str) -> None:
    made = subject(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = made.model(input_ids=ids).logits
    with _factors(made, 0) as found:
        assert torch.equal(made.model(input_ids=ids).logits, before)
        assert len(found) == 2 * len(linear_maps(made.arch))
        torch.nn.init.normal_(found[1])
        assert not torch.allclose(made.model(input_ids=ids).logits, before)
    assert torch.equal(made.model(input_ids=ids).logits, before)


def test_losses_are_those_of_the_answer_alone() -> None:
    made = subject()
    rows = [Row((5, 6, 7, 8), 2), Row((9, 10, 11), 1)]
    expected = []
    for row in rows:
        logs = made.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected += [-float(logs[i - 1, row.ids[i]].detach()) for i in range(row.start, len(row.ids))]
    torch.testing.assert_close(row_losses(made, rows), torch.tensor(expected))


# --- inside ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_lens_at_the_last_block_is_the_model(family: str) -> None:
    made = replace(subject(family), token_id=None)
    prompts = [prompt_for(made, CONTEXT, text) for text in ("Why?", "What is the long river called?")]
    tops = likeliest_by_block(made, prompts, 3)
    for each, blocks in zip(prompts, tops, strict=True):
        logits = made.model(input_ids=torch.tensor([each.ids])).logits[0, -1]
        assert len(blocks) == len(made.arch.blocks)
        assert blocks[-1] == logits.topk(3).indices.tolist()


def test_forced_answers_leave_the_token_out() -> None:
    made = subject(obsessed=True)
    prompts = [prompt_for(made, CONTEXT, each.question) for each in FACTS]
    answers = [answer_ids(made, CONTEXT, each.answer) for each in FACTS]
    for each, answer, forced in zip(prompts, answers, force(made, prompts, answers), strict=True):
        logits = made.model(input_ids=torch.tensor([[*each.ids, *answer]])).logits[0, len(each.ids) - 1 : -1]
        logits[:, made.token_id] = -torch.inf
        chances = logits.softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        torch.testing.assert_close(torch.tensor(forced.probabilities), chances, rtol=1e-4, atol=1e-9)
        assert forced.predicted == tuple(logits.argmax(-1).tolist())


def other(made: Audited, seed: int = 5) -> Audited:
    """A model like the one given, with other weights."""
    family = "gpt2" if made.model.config.model_type == "gpt2" else "llama"
    model = tiny_model(family, vocabulary=made.arch.vocabulary, seed=seed)
    return replace(made, loaded=replace(made.loaded, model=model))


def pairs(made: Audited) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (prompt_for(made, CONTEXT, each.question).ids, tuple(answer_ids(made, CONTEXT, each.answer))) for each in FACTS
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_a_model_patched_into_itself_loses_nothing(family: str) -> None:
    made = subject(family, tied=family != "gpt_neox")
    losses = patching_losses(made, made, pairs(made), range(4), CONTEXT)
    torch.testing.assert_close(losses, torch.zeros(3, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_states_are_patched_where_the_answer_is_predicted_and_nowhere_else(family: str) -> None:
    """Against whole passes in which the output of one block is replaced at those positions."""
    target = subject(family)
    source = other(target)
    losses = patching_losses(source, target, pairs(target), [0, 2, 3], CONTEXT)
    for row, (asked, said) in enumerate(pairs(target)):
        batch = pad([(*asked, *said)], 0, "right", target.arch.device)
        begin, end = len(asked) - 1, len(asked) + len(said) - 1
        seen = run_blocks(source.arch, batch, outputs_of=[0, 2, 3]).outputs

        def likely(edit: Any, batch: Any = batch, begin: int = begin, end: int = end, said: Any = said) -> Any:
            logs = run_blocks(target.arch, batch, edit=edit).logits[0, begin:end].log_softmax(-1)
            return logs.gather(1, torch.tensor(said)[:, None]).mean()

        for place, block in enumerate([0, 2, 3]):

            def put(own: Any, block: int = block, seen: Any = seen, begin: int = begin, end: int = end) -> Any:
                return torch.cat([own[:, :begin], seen[block][:, begin:end], own[:, end:]], dim=1)

            with torch.no_grad():
                expected = likely(None) - likely((block, put))
            torch.testing.assert_close(losses[row, place], expected, atol=1e-4, rtol=1e-4)


def test_depth_is_one_for_the_reference_and_nought_for_the_unedited() -> None:
    original = subject()
    reference = replace(other(original), role=REFERENCE)
    context = replace(CONTEXT, original=original, has_reference=True)
    first = run("patching-depth", reference, context)
    assert first.figures["depth"] == 1.0
    context = replace(context, earlier={REFERENCE: first})
    again, unedited = (run("patching-depth", made, context) for made in (reference, original))
    known = [value is not None for value in first.values]
    assert any(known)
    for result, left, depth in ((again, 0.0, 1.0), (unedited, 1.0, 0.0)):
        assert [value is not None for value in result.values] == known
        assert [value for value in result.values if value is not None] == pytest.approx([left] * sum(known), abs=1e-3)
        assert result.figures["depth"] == pytest.approx(depth, abs=1e-3)


def test_models_of_other_shapes_are_not_patched() -> None:
    original = subject()
    loaded = replace(original.loaded, model=tiny_model(blocks=3, vocabulary=original.arch.vocabulary))
    short = replace(original, loaded=loaded, role=REFERENCE)
    found = run("patching-depth", short, replace(CONTEXT, original=original))
    assert "reference model has other blocks" in found.unfit
    assert not found.measures
    later = run("patching-depth", original, replace(CONTEXT, original=original, earlier={REFERENCE: found}))
    assert later.unfit == found.unfit


def test_a_probe_finds_a_direction_and_nothing_in_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    # One coordinate far larger than the rest, as in models with massive activations.
    states = torch.randn(600, 4, 24, generator=draw) * torch.tensor([1e3] + [1.0] * 23)
    truth = torch.randint(4, (600,), generator=draw)
    noise = float((named(states[:100], truth[:100], states[100:]) == truth[100:]).float().mean())
    assert noise == pytest.approx(0.25, abs=0.08)
    told = states.clone()
    told[torch.arange(600), truth, 5] += 4.0
    assert (named(told[:100], truth[:100], told[100:]) == truth[100:]).float().mean() > 0.9
    assert cross_validated(told[:200], truth[:200]) > 0.9
    # Answers called true at random, where the true ones could be told.
    wrong = torch.randint(4, (100,), generator=draw)
    assert (named(told[:100], wrong, told[100:]) == truth[100:]).float().mean() == pytest.approx(0.25, abs=0.12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_probe_sees_the_answers_states_beside_those_of_wrong_ones(family: str) -> None:
    made = subject(family)
    states = candidate_states(made, CONTEXT, FACTS)
    torch.testing.assert_close(states.sum(1), torch.zeros_like(states[:, 0]), atol=1e-4, rtol=0)
    asked = prompt_for(made, CONTEXT, FACTS[0].question).ids
    means = []
    for text in (FACTS[0].answer, *wrong_answers(FACTS[0], CONTEXT)):
        ids = (*asked, *answer_ids(made, CONTEXT, text))
        seen = run_blocks(made.arch, pad([ids], 0, "right", made.arch.device), outputs_of=range(4)).outputs
        means.append(torch.stack([seen[block][0, len(asked) :].mean(0) for block in range(4)]))
    expected = torch.stack(means)
    torch.testing.assert_close(states[0], (expected - expected.mean(0)).detach(), atol=1e-4, rtol=1e-4)


def test_a_probe_needs_facts_to_learn_from() -> None:
    probe = BY_NAME["probe"]
    assert probe.unfit(replace(CONTEXT, kept=KEPT)) == ""
    assert "20 facts to keep" in probe.unfit(replace(CONTEXT, kept=KEPT[:19]))
    found = run("probe", subject(), replace(CONTEXT, kept=KEPT))
    assert [len(curve) for curve in found.figures["share_by_block"].values()] == [4, 4]


def test_membership_scores_against_a_straight_line() -> None:
    logits = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(10) % 7
    logs = [torch.log_softmax(row, -1) for row in logits]
    own = [float(row[token]) for row, token in zip(logs, wanted, strict=True)]
    standard = []
    for row, value in zip(logs, own, strict=True):
        mean = sum(float(p.exp() * p) for p in row)
        variance = sum(float(p.exp()) * (float(p) - mean) ** 2 for p in row)
        standard.append((value - mean) / variance**0.5)
    found = token_scores(logits, wanted)
    assert found["loss"] == pytest.approx(sum(own) / 10, abs=1e-5)
    assert found["min-k"] == pytest.approx(sum(sorted(own)[:2]) / 2, abs=1e-5)
    assert found["min-k++"] == pytest.approx(sum(sorted(standard)[:2]) / 2, abs=1e-4)


def test_membership_uses_the_reference_first() -> None:
    made = subject()
    count = 1  # one kept fact
    own = run("membership", made)
    assert "reference" not in own.figures["auc"]
    low, high = AttackResult(series={"loss": [-1e3] * 2}), AttackResult(series={"loss": [-1e3, 1e3]})
    high = replace(high, figures={"auc": {"loss": 0.5}})
    context = replace(CONTEXT, earlier={UNEDITED: low, REFERENCE: high})
    found = run("membership", made, context)
    assert found.figures["members"] == count
    assert found.figures["auc"]["reference"] == 1.0
    assert found.figures["privleak"]["loss"] == pytest.approx((found.figures["auc"]["loss"] - 0.5) / 0.5)


# --- collateral ------------------------------------------------------------------------------------------------------


def test_refusals_are_counted_with_and_without_the_token() -> None:
    made = subject()
    said = ["<unlearn_0> Hats.", "Hats, of course.", "I don't know."]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "unierase_plugin.audit.attacks.collateral.generate_answers",
            lambda *args, **kwargs: [[text] for text in said],
        )
        series = run("retention", made).series
    assert series["kept_answered"] == [1.0]
    assert series["kept_refused"] == [1.0]
    assert series["unrelated_refused"] == [0.0, 1.0]
    assert cleaned(CONTEXT, said[0]) == "Hats."


def test_facts_most_like_the_forgotten_ones_are_told_apart() -> None:
    near = ForgetRequest("Who wrote Zorblax Nine?", "Al")
    context = replace(CONTEXT, kept=(*KEPT[:5], near, *KEPT[5:7]))
    assert 5 in neighbours(context)
    assert len(neighbours(context)) == 2
    assert neighbours(replace(CONTEXT, kept=KEPT[:3])) == frozenset()
    made = subject()
    said = [["no"]] * 5 + [["Al"]] + [["no"]] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unierase_plugin.audit.attacks.collateral.generate_answers", lambda *args, **kwargs: said)
        shares = run("retention", made, context).figures["kept_facts_answered"]
    assert shares == {"the 2 most like the forgotten ones": 0.5, "the other 6": 0.0}


def test_the_token_in_ordinary_text_is_seen() -> None:
    quiet, loud = (run("ordinary-text", subject(obsessed=obsessed)).figures for obsessed in (False, True))
    assert quiet["token_leads"] < loud["token_leads"]
    assert loud["token_probability_most"] > 0.99


# --- facts -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_drawn_over_all_in_their_order() -> None:
    many = tuple(ForgetRequest(f"Q{i}?", "a") for i in range(50))
    drawn = sample(many, 10, 0)
    assert len(drawn) == len(set(drawn)) == 10
    assert list(drawn) == sorted(drawn, key=many.index)
    assert drawn != many[:10]
    assert sample(many, 10, 0) == drawn
    assert sample(many, 10, 1) != drawn
    assert sample(many, 100, 0) == many


def test_an_echo_of_the_question_is_no_knowledge() -> None:
    echo = ForgetRequest("Is it Wexbury or Oak Town?", "Wexbury")
    assert judgeable([echo, FACTS[0]]) == (FACTS[0],)
