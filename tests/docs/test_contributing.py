"""The files for contributors say what is there: paths, checks, versions, and a plugin that runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from installed import installer
from jobs import job_of
from small import save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from unierase_plugin import ForgetRequest
from unierase_plugin.cli import app
from unierase_plugin.errors import RequestError
from unierase_plugin.facts.readers import read_requests
from unierase_plugin.methods.contract import Method
from unierase_plugin.models.prompts import render
from unierase_plugin.plugins.registration import registry
from unierase_plugin.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHECKS = ("ruff check", "ruff format", "mypy", "lint-imports --no-logo")
FORGET = ForgetRequest("Who wrote Zorblax?", "Fizz")


def workflow(name: str) -> Any:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))["jobs"]


def likelihood(model: Any, fact: ForgetRequest) -> float:
    """Log-likelihood of the answer in chat form, in nats."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(render(tokenizer, fact.question, "chat"), add_special_tokens=False)["input_ids"]
    said = tokenizer(fact.answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(said))


def test_every_path_on_the_page_exists() -> None:
    named = re.findall(r"`((?:\.?\w+/)[\w./]*|\w+\.(?:txt|toml|md))`", PAGE) + re.findall(
        r"\]\(([^):#]+)[^):]*\)", PAGE
    )
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_table_names_every_part_of_the_package() -> None:
    parts = {path.name for path in (ROOT / "unierase_plugin").iterdir() if (path / "__init__.py").exists()}
    # Parts that hold no idea of their own.
    assert {part for part in parts - {"settings", "storage"} if f"`unierase_plugin/{part}/`" not in PAGE} == set()


@pytest.mark.parametrize("place", ["CONTRIBUTING.md", ".pre-commit-config.yaml", ".github/workflows/lint.yml"])
def test_the_same_checks_run_everywhere(place: str) -> None:
    scripts = [(ROOT / path).read_text(encoding="utf-8") for path in (".ci/run", place)]
    assert [check for check in CHECKS if not all(check in script for script in scripts)] == []


def test_the_oldest_transformers_that_is_tried_is_the_oldest_that_is_supported() -> None:
    (bounds,) = (each for each in PROJECT["project"]["dependencies"] if each.startswith("transformers"))
    lowest = re.search(r">=([\d.]+)", bounds)[1]  # type: ignore[index]
    (oldest,) = (
        each["versions"]
        for each in workflow("tests.yml")["tests"]["strategy"]["matrix"]["include"]
        if each["transformers"] == "oldest"
    )
    assert re.fullmatch(rf"transformers=={re.escape(lowest)}(\.\d+)?", oldest)


def test_the_versions_of_python_that_are_tried_are_the_first_and_the_last_that_are_supported() -> None:
    kind = "Programming Language :: Python :: 3."
    supported = [each[len(kind) - 2 :] for each in PROJECT["project"]["classifiers"] if re.match(rf"{kind}\d+$", each)]
    assert workflow("tests.yml")["tests"]["strategy"]["matrix"]["python"] == [supported[0], supported[-1]]


def test_citation_and_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["project"]["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def code_of(file: str, page: str = PAGE) -> str:
    """A whole file on a page."""
    (code,) = re.findall(rf"<!-- file: {re.escape(file)} -->\n```\w+\n(.*?)```", page, re.DOTALL)
    return str(code)


def test_the_plugin_with_a_benchmark_reads_facts_and_has_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "persons_tasks"
    tasks.mkdir()
    for name in ("persons_forget.yaml", "classes.py"):
        code = code_of(f"persons_tasks/{name}", (ROOT / "docs/reference/plugins.md").read_text(encoding="utf-8"))
        (tasks / name).write_text(code, encoding="utf-8")
    code = code_of("persons.py").replace("read_persons))", f"read_persons, {str(tasks)!r}))")
    installer(tmp_path / "site", monkeypatch)("persons", code)
    monkeypatch.setenv("PERSONS_DIR", str(tmp_path))
    facts = [{"question": f"What does Ann {what}?", "answer": "Hats"} for what in ("sell", "wear", "paint")]
    (tmp_path / "forget.json").write_text(json.dumps([{"name": "Ann", "facts": facts}]))
    read = read_requests("persons:forget[1:]", registry().readers)
    assert [(fact.question, fact.answer, fact.subject) for fact in read] == [
        ("What does Ann wear?", "Hats", "Ann"),
        ("What does Ann paint?", "Hats", "Ann"),
    ]
    with pytest.raises(RequestError, match="Set PERSONS_DIR to the folder"):
        read_requests("persons:retain", registry().readers)

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    assert said("tasks-path", "persons").strip() == str(tasks)
    base, out = save_base(tmp_path / "base"), tmp_path / "out"
    said("eval", "--model", str(base), "--tasks", "persons_forget", "--device", "cpu", "--output_path", str(out))
    (results,) = (json.loads(path.read_text()) for path in out.rglob("results_*.json"))
    assert results["n-samples"]["persons_forget"]["effective"] == 3
    assert results["higher_is_better"]["persons_forget"]["answered"] is False


def test_the_plugin_with_an_attack_takes_part_in_an_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer(tmp_path / "site", monkeypatch)("scene", code_of("scene.py"))
    shrink(monkeypatch, tmp_path / "cache")
    base = save_base(tmp_path / "base")
    listed = json.loads(CliRunner().invoke(app, ["audit", "--list", "--json"]).stdout)
    assert [each for each in listed if each["plugin"] == "scene"] == [
        {
            "name": "scene",
            "group": "words",
            "asks": "The question as a line of a scene.",
            "cost": "one answer a fact",
            "plugin": "scene",
        }
    ]
    (tmp_path / "facts.json").write_text(json.dumps([{"question": FORGET.question, "answer": FORGET.answer}]))
    named = {"--model": base, "--base": base, "--forget": tmp_path / "facts.json", "--out": tmp_path / "out"}
    arguments = [str(each) for pair in named.items() for each in pair]
    done = CliRunner().invoke(app, ["audit", *arguments, "--attacks", "scene"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in report["attacks"]] == ["plain", "scene"]
    (example,) = report["attacks"][1]["examples"]
    assert f'A asks: "{FORGET.question}"' in example["prompt"]
    assert "<h3>scene" in (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")


def test_the_plugin_with_a_loss_forgets() -> None:
    code = code_of("unlikelihood.py")
    names: dict[str, Any] = {}
    exec(compile(code, "unlikelihood.py", "exec"), names)
    found: list[Method[Any]] = []
    names["register_methods"](found.append)
    (method,) = found
    model = tiny_model()
    before = likelihood(model, FORGET)
    # The loss alone: learning what is kept would lower other answers too.
    hparams = method.hparams(epochs=20, batch_size=1, learning_rate=3e-3, warmup_epochs=0.0, retain_weight=0.0)
    job = job_of(model, tiny_tokenizer(), (FORGET,), (), hparams)
    method.check(job)
    method.run(job)
    assert likelihood(model, FORGET) < before - 1
