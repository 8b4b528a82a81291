"""Truth ratios of a retain-only model, which forget quality needs: from logs of harnesses, or from a plain list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UniEraseError, first_words, shown
from ..storage.inputs import checked_path, parse_json, read_text

FORMATS = (
    "a sample log of this task that lm-eval wrote for the retain-only model (--log_samples), or the folder it lies in; "
    "TOFU_EVAL.json of open-unlearning; an evaluation log of TOFU's own code; or a JSON list of truth ratios"
)


def read_reference(path: str | Path, task: str, questions: Sequence[str]) -> list[float]:
    """The truth ratios of the reference, in the order of the task's `questions`.

    Raises UniEraseError if the file is missing or unreadable, or has another task or length.
    """
    found = _find(checked_path(path, UniEraseError, "reference"), task)
    logged = _read(found)
    ratios = _ratios(logged, found)
    if any(map(math.isnan, ratios)):
        raise UniEraseError(f"The reference {shown(str(found))} holds a truth ratio that is NaN. Measure it again.")
    if len(ratios) != len(questions):
        raise UniEraseError(
            f"The reference {str(found)!r} holds {len(ratios)} truth ratios, {task} has {len(questions)} questions: "
            "it is of another task, or of a run with --limit. Run this task in full on the retain-only model."
        )
    if found.suffix == ".jsonl":
        _check_questions(sorted(logged, key=lambda line: line["doc_id"]), found, task, questions)
    return ratios


def _read(path: Path) -> Any:
    text = read_text(path, UniEraseError)
    if path.suffix != ".jsonl":
        return parse_json(text, str(path), UniEraseError, nan=True)
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(line, str(path), UniEraseError, first_line=at, nan=True) for at, line in lines if line.strip()]


def _find(path: Path, task: str) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise UniEraseError(f"There is no reference {shown(str(path))}. It can be {FORMATS}.")
        return path
    logs = sorted(path.rglob(f"samples_{task}_*.jsonl"), key=lambda log: log.stat().st_mtime_ns)
    if not logs:
        raise UniEraseError(
            f"The folder {str(path)!r} holds no samples_{task}_*.jsonl. Run --tasks {task} on the retain-only model "
            "with --log_samples and this folder as --output_path."
        )
    return logs[-1]


def _ratios(logged: Any, path: Path) -> list[float]:
    if isinstance(logged, list) and logged and all(isinstance(line, Mapping) for line in logged):
        if all("truth_ratio" in line and "doc_id" in line for line in logged):
            return [float(line["truth_ratio"]) for line in sorted(logged, key=lambda line: line["doc_id"])]
    elif isinstance(logged, list):
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in logged):
            return [float(value) for value in logged]
    elif isinstance(logged, Mapping):
        logged = logged.get("eval_log_forget.json", logged)
        if "forget_truth_ratio" in logged:
            by_index = logged["forget_truth_ratio"]["value_by_index"]
            return [float(by_index[index]["score"]) for index in sorted(by_index, key=int)]
        if {"avg_paraphrased_loss", "average_perturb_loss"} <= logged.keys():
            right, wrong = logged["avg_paraphrased_loss"], logged["average_perturb_loss"]
            return [math.exp(right[i] - sum(wrong[i]) / len(wrong[i])) for i in sorted(right, key=int)]
    raise UniEraseError(f"No truth ratios are in the reference {str(path)!r}. It can be {FORMATS}.")


def _check_questions(logged: Sequence[Any], path: Path, task: str, questions: Sequence[str]) -> None:
    for line, question in zip(logged, questions, strict=True):
        asked = line.get("doc", {}).get("question", question)
        if asked != question:
            raise UniEraseError(
                f"The reference {str(path)!r} is of another task: its question {line['doc_id']} is "
                f"{first_words(asked)}, that of {task} is {first_words(question)}."
            )
