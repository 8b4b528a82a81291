"""lm-eval's TaskManager, in the versions that are told apart: it finds tasks and hands them `--metadata`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any


def hand_on_metadata() -> None:
    """Makes lm-eval before 0.4.12 give metadata to tasks with a class of their own too, as later versions do."""
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


def load_tasks(manager: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """The tasks of a TaskManager by name, those of groups included."""
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
