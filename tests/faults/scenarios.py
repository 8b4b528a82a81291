"""The commands that are tried, each with what comes before it and what it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from small import SHORT


@dataclass(frozen=True)
class Scenario:
    """A command in a world that other commands have made.

    name     as the table shows it
    words    the command's arguments
    before   commands that make the world
    outputs  folders and files that it writes, each as a whole
    grows    whether an output is filled file by file, so that after a kill each file alone must be whole
    again    the command that goes on after a kill, where it is not the same
    cold     whether the cache is emptied first
    """

    name: str
    words: Sequence[str]
    outputs: Sequence[str]
    before: Sequence[Sequence[str]] = ()
    grows: bool = False
    again: Sequence[str] = ()
    cold: bool = False

    @property
    def second(self) -> Sequence[str]:
        return self.again or self.words


def _run(model: str, facts: str, out: str, *more: str) -> tuple[str, ...]:
    hparams = ("--hparams", "short.yaml", "--device", "cpu", "--judged", "1")
    return ("run", "--model", model, "--forget", f"{facts}.jsonl", *hparams, "--out", out, *more)


ONE = _run("base", "first", "one", "--retain", "kept.jsonl")
TWO = _run("one", "more", "two")
STATS = ("stats", "--model", "base", "--hparams", "short.yaml", "--device", "cpu")

RUNS = (
    Scenario("run", ONE, ("one",), cold=True),
    Scenario("run over an older folder", (*ONE, "--overwrite"), ("one",), (_run("base", "others", "one"),)),
    Scenario("second step", TWO, ("two",), (ONE,)),
    Scenario("revert", ("revert", "two", "--out", "back"), ("back",), (ONE, TWO)),
    Scenario("revert --step", ("revert", "two", "--out", "back", "--step", "1"), ("back",), (ONE, TWO)),
    Scenario("revert --request", ("revert", "two", "--out", "back", "--request", "first-1"), ("back",), (ONE, TWO)),
    Scenario(
        "revert over an older folder",
        ("revert", "two", "--out", "back", "--overwrite"),
        ("back",),
        (ONE, TWO, ("revert", "two", "--out", "back", "--step", "1")),
    ),
    Scenario("stats", (*STATS, "--out", "moments.safetensors"), ("moments.safetensors",), cold=True),
    Scenario("export", ("export", "two", "--adapter", "adapter"), ("adapter",), (ONE, TWO)),
)

AUDIT = (
    "audit",
    "--model",
    "one",
    "--forget",
    "first.jsonl",
    "--retain",
    "wide.jsonl",
    "--device",
    "cpu",
    "--attacks",
    "token-ban,retention",
    "--out",
    "audit",
)
EDIT = "".join(f"@{name}={json.dumps(value)}" for name, value in SHORT.items())
QUICK = "@epochs=2@warmup_epochs=0@learning_rate=3e-3@batch_size=2"


def _compare(methods: str, *more: str) -> tuple[str, ...]:
    asked = ("--forget", "first.jsonl", "--retain", "wide.jsonl", "--utility", "none", "--device", "cpu")
    return ("compare", "--model", "base", *asked, "--methods", methods, "--out", "compared", *more)


COMPARISONS = {
    "compare, batch": _compare(f"memit:eos{EDIT}", "--bisections", "1"),
    "compare, precise": _compare(f"ga_gd{QUICK}", "--scenario", "precise"),
    "compare, sequential": _compare(f"memit:eos{EDIT}", "--scenario", "sequential", "--steps", "2"),
}

MEASURED = (
    Scenario("audit", AUDIT, ("audit",), (ONE,), grows=True),
    *(
        # A cell that was killed alone is a failed row, which only --retry takes up again.
        Scenario(name, words, ("compared",), grows=True, again=(*words, "--retry"))
        for name, words in COMPARISONS.items()
    ),
)

SCENARIOS = (*RUNS, *MEASURED)
