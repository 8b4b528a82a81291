"""Registers what this package brings, through the hooks that plugins use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .plugins.hookspecs import AnswerMetric, Host, hookimpl

if TYPE_CHECKING:
    from .attack import Attack
    from .facts.records import Benchmark
    from .locate_then_edit.solvers import MakeSolver
    from .methods.contract import Method


@hookimpl
def register_methods(register: Callable[[Method[Any]], None]) -> None:
    """Registers UniErase, the other methods of this package, and EasyEdit's own where EasyEdit is installed."""
    from .hosts.easyedit_methods import easyedit_methods
    from .methods.controls import CONTROLS
    from .methods.editing.rome_memit_alphaedit import EDITING
    from .methods.editing.unierase import UNIERASE
    from .methods.finetuning.methods import FINE_TUNING
    from .methods.lunar import LUNAR
    from .methods.removal.method import REMOVAL

    # EasyEdit's methods have no entry point: an editable installation that was not refreshed would lose them, and so
    # would a run with UNIERASE_PLUGINS= (no plugins).
    own: tuple[Method[Any], ...] = (UNIERASE, REMOVAL, *EDITING, *FINE_TUNING, LUNAR, *CONTROLS)
    for method in (*own, *easyedit_methods()):
        register(method)


@hookimpl
def register_benchmarks(register: Callable[[Benchmark], None]) -> None:
    """Registers TOFU, RETURN, CounterFact and zsRE. The first two have lm-eval tasks."""
    from .facts.benchmarks import BENCHMARKS
    from .tasks.task_manager import tasks_folder

    for benchmark in BENCHMARKS:
        has_tasks = benchmark.name in ("tofu", "return")
        register(replace(benchmark, tasks=tasks_folder()) if has_tasks else benchmark)


@hookimpl
def register_metrics(register: Callable[..., None]) -> None:
    """Registers the metrics of one generated text."""
    from .evaluation import metrics

    register(AnswerMetric("answered", "share of answers that give the fact", metrics.answered))
    register(
        AnswerMetric(
            "rouge_l_recall",
            "share of the true answer's words that are said, in order",
            lambda answer, said, question: metrics.rouge_l_recall(answer, said),
        )
    )
    for function in (metrics.is_fluent, metrics.reads_as_idk):
        register(function.__name__, function)


@hookimpl
def register_hosts(register: Callable[[Host], None]) -> None:
    """Registers EasyEdit and lm-eval."""
    from .hosts.easyedit import EASYEDIT
    from .hosts.lm_eval import LM_EVAL

    register(EASYEDIT)
    register(LM_EVAL)


@hookimpl
def register_attacks(register: Callable[[Attack], None]) -> None:
    """Registers the attacks of `unierase audit`."""
    from .audit.attacks import ATTACKS

    for attack in ATTACKS:
        register(attack)


@hookimpl
def register_solvers(register: Callable[[str, MakeSolver], None]) -> None:
    """Registers the solvers of MEMIT, AlphaEdit and ROME."""
    from .locate_then_edit.solvers import SOLVERS

    for name, make in SOLVERS.items():
        register(name, make)
