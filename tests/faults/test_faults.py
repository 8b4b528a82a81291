"""Commands that are killed, stopped, out of disk, not alone, or given damaged files: nothing is lost in silence.

The short version takes a few trials of each kind; `-m slow` takes all of them (hours on one core), as does
benchmarks/faults.py with a table.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from damage import record_trials
from scenarios import SCENARIOS, Scenario
from suite import at_once, counts, killed, markdown, scenario_named, without_room
from together import one_folder, other_facts
from trials import Trial, Trials, lost, spread, swaps
from worlds import Zygote


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    scratch = tmp_path_factory.mktemp("faults")
    zygote = Zygote(scratch)
    yield Trials(zygote, scratch)
    zygote.close()


# --- a few of each kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "revert over an older folder"])
def test_a_kill_loses_nothing(trials: Trials, name: str) -> None:
    case = trials.case(scenario_named(name))
    kills = {*swaps(case), *spread(case.points("kill"), 3)[1:2]}
    tried = [trials.fault(case, "kill", at) for at in sorted(kills)]
    tried += [trials.fault(case, "tear", at) for at in case.points("tear")[-1:]]
    assert lost(tried) == []


def test_a_signal_leaves_nothing_behind(trials: Trials) -> None:
    """Before the result takes its name, and while the old folder is being removed."""
    case = trials.case(scenario_named("revert over an older folder"))
    assert lost([trials.fault(case, "stop", at) for at in (swaps(case)[0], *case.points("stop")[-2:])]) == []


def test_a_full_disk_is_told_and_loses_nothing(trials: Trials) -> None:
    case = trials.case(scenario_named("revert over an older folder"))
    full = trials.fault(case, "full", case.points("tear")[1])
    assert lost([full, trials.fault(case, "limit", 100_000)]) == []


def test_two_runs_into_one_folder_do_not_lose_either(trials: Trials) -> None:
    """The first waits just before its result takes its name, until the second has ended."""
    first = trials.case(scenario_named("run"))
    second = trials.case(other_facts(first.scenario))
    assert lost([one_folder(trials, [first, second], 2, swaps(first)[0])]) == []


def test_a_damaged_record_never_gives_other_weights_in_silence(trials: Trials) -> None:
    assert lost(record_trials(trials, 1, ["revert --step"])) == []


# --- everything ------------------------------------------------------------------------------------------------------

EVERY = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)


@pytest.mark.slow
@EVERY
def test_a_kill_at_any_operation_loses_nothing(trials: Trials, scenario: Scenario) -> None:
    assert lost(killed(trials, trials.case(scenario))) == []


@pytest.mark.slow
@EVERY
def test_no_room_at_any_write_loses_nothing(trials: Trials, scenario: Scenario) -> None:
    assert lost(without_room(trials, trials.case(scenario))) == []


@pytest.mark.slow
@EVERY
def test_a_stop_at_any_operation_loses_nothing(trials: Trials, scenario: Scenario) -> None:
    case = trials.case(scenario)
    assert lost(trials.fault(case, "stop", at) for at in case.points("stop")) == []


@pytest.mark.slow
@EVERY
def test_several_processes_at_once_lose_nothing(trials: Trials, scenario: Scenario) -> None:
    assert lost(at_once(trials, trials.case(scenario))) == []


@pytest.mark.slow
def test_no_damage_of_any_file_gives_another_result_in_silence(trials: Trials) -> None:
    assert lost(record_trials(trials, 8)) == []


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_counts_what_was_tried() -> None:
    found = [
        ("killed", Trial("run", "kill", 1, "", ())),
        ("killed", Trial("run", "tear", 2, "", ("half a file",))),
        ("at once", Trial("run, other facts", "one folder", 2, "", ())),
    ]
    assert counts(found) == {
        "run": {"killed": {"tried": 2, "survived": 1, "lost": 1}, "at once": {"tried": 1, "survived": 1, "lost": 0}}
    }
    assert "| `run` | 2 / 1 / 1 |  |  | 1 / 1 / 0 |  |" in markdown(counts(found))
