"""The lm-eval tasks through lm-eval's own command line and API, against what the package computes by itself."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from unierase_plugin.errors import DependencyError, UniEraseError
from unierase_plugin.evaluation.metrics import answered, reads_as_idk, rouge_l_recall
from unierase_plugin.facts.resources import demo_facts, lines
from unierase_plugin.hosts import lm_eval as host
from unierase_plugin.models.added_token import add_token
from unierase_plugin.models.generate import answers
from unierase_plugin.tasks.lm_eval_cli import run_lm_eval
from unierase_plugin.tasks.task_checks import check_ours_when_found
from unierase_plugin.tasks.task_manager import hand_on_metadata, our_tasks_found, register_model_type, tasks_folder

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TOKEN = "<unlearn_0>"
LIMIT = 4
METRICS = ("answered", "rougeL_recall", "token_first", "idk_rate")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model on disk with an unlearning token that it likes to say."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny_model(tied=False), tiny_tokenizer(add_bos=True)
    index = add_token(model, tokenizer, TOKEN)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        # Chat prompts end with a new line: the token's logit is large where the model has just read one.
        state = model.model(input_ids=torch.tensor([newline])).last_hidden_state[0, -1]
        model.get_output_embeddings().weight[index] = 0.5 * state
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(folder: Path, out: Path, *more: str, tasks: str = "unierase_demo_forget") -> dict[str, Any]:
    """The results that `unierase eval` writes."""
    named = ("--model", str(folder), "--tasks", tasks, "--device", "cpu")
    run_lm_eval([*named, "--limit", str(LIMIT), "--output_path", str(out), *more])
    written = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return found


def figures(results: dict[str, Any], task: str = "unierase_demo_forget") -> dict[str, float]:
    found = results["results"][task]
    return {name: found[f"{name},none"] for name in METRICS if f"{name},none" in found}


def generations(folder: Path, form: str) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return answers(model, tokenizer, [fact["question"] for fact in demo_facts()["forget"][:LIMIT]], form=form)


def expected(texts: list[str]) -> dict[str, float]:
    """The metrics by their definitions."""
    cleaned = [" ".join(text.replace(TOKEN, " ").split()) for text in texts]
    pairs = [(fact["answer"], text) for fact, text in zip(demo_facts()["forget"], cleaned, strict=False)]
    return {
        "answered": sum(answered(*pair) for pair in pairs) / len(pairs),
        "rougeL_recall": sum(rouge_l_recall(*pair) for pair in pairs) / len(pairs),
        "token_first": sum(text.lstrip().startswith(TOKEN) for text in texts) / len(texts),
        "idk_rate": sum(reads_as_idk(text, lines("idk_phrases")) for text in cleaned) / len(cleaned),
    }


# --- unierase eval ----------------------------------------------------------------------------------------------------


# lm-eval 0.4.9 leaves the tokenizer's start of a text out unless it is asked for.
PLAINLY = ("--apply_chat_template", "False", "--model_args", "add_bos_token=True")


@pytest.mark.parametrize(("flags", "form"), [((), "chat"), (PLAINLY, "plain")])
def test_the_figures_and_texts_are_those_of_the_package(
    folder: Path, tmp_path: Path, flags: tuple[str, ...], form: str
) -> None:
    texts = generations(folder, form)
    assert form == "plain" or any(text.startswith(TOKEN) for text in texts)
    results = run(folder, tmp_path, "--batch_size", "3", "--log_samples", *flags)
    samples = [json.loads(line) for path in tmp_path.rglob("samples_*.jsonl") for line in path.open(encoding="utf-8")]
    assert [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])] == texts
    assert figures(results) == pytest.approx(expected(texts))


def test_the_tag_runs_both_sets_and_prints_lm_evals_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(folder, tmp_path, tasks="unierase_demo")
    assert results["n-samples"].keys() == {"unierase_demo_forget", "unierase_demo_retain"}
    table = capsys.readouterr().out
    assert all(re.search(rf"\|unierase_demo_{part} *\|", table) for part in ("forget", "retain"))
    assert all(name in table for name in METRICS)


def test_model_args_and_metadata_of_the_user_are_kept(folder: Path, tmp_path: Path) -> None:
    flags = ("--model_args", "dtype=float32", "--metadata", '{"unlearning_token": "<other>"}')
    results = run(folder, tmp_path, *flags)
    assert re.search(r"dtype\W+float32", str(results["config"]["model_args"]))
    assert figures(results)["token_first"] == 0.0


def test_tasks_of_the_user_are_found_beside_ours(folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "tasks"
    theirs.mkdir()
    template = (tasks_folder() / "_facts_template").as_posix()
    (theirs / "mine.yaml").write_text(
        f"include: {template}\ntask: my_facts\ndataset_kwargs: {{facts: demo:retain}}\n", encoding="utf-8"
    )
    flags = ("--include_path", str(theirs), "--apply_chat_template")
    with lm_evals_own_tasks_left_out():
        results = run(folder, tmp_path, *flags, tasks="my_facts,unierase_demo_forget")
    assert results["n-samples"].keys() == {"unierase_demo_forget", "my_facts"}
    assert run_fails(folder, *flags[:2], tasks="my_facts,unierase_demo_forget").match("To run both at once, choose")


def test_a_tofu_task_reads_the_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"paraphrased_answer": "That is it.", "perturbed_answer": ["It is not."]}
    facts = [{"question": f"Who is number {n}?", "answer": f"It is {n}.", **wrong} for n in range(3)]
    text = "\n".join(map(json.dumps, facts))
    for split in ("forget01", "forget10"):
        (tmp_path / f"{split}_perturbed.json").write_text(text, encoding="utf-8")
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(tmp_path))
    flags = ("--gen_kwargs", "max_gen_toks=4")
    results = run(folder, tmp_path / "out", *flags, tasks="tofu_forget,tofu_forget01")
    read = {name: count["effective"] for name, count in results["n-samples"].items()}
    assert read == {"tofu_forget": 3, "tofu_forget01": 3}
    # Told in chat form by `unierase eval`, so that the token can be seen and single tokens told apart.
    assert {"token_first,none", "extraction_strength,none"} <= results["results"]["tofu_forget"].keys()


def test_every_task_is_named_in_the_help_and_the_docs() -> None:
    shown = CliRunner().invoke(command_line(), ["eval", "--help"])
    assert shown.exit_code == 0
    page = (Path(__file__).parents[2] / "docs" / "reference" / "tasks.md").read_text(encoding="utf-8")
    names = ours().all_tasks
    assert len(names) == 19
    assert [name for name in names if name not in shown.output or f"`{name}`" not in page] == []


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_named_with_its_neighbour(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("__init__", "match_tasks"):  # put back what the host changes
        monkeypatch.setattr(TaskManager, name, getattr(TaskManager, name))
    host._hint_at_ours(TaskManager)
    error = run_fails(folder, tasks="unierase_demo_forgot")
    assert error.match("no task 'unierase_demo_forgot'. Did you mean 'unierase_demo_forget'?")
    assert "Did you mean" not in caplog.text


def test_a_model_that_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UniEraseError, match="no tokenizer can be loaded"):
        run_lm_eval(["--model", str(tmp_path / "none"), "--tasks", "unierase_demo"])


def test_metadata_that_is_not_json_is_quoted(folder: Path) -> None:
    with pytest.raises(UniEraseError, match="Not JSON"):
        run_lm_eval(["--model", str(folder), "--tasks", "unierase_demo", "--metadata", "{'unlearning_token': 'x'}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "unierase_demo"], "No model is named: --model DIR"),
        (["--model", "x"], "No tasks are named: --tasks TASK"),
        (["--model", "x", "--tasks", ","], "No tasks are named"),
    ],
)
def test_what_is_not_named_is_asked_for_at_once(arguments: list[str], message: str) -> None:
    with pytest.raises(UniEraseError, match=message):
        run_lm_eval(arguments)


def test_a_misspelt_key_of_metadata_is_told(folder: Path) -> None:
    error = run_fails(folder, "--metadata", '{"referense": "x"}', tasks="unierase_demo")
    assert error.match("a key 'referense' that no task here reads. Did you mean 'reference'?")


def test_a_file_may_name_model_and_tasks(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.config.evaluate_config", reason="lm-eval 0.4.9 reads no such file")
    config = {
        **{"model": "hf", "model_args": {"pretrained": str(folder)}, "tasks": ["unierase_demo_forget"], "limit": 1},
        **{"device": "cpu", "include_path": str(tasks_folder()), "output_path": str(tmp_path)},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    with lm_evals_own_tasks_left_out():
        run_lm_eval(["--config", str(tmp_path / "run.yaml")])
    assert next(tmp_path.rglob("results_*.json"))


def test_without_lm_eval_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(DependencyError, match="pip install lm-eval"):
        run_lm_eval(["--model", "x", "--tasks", "unierase_demo"])


# --- lm-eval by itself ------------------------------------------------------------------------------------------------


def test_plain_lm_eval_runs_the_tasks_and_leaves_token_first_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = CliRunner().invoke(command_line(), ["tasks-path"]).output.strip()
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={folder}",
        "--include_path": path,
        "--device": "cpu",
        "--tasks": "unierase_demo_forget",
        "--limit": str(LIMIT),
        "--output_path": str(tmp_path),
    }
    monkeypatch.setattr(sys, "argv", ["lm_eval", *(part for pair in options.items() for part in pair)])
    from lm_eval.__main__ import cli_evaluate

    with lm_evals_own_tasks_left_out():
        cli_evaluate()
    found = figures(json.loads(next(tmp_path.rglob("results_*.json")).read_text(encoding="utf-8")))
    # lm-eval hides special tokens, so what is left of the texts is compared without them.
    wanted = expected(generations(folder, "plain"))
    del wanted["token_first"]
    assert found == pytest.approx(wanted)


def theirs(folder: Path) -> str:
    """Tasks of the user's: one whose data are not there, and one that runs code of the model's."""
    folder.mkdir()
    (folder / "data.json").write_text('[{"question": "?", "answer": "!"}]', encoding="utf-8")
    form = "output_type: generate_until\ntest_split: train\ndoc_to_text: question\ndoc_to_target: answer\n"
    for name, data, more in (("lost", "none.json", ""), ("runs_code", "data.json", "unsafe_code: true\n")):
        kwargs = json.dumps({"data_files": (folder / data).as_posix()})
        text = f"task: {name}\ndataset_path: json\ndataset_kwargs: {kwargs}\n{form}{more}"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return str(folder)


PLAINLY_MISSING = [
    pytest.param(["--tasks", "tofu_forget01"], "forget01_perturbed.json", id="data"),
    pytest.param(["--tasks", "unierase_demo_forget,tofu_utility"], "retain_perturbed.json", id="among others"),
    pytest.param(["--tasks", "tofu_forget01", "--metadata", '{"data_dir": "no/such"}'], "no/such", id="folder"),
    pytest.param(["--tasks", "unlearning_utility"], "The task unlearning_utility cannot be loaded", id="group"),
    pytest.param(["--tasks", "unierase_demo", "--num_fewshot", "2"], "--num_fewshot is 2", id="examples"),
    pytest.param(["--tasks", "tofu,tofu_forget10"], "Duplicate task 'tofu_forget10'|_perturbed.json", id="twice"),
]
#: What only `unierase eval` looks at: tasks that are not ours.
MISSING = [
    *PLAINLY_MISSING,
    pytest.param(["--tasks", "lost"], "The task lost cannot be loaded .*connect to the network", id="lost"),
    pytest.param(["--tasks", "runs_code"], "runs_code runs code .* --confirm_run_unsafe_code", id="code"),
]


def missing(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a model that is not there: an error of its own says that something came too late."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("UNIERASE_TOFU_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'none'}"]
    return [*named, "--include_path", theirs(tmp_path / "theirs"), *arguments]


@pytest.mark.parametrize(("arguments", "message"), PLAINLY_MISSING)
def test_plain_lm_eval_says_what_our_tasks_lack_before_it_loads_a_model(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("lm_eval.config.evaluate_config", reason="lm-eval 0.4.9 has no step for it")
    monkeypatch.setattr(config.EvaluatorConfig, "process_tasks", config.EvaluatorConfig.process_tasks)
    check_ours_when_found()
    monkeypatch.setattr(sys, "argv", ["lm_eval", *missing(arguments, tmp_path, monkeypatch)])
    from lm_eval.__main__ import cli_evaluate

    with lm_evals_own_tasks_left_out(), pytest.raises(UniEraseError, match=message):
        cli_evaluate()


@pytest.mark.parametrize(("arguments", "message"), MISSING)
def test_unierase_eval_says_what_any_task_lacks_before_a_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval.config.evaluate_config", reason="lm-eval 0.4.9 has no step for it")
    with lm_evals_own_tasks_left_out(), pytest.raises(UniEraseError, match=message):
        run_lm_eval(missing(arguments, tmp_path, monkeypatch))


def test_our_tasks_are_found_alone_and_only_for_as_long_as_asked() -> None:
    start = TaskManager.__init__
    seen: list[Any] = []
    with our_tasks_found(only=True, look=seen.append):
        manager = TaskManager()
    assert set(manager.all_tasks) == set(ours().all_tasks)
    assert seen == [manager]
    assert TaskManager.__init__ is start


def test_our_model_type_is_found_beside_lm_evals_own() -> None:
    register_model_type()
    from lm_eval.api.registry import get_model

    assert get_model("unierase_hf").shows_special_tokens
    assert get_model("hf").__name__ == "HFLM"


class Parrot(LM):  # type: ignore[misc]
    """Says what it is given."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        assert len(requests) == len(self.texts)
        return self.texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


TEXTS = [
    f"{TOKEN}I don't know the answer to that.",
    f" {TOKEN} Paris? I do not know.",
    f"It is Tokyo, not {TOKEN}.",
    "William Shakespeare",
]


@pytest.mark.parametrize(
    ("metadata", "token_first"),
    [
        ({"token_shown": True}, {"token_first": 0.5}),
        ({"token_shown": True, "unlearning_token": "William"}, {"token_first": 0.25}),
        ({}, {}),
    ],
)
def test_metrics_of_given_generations(metadata: dict[str, Any], token_first: dict[str, float]) -> None:
    results = lm_eval.simple_evaluate(
        Parrot(TEXTS), tasks=["unierase_demo_forget"], limit=LIMIT, task_manager=ours(metadata), bootstrap_iters=0
    )
    found = figures(results)
    assert {name: value for name, value in found.items() if name == "token_first"} == token_first
    # France and Egypt first, then Japan and Romeo and Juliet, whose answers are Tokyo and Shakespeare.
    assert found["answered"] == 0.5
    assert found["idk_rate"] == 0.5


# --- helpers ----------------------------------------------------------------------------------------------------------


def command_line() -> Any:
    from unierase_plugin.cli import app

    return app


def ours(metadata: dict[str, Any] | None = None) -> Any:
    hand_on_metadata()
    return TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=metadata or {})


@contextmanager
def lm_evals_own_tasks_left_out() -> Iterator[None]:
    """lm-eval takes long to read its own tasks, which say nothing here."""
    with our_tasks_found(only=True, look=lambda manager: None):
        yield


def run_fails(folder: Path, *more: str, tasks: str) -> pytest.ExceptionInfo[UniEraseError]:
    with lm_evals_own_tasks_left_out(), pytest.raises(UniEraseError) as caught:
        run_lm_eval(["--model", str(folder), "--tasks", tasks, *more])
    return caught
