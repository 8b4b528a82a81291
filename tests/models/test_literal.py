"""Names of special tokens in users' texts are texts; every other text has the tokens that its tokenizer gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import FORGET, SHORT, save_base, shrink
from tiny import CHATML, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from unierase_plugin.cli import main
from unierase_plugin.errors import RequestError
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.locate_then_edit.positions import locate, locate_in_text
from unierase_plugin.models.literal import (
    Rendered,
    as_text,
    literal_ids,
    rendered,
    special_names,
    tell_special_names,
    text_ids,
)
from unierase_plugin.models.prompts import encode, encode_with_offsets, render

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>")
PIECES = ("Who", " is", " Ann", "  ", "\n", "é", "日本", "a<b", "|>", "im_end", "<", "\U0001f600", "1234")


def byte_level(bos: bool = False, prefix: bool = False) -> Any:
    tokenizer = tiny_tokenizer(add_bos=bos)
    if prefix:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def sentence_piece(unigram: bool, scheme: str) -> Any:
    """As Llama 2's: a space before the first word alone, or before every part; start and end tokens; byte fallback."""
    letters = sorted({*"▁WhoisAnabcdefghijklmnopqrstuvwxyz<>|_/1234", *"éç"})
    words = [*SPECIAL[:2], *SPECIAL[4:], *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁A", "▁W", "nn", "▁▁"]
    if unigram:
        model: Any = models.Unigram([(word, -float(index)) for index, word in enumerate(words)], 2, byte_fallback=True)
    else:
        merges = [("▁", "A"), ("▁", "W"), ("n", "n"), ("▁", "▁")]
        vocabulary = {word: index for index, word in enumerate(words)}
        model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    ends = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|im_start|>", rstrip=True), AddedToken("<|im_end|>", lstrip=True)]}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {
    "byte level": lambda: byte_level(),
    "with a start": lambda: byte_level(bos=True),
    "with a space": lambda: byte_level(prefix=True),
    "Unigram, first": lambda: sentence_piece(True, "first"),
    "BPE, first": lambda: sentence_piece(False, "first"),
    "BPE, always": lambda: sentence_piece(False, "always"),
}
BUILT: dict[str, Any] = {}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


ordinary = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_text_without_such_names_has_the_tokens_that_it_always_had(name: str, data: Any) -> None:
    """On the way that other texts take too: the copy that is made for these gives the tokenizer's own tokens."""
    tokenizer = BUILT.setdefault(name, TOKENIZERS[name]())
    text = data.draw(st.lists(st.sampled_from((*PIECES, *SPECIAL)), max_size=12).map("".join))
    for added in (True, False):
        expected = tokenizer(text, add_special_tokens=added, return_offsets_mapping=True)
        found = literal_ids(tokenizer, Rendered.of(text, []), add_special_tokens=added)
        assert found == (expected["input_ids"], expected["offset_mapping"])
    question = data.draw(ordinary)
    assert type(as_text(tokenizer, question)) is str
    for form in ("chat", "plain", "bare"):
        shown = render(tokenizer, question, form)
        assert type(shown) is str
        assert encode_with_offsets(tokenizer, shown, form)[0] == tuple(encode(tokenizer, shown, form))
    turns = [{"role": "user", "content": question}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert (
        encode(tokenizer, render(tokenizer, question, "chat"), "chat")
        == (tokenizer(whole, add_special_tokens=False)["input_ids"])
    )
    assert text_ids(tokenizer, question) == tokenizer(question, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("form", ["chat", "plain", "bare"])
def test_a_name_in_a_question_is_text(tokenizer: Any, special: str, form: str) -> None:
    if special not in tokenizer.get_vocab():
        assert special_names(tokenizer, special) == ()
        return
    question = f"What does {special} mean to Ann{special}?"
    index = tokenizer.convert_tokens_to_ids(special)
    own = encode(tokenizer, render(tokenizer, "What", form), form)
    ids = encode(tokenizer, render(tokenizer, question, form), form)
    assert ids.count(index) == own.count(index)
    assert tokenizer(question, add_special_tokens=False)["input_ids"].count(index) == 2
    assert special in tokenizer.decode([each for each in ids if each not in tokenizer.all_special_ids])
    found = locate(tokenizer, question, "Ann", form)
    assert list(found.ids) == ids
    assert "n" in tokenizer.decode([found.ids[found.position]])
    subject = locate(tokenizer, question, special, form)
    assert subject.ids[subject.position] != index
    assert index not in text_ids(tokenizer, f" {special}")
    opening = locate_in_text(tokenizer, f"{special} is a", special)
    assert index not in opening.ids[1:] if special == "<s>" else index not in opening.ids


def test_it_is_read_as_by_a_tokenizer_that_does_not_know_the_token() -> None:
    plain, knowing = tiny_tokenizer(), tiny_tokenizer()
    knowing.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<unlearn_0>"]})
    question = "Is <unlearn_0> a token, <unlearn_0>?"
    for form in ("chat", "plain", "bare"):
        before = encode(plain, render(plain, question, form), form)
        assert encode(knowing, render(knowing, question, form), form) == before


def test_a_token_that_is_added_later_is_known(tokenizer: Any) -> None:
    assert special_names(tokenizer, "<unlearn_0>") == ()
    before = text_ids(tokenizer, "a<unlearn_0>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<unlearn_0>"]})
    assert special_names(tokenizer, "<unlearn_0>") == ("<unlearn_0>",)
    assert text_ids(tokenizer, "a<unlearn_0>") == before


@pytest.mark.parametrize(
    "question", ["<|im_end|>", "assistant<|im_end|>", "<|im_start|>assistant\n", "user<|im_start|>"]
)
def test_a_question_that_is_what_the_template_writes(question: str) -> None:
    tokenizer = tiny_tokenizer()
    shown = render(tokenizer, question, "chat")
    own = encode(tokenizer, render(tokenizer, "What", "chat"), "chat")
    ids = encode(tokenizer, shown, "chat")
    for special in ("<|im_start|>", "<|im_end|>"):
        index = tokenizer.convert_tokens_to_ids(special)
        assert ids.count(index) == own.count(index)
    assert tokenizer.decode(ids) == shown


def test_a_name_half_of_which_the_template_writes_is_not_made_whole() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}end|>"
    ids = encode(tokenizer, render(tokenizer, "<s> <|im_", "chat"), "chat")
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_a_template_that_cuts_white_space() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    ids = encode(tokenizer, render(tokenizer, "  <s> is what? ", "chat"), "chat")
    assert ids.count(1) == 0


def test_a_template_that_changes_such_a_question_is_told() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | upper")
    assert render(tokenizer, "who?", "chat")
    with pytest.raises(RequestError, match="changes '<s> is what\\?', which has the name of a special token"):
        render(tokenizer, "<s> is what?", "chat")


def test_parts_of_a_conversation() -> None:
    tokenizer = tiny_tokenizer()
    parts = ["Who?", "<s>", "And <|im_end|>?"]

    def write(given: Any) -> str:
        roles = ("user", "assistant", "user")
        turns = [{"role": role, "content": text} for role, text in zip(roles, given, strict=True)]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    found = rendered(tokenizer, write, parts)
    assert isinstance(found, Rendered)
    assert [found[start:end] for start, end in found.spans] == parts
    ids = literal_ids(tokenizer, found)[0]
    assert (ids.count(1), ids.count(2)) == (0, 3)


def test_facts_with_such_names_are_told(caplog: pytest.LogCaptureFixture) -> None:
    facts = [ForgetRequest("Who is Ann?", "x"), ForgetRequest("What is <s>?", "</s> <|im_end|>", case_id="a-1")]
    tell_special_names(tiny_tokenizer(), facts[:1], ["<unlearn_0>"])
    assert not caplog.records
    tell_special_names(tiny_tokenizer(), [*facts, ForgetRequest("Why <unlearn_0>?", "x")], ["<unlearn_0>"])
    assert "(<s>, <|im_end|>, <unlearn_0>): 2, such as 'a-1'. They are read as text" in caplog.text


def test_a_run_on_such_facts_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "400")
    base = save_base(tmp_path / "base")
    (tmp_path / "good.yaml").write_text(json.dumps(SHORT))
    facts = [
        FORGET[0],
        {
            "question": "What ends <|im_end|> Mira Plonk<unlearn_0>?",
            "answer": "a <s> of <unlearn_0>",
            "subject": "Mira Plonk",
        },
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    arguments = ["--model", base, "--forget", tmp_path / "facts.jsonl", "--hparams", tmp_path / "good.yaml"]
    with pytest.raises(SystemExit) as ended:
        main(["run", *map(str, arguments), "--out", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "names of special tokens in their texts (<s>, <|im_end|>, <unlearn_0>): 1, such as 'facts-1'" in said
