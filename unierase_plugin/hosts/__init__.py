"""Harnesses that this package makes itself known to: one module each, which imports its host inside functions.

`autoload/` calls a module's `register` when its host is imported; `register(name)` is the way to do it by hand.
"""

from __future__ import annotations

from ..plugins import registry


def register(name: str) -> None:
    """Makes this package known to the host of that name, built in or a plugin's. Harmless when called again.

    Raises PluginError for an unknown name, DependencyError where the host is not installed or too old.
    """
    registry().hosts.find(name).register()
