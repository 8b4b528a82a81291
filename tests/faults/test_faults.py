"""Commands that are killed at a file operation: nothing is lost, and the same command ends as if nothing had been.

The short version takes a few operations of each command, those of the swap among them; `-m slow` takes all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from scenarios import RUNS, SCENARIOS, Scenario
from trials import KILLS, Trials, lost, spread, swaps
from worlds import Zygote

#: What the short version kills; all others are variants of these.
SHORT = ("run", "revert over an older folder", "stats")
#: What does not hold yet.
OPEN = {"stats": "a temporary file stays beside --out"}


def each_of(scenarios: Iterable[Scenario]) -> list[Any]:
    return [
        pytest.param(
            each,
            id=each.name,
            marks=[pytest.mark.xfail(reason=OPEN[each.name], strict=False)] if each.name in OPEN else [],
        )
        for each in scenarios
    ]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    scratch = tmp_path_factory.mktemp("faults")
    zygote = Zygote(scratch)
    yield Trials(zygote, scratch)
    zygote.close()


@pytest.mark.parametrize("scenario", each_of(each for each in RUNS if each.name in SHORT))
def test_a_kill_loses_nothing(trials: Trials, scenario: Scenario) -> None:
    case = trials.case(scenario)
    points = {*swaps(case), *spread(case.points("kill"), 3)}
    tried = [trials.fault(case, "kill", at) for at in sorted(points)]
    tried += [trials.fault(case, "tear", at) for at in case.points("tear")[-1:]]
    assert lost(tried) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
@pytest.mark.parametrize("scenario", each_of(SCENARIOS))
def test_a_kill_at_any_operation_loses_nothing(trials: Trials, scenario: Scenario, kind: str) -> None:
    case = trials.case(scenario)
    assert lost(trials.fault(case, kind, at) for at in case.points(kind)) == []
