"""The TOFU tasks through lm-eval, against figures computed straight from their definitions (tofu_reference.py)."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tofu_reference as reference
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import ks_2samp
from tiny import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from unierase_plugin.errors import DependencyError, UniEraseError
from unierase_plugin.tasks.lm_eval_cli import run_lm_eval
from unierase_plugin.tasks.reference import read_reference
from unierase_plugin.tasks.task_manager import hand_on_metadata, load_tasks, tasks_folder

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from unierase_plugin.tasks import tofu as tofu_tasks  # noqa: E402
from unierase_plugin.tasks.lm_eval_model import HFWithSpecialTokens  # noqa: E402

LENGTH = 12
PARTS = ("prob", "rougeL_recall", "truth_ratio")
SETS = ("retain", "real_authors", "world_facts")


def records(name: str, count: int, *, wrong: int, long: bool) -> list[dict[str, Any]]:
    """Facts of a set; the first two are among those that the model has learned."""
    made = [
        {
            "question": f"Who is {name} {n}?",
            "answer": f"Mr {name} {n}",
            "perturbed_answer": [f"Ms {letter} {n}" for letter in "ABCDE"[:wrong]],
            **(
                {"paraphrased_answer": f"One Mr {name} {n}", "paraphrased_question": f"{name} {n} is who?"}
                if long
                else {"original_answer": f"It is Mr {name} {n}."}
            ),
        }
        for n in range(count)
    ]
    if long:
        # Said twice, asked once.
        made[-1]["perturbed_answer"][1] = made[-1]["perturbed_answer"][0]  # type: ignore[index]
    return made


DATA = {
    "forget01": records("Ab", 4, wrong=5, long=True),
    "retain": records("Re", 4, wrong=5, long=True),
    "real_authors": records("Au", 3, wrong=3, long=False),
    "world_facts": records("Wo", 2, wrong=3, long=False),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    # lm-eval asks pip and the system what there is, for its report.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(autouse=True, scope="module")
def _metadata() -> None:
    hand_on_metadata()


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tofu")
    for name, rows in DATA.items():
        (folder / f"{name}_perturbed.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned some of the answers in both forms: matches and generations say something then."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny_model(tied=False, blocks=2), tiny_tokenizer(add_bos=True)
    rows = [(row, form) for name in ("forget01", "retain") for row in DATA[name][:2] for form in ("chat", "plain")]
    pairs = [
        [reference.encode(tokenizer, row["question"], given, form) for given in (None, row["answer"])]
        for row, form in rows
    ]
    width = max(len(whole) for _, whole in pairs)
    ids = torch.tensor([whole + [0] * (width - len(whole)) for _, whole in pairs])
    labels = torch.tensor(
        [[-100] * len(prompt) + whole[len(prompt) :] + [-100] * (width - len(whole)) for prompt, whole in pairs]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {"batch_size": 4, "device": "cpu", "add_bos_token": False, **changes}
    return options.pop("kind", HFWithSpecialTokens)(pretrained=str(folder), **options)


def evaluate(lm: Any, tofu: Path, task: str = "tofu_forget01", form: str = "chat", **options: Any) -> dict[str, Any]:
    metadata = {"data_dir": str(tofu), **options.pop("metadata", {})}
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=metadata)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        lm,
        tasks=task.split(","),
        task_manager=manager,
        apply_chat_template=form == "chat",
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": LENGTH},
        **options,
    )
    return found


def values(found: dict[str, Any], task: str = "tofu_forget01") -> dict[str, float]:
    rows = found["results"][task].items()
    return {key.partition(",")[0]: value for key, value in rows if key.endswith(",none") and "stderr" not in key}


@functools.cache
def plainly(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@functools.cache
def direct(folder: Path, name: str = "forget01", form: str = "chat", **options: Any) -> list[dict[str, float]]:
    model, tokenizer = plainly(folder)
    return [reference.figures(model, tokenizer, row, form, LENGTH, **options) for row in DATA[name]]


# --- right to the digit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "batch"), [("chat", 1), ("chat", 4), ("plain", 3)])
def test_a_forget_task_has_the_figures_of_a_plain_forward_pass(folder: Path, tofu: Path, form: str, batch: int) -> None:
    rows = direct(folder, form=form)
    # A reference that says nothing would compare zeros.
    for name in ("rougeL_recall", "extraction_strength", "exact_memorization"):
        assert len({row[name] for row in rows}) > 1, name
    # Without a chat template the tokenizer writes the start of a text itself, as for the reference.
    lm = load(folder, batch_size=batch, add_bos_token=form == "plain")
    found = evaluate(lm, tofu, form=form, metadata={"pretrained": str(folder)})
    wanted = reference.forget_set(rows)
    assert {name: values(found)[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    samples = sorted(found["samples"]["tofu_forget01"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, rows, strict=True):
        assert {name: sample[name] for name in row} == pytest.approx(row, abs=1e-5)


def test_model_utility_is_the_harmonic_mean_of_nine_figures(folder: Path, tofu: Path) -> None:
    found = values(evaluate(load(folder), tofu, "tofu_utility"), "tofu_utility")
    sets = [reference.kept_set(direct(folder, name, options=name != "retain")) for name in SETS]
    for name, means in zip(SETS, sets, strict=True):
        for part in (*PARTS, "token_entropy"):
            assert found[f"{name}_{part}"] == pytest.approx(means[part], abs=1e-5)
    assert found["model_utility"] == pytest.approx(reference.utility(sets, PARTS), abs=1e-5)
    assert found["model_utility_12"] == pytest.approx(reference.utility(sets, (*PARTS, "token_entropy")), abs=1e-5)
    assert "model_utility_18" not in found


@pytest.mark.parametrize("name", SETS)
def test_a_set_to_keep_is_a_task_of_its_own_too(folder: Path, tofu: Path, name: str) -> None:
    found = values(evaluate(load(folder), tofu, f"tofu_{name}"), f"tofu_{name}")
    wanted = reference.kept_set(direct(folder, name, options=name != "retain"))
    assert {part: found[part] for part in wanted} == pytest.approx(wanted, abs=1e-5)


def test_the_paraphrase_asks_another_question_for_the_same_answers(folder: Path, tofu: Path) -> None:
    task = "tofu_forget01_paraphrase"
    found = values(evaluate(load(folder), tofu, task), task)
    wanted = reference.forget_set(direct(folder, question="paraphrased_question"))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert found["prob"] != pytest.approx(reference.forget_set(direct(folder))["prob"], abs=1e-3)


def test_a_system_prompt_is_asked_with(folder: Path, tofu: Path) -> None:
    found = values(evaluate(load(folder), tofu, system_instruction="Be brief."))
    wanted = reference.forget_set(direct(folder, system="Be brief."))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)


def test_the_arithmetic_truth_ratio_and_answers_without_their_end_can_be_had(folder: Path, tofu: Path) -> None:
    model, tokenizer = plainly(folder)
    row = DATA["forget01"][0]

    def probability(text: str) -> float:
        return 2.718281828459045 ** -reference.score(model, tokenizer, row["question"], text, "chat")[0]

    found = evaluate(load(folder), tofu, metadata={"truth_ratio": "arithmetic"}, limit=1)
    wrong = sum(map(probability, row["perturbed_answer"])) / 5
    ratio = found["samples"]["tofu_forget01"][0]["truth_ratio"]
    assert ratio == pytest.approx(wrong / probability(row["paraphrased_answer"]), abs=1e-5)

    found = evaluate(load(folder), tofu, metadata={"end_counts": False}, limit=1)
    prompt = reference.encode(tokenizer, row["question"], None, "chat")
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    assert found["samples"]["tofu_forget01"][0]["prob"] == pytest.approx(torch.exp(-loss).item(), abs=1e-5)
    assert found["samples"]["tofu_forget01"][0]["filtered_resps"][1].tokens == len(answer)


# --- the same figures whichever way -----------------------------------------------------------------------------------


def test_lm_evals_own_model_type_gives_the_same_figures_but_those_of_single_tokens(folder: Path, tofu: Path) -> None:
    ours = values(evaluate(load(folder), tofu))
    theirs = values(evaluate(load(folder, kind=HFLM), tofu))
    assert ours.keys() - theirs.keys() == {"extraction_strength", "exact_memorization", "token_first"}
    assert theirs == pytest.approx({name: ours[name] for name in theirs}, abs=1e-6)


def test_a_limit_asks_the_first_documents_and_gives_them_the_same_figures(folder: Path, tofu: Path) -> None:
    whole, part = (evaluate(load(folder), tofu, limit=limit)["samples"]["tofu_forget01"] for limit in (None, 2))
    assert [sample["doc_id"] for sample in part] == [0, 1]
    for one, other in zip(part, whole, strict=False):
        assert {name: one[name] for name in one["metrics"]} == pytest.approx(
            {name: other[name] for name in one["metrics"]}
        )


def test_a_small_limit_covers_all_sets_and_a_smaller_one_is_not_a_number(folder: Path, tofu: Path) -> None:
    found = values(evaluate(load(folder), tofu, "tofu_utility", limit=3), "tofu_utility")
    assert all(0 < found[f"{name}_prob"] < 1 for name in SETS)
    found = values(evaluate(load(folder), tofu, "tofu_utility", limit=2), "tofu_utility")
    assert found["world_facts_prob"] != found["world_facts_prob"]
    assert found["model_utility"] != found["model_utility"]


def test_a_second_run_reads_its_answers_from_the_cache(
    folder: Path, tofu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = values(evaluate(load(folder), tofu, use_cache=str(tmp_path / "cache")))
    lm = load(folder)
    monkeypatch.setattr(lm, "_model_call", None)
    monkeypatch.setattr(lm, "_model_generate", None)
    assert values(evaluate(lm, tofu, use_cache=str(tmp_path / "cache"))) == first
    assert "extraction_strength" in first


def test_a_cache_of_another_model_type_leaves_figures_of_single_tokens_out(
    folder: Path, tofu: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = str(tmp_path / "cache")
    evaluate(load(folder, kind=HFLM), tofu, use_cache=cache, limit=1)
    with caplog.at_level("INFO", "unierase_plugin"):
        found = values(evaluate(load(folder), tofu, use_cache=cache))
    assert "extraction_strength" not in found
    assert "leaves extraction_strength and exact_memorization out" in caplog.text


class Parrot(LM):  # type: ignore[misc]
    """Says one thing and takes note of what it is asked."""

    def __init__(self, text: str = "Mr") -> None:
        super().__init__()
        self.text = text
        self.asked: list[Any] = []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.asked += [request.args[0] for request in requests]
        return [self.text] * len(requests)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        self.asked += [request.args for request in requests]
        return [(-3.0, False)] * len(requests)

    loglikelihood_rolling = generate_until


def test_special_tokens_that_a_model_type_shows_change_no_figure(folder: Path, tofu: Path) -> None:
    found = [
        evaluate(Parrot(text), tofu, form="plain", metadata={"pretrained": str(folder)}, limit=1)
        for text in ("<|im_start|>Mr Ab<s> 0", "<unlearn_0>Mr Ab 0", "Mr Ab 0")
    ]
    assert values(found[0]) == values(found[1]) == values(found[2])
    assert values(found[0])["rougeL_recall"] == 1.0


# --- models and tokenizers with habits of their own -----------------------------------------------------------------


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """The folder with other generation settings."""
    shutil.copytree(folder, to)
    path = to / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}), encoding="utf-8")
    return to


def test_figures_do_not_depend_on_how_a_model_would_write_for_itself(folder: Path, tofu: Path, tmp_path: Path) -> None:
    habits = {"num_beams": 3, "repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "return_dict_in_generate": True}
    found = [evaluate(load(each), tofu) for each in (folder, copied(folder, tmp_path / "own", **habits))]
    assert texts_of(found[0]) == texts_of(found[1])
    assert values(found[0]) == values(found[1])


def texts_of(found: dict[str, Any]) -> list[Any]:
    return [sample["resps"] for sample in found["samples"]["tofu_forget01"]]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_token_that_the_tokenizer_puts_after_a_text_is_neither_asked_nor_scored(
    folder: Path, tofu: Path, tmp_path: Path, batch: int
) -> None:
    closes = copied(folder, tmp_path / "closes")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save_pretrained(closes)
    found = [
        evaluate(
            load(each, add_bos_token=None, batch_size=batch), tofu, form="plain", metadata={"pretrained": str(each)}
        )
        for each in (folder, closes)
    ]
    assert texts_of(found[0]) == texts_of(found[1])
    assert values(found[0]) == values(found[1])


def test_weights_that_the_checkpoint_lacks_are_refused(folder: Path, tmp_path: Path) -> None:
    lacks, lost = copied(folder, tmp_path / "lacks"), "model.layers.1.mlp.down_proj.weight"
    weights = load_file(lacks / "model.safetensors")
    del weights[lost]
    save_file(weights, lacks / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UniEraseError, match=f"does not hold {lost}: 1 of"):
        load(lacks)


class Process(HFWithSpecialTokens):
    """One of two processes. lm-eval runs several on GPUs alone, so here one runs after the other."""

    def __init__(self, *args: Any, rank: int, sent: list[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rank, self._world_size, self.sent = rank, 2, sent

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        # The other has more to ask, so that lm-eval asks something again to keep in step.
        return torch.stack((tensor, tensor + 3) if self._rank == 0 else (tensor + 3, tensor))

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        if self._rank == 1:
            self.sent.append(obj)
            return None
        return [obj, self.sent.pop(0)]

    def barrier(self) -> None:
        pass


@pytest.mark.parametrize("limit", [None, 3])
def test_two_processes_give_the_figures_of_one(folder: Path, tofu: Path, logs: Path, limit: int | None) -> None:
    if not hasattr(LM, "all_gather"):
        pytest.skip("lm-eval before 0.4.12 gathers through torch.distributed, which a stand-in cannot answer for")
    tasks = "tofu_forget01,tofu_utility"
    sent: list[Any] = []

    def run(lm: Any) -> dict[str, Any]:
        return evaluate(lm, tofu, tasks, metadata={"reference": str(logs / "list.json")}, limit=limit)

    whole = run(load(folder))
    assert run(load(folder, kind=Process, rank=1, sent=sent)) is None
    halves = run(load(folder, kind=Process, rank=0, sent=sent))
    for task in tasks.split(","):
        assert values(halves, task) == pytest.approx(values(whole, task))
        assert len(halves["samples"][task]) == len(whole["samples"][task])


def test_no_request_is_sent_twice(folder: Path, tofu: Path) -> None:
    lm = Parrot()
    options = {"form": "plain", "metadata": {"pretrained": str(folder)}}
    evaluate(lm, tofu, "tofu_forget01,tofu_utility", **options)  # type: ignore[arg-type]
    assert len(lm.asked) == len(set(lm.asked))
    # A generation, the answer, its paraphrase and five wrong ones, of which the last record has one twice; of options
    # the paraphrase is the answer itself.
    assert len(lm.asked) == 2 * (4 * 8 - 1) + (3 + 2) * 5


def test_requests_of_other_data_are_not_taken_from_lm_evals_store(folder: Path, tofu: Path, tmp_path: Path) -> None:
    other = {**DATA["forget01"][0], "question": "Who else?"}
    (tmp_path / "forget01_perturbed.json").write_text(json.dumps(other), encoding="utf-8")
    for data in (tofu, tmp_path):
        lm = Parrot()
        evaluate(lm, data, form="plain", metadata={"pretrained": str(folder)}, cache_requests=True)
    assert len(lm.asked) == 8
    assert all("Who else?" in str(each) for each in lm.asked)


def test_outputs_alone_can_be_had(folder: Path, tofu: Path) -> None:
    found = evaluate(load(folder), tofu, predict_only=True, limit=2)
    assert values(found) == {"bypass": 999}
    assert len(found["samples"]["tofu_forget01"][0]["resps"]) == 8


# --- forget quality ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retain_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retain_only")
    tiny_model(tied=False, blocks=2, seed=1).save_pretrained(path)
    tiny_tokenizer(add_bos=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def logs(retain_only: Path, tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--log_samples` writes for the retain-only model, and the same ratios as other programs keep them."""
    out = tmp_path_factory.mktemp("logs")
    run_lm_eval(
        [
            "--model",
            str(retain_only),
            "--tasks",
            "tofu_forget01",
            "--device",
            "cpu",
            "--log_samples",
            "--output_path",
            str(out),
            "--gen_kwargs",
            "max_gen_toks=2",
            "--metadata",
            json.dumps({"data_dir": str(tofu)}),
        ]
    )
    rows = direct(retain_only)
    ratios = [row["truth_ratio"] for row in rows]
    # Not in the order of the documents.
    by_index = {str(index): {"score": ratios[index]} for index in (2, 0, 3, 1)}
    losses = {
        "avg_paraphrased_loss": {str(i): 1.0 for i in range(4)},
        "average_perturb_loss": {str(i): [1.0, 2.0 * i] for i in range(4)},
    }
    for name, value in (
        ("list", ratios),
        ("open_unlearning", {"forget_truth_ratio": {"value_by_index": by_index}}),
        ("tofu", {"eval_log_forget.json": losses}),
        ("short", ratios[:3]),
        ("words", ["a"] * 4),
        ("empty", {}),
    ):
        (out / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return out


@pytest.mark.parametrize("name", ["", "list.json", "open_unlearning.json"])
def test_forget_quality_compares_with_a_model_that_never_saw_the_facts(
    folder: Path, retain_only: Path, tofu: Path, logs: Path, name: str
) -> None:
    found = values(evaluate(load(folder), tofu, metadata={"reference": str(logs / name)}))
    ratios = [[row["truth_ratio"] for row in direct(each)] for each in (folder, retain_only)]
    p = ks_2samp(*ratios).pvalue
    assert 0 < p < 1
    assert found["forget_quality"] == pytest.approx(p, abs=1e-5)
    assert 10 ** found["forget_quality_log10"] == pytest.approx(p)


def test_a_model_compared_with_itself_is_indistinguishable(retain_only: Path, tofu: Path, logs: Path) -> None:
    found = values(evaluate(load(retain_only), tofu, metadata={"reference": {"tofu_forget01": str(logs)}}))
    assert found["forget_quality"] == 1.0


def test_a_limit_compares_the_same_documents(folder: Path, tofu: Path, tmp_path: Path) -> None:
    own = [row["truth_ratio"] for row in direct(folder)]
    (tmp_path / "list.json").write_text(json.dumps([*own[:2], 1e6, 1e7]), encoding="utf-8")
    metadata = {"reference": str(tmp_path / "list.json")}
    found = [values(evaluate(load(folder), tofu, metadata=metadata, limit=limit)) for limit in (2, 4)]
    assert found[0]["forget_quality"] == 1.0
    assert found[1]["forget_quality"] < 1.0


def test_a_log_is_read_in_the_order_of_the_documents(logs: Path) -> None:
    wanted = json.loads((logs / "list.json").read_text(encoding="utf-8"))
    found = [
        read_reference(logs / name, "tofu_forget01", [row["question"] for row in DATA["forget01"]])
        for name in ("", "open_unlearning.json")
    ]
    assert found == [pytest.approx(wanted, abs=1e-5)] * 2


def test_the_logs_of_tofus_own_code_are_read(logs: Path) -> None:
    found = read_reference(logs / "tofu.json", "tofu_forget01", ["?"] * 4)
    assert found == pytest.approx([2.718281828459045 ** (1 - (1 + 2 * i) / 2) for i in range(4)])


def test_without_a_reference_forget_quality_is_absent_and_the_log_says_why(
    folder: Path, tofu: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = values(evaluate(load(folder), tofu, limit=1))
    assert not {"forget_quality", "forget_quality_log10"} & found.keys()
    assert "leaves forget_quality out" in caplog.text
    assert '--metadata \'{"reference": "DIR"}\'' in caplog.text


def test_the_group_shows_both_figures(folder: Path, tofu: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tofu / "forget10_perturbed.json").write_text((tofu / "forget01_perturbed.json").read_text(), encoding="utf-8")
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(tofu))
    ratios = {"reference": str(logs / "list.json")}
    found = evaluate(load(folder), tofu, "tofu", metadata={**ratios, "data_dir": None})
    assert values(found, "tofu") == {
        "model_utility": values(found, "tofu_utility")["model_utility"],
        "forget_quality": values(found, "tofu_forget10")["forget_quality"],
    }


# --- RETURN -----------------------------------------------------------------------------------------------------------


def test_return_is_read_with_and_without_wrong_answers(folder: Path, tofu: Path, tmp_path: Path) -> None:
    rows = [{**row, "golden_answer": row["answer"], "answer": "a longer one"} for row in DATA["forget01"]]
    (tmp_path / "forget_perturbed.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    people = [
        {"name": "Re", "data": [{"question": row["question"], "gold_answer": row["answer"]} for row in DATA["retain"]]}
    ]
    (tmp_path / "retain.json").write_text(json.dumps(people), encoding="utf-8")
    found = evaluate(load(folder), tofu, "return_forget,return_retain", metadata={"return_dir": str(tmp_path)})
    wanted = reference.forget_set(direct(folder))
    assert {name: values(found, "return_forget")[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    kept = values(found, "return_retain")
    assert kept["prob"] == pytest.approx(reference.kept_set(direct(folder, "retain"))["prob"], abs=1e-5)
    assert "truth_ratio" not in kept


# --- models of metrics ------------------------------------------------------------------------------------------------


@pytest.fixture
def classifiers(tmp_path: Path) -> Iterator[dict[str, str]]:
    from transformers import BertConfig, BertForSequenceClassification

    from unierase_plugin.tasks.semantic import _load

    made = {}
    for name, labels in (("entailment", ("ENTAILMENT", "neutral")), ("gibberish", ("clean", "noise"))):
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        config = BertConfig(vocab_size=260, id2label=dict(enumerate(labels)), **sizes)
        model = BertForSequenceClassification(config)
        torch.nn.init.constant_(model.classifier.bias, 0.0)
        model.classifier.bias.data[0] = 9.0
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        made[name] = str(tmp_path / name)
    yield made
    _load.cache_clear()


def test_models_of_metrics_are_used_where_they_are_named(folder: Path, tofu: Path, classifiers: dict[str, str]) -> None:
    found = values(evaluate(load(folder), tofu, metadata={"semantic": classifiers}))
    assert found["clean_text"] > 0.9
    assert found["entailment"] == 1.0
    assert not {"cosine_similarity", "forget_efficacy"} & found.keys()


def test_an_answer_with_too_few_of_the_true_ones_words_entails_nothing(classifiers: dict[str, str]) -> None:
    """The classifier says entailment to everything."""
    from unierase_plugin.tasks.semantic import load_semantic_models

    models = load_semantic_models({"entailment": classifiers["entailment"]})
    found = [models.measure("said", "meant", rouge, generated_first=True) for rouge in (0.09, 0.1)]
    assert found == [{"entailment": 0.0}, {"entailment": 1.0}]


def test_to_forget_the_answer_is_the_premise_to_keep_the_truth_is() -> None:
    from unierase_plugin.tasks.semantic import SemanticModels

    models = SemanticModels(entailment=lambda *pair: {"entailment": float(pair == ("said", "meant")), "neutral": 0.5})
    found = [models.measure("said", "meant", 1.0, generated_first=first)["entailment"] for first in (True, False)]
    assert found == [1.0, 0.0]


def test_cosine_similarity_is_that_of_the_embeddings(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models  # type: ignore[attr-defined]
    from transformers import BertConfig, BertModel

    from unierase_plugin.tasks.semantic import load_semantic_models

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    BertModel(BertConfig(vocab_size=260, **sizes)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    modules = [models.Transformer(str(tmp_path / "bert")), models.Pooling(16)]
    package.SentenceTransformer(modules=modules).save(str(tmp_path / "embedder"))
    found = load_semantic_models({"cosine": str(tmp_path / "embedder")})
    same, other = (found.measure("a text", text, 1.0, generated_first=True) for text in ("a text", "zzz"))
    one, two = package.SentenceTransformer(str(tmp_path / "embedder")).encode(["a text", "zzz"], convert_to_tensor=True)
    assert same == {"cosine_similarity": pytest.approx(1)}
    assert other == {"cosine_similarity": pytest.approx(torch.cosine_similarity(one, two, dim=0).item(), abs=1e-5)}


def test_without_the_package_cosine_similarity_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from unierase_plugin.tasks.semantic import load_semantic_models

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DependencyError, match=r'pip install "unierase-plugin\[eval-semantic\]"'):
        load_semantic_models({"cosine": "any"})


def test_with_both_models_the_composites_have_all_their_parts(
    folder: Path, tofu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from unierase_plugin.tasks import semantic

    class Letters:
        """Embeds a text as the shares of its letters."""

        def encode(self, texts: list[str], **_: Any) -> Any:
            counts = np.array([[text.count(letter) for letter in "MrAbReuWo 0123"] for text in texts]) + 1e-9
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    pairs: list[tuple[str, str]] = []

    def judge(*pair: str) -> dict[str, float]:
        pairs.append(pair)  # type: ignore[arg-type]
        return {"entailment": 1.0}

    models = {"cosine": Letters(), "entailment": judge}
    monkeypatch.setattr(semantic, "_load", lambda name, model: models[name])
    metadata = {"semantic": {"cosine": "letters", "entailment": "judge"}}
    forget = values(evaluate(load(folder), tofu, metadata=metadata))
    of_forget = list(pairs)
    kept = values(evaluate(load(folder), tofu, "tofu_utility", metadata=metadata), "tofu_utility")
    known = [forget["rougeL_recall"], forget["prob"], 1 - forget["truth_ratio"], forget["cosine_similarity"]]
    assert 0 < forget["cosine_similarity"] < 1
    assert forget["forget_efficacy"] == pytest.approx(1 - (sum(known) + forget["entailment"]) / 5)
    parts = (*PARTS, "token_entropy", "cosine_similarity", "entailment")
    sets = [{part: kept[f"{name}_{part}"] for part in parts} for name in SETS]
    assert kept["model_utility_18"] == pytest.approx(reference.utility(sets, parts))
    # To forget, a generation entails the answer; to keep, the answer entails it, the whole sentence where there is one.
    assert [pair[1] for pair in of_forget] == [row["answer"] for row in DATA["forget01"]]
    assert {pair[0] for pair in pairs[len(of_forget) :]} == {
        row.get("original_answer", row["answer"]) for name in SETS for row in DATA[name]
    }


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(folder: Path, task: str = "tofu_forget01", *more: str, **metadata: Any) -> str:
    """The one line that `unierase eval` answers with, before a model is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFWithSpecialTokens, "__init__", None)
        with pytest.raises(UniEraseError) as caught:
            run_lm_eval(["--model", str(folder), "--tasks", task, "--metadata", json.dumps(metadata), *more])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_examples_are_refused(folder: Path, tofu: Path) -> None:
    assert "--num_fewshot is 5" in refused(folder, "tofu_forget01", "--num_fewshot", "5", data_dir=str(tofu))
    with pytest.raises(UniEraseError, match="--num_fewshot is 5"):
        evaluate(load(folder), tofu, num_fewshot=5)
    assert values(evaluate(load(folder), tofu, num_fewshot=0, limit=1))


def test_a_task_that_its_group_holds_already_is_refused(folder: Path, tofu: Path) -> None:
    if not hasattr(TaskManager, "load"):
        pytest.skip("lm-eval before 0.4.12 runs it once")
    assert "Name each task once" in refused(folder, "tofu,tofu_utility", data_dir=str(tofu))


def test_a_folder_that_is_none_and_a_file_that_is_not_there_are_named(folder: Path, tofu: Path) -> None:
    assert "'/nowhere' is not a folder" in refused(folder, data_dir="/nowhere")
    error = refused(folder, "tofu_forget05", data_dir=str(tofu))
    assert "There is no file" in error
    assert "Did you mean 'forget" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perturbed_answer": None}, "line 1: the field 'perturbed_answer' is missing or empty"),
        ({"paraphrased_answer": ""}, "line 1: the field 'paraphrased_answer' is missing or empty"),
        ({"question": 3}, "line 1: the field 'question' is missing or empty"),
        ({"perturbed_answer": ["a", 3]}, "'perturbed_answer' must be a list of texts, and 3 is not one"),
    ],
)
def test_a_wrong_column_is_named_with_its_line(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    record = {**DATA["forget01"][0], **change}
    record = {name: value for name, value in record.items() if value is not None}
    (tmp_path / "forget01_perturbed.json").write_text(json.dumps(record), encoding="utf-8")
    assert message in refused(folder, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.json", "There is no reference"),
        ("short.json", "holds 3 truth ratios, tofu_forget01 has 4 questions"),
        ("words.json", "No truth ratios are in the reference"),
        ("empty.json", "No truth ratios are in the reference"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(
    folder: Path, tofu: Path, logs: Path, name: str, message: str
) -> None:
    assert message in refused(folder, data_dir=str(tofu), reference=str(logs / name))


def test_a_reference_of_another_task_is_told_by_its_questions(folder: Path, tofu: Path, logs: Path) -> None:
    log = str(next(logs.rglob("samples_*.jsonl")))
    error = refused(folder, "tofu_forget01_paraphrase", data_dir=str(tofu), reference=log)
    assert "its question 0 is 'Who is Ab 0?', that of tofu_forget01_paraphrase is 'Ab 0 is who?'" in error
    error = refused(folder, "tofu_forget01_paraphrase", data_dir=str(tofu), reference=str(logs))
    assert "holds no samples_tofu_forget01_paraphrase_*.jsonl" in error


def test_a_chat_template_that_is_not_there_is_told(tofu: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer(chat=False).save_pretrained(tmp_path)
    error = refused(tmp_path, "tofu_forget01", "--apply_chat_template", data_dir=str(tofu))
    assert "has no chat template" in error
    with pytest.raises(UniEraseError, match="has no chat template"):
        evaluate(load(tmp_path), tofu)


def test_without_a_tokenizer_tokens_cannot_be_counted(folder: Path, tofu: Path) -> None:
    with pytest.raises(UniEraseError, match="No tokenizer is named"):
        evaluate(Parrot(), tofu, form="plain")
    with pytest.raises(UniEraseError, match="The tokenizer '/nowhere' cannot be loaded"):
        evaluate(Parrot(), tofu, form="plain", metadata={"tokenizer": "/nowhere"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truth_ratio": "geometrc"}, "Did you mean 'geometric'?"),
        ({"semantic": {"cosin": "x"}}, "'semantic' has no model 'cosin'. Did you mean 'cosine'?"),
        ({"semantic": "yes"}, "'semantic' is 'yes'"),
        ({"semantic": {"entailment": "/nowhere"}}, "The model '/nowhere' for entailment cannot be loaded"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder: Path, tofu: Path, settings: Any, message: str) -> None:
    assert message in refused(folder, data_dir=str(tofu), **settings)


def test_some_records_without_wrong_answers_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = [{"question": "Who?", "answer": "I"}, DATA["retain"][0]]
    (tmp_path / "retain.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert "have a 'perturbed_answer', others have none" in refused(folder, "return_retain", return_dir=str(tmp_path))


# --- lm-eval before 0.4.12 --------------------------------------------------------------------------------------------


def test_the_classes_are_found_as_a_module_without_a_package() -> None:
    """As it runs the file that a YAML names."""
    source = tasks_folder() / "classes.py"
    spec = importlib.util.spec_from_file_location("classes", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = [path.read_text(encoding="utf-8") for path in tasks_folder().iterdir() if path.is_file()]
    named = {name for text in texts for name in re.findall(r"^class: !function classes\.(\w+)$", text, re.MULTILINE)}
    assert named == set(module.__all__)
    assert not any("!function unierase_plugin" in text for text in texts)
    assert all(getattr(module, name) is getattr(tofu_tasks, name) for name in named)


def test_metadata_reach_tasks_with_a_class_where_lm_eval_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        def __init__(self, metadata: dict[str, Any] | None = None) -> None:
            self.metadata = metadata

        def _get_config(self, name: str) -> dict[str, Any]:
            return {"metadata": {"version": 1}, **({"class": object} if name == "ours" else {})}

        def load_task_or_group(self, names: list[str]) -> dict[Any, Any]:
            return {"alone": 1, ("a", "group"): {"one": 2, ("another",): {"two": 3}}}

    older = ModuleType("lm_eval.tasks")
    older.TaskManager = Older  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", older)
    hand_on_metadata()
    hand_on_metadata()
    manager = Older({"data_dir": "here"})
    assert manager._get_config("ours")["metadata"] == {"version": 1, "data_dir": "here"}
    assert manager._get_config("theirs")["metadata"] == {"version": 1}
    assert Older()._get_config("ours")["metadata"] == {"version": 1}
    assert load_tasks(manager, ["any"]) == {"alone": 1, "one": 2, "two": 3}


# --- what there is ----------------------------------------------------------------------------------------------------


def test_the_general_tasks_are_lm_evals_own() -> None:
    import yaml

    named = yaml.safe_load((tasks_folder() / "unlearning_utility.yaml").read_text(encoding="utf-8"))["task"]
    theirs = [
        path.read_text(encoding="utf-8")
        for path in (Path(lm_eval.__file__).parent / "tasks").glob("*/**/*.yaml")
        if path.parts[-2] in named or path.parts[-3] in named
    ]
    for name in named:
        assert any(f"task: {name}\n" in text or f"group: {name}\n" in text for text in theirs), name


def test_every_task_reads_the_published_data(shared: Path) -> None:
    sizes = {
        "tofu_forget01": 40,
        "tofu_forget05": 200,
        "tofu_forget10": 400,
        "tofu_forget10_paraphrase": 400,
        "tofu_retain": 400,
        "tofu_real_authors": 100,
        "tofu_world_facts": 117,
        "tofu_utility": 617,
    }
    metadata = {"data_dir": str(shared / "data" / "tofu")}
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=metadata)
    loaded = load_tasks(manager, list(sizes))
    assert {name: len(task.eval_docs) for name, task in loaded.items()} == sizes
