"""Finds what there is: methods, readers, metrics and hosts of this package and of every plugin that is installed.

A plugin that cannot be used is left out as a whole and named in a warning; the rest works. A name that two plugins
claim belongs to neither: looking it up raises an error that names both, since which one is meant cannot be known.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar

from pluggy import PluginManager

from ..errors import PluginError, did_you_mean, shown
from ..facts.records import Reader
from ..methods.contract import Method
from ..version import __version__
from . import hookspecs
from .foreign import guarded, guarded_parts, kept_in, quiet
from .hookspecs import PROJECT, Host, Metric

logger = logging.getLogger(__name__)

#: Names of the plugins to load, or of the packages that they came with, with commas between; empty for none.
RESTRICTION = "UNIERASE_PLUGINS"
#: The plugin that comes with the package, and is always loaded.
BUILT_IN = "built-in"
#: By its name, since it imports hosts and methods, which stand above this module.
BUILT_IN_MODULE = f"{PROJECT}.built_in"

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """One plugin, loaded or not."""

    name: str
    version: str
    #: The hooks that it implements.
    hooks: tuple[str, ...]
    #: The package that it came with, and the module or object in it.
    package: str
    module: str
    #: Why it could not be used; empty where it could.
    error: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} ({self.package or self.module} {self.version})".replace(" )", ")")


class Catalogue(Mapping[str, T]):
    """What is registered of one kind, by name, and by whom. Looking up a contested name raises PluginError."""

    def __init__(self, kind: str, entries: Sequence[tuple[str, T, Plugin]] = ()) -> None:
        """entries: name, thing, and the plugin that it is from."""
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

    def find(self, name: str) -> T:
        """The thing of that name. Raises PluginError with the names that there are, or with those who contest it."""
        if name not in self:
            raise PluginError(
                f"There is no {self.kind} {shown(name)}.{did_you_mean(name, self)} Available: "
                f"{', '.join(sorted(self))}."
            )
        return self[name]

    def owner(self, name: str) -> Plugin:
        """The plugin that registered the name."""
        return self._owners[name][0]

    def contested(self) -> tuple[str, ...]:
        return tuple(name for name, owners in self._owners.items() if len(owners) > 1)

    def clash(self, name: str) -> str:
        """Says who claims a contested name, and what to do about it."""
        owners = " and by ".join(map(str, self._owners[name]))
        return (
            f"The {self.kind} {name!r} is registered by {owners}. Uninstall one of them, "
            f"or name in {RESTRICTION} only those that are to be loaded."
        )


@dataclass(frozen=True)
class Registry:
    """Everything that is registered."""

    plugins: tuple[Plugin, ...]
    methods: Catalogue[Method[Any]]
    readers: Catalogue[Reader]
    metrics: Catalogue[Metric]
    hosts: Catalogue[Host]


def registry() -> Registry:
    """Everything that is registered in this process; read once for each value of UNIERASE_PLUGINS."""
    return _registry(os.environ.get(RESTRICTION))


@functools.cache
def _registry(only: str | None) -> Registry:
    return load_registry(only)


def load_registry(only: str | None = None) -> Registry:
    """Loads the built-in plugin, and those that are installed: all, or the ones that `only` names (RESTRICTION)."""
    module = importlib.import_module(BUILT_IN_MODULE)
    built_in = Plugin(BUILT_IN, __version__, (), "unierase-plugin", module.__name__)
    loaded = [_register(module, built_in), *map(_load, _wanted(entry_points(group=PROJECT), only))]
    catalogues = [
        Catalogue[Any](kind, [(name, thing, plugin) for plugin, entries in loaded for name, thing in entries[hook]])
        for hook, kind in _KINDS.items()
    ]
    for catalogue in catalogues:
        for name in catalogue.contested():
            logger.warning("%s", catalogue.clash(name))
    return Registry(tuple(plugin for plugin, _ in loaded), *catalogues)


#: What is registered through each hook, in the order of Registry's fields.
_KINDS = MappingProxyType(
    {
        "register_methods": "method",
        "register_request_readers": "request reader",
        "register_metrics": "metric",
        "register_hosts": "host",
    }
)

#: By hook: names and things.
_Entries = Mapping[str, list[tuple[str, Any]]]


def _load(point: EntryPoint) -> tuple[Plugin, _Entries]:
    """Loads an entry point; whatever goes wrong in it is reported and is nobody else's trouble."""
    package, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
    described = Plugin(point.name, version, (), package, point.value)
    try:
        with kept_in("Its code"), quiet():
            found, entries = _register(point.load(), described)
        return found, {hook: _guarded(hook, named, found) for hook, named in entries.items()}
    except Exception as error:  # another package's code may raise anything
        reason = f"{type(error).__name__}: {error}"
    logger.warning(
        "The plugin %s cannot be used and is left out (%s). Repair or uninstall it, or name in %s only the others.",
        described,
        reason,
        RESTRICTION,
    )
    return replace(described, error=reason), {hook: [] for hook in _KINDS}


def _guarded(hook: str, entries: list[tuple[str, Any]], owner: Plugin) -> list[tuple[str, Any]]:
    """What a plugin registered, so that none of its functions ends the program."""
    what = f"The {_KINDS[hook]} {{name!r}} of the plugin {owner}"
    parts = {"register_methods": ("run", "check", "settle"), "register_hosts": ("register",)}.get(hook)
    return [
        (name, guarded_parts(thing, parts, what.format(name=name)) if parts else guarded(thing, what.format(name=name)))
        for name, thing in entries
    ]


def _register(plugin: Any, described: Plugin) -> tuple[Plugin, _Entries]:
    """What a plugin registers: all of it or, where anything in it fails, an exception."""
    # A manager of its own, so that a plugin which fails half-way leaves nothing behind.
    manager = PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, described.name)
    manager.check_pending()
    entries: _Entries = {hook: [] for hook in _KINDS}
    hooks = tuple(caller.name for caller in manager.get_hookcallers(plugin) or ())
    if not hooks:
        raise PluginError(f"{described.module} has none of the hooks {', '.join(_KINDS)}; each needs @hookimpl")
    for hook in hooks:
        getattr(manager.hook, hook)(register=_collector(hook, entries[hook]))
    return replace(described, hooks=hooks), entries


def _collector(hook: str, entries: list[tuple[str, Any]]) -> Callable[..., None]:
    """The `register` function that a plugin's hook is called with: takes a thing with a name, or a name and a thing."""
    kind: type[Any] = Host if hook == "register_hosts" else Method

    def collect(name: str, thing: Any) -> None:
        if any(name == other for other, _ in entries):
            raise PluginError(f"{hook}: {name!r} is registered twice")
        entries.append((name, thing))

    def register_named(thing: Any) -> None:
        if not isinstance(thing, kind):
            raise PluginError(f"{hook}: register takes a {kind.__name__}, not {thing!r}")
        collect(thing.name, thing)

    def register_function(name: str, function: Callable[..., Any]) -> None:
        if not isinstance(name, str) or not name or not callable(function):
            raise PluginError(f"{hook}: register takes a name and a function, not {name!r} and {function!r}")
        collect(name, function)

    return register_named if hook in ("register_methods", "register_hosts") else register_function


def _wanted(points: Sequence[EntryPoint], only: str | None) -> list[EntryPoint]:
    """The entry points that `only` names by their own name or their package's, in the order of their names."""
    ordered = sorted(points, key=lambda point: (point.name, point.value))
    if only is None:
        return ordered
    names = {name.strip() for name in only.split(",") if name.strip()}
    known = {each for point in ordered for each in _names(point)}
    for name in sorted(names - known - {BUILT_IN}):
        logger.warning(
            "%s names %r, which is not installed.%s Installed: %s.",
            RESTRICTION,
            name,
            did_you_mean(name, known),
            ", ".join(point.name for point in ordered) or "none",
        )
    return [point for point in ordered if not names.isdisjoint(_names(point))]


def _names(point: EntryPoint) -> set[str]:
    return {point.name, *([point.dist.name] if point.dist else [])}
