"""Harnesses that this package makes itself known to: one module each, which imports its host inside functions.

`autoload/` calls a module's `register` when its host is imported; `register(name)` is the way to do it by hand.
"""

from __future__ import annotations

import importlib.util
import sys

from ..plugins.hookspecs import Host
from ..plugins.registration import registry


def register(name: str) -> None:
    """Makes this package known to the host of that name, built in or a plugin's. Harmless when called again.

    Raises PluginError for an unknown name, DependencyError where the host is not installed or too old.
    """
    registry().hosts.find(name).register()


def is_installed(host: Host) -> bool:
    """Whether the host can be imported, told without importing it."""
    return importlib.util.find_spec(host.module.partition(".")[0]) is not None


def is_awaited(host: Host) -> bool:
    """Whether this process registers itself with the host as soon as that is imported."""
    return any(host.module in getattr(finder, "unierase_hosts", ()) for finder in sys.meta_path)
