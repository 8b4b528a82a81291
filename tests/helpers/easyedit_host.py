"""Makes an EasyEdit checkout importable in a test or a benchmark, with empty modules for what it needs only at import.

EasyEdit has no packaging of its own, and `import easyeditor` pulls in some twenty packages for pictures, agents and
steering, of which editing text needs none. The folder of the checkout is taken from `UNIERASE_EASYEDIT_DIR`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER_VARIABLE = "UNIERASE_EASYEDIT_DIR"

#: Packages that are served as empty modules where they are not installed.
UNNEEDED = frozenset(
    {
        "PIL",
        "av",
        "cv2",
        "fairscale",
        "higher",
        "hydra",
        "iopath",
        "matplotlib",
        "omegaconf",
        "openai",
        "qwen_vl_utils",
        "rouge",
        "sentence_transformers",
        "timm",
        "torchvision",
        "zhipuai",
    }
)


class EasyEditUnavailable(Exception):  # noqa: N818 (it says why a test is skipped)
    """There is no checkout to import; the message says what to set."""


def checkout() -> Path:
    """The checkout's folder. Raises EasyEditUnavailable where the variable is unset or leads elsewhere."""
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        raise EasyEditUnavailable(f"{FOLDER_VARIABLE} is not set: give the folder of an EasyEdit checkout")
    folder = Path(named).expanduser().resolve()
    if not (folder / "easyeditor" / "__init__.py").is_file():
        raise EasyEditUnavailable(f"{FOLDER_VARIABLE} = {named!r} holds no easyeditor package")
    return folder


def import_easyedit() -> ModuleType:
    """`easyeditor` from the checkout. The path entry and the finder stay, since it imports more as it runs."""
    folder = str(checkout())
    # transformers asks which picture packages there are when it is first imported, and must not find the empty ones.
    importlib.import_module("transformers")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not any(isinstance(finder, _Absentees) for finder in sys.meta_path):
        sys.meta_path.append(_Absentees())
    return importlib.import_module("easyeditor")


def easyedit_or_skip() -> ModuleType:
    """For tests: the package, or a skip that says why there is none."""
    import pytest

    try:
        return import_easyedit()
    except EasyEditUnavailable as reason:
        pytest.skip(str(reason))


class _Anything(type):
    """A class whose attributes are itself, so that `Enum.MEMBER` defaults and nested names resolve at import."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __getitem__(cls, item: Any) -> Any:
        return cls


class _Absent(metaclass=_Anything):
    """Stands for any class or function of an absent package; as a decorator it hands back what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


class _EmptyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent


class _Absentees(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last on the path of finders, so that an installed package is always the real one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in UNNEEDED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
