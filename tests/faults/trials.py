"""Tries a command with a fault, and says what was lost: nothing where `problems` is empty.

After a kill every output is what it was, or what an undisturbed run writes, and nothing between; and the same command
again ends like an undisturbed run, with nothing left beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from operations import KILLED, WRITING
from scenarios import ONE, Scenario
from worlds import Ended, State, Try, Zygote, copied, damaged, differing, is_leftover, make_ground, names, state

KILLS = ("kill", "tear")


@dataclass(frozen=True)
class Trial:
    """One command with one fault, and what was not as promised."""

    command: str
    kind: str
    at: int
    operation: str
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.command}, {self.kind} at {self.at} ({self.operation}): {'; '.join(self.problems) or 'nothing lost'}"
        )


@dataclass
class Case:
    """A scenario's world, what it looks like before and after an undisturbed run, and that run's file operations."""

    scenario: Scenario
    template: Path
    before: dict[str, State]
    after: dict[str, State]
    names: set[str]
    clean: Ended

    def operation(self, at: int) -> str:
        """What number `at` does, without what differs between runs."""
        told = self.clean.operations[at - 1]
        return " ".join([told["operation"], *(Path(path).name for path in told["paths"])])

    def points(self, kind: str) -> list[int]:
        """Every operation at which the fault makes a difference of its own."""
        chosen = [told for told in self.clean.operations if kind != "tear" or told["operation"] in WRITING]
        return [told["at"] for told in chosen]


@dataclass
class Trials:
    """Makes worlds once for all scenarios that share what comes before, and tries commands in copies of them."""

    zygote: Zygote
    scratch: Path
    made: dict[tuple[tuple[str, ...], ...], Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        warm = make_ground(self.scratch / "warm")
        self.zygote.warm(warm, ONE)
        shutil.rmtree(warm)

    def world(self, before: Sequence[Sequence[str]]) -> Path:
        """A world in which these commands have been run; to be copied, not used."""
        key = tuple(tuple(words) for words in before)
        if key not in self.made:
            earlier = self.world(before[:-1]) if key else None
            place = self.scratch / f"world-{len(self.made)}"
            if earlier is not None:
                shutil.copytree(earlier, place)
                [ended] = self._at_work(place, before[-1])
                if ended.status:
                    raise RuntimeError(f"{' '.join(before[-1])}: {ended.status}\n{ended.output}")
            else:
                make_ground(place)
            self.made[key] = place
        return self.made[key]

    def _at_work(self, template: Path, words: Sequence[str]) -> list[Ended]:
        """Runs a command where all commands run, since reports may name the place, and takes the result back."""
        work = self.scratch / "work"
        with copied(template, work):
            ended = self.zygote.run(Try(work, words))
            shutil.rmtree(template)
            shutil.copytree(work, template)
        return ended

    def case(self, scenario: Scenario) -> Case:
        """The scenario, run once without a fault."""
        template = self.world(scenario.before)
        if scenario.cold:
            warm, template = template, self.scratch / f"cold-{len(list(self.scratch.glob('cold-*')))}"
            shutil.copytree(warm, template)
            shutil.rmtree(template / "cache")
            (template / "cache").mkdir()
        with copied(template, self.scratch / "work") as work:
            before = {name: state(work / name) for name in scenario.outputs}
            [ended] = self.zygote.run(Try(work, scenario.words))
            if ended.status:
                raise RuntimeError(f"{scenario.name}: {ended.status}\n{ended.output}")
            after = {name: state(work / name) for name in scenario.outputs}
            found = names(work)
        left = sorted(name for name in found if is_leftover(name))
        if left:
            raise RuntimeError(f"{scenario.name} leaves {left}")
        return Case(scenario, template, before, after, found, ended)

    def fault(self, case: Case, kind: str, at: int) -> Trial:
        """Lets the command meet the fault at operation `at` (limit: files of so many bytes) and gives it again."""
        scenario, problems = case.scenario, []
        with copied(case.template, self.scratch / "work") as work:
            [ended] = self.zygote.run(Try(work, scenario.words, kind, at))
            if kind in KILLS:
                if ended.status != KILLED and not scenario.again:
                    problems.append(f"it ended with {ended.status} instead of being killed: {ended.last()}")
            else:
                problems += self.refused(case, ended, work, kind)
            problems += self.mixtures(case, work)
            problems += self.goes_on(case, work)
        what = case.operation(at) if kind != "limit" else f"files of up to {at} bytes"
        return Trial(scenario.name, kind, at, what, tuple(problems))

    def refused(self, case: Case, ended: Ended, work: Path, kind: str) -> Iterator[str]:
        """What is not as it should be where a command was told of the fault: one line, nothing half written."""
        if ended.crashed:
            yield f"a traceback: {ended.last()}"
        elif ended.status is None:
            yield "it did not end"
        elif ended.status == 0:
            # What only speeds later runs up may be left out.
            changed = [name for name in case.scenario.outputs if state(work / name) != case.after[name]]
            if changed and not case.scenario.again:
                yield f"it ended as if all was well, but {', '.join(changed)} is not what it should be"
        elif kind != "stop" and "Error:" not in ended.output:
            yield f"it ended with {ended.status} and no word of why: {ended.last()}"
        left = [name for name in names(work) if "writing-" in name or "replaced-" in name]
        if left and ended.status is not None:
            yield f"left behind by a process that could still clear up: {', '.join(left[:4])}"

    def mixtures(self, case: Case, work: Path) -> Iterator[str]:
        """Outputs that are neither as before nor as after."""
        for name in case.scenario.outputs:
            found = state(work / name)
            if case.scenario.grows:
                yield from (f"{name}/{file} is not whole" for file in damaged(found))
            elif found not in (case.before[name], case.after[name]) and not self._aside(case, work / name):
                changed = differing(found, case.after[name])
                yield f"{name} is neither the old nor the new one: {', '.join(changed[:4])} differ"

    @staticmethod
    def _aside(case: Case, path: Path) -> bool:
        """Whether the old one waits under its hidden name, from where the next command puts it back."""
        aside = [state(entry) for entry in path.parent.glob(f".{path.name}.replaced-*")]
        return not path.exists() and case.before[path.name] in aside

    def goes_on(self, case: Case, work: Path) -> Iterator[str]:
        """What the command, given again, does otherwise than an undisturbed run."""
        [ended] = self.zygote.run(Try(work, case.scenario.second))
        written = all(state(work / name) == case.after[name] for name in case.scenario.outputs)
        if ended.status == 1 and written and "--overwrite" in ended.output and not ended.crashed:
            # The kill came after the work: what is written is not replaced unasked.
            [ended] = self.zygote.run(Try(work, (*case.scenario.second, "--overwrite")))
        if ended.status:
            yield f"the command again ended with {ended.status}: {ended.last()}"
            return
        for name in case.scenario.outputs:
            changed = differing(state(work / name), case.after[name])
            if changed:
                yield f"{name} after the command again differs from an undisturbed run's: {', '.join(changed[:4])}"
        found = names(work)
        left = sorted(found - case.names)
        if left:
            yield f"left behind: {', '.join(left[:4])}"


def spread(points: Sequence[int], count: int) -> list[int]:
    """`count` of the points, the first and the last among them, evenly."""
    if len(points) <= count or count < 2:
        return list(points[: max(count, 1)])
    return sorted({points[round(at * (len(points) - 1) / (count - 1))] for at in range(count)})


def swaps(case: Case) -> list[int]:
    """The operations in which an output takes its name, and the ones after them."""
    found = []
    for told in case.clean.operations:
        if told["operation"] == "os.rename" and told["paths"][-1] in case.scenario.outputs:
            found += [told["at"], min(told["at"] + 1, len(case.clean.operations))]
    return found


def lost(trials: Iterable[Trial]) -> list[str]:
    """One line for each trial in which something was lost."""
    return [str(trial) for trial in trials if trial.problems]
