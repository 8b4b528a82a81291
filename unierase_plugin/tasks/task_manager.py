"""lm-eval in the versions that are told apart: finding tasks, handing them `--metadata`, model types."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

#: Our model type, which shows special tokens and tells single tokens apart (evaluation/lm_eval_model.py).
MODEL_TYPE = "unierase_hf"


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


def register_model_type() -> None:
    """Makes `--model unierase_hf` known; its code is imported when it is asked for, where lm-eval can wait for it."""
    if is_model_type(MODEL_TYPE):
        return
    from lm_eval.api.registry import MODEL_REGISTRY

    if hasattr(MODEL_REGISTRY, "register"):
        MODEL_REGISTRY.register(MODEL_TYPE, target=f"{__package__}.lm_eval_model:HFWithSpecialTokens")
    else:  # before 0.4.10, which imports the code of all its model types at once
        importlib.import_module(f"{__package__}.lm_eval_model")


def is_model_type(name: str) -> bool:
    """Whether lm-eval has a model type of that name."""
    import lm_eval.models  # noqa: F401  (fills the registry, which counts as filled once anything is in it)
    from lm_eval.api.registry import MODEL_REGISTRY

    return name in MODEL_REGISTRY


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
