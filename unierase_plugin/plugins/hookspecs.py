"""The hooks that a plugin may implement, each called once with a function that takes what is to be registered.

A plugin is a module, or any object, that an entry point of the group `unierase_plugin` names. Its hooks carry
`unierase_plugin.hookimpl`; what comes with the package is registered through the same ones (`built_in`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

from ..errors import PluginError

if TYPE_CHECKING:
    from typer import Typer

    from ..attack import Attack
    from ..facts.records import Benchmark, Reader
    from ..locate_then_edit.solvers import MakeSolver
    from ..methods.contract import Method

#: Marker, manager and entry-point group have one name.
PROJECT = "unierase_plugin"
hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)

#: A pure function of texts or numbers. An AnswerMetric is one.
Metric = Callable[..., Any]


@dataclass(frozen=True)
class AnswerMetric:
    """A metric of one answer. Tasks, comparisons and audits measure it where it is named; a set's figure is the mean.

    Raises PluginError for a name that no table can have as a heading.
    """

    #: Letters, digits and underscores.
    name: str
    #: What a value says, in a few words.
    title: str
    #: Called with the true answer, what the model said without the unlearning token, and the question.
    measure: Callable[[str, str, str], float] = field(repr=False)
    #: On facts to forget, and on facts to keep: 1 where more is better, -1 where less is, 0 where neither is.
    forget: int = -1
    keep: int = 1

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PluginError(f"A metric cannot be called {self.name!r}: use letters, digits and underscores.")

    def __call__(self, answer: str, said: str, question: str = "") -> float:
        """The value for one answer."""
        return self.measure(answer, said, question)


@dataclass(frozen=True)
class Host:
    """A harness that this package, or a plugin, can make itself known to."""

    name: str
    title: str
    #: The host's module that `register` needs; whether it is installed is looked up by its first part.
    module: str
    #: Makes us known to the host, which it imports. Harmless when called again.
    register: Callable[[], None] = field(repr=False)


@hookspec
def register_methods(register: Callable[[Method[Any]], None]) -> None:
    """Unlearning methods: `register(Method(name=..., run=..., ...))`, for `unierase run --method NAME`."""


@hookspec
def register_request_readers(register: Callable[[str, Reader], None]) -> None:
    """Where facts are read from: `register("quiz", read_quiz)`, for the SPEC `quiz:...`.

    The function takes what follows the colon, slice removed, and returns ForgetRequests or raises RequestError.
    """


@hookspec
def register_metrics(register: Callable[..., None]) -> None:
    """Metrics: `register(AnswerMetric(name=..., title=..., measure=...))`, for `--metrics NAME`.

    `register("entropy", entropy)` registers any other pure function of texts or numbers, for programs that ask
    `unierase_plugin.plugins.registry().metrics` for it.
    """


@hookspec
def register_hosts(register: Callable[[Host], None]) -> None:
    """Harnesses to be known to: `register(Host(name=..., module=..., register=...))`."""


@hookspec
def register_attacks(register: Callable[[Attack], None]) -> None:
    """Attacks of the audit: `register(Attack(name=..., group=..., asks=..., cost=..., run=...))`.

    `unierase audit` runs them on every model, compares what they find, and names them in the verdict. An attack that
    leaves other weights than it found ends the audit.
    """


@hookspec
def register_solvers(register: Callable[[str, MakeSolver], None]) -> None:
    """Closed forms of the edit: `register("damped", make_damped)`, for the setting `solver: damped`.

    The function takes a `System` (`unierase_plugin.locate_then_edit.solvers`), which holds the second moments and the
    settings of one block. It returns a `Solver` (`unierase_plugin.locate_then_edit.solve`).
    """


@hookspec
def register_commands(register: Callable[[str, Callable[..., Any] | Typer], None]) -> None:
    """Commands of `unierase`: `register("rank", rank)`, for `unierase rank`.

    A function is made a command as typer makes one: parameters are options and arguments, the docstring is the help. A
    `typer.Typer` with several commands is a group. A UniEraseError that a command raises is printed as one line. The
    names of the commands that come with the package are taken.
    """


@hookspec
def register_benchmarks(register: Callable[[Benchmark], None]) -> None:
    """Benchmarks: `register(Benchmark(name=..., title=..., paper=..., read=..., tasks=...))`.

    `read` is registered as a reader too, for the SPEC `name:...`. `unierase eval`, lm-eval as a host and `unierase
    compare` find the tasks of the folder `tasks`, and treat them as this package's own.
    """
