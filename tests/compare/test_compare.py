"""Methods compared on a tiny model: every method a row, failures too; resumed; tuned; matched at equal retention."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small import FORGET, FORGET_OTHERS, RETAIN, SHORT, save_base, shrink
from tiny import tiny_model

from unierase_plugin.cli.console import progress as logged
from unierase_plugin.compare import made_models, method_run, runner
from unierase_plugin.compare.columns import COLUMNS
from unierase_plugin.compare.entries import SETS, parse_method, parse_methods, settings_of
from unierase_plugin.compare.facts import at_most, divide, parts_of, read_facts, records
from unierase_plugin.compare.figures import left
from unierase_plugin.compare.launch import in_a_process
from unierase_plugin.compare.matching import Mixture, calibrate
from unierase_plugin.compare.measure import Judge
from unierase_plugin.compare.measuring import Measurer
from unierase_plugin.compare.runner import Options, compare
from unierase_plugin.compare.search import choose, search_space, tries
from unierase_plugin.errors import HyperParamsError, PluginError, RequestError, UniEraseError
from unierase_plugin.methods.contract import Progress
from unierase_plugin.models.loading import load

QUICK = "@epochs=4@warmup_epochs=0@learning_rate=3e-3@batch_size=2"
EDIT = "".join(f"@{name}={json.dumps(value)}" for name, value in SHORT.items())


def facts(records: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {**each, "paraphrased_answer": f"It is {each['answer']}", "perturbed_answer": ["It is Ann", "It is Ben"]}
        for each in records
    ]


def here(folder: Path, cache: Path, progress: Progress) -> None:
    """A method in this process: what it does is the same, and the tests' short texts hold in it."""
    method_run.run_method(folder, progress)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink(monkeypatch, tmp_path / "cache")
    # Pictures take longer than a tiny model does; test_compare_page.py draws them.
    monkeypatch.setattr("unierase_plugin.compare.results.draw", lambda results, out: {})
    return save_base(tmp_path / "base")


def run(base: Path, out: Path, methods: str, launch: Any = here, **changes: Any) -> dict[str, Any]:
    options = Options(**{"bisections": 2, "utility": (), **changes})
    reference = changes.pop("reference", "")
    return compare(
        str(base),
        facts(FORGET),
        parse_methods(methods),
        out=out,
        retain=facts((*RETAIN, *FORGET_OTHERS)),
        reference=reference,
        options=options,
        launch=launch,
    )


def rows(results: dict[str, Any]) -> dict[str, Any]:
    return {row["label"]: row for row in results["rows"]}


# --- the whole -------------------------------------------------------------------------------------------------------


def test_every_method_is_a_row_and_one_that_fails_says_so(base: Path, tmp_path: Path) -> None:
    ruined = "npo_gd@learning_rate=1e30@epochs=2@warmup_epochs=0"
    results = run(base, tmp_path / "out", f"memit:eos{EDIT},ga_gd{QUICK},prompt_guard,{ruined}", seeds=(0, 1))
    found = rows(results)
    assert list(found) == ["none", f"memit:eos{EDIT}", f"ga_gd{QUICK}", "prompt_guard", ruined]
    assert found[f"ga_gd{QUICK}"]["device"].startswith("cpu")
    assert {label: row["status"] for label, row in found.items()} == {
        **dict.fromkeys(found, "ok"),
        ruined: "failed",
    }
    assert "NaN" in found[ruined]["failures"][0]["error"]
    assert "Failed" in " ".join(results["answer"])
    # The rest of the run is there, with a spread over the seeds.
    figure = found[f"ga_gd{QUICK}"]["figures"]["forget_prob"]
    assert figure["n"] == 2
    assert figure["sd"] is not None
    assert found["none"]["figures"]["keep_prob"]["mean"] == 1.0
    assert found["prompt_guard"]["not_matched"] is not None
    assert found["prompt_guard"]["figures"]["parameters"]["mean"] == 0
    assert 0 < found[f"memit:eos{EDIT}"]["figures"]["parameters"]["mean"] < 50
    for name in ("results.json", "table.md", "table.tex", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    # No model is left behind.
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_documentation_names_every_key_of_the_results(base: Path, tmp_path: Path) -> None:
    results = run(base, tmp_path / "out", "none", bisections=0)
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "compare.md").read_text(encoding="utf-8")
    named = [*results, *(f"rows[].{key}" for key in results["rows"][0])]
    assert [key for key in named if f"`{key}" not in text] == []


def test_a_reference_gives_forget_quality_and_a_row(base: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", tiny_model(seed=1))
    options = Options(bisections=0, utility=())
    results = compare(
        str(base),
        facts(FORGET),
        parse_methods("none"),
        out=tmp_path / "out",
        retain=facts(RETAIN),
        reference=str(other),
        options=options,
        launch=here,
    )
    found = rows(results)
    assert list(found) == ["reference", "none"]
    assert 0 < found["none"]["figures"]["forget_quality"]["mean"] <= 1
    assert found["none"]["figures"]["truth_ratio"]["mean"] is not None


def test_figures_are_those_of_the_task_on_the_folder(base: Path, tmp_path: Path) -> None:
    """The comparison adds no metric: a run's figures are what lm-eval's task gives for the same model."""
    from unierase_plugin.compare.measure import Judge
    from unierase_plugin.models.loading import load

    results = run(base, tmp_path / "out", "none", bisections=0)
    judge = Judge(*load(base, "cpu"), 4)
    figures, samples = judge.facts(records(read_facts(facts(FORGET))), "forget")
    row = rows(results)["none"]["figures"]
    assert row["forget_prob"]["mean"] == pytest.approx(figures["prob"])
    assert row["fe"]["mean"] == pytest.approx(figures["forget_efficacy_3"])
    assert [each["question"] for each in samples] == [each["question"] for each in FORGET]
    said = {each["question"]: each["said"]["none"]["text"] for each in results["answers"] if each["role"] == "forget"}
    assert said == {each["question"]: each["said"] for each in samples}


def test_a_stopped_comparison_goes_on_where_it_was(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, out = f"ga_gd{QUICK},npo_gd{QUICK}", tmp_path / "out"
    whole = run(base, tmp_path / "whole", methods)
    real, calls = Measurer.figures, []

    def stops(self: Any, *args: Any) -> Any:
        calls.append(self.maker.run.label)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Measurer, "figures", stops)
    with pytest.raises(KeyboardInterrupt):
        run(base, out, methods)
    monkeypatch.setattr(Measurer, "figures", real)
    trained: list[str] = []
    monkeypatch.setattr(made_models, "unlearn", _counting(made_models.unlearn, trained))  # type: ignore[attr-defined]
    resumed = run(base, out, methods)
    # The first method had been trained before the kill, and is not trained again.
    assert trained == ["npo_gd"]
    for label in rows(whole):
        kept, again = (
            {key: figure["mean"] for key, figure in rows(found)[label]["figures"].items()} for found in (whole, resumed)
        )
        for key in set(kept) - {"seconds", "memory"}:
            assert again[key] == kept[key], (label, key)
    trained.clear()
    run(base, out, methods)
    assert trained == []


def _counting(function: Any, calls: list[str]) -> Any:
    def called(*args: Any, **options: Any) -> Any:
        calls.append(options["method"])
        return function(*args, **options)

    return called


def test_what_failed_is_tried_again_when_asked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label, real = f"ga_gd{QUICK}", made_models.unlearn  # type: ignore[attr-defined]

    def no_memory(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made_models, "unlearn", no_memory)
    assert rows(run(base, tmp_path / "out", label))[label]["failures"][0]["kind"] == "out of memory"
    monkeypatch.setattr(made_models, "unlearn", real)
    assert rows(run(base, tmp_path / "out", label))[label]["status"] == "failed"
    assert rows(run(base, tmp_path / "out", label, retry=True))[label]["status"] == "ok"


# --- scenarios -------------------------------------------------------------------------------------------------------


def test_sequential_measures_after_every_step_on_all_facts_so_far(base: Path, tmp_path: Path) -> None:
    label = f"memit:token{EDIT}"
    results = run(base, tmp_path / "out", f"{label},ga_gd{QUICK},prompt_guard", scenario="sequential", steps=2)
    for name, row in rows(results).items():
        assert [point["step"] for point in row["curve"]] == ([] if name == "none" else [1, 2]), name
    last = rows(results)[label]["curve"][-1]["forget_prob"]["mean"]
    # After the last step all facts have been asked, as they are for the row.
    assert rows(results)[label]["figures"]["forget_prob"]["mean"] == pytest.approx(last)


def test_precise_takes_each_request_alone(base: Path, tmp_path: Path) -> None:
    label = f"ga_gd{QUICK}"
    results = run(base, tmp_path / "out", label, scenario="precise")
    folder = next((tmp_path / "out" / "cells").glob("ga_gd*"))
    alone = [json.loads((folder / f"request-{at}.json").read_text())["forget"]["prob"] for at in (1, 2)]
    assert rows(results)[label]["figures"]["forget_prob"]["mean"] == pytest.approx(sum(alone) / 2)


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_the_budget_is_spent_on_validation_facts_alone(base: Path, tmp_path: Path) -> None:
    label = "ga_gd@epochs=4@warmup_epochs=0@batch_size=2"
    results = run(base, tmp_path / "out", label, budget=3, bisections=0)
    search = results["searches"][label]
    assert len(search["tries"]) == 3
    assert search["tries"][0]["settings"] == {}
    outcomes = [each if "left" in each else None for each in search["tries"]]
    assert search["chosen"] == choose(outcomes, 0.95)
    chosen = search["tries"][search["chosen"]]["settings"]
    row = rows(results)[label]
    assert row["tuned"] == chosen
    assert {name: row["settings"][name] for name in chosen} == chosen
    parts = json.loads((tmp_path / "out" / "facts.json").read_text())
    for role in ("forget", "keep"):
        asked, used = ({each["question"] for each in parts[f"{role}_{part}"]} for part in ("shown", "validation"))
        assert not asked & used
        assert asked | used == {each["question"] for each in parts[role]}


def test_a_try_that_keeps_too_little_is_read_where_it_keeps_enough(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unierase_plugin.compare.search.search_space", lambda *_: {"learning_rate": (1e-3, 3e-3)})
    label = "ga_gd@retain_weight=0@epochs=4@warmup_epochs=0@batch_size=2"
    found = run(base, tmp_path / "out", label, budget=3, bisections=4, keep_models=True)["searches"][label]
    assert any(each["retention_raw"] < 0.95 for each in found["tries"])
    parts = json.loads((tmp_path / "out" / "facts.json").read_text())
    for at, each in enumerate(found["tries"]):
        assert each["retention"] >= 0.95
        assert (each["alpha"] == 1) == (each["retention_raw"] >= 0.95)
        if at:
            rate = each["settings"]["learning_rate"]
            [job] = [
                job
                for job in (tmp_path / "out" / "cells").glob("ga_gd*try*/job.json")
                if json.loads(job.read_text())["tried"] == {"learning_rate": rate}
            ]
            # The mixture by hand, of the two folders.
            (mixed, tokenizer), (original, _) = load(str(job.parent / "model")), load(str(base))
            for name, weight in mixed.named_parameters():
                start = original.get_parameter(name).detach()
                weight.data = start + each["alpha"] * (weight.detach() - start)
            figures = Judge(mixed, tokenizer, 8).facts(parts["forget_validation"], "forget")[0]
            assert left(figures) == pytest.approx(each["left"], abs=1e-5)


def test_the_choice_is_the_least_left_among_those_that_keep_enough() -> None:
    outcomes = [
        {"left": 0.9, "retention": 1.0},
        {"left": 0.1, "retention": 0.5},
        {"left": 0.3, "retention": 0.96},
        None,
    ]
    assert choose(outcomes, 0.95) == 2
    assert choose(outcomes[1:2] + outcomes[3:], 0.95) == 0
    assert choose([None], 0.95) is None


@pytest.mark.parametrize(
    "name", ["unierase", "removal", "rome", "memit", "alphaedit", "npo_gd", "simnpo", "undial", "rmu", "lunar"]
)
def test_every_try_is_a_setting_that_the_method_takes(name: str) -> None:
    entry = parse_method(name)
    published = settings_of(entry, "").as_dict()
    drawn = tries(search_space(entry, 30), published, 40, seed=0)
    assert drawn[0] == {}
    assert len({json.dumps(each, sort_keys=True) for each in drawn}) == len(drawn) <= 40
    for each in drawn:
        assert bool(each) == (settings_of(entry, "", each) != settings_of(entry, ""))


def test_what_is_set_by_hand_is_not_searched() -> None:
    assert "learning_rate" not in search_space(parse_method("npo_gd@learning_rate=1e-5"), 30)
    assert search_space(parse_method("prompt_guard"), 30) == {}


# --- equal retention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [0.03, 0.3, 0.77])
@pytest.mark.parametrize("steps", [4, 8])
def test_calibration_ends_within_a_step_below_where_retention_falls_under_the_target(edge: float, steps: int) -> None:
    found = calibrate(lambda alpha: 1 - 0.05 * alpha / edge, 0.95, steps)
    assert found.retention >= 0.95
    assert edge - 2.0**-steps <= found.alpha <= edge


def test_an_edit_that_keeps_enough_is_left_whole_and_one_that_never_does_is_taken_back() -> None:
    assert calibrate(lambda alpha: 0.99, 0.95, 5).alpha == 1.0
    assert calibrate(lambda alpha: 1.0 if alpha == 0 else 0.0, 0.95, 5).alpha == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_gives_both_ends_to_the_bit(dtype: torch.dtype) -> None:
    original, edited = tiny_model(dtype=dtype), tiny_model(dtype=dtype, seed=1)
    ends = {name: weight.detach().clone() for name, weight in edited.named_parameters()}
    mixture = Mixture(edited, original)
    assert mixture
    mixture.set(0.5)
    name, weight = next(iter(edited.named_parameters()))
    halfway = (ends[name].float() + dict(original.named_parameters())[name].float()) / 2
    assert torch.allclose(weight.float(), halfway, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)
    mixture.set(0.0)
    for name, weight in original.named_parameters():
        assert torch.equal(weight, edited.get_parameter(name)), name
    mixture.set(1.0)
    for name, weight in ends.items():
        assert torch.equal(weight, edited.get_parameter(name)), name


def test_rows_that_an_edit_added_stay(base: Path) -> None:
    original, edited = tiny_model(), tiny_model(vocabulary=264, seed=1)
    added = edited.get_input_embeddings().weight[260:].detach().clone()
    Mixture(edited, original).set(0.0)
    embedding = edited.get_input_embeddings().weight
    assert torch.equal(embedding[260:], added)
    assert torch.equal(embedding[:260], original.get_input_embeddings().weight)


def test_a_model_that_was_not_changed_has_nothing_to_mix() -> None:
    assert not Mixture(tiny_model(), tiny_model())


def test_the_retention_reached_is_the_models_own_at_that_alpha(base: Path, tmp_path: Path) -> None:
    label = f"ga_gd{QUICK}"
    run(base, tmp_path / "out", label, bisections=4, keep_models=True, target=0.9)
    folder = next((tmp_path / "out" / "cells").glob("ga_gd*"))
    matched = json.loads((folder / "matched.json").read_text())
    assert matched["retention_validation"] >= 0.9 or matched["alpha"] == 0
    above = [kept for alpha, kept in matched["tried"] if alpha > matched["alpha"]]
    assert all(kept < 0.9 for kept in above)


# --- names and parts -------------------------------------------------------------------------------------------------


def test_names_carry_targets_settings_and_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("v_lr: 0.3\n")
    found = parse_methods(
        f"memit:eos, memit@target=eos@layers=[1,2], memit@hparams={path},npo_gd@epochs=2,npo_gd@epochs=2"
    )
    assert [settings_of(each, "").as_dict().get("target") for each in found] == ["eos", "eos", "idk", None]
    assert settings_of(found[1], "").layers == (1, 2)
    assert settings_of(found[2], "").v_lr == 0.3
    assert len(found) == 4


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("npo_dg", PluginError, "npo_gd"),
        ("npo_gd:eos", HyperParamsError, "target"),
        ("memit:eso", HyperParamsError, "eos"),
        ("npo_gd@rate=1", HyperParamsError, "rate"),
        ("npo_gd@epochs", HyperParamsError, "key=value"),
        (" , ", PluginError, "names none"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(text: str, error: type[UniEraseError], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_methods(text)


@pytest.mark.parametrize("name", list(SETS))
def test_sets_name_methods_that_there_are(name: str) -> None:
    assert len(parse_methods(name)) >= 2


def test_parts_divide_and_repeat_nothing() -> None:
    records = [{"question": str(at)} for at in range(10)]
    for first, second in (divide(records, 0.25, 0), divide(records, 0.25, 1)):
        assert (len(first), len(second)) == (2, 8)
        assert sorted([*first, *second], key=str) == records
    assert divide(records, 0.25, 0) == divide(records, 0.25, 0)
    assert divide(records[:1], 0.25, 0) == (records[:1], records[:1])
    assert [fact for part in parts_of(records, 3) for fact in part] == records
    assert [len(part) for part in parts_of(records, 4)] == [2, 3, 3, 2]
    assert len(parts_of(records, 99)) == 10
    assert at_most(records, 3, 0) == at_most(records, 3, 0)
    assert len(at_most(records, 3, 0)) == 3


def test_wrong_answers_count_only_where_all_facts_have_some() -> None:
    found = records(read_facts([*facts(FORGET), *RETAIN]))
    assert {tuple(each["perturbed_answer"]) for each in found} == {()}


def test_a_fact_cannot_be_forgotten_and_kept(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at once"):
        compare(str(base), FORGET, parse_methods("none"), out=tmp_path / "out", retain=FORGET, launch=here)


@pytest.mark.parametrize(
    "changes", [{"scenario": "bach"}, {"seeds": ()}, {"validation": 0.0}, {"target": 1.5}, {"budget": -1}, {"steps": 0}]
)
def test_options_that_cannot_be_meant_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UniEraseError, match=next(iter(changes))):
        Options(**changes).check()


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_cell_in_a_process_that_dies_is_a_failure_that_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "dies"
    script.write_text(f"#!{sys.executable}\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    in_a_process(tmp_path, tmp_path / "cache", lambda phase, share, note: None)
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert "signal 9" in failed["error"]
    assert "memory" in failed["error"]


def test_a_cell_in_a_process_of_its_own_does_the_same(base: Path, tmp_path: Path) -> None:
    alone = run(base, tmp_path / "alone", "none", launch=in_a_process, bisections=0)
    same = run(base, tmp_path / "same", "none", bisections=0)
    for column in COLUMNS:
        if column.key not in ("seconds", "memory"):
            first, second = (rows(found)["none"]["figures"][column.key]["mean"] for found in (alone, same))
            assert first == pytest.approx(second), column.key


def test_a_log_tells_of_every_part_of_a_run() -> None:
    """All parts come under the run's name, and each begins at nothing again."""
    log = io.StringIO()
    with logged(Console(file=log, width=30)) as report:
        for part in ("train", "measure"):
            for share in (0.0, 0.3, 0.5, 0.6, 1.0):
                report("npo_gd seed-0", share, part)
    told = [" ".join(line.split()[-3:]) for line in log.getvalue().splitlines()]
    assert told == [f"{share} % {part}" for part in ("train", "measure") for share in (0, 25, 50, 100)]


def test_a_cell_ends_when_who_started_it_does(tmp_path: Path) -> None:
    sleeps = "process.run_method = lambda *a: time.sleep(60)"
    code = f"import time; from unierase_plugin.compare import process; {sleeps}; process.main({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        time.sleep(0.1)
        process.stdin.close()
        assert process.wait(timeout=60) == 3


def test_every_option_of_the_runner_reaches_the_run_or_the_plan() -> None:
    import dataclasses

    planned = {"budget", "seeds", "validation", "limit", "shared_cache", "keep_models", "retry"}
    fields = {each.name for each in dataclasses.fields(runner.MethodRun)}  # type: ignore[attr-defined]
    assert {each.name for each in dataclasses.fields(Options)} - fields == planned


def test_of_facts_to_keep_with_one_question_the_first_is_taken() -> None:
    """TOFU's have some; to forget, the edit would have two answers for one position."""
    twice = [*RETAIN, {**RETAIN[0], "answer": "Shoes"}, *FORGET]
    found = read_facts(twice, first=True)
    assert [each.answer for each in found] == [RETAIN[0]["answer"], *(each["answer"] for each in FORGET)]
    with pytest.raises(RequestError, match="asked twice"):
        read_facts(twice)
