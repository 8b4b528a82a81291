"""lm-eval: this package's tasks among lm-eval's own, so that `lm_eval --tasks tofu_forget` needs no further option.

lm-eval has no entry point for tasks, so its TaskManager is given our folder before the user's `include_path`, whose
tasks therefore win over ours where they have the same name.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import DependencyError, did_you_mean
from ..evaluation.task_manager import hand_on_metadata
from ..hookspecs import Host

logger = logging.getLogger(__name__)

TASKS = Path(__file__).parents[1] / "tasks"


def register() -> None:
    """Makes every TaskManager that looks at lm-eval's own tasks look at ours too.

    Raises DependencyError where lm-eval is not installed, or its TaskManager takes no folders.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DependencyError(f"lm-eval is not installed: pip install lm-eval ({error}).") from error
    original = TaskManager.__init__
    signature = inspect.signature(original)
    missing = {"include_path", "include_defaults"} - signature.parameters.keys()
    if missing:
        raise DependencyError(
            f"This lm-eval's TaskManager takes no {' and no '.join(sorted(missing))}; give the folder of tasks "
            f'yourself: --include_path "$(unierase tasks-path)".'
        )
    if getattr(original, "with_unierase_tasks", False):
        return

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["include_defaults"]:
            bound.arguments["include_path"] = _with_ours(bound.arguments["include_path"])
        original(*bound.args, **bound.kwargs)

    init.with_unierase_tasks = True  # type: ignore[attr-defined]
    TaskManager.__init__ = init
    _hint_at_ours(TaskManager)
    hand_on_metadata()


def _hint_at_ours(manager: Any) -> None:
    """lm-eval says of a task that it does not find no more than that; what is nearly one of ours is told in its log."""
    original = getattr(manager, "match_tasks", None)
    if original is None:
        return
    ours = {path.stem for path in TASKS.glob("*.yaml")}

    @functools.wraps(original)
    def match_tasks(self: Any, task_list: Any) -> Any:
        found = original(self, task_list)
        for name in (each for each in task_list if isinstance(each, str) and not original(self, [each])):
            hint = did_you_mean(name, ours)
            if hint:
                logger.warning("There is no task %r.%s", name, hint)
        return found

    manager.match_tasks = match_tasks


def _with_ours(given: Any) -> list[str]:
    theirs = [given] if isinstance(given, (str, os.PathLike)) else list(given or ())
    paths = [os.fspath(path) for path in theirs]
    return paths if str(TASKS) in paths else [str(TASKS), *paths]


LM_EVAL = Host("lm_eval", "tasks for lm-eval (EleutherAI/lm-evaluation-harness)", "lm_eval.tasks", register)
