"""What is registered of one kind, by name, and which plugin registered it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import PluginError, did_you_mean, shown

#: An environment variable with the names of the plugins to load, or of their packages, with commas between. Empty
#: loads none.
RESTRICTION = "UNIERASE_PLUGINS"
#: The plugin that comes with the package. It is always loaded.
BUILT_IN = "built-in"

T = TypeVar("T")


def restricted() -> str:
    """Says that plugins were left out, as the end of a message about a name that is not there."""
    only = os.environ.get(RESTRICTION)
    return "" if only is None else f" {RESTRICTION}={only} leaves out the other plugins."


@dataclass(frozen=True)
class Plugin:
    """One plugin, loaded or not."""

    name: str
    version: str
    #: The hooks that it implements.
    hooks: tuple[str, ...]
    #: The package that brings it, and the module or object in that package.
    package: str
    module: str
    #: Why it cannot be used; empty where it can.
    error: str = ""

    @property
    def identity(self) -> list[str]:
        """What a result of the plugin depends on: its package and version, and its module's file as it is now.

        An author changes the file many times before the version. Other modules of the plugin do not count.
        """
        path = getattr(sys.modules.get(self.module.partition(":")[0]), "__file__", None)
        code = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if path and Path(path).is_file() else ""
        return [self.package, self.version, code]

    def __str__(self) -> str:
        return f"{self.name!r} ({self.package or self.module} {self.version})".replace(" )", ")")


class Catalogue(Mapping[str, T]):
    """What is registered of one kind, by name. Looking up a name that two plugins claim raises PluginError."""

    def __init__(self, kind: str, entries: Sequence[tuple[str, T, Plugin]] = ()) -> None:
        """entries: name, thing, and the plugin that registered it."""
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._owners: dict[str, list[Plugin]] = {}
        for name, thing, owner in entries:
            self._entries.setdefault(name, thing)
            self._owners.setdefault(name, []).append(owner)

    def __getitem__(self, name: str) -> T:
        if len(self._owners.get(name, ())) > 1:
            raise PluginError(self.clash(name))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, owners in self._owners.items() if len(owners) == 1)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def find(self, name: str, among: Iterable[str] = ()) -> T:
        """The thing of that name. Raises PluginError for an unknown name, and for one that two plugins claim.

        among   the names that the message offers; empty for all
        """
        if name not in self:
            fit = sorted(among or self)
            raise PluginError(
                f"There is no {self.kind} {shown(name)}.{did_you_mean(name, fit)} Available: "
                f"{', '.join(fit)}.{restricted()}"
            )
        return self[name]

    def owner(self, name: str) -> Plugin:
        """The plugin that registered the name."""
        return self._owners[name][0]

    def of(self, plugin: Plugin) -> tuple[str, ...]:
        """The names that a plugin registered. Names that another plugin claims too are among them."""
        return tuple(name for name, owners in self._owners.items() if plugin in owners)

    def contested(self) -> tuple[str, ...]:
        """The names that more than one plugin claims."""
        return tuple(name for name, owners in self._owners.items() if len(owners) > 1)

    def clash(self, name: str) -> str:
        """Says which plugins claim a name, and what to do."""
        owners = " and by ".join(map(str, self._owners[name]))
        return (
            f"The {self.kind} {name!r} is registered by {owners}. Uninstall one of them, "
            f"or name in {RESTRICTION} only those that are to be loaded."
        )
