"""Several processes at once: into one folder, where one may write and the others are told so; and with one cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scenarios import ONE, Scenario
from trials import Case, Trial, Trials
from worlds import Ended, Try, copied, differing, is_leftover, names, state

#: The same run with other facts, of which only one can be in the folder at the end.
OTHER = tuple("others.jsonl" if word == "first.jsonl" else word for word in ONE)


def one_folder(trials: Trials, cases: Sequence[Case], count: int, pause: int = 0) -> Trial:
    """`count` processes into one output, the cases' commands in turn: whoever ends well finds its own result there.

    pause: the operation at which the first waits until another one has ended
    """
    words = [cases[at % len(cases)] for at in range(count)]
    problems: list[str] = []
    with copied(words[0].template, trials.scratch / "work") as work:
        first, *others = (Try(work, case.scenario.words) for case in words)
        ended = trials.zygote.run(replace(first, fault="pause" if pause else "", at=pause), *others)
        problems += _complaints(ended)
        well = [case for case, each in zip(words, ended, strict=True) if each.status == 0]
        if not well:
            problems.append("none ended well")
        for case in {case.scenario.words: case for case in well}.values():
            for name in case.scenario.outputs:
                changed = differing(state(work / name), case.after[name])
                if changed:
                    problems.append(f"a process ended well and {name} is not its result: {', '.join(changed[:4])}")
        left = sorted(name for name in names(work) if is_leftover(name))
        if left:
            problems.append(f"left behind: {', '.join(left[:4])}")
    kind = "one folder" if len(cases) == 1 else "one folder, other facts"
    what = f"{count} at once" + (f", the first paused before {cases[0].operation(pause)}" if pause else "")
    return Trial(cases[0].scenario.name, kind, count, what, tuple(problems))


def one_cache(trials: Trials, case: Case, count: int) -> Trial:
    """`count` processes with the same cold cache, each into an output of its own: all end as one alone would."""
    [output] = case.scenario.outputs
    outputs = [str(Path(output).with_stem(f"{Path(output).stem}-{at}")) for at in range(count)]
    problems: list[str] = []
    with copied(case.template, trials.scratch / "work") as work:
        commands = [tuple(own if word == output else word for word in case.scenario.words) for own in outputs]
        ended = trials.zygote.run(*(Try(work, words) for words in commands))
        problems += _complaints(ended)
        for own, each in zip(outputs, ended, strict=True):
            if each.status:
                problems.append(f"{own} ended with {each.status}: {each.last()}")
            elif changed := differing(_renamed(state(work / own), own, output), case.after[output]):
                problems.append(f"{own} differs from an undisturbed run's: {', '.join(changed[:4])}")
        left = sorted(name for name in names(work) if is_leftover(name))
        if left:
            problems.append(f"left behind: {', '.join(left[:4])}")
    return Trial(case.scenario.name, "one cache", count, f"{count} at once", tuple(problems))


def _renamed(found: dict[str, Any] | None, own: str, name: str) -> dict[str, Any] | None:
    """A single file's state is under its own name."""
    return {(name if key == own else key): held for key, held in found.items()} if found else found


def _complaints(ended: Sequence[Ended]) -> list[str]:
    found = [f"a traceback: {each.last()}" for each in ended if each.crashed]
    return found + ["one did not end" for each in ended if each.status is None]


def other_facts(scenario: Scenario) -> Scenario:
    return Scenario(f"{scenario.name}, other facts", OTHER, scenario.outputs, scenario.before, cold=scenario.cold)
