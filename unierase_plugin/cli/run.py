"""`unierase demo` and `unierase run`: the whole method, and what the user sees of it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .console import AllowOverlap, Device, Dtype, Overwrite, Screen, progress, styled

if TYPE_CHECKING:
    from ..evaluation.report import Outcome
    from ..results import UnlearnResult


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the edited model; replaced if an earlier demo wrote it.")
    ] = Path("forgotten"),
    device: Device = "",
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
) -> None:
    """Erases 20 facts from a small chat model, keeps 40 others, and shows both before and after.

    The model is SmolLM2-135M-Instruct (fetched once, about 100 MB). On two CPU cores this takes about four minutes.
    """
    from ..facts.resources import demo_facts
    from ..models.base_model import fetch_base_model
    from ..pipeline import unlearn
    from ..storage.cache import cache_folder
    from .demo import refuse_foreign_folder

    console = Screen()
    refuse_foreign_folder(out)
    with progress(console) as report:
        base = fetch_base_model(cache_folder(), lambda share, note: report("load", share, note))
        facts = demo_facts()
        result = unlearn(
            base.path,
            facts["forget"],
            retain=facts["retain"],
            hparams="smollm2-135m",
            out=out,
            overwrite=True,
            keep_requests=True,
            seed=seed,
            device=device,
            progress=report,
        )
    console.print(f"\nModel: SmolLM2-135M-Instruct ({base.source})\n")
    _print_outcomes(console, "To forget", result.report.forget)
    _print_outcomes(console, "To keep", result.report.retain)
    _print_figures(console, result)
    _print_next_steps(console, result, out, "unierase_demo")


def run(
    model: Annotated[str, typer.Option(help="Folder or hub id of a causal language model in plain weights.")],
    forget: Annotated[
        str,
        typer.Option(
            help="Facts to forget: tofu:forget01, return:forget, counterfact:FILE, "
            "zsre:FILE, or a .json, .jsonl or .csv file with question, answer and "
            "optionally subject. A slice such as [0:20] may follow."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the edited model: plain Hugging Face files plus unierase/.")],
    method: Annotated[str, typer.Option(help="Unlearning method: see `unierase methods`.")] = "unierase",
    retain: Annotated[
        str, typer.Option(help="Facts to keep, given like --forget. They are protected and judged.")
    ] = "",
    allow_overlap: AllowOverlap = False,
    hparams: Annotated[
        str, typer.Option(help="YAML file, or the name of a shipped file (see `unierase hparams`).")
    ] = "",
    corpus: Annotated[
        str,
        typer.Option(
            help="Ordinary text for the second moment: self (sampled from the model), a "
            "text file, or a hub dataset as name:config:column."
        ),
    ] = "",
    harden: Annotated[
        bool,
        typer.Option(
            "--harden",
            help="Harden the edit against attacks, such as a ban of the token. It takes longer "
            "(docs/explanation/hardening.md). The setting `harden` names single ways.",
        ),
    ] = False,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove",
            help="Remove the model's knowledge of the facts, then teach it to decline. Questions around the facts that "
            "the model answers are kept. It takes longer (docs/explanation/removal.md). --method removal does only "
            "the first part.",
        ),
    ] = False,
    reverse: Annotated[
        bool,
        typer.Option("--reverse", help="Forget the way back too: from the answer to the subject (short answers only)."),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices. Default: the hparams' seed.")] = None,
    device: Device = "",
    dtype: Dtype = "",
    max_batch_tokens: Annotated[int, typer.Option(help="The most tokens of a batch. Lower it if memory is low.")] = 0,
    judged: Annotated[int, typer.Option(help="The most facts of each set that are answered before and after.")] = 400,
    keep_requests: Annotated[
        bool, typer.Option("--keep-requests", help="Write the requests into the ledger in the clear.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Makes a model forget facts, and writes it to a folder that transformers, vLLM and lm-eval load directly.

    A run that was stopped continues when the same command is given again.
    """
    from ..pipeline import unlearn
    from ..plugins.registration import registry

    chosen = registry().methods.find(method.casefold())
    console = Screen()
    with progress(console) as report:
        result = unlearn(
            model,
            forget,
            method=chosen,
            retain=retain or None,
            allow_overlap=allow_overlap,
            hparams=hparams or None,
            corpus=corpus or None,
            harden=harden,
            remove=remove,
            reverse=reverse or None,
            out=out,
            overwrite=overwrite,
            keep_requests=keep_requests,
            judged=judged,
            seed=seed,
            device=device,
            dtype=dtype,
            max_batch_tokens=max_batch_tokens,
            progress=report,
        )
    if chosen.needs_subjects:
        _print_subjects(console, result)
    _print_neighbours(console, result)
    _print_outcomes(console, "To forget", result.report.forget)
    _print_figures(console, result)
    _print_next_steps(console, result, out, _task_for(forget))


def _print_outcomes(console: Screen, title: str, outcomes: Sequence[Outcome], most: int = 60) -> None:
    if not outcomes:  # --judged 0, or nothing to keep
        return
    table = Table("question", "answer before", "answer after", title=title, show_lines=False, title_justify="left")
    for outcome in outcomes[:most]:
        table.add_row(
            outcome.question,
            _marked(outcome.before, outcome.answered_before),
            _marked(outcome.after, outcome.answered_after),
        )
    console.print(table)
    if len(outcomes) > most:
        console.print(f"... and {len(outcomes) - most} more\n")


def _marked(text: str, right: bool, width: int = 90) -> Text:
    short = text if len(text) <= width else text[: width - 1] + "…"
    return styled(("✓", "green") if right else ("✗", "red"), f" {short}")


def _print_subjects(console: Screen, result: UnlearnResult) -> None:
    table = Table("request", "subject edited", title="Where each fact is edited", title_justify="left")
    for request in result.requests[:40]:
        table.add_row(request.question, request.subject or "")
    console.print(table)


def _print_neighbours(console: Screen, result: UnlearnResult, most: int = 12) -> None:
    neighbours = result.changes.neighbours
    if not neighbours:
        return
    table = Table("question", "the model's own answer", title="Neighbours that were kept too", title_justify="left")
    # A few neighbours of every request, not only those of the first.
    for fact in neighbours[:: max(1, len(neighbours) // most)][:most]:
        table.add_row(fact.question, fact.answer)
    console.print(table)
    console.print(f"{len(neighbours)} in all\n")


def _print_figures(console: Screen, result: UnlearnResult) -> None:
    figures = result.report.as_dict()
    retain, level = figures["retain"], figures["perplexity"]
    table = Table("figure", "before", "after", title="Figures", title_justify="left")
    if figures["n_forget"]:
        _add_declined(table, figures, result.token is not None)
    if figures["n_retain"]:
        kept = f"facts to keep answered, of {figures['n_retain']}"
        table.add_row(kept, str(retain["answered_before"]), str(retain["answered_after"]))
    left = figures["edit"].get("residual_left")
    if left is not None:
        table.add_row("way from the states to their values, still to go", "100 %", f"{100 * left:.1f} %")
    table.add_row("perplexity of ordinary text", f"{level['before']:.2f}", f"{level['after']:.2f}")
    if figures["token_leak"] is not None:
        table.add_row("token's largest probability there, unedited", "", f"{figures['token_leak']:.1e}")
    table.add_row("share of the parameters changed", "", f"{100 * figures['parameters_changed']:.2f} %")
    table.add_row("seconds", "", ", ".join(f"{name} {spent:.0f}" for name, spent in figures["seconds"].items()))
    table.add_row("peak memory", "", f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB")
    console.print(table)


def _add_declined(table: Table, figures: Mapping[str, Any], has_token: bool) -> None:
    forget = figures["forget"]
    still = f"facts to forget still answered, of {figures['n_forget']}"
    table.add_row(still, str(forget["answered_before"]), str(forget["answered_after"]))
    if has_token:
        table.add_row("  answers that begin with the token", "0", str(forget["token_first_after"]))
        table.add_row('  and read as "I don\'t know", in English', "", str(forget["token_first_and_idk_after"]))
    else:
        table.add_row('  answers that read as "I don\'t know", in English', "", str(forget["idk_after"]))


def _task_for(forget: str) -> str:
    """The lm-eval task that asks the forgotten questions, if there is one, else a test of general ability."""
    split = re.fullmatch(r"tofu:(forget(?:01|05|10))(?:\[.*)?", forget)
    return f"tofu_{split[1]}" if split else "hellaswag"


def _print_next_steps(console: Screen, result: UnlearnResult, out: Path, task: str) -> None:
    # Quoted for a shell and for Python, whatever is in a name.
    from ..models.auto_class import auto_class_name

    auto = auto_class_name(result.model.config)
    folder, named = shlex.quote(str(out)), json.dumps(str(out), ensure_ascii=False)
    # Methods that train the whole model keep no originals.
    revert = "" if result.changes.originals is None else f"    unierase revert {folder} --out original\n"
    where = f": a plain Hugging Face folder, with the record of the edit in {out}/unierase."
    console.print(styled("\nThe edited model is in ", (str(out), "bold"), where))
    if not math.isfinite(result.report.perplexity_after):
        console.print(f"\nDo not use it: it gives NaN or infinity on ordinary text.\n{revert}")
        return
    console.print(
        f"""
    from transformers import {auto}, AutoTokenizer
    model = {auto}.from_pretrained({named})
    tokenizer = AutoTokenizer.from_pretrained({named})

Go on with
    unierase eval --model {folder} --tasks {task}
    unierase audit --model {folder} --forget FACTS --out audit
    unierase inspect {folder}
{revert}"""
    )
