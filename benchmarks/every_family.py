#!/usr/bin/env python3
"""Which decoders of transformers can be edited, and how exactly, on a tiny random model of each.

    python benchmarks/every_family.py --out results/survey            # all of them: a quarter of an hour on one core
    python benchmarks/every_family.py gemma2 qwen3_moe --out results/survey

A family is a config type of AutoModelForCausalLM or AutoModelForImageTextToText that is no encoder, or a release of
`decoders.RELEASES`. Its model has the default config with small sizes (tests/helpers/decoders.py). The checks look from
the outside (tests/helpers/survey.py): partial, padded and cached passes equal a plain forward pass; keys equal those of
a hook; |z - h| that is left after an edit of two blocks, as a share of the one before; the way back is exact; the saved
folder loads by name and says the same. OUT/survey.json has every outcome and is written as it grows: what is there is
not checked again. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from decoders import NOT_BUILT, RELEASES, decoders, tiny_decoder, wrappers
from survey import Found, survey

WORDS = {"works": "works", "refused": "refused", "wrong": "**wrong**", "crash": "**crash**", "not built": "not built"}


def outcome(kind: str) -> Found:
    """What a family turns out to be."""
    if kind in NOT_BUILT:
        return Found("not built", NOT_BUILT[kind])
    try:
        model = tiny_decoder(kind)
    except Exception as error:
        return Found("not built", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    with tempfile.TemporaryDirectory() as folder:
        return survey(model, Path(folder))


def table(found: Mapping[str, Found]) -> str:
    """A row a family; the reason up to its first sentence."""
    rows = ["| family | outcome | residual left | reason |", "|---|---|---|---|"]
    for kind, each in found.items():
        left = "" if each.left is None else f"{100 * each.left:.2f} %"
        reason = each.reason.split(". ")[0].replace("|", "/")[:160]
        rows.append(f"| `{kind}` | {WORDS[each.outcome]} | {left} | {reason} |")
    counts = collections.Counter(each.outcome for each in found.values())
    rows.append("")
    rows.append(", ".join(f"{counts[name]} {name}" for name in WORDS))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="config types or releases; all if none is named")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "survey.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kinds = options.families or [*decoders(), *wrappers(), *RELEASES]
    found: dict[str, Found] = {}
    for at, kind in enumerate(kinds, start=1):
        if kind not in known:
            known[kind] = dataclasses.asdict(outcome(kind))
            path.write_text(json.dumps(known, indent=1), encoding="utf-8")
        found[kind] = Found(**known[kind])
        sys.stderr.write(f"{at} of {len(kinds)}: {kind}: {found[kind].outcome}\n")
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
