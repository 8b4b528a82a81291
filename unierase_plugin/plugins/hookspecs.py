"""The hooks that a plugin may implement. Each is called once, with a function `register` that takes what it adds.

A plugin is a module, or any object, that an entry point of the group `unierase_plugin` names. Its hooks carry the
marker `unierase_plugin.hookimpl`. This package registers what it brings through the same hooks (`built_in`).
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

#: The name of the hooks' marker, of pluggy's manager, and of the group of entry points.
PROJECT = "unierase_plugin"
hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)

#: A pure function of texts or numbers. An AnswerMetric is one.
Metric = Callable[..., Any]


@dataclass(frozen=True)
class AnswerMetric:
    """A metric of one answer. Tasks, comparisons and audits that name it give its mean over each set of facts.

    Raises PluginError for a name that cannot be the heading of a column.
    """

    #: Letters, digits and underscores.
    name: str
    #: What the mean says, in a few words.
    title: str
    #: Called with the true answer, the model's answer without the unlearning token, and the question.
    measure: Callable[[str, str, str], float] = field(repr=False)
    #: Which way is better, on facts to forget and on facts to keep: 1 for more, -1 for less, 0 for neither.
    forget: int = -1
    keep: int = 1

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PluginError(
                f"A metric cannot be called {self.name!r}: use letters, digits and underscores, and no digit first."
            )

    def __call__(self, answer: str, said: str, question: str = "") -> float:
        """The value for one answer."""
        return self.measure(answer, said, question)


@dataclass(frozen=True)
class Host:
    """A harness that can be told of UniErase, so that its users find it there."""

    name: str
    title: str
    #: The module of the harness that `register` imports. The harness is installed where its first part is.
    module: str
    #: Imports the harness and tells it of UniErase. A second call does nothing.
    register: Callable[[], None] = field(repr=False)


@hookspec
def register_methods(register: Callable[[Method[Any]], None]) -> None:
    """Adds unlearning methods: `register(Method(name=..., run=..., ...))`, for `unierase run --method NAME`."""


@hookspec
def register_request_readers(register: Callable[[str, Reader], None]) -> None:
    """Adds sources of facts: `register("quiz", read_quiz)`, for the SPEC `quiz:...`.

    The function takes what follows the colon, without the slice. It returns ForgetRequests, or raises RequestError.
    """


@hookspec
def register_metrics(register: Callable[..., None]) -> None:
    """Adds metrics: `register(AnswerMetric(name=..., title=..., measure=...))`, for `--metrics NAME`.

    `register("entropy", entropy)` adds any other pure function of texts or numbers. Only programs that look it up in
    `unierase_plugin.plugins.registry().metrics` use it.
    """


@hookspec
def register_hosts(register: Callable[[Host], None]) -> None:
    """Adds harnesses that can be told of UniErase: `register(Host(name=..., module=..., register=...))`."""


@hookspec
def register_attacks(register: Callable[[Attack], None]) -> None:
    """Adds attacks to the audit: `register(Attack(name=..., group=..., asks=..., cost=..., run=...))`.

    `unierase audit` runs an attack on every model, compares what it finds, and names it in the verdict. The audit ends
    with an error if the attack changes the weights and does not put them back.
    """


@hookspec
def register_solvers(register: Callable[[str, MakeSolver], None]) -> None:
    """Adds closed forms of the edit: `register("damped", make_damped)`, for the setting `solver: damped`.

    The function takes a `System` (`unierase_plugin.locate_then_edit.solvers`), which holds the second moments and the
    settings of one block. It returns a `Solver` (`unierase_plugin.locate_then_edit.solve`).
    """


@hookspec
def register_commands(register: Callable[[str, Callable[..., Any] | Typer], None]) -> None:
    """Adds commands to `unierase`: `register("rank", rank)`, for `unierase rank`.

    typer makes a command of the function: its parameters are options and arguments, its docstring is the help. A
    `typer.Typer` with several commands is a group. A UniEraseError that a command raises is printed as one line. No
    command can have the name of a command that comes with this package.
    """


@hookspec
def register_benchmarks(register: Callable[[Benchmark], None]) -> None:
    """Adds benchmarks: `register(Benchmark(name=..., title=..., paper=..., read=..., tasks=...))`.

    `read` is a reader too, for the SPEC `name:...`. `unierase eval`, `unierase compare` and lm-eval as a host find the
    tasks in the folder `tasks`, and treat them as the tasks of this package.
    """
