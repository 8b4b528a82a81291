"""Checks of lm-eval's tasks before a model is loaded: what is missing is then said in one line, and no work is lost."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import UniEraseError
from .task_manager import load_tasks, replaced, task_folders

#: Characters of another package's error that are quoted, at most.
QUOTED = 500


def our_tasks() -> frozenset[str]:
    """Names of our tasks, groups and tags, those of plugins' benchmarks among them."""
    return _tasks_in(tuple(task_folders()))


@functools.cache
def _tasks_in(folders: tuple[str, ...]) -> frozenset[str]:
    """Read once, since what lm-eval builds may be patched later."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager(include_path=list(folders), include_defaults=False).all_tasks)


def check_tasks(names: Sequence[str], metadata: Mapping[str, Any], num_fewshot: int | None = None) -> None:
    """Reads the data that our tasks need. Raises UniEraseError if something is missing."""
    if not names:
        return
    if num_fewshot:
        raise UniEraseError(
            f"{', '.join(names)} ask without examples, but --num_fewshot is {num_fewshot}. Leave it out, and run tasks "
            "that need it by themselves."
        )
    from lm_eval.tasks import TaskManager

    _load(TaskManager(include_path=task_folders(), include_defaults=False, metadata=dict(metadata)), names)


def check_ours_when_found() -> None:
    """Makes lm-eval's command line check our tasks as soon as it has found them, before it loads a model.

    It has no effect on lm-eval before 0.4.10, whose command line has no such step.
    """
    try:
        from lm_eval.config.evaluate_config import EvaluatorConfig
    except ImportError:
        return
    if not hasattr(EvaluatorConfig.process_tasks, "with_unierase_checks"):
        EvaluatorConfig.process_tasks = _checking(EvaluatorConfig.process_tasks, ours=True)


@contextmanager
def every_task_checked() -> Iterator[None]:
    """Inside, lm-eval's command line checks all other tasks too."""
    check_ours_when_found()
    try:
        from lm_eval.config.evaluate_config import EvaluatorConfig
    except ImportError:
        yield
        return
    with replaced(EvaluatorConfig, "process_tasks", _checking(EvaluatorConfig.process_tasks, ours=False)):
        yield


def _checking(original: Any, ours: bool) -> Any:
    """lm-eval's step that finds tasks, followed by a check of our tasks, or of all others."""

    @functools.wraps(original)
    def process_tasks(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = original(self, *args, **kwargs)
        known = our_tasks()
        # Tasks from a file are not names but settings.
        found = [name for name in self.tasks if isinstance(name, str) and (name in known) == ours]
        # One by one, so that the task that cannot be loaded is named. The errors of ours name the task themselves.
        for names in [found] if ours else [[name] for name in found]:
            for name, task in _load(manager, names).items():
                _check_options(name, task, self)
        return manager

    process_tasks.with_unierase_checks = True  # type: ignore[attr-defined]
    return process_tasks


def _load(manager: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """The tasks of those names. Raises UniEraseError if one cannot be loaded."""
    try:
        return load_tasks(manager, names)
    except UniEraseError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "Duplicate task" in str(error):
            raise UniEraseError(f"{error}. Name each task once: a group holds its tasks already.") from error
        # datasets, the hub client and the code of a task each raise exceptions of their own.
        lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalpha, line))]
        reason = textwrap.shorten(" ".join(lines), QUOTED, placeholder=" ...").rstrip(".")
        remedy = (
            "Install the missing package"
            if isinstance(error, ImportError)
            else "lm-eval takes a task's data and metrics from the hub: connect to the network, set HF_HOME to a cache "
            "that has them"
        )
        raise UniEraseError(
            f"The task {', '.join(names)} cannot be loaded ({type(error).__name__}: {reason}). {remedy}, or leave the "
            "task out."
        ) from error


def _check_options(name: str, task: Any, config: Any) -> None:
    """Refuses options now that the task would refuse only after the model is loaded."""
    from .facts import Facts

    if isinstance(task, Facts) and config.num_fewshot:
        task.set_config("num_fewshot", config.num_fewshot)
    if getattr(task, "UNSAFE_CODE", False) and not config.confirm_run_unsafe_code:
        raise UniEraseError(
            f"The task {name} runs code that the model writes. Give --confirm_run_unsafe_code to allow it, or "
            "leave the task out."
        )
