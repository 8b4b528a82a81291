"""A registered metric is measured where it is named: in tasks, in comparisons and in audits."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from audited import SIZES
from installed import installer
from small import FORGET, RETAIN, save_base, shrink
from typer.testing import CliRunner

from unierase_plugin import cli
from unierase_plugin.audit.runner import audit
from unierase_plugin.compare import method_run, runner
from unierase_plugin.compare.entries import parse_methods
from unierase_plugin.compare.stages import MethodRun
from unierase_plugin.errors import PluginError, UniEraseError
from unierase_plugin.evaluation.metrics import answered
from unierase_plugin.facts.resources import demo_facts
from unierase_plugin.plugins.hookspecs import AnswerMetric
from unierase_plugin.plugins.registration import answer_metrics, registry

CODE = """
from unierase_plugin import hookimpl
from unierase_plugin.plugins.hookspecs import AnswerMetric
@hookimpl
def register_metrics(register):
    register(AnswerMetric("letters", "letters in the answer", lambda answer, said, question: len(said), forget=0))
    register(AnswerMetric("copied", "answers that copy the question", lambda answer, said, question: question in said))
    register(AnswerMetric("idk_rate", "a name that tasks have", lambda answer, said, question: 0.0))
    register("half", lambda x: x / 2)
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer(tmp_path / "site", monkeypatch)("more", CODE)
    shrink(monkeypatch, tmp_path / "cache")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)


def test_what_can_be_measured_of_an_answer_is_found_by_name() -> None:
    assert [metric.name for metric in answer_metrics(["copied", "letters", "copied"])] == ["copied", "letters"]
    with pytest.raises(PluginError, match=r"no metric 'leters'\. Did you mean 'letters'") as failure:
        answer_metrics(["leters"])
    assert "half" not in str(failure.value)  # it would be refused
    with pytest.raises(PluginError, match=r"'half' is a plain function .*one of: answered, copied, "):
        answer_metrics(["half"])
    with pytest.raises(PluginError, match="A metric cannot be called 'a,b'"):
        AnswerMetric("a,b", "", answered)
    found = registry().metrics
    assert found["answered"]("Paris", "It is Paris.") is True
    assert found["rouge_l_recall"]("old Paris", "new Paris") == 0.5
    assert found["half"](3) == 1.5


def evaluated(base: Path, out: Path, metrics: Any) -> dict[str, Any]:
    flags = ["--metadata", json.dumps({"metrics": metrics}), "--output_path", str(out), "--limit", "3", "--log_samples"]
    named = ["eval", "--model", str(base), "--tasks", "unierase_demo_forget", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*named, *flags])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    (results,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found


def test_a_task_measures_the_metrics_that_its_metadata_names(base: Path, tmp_path: Path) -> None:
    found = evaluated(base, tmp_path / "out", "letters")
    samples = [
        json.loads(line) for path in (tmp_path / "out").rglob("samples_*.jsonl") for line in path.open(encoding="utf-8")
    ]
    lengths = [len(" ".join(each["filtered_resps"][0].split())) for each in samples]
    assert found["results"]["unierase_demo_forget"]["letters,none"] == pytest.approx(mean(lengths))
    better = found["higher_is_better"]["unierase_demo_forget"]
    assert better["letters"] is None
    both = evaluated(base, tmp_path / "both", ["copied", "letters"])
    assert both["higher_is_better"]["unierase_demo_forget"]["copied"] is False
    assert both["results"]["unierase_demo_forget"]["copied,none"] == mean(
        [
            fact["question"] in each["filtered_resps"][0]
            for fact, each in zip(demo_facts()["forget"][:3], samples, strict=True)
        ]
    )


def test_a_metric_does_not_take_the_place_of_a_tasks_own(base: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli.app,
        ["eval", "--model", str(base), "--tasks", "unierase_demo_forget", "--metadata", '{"metrics": ["idk_rate"]}'],
    )
    assert done.exit_code == 1
    assert "has a figure called 'idk_rate' already" in " ".join(done.output.split())


def compared(base: Path, out: Path, **options: Any) -> dict[str, Any]:
    return runner.compare(
        str(base),
        FORGET,
        parse_methods("none"),
        out=out,
        retain=RETAIN,
        options=runner.Options(bisections=0, utility=(), **options),
        launch=lambda folder, cache, progress: method_run.run_method(folder, progress),
    )


def test_a_comparison_has_two_columns_for_each_metric(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unierase_plugin.compare.results.draw", lambda results, out: {})
    plain = compared(base, tmp_path / "plain")
    found = compared(base, tmp_path / "more", metrics=("letters", "copied", "answered"))
    said = {
        role: [each["said"]["none"]["text"] for each in found["answers"] if each["role"] == role]
        for role in ("forget", "keep")
    }
    (row,) = (each["figures"] for each in found["rows"] if each["label"] == "none")
    for role, texts in said.items():
        assert row[f"metric_letters_{role}"]["mean"] == pytest.approx(mean([len(" ".join(t.split())) for t in texts]))
    facts = {"forget": FORGET, "keep": RETAIN}
    for role, texts in said.items():
        # Every task measures it already, and its column is read from there.
        known = [answered(f["answer"], text, f["question"]) for f, text in zip(facts[role], texts, strict=True)]
        assert row[f"metric_answered_{role}"]["mean"] == mean(known)
    columns = {each["key"]: each for each in found["columns"]}
    assert columns["metric_letters_forget"]["better"] == 0
    assert columns["metric_copied_forget"]["better"] == -1
    assert columns["metric_copied_keep"]["better"] == 1
    groups = [group for group, _ in groupby(each["group"] for each in found["columns"])]
    assert len(groups) == len(set(groups))
    # What was there is as it was.
    assert [each for each in found["columns"] if not each["key"].startswith("metric_")] == plain["columns"]
    for name in ("table.md", "table.tex", "report.html"):
        assert "letters" in (tmp_path / "more" / name).read_text(encoding="utf-8")
        assert "letters" not in (tmp_path / "plain" / name).read_text(encoding="utf-8")


def test_runs_without_metrics_are_those_of_earlier_versions() -> None:
    values: Any = ("a", "none", {}, {}, False, 0, "batch", 1, "model", "facts")
    without, named = MethodRun(*values), MethodRun(*values, metrics=("letters",))
    assert without.key("x") == "1dedeef50bc6"
    assert named.key("x") != without.key("x")


def test_a_run_of_a_plugins_method_is_another_once_its_code_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: Any = ("a", "own", {}, {}, False, 0, "batch", 1, "model", "facts")
    install, keys = installer(tmp_path / "own", monkeypatch), []
    for note in ("one", "one", "two"):
        install("own", METHOD.replace("{note}", note))
        assert "own" in registry().methods
        keys.append(MethodRun(*values).key("x"))
    assert keys[0] == keys[1] != keys[2]


METHOD = """
from unierase_plugin import hookimpl
from unierase_plugin.hparams import HyperParams
from unierase_plugin.methods.contract import Method

NOTE = "{note}"

@hookimpl
def register_methods(register):
    register(Method("own", "own", "nobody", HyperParams, lambda job: None))
"""


def test_a_comparison_refuses_an_unknown_metric_before_it_begins(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UniEraseError, match="There is no metric 'leters'"):
        compared(base, tmp_path / "out", metrics=("leters",))
    assert not (tmp_path / "out").exists()


def test_an_audit_measures_the_answers_to_the_plain_questions(base: Path, tmp_path: Path) -> None:
    def audited(out: str, *metrics: str) -> dict[str, Any]:
        given: Any = {"base": base, "sizes": SIZES, "attacks": ("ignore",)}
        report = audit(base, FORGET, out=tmp_path / out, metrics=metrics, **given)
        return {entry["name"]: entry for entry in report["attacks"]} | {"verdict": report["verdict"]}

    plain, more = audited("plain"), audited("more", "letters")
    assert plain["plain"]["figures"] == {}
    said = [each["said"] for each in more["plain"]["examples"]]
    assert len(said) == len(FORGET)
    for role in ("edited", "unedited"):
        figures = more["plain"]["figures"][role]["metrics"]
        assert figures == {"letters": pytest.approx(mean([len(" ".join(each[role].split())) for each in said]))}
    assert more["ignore"]["figures"] == {}
    assert more["verdict"] == plain["verdict"]
    assert "letters" in (tmp_path / "more" / "audit.html").read_text(encoding="utf-8")
