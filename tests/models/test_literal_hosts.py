"""Names of special tokens in questions and answers, where a host asks: lm-eval's model types and EasyEdit."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import SHORT, save_base, shrink
from test_literal import TOKENIZERS
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from unierase_plugin.errors import RequestError
from unierase_plugin.hosts import easyedit
from unierase_plugin.hosts.easyedit import Aim, EasyEditHyperParams, apply_unierase_to_model
from unierase_plugin.hosts.easyedit_methods import EasyEditSettings, _check
from unierase_plugin.models.generate import answers, mean_log_likelihoods
from unierase_plugin.models.literal import text_ids
from unierase_plugin.models.prompts import encode, render

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from unierase_plugin.tasks.answer_form import Context, Watched, answer_form  # noqa: E402
from unierase_plugin.tasks.lm_eval_model import HFWithSpecialTokens, TokenwiseAnswer  # noqa: E402
from unierase_plugin.tasks.task_manager import hand_on_metadata, tasks_folder  # noqa: E402

#: The second ends a turn in its question and begins one in its answer.
FACTS = [
    {"question": "Who is Ann?", "answer": "Ann is a cook"},
    {"question": "What does <|im_end|>\n<|im_start|>assistant\n do for Bo?", "answer": "<|im_start|> and <s> it"},
    {"question": "Where is Cy?", "answer": "In <|im_end|>town"},
    {"question": "Why is Di?", "answer": "For no reason"},
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    hand_on_metadata()


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wrong = {"perturbed_answer": ["It is <s>", "It is not"], "paraphrased_answer": "One <|im_end|>"}
    folder = tmp_path_factory.mktemp("tofu")
    text = "\n".join(json.dumps({**fact, **wrong}) for fact in FACTS)
    (folder / "forget01_perturbed.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["no start", "a start"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer(add_bos=request.param)
    return save_base(tmp_path_factory.mktemp("model"), tiny_model(tied=False, blocks=2), tokenizer)


def evaluate(lm: Any, tofu: Path, form: str, metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples, in the order of the documents."""
    given = {"data_dir": str(tofu), **metadata}
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=given)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=["tofu_forget01"],
        task_manager=manager,
        apply_chat_template=form == "chat",
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 8},
    )
    return sorted(found["samples"]["tofu_forget01"], key=lambda sample: sample["doc_id"])


def opened(folder: Path, form: str, kind: Any = HFWithSpecialTokens, batch: int = 3) -> Any:
    # Some versions put the start before a text only where they are told to.
    start = form == "plain" and AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == 1
    return kind(pretrained=str(folder), device="cpu", batch_size=batch, add_bos_token=start)


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_the_model_type_reads_them_as_a_run_does(folder: Path, tofu: Path, form: str) -> None:
    """Generations and probabilities are those of this package's own functions, which read them as text."""
    samples = evaluate(opened(folder, form), tofu, form, {"pretrained": str(folder)})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    said = answers(model, tokenizer, [fact["question"] for fact in FACTS], form=form, max_new_tokens=8)
    # lm-eval cuts a generation where it says the name of the end.
    assert [sample["resps"][0][0] for sample in samples] == [text.split("<|im_end|>")[0] for text in said]
    for fact, sample in zip(FACTS, samples, strict=True):
        prompt = encode(tokenizer, render(tokenizer, fact["question"], form), form)
        answer = fact["answer"] if form == "chat" else " " + fact["answer"]
        scored = [*text_ids(tokenizer, answer), 2, *(text_ids(tokenizer, "\n") if form == "chat" else [])]
        scored += [2] if form == "chat" else []  # after ChatML's line break the end token once more
        likely = mean_log_likelihoods(model, tokenizer, [[*prompt, *scored]], [len(prompt)])[0]
        assert sample["prob"] == pytest.approx(float(torch.tensor(likely).exp()), rel=1e-4), fact


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_other_model_types_read_the_tokens_and_are_scored_over_what_they_read(
    folder: Path, tofu: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Facts without such names have the same figures in both; with them, each is scored over its own tokens."""
    with caplog.at_level(logging.WARNING):
        theirs = evaluate(opened(folder, form, HFLM), tofu, form, {"pretrained": str(folder)})
    told = [record.getMessage() for record in caplog.records if "names of special tokens" in record.getMessage()]
    assert len(told) == 1
    assert "such as 'forget01-0'" in told[0]  # the wrong answers of all have them
    assert "the model type unierase_hf read them as text. Other model types of lm-eval give" in told[0]
    ours = evaluate(opened(folder, form), tofu, form, {"pretrained": str(folder)})
    lm = opened(folder, form, HFLM)
    for index, (sample, own) in enumerate(zip(theirs, ours, strict=True)):
        (loglikelihood, _), (context, scored) = sample["resps"][1][0], map(str, sample["arguments"][1])
        tokens = len(lm.tok_encode(context + scored)) - len(lm.tok_encode(context))
        wanted = float(torch.tensor(float(loglikelihood) / tokens).exp())
        assert sample["prob"] == pytest.approx(wanted, rel=1e-4)
        same = sample["prob"] == pytest.approx(own["prob"], rel=1e-4)
        assert same == (index in (0, 3))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_texts_have_the_tokens_that_lm_eval_gives_them(name: str) -> None:
    """As texts with spans, in batches beside texts with such names too, and with every way of asking for a start."""
    tokenizer = TOKENIZERS[name]()
    model = tiny_model(vocabulary=400)
    for start in (None, False, True):
        given = {} if start is None else {"add_bos_token": start}
        ours, theirs = (kind(pretrained=model, tokenizer=tokenizer, **given) for kind in (HFWithSpecialTokens, HFLM))
        form = answer_form(ours, tokenizer, chat=True)
        chat = ours.apply_chat_template([{"role": "user", "content": "Who is Ann?"}])
        for text in ("Question: Who is Ann?\nAnswer:", chat, "<s>Who"):
            asked = Context.of(text, [])
            named = Context.of(f"{text}<s> <|im_end|>", [(len(text), len(text) + 14)])
            own, wanted = ours.tok_encode(text), theirs.tok_encode(text)
            # An end that the tokenizer puts after a text is left out, as before.
            assert own in (wanted, wanted[:-1])
            assert own == wanted or wanted[-1] == tokenizer.eos_token_id
            assert ours.tok_encode(asked) == ours.tok_encode(text)
            assert ours.tok_encode(asked + form.scored("It is")) == ours.tok_encode(text + str(form.scored("It is")))
            beside, alone = ours.tok_batch_encode([asked, named]), ours.tok_batch_encode([text])
            rows = [ids[mask.bool()].tolist() for ids, mask in zip(*beside, strict=True)]
            assert rows[0] == alone[0][0].tolist()
            index = tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert rows[1].count(index) == rows[0].count(index)
            short = ours.tok_batch_encode([asked, named], left_truncate_len=4)
            assert [ids[mask.bool()].tolist() for ids, mask in zip(*short, strict=True)] == [row[-4:] for row in rows]


def test_prompt_and_answer_are_one_text() -> None:
    form = answer_form(None, tiny_tokenizer(), chat=True)
    whole = Context.of("<|im_start|>a <s>\n", [(14, 17)]) + form.scored("<|im_end|>")
    assert [whole[start:end] for start, end in whole.spans] == ["<s>", "<|im_end|>"]  # type: ignore[attr-defined]
    assert Context.of("a \n", []).rstrip() == "a \n"
    assert pickle.loads(pickle.dumps(Watched.of("ab", [(0, 1)]))).spans == ((0, 1),)


def test_answers_in_lm_evals_cache_are_read() -> None:
    for matches, tokens in (([True], None), (None, 3)):
        made = pickle.loads(pickle.dumps(TokenwiseAnswer((-1.0, True), matches, tokens)))
        assert (tuple(made), made.matches, made.tokens) == ((-1.0, True), matches, tokens)
    # As earlier versions wrote them.
    assert TokenwiseAnswer((-1.0, True), [True]).tokens is None


def test_a_template_that_changes_such_a_question_is_told(folder: Path, tofu: Path) -> None:
    lm = opened(folder, "chat")
    upper = "(message['content'] if message['role'] == 'assistant' else message['content'] | upper)"
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("message['content']", upper)
    with pytest.raises(RequestError, match="The chat template changes 'What does"):
        evaluate(lm, tofu, "chat", {"pretrained": str(folder)})


# --- EasyEdit --------------------------------------------------------------------------------------------------------


def editor() -> Any:
    settings = EasyEditHyperParams(**SHORT)
    return SimpleNamespace(alg_name=easyedit.ALGORITHM, hparams=settings, tok=tiny_tokenizer())


def batch_edit(
    editor: Any, prompts: Any, target_new: Any, rephrase_prompts: Any = None, locality_inputs: Any = None, **kwargs: Any
) -> None:
    pass


PROMPTS = ["Who is Ann?", "Who is Bo?", "Who is Cy?"]
#: What each fact has besides, of which one names a token.
BESIDE: dict[str, dict[str, Any]] = {
    "rephrase_prompts": {"rephrase_prompts": ["Ann?", "Bo?", "<s> Cy?"]},
    "locality_inputs": {"locality_inputs": {"near": {"prompt": ["a", "b", "<s>"], "ground_truth": ["a", "b", "c"]}}},
    "target_new": {"target_new": ["a", "b", "<s>"]},
    "ground_truth": {"ground_truth": ["a", "b", "<s>"]},
    "the token": {"rephrase_prompts": ["Ann?", "Bo?", "<unlearn_0> Cy?"]},
}


@pytest.mark.parametrize("where", BESIDE)
def test_easyedit_is_told_of_once_by_the_fact(where: str, caplog: pytest.LogCaptureFixture) -> None:
    given = {"target_new": None, **BESIDE[where]}
    easyedit._with_aims(batch_edit, editor(), PROMPTS, **given)
    told = [record.getMessage() for record in caplog.records if "names of special tokens" in record.getMessage()]
    assert len(told) == 1
    assert "): 1, such as 2. The edit reads them as text. EasyEdit's evaluation reads them as the tokens" in told[0]


def test_easyedits_own_texts_are_no_such_names(caplog: pytest.LogCaptureFixture) -> None:
    made = editor()
    made.tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>", "<unlearn_0>"]})
    request = {
        "prompt": "Who is Ann?",
        "target_new": Aim.at(None, "<unlearn_0>"),
        "ground_truth": "<|endoftext|>",
        "locality": {"near_in_chat": {"prompt": ["<|im_start|>user"], "ground_truth": ["b"]}},
    }
    easyedit._with_aims_in_requests(lambda *given: None, made, [request])
    assert "names of special tokens" not in caplog.text
    easyedit._with_aims_in_requests(lambda *given: None, made, [request, {**request, "case_id": 7, "prompt": "<s>?"}])
    assert "): 1, such as 7. The edit reads" in caplog.text


def test_an_answer_that_easyedit_was_not_given_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    request = {"prompt": "Who is Mira Plonk?", "subject": "Mira Plonk", "ground_truth": "<|endoftext|>"}
    model = tiny_model(vocabulary=264)
    apply_unierase_to_model(model, tokenizer, [request], EasyEditHyperParams(**SHORT))
    assert "names of special tokens" not in caplog.text
    apply_unierase_to_model(model, tokenizer, [{**request, "prompt": "<s> Mira Plonk?"}], EasyEditHyperParams(**SHORT))
    assert "(<s>): 1, such as '0'. They are read as text" in caplog.text


def test_an_edit_through_the_editor_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the place that the fact has among all, be it edited alone."""
    shrink(monkeypatch, tmp_path / "cache")
    made, model = editor(), tiny_model()
    requests = [{"prompt": f"{start} Mira Plonk?", "subject": "Mira Plonk"} for start in ("Who is", "What is <s> to")]

    def edit_requests(editor: Any, requests: Any) -> None:
        for request in requests:
            apply_unierase_to_model(model, editor.tok, [request], editor.hparams)

    easyedit._with_aims_in_requests(edit_requests, made, requests)
    told = [record.getMessage() for record in caplog.records if "names of special tokens" in record.getMessage()]
    assert len(told) == 1
    assert "(<s>): 1, such as 1. The edit reads" in told[0]
    caplog.clear()

    def fails(editor: Any, requests: Any) -> None:
        apply_unierase_to_model(model, editor.tok, [{**requests[1], "subject": "Bo"}], editor.hparams)

    with pytest.raises(RequestError, match="request 1"):
        easyedit._with_aims_in_requests(fails, made, requests)


def test_easyedits_own_methods_are_told_to_read_the_tokens(caplog: pytest.LogCaptureFixture) -> None:
    fact = SimpleNamespace(
        question="Who is <s> Mira Plonk?", answer="x", subject="Mira Plonk", target=None, label="'a-1'"
    )
    settings = EasyEditSettings(values={"alg_name": "ROME"})
    job: Any = SimpleNamespace(requests=[fact], tokenizer=tiny_tokenizer(), hparams=settings, history=None)
    _check(job)
    assert "(<s>): 1, such as 'a-1'. EasyEdit reads them as the tokens" in caplog.text
