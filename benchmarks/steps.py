#!/usr/bin/env python3
"""One request at a time, and many in steps: what it costs, and what is left of the first when the last is made.

    python benchmarks/steps.py precise sequential --out results
    python benchmarks/steps.py folders --model DIR --forget tofu:forget10 --size 40 --steps 10 --out results

`precise` edits single facts of the demo, each on the unedited model, once token and statistics are cached. `sequential`
edits the demo's 20 facts in steps of 5 and in one batch; every step goes on from the one before in memory. Both are on
the 135M model of the demo. `folders` goes from folder to folder, as one `unierase run` after another does, with any
facts and model; at the end the first step's facts and the last's are asked, and everything is taken back and compared
with the model that it began with. Prints tables and writes results/<what>.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from unierase_plugin import ForgetRequest, unlearn
from unierase_plugin.checkpoint import revert_checkpoint
from unierase_plugin.evaluation.metrics import answered, reads_as_idk
from unierase_plugin.facts.readers import read_requests
from unierase_plugin.facts.resources import demo_facts, lines
from unierase_plugin.models.base_model import fetch_base_model
from unierase_plugin.models.generate import answers
from unierase_plugin.models.loading import load
from unierase_plugin.pipeline import change
from unierase_plugin.results import UnlearnResult
from unierase_plugin.storage.cache import cache_folder

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


def through_folders(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of `size` facts, each from the folder that the one before wrote; only the last folder is left."""
    work = options.out / "steps"
    base, model = options.model, options.model
    rows: list[dict[str, Any]] = []
    for step in range(options.steps):
        facts = f"{options.forget}[{step * options.size}:{(step + 1) * options.size}]"
        folder, start = work / str(step + 1), time.perf_counter()
        result = unlearn(
            str(model),
            facts,
            hparams=options.hparams or None,
            corpus=options.corpus or None,
            out=folder,
            judged=0,
            overwrite=True,
        )
        phases = {name: round(spent, 2) for name, spent in result.report.seconds.items()}
        rows.append(
            {
                "seconds": round(time.perf_counter() - start, 1),
                "phases": phases,
                "perplexity": result.report.perplexity_after,
                "norm_ratio": max(result.edit.norm_ratios.values()) if result.edit else 0.0,
                "residual_left": result.edit.residual_norms[-1] / result.edit.residual_norms[0] if result.edit else 0.0,
                "gibibytes": sum(path.stat().st_size for path in (folder / "unierase").rglob("*")) / 2**30,
            }
        )
        logging.getLogger(__name__).warning("step %d: %s", step + 1, rows[-1])
        if model != base:
            shutil.rmtree(model)
        model = folder
    first, last = (
        read_requests(f"{options.forget}[{at}:{at + options.size}]") for at in (0, (options.steps - 1) * options.size)
    )
    edited, tokenizer = load(str(model))
    before = load(str(base))
    found = {
        "rows": rows,
        "first": declined(edited, tokenizer, first[: options.asked]),
        "last": declined(edited, tokenizer, last[: options.asked]),
    }
    reverted = work / "reverted"
    shutil.rmtree(reverted, ignore_errors=True)
    revert_checkpoint(model, reverted)
    after = load(str(reverted))[0].state_dict()
    found["reverted_to_the_bit"] = all(  # type: ignore[assignment]
        torch.equal(value, after[name]) for name, value in before[0].state_dict().items()
    )
    shutil.rmtree(work)
    return found


def declined(model: Any, tokenizer: Any, facts: Sequence[ForgetRequest]) -> dict[str, int]:
    said = answers(model, tokenizer, [fact.question for fact in facts])
    return {
        "of": len(said),
        "token_first": sum(text.startswith("<unlearn_0>") for text in said),
        "answered": sum(answered(fact.answer, text, fact.question) for fact, text in zip(facts, said, strict=True)),
    }


def asked(result: UnlearnResult, forget: list[dict[str, Any]], retain: list[dict[str, Any]]) -> dict[str, Any]:
    said = answers(result.model, result.tokenizer, [fact["question"] for fact in [*forget, *retain]])
    gone, kept = said[: len(forget)], said[len(forget) :]
    return {
        "forget_answered": sum(
            answered(fact["answer"], text, fact["question"]) for fact, text in zip(forget, gone, strict=True)
        ),
        "token_first_and_idk": sum(
            text.startswith("<unlearn_0>") and reads_as_idk(text.replace("<unlearn_0>", ""), lines("idk_phrases"))
            for text in gone
        ),
        "retain_answered": sum(
            answered(fact["answer"], text, fact["question"]) for fact, text in zip(retain, kept, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["precise", "sequential", "folders"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--model", type=Path, help="of `folders`")
    parser.add_argument("--forget", default="tofu:forget10", help="SPEC of `folders`")
    parser.add_argument("--size", type=int, default=40, help="facts a step of `folders`")
    parser.add_argument("--steps", type=int, default=10, help="of `folders`")
    parser.add_argument("--asked", type=int, default=40, help="facts of the first and the last step asked at the end")
    parser.add_argument("--hparams", default="", help="of `folders`; the model's own when left out")
    parser.add_argument("--corpus", default="", help="of `folders`; the hparams' when left out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    run: dict[str, Callable[[], Any]] = {
        "precise": lambda: precise(demo_model()),
        "sequential": lambda: [in_steps(demo_model(), size) for size in (STEP, 20)],
        "folders": lambda: through_folders(options),
    }
    show = {"precise": show_precise, "sequential": show_sequential, "folders": show_folders}
    for what in options.what:
        found = run[what]()
        show[what](found)  # type: ignore[operator]
        (options.out / f"{what}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def demo_model() -> str:
    return str(fetch_base_model(cache_folder()).path)


def show_precise(found: dict[str, Any]) -> None:
    print("first request {first:.1f} s; then median {median:.1f} s; phases {phases}".format(**found))


def show_sequential(found: Sequence[dict[str, Any]]) -> None:
    print("| steps of | seconds a step | forget answered | token, then refusal | kept answered | largest update |")
    print("|---|---|---|---|---|---|")
    for row in found:
        spent = ", ".join(f"{each:.0f}" for each in row["seconds"])
        print(
            f"| {row['size']} | {spent} | {row['forget_answered']} of 20 | {row['token_first_and_idk']} | "
            f"{row['retain_answered']} of 40 | {max(row['norm_ratio']):.2f} |"
        )


def show_folders(found: dict[str, Any]) -> None:
    print("| step | seconds | values | edit | perplexity | largest update | residual left | record, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for number, row in enumerate(found["rows"], 1):
        print(
            f"| {number} | {row['seconds']:.0f} | {row['phases']['values']:.0f} | {row['phases']['edit']:.1f} | "
            f"{row['perplexity']:.1f} | {row['norm_ratio']:.2f} | {row['residual_left']:.2f} | {row['gibibytes']:.2f} |"
        )
    print({name: value for name, value in found.items() if name != "rows"})


if __name__ == "__main__":
    main()
