#!/usr/bin/env python3
"""UniErase with the shipped defaults on a real small model: the demo's facts, a second list, and 40 facts of TOFU.

    python benchmarks/first_light.py demo second tofu200 --shared ../shared --out results

`demo` is what `unierase demo` runs. `second` is another list, whose facts to forget no default was chosen on.
`tofu200` is the model that `shared/models/tofu_model.py` builds, with the 40 facts of forget01 to forget and the 160
others that it memorised to keep. Facts of the list that was not edited are asked too: nothing protects those. Writes
results/<name>-<seed>.json and prints the table of docs/explanation/benchmarks.md. Seconds are of this machine. A token
and statistics that the cache holds are not in them: set UNIERASE_CACHE to an empty folder for those of a first run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from unierase_plugin.evaluation.metrics import answered
from unierase_plugin.facts.resources import demo_facts
from unierase_plugin.models.base_model import fetch_base_model
from unierase_plugin.models.generate import answers
from unierase_plugin.pipeline import unlearn
from unierase_plugin.results import UnlearnResult
from unierase_plugin.storage.cache import cache_folder

Facts = list[dict[str, Any]]


def second_facts() -> dict[str, Facts]:
    facts: dict[str, Facts] = json.loads(Path(__file__).with_name("second_facts.json").read_text(encoding="utf-8"))
    return facts


def run_facts(facts: dict[str, Facts], others: dict[str, Facts], seed: int) -> tuple[UnlearnResult, dict[str, Any]]:
    base = fetch_base_model(cache_folder())
    result = unlearn(base.path, facts["forget"], retain=facts["retain"], hparams="smollm2-135m", seed=seed)
    unseen = others["forget"] + others["retain"]
    texts = answers(result.model, result.tokenizer, [fact["question"] for fact in unseen])
    kept = [answered(fact["answer"], text, fact["question"]) for fact, text in zip(unseen, texts, strict=True)]
    near = [good for good, fact in zip(kept, unseen, strict=True) if fact.get("neighbour", True)]
    return result, {
        "unseen_answered": sum(kept),
        "unseen": len(kept),
        "unseen_of_like_kinds_answered": sum(near),
        "unseen_of_like_kinds": len(near),
    }


def run_tofu(shared: Path, work: Path, seed: int) -> tuple[UnlearnResult, dict[str, Any]]:
    model = work / "tofu200"
    if not model.is_dir():
        subprocess.run([sys.executable, str(shared / "models" / "tofu_model.py"), str(model)], check=True)
    os.environ["UNIERASE_TOFU_DIR"] = str(shared / "data" / "tofu")
    result = unlearn(model, "tofu:forget01", retain="tofu:retain_perturbed[:160]", hparams="smollm2-135m", seed=seed)
    return result, {}


def row(name: str, figures: dict[str, Any]) -> str:
    forget, retain, level = figures["forget"], figures["retain"], figures["perplexity"]
    cells = [
        name,
        f"{forget['answered_before']} → {forget['answered_after']} of {figures['n_forget']}",
        f"{forget['rouge_l_recall_before']:.2f} → {forget['rouge_l_recall_after']:.2f}",
        f"{forget['token_first_and_idk_after']} ({forget['token_first_after']})",
        f"{retain['answered_before']} → {retain['answered_after']} of {figures['n_retain']}",
        f"{retain['rouge_l_recall_after'] / retain['rouge_l_recall_before']:.3f}",
        f"{figures.get('unseen_answered', '-')} of {figures.get('unseen', '-')}",
        f"{100 * (level['after'] / level['before'] - 1):+.1f} %",
        f"{figures['token_leak']:.1e}",
        f"{sum(figures['seconds'].values()):.0f} s, {figures['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "facts",
    "to forget, answered",
    "their ROUGE-L recall",
    'token, then "I don\'t know" (token first)',
    "to keep, answered",
    "their ROUGE-L recall, after / before",
    "unprotected facts answered",
    "perplexity",
    "leak, unedited",
    "time, peak memory",
)
HEADER = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["demo", "second", "tofu200"])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    options.out.mkdir(parents=True, exist_ok=True)
    print(HEADER)
    for name in options.names:
        if name == "tofu200":
            result, more = run_tofu(options.shared, options.out, options.seed)
        else:
            lists = {"demo": demo_facts(), "second": second_facts()}
            result, more = run_facts(lists[name], lists["second" if name == "demo" else "demo"], options.seed)
        figures = {**result.report.as_dict(), **more, "examples": [vars(outcome) for outcome in result.report.forget]}
        (options.out / f"{name}-{options.seed}.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
        print(row(name, figures), flush=True)


if __name__ == "__main__":
    main()
