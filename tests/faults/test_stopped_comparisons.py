"""Comparisons that are stopped at any file operation, or meet an error while measuring, end like undisturbed ones.

Method, model and metrics are stand-ins that read and write real files, so that every operation can be tried. The same
with real models is in test_faults.py.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operations import KILLED, Operations
from small import FORGET, FORGET_MORE, FORGET_OTHERS, RETAIN

from unierase_plugin.compare import made_models, measuring, method_run, runner
from unierase_plugin.compare.entries import parse_method, parse_methods, settings_of
from unierase_plugin.compare.launch import in_a_process
from unierase_plugin.compare.runner import Options, compare
from unierase_plugin.errors import UniEraseError
from unierase_plugin.storage.atomic import replace_folder

#: What is compared in which way.
SCENARIOS: dict[str, dict[str, Any]] = {
    "batch": {},
    "tuned": {"budget": 2},
    "kept": {"keep_models": True},
    "precise": {"scenario": "precise"},
    "sequential": {"scenario": "sequential", "steps": 3},
}
FILES = ("weights", "config", "record")
FIGURES = ("prob", "rougeL_recall", "extraction_strength", "truth_ratio", "forget_efficacy_3")


def load(place: str, *_: Any) -> tuple[Any, Any]:
    """A model is what its files say; one that lacks any of them cannot be loaded."""
    text = "".join((Path(place) / name).read_text() for name in FILES)
    return SimpleNamespace(text=text, device=torch.device("cpu"), named_parameters=lambda: iter(())), None


def unlearn(start: str, requests: Any, *, out: Path, seed: int, **_: Any) -> Any:
    made = share(load(start)[0].text, *(each["question"] for each in requests), seed)
    with replace_folder(out, 0) as staging:
        for name in FILES:
            (staging / name).write_text(f"{name} {made}")
    report = SimpleNamespace(
        seconds={"train": made}, parameters_changed=1.0, perplexity_before=1.0, perplexity_after=made, edit={}
    )
    return SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")), report=report)


class Judge:
    def __init__(self, model: Any, *_: Any) -> None:
        self.text = model.text

    def facts(self, records: Any, role: str, ratios: Any = None) -> tuple[Any, Any]:
        asked = [each["question"] for each in records]
        figures = {name: share(self.text, role, name, *asked, str(ratios)) for name in FIGURES}
        said = [{**each, "said": share(self.text, each["question"]), "truth_ratio": 0.5} for each in records]
        return figures, said


def share(*parts: Any) -> float:
    return int(sha256(repr(parts).encode()).hexdigest()[:8], 16) / 16**8


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Else every measurement goes through all objects that were ever imported.
    gc.freeze()
    monkeypatch.setattr(measuring, "load", load)
    monkeypatch.setattr(made_models, "unlearn", unlearn)
    monkeypatch.setattr(measuring, "Judge", Judge)
    monkeypatch.setattr(made_models, "peak_memory_bytes", lambda: 0)
    monkeypatch.setattr(made_models, "settings_of", lambda *_: SimpleNamespace(as_dict=dict))
    read = cache(lambda method: settings_of(parse_method(method), ""))
    monkeypatch.setattr(runner, "settings_of", lambda entry, *_: read(entry.method))
    monkeypatch.setattr(runner, "_depth", lambda model: 4)
    monkeypatch.setattr("unierase_plugin.compare.results.draw", lambda results, out: {})
    for name in ("base", "reference"):
        (tmp_path / name).mkdir()
        for part in FILES:
            (tmp_path / name / part).write_text(f"{part} of {name}")
    yield tmp_path / "base"
    gc.unfreeze()


def run(base: Path, out: Path, scenario: str, **changes: Any) -> dict[str, Any]:
    options = Options(**{"bisections": 0, "utility": (), **SCENARIOS[scenario], **changes})
    return compare(
        str(base),
        [*FORGET, *FORGET_MORE],
        parse_methods("ga_gd,npo_gd"),
        out=out,
        retain=[*RETAIN, *FORGET_OTHERS],
        reference=str(base.parent / "reference"),
        options=options,
        launch=lambda folder, cache, progress: method_run.run_method(folder, progress),
    )


def forked(work: Callable[[], Any], said: Path) -> int:
    """The status of a process that does the work; `said` has what it ended with."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except UniEraseError as error:
            said.write_text(f"{type(error).__name__}: {error}")
        except BaseException as error:
            said.write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state(out: Path) -> dict[str, str]:
    """What a comparison left, without its times."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path.relative_to(out).as_posix(): _without_paths(path.read_text(), out) for path in files}


def _without_paths(text: str, out: Path) -> str:
    if text.endswith("</html>\n"):
        return "a whole page"
    return re.sub(r'"(interrupted|sha256)": [^,\n]+', "", text.replace(str(out), "OUT"))


class Stopped:
    """Runs a comparison with a fault at one of its file operations, and without."""

    def __init__(self, base: Path, scenario: str) -> None:
        self.base, self.scenario, self.root = base, scenario, base.parent
        self.said, self.log = self.root / "said", self.root / "operations"
        assert self.run("whole", "", 0) == 0, self.said.read_text()
        self.count = len(self.log.read_text().splitlines())
        self.whole = state(self.root / "whole")

    def run(self, out: str, kind: str = "", at: int = -1) -> int:
        folder = self.root / out

        def work() -> None:
            self.log.unlink(missing_ok=True)
            folder.mkdir(exist_ok=True)
            if at >= 0:
                Operations(folder, kind, at, self.log).install()
            run(self.base, folder, self.scenario)

        return forked(work, self.said)

    def again(self, out: str) -> list[str]:
        """What is not as an undisturbed run leaves it, once the same is called again."""
        if self.run(out):
            return [self.said.read_text()]
        found = state(self.root / out)
        return differing(found, self.whole)


@pytest.mark.parametrize(("scenario", "kind"), [("precise", "kill"), ("sequential", "tear"), ("batch", "full")])
def test_a_stop_at_an_operation_changes_nothing(base: Path, scenario: str, kind: str) -> None:
    stopped = Stopped(base, scenario)
    assert lost(stopped, kind, range(1, stopped.count + 1, stopped.count // 6)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "tear", "full"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_stop_at_any_operation_changes_nothing(base: Path, scenario: str, kind: str) -> None:
    stopped = Stopped(base, scenario)
    assert lost(stopped, kind, range(1, stopped.count + 1)) == []


def lost(stopped: Stopped, kind: str, points: Iterable[int]) -> list[str]:
    """What was not as promised, by operation."""
    found = []
    for at in points:
        status = stopped.run(f"out-{at}", kind, at)
        told = json.loads(stopped.log.read_text().splitlines()[at - 1])
        if kind == "full":
            said = stopped.said.read_text()
            # At the very end there is nothing left to write.
            if status and (status != 1 or not said.startswith("WriteError") or "\n" in said):
                found.append(f"{told}: {status} {said}")
        elif status not in (KILLED, 0):
            found.append(f"{told}: {status} {stopped.said.read_text()}")
        if wrong := stopped.again(f"out-{at}"):
            found.append(f"{told}: {wrong}")
        shutil.rmtree(stopped.root / f"out-{at}")
    return found


@pytest.mark.parametrize(
    ("scenario", "error"),
    [
        ("batch", torch.OutOfMemoryError("CUDA out of memory")),
        ("tuned", RuntimeError("no such metric")),
        ("precise", RuntimeError("no such metric")),
        ("sequential", torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_an_error_while_measuring_is_got_over_by_retrying(
    base: Path, tmp_path: Path, scenario: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Judge.facts
    asked: list[Any] = []
    raising: list[Any] = []

    def facts(self: Judge, *given: Any) -> Any:
        asked.append(given)
        if raising and len(asked) >= raising[0]:
            raise error
        return real(self, *given)

    monkeypatch.setattr(Judge, "facts", facts)
    whole, count = run(base, tmp_path / "whole", scenario)["rows"], len(asked)
    for number in (1, count // 2, count - 1):
        asked, raising = [], [number]
        with suppress(UniEraseError):
            run(base, tmp_path / f"out-{number}", scenario)
        raising = []
        found = run(base, tmp_path / f"out-{number}", scenario, retry=True)
        assert found["rows"] == whole
        # Nor is a model left behind.
        assert not list((tmp_path / f"out-{number}").rglob("weights"))


def differing(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def test_an_unedited_model_that_could_not_be_measured_is_measured_by_the_next_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "facts", lambda *_: 1 / 0)
        with pytest.raises(UniEraseError, match="unedited model cannot be measured"):
            run(base, tmp_path / "out", "batch")
    found = run(base, tmp_path / "out", "batch")
    # The reference had failed, too, and says so until it is tried again.
    assert {row["label"]: row["status"] for row in found["rows"]} == {
        "reference": "failed",
        "none": "ok",
        "ga_gd": "ok",
        "npo_gd": "ok",
    }
    # With the reference's truth ratios every other figure is another one.
    run(base, tmp_path / "out", "batch", retry=True)
    whole = run(base, tmp_path / "whole", "batch")
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["rows"] == whole["rows"]


@pytest.mark.parametrize("damage", ["gone", "cut short", "changed"])
@pytest.mark.parametrize("row", ["none", "ga_gd"])
def test_a_cell_counts_as_done_while_all_its_stages_are_what_was_written(
    base: Path, tmp_path: Path, row: str, damage: str
) -> None:
    out = tmp_path / "out"
    run(base, out, "batch")
    whole = state(out)
    [path] = out.glob(f"cells/{row}-seed*/raw.json")
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(text[:60] if damage == "cut short" else text.replace('"prob": 0.', '"prob": 0.1', 1))
    run(base, out, "batch")
    assert state(out) == whole


def test_a_model_that_is_not_whole_is_made_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(base, tmp_path / "whole", "sequential")
    for damage in ("gone", "cut short", "of another size"):
        out, measured = tmp_path / damage, measuring.Measurer.figures

        def stops(self: Any, made: Any, *rest: Any, damage: str = damage, measured: Any = measured) -> Any:
            if made.stage == "step-2-method":
                path = Path(made.place) / "weights"
                path.unlink() if damage == "gone" else path.write_text("" if damage == "cut short" else "weights 0.25")
                raise KeyboardInterrupt
            return measured(self, made, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(measuring.Measurer, "figures", stops)
            with pytest.raises(KeyboardInterrupt):
                run(base, out, "sequential")
        run(base, out, "sequential")
        assert differing(state(out), state(tmp_path / "whole")) == []


@pytest.mark.parametrize(
    ("code", "error", "failed"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "signal 15", False),
        ("import json; print(json.dumps(['cannot write', 0, 'no room']))", "no room", False),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "", True),
    ],
)
def test_what_stops_the_whole_comparison_is_no_failure_of_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str, failed: bool
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(UniEraseError, match=error) if error else nullcontext():
        in_a_process(tmp_path, tmp_path / "cache", lambda phase, share, note: None)
    assert (tmp_path / "failed.json").exists() == failed
