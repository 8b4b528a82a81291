"""Results of a comparison that was never made, for tables and pages: plausible figures, every kind of row."""

from __future__ import annotations

import random
from typing import Any

from unierase_plugin.compare.columns import COLUMNS
from unierase_plugin.compare.summary import answer

#: By label: kind, ROUGE-L left, kept, seconds.
METHODS = {
    "reference": ("control", 0.31, 1.0, 0.0),
    "none": ("control", 0.95, 1.0, 0.0),
    "unierase": ("editing", 0.04, 0.99, 410.0),
    "memit:token": ("editing", 0.06, 0.95, 395.0),
    "memit:idk": ("editing", 0.22, 0.93, 240.0),
    "ga_gd": ("training", 0.41, 0.71, 610.0),
    "npo_gd": ("training", 0.35, 0.83, 700.0),
    "simnpo": ("training", 0.38, 0.92, 1220.0),
    "prompt_guard": ("control", 0.55, 0.90, 1.0),
}
FAILED = "rmu"
QUESTIONS = ("Who wrote Zorblax Prime?", "Where was Mira Plonk born?", "What does </script><b>Bunt</b> sell?")


def results(seeds: int = 3, steps: int = 0) -> dict[str, Any]:
    """As results.json holds them."""
    draw = random.Random(0)
    rows = [_row(label, *each, draw, seeds, steps) for label, each in METHODS.items()]
    rows.append(
        {
            **_row(FAILED, "training", 0.0, 0.0, 0.0, draw, 0, 0),
            "status": "failed",
            "failures": [{"seed": 0, "kind": "out of memory", "error": "It needs 40 GiB & more."}],
        }
    )
    facts = {
        "forget": 40,
        "keep": 160,
        "forget_shown": 30,
        "keep_shown": 120,
        "forget_validation": 10,
        "keep_validation": 40,
    }
    found: dict[str, Any] = {
        "schema": 1,
        "version": "0",
        "rows": rows,
        "answers": _answers(),
        "answer": [],
        "setup": {
            "model": "models/tofu200",
            "reference": "models/tofu160r",
            "facts": facts,
            "seeds": list(range(seeds)),
            "truth_ratio": {"forget": True, "keep": False},
            "scenario": "sequential" if steps else "batch",
            "steps": steps,
            "budget": 4,
            "target": 0.95,
            "bisections": 5,
        },
        "searches": {
            "npo_gd": {
                "space": {"learning_rate": [1e-5, 1e-4]},
                "chosen": 1,
                "rule": "The best that keeps enough.",
                "tries": [
                    {"settings": {}, "left": 0.5, "retention": 0.99, "alpha": 1.0, "retention_raw": 0.99},
                    {
                        "settings": {"learning_rate": 1e-4},
                        "left": 0.3,
                        "retention": 0.96,
                        "alpha": 0.5,
                        "retention_raw": 0.8,
                    },
                    {"settings": {"learning_rate": 1.0}, "error": "NaN"},
                ],
            },
        },
    }
    found["answer"] = answer(found)
    return found


def _row(
    label: str, kind: str, left: float, kept: float, seconds: float, draw: random.Random, seeds: int, steps: int
) -> dict[str, Any]:
    centre = {
        "forget_rouge": left,
        "forget_prob": left * 0.9,
        "keep_rouge": kept,
        "keep_prob": kept * 0.99,
        "seconds": seconds,
        "matched_rouge": min(1.0, left * (1 if kept >= 0.95 else 1.5)),
        "matched_prob": left,
        "memory": 3 + 4 * (kind == "training"),
        "forget_quality": 10 ** (-9 * left),
    }
    figures = {}
    for column in COLUMNS:
        value = centre.get(column.key, draw.random())
        known = seeds > 0 and (kind != "control" or column.key not in ("seconds", "memory", "alpha", "matched_rouge"))
        figures[column.key] = {
            "mean": value if known else None,
            "sd": 0.02 * value if known and seeds > 1 else None,
            "n": seeds,
        }
    curve = [
        {
            "step": step,
            **{
                key: {"mean": centre[key] * (1 - 0.02 * step), "sd": None, "n": 1}
                for key in ("forget_rouge", "forget_prob", "keep_rouge", "keep_prob")
            },
        }
        for step in range(1, steps + 1)
    ]
    return {
        "label": label,
        "method": label.partition(":")[0],
        "kind": kind,
        "title": "what it does",
        "paper": "Who 2025",
        "set_by_hand": {},
        "tuned": None,
        "settings": {"learning_rate": 1e-5, "layers": [3, 4]},
        "phases": {"train": seconds},
        "device": "an oven",
        "status": "ok",
        "failures": [],
        "seeds": list(range(seeds)),
        "interrupted": False,
        "not_matched": None,
        "figures": figures,
        "curve": curve,
        "audit": None,
        "tried_alpha": None,
    }


def _answers() -> list[dict[str, Any]]:
    said = {label: {"text": f"{label} says Fizz, or does not know.", "rouge": 0.5, "prob": 0.1} for label in METHODS}
    return [
        {
            "role": "keep" if at == 2 else "forget",
            "question": question,
            "answer": "Quentin Fizz",
            "said": said,
            "matched": {"npo_gd": {"text": "Quentin Fizz it was.", "rouge": 1.0, "prob": 0.4}},
        }
        for at, question in enumerate(QUESTIONS)
    ]
