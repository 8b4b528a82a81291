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
        key="forget_rouge",
        title="ROUGE-L",
        meaning="the share of the true answer's words that is still said",
        group=FORGET,
        better=-1,
        digits=3,
        read=_at("raw", "forget", "rougeL_recall"),
    ),
    Column(
        key="forget_prob",
        title="probability",
        meaning="the geometric mean probability of the true answer's tokens",
        group=FORGET,
        better=-1,
        digits=3,
        read=_at("raw", "forget", "prob"),
    ),
    Column(
        key="truth_ratio",
        title="truth ratio",
        meaning="the mean of min(R, 1/R), where R is the probability of wrong answers divided by that of the right one",
        group=FORGET,
        better=1,
        digits=3,
        read=_at("raw", "forget", "truth_ratio"),
    ),
    Column(
        key="extraction",
        title="extraction strength",
        meaning="the share of the answer that is said once the tokens before it are given",
        group=FORGET,
        better=-1,
        digits=3,
        read=_at("raw", "forget", "extraction_strength"),
    ),
    Column(
        key="forget_quality",
        title="forget quality",
        meaning="p of a Kolmogorov-Smirnov test against the reference model; near 1 if the two cannot be told apart",
        group=FORGET,
        better=1,
        digits=4,
        read=_at("raw", "forget", "forget_quality"),
    ),
    Column(
        key="token_first",
        title="token first",
        meaning="the share of answers that begin with the unlearning token",
        group=FORGET,
        better=0,
        digits=2,
        read=_at("raw", "forget", "token_first"),
    ),
    Column(
        key="idk",
        title="says it does not know",
        meaning="the share of answers that say fluently, in English, that the model does not know",
        group=FORGET,
        better=1,
        digits=2,
        read=_at("raw", "forget", "idk_rate"),
    ),
    Column(
        key="gibberish",
        title="gibberish",
        meaning="the share of answers that are empty or loop",
        group=FORGET,
        better=-1,
        digits=2,
        read=_at("raw", "forget", "gibberish"),
    ),
    Column(
        key="keep_rouge",
        title="kept ROUGE-L",
        meaning="ROUGE-L recall on kept facts, divided by its value before",
        group=KEEP,
        better=1,
        digits=3,
        read=_of_before("raw", "rougeL_recall"),
    ),
    Column(
        key="keep_prob",
        title="kept probability",
        meaning="probability on kept facts, divided by its value before",
        group=KEEP,
        better=1,
        digits=3,
        read=_of_before("raw", "prob"),
    ),
    Column(
        key="keep_gibberish",
        title="kept gibberish",
        meaning="the share of answers to kept questions that are empty or loop",
        group=KEEP,
        better=-1,
        digits=2,
        read=_at("raw", "keep", "gibberish"),
    ),
    Column(
        key="utility",
        title="utility",
        meaning="general ability by lm-eval tasks; for TOFU its model utility",
        group=KEEP,
        better=1,
        digits=3,
        read=_utility,
    ),
    Column(
        key="perplexity",
        title="perplexity",
        meaning="perplexity of ordinary text, divided by its value before",
        group=KEEP,
        better=-1,
        digits=2,
        read=_perplexity,
    ),
    Column(
        key="seconds",
        title="seconds",
        meaning="seconds of the method alone, from an empty cache",
        group=COST,
        better=-1,
        digits=1,
        read=_cost("seconds", 1.0),
    ),
    Column(
        key="memory",
        title="peak GiB",
        meaning="the largest memory of the method's process",
        group=COST,
        better=-1,
        digits=2,
        read=_cost("peak_memory_bytes", 2.0**30),
    ),
    Column(
        key="parameters",
        title="% changed",
        meaning="the share of the parameters that may differ",
        group=COST,
        better=0,
        digits=2,
        read=_cost("parameters_changed", 0.01),
    ),
    Column(
        key="alpha",
        title="alpha",
        meaning="the share of the edit that keeps as much as the target",
        group=MATCHED,
        better=0,
        digits=2,
        read=_alpha,
    ),
    Column(
        key="matched_keep",
        title="kept ROUGE-L there",
        meaning="ROUGE-L recall divided by its value before, on facts that did not serve the choice of alpha",
        group=MATCHED,
        better=1,
        digits=3,
        read=_of_before("matched", "rougeL_recall"),
    ),
    Column(
        key="matched_rouge",
        title="ROUGE-L there",
        meaning="ROUGE-L recall on facts to forget",
        group=MATCHED,
        better=-1,
        digits=3,
        read=_at("matched", "forget", "rougeL_recall"),
    ),
    Column(
        key="matched_prob",
        title="probability there",
        meaning="probability on facts to forget",
        group=MATCHED,
        better=-1,
        digits=3,
        read=_at("matched", "forget", "prob"),
    ),
    Column(
        key="matched_extraction",
        title="extraction there",
        meaning="extraction strength on facts to forget",
        group=MATCHED,
        better=-1,
        digits=3,
        read=_at("matched", "forget", "extraction_strength"),
    ),
    Column(
        key="fe",
        title="FE",
        meaning="forget efficacy: 1 minus the mean of ROUGE-L, probability and 1 - truth ratio; it rewards collapse",
        group=COMPOSITES,
        better=0,
        digits=3,
        read=_efficacy,
    ),
    Column(
        key="re",
        title="RE",
        meaning="retain efficacy: the harmonic mean of ROUGE-L, probability and truth ratio on kept facts",
        group=COMPOSITES,
        better=0,
        digits=3,
        read=_kept_efficacy,
    ),
    Column(
        key="balance",
        title="balance",
        meaning="the mean of FE and RE",
        group=COMPOSITES,
        better=0,
        digits=3,
        read=_balance,
    ),
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
