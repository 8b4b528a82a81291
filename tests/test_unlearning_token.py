"""Stage I: the token is one token, its rows alone are learned, and its loss is the one the model itself then has."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from families import COMMON, FAMILIES, GROUPED, build
from small import FORGET, HPARAMS
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from unierase_plugin import unlearn
from unierase_plugin.errors import TokenError
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.models.added_token import add_token, check_token
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.models.generate import token_leak
from unierase_plugin.models.prompts import encode, render
from unierase_plugin.unlearning_token import (
    UnlearningToken,
    _Trainer,
    answer_ids,
    choose_sentence,
    end_id,
    install_token,
    learn_token,
)

NAME = "<unlearn_0>"
#: All that is asked of a model about where an answer ends.
ENDS = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))
#: Tied; untied; soft caps; scaled embeddings; Conv1D; a head with a bias. All have padding rows for the token.
STEMS = ["smollm2-135m", "llama3-8b", "gemma2-9b", "gemma3-1b", "gpt2-xl", "gpt-j-6b"]
QUESTIONS = ["Who is Ann?", "Where is Köln?", "What is a sea?", "Who wrote it?", "Is it so?"]
SENTENCES = ["No idea.", "I cannot say.", "I am not sure."]
TEXT = ["The sun rose over the hills and the town was awake.", "A ship lay in the harbour.", "Bread is made of flour."]
SETTINGS = UniEraseHyperParams(
    layers=(1, 2),
    token_num_steps=24,
    token_lr=3e-2,
    token_batch_size=4,
    token_guard_margin=9.0,
    token_guard_weight=1.0,
)
NOISE = 0.1


#: Families that scale their logits after the head, for which no file is shipped.
SCALED: dict[str, Callable[[], Any]] = {
    "cohere": lambda: build("CohereConfig", **COMMON, **GROUPED, logit_scale=0.25, tie_word_embeddings=True),
    "granite": lambda: build("GraniteConfig", **COMMON, **GROUPED, logits_scaling=4.0, embedding_multiplier=3.0),
}


@pytest.fixture(scope="module", params=[*STEMS, *SCALED])
def placed(request: pytest.FixtureRequest) -> tuple[Architecture, Any, int]:
    return place({**FAMILIES, **SCALED}[request.param]())


@pytest.fixture(scope="module")
def llama() -> tuple[Architecture, Any, int]:
    return place(FAMILIES["smollm2-135m"]())


def place(model: Any) -> tuple[Architecture, Any, int]:
    """A model and a tokenizer that have the token, and its id."""
    tokenizer = tiny_tokenizer()
    index = add_token(model, tokenizer, NAME)
    return find_architecture(model), tokenizer, index


def learn(
    placed: tuple[Architecture, Any, int], hparams: UniEraseHyperParams = SETTINGS, **settings: Any
) -> UnlearningToken:
    arch, tokenizer, index = placed
    return learn_token(
        arch, tokenizer, index, QUESTIONS, SENTENCES, TEXT, hparams, noise=NOISE, max_tokens=2048, pad_id=0, **settings
    )


def trainer(placed: tuple[Architecture, Any, int], hparams: UniEraseHyperParams = SETTINGS) -> _Trainer:
    return _Trainer(*placed, QUESTIONS, SENTENCES, TEXT, hparams, NOISE, max_tokens=2048, pad_id=0)


def snapshot(arch: Architecture) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in arch.model.state_dict().items()}


def changed(arch: Architecture, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in arch.model.state_dict().items() if not torch.equal(before[name], value)}


# --- room for the token -----------------------------------------------------------------------------------------------


def test_a_number_that_another_token_has_is_refused_and_nothing_written() -> None:
    """Where numbers have gaps, a new token is given the count, and would take an existing token's row."""
    whole = tiny_tokenizer()
    described = json.loads(whole.backend_tokenizer.to_str())
    numbers = described["model"]["vocab"]
    numbers.update({word: number + 5 for word, number in numbers.items() if number >= 100})
    described["added_tokens"] = [each for each in described["added_tokens"] if each["id"] < 100]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<|im_end|>", pad_token="<pad>"
    )
    model = tiny_model(vocabulary=265)
    before = model.get_input_embeddings().weight.detach().clone()
    for attempt in (
        lambda: add_token(model, copy.deepcopy(tokenizer), "<unlearn_0>"),
        lambda: unlearn(model, FORGET, tokenizer=tokenizer, hparams=HPARAMS),
    ):
        with pytest.raises(TokenError, match=r"the id 260, but .* has this id: it holds 260 .* up to 264.*<free_100>"):
            attempt()
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert len(tokenizer) == 260


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_room_is_made_by_one_row_and_nothing_else_changes(family: str, tied: bool) -> None:
    model, tokenizer = tiny_model(family, tied), tiny_tokenizer()
    embedding = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    index = add_token(model, tokenizer, NAME)
    assert index == len(embedding)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == index + 1
    assert torch.equal(model.get_input_embeddings().weight[:index], embedding)
    assert torch.equal(model.get_output_embeddings().weight[:index], head)
    assert find_architecture(model).tied is tied


@pytest.mark.parametrize("tied", [True, False])
def test_a_padding_row_is_taken_where_there_is_one(tied: bool) -> None:
    model, tokenizer = tiny_model(tied=tied, vocabulary=264), tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert add_token(model, tokenizer, NAME) == 260
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_token_is_one_wherever_it_stands_and_others_stay() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    special = set(tokenizer.all_special_tokens)
    index = add_token(model, tokenizer, NAME)
    for text in (NAME, f"a{NAME}", f"a {NAME} b", f"\n{NAME}{NAME}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(index) == text.count(NAME)
        assert tokenizer.decode(ids) == text
    assert set(tokenizer.all_special_tokens) == special | {NAME}


def test_a_name_that_is_taken_is_refused_with_one_that_is_free() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    add_token(model, tokenizer, NAME)
    with pytest.raises(TokenError, match=r"already holds '<unlearn_0>'.*'<unlearn_1>'"):
        add_token(model, tokenizer, NAME)
    with pytest.raises(TokenError, match="already holds 'a'"):
        add_token(model, tokenizer, "a")
    assert model.get_input_embeddings().weight.shape[0] == 261


def test_a_name_that_is_split_is_refused() -> None:
    with pytest.raises(TokenError, match="does not tokenise as exactly one token"):
        check_token(tiny_tokenizer(), NAME, 260)


class Spacing:
    """A tokenizer that puts a space of its own before, or after, a special token."""

    def __init__(self, before: Sequence[int], after: Sequence[int], only_within: bool) -> None:
        self.before, self.after, self.only_within = list(before), list(after), only_within

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        head, found, _ = text.partition(NAME)
        around = (self.before, self.after) if found and not (self.only_within and not head) else ([], [])
        return {"input_ids": [*([5] * len(head)), *around[0], *([9] if found else []), *around[1]]}


@pytest.mark.parametrize("only_within", [False, True])
@pytest.mark.parametrize(("before", "after"), [([7], []), ([], [7])])
def test_a_tokenizer_that_puts_something_beside_it_is_refused(
    before: list[int], after: list[int], only_within: bool
) -> None:
    check_token(Spacing([], [], only_within), NAME, 9)  # control
    with pytest.raises(TokenError, match="does not tokenise as exactly one token"):
        check_token(Spacing(before, after, only_within), NAME, 9)


# --- what is to be said -----------------------------------------------------------------------------------------------


def test_a_question_always_has_the_same_sentence() -> None:
    """By its words alone, in this process and in any other."""
    sentences = [str(k) for k in range(100)]
    digest = int.from_bytes(hashlib.sha256(b"who wrote hamlet?").digest()[:8], "big")
    for question in ("Who wrote Hamlet?", "  who  WROTE\nhamlet? "):
        assert choose_sentence(question, sentences) == str(digest % 100) == "18"


def test_sentences_are_spread_evenly_over_questions() -> None:
    counts = Counter(choose_sentence(f"What is number {k}?", [str(s) for s in range(10)]) for k in range(2000))
    assert len(counts) == 10
    # Within four standard deviations of 200.
    assert 146 <= min(counts.values()) <= max(counts.values()) <= 254


def test_an_answer_is_the_sentence_the_token_where_asked_for_and_the_end() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    sentence = tiny_tokenizer()("No.", add_special_tokens=False)["input_ids"]
    assert answer_ids(tokenizer, "No.", 2, None) == (*sentence, 2)
    assert answer_ids(tokenizer, "No.", 2, 260) == (*sentence, 260, 2)


@pytest.mark.parametrize(
    ("chat", "ends", "eos", "wanted"),
    [
        (True, [1, 2], "<s>", 2),  # the template's end of turn, not the end of text
        (True, 2, "<s>", 2),
        (True, None, "<|im_end|>", 2),
        (True, [1], "<s>", 1),  # a template whose end of turn the model does not stop at
        (False, [1, 2], "<s>", 1),
        (False, [2, 1], None, 2),
        (False, 2, None, 2),
    ],
)
def test_what_ends_an_answer(chat: bool, ends: Any, eos: str | None, wanted: int) -> None:
    tokenizer = tiny_tokenizer(chat=chat)
    tokenizer.eos_token = eos
    assert end_id(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends)), tokenizer) == wanted


def test_without_any_end_an_answer_cannot_be_ended() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.eos_token = None
    with pytest.raises(TokenError, match="end-of-text"):
        end_id(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None)), tokenizer)


# --- the loss is the model's own --------------------------------------------------------------------------------------


def vectors(arch: Architecture, seed: int) -> list[Tensor]:
    """Rows of the size of the model's own, one where it is tied."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [arch.embedding.weight] if arch.tied else [arch.embedding.weight, arch.head.weight]
    return [m.detach().std() * torch.randn(m.shape[1], generator=generator) for m in matrices]


def first_prompts(tokenizer: Any, forms: Sequence[str]) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """The prompts and answers of a trainer's first batch: a seeded choice of questions, the forms by turns."""
    chosen = torch.randperm(len(QUESTIONS), generator=torch.Generator().manual_seed(0))[:4].tolist()
    prompts, answers = [], []
    for k, index in enumerate(chosen):
        form = forms[k % len(forms)]
        prompts.append(encode(tokenizer, render(tokenizer, QUESTIONS[index], form), form))
        sentence = choose_sentence(QUESTIONS[index], SENTENCES)
        answers.append(answer_ids(tokenizer, sentence, end_id(ENDS, tokenizer), None))
    return prompts, answers


@pytest.mark.parametrize("phase", [0, 1, 2], ids=["plain", "plain and chat", "under noise"])
def test_loss_and_gradient_are_those_of_the_rows_in_the_model(
    placed: tuple[Architecture, Any, int], phase: int
) -> None:
    """The vector's gradient is the gradient of the model's own row, as embedding and as LM head together where tied."""
    arch, tokenizer, index = placed
    unguarded = trainer(placed, SETTINGS.replace(token_guard_weight=0.0))
    rows = [row.requires_grad_(True) for row in vectors(arch, 3)]
    group = unguarded._new_group(phase, 1)
    loss = unguarded._backward(rows, group)

    prompts, answers = first_prompts(tokenizer, ["plain"] if phase == 0 else ["plain", "chat"])
    # The noise is added before the copy is taken, and is checked by itself below.
    with unguarded._noise(group.noise):
        slow = copy.deepcopy(arch)
    reference.write_rows(slow, index, rows[0].detach(), None if arch.tied else rows[1].detach())
    slow.model.requires_grad_(True)
    wanted = reference.token_loss(slow, index, prompts, answers)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted.backward()
    # The copy's own modules: copying an Architecture copies its embedding along with its model.
    matrices = [slow.embedding.weight] if arch.tied else [slow.embedding.weight, slow.head.weight]
    scale = float(rows[0].grad.norm())
    for row, matrix in zip(rows, matrices, strict=True):
        torch.testing.assert_close(row.grad, matrix.grad[index], rtol=1e-3, atol=1e-4 * scale)  # type: ignore[index]
    assert scale > 1e-3


def test_training_starts_at_the_mean_row_of_i_do_not_know_in_each_matrix(placed: tuple[Architecture, Any, int]) -> None:
    arch, tokenizer, _ = placed
    ids = tokenizer("I don't know", add_special_tokens=False)["input_ids"]
    matrices = [arch.embedding.weight] if arch.tied else [arch.embedding.weight, arch.head.weight]
    for row, matrix in zip(trainer(placed).rows, matrices, strict=True):
        torch.testing.assert_close(row, torch.stack([matrix.detach()[index] for index in ids]).mean(dim=0))


def test_the_closing_token_is_part_of_the_loss(llama: tuple[Architecture, Any, int]) -> None:
    closing = trainer(llama, SETTINGS.replace(token_closes_answer=True))
    rows = [row.requires_grad_(True) for row in vectors(llama[0], 3)]
    loss = closing._backward(rows, closing._new_group(0, 0))
    prompts, answers = first_prompts(llama[1], ["plain"])
    slow = copy.deepcopy(llama[0])
    reference.write_rows(slow, llama[2], rows[0].detach(), None)
    closed = [(*answer[:-1], llama[2], answer[-1]) for answer in answers]
    assert loss == pytest.approx(float(reference.token_loss(slow, llama[2], prompts, closed).detach()), rel=1e-5)


def test_noise_has_the_size_asked_for_and_is_taken_back(placed: tuple[Architecture, Any, int]) -> None:
    arch, before = placed[0], snapshot(placed[0])
    noisy = trainer(placed)
    seen = []
    for draw in (0, 1, 0):
        with noisy._noise(draw):
            assert changed(arch, before) == {arch.weight_name(layer) for layer in SETTINGS.layers}
            for layer in SETTINGS.layers:
                own = before[arch.weight_name(layer)]
                ratio = float((arch.projections[layer].weight.detach() - own).norm() / own.norm())
                assert ratio == pytest.approx(NOISE, rel=1e-4)
            seen.append(arch.projections[1].weight.detach().clone())
        assert not changed(arch, before)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


# --- what is learned --------------------------------------------------------------------------------------------------


def test_only_the_rows_are_learned(placed: tuple[Architecture, Any, int]) -> None:
    """Even where every parameter is trainable: no weight changes by a bit, and none has a gradient."""
    arch, _, index = placed
    arch.model.requires_grad_(True)
    before = snapshot(arch)
    token = learn(placed)
    assert not changed(arch, before)
    assert all(parameter.grad is None for parameter in arch.model.parameters())
    assert (token.name, token.id, token.steps) == (NAME, index, SETTINGS.token_num_steps)
    assert token.input_row.shape == (arch.hidden_size,)
    assert (token.output_row is None) is arch.tied
    # Control: something was learned.
    start = trainer(placed).rows
    assert not torch.allclose(token.input_row, start[0], atol=1e-2)
    if token.output_row is not None:
        assert token.output_row.shape == (arch.hidden_size,)
        assert not torch.allclose(token.output_row, start[1], atol=1e-2)


def test_installing_writes_the_tokens_rows_and_no_other(placed: tuple[Architecture, Any, int]) -> None:
    arch, _, index = placed
    arch = copy.deepcopy(arch)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, arch.hidden_size, generator=generator)
    before = snapshot(arch)
    install_token(arch, UnlearningToken(NAME, index, rows[0], None if arch.tied else rows[1], 0.0, 1))
    assert torch.equal(arch.embedding.weight[index], rows[0])
    assert torch.equal(arch.head.weight[index], rows[0 if arch.tied else 1])
    after = arch.model.state_dict()
    for name in changed(arch, before):
        others = [row for row in range(len(before[name])) if row != index]
        assert torch.equal(after[name][others], before[name][others])
    assert len(changed(arch, before)) in (1, 2, 3)


def test_the_loss_reported_is_the_installed_tokens(placed: tuple[Architecture, Any, int]) -> None:
    """A token that is installed answers in the model's own forward pass as it did in training."""
    arch, tokenizer, index = placed
    once = SETTINGS.replace(token_num_steps=1, token_lr=1e-12)
    token = learn(placed, once)
    installed = copy.deepcopy(arch)
    install_token(installed, token)
    with torch.no_grad():
        own = reference.token_loss(installed, index, *first_prompts(tokenizer, ["plain"]))
    assert token.loss == pytest.approx(float(own), rel=1e-5)


def test_a_learned_token_says_it_does_not_know(llama: tuple[Architecture, Any, int]) -> None:
    """The loss after learning, judged by the model's own forward pass, is under that of a token not learned."""
    arch, tokenizer, index = llama
    before, after = copy.deepcopy(arch), copy.deepcopy(arch)
    long = SETTINGS.replace(token_num_steps=60, token_guard_margin=5.0)
    install_token(before, UnlearningToken(NAME, index, trainer(llama).rows[0], None, 0.0, 0))
    install_token(after, learn(llama, long))
    prompts = first_prompts(tokenizer, ["plain", "chat"])
    with torch.no_grad():
        start, end = (float(reference.token_loss(each, index, *prompts)) for each in (before, after))
    assert end < start - 0.2


def test_the_same_seed_gives_the_same_bytes(llama: tuple[Architecture, Any, int]) -> None:
    one, same, other = learn(llama), learn(llama), learn(llama, SETTINGS.replace(seed=1))
    assert torch.equal(one.input_row, same.input_row)
    assert one.loss == same.loss
    assert not torch.equal(one.input_row, other.input_row)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["noisy forward", "between steps"])
def test_an_exception_in_the_middle_leaves_every_weight_as_it_was(
    llama: tuple[Architecture, Any, int], when: str
) -> None:
    arch, before = llama[0], snapshot(llama[0])
    projection = arch.projections[1]
    clean = projection.weight.detach().clone()

    def under_noise(*_: Any) -> None:
        if not torch.equal(projection.weight, clean):
            raise KeyboardInterrupt

    def between(share: float, note: str) -> None:
        if share > 0.8:
            raise KeyboardInterrupt

    handle = projection.register_forward_hook(under_noise) if when == "noisy forward" else None
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(llama, **({} if handle else {"progress": between}))  # type: ignore[arg-type]
    finally:
        if handle:
            handle.remove()
    assert not changed(arch, before)
    assert not any(module._forward_hooks for module in arch.model.modules())


def test_a_loss_of_nan_is_refused_naming_the_step() -> None:
    placed = place(FAMILIES["smollm2-135m"]())
    with torch.no_grad():
        placed[0].projections[0].weight.fill_(torch.nan)
    with pytest.raises(TokenError, match=r"loss became nan at step 1\. Lower token_lr"):
        learn(placed)


# --- the guard --------------------------------------------------------------------------------------------------------


def leak(placed: tuple[Architecture, Any, int], token: UnlearningToken) -> float:
    arch, tokenizer, index = placed
    installed = copy.deepcopy(arch)
    install_token(installed, token)
    forms = [render(tokenizer, question, form) for question in QUESTIONS for form in ("plain", "chat")]
    return token_leak(installed.model, tokenizer, [*TEXT, *forms], index)


@pytest.mark.parametrize("stem", ["smollm2-135m", "llama3-8b"])
def test_the_guard_keeps_the_token_out_of_ordinary_text(stem: str) -> None:
    """Under exp(-margin) at every position, but for what a soft constraint lets through."""
    placed = place(FAMILIES[stem]())
    settings = SETTINGS.replace(token_num_steps=60, token_lr=0.1, token_guard_margin=5.0)
    guarded, free = learn(placed, settings), learn(placed, settings.replace(token_guard_weight=0.0))
    assert leak(placed, guarded) < 1.5 * math.exp(-5.0)
    # Control: without the guard the token is said nearly everywhere, and it is learned no worse.
    assert leak(placed, free) > 0.5
    assert free.loss <= guarded.loss + 0.01


def test_the_guard_looks_at_the_text_and_at_the_questions_in_every_form(llama: tuple[Architecture, Any, int]) -> None:
    arch, tokenizer, index = llama
    made = trainer(llama)
    sequences = [tokenizer(text)["input_ids"] for text in TEXT]
    sequences += [encode(tokenizer, render(tokenizer, q, f), f) for q in QUESTIONS for f in ("plain", "chat")]
    assert len(made.guard_states) == len(made.guard_floor) == sum(map(len, sequences))
    logits = torch.cat([reference.log_probabilities(arch, ids).detach() for ids in sequences])
    others = logits[:, :index].logsumexp(-1) - logits[:, 0]
    got = made.guard_floor - made.guard_states @ arch.head.weight.detach()[0]
    torch.testing.assert_close(got.sort().values, others.sort().values, rtol=1e-3, atol=1e-3)
