"""Harnesses that are told of UniErase. Each has a module of its own, which imports the harness inside functions only.

`autoload/` calls a module's `register` when its harness is imported. `register(name)` does it by hand.
"""

from __future__ import annotations

import importlib.util
import sys

from ..plugins.hookspecs import Host
from ..plugins.registration import registry


def register(name: str) -> None:
    """Tells the harness of that name of UniErase. A second call does nothing.

    Raises PluginError for an unknown name, and DependencyError where the harness is not installed or too old.
    """
    registry().hosts.find(name).register()


def is_installed(host: Host) -> bool:
    """Whether the harness can be imported. It is not imported for that."""
    return importlib.util.find_spec(host.module.partition(".")[0]) is not None


def is_awaited(host: Host) -> bool:
    """Whether this process tells the harness of UniErase as soon as the harness is imported."""
    return any(host.module in getattr(finder, "unierase_hosts", ()) for finder in sys.meta_path)
