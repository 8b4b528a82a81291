#!/usr/bin/env python3
"""The TOFU tasks on real models: figures, agreement with a plain forward pass, and the time they add.

    python benchmarks/tofu_tasks.py figures --shared ../shared --reference tofu160r tofu200 EDITED --out results
    python benchmarks/tofu_tasks.py agreement --shared ../shared tofu200 --documents 5
    python benchmarks/tofu_tasks.py overhead --shared ../shared tofu200 --documents 20

A model is a folder, or a name that `shared/models/tofu_model.py` builds (into --out). `figures` runs the retain-only
reference first, then forget quality and model utility of every model, and prints the rows of
docs/explanation/benchmarks.md; --limit asks fewer documents of each task. `agreement` compares every figure of single
documents with tofu_reference.py. `overhead` sends the same requests to lm-eval's model by themselves, in turn with the
whole task.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import lm_eval
import tofu_reference as reference
from lm_eval.tasks import TaskManager

from unierase_plugin.tasks.lm_eval_cli import run_lm_eval
from unierase_plugin.tasks.lm_eval_model import HFWithSpecialTokens
from unierase_plugin.tasks.task_manager import tasks_folder

FORGET = (
    *("forget_quality", "forget_quality_log10", "prob", "rougeL_recall", "truth_ratio", "extraction_strength"),
    *("exact_memorization", "forget_efficacy_3", "idk_rate", "token_first", "gibberish", "token_entropy"),
)


def folder_of(model: str, options: argparse.Namespace) -> Path:
    if Path(model).is_dir():
        return Path(model)
    folder = Path(options.out, model)
    if not folder.is_dir():
        builder = str(options.shared / "models" / "tofu_model.py")
        subprocess.run([sys.executable, builder, "--delta", model, str(folder)], check=True)
    return folder


def run(folder: Path, tasks: str, out: Path, options: argparse.Namespace, **metadata: Any) -> dict[str, Any]:
    start = time.monotonic()
    run_lm_eval(
        [
            "--model",
            str(folder),
            "--tasks",
            tasks,
            "--device",
            "cpu",
            "--batch_size",
            str(options.batch_size),
            "--log_samples",
            "--output_path",
            str(out),
            "--metadata",
            json.dumps({"data_dir": str(options.shared / "data" / "tofu"), **metadata}),
            *(("--limit", str(options.limit)) if options.limit else ()),
        ]
    )
    newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8"))
    found["wall_seconds"] = time.monotonic() - start
    return found


def figures(options: argparse.Namespace) -> None:
    limit, options.limit = options.limit, None
    logs = Path(options.out, "reference")
    if not any(logs.rglob(f"samples_{options.forget}_*.jsonl")):
        run(folder_of(options.reference, options), options.forget, logs, options)
    options.limit = limit
    rows = []
    for model in options.models:
        folder = folder_of(model, options)
        out = Path(options.out, f"figures-{folder.name}")
        found = run(folder, f"{options.forget},tofu_utility", out, options, reference=str(logs))
        forget, kept = (found["results"][task] for task in (options.forget, "tofu_utility"))
        shown = [
            *(forget[f"{name},none"] for name in FORGET),
            kept["model_utility,none"],
            kept["model_utility_12,none"],
        ]
        rows.append([folder.name, *(f"{value:.4g}" for value in shown), f"{found['wall_seconds']:.0f} s"])
    header = ["model", *FORGET, "model_utility", "model_utility_12", "time"]
    print("\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]))


def agreement(options: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for model in options.models:
        folder = folder_of(model, options)
        found = evaluate(folder, options)["samples"][options.forget]
        plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        path = options.shared / "data" / "tofu" / f"{options.forget.removeprefix('tofu_')}_perturbed.json"
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        worst: dict[str, float] = {}
        for sample in found:
            wanted = reference.figures(plain, tokenizer, records[sample["doc_id"]], "chat", 200)
            for name, value in wanted.items():
                worst[name] = max(worst.get(name, 0.0), abs(value - sample[name]))
        print(f"{folder.name}, {len(found)} documents, largest difference:", json.dumps(worst, indent=1))


def evaluate(folder: Path, options: argparse.Namespace, model: Any = None) -> dict[str, Any]:
    metadata = {"data_dir": str(options.shared / "data" / "tofu")}
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=metadata)
    model = model or load(folder, options)
    task = manager.load([options.forget])
    found: dict[str, Any] = lm_eval.evaluate(
        model, task, limit=options.documents, apply_chat_template=True, bootstrap_iters=0
    )
    return found


def load(folder: Path, options: argparse.Namespace) -> Any:
    batch_size = options.batch_size
    return HFWithSpecialTokens(pretrained=str(folder), device="cpu", batch_size=batch_size, add_bos_token=False)


def overhead(options: argparse.Namespace) -> None:
    """The time of a whole task less that of its requests by lm-eval's `hf`, in turn, on one process' clock."""
    from lm_eval.models.huggingface import HFLM

    folder = folder_of(options.models[0], options)
    ours = load(folder, options)
    theirs = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=options.batch_size, add_bos_token=False)
    asked: dict[str, list[Any]] = {}
    for kind in ("generate_until", "loglikelihood"):
        send = getattr(ours, kind)
        setattr(ours, kind, lambda requests, kind=kind, send=send: send(asked.setdefault(kind, list(requests))))
    evaluate(folder, options, ours)
    times: dict[str, list[float]] = {"task": [], "requests": []}
    for _ in range(options.rounds):
        start = time.process_time()
        evaluate(folder, options, ours)
        times["task"].append(time.process_time() - start)
        start = time.process_time()
        for kind, requests in asked.items():
            getattr(theirs, kind)(requests)
        times["requests"].append(time.process_time() - start)
    best = {name: min(values) for name, values in times.items()}
    share = best["task"] / best["requests"] - 1
    print(f"{folder.name}, {options.documents} documents: {json.dumps(times)}; best against best {100 * share:+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("figures", "agreement", "overhead"))
    parser.add_argument("models", nargs="+")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--reference", default="tofu160r", help="the retain-only model")
    parser.add_argument("--forget", default="tofu_forget01", help="the forget set's task")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    {"figures": figures, "agreement": agreement, "overhead": overhead}[options.what](options)


if __name__ == "__main__":
    main()
