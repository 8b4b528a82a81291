"""Finds the plugins, and everything that they and this package register.

A plugin that cannot be used is left out as a whole. A warning names it, and the rest works. A name that two plugins
claim belongs to neither: nobody can know which one is meant. Looking it up raises an error that names both.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from pluggy import PluginManager

from ..attack import Attack
from ..errors import HyperParamsError, PluginError, UniEraseError, did_you_mean, shown
from ..facts.records import Benchmark, Reader
from ..hparams import EngineSettings, HyperParams
from ..locate_then_edit.solvers import MakeSolver
from ..methods.contract import Method
from ..version import __version__
from . import hookspecs
from .catalogue import BUILT_IN, RESTRICTION, Catalogue, Plugin
from .commands import made_command
from .foreign import guarded, guarded_maker, guarded_parts, kept_in, place_of, quiet
from .hookspecs import PROJECT, AnswerMetric, Host, Metric

logger = logging.getLogger(__name__)

#: Imported by its name: it imports methods, hosts and attacks, and some of these are layers above this one.
BUILT_IN_MODULE = f"{PROJECT}.built_in"


@dataclass(frozen=True)
class Registry:
    """Everything that is registered."""

    plugins: tuple[Plugin, ...]
    methods: Catalogue[Method[Any]]
    readers: Catalogue[Reader]
    metrics: Catalogue[Metric]
    hosts: Catalogue[Host]
    attacks: Catalogue[Attack]
    benchmarks: Catalogue[Benchmark]
    #: As typer made them. Which class of click that is depends on typer's version.
    commands: Catalogue[Any]
    solvers: Catalogue[MakeSolver]

    def registered_by(self, plugin: Plugin) -> dict[str, tuple[str, ...]]:
        """The names that a plugin registered, by kind. Names that another plugin claims too are among them."""
        catalogues = (each for each in vars(self).values() if isinstance(each, Catalogue))
        found = {catalogue.kind: catalogue.of(plugin) for catalogue in catalogues}
        return {kind: names for kind, names in found.items() if names}


def registry() -> Registry:
    """Everything that is registered. It is read once in a process for each value of UNIERASE_PLUGINS."""
    return _registry(os.environ.get(RESTRICTION))


def answer_metrics(names: Sequence[str]) -> tuple[AnswerMetric, ...]:
    """The metrics of these names. Tasks, comparisons and audits measure them. Raises PluginError for any other name."""
    known = registry().metrics
    able = {name: metric for name, metric in known.items() if isinstance(metric, AnswerMetric)}
    for name in names:
        if name in known and name not in able:
            raise PluginError(
                f"The metric {name!r} is a plain function and no AnswerMetric, so that nobody knows how to apply it to "
                f"an answer. Choose one of: {', '.join(sorted(able))}."
            )
        if name not in able:
            known.find(name, among=able)
    return tuple(able[name] for name in dict.fromkeys(names))


def foreign_code(method: str, settings: HyperParams | None) -> dict[str, list[str]]:
    """Identities of the plugins that bring a `method` and a `solver`, by these words. Kept results depend on them.

    What comes with this package is left out, and so are names that nobody registered.
    """
    known = registry()
    solver = settings.solver if isinstance(settings, EngineSettings) else ""
    named: dict[str, tuple[Catalogue[Any], str]] = {
        "method": (known.methods, method),
        "solver": (known.solvers, solver),
    }
    owners = {kind: catalogue.owner(name) for kind, (catalogue, name) in named.items() if name in catalogue}
    return {kind: owner.identity for kind, owner in owners.items() if owner.name != BUILT_IN}


def check_solver(settings: HyperParams) -> None:
    """Raises HyperParamsError for settings whose solver is not registered, PluginError where two plugins claim it."""
    if not isinstance(settings, EngineSettings):
        return
    known = registry().solvers
    if settings.solver not in known:
        raise HyperParamsError(
            f"solver = {shown(settings.solver)} must be one of: {', '.join(known)}."
            f"{did_you_mean(settings.solver, known)}"
        )


@functools.cache
def _registry(only: str | None) -> Registry:
    return load_registry(only)


def load_registry(only: str | None = None) -> Registry:
    """Loads the built-in plugin and the installed ones. `only` restricts these as UNIERASE_PLUGINS does."""
    module = importlib.import_module(BUILT_IN_MODULE)
    built_in = Plugin(name=BUILT_IN, version=__version__, hooks=(), package="unierase-plugin", module=module.__name__)
    loaded = [_register(module, built_in), *map(_load, _wanted(entry_points(group=PROJECT), only))]
    catalogues = [
        Catalogue[Any](
            hook.kind, [(name, thing, plugin) for plugin, entries in loaded for name, thing in entries[hook_name]]
        )
        for hook_name, hook in HOOKS.items()
    ]
    for catalogue in catalogues:
        for name in catalogue.contested():
            logger.warning("%s", catalogue.clash(name))
    return Registry(tuple(plugin for plugin, _ in loaded), *catalogues)


@dataclass(frozen=True)
class Hook:
    """What one hook registers."""

    #: What messages call one of them.
    kind: str
    #: The class that `register` takes; None where it takes a name and a function.
    takes: type[Any] | None = None
    #: Functions of such an object. None of them can end the program.
    functions: tuple[str, ...] = ()
    #: Whether `register` takes a name and a function too.
    named: bool = False
    #: Whether it may end the program, as a command does.
    ends: bool = False
    #: Methods of the object that such a function makes. None of them can end the program.
    makes: tuple[str, ...] = ()

    @property
    def wanted(self) -> str:
        """What `register` takes, in words."""
        function = "a name and a function"
        if self.takes is None:
            return function
        name = self.takes.__name__
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}{f', or {function}' if self.named else ''}"


#: The hooks in the order of Registry's fields.
HOOKS: Mapping[str, Hook] = MappingProxyType(
    {
        "register_methods": Hook("method", Method, ("run", "check", "settle")),
        "register_request_readers": Hook("request reader"),
        "register_metrics": Hook("metric", AnswerMetric, ("measure",), named=True),
        "register_hosts": Hook("host", Host, ("register",)),
        "register_attacks": Hook("attack", Attack, ("run", "unfit")),
        "register_benchmarks": Hook("benchmark", Benchmark, ("read",)),
        "register_commands": Hook("command", ends=True),
        "register_solvers": Hook("solver", makes=("protecting", "solve", "condition", "error")),
    }
)

#: By hook: names and things.
_Entries = Mapping[str, list[tuple[str, Any]]]


def _load(point: EntryPoint) -> tuple[Plugin, _Entries]:
    """Loads a plugin by its entry point. A plugin that fails is reported, and changes nothing for the others."""
    package, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
    described = Plugin(name=point.name, version=version, hooks=(), package=package, module=point.value)
    try:
        with kept_in("Its code", told=False), quiet():
            found, entries = _register(point.load(), described)
        return found, {hook: _guarded(hook, named, found) for hook, named in entries.items()}
    except Exception as error:  # another package's code may raise anything
        reason = f"{type(error).__name__}: {error}"
        if not isinstance(error, UniEraseError):
            reason += f", {place_of(error)}"
    logger.warning(
        "The plugin %s cannot be used and is left out (%s). Repair or uninstall it, or name in %s only the others.",
        described,
        reason,
        RESTRICTION,
    )
    return replace(described, error=reason), {hook: [] for hook in HOOKS}


def _guarded(hook: str, entries: list[tuple[str, Any]], owner: Plugin) -> list[tuple[str, Any]]:
    """What a plugin registered, with functions that cannot end the program."""
    parts = HOOKS[hook]

    def held(name: str, thing: Any) -> Any:
        what = f"The {parts.kind} {name!r} of the plugin {owner}"
        if parts.ends:
            return thing
        if parts.takes is not None and isinstance(thing, parts.takes):
            return guarded_parts(thing, parts.functions, what)
        return guarded_maker(thing, parts.makes, what) if parts.makes else guarded(thing, what)

    return [(name, held(name, thing)) for name, thing in entries]


def _register(plugin: Any, described: Plugin) -> tuple[Plugin, _Entries]:
    """Everything that a plugin registers. Raises what its code raises."""
    # Each plugin has a manager of its own, so that one which fails half-way leaves nothing behind.
    manager = PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, described.name)
    unknown = sorted(
        caller.name
        for caller in manager.get_hookcallers(plugin) or ()
        if not caller.has_spec() and not all(each.optionalhook for each in caller.get_hookimpls())
    )
    if unknown:
        raise PluginError(
            f"{described.module} has the unknown hook {unknown[0]}.{did_you_mean(unknown[0], HOOKS)} Known: "
            f"{', '.join(HOOKS)}."
        )
    entries: _Entries = {hook: [] for hook in HOOKS}
    hooks = tuple(caller.name for caller in manager.get_hookcallers(plugin) or ())
    if not hooks:
        raise PluginError(f"{described.module} has none of the hooks {', '.join(HOOKS)}; each needs @hookimpl")
    for hook in hooks:
        getattr(manager.hook, hook)(register=_collector(hook, entries[hook], described))
    read = _collector("register_request_readers", entries["register_request_readers"], described)
    for name, benchmark in entries["register_benchmarks"]:
        read(name, benchmark.read)
    return replace(described, hooks=hooks), entries


def _collector(hook: str, entries: list[tuple[str, Any]], plugin: Plugin) -> Callable[..., None]:
    """The `register` function that a plugin's hook is called with. It adds to the entries."""
    kind = HOOKS[hook].takes

    def collect(name: str, thing: Any) -> None:
        if any(name == other for other, _ in entries):
            raise PluginError(f"{hook}: {name!r} is registered twice")
        entries.append((name, thing))

    def register_named(thing: Any) -> None:
        if not isinstance(thing, kind or ()):
            raise PluginError(f"{hook}: register takes {HOOKS[hook].wanted}, not {thing!r}")
        collect(thing.name, thing)

    def register_function(name: str, function: Callable[..., Any] | None = None) -> None:
        if not isinstance(name, str) or not name or not callable(function):
            raise PluginError(f"{hook}: register takes {HOOKS[hook].wanted}, not {name!r} and {function!r}")
        collect(name, function)

    def register_command(name: str, thing: Any) -> None:
        # A typer.Typer is not callable in every version.
        if not isinstance(name, str) or not name or not (callable(thing) or hasattr(thing, "registered_commands")):
            raise PluginError(f"{hook}: register takes a name and a function or a typer.Typer, not {name!r}, {thing!r}")
        collect(name, made_command(name, thing, plugin))

    def register_either(thing: Any, *function: Callable[..., Any]) -> None:
        if isinstance(thing, kind or ()) and not function:
            register_named(thing)
        else:
            register_function(thing, *function)

    if HOOKS[hook].named:
        return register_either
    if hook == "register_commands":
        return register_command
    return register_function if kind is None else register_named


def _wanted(points: Sequence[EntryPoint], only: str | None) -> list[EntryPoint]:
    """The entry points to load, by name. `only` holds names of entry points or of packages; None loads all."""
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
