"""Where a fact is held: the token that ends the subject's last occurrence, whatever the text, template or tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from unierase_plugin.errors import RequestError
from unierase_plugin.locate_then_edit.positions import Prompt, locate, locate_in_text
from unierase_plugin.models.examples import answered
from unierase_plugin.models.prompts import begun, closing, encode, has_chat_template, render

TEXTS = [
    "Where was Ada Lovelace born, and where did Ada Lovelace die?",
    "What did Jürgen Müller paint in Köln?",
    "谁写了《红楼梦》?",
    "What does 👩‍🚀 mean? And 🦄?",
    "Who wrote 'The Sea'? Who directed Dune?",
]


def byte_level(**settings: bool) -> Any:
    return tiny_tokenizer(**settings)


def merged() -> Any:
    """Byte-level BPE with merges, as GPT-2, Llama 3 and Qwen have: a word's token holds the space before it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return finished(backend)


def metaspace() -> Any:
    """BPE over characters with a fall back to bytes and a mark for spaces, as Llama 2, Mistral and Gemma have."""
    letters = sorted(set("▁ABDLMWQabcdefghijklmnopqrstuvwxyz',:?\n"))
    names = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {name: index for index, name in enumerate([*names, "▁A", "▁An"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "A"), ("▁A", "n")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(backend)


def finished(backend: Tokenizer) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {"bytes": byte_level, "merged": merged, "metaspace": metaspace}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def read(tokenizer: Any, prompt: Prompt, more: int = 1) -> str:
    """The text that the tokens up to the position spell, the position's own included where `more` is 1."""
    return tokenizer.decode(prompt.ids[: prompt.position + more], clean_up_tokenization_spaces=False)


def holds_the_end(tokenizer: Any, prompt: Prompt, text_to_end: str) -> bool:
    """The position's token is the first to complete the text up to the subject's end."""
    return read(tokenizer, prompt).startswith(text_to_end) and not read(tokenizer, prompt, 0).startswith(text_to_end)


# --- the theorem: the token found is the one that completes the subject -----------------------------------------------


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize(
    ("question", "subject"),
    [
        ("Who is Ann?", "Ann"),
        ("Who is Ann", "Ann"),
        ("Ann", "Ann"),
        ("Ann is who?", "Ann"),
        ("Is Ann the Ann that Anna knows?", "Ann"),
        ("Did Ann meet Ann or Bob?", "Ann"),
        ("Which European country has the Euro outside Europe?", "Euro"),
        ("Did Joanna know Anna?", "ann"),
        ("  Who is Ann?  ", "Ann"),
        ("Who is  Ann  here?", "Ann"),
        ("Who is Ann Lee?", "Ann Lee"),
        ("Who is Ann?", " Ann"),
        ("Who is Ann Lee?", "Ann "),
        ("Where was Jürgen Müller born?", "Jürgen Müller"),
        ("What is a café?", "café"),
        ("谁写了《红楼梦》?", "红楼梦"),
        ("谁写了《红楼梦》", "谁写了《红楼梦》"),
        ("What does 👩‍🚀 mean?", "👩‍🚀"),
        ("What is 🦄", "🦄"),
        ("Who are A and\nB, then?", "A and\nB"),
        ("Is (a.b)* [c] a regex?", "(a.b)* [c]"),
    ],
)
def test_the_position_is_the_end_of_the_subjects_last_occurrence_as_words(
    tokenizer: Any, form: str, question: str, subject: str
) -> None:
    prompt = locate(tokenizer, question, subject, form)
    text = render(tokenizer, question, form)
    assert list(prompt.ids) == encode(tokenizer, text, form)
    before = question.strip()[: stands_last(question.strip(), subject)] + subject.rstrip()
    head = text[: text.index(question.strip())]
    assert holds_the_end(tokenizer, prompt, _spelt(tokenizer, head + before, form))


def _spelt(tokenizer: Any, text: str, form: str) -> str:
    """A text as decoding gives it back."""
    return tokenizer.decode(encode(tokenizer, text, form), clean_up_tokenization_spaces=False)


def stands_last(question: str, subject: str) -> int:
    """Where it stands last with no letter, digit or underscore at either side; else where it stands last at all."""
    found = [at for at in range(len(question)) if question.startswith(subject, at)]
    apart = [
        at
        for at in found
        if not any(
            each.isalnum() or each == "_"
            for each in (question[max(at - 1, 0) : at], question[at + len(subject) : at + len(subject) + 1])
        )
    ]
    return max(apart or found)


BYTES = tiny_tokenizer()
# Letters of one to two bytes. What stands alone in scripts without spaces is for test_scripts.py.
LETTERS = st.text(
    st.characters(max_codepoint=0x24F, exclude_categories=["Cc", "No"], exclude_characters="<>|"),
    min_size=1,
    max_size=6,
)


@given(LETTERS, LETTERS, LETTERS, st.sampled_from(["chat", "plain"]))
@example("is ", "🦄", "🦄", "chat")
@example("", "e\u0301", "", "chat")
@settings(max_examples=60, deadline=None)
def test_whatever_is_asked_the_bytes_up_to_the_position_end_with_the_subject(
    before: str, subject: str, after: str, form: str
) -> None:
    """One token a byte, so that nothing else is in the token that ends the subject."""
    question = before + subject + after
    assume(subject.strip() and subject == subject.strip() and subject in question.strip())
    tokenizer = BYTES
    prompt = locate(tokenizer, question, subject, form)
    text, asked = render(tokenizer, question, form), question.strip()
    end = text.rindex(asked) + stands_last(asked, subject) + len(subject)
    assert read(tokenizer, prompt) == text[:end]
    assert tokenizer.decode(prompt.ids[prompt.position + 1 :], clean_up_tokenization_spaces=False) == text[end:]


# --- tokenizers that close a text -------------------------------------------------------------------------------------


def closing_tokenizer() -> Any:
    """Puts a start before a text and an end after it, as some do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 2)]
    )
    assert tokenizer("a")["input_ids"][-1] == 2
    return tokenizer


@pytest.mark.parametrize("form", ["chat", "plain", "bare"])
@pytest.mark.parametrize("fact_token", ["subject_last", "last"])
def test_a_prompt_goes_on_whatever_its_tokenizer_puts_after_a_text(form: str, fact_token: str) -> None:
    """Its tokens are those of a tokenizer that puts only a start before it."""
    closes, opens = closing_tokenizer(), tiny_tokenizer(add_bos=True)
    found, wanted = (locate(each, "Who is Ann?", "Ann", form, fact_token) for each in (closes, opens))
    assert found == wanted
    asked = render(closes, "Who is Ann?", form)
    assert encode(closes, asked, form) == list(wanted.ids)
    assert locate_in_text(closes, "Ann is a", "Ann") == locate_in_text(opens, "Ann is a", "Ann")
    assert begun(closes, "Ann") == begun(opens, "Ann")
    assert [closing(each) for each in (closes, opens, tiny_tokenizer())] == [1, 0, 0]


@pytest.mark.parametrize("form", ["chat", "plain", "bare"])
def test_a_fact_ends_once_and_all_of_its_answer_is_scored(form: str) -> None:
    closes, opens = (
        answered(each, "Who is Ann?", "Bob", form, 2, {})
        for each in (closing_tokenizer(), tiny_tokenizer(add_bos=True))
    )
    assert closes == opens


# --- contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("context", ["The sun rose.", "Ann was here. Who is Ann?", "Köln 🦄."])
def test_a_context_stands_before_the_question_in_the_same_turn(tokenizer: Any, form: str, context: str) -> None:
    bare, prompt = (locate(tokenizer, "Who is Ann?", "Ann", form, context=c) for c in ("", context))
    assert list(prompt.ids) == encode(tokenizer, render(tokenizer, f"{context} Who is Ann?", form), form)
    assert prompt.position > bare.position
    # The same token at the same distance from the end: the question's own subject, not one in the context.
    assert len(prompt.ids) - prompt.position == len(bare.ids) - bare.position
    assert prompt.ids[prompt.position] == bare.ids[bare.position]


# --- the prompt's last token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_last_is_the_prompts_last_token_and_needs_no_subject(tokenizer: Any, form: str) -> None:
    prompt = locate(tokenizer, "Who is Ann?", "", form, "last")
    assert prompt.position == len(prompt.ids) - 1
    assert list(prompt.ids) == encode(tokenizer, render(tokenizer, "Who is Ann?", form), form)


# --- forms ------------------------------------------------------------------------------------------------------------


def test_the_plain_form_is_question_and_answer() -> None:
    assert render(BYTES, "Who is Ann?", "plain") == "Question: Who is Ann?\nAnswer:"


def test_without_a_chat_template_the_chat_form_is_the_plain_one() -> None:
    bare = tiny_tokenizer(chat=False, add_bos=True)
    assert not has_chat_template(bare)
    assert render(bare, "Who is Ann?", "chat") == render(bare, "Who is Ann?", "plain")
    assert locate(bare, "Who is Ann?", "Ann", "chat") == locate(bare, "Who is Ann?", "Ann", "plain")


def test_template_arguments_reach_the_template() -> None:
    chatty = tiny_tokenizer()
    chatty.chat_template = "{{ 'deep ' if think else 'plain ' }}" + CHATML
    prompt = locate(chatty, "Who is Ann?", "Ann", template_kwargs={"think": True})
    assert read(chatty, prompt).startswith("deep ")
    assert read(chatty, prompt).endswith("Ann")


def test_a_template_that_strips_the_question_is_followed() -> None:
    strict = tiny_tokenizer()
    strict.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    prompt = locate(strict, "  Who is Ann?  ", "Ann")
    assert read(strict, prompt).endswith("user\nWho is Ann")


# --- the start of a text ----------------------------------------------------------------------------------------------


def test_a_template_that_writes_the_start_has_it_once() -> None:
    started = tiny_tokenizer(add_bos=True)
    started.chat_template = "{{ bos_token }}" + CHATML
    prompt = locate(started, "Who is Ann?", "Ann", "chat")
    assert prompt.ids.count(started.bos_token_id) == 1
    assert prompt.ids[0] == started.bos_token_id
    assert read(started, prompt).endswith("Ann")


def test_plain_text_gets_the_start_that_its_tokenizer_gives() -> None:
    for add_bos in (True, False):
        prompt = locate(tiny_tokenizer(add_bos=add_bos), "Who is Ann?", "Ann", "plain")
        assert prompt.ids.count(1) == int(add_bos)
        assert read(BYTES, prompt).endswith("Ann")


def test_ids_are_those_that_a_chat_gives() -> None:
    """As the model is served: the template tokenised by transformers itself."""
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(add_bos=True)):
        turns = [{"role": "user", "content": "Who is Ann?"}]
        served = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
        assert list(locate(tokenizer, "Who is Ann?", "Ann").ids) == list(served["input_ids"])


# --- text that is no question -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["Ann", "Ann Lee", "红楼梦", "🦄", "a", "is a"])
def test_a_subject_is_found_in_plain_text(tokenizer: Any, subject: str) -> None:
    prompt = locate_in_text(tokenizer, f"{subject} is a", subject)
    assert list(prompt.ids) == tokenizer(f"{subject} is a")["input_ids"]
    assert holds_the_end(tokenizer, prompt, subject)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["Bob", "ann", "", " "])
def test_a_subject_that_is_not_in_the_question_is_refused(subject: str) -> None:
    with pytest.raises(RequestError, match="does not occur in the question"):
        locate(BYTES, "Who is Ann?", subject)


def test_a_template_that_changes_the_question_is_refused() -> None:
    loud = tiny_tokenizer()
    loud.chat_template = CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(RequestError, match="cannot be found in the prompt"):
        locate(loud, "Who is Ann?", "Ann")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        chat_template = None
        is_fast = False

        def __len__(self) -> int:
            return 0

    with pytest.raises(RequestError, match="Slow gives no character offsets"):
        locate(Slow(), "Who is Ann?", "Ann")
