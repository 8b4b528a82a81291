"""The whole suite: every kind of fault, on every command that it can meet, and the table of what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from damage import cache_trials, record_trials
from operations import NEED_ROOM, WRITING
from scenarios import SCENARIOS, Scenario
from together import one_cache, one_folder, other_facts
from trials import Case, Trial, Trials, spread, swaps

#: Sizes of the largest file there may be, in bytes: below the tokenizer, between it and the weights.
SIZES = (20_000, 100_000)
#: Kinds as the table shows them, and what each is made of.
KINDS = {
    "killed": "at a file operation, or half way through a write",
    "disk full": "from a write on, or for files above a size",
    "stopped": "by SIGTERM at a file operation",
    "at once": "two and four processes with one output or one cold cache",
    "damaged": "bits flipped, files cut, lines lost or exchanged in the record, the weights and the cache",
}
#: Bit flips of each file.
FLIPS = 8


def suite(
    trials: Trials, points: int = 0, kinds: Sequence[str] = tuple(KINDS), commands: Sequence[str] = ()
) -> Iterator[tuple[str, Trial]]:
    """Every trial with its kind. points: of each command and kind, evenly spread; 0 takes all."""
    chosen = [each for each in SCENARIOS if not commands or each.name in commands]
    for scenario in chosen:
        case = trials.case(scenario)
        if "killed" in kinds:
            yield from (("killed", trial) for trial in killed(trials, case, points))
        if "disk full" in kinds:
            yield from (("disk full", trial) for trial in without_room(trials, case, points))
        if "stopped" in kinds:
            yield from (("stopped", trials.fault(case, "stop", at)) for at in _some(case.points("stop"), points))
        if "at once" in kinds:
            yield from (("at once", trial) for trial in at_once(trials, case))
    if "damaged" in kinds:
        flips = min(points, FLIPS) if points else FLIPS
        yield from (("damaged", trial) for trial in record_trials(trials, flips))
        yield from (("damaged", trial) for trial in cache_trials(trials, flips))


def killed(trials: Trials, case: Case, points: int = 0) -> Iterator[Trial]:
    """Before each operation, those of the swap among them, and half way through each write."""
    for at in sorted({*swaps(case), *_some(case.points("kill"), points)}):
        yield trials.fault(case, "kill", at)
    for at in _some(case.points("tear"), points // 2):
        yield trials.fault(case, "tear", at)


def without_room(trials: Trials, case: Case, points: int = 0) -> Iterator[Trial]:
    wanting = [told["at"] for told in case.clean.operations if told["operation"] in (*WRITING, *NEED_ROOM)]
    for at in _some(wanting, points):
        yield trials.fault(case, "full", at)
    for size in SIZES:
        yield trials.fault(case, "limit", size)


def at_once(trials: Trials, case: Case) -> Iterator[Trial]:
    """Started together, and with the first one paused just before its result takes its name."""
    one = partial(one_folder, trials, [case])
    yield from (one(2), one(4))
    if swap := swaps(case)[:1]:
        yield one(2, swap[0])
    if case.scenario.name == "run":
        both = [case, trials.case(other_facts(case.scenario))]
        yield from (one_folder(trials, both, 2), one_folder(trials, both, 4), one_folder(trials, both, 2, *swap))
    if case.scenario.cold:
        yield from (one_cache(trials, case, 2), one_cache(trials, case, 4))


def _some(points: Sequence[int], count: int) -> list[int]:
    return spread(points, count) if count else list(points)


# --- the table -------------------------------------------------------------------------------------------------------


def counts(found: Iterable[tuple[str, Trial]]) -> dict[str, dict[str, dict[str, int]]]:
    """Tried, survived and lost, by command and kind."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for kind, trial in found:
        command = trial.command.removesuffix(", other facts")
        entry = table.setdefault(command, {}).setdefault(kind, {"tried": 0, "survived": 0, "lost": 0})
        entry["tried"] += 1
        entry["lost" if trial.problems else "survived"] += 1
    return table


def markdown(table: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """One row a command: tried / survived / lost of each kind."""
    rows: list[list[Any]] = [["command", *KINDS], ["---"] * (len(KINDS) + 1)]
    for command, kinds in table.items():
        rows.append([f"`{command}`", *(_cell(kinds.get(kind)) for kind in KINDS)])
    everything = [[kinds[kind] for kinds in table.values() if kind in kinds] for kind in KINDS]
    sums = [{key: sum(each[key] for each in found) for key in ("tried", "survived", "lost")} for found in everything]
    rows.append(["all", *(_cell(each if each["tried"] else None) for each in sums)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cell(entry: Mapping[str, int] | None) -> str:
    return f"{entry['tried']} / {entry['survived']} / {entry['lost']}" if entry else ""


def scenario_named(name: str) -> Scenario:
    return next(each for each in SCENARIOS if each.name == name)
