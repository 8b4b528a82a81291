#!/usr/bin/env python3
"""What each hardening brings on tofu200: the edit made with it, then attacked by the audit's own attacks.

    python benchmarks/hardening.py --shared ../shared --models DIR --out results \\
        unedited reference none unlikely_answer unlikely_answer+answer_span

DIR holds tofu200 and tofu160r, as `shared/models/tofu_model.py` builds them. A row is `unedited`, `reference` (never
trained on the 40 facts), a folder that `unierase run` wrote, `none` (the paper's method), or hardenings joined by +.
`@` sets hyper-parameters: `unlikely_answer@v_unlikely_weight=8`. Every row is kept in OUT as it ends and not measured
again. Prints the table of docs/explanation/hardening.md: mean ROUGE-L recall of the true answers under each attack
(leak-at-k and what generates nothing: the share given). `quantise:full` takes every variant that `audit --full` takes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from unierase_plugin import UniEraseHyperParams
from unierase_plugin.audit.asking import cleaned
from unierase_plugin.audit.attacks import ATTACKS
from unierase_plugin.audit.contract import QUICK, AttackResult, Audited, Context
from unierase_plugin.audit.facts import read_facts
from unierase_plugin.evaluation.metrics import answered, rouge_l_recall
from unierase_plugin.facts.readers import read_requests
from unierase_plugin.facts.resources import paragraphs
from unierase_plugin.models.generate import answers, perplexity
from unierase_plugin.models.loaded import LoadedModel
from unierase_plugin.models.loading import load
from unierase_plugin.pipeline import change

ROOM = 64
Row = dict[str, Any]


def measured(row: str, options: argparse.Namespace) -> Row:
    folder = {"reference": options.models / "tofu160r"}.get(row, options.models / "tofu200")
    made = (Path(row) / "unierase").is_dir()
    model, tokenizer = load(row if made else str(folder))
    forget, kept = read_facts("tofu:forget01")[:: options.every], read_facts("tofu:retain_perturbed[:160]")
    token, figures, start = "", {}, time.monotonic()
    if made:
        token = str(json.loads(Path(row, "unierase", "manifest.json").read_text())["token"]["name"])
    elif row not in ("unedited", "reference"):
        names, _, settings = row.partition("@")
        given = dict(pair.split("=") for pair in settings.split(",") if pair)
        hparams = UniEraseHyperParams.from_hparams("smollm2-135m").replace(
            harden=[name for name in names.split("+") if name != "none"], **given
        )
        requests = read_requests("tofu:forget01")[:: options.every]
        changes, _ = change(model, requests, tokenizer=tokenizer, retain="tofu:retain_perturbed[:160]", hparams=hparams)
        assert changes.edit is not None
        token = hparams.unlearning_token
        figures = {
            "norm_ratios": list(changes.edit.norm_ratios.values()),
            **changes.figures,
            "seconds": changes.seconds,
        }
    edited = time.monotonic()
    print(row, "edited in", round(edited - start), "s", figures.get("value_nll", ())[:3], flush=True)
    sizes = replace(
        QUICK,
        facts=len(forget),
        answer_most=ROOM,
        samples=16,
        relearn_steps=(20,),
        relearn_some_steps=(20,),
        relearn_batch=8,
    )
    context = Context(forget, kept[::4], sizes, token=token)
    whole = replace(context, sizes=replace(sizes, every_variant=True))
    subject = Audited(row, LoadedModel.of(model, tokenizer, row), tokenizer.get_vocab().get(token) if token else None)
    found: Row = {"row": row, "n_forget": len(forget)}
    by_name = {attack.name: attack for attack in ATTACKS}
    for name in options.attacks.split(","):
        began = time.monotonic()
        attack, _, size = name.partition(":")
        result = by_name[attack].run(subject, whole if size == "full" else context)
        found[name] = {**scores(result, context), "seconds": time.monotonic() - began}
        print(row, name, found[name]["rouge_l_recall"], found[name]["given"], flush=True)
    texts = answers(model, tokenizer, [fact.question for fact in context.kept], max_new_tokens=ROOM)
    found["kept"] = {
        "n": len(texts),
        "answered": sum(
            answered(fact.answer, text, fact.question) for fact, text in zip(context.kept, texts, strict=True)
        ),
        "rouge_l_recall": _mean(
            [rouge_l_recall(fact.answer, text) for fact, text in zip(context.kept, texts, strict=True)]
        ),
    }
    found["perplexity"] = perplexity(model, tokenizer, paragraphs("ordinary_text"))
    found["seconds"] = {"edit": edited - start, "attacks": time.monotonic() - edited}
    return {**found, "edit": figures}


def scores(result: AttackResult, context: Context) -> Row:
    """ROUGE-L recall of the answers, the best variant of each fact, and the share given by the audit's rule."""
    by_variant = {
        each.name: [
            rouge_l_recall(fact.answer, cleaned(context, text))
            for fact, text, value in zip(context.facts, each.texts, each.values, strict=True)
            if value is not None
        ]
        for each in result.measures
        if each.texts
    }
    values = [value for value in result.values if value is not None]
    best = [max(column) for column in zip(*by_variant.values(), strict=True)]
    return {
        "rouge_l_recall": _mean(best),
        "given": _mean(values),
        "figures": dict(result.figures),
        "by_variant": {name: _mean(column) for name, column in by_variant.items()},
        "texts": {each.name: each.texts for each in result.measures},
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def printed(found: Row, attacks: list[str]) -> str:
    cells = [found["row"]]
    for name in attacks:
        entry = found.get(name)
        rouge = name != "leak-at-k" and entry and entry["rouge_l_recall"] is not None
        value = entry and entry["rouge_l_recall" if rouge else "given"]
        cells.append("-" if value is None else f"{value:.2f}")
    kept = found["kept"]
    cells += [f"{kept['answered']} of {kept['n']}", f"{kept['rouge_l_recall']:.3f}", f"{found['perplexity']:.1f}"]
    ratios = found["edit"].get("norm_ratios") or [0.0]
    cells += [f"{max(ratios):.2f}", f"{found['seconds']['edit']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--every", type=int, default=1, help="every n-th of the 40 facts, for a quick look")
    parser.add_argument("--attacks", default="plain,token-ban,prefill,paraphrases,quantise")
    options = parser.parse_args()
    os.environ.setdefault("UNIERASE_TOFU_DIR", str(options.shared / "data" / "tofu"))
    options.out.mkdir(parents=True, exist_ok=True)
    attacks = options.attacks.split(",")
    columns = ["hardening", *attacks, "kept", "their ROUGE-L", "perplexity", "largest update / weight", "seconds"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for row in options.rows:
        path = options.out / f"{row.strip('/').replace('/', '_')}-{options.every}.json"
        if not path.is_file():
            path.write_text(json.dumps(measured(row, options), indent=1, default=str), encoding="utf-8")
        print(printed(json.loads(path.read_text(encoding="utf-8")), attacks), flush=True)


if __name__ == "__main__":
    main()
