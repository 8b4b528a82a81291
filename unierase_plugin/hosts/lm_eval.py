"""lm-eval: adds this package's tasks to lm-eval's own, so that `lm_eval --tasks tofu_forget` needs no other option.

lm-eval has no entry point for tasks, so its TaskManager is patched (`tasks/task_manager.py`).
"""

from __future__ import annotations

import functools
import logging
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any

from ..errors import DependencyError, UniEraseError, did_you_mean, shown, visible
from ..plugins.hookspecs import Host
from ..tasks.task_checks import check_ours_when_found
from ..tasks.task_manager import find_our_tasks, hand_on_metadata, register_model_type, tasks_folder

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes every TaskManager that reads lm-eval's own tasks read ours too. A second call does nothing.

    Raises DependencyError where lm-eval is not installed, or where its TaskManager takes no folders.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DependencyError(f"lm-eval is not installed: pip install lm-eval ({error}).") from error
    if not find_our_tasks():
        return
    _hint_at_ours(TaskManager)
    hand_on_metadata()
    # The tasks work without our model type too.
    with suppress(ImportError):
        register_model_type()
    check_ours_when_found()
    _end_in_a_line()


def _end_in_a_line() -> None:
    """Makes lm-eval's command line print our errors as one line. It shows others as tracebacks, as before."""
    original = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (isinstance(error, UniEraseError) and _is_command_line()):
            original(kind, error, trace)
            return
        sys.stderr.write(f"Error: {visible(str(error))}\n")

    sys.excepthook = excepthook


def _is_command_line() -> bool:
    """Whether lm-eval's command line runs, by its script or by `python -m lm_eval`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return "lm_eval.__main__" in {*sys.modules, getattr(spec, "name", None)}


def _hint_at_ours(manager: Any) -> None:
    """Logs the nearest name of ours where lm-eval does not find a task. lm-eval itself says only that it is missing."""
    original = getattr(manager, "match_tasks", None)
    if original is None:
        return
    ours = {path.stem for path in tasks_folder().glob("*.yaml")}

    @functools.wraps(original)
    def match_tasks(self: Any, task_list: Any) -> Any:
        found = original(self, task_list)
        # Some versions give one name as a text.
        asked = [task_list] if isinstance(task_list, str) else task_list
        for name in (each for each in asked if isinstance(each, str) and not original(self, [each])):
            hint = did_you_mean(name, ours)
            if hint:
                logger.warning("There is no task %s.%s", shown(name), hint)
        return found

    manager.match_tasks = match_tasks


LM_EVAL = Host("lm_eval", "tasks for lm-eval (EleutherAI/lm-evaluation-harness)", "lm_eval.tasks", register)
