"""The figures of a row: what each one is, how a run gives it, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.metrics import mean
from ..plugins.registration import answer_metrics
from .figures import relative, retain_efficacy

#: The stages of a run by name.
Found = Mapping[str, Any]
#: Reads a figure of a run. Takes the run's stages and those of the unedited model.
Reader = Callable[[Found, Found], float | None]


@dataclass(frozen=True)
class Column:
    """One figure of the table."""

    key: str
    #: The heading in tables, and the explanation on the page.
    title: str
    meaning: str
    #: The group of columns that it belongs to.
    group: str
    #: 1 if more is better, -1 if less is better, 0 if neither.
    better: int
    digits: int
    read: Reader


def _at(stage: str, role: str, name: str) -> Reader:
    return lambda run, before: _number(run, stage, role, name)


def _number(run: Found, stage: str, role: str, name: str) -> float | None:
    value = ((run.get(stage) or {}).get(role) or {}).get(name)
    return None if value is None else float(value)


def _of_before(stage: str, name: str) -> Reader:
    return lambda run, before: relative(_number(run, stage, "keep", name), _number(before, "raw", "keep", name))


def _cost(name: str, unit: float) -> Reader:
    def read(run: Found, before: Found) -> float | None:
        value = (run.get("method") or {}).get(name)
        return None if value is None else float(value) / unit

    return read


def _perplexity(run: Found, before: Found) -> float | None:
    found = (run.get("method") or {}).get("perplexity") or {}
    return relative(found.get("after"), found.get("before"))


def _utility(run: Found, before: Found) -> float | None:
    """The mean over the tasks of the main figure of each: `model_utility`, else the first one."""
    rows = [row for row in (run.get("utility") or {}).values() if row]
    found = [row["model_utility"] if row.get("model_utility") is not None else next(iter(row.values())) for row in rows]
    return mean([value for value in found if value is not None])


def _alpha(run: Found, before: Found) -> float | None:
    return (run.get("matched") or {}).get("alpha")


def _efficacy(run: Found, before: Found) -> float | None:
    return _number(run, "raw", "forget", "forget_efficacy_3")


def _kept_efficacy(run: Found, before: Found) -> float | None:
    return retain_efficacy((run.get("raw") or {}).get("keep") or {})


def _balance(run: Found, before: Found) -> float | None:
    pair = [value for value in (_efficacy(run, before), _kept_efficacy(run, before)) if value is not None]
    return mean(pair) if len(pair) == 2 else None


FORGET, KEEP, COST = "Forgotten facts", "Kept", "Cost"
MATCHED, COMPOSITES = "At equal retention", "Composites"

#: What the keys of registered metrics' columns begin with.
METRIC = "metric_"

COLUMNS: tuple[Column, ...] = (
    Column(
        "forget_rouge",
        "ROUGE-L",
        "share of the true answer's words that are still said",
        FORGET,
        -1,
        3,
        _at("raw", "forget", "rougeL_recall"),
    ),
    Column(
        "forget_prob",
        "probability",
        "geometric mean probability of the true answer's tokens",
        FORGET,
        -1,
        3,
        _at("raw", "forget", "prob"),
    ),
    Column(
        "truth_ratio",
        "truth ratio",
        "mean of min(R, 1/R), R the wrong answers' probability over the right one's; 1 where right and wrong are alike",
        FORGET,
        1,
        3,
        _at("raw", "forget", "truth_ratio"),
    ),
    Column(
        "extraction",
        "extraction strength",
        "share of the answer that is said once the rest before it is given",
        FORGET,
        -1,
        3,
        _at("raw", "forget", "extraction_strength"),
    ),
    Column(
        "forget_quality",
        "forget quality",
        "p of a Kolmogorov-Smirnov test against the reference model; near 1 where the two cannot be told apart",
        FORGET,
        1,
        4,
        _at("raw", "forget", "forget_quality"),
    ),
    Column(
        "token_first",
        "token first",
        "share of answers that begin with the unlearning token",
        FORGET,
        0,
        2,
        _at("raw", "forget", "token_first"),
    ),
    Column(
        "idk",
        "says it does not know",
        'answers that fluently say "I don\'t know", in English',
        FORGET,
        1,
        2,
        _at("raw", "forget", "idk_rate"),
    ),
    Column(
        "gibberish",
        "gibberish",
        "share of answers that are empty or loop",
        FORGET,
        -1,
        2,
        _at("raw", "forget", "gibberish"),
    ),
    Column(
        "keep_rouge",
        "kept ROUGE-L",
        "ROUGE-L recall on kept facts, over that before",
        KEEP,
        1,
        3,
        _of_before("raw", "rougeL_recall"),
    ),
    Column(
        "keep_prob",
        "kept probability",
        "probability on kept facts, over that before",
        KEEP,
        1,
        3,
        _of_before("raw", "prob"),
    ),
    Column(
        "keep_gibberish",
        "kept gibberish",
        "share of answers to kept questions that are empty or loop",
        KEEP,
        -1,
        2,
        _at("raw", "keep", "gibberish"),
    ),
    Column(
        "utility", "utility", "general ability by lm-eval's tasks; for TOFU its model utility", KEEP, 1, 3, _utility
    ),
    Column("perplexity", "perplexity", "of ordinary text, over that before", KEEP, -1, 2, _perplexity),
    Column("seconds", "seconds", "of the method alone, from an empty cache", COST, -1, 1, _cost("seconds", 1.0)),
    Column(
        "memory", "peak GiB", "largest memory of the method's process", COST, -1, 2, _cost("peak_memory_bytes", 2.0**30)
    ),
    Column(
        "parameters",
        "% changed",
        "share of the parameters that may differ",
        COST,
        0,
        2,
        _cost("parameters_changed", 0.01),
    ),
    Column(
        "alpha", "alpha", "share of the edit that is left where it keeps as much as the target", MATCHED, 0, 2, _alpha
    ),
    Column(
        "matched_keep",
        "kept ROUGE-L there",
        "over that before, on facts that the mixing was not chosen by",
        MATCHED,
        1,
        3,
        _of_before("matched", "rougeL_recall"),
    ),
    Column(
        "matched_rouge",
        "ROUGE-L there",
        "on facts to forget",
        MATCHED,
        -1,
        3,
        _at("matched", "forget", "rougeL_recall"),
    ),
    Column("matched_prob", "probability there", "on facts to forget", MATCHED, -1, 3, _at("matched", "forget", "prob")),
    Column(
        "matched_extraction",
        "extraction there",
        "extraction strength on facts to forget",
        MATCHED,
        -1,
        3,
        _at("matched", "forget", "extraction_strength"),
    ),
    Column(
        "fe",
        "FE",
        "forget efficacy, 1 minus the mean of ROUGE-L, probability and 1 - truth ratio: rewards collapse",
        COMPOSITES,
        0,
        3,
        _efficacy,
    ),
    Column(
        "re",
        "RE",
        "retain efficacy, harmonic mean of ROUGE-L, probability and truth ratio on kept facts",
        COMPOSITES,
        0,
        3,
        _kept_efficacy,
    ),
    Column("balance", "balance", "mean of FE and RE", COMPOSITES, 0, 3, _balance),
)


def columns_of(metrics: Sequence[str]) -> tuple[Column, ...]:
    """All columns: those that are always there, and two for each of these registered metrics, group by group."""
    more = [
        column
        for metric in answer_metrics(metrics)
        for column in (
            Column(
                key=f"{METRIC}{metric.name}_forget",
                title=metric.name,
                meaning=metric.title,
                group=FORGET,
                better=metric.forget,
                digits=3,
                read=_at("raw", "forget", metric.name),
            ),
            Column(
                key=f"{METRIC}{metric.name}_keep",
                title=f"kept {metric.name}",
                meaning=f"{metric.title}, on kept facts",
                group=KEEP,
                better=metric.keep,
                digits=3,
                read=_at("raw", "keep", metric.name),
            ),
        )
    ]
    groups = dict.fromkeys(column.group for column in COLUMNS)
    return tuple(column for group in groups for column in (*COLUMNS, *more) if column.group == group)


def shown(column: Column, value: float | None) -> str:
    """A figure as tables write it. Small p-values are written as a power of ten."""
    if value is None:
        return "-"
    if column.key == "forget_quality" and 0 < value < 1e-3:
        return f"{value:.0e}"
    return f"{value:.{column.digits}f}"
