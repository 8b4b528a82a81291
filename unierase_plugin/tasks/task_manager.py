"""What lm-eval has no entry point for, in the versions that differ: tasks, their `--metadata`, and a model type.

lm-eval (0.4.9 to 0.4.13) finds tasks in its own folder and in `include_path` only. So one patch of its TaskManager adds
our folders, plugins' among them: `find_our_tasks` for good (the host), `our_tasks_found` for one run (`unierase eval`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DependencyError

#: Our model type, which shows special tokens and tells single tokens apart (lm_eval_model.py).
MODEL_TYPE = "unierase_hf"


def tasks_folder() -> Path:
    """The folder of this package's lm-eval tasks, for lm-eval's `--include_path`."""
    return Path(__file__).parent


def task_folders() -> list[str]:
    """Every folder of tasks: this package's, and those of plugins' benchmarks."""
    from ..plugins.registration import registry

    given = [os.fspath(each.tasks) for each in registry().benchmarks.values() if each.tasks is not None]
    return list(dict.fromkeys([str(tasks_folder()), *given]))


def find_our_tasks() -> bool:
    """Makes every TaskManager that reads lm-eval's own tasks read ours too; False where they do already.

    Raises DependencyError where this lm-eval's TaskManager takes no folders.
    """
    from lm_eval.tasks import TaskManager

    if hasattr(TaskManager.__init__, "with_unierase_tasks"):
        return False
    TaskManager.__init__ = _with_our_tasks(TaskManager.__init__)
    return True


@contextmanager
def our_tasks_found(only: bool, look: Callable[[Any], None]) -> Iterator[None]:
    """Inside, every TaskManager that reads lm-eval's own tasks reads ours too.

    only: leave lm-eval's own tasks out. There are thousands, and reading them takes many seconds.
    look: is called with each new TaskManager.
    """
    from lm_eval.tasks import TaskManager

    with replaced(TaskManager, "__init__", _with_our_tasks(TaskManager.__init__, only, look)):
        yield


def _with_our_tasks(original: Any, only: bool = False, look: Callable[[Any], None] | None = None) -> Any:
    """TaskManager.__init__ with our folders before the user's `include_path`, whose tasks win over ours."""
    signature = inspect.signature(original)
    missing = sorted({"include_path", "include_defaults"} - signature.parameters.keys())
    if missing:
        raise DependencyError(
            f"This lm-eval's TaskManager takes no {' and no '.join(missing)}; give the folder of tasks yourself: "
            '--include_path "$(unierase tasks-path)".'
        )

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["include_defaults"]:
            bound.arguments["include_path"] = _with_our_folders(bound.arguments["include_path"])
            bound.arguments["include_defaults"] = not only
        original(*bound.args, **bound.kwargs)
        if look is not None:
            look(args[0])

    init.with_unierase_tasks = True  # type: ignore[attr-defined]
    return init


def _with_our_folders(given: Any) -> list[str]:
    theirs = [given] if isinstance(given, (str, os.PathLike)) else list(given or ())
    paths = [os.fspath(path) for path in theirs]
    return [*(folder for folder in task_folders() if folder not in paths), *paths]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of a class or a module has another value."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def hand_on_metadata() -> None:
    """Makes lm-eval before 0.4.12 give metadata to tasks that have their own class, as later versions do."""
    from lm_eval.tasks import TaskManager

    original = getattr(TaskManager, "_get_config", None)
    if original is None or hasattr(TaskManager, "load") or hasattr(original, "with_metadata"):
        return

    @functools.wraps(original)
    def get_config(self: Any, name: str) -> dict[str, Any]:
        config: dict[str, Any] = original(self, name)
        if "class" in config:
            config["metadata"] = {**config.get("metadata", {}), **(self.metadata or {})}
        return config

    get_config.with_metadata = True  # type: ignore[attr-defined]
    TaskManager._get_config = get_config


def register_model_type() -> None:
    """Registers the model type `unierase_hf`. From lm-eval 0.4.10 on, its code is imported when it is first used."""
    if is_model_type(MODEL_TYPE):
        return
    from lm_eval.api.registry import MODEL_REGISTRY

    if hasattr(MODEL_REGISTRY, "register"):
        MODEL_REGISTRY.register(MODEL_TYPE, target=f"{__package__}.lm_eval_model:HFWithSpecialTokens")
    else:  # lm-eval before 0.4.10 imports the code of all model types at once
        importlib.import_module(f"{__package__}.lm_eval_model")


def is_model_type(name: str) -> bool:
    """Whether lm-eval has a model type of that name."""
    import lm_eval.models  # noqa: F401  (fills the registry: lm-eval takes a registry with one entry for a full one)
    from lm_eval.api.registry import MODEL_REGISTRY

    return name in MODEL_REGISTRY


def load_tasks(manager: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """The tasks of a TaskManager by name, with the tasks inside groups."""
    if hasattr(manager, "load"):
        found: Mapping[str, Any] = manager.load(list(names))["tasks"]
        return found
    return dict(_flat(manager.load_task_or_group(list(names))))


def _flat(loaded: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    return [
        each
        for name, thing in loaded.items()
        for each in (_flat(thing) if isinstance(thing, Mapping) else [(name, thing)])
    ]
