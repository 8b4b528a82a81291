#!/usr/bin/env python3
"""One request at a time, and many in steps: what it costs, and what is left of the first when the last is made.

    python tests/benchmarks/steps.py precise sequential --out results

`precise` edits single facts of the demo, each on the unedited model, once token and statistics are cached. `sequential`
edits the demo's 20 facts in steps of 5 and in one batch; every step goes on from the one before. Prints tables and
writes results/steps.json. On the 135M model of the demo; two cores are enough.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

from unierase_plugin import unlearn
from unierase_plugin.base_model import fetch_base_model
from unierase_plugin.loading import load
from unierase_plugin.pipeline import UnlearnResult, change
from unierase_plugin.resources import demo_facts
from unierase_plugin.store import cache_folder

SINGLE, STEP = 5, 5


def precise(model: str) -> dict[str, Any]:
    """Seconds of single requests, after one that fills the caches."""
    facts = demo_facts()["forget"]
    loaded, tokenizer = load(model)
    seconds, phases = [], []
    for fact in facts[: SINGLE + 1]:
        start = time.perf_counter()
        changes, _ = change(loaded, [fact], tokenizer=tokenizer, hparams="smollm2-135m")
        seconds.append(time.perf_counter() - start)
        phases.append(dict(changes.seconds))
        if changes.undo is not None:
            changes.undo()
    by_phase = {name: statistics.median(each[name] for each in phases[1:]) for name in phases[0]}
    return {"first": seconds[0], "seconds": seconds[1:], "median": statistics.median(seconds[1:]), "phases": by_phase}


def in_steps(model: str, size: int) -> dict[str, Any]:
    """The demo's facts to forget in steps of `size`; all facts asked before the first step and after the last."""
    facts = demo_facts()
    forget = facts["forget"]
    result: Any = model
    seconds = []
    for at in range(0, len(forget), size):
        step: UnlearnResult = unlearn(
            result, forget[at : at + size], retain=facts["retain"], hparams="smollm2-135m", judged=0
        )
        result = step
        seconds.append(sum(spent for phase, spent in step.report.seconds.items() if phase != "evaluate"))
    # A last look at everything: none is changed by asking.
    figures = asked(step, forget, facts["retain"])
    ratios = [max(edit.norm_ratios.values()) for edit in step.history.edits]
    return {"size": size, "seconds": seconds, "norm_ratio": ratios, **figures}


def asked(result: UnlearnResult, forget: list[dict[str, Any]], retain: list[dict[str, Any]]) -> dict[str, Any]:
    from unierase_plugin.evaluation.generate import answers
    from unierase_plugin.evaluation.metrics import answered, reads_as_idk
    from unierase_plugin.resources import lines

    said = answers(result.model, result.tokenizer, [fact["question"] for fact in [*forget, *retain]])
    gone, kept = said[: len(forget)], said[len(forget) :]
    return {
        "forget_answered": sum(answered(fact["answer"], text) for fact, text in zip(forget, gone, strict=True)),
        "token_first_and_idk": sum(
            text.startswith("<unlearn_0>") and reads_as_idk(text.replace("<unlearn_0>", ""), lines("idk_phrases"))
            for text in gone
        ),
        "retain_answered": sum(answered(fact["answer"], text) for fact, text in zip(retain, kept, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["precise", "sequential"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model = str(fetch_base_model(cache_folder()).path)
    found: dict[str, Any] = {}
    if "precise" in arguments.what:
        found["precise"] = precise(model)
        print("first request {first:.1f} s; then median {median:.1f} s; phases {phases}".format(**found["precise"]))
    if "sequential" in arguments.what:
        found["sequential"] = [in_steps(model, size) for size in (STEP, 20)]
        print("| steps of | seconds a step | forget answered | token, then refusal | kept answered | largest update |")
        print("|---|---|---|---|---|---|")
        for row in found["sequential"]:
            spent = ", ".join(f"{each:.0f}" for each in row["seconds"])
            print(
                f"| {row['size']} | {spent} | {row['forget_answered']} of 20 | {row['token_first_and_idk']} | "
                f"{row['retain_answered']} of 40 | {max(row['norm_ratio']):.2f} |"
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "steps.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
