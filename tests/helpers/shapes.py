"""Checks of tensors' shapes and dtypes in calls, and of nothing else: tests pass stand-ins for models and jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def shapes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker for jaxtyping's hook: beartype, with the annotations that name a tensor's axes."""
    kept = {name: hint for name, hint in function.__annotations__.items() if "[Tensor, " in str(hint)}
    function.__annotations__ = kept
    checked: Callable[..., Any] = beartype(function)
    return checked
