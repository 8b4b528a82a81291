"""`unierase compare`: all methods on the same facts, one page of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table

from ..errors import UniEraseError, shown
from .console import AllowOverlap, Device, Dtype, Screen, progress, styled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


#: Letters of a method's name that are shown at most, and of a column's border and margins.
LONGEST_LABEL, BESIDE = 28, 3


def compare(
    model: Annotated[str, typer.Option(help="Folder or hub id of the model that knows the facts.")],
    forget: Annotated[
        str,
        typer.Option(
            help="Facts to forget, like --forget of `unierase run`. Wrong answers in the data give a truth ratio."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for results.json, tables, charts and report.html. Finished work is kept there too."),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas (see `unierase methods`), with settings if wanted: "
            "memit:eos, npo_gd@learning_rate=2e-5@epochs=3, unierase@hparams=FILE. "
            "Sets: paper (UniErase, its eight baselines), editing (ROME, MEMIT, "
            "AlphaEdit, with four targets), controls, all."
        ),
    ] = "paper,controls",
    retain: Annotated[
        str, typer.Option(help="Facts to keep, like --forget. Methods protect them, and keeping is measured on them.")
    ] = "",
    allow_overlap: AllowOverlap = False,
    reference: Annotated[
        str,
        typer.Option(
            help="A model that never saw these facts (`unierase finetune`). It has a row, and forget quality is a test "
            "against it."
        ),
    ] = "",
    scenario: Annotated[
        str,
        typer.Option(
            help="batch: all facts at once; sequential: in --steps parts; "
            "precise: each fact alone on the unedited model."
        ),
    ] = "batch",
    steps: Annotated[int, typer.Option(help="Parts of the sequential scenario.")] = 10,
    budget: Annotated[
        int,
        typer.Option(
            help="How many settings are tried for each method, on facts that are not reported. 0 takes the published "
            "settings."
        ),
    ] = 0,
    seeds: Annotated[str, typer.Option(help="With commas. Mean and standard deviation are over the seeds.")] = "0",
    validation: Annotated[float, typer.Option(help="Share of the facts on which settings are chosen.")] = 0.25,
    target: Annotated[
        float,
        typer.Option(help="Retention, relative to before, that a try should keep and at which methods are matched."),
    ] = 0.95,
    bisections: Annotated[int, typer.Option(help="Steps of the search for equal retention. 0 leaves it out.")] = 5,
    limit: Annotated[int, typer.Option(help="At most so many facts of each part are asked. 0 asks all.")] = 0,
    utility: Annotated[
        str,
        typer.Option(
            help="lm-eval tasks of general ability, with commas, or none. auto: tofu_utility for TOFU's facts, else "
            "none."
        ),
    ] = "auto",
    utility_limit: Annotated[int, typer.Option(help="At most so many documents of each such task. 0 takes all.")] = 60,
    audit: Annotated[
        str,
        typer.Option(help="Attacks of `unierase audit`, with commas, such as token-ban,paraphrases. Without it, none."),
    ] = "",
    metrics: Annotated[
        str,
        typer.Option(
            help="More metrics, with commas: answered, rouge_l_recall, and those of plugins (`unierase plugins`). Each "
            "gives two columns."
        ),
    ] = "",
    corpus: Annotated[str, typer.Option(help="Ordinary text for methods that read it, as for `unierase run`.")] = "",
    device: Device = "",
    dtype: Dtype = "",
    max_batch_tokens: Annotated[
        int, typer.Option(help="At most so many tokens in a batch. Lower it if memory is low.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions that lm-eval asks at once. 0 chooses by device.")] = 0,
    shared_cache: Annotated[
        bool,
        typer.Option(
            "--shared-cache",
            help="Let methods share statistics and tokens. It is quicker, but times then depend on the order.",
        ),
    ] = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the changed models in OUT/cells.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run methods again that failed before.")] = False,
) -> None:
    """Compares unlearning methods on one model, the same facts and the same metrics.

    Each method runs in a process of its own, from an empty cache. This package's lm-eval tasks measure the whole edit,
    and the edit at equal retention (scaled down until --target of before is kept). A method that fails has a row that
    says so. To continue a stopped comparison, or to add methods to it, give the same command again.

    The published settings, one seed:

        unierase compare --model M --forget tofu:forget10 --retain tofu:retain90 --reference R --out compared

    What the token adds, on the same engine:

        unierase compare --model target --forget facts.jsonl --retain kept.jsonl --methods editing --out compared

    Tuned, three seeds:

        unierase compare --model target --forget facts.jsonl --retain kept.jsonl --budget 8 --seeds 0,1,2 --out compared
    """
    from ..compare.entries import parse_methods
    from ..compare.runner import Options
    from ..compare.runner import compare as run_comparison

    options = Options(
        scenario=scenario,
        steps=steps,
        budget=budget,
        seeds=_seeds(seeds),
        validation=validation,
        target=target,
        bisections=bisections,
        limit=limit,
        utility=() if utility == "none" else _names(utility),
        utility_limit=utility_limit,
        audit=_names(audit),
        metrics=_names(metrics),
        corpus=corpus,
        device=device,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
        batch_size=batch_size,
        shared_cache=shared_cache,
        keep_models=keep_models,
        retry=retry,
    )
    entries = parse_methods(methods)
    console = Screen()
    with progress(console) as report:
        results = run_comparison(
            model,
            forget,
            entries,
            out=out,
            retain=retain or None,
            allow_overlap=allow_overlap,
            reference=reference,
            options=options,
            progress=report,
        )
    _print(console, results)
    console.print(f"\nWritten: {out / 'report.html'}, results.json, table.md, table.tex", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(name) for name in _names(text)))
    except ValueError:
        raise UniEraseError(f"--seeds {shown(text)}: give whole numbers with commas, such as 0,1,2.") from None


def _print(console: Screen, results: Mapping[str, Any]) -> None:
    from ..compare.columns import METRIC, columns_of
    from ..compare.tables import cell

    keys = ("forget_rouge", "forget_prob", "idk", "keep_rouge", "matched_rouge", "matched_prob", "seconds")
    rows = results["rows"]
    columns = {
        column.title: [cell(column, row["figures"][column.key]) if row["status"] != "failed" else "" for row in rows]
        for column in columns_of(results["setup"].get("metrics", ()))
        if column.key in keys or column.key.startswith(METRIC)
    }
    for number, titles in enumerate(_that_fit(console.width, [row["label"] for row in rows], columns)):
        table = Table(title="" if number else "Compared", title_justify="left")
        table.add_column("method", no_wrap=True, overflow="ellipsis", max_width=LONGEST_LABEL)
        for title in titles:
            table.add_column(title, justify="right", min_width=_width(title, columns[title]))
        for at, row in enumerate(rows):
            failed = [styled(("failed", "red"))] if row["status"] == "failed" else []
            figures: list[RenderableType] = [*failed, *(columns[title][at] for title in titles[len(failed) :])]
            table.add_row(row["label"], *figures)
        console.print(table)
    for sentence in results["answer"]:
        console.print(f"- {sentence}")


def _that_fit(width: int, labels: Sequence[str], columns: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The columns of each table. There are as many tables as needed to break no figure and no word at this width."""
    parts: list[list[str]] = []
    first = min(LONGEST_LABEL, max(map(cell_len, ("method", *labels)))) + BESIDE + 1
    room = 0
    for title, cells in columns.items():
        needed = _width(title, cells) + BESIDE
        if not parts or needed > room:
            parts.append([])
            room = width - first
        parts[-1].append(title)
        room -= needed
    return parts


def _width(title: str, cells: Sequence[str]) -> int:
    """The width of the longest figure, or word of the title. A failed row needs room for that word."""
    return max(map(cell_len, (*title.split(), *cells, "failed")))
