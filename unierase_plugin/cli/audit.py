"""`unierase audit`: is a fact gone, or only silenced?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import UniEraseError
from .console import AllowOverlap, Device, Dtype, Screen, progress, styled


def audit(
    model: Annotated[str, typer.Option(help="Folder of the model, edited by any method.")] = "",
    forget: Annotated[
        str,
        typer.Option(
            help="The facts it was to forget: a SPEC as `unierase run --forget` takes. "
            "The audit uses paraphrases and wrong answers in the data."
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for audit.json and audit.html.")] = None,
    retain: Annotated[
        str,
        typer.Option(
            help="Facts to keep. Retention, few-shot, relearning on kept facts and paired questions need them."
        ),
    ] = "",
    allow_overlap: AllowOverlap = False,
    base: Annotated[
        str,
        typer.Option(help="The unedited model, a folder or hub id. Without it, the folder's record gives it back."),
    ] = "",
    reference: Annotated[
        str,
        typer.Option(
            help="A model that never knew the facts (trained on the rest). Without it, no fact is called removed."
        ),
    ] = "",
    holdout: Annotated[str, typer.Option(help="Facts that no model was trained on, for the membership attacks.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="A few facts and variants of each attack, or all of them.")
    ] = True,
    attacks: Annotated[
        str, typer.Option(help="Names of attacks or groups, with commas. Without it, all attacks.")
    ] = "",
    metrics: Annotated[
        str,
        typer.Option(
            help="Metrics of the answers to the plain questions, with commas: answered, rouge_l_recall, and those of "
            "plugins (`unierase plugins`). No verdict depends on them."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="The seed of all random choices.")] = 0,
    device: Device = "",
    dtype: Dtype = "",
    listed: Annotated[bool, typer.Option("--list", help="List the attacks and what they cost, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: as JSON.")] = False,
) -> None:
    """Attacks an edited model to tell whether a fact is gone or only silenced.

    It makes every attack on the unedited model too and, with --reference, on a model that never knew the facts. The
    verdict is "removed", "suppressed", "not forgotten" or "model damaged", by a fixed rule. To continue a stopped
    audit, give the same command again.

    Example: unierase audit --model forgotten-facts --forget facts.jsonl --retain kept.jsonl --out audit
    """
    console = Screen()
    if listed:
        _list(console, as_json)
        return
    missing = [name for name, value in {"--model": model, "--forget": forget, "--out": out}.items() if not value]
    if missing or out is None:
        raise UniEraseError(
            f"`unierase audit` needs {', '.join(missing)}; `--list` lists the attacks, `--help` the rest."
        )
    from ..audit.contract import FULL, QUICK
    from ..audit.runner import audit as run_audit

    with progress(console) as report:
        result = run_audit(
            model,
            forget,
            out=out,
            retain=retain or None,
            holdout=holdout or None,
            allow_overlap=allow_overlap,
            base=base or None,
            reference=reference or None,
            sizes=QUICK if quick else FULL,
            attacks=_names(attacks),
            metrics=_names(metrics),
            seed=seed,
            device=device,
            dtype=dtype,
            progress=report,
        )
    _print(console, result)
    console.print(f"\nWritten: {out / 'audit.html'} and audit.json", soft_wrap=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _list(console: Screen, as_json: bool) -> None:
    from ..audit.attacks import in_order
    from ..plugins.catalogue import BUILT_IN
    from ..plugins.registration import registry

    known = registry().attacks
    attacks = in_order(known)
    plugins = {attack.name: known.owner(attack.name).name for attack in attacks}
    if as_json:
        keys = ("name", "group", "asks", "cost")
        console.json([{**{key: getattr(each, key) for key in keys}, "plugin": plugins[each.name]} for each in attacks])
        return
    told = set(plugins.values()) != {BUILT_IN}
    table = Table("attack", "group", "what it asks", "cost, on each model", *(["plugin"] if told else []))
    for attack in attacks:
        more = [plugins[attack.name]] if told else []
        table.add_row(attack.name, attack.group, attack.asks, attack.cost, *more)
    console.print(table)


def _print(console: Screen, report: Mapping[str, Any]) -> None:
    roles = [role for role in ("edited", "unedited", "reference") if role in report["seconds"]]
    table = Table(title="Facts recovered", title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("attack", no_wrap=True)
    for name in (*roles, "chance", "result"):
        table.add_column(name)
    for entry in report["attacks"]:
        if "shares" not in entry:
            continue
        shares = [entry["shares"].get(role) for role in roles]
        cells = [
            "" if each is None else f"{each['mean']:.2f} ({each['low']:.2f}-{each['high']:.2f})" for each in shares
        ]
        table.add_row(entry["name"], *cells, f"{entry['chance']:.2f}", entry["status"])
    console.print(table)
    for each in report["damage"]:
        limit = f"{each['limit']}{': beyond' if each['beyond'] else ''}"
        console.print(f"{each['name']}: {each['value']:.2f} ({each['low']:.2f} to {each['high']:.2f}; {limit})")
    if report["not_run"]:
        console.print("\nNot run: " + ", ".join(each["attack"] for each in report["not_run"]))
    console.print(styled("\n", (report["verdict"], "bold")))
