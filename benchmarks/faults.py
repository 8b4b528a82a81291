#!/usr/bin/env python3
"""What is lost when a command is killed, stopped, out of disk, not alone, or given damaged files.

    python benchmarks/faults.py --out results                       # everything: hours on one core
    python benchmarks/faults.py --points 6 --commands "run;revert" --kinds killed,damaged

Every trial is a command of the package on a tiny random model (tests/faults). After it, what was there before must be
whole, and the same command again must end like an undisturbed run; damaged files must be refused, told of, or make no
difference. Prints what was lost as it happens and a table of tried / survived / lost, and writes OUT/faults.json and
OUT/faults.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "faults")]

from scenarios import SCENARIOS  # noqa: E402
from suite import KINDS, counts, markdown, suite  # noqa: E402
from trials import Trials  # noqa: E402
from worlds import Zygote  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=0, help="file operations of each command and kind; 0: all")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--commands", default="", help=f"with semicolons, of {'; '.join(s.name for s in SCENARIOS)}")
    parser.add_argument("--out", type=Path, default=Path("results"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        zygote = Zygote(Path(scratch))
        try:
            trials = Trials(zygote, Path(scratch))
            for kind, trial in suite(trials, given.points, given.kinds.split(","), _names(given.commands)):
                found.append((kind, trial))
                if trial.problems:
                    print(trial, flush=True)
        finally:
            zygote.close()
            # As far as it came, when it is stopped.
            table = counts(found)
            told = [{"kind": kind, **vars(trial)} for kind, trial in found]
            written = {"points": given.points, "counts": table, "trials": told}
            (given.out / "faults.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
            (given.out / "faults.md").write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";") if name.strip()]


if __name__ == "__main__":
    main()
