"""What holds for the whole package: a quick start, imports that run downward, no stray output, a complete wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "unierase_plugin"
ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "lm_eval", "datasets")
#: Files that Python reads at its start, and the module that they name.
AT_START = {"_unierase_autoload.py", "unierase_autoload.pth", "unierase_autoload.start"}

#: The layers from the bottom up, each a set of modules or folders. A module imports from its own layer and lower ones.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors phase_names",
        "inputs hparam_values ranges writing tying wrapping recurrent chat_templates literal",
        "request hparams evaluation.metrics",
        "readers architecture",
        "locate_then_edit.positions locate_then_edit.trace locate_then_edit.solve",
        "locate_then_edit.prefix",
        "locate_then_edit",
        "unlearning_token",
        "",  # modules that no layer names: they join the stages, and the pipeline joins them
        "hosts cli built_in",
        "__main__",
    )
)
UNNAMED = LAYERS.index(frozenset())


def find_modules() -> dict[str, Path]:
    """Every module by its name within the package; the package itself is "", a folder its `__init__`."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def imported(name: str) -> Iterator[str]:
    """Full names of what a module imports anywhere, inside functions too; `from a import b` gives both a and a.b."""
    here = f"{PACKAGE}.{name}".rstrip(".").split(".")
    if MODULES[name].name != "__init__.py":
        here.pop()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports; the package itself, which imports lazily, is left out."""
    inside = {each.removeprefix(f"{PACKAGE}.") for each in imported(name)}
    return (inside & MODULES.keys()) - {name, ""}


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def layer_of(name: str) -> int:
    """The layer that names the module or, failing that, the nearest folder it lies in."""
    while name:
        for index, layer in enumerate(LAYERS):
            if name in layer:
                return index
        name = name.rpartition(".")[0]
    return UNNAMED


def imports_outside(name: str) -> set[str]:
    return {each.split(".")[0] for each in imported(name)} - {"__future__", PACKAGE} - set(sys.stdlib_module_names)


# --- start-up -------------------------------------------------------------------------------------------------------


def heavy_after(code: str) -> str:
    """Which heavy packages a fresh interpreter has loaded after running `code`."""
    code += f"\nimport sys\nprint('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_after(f"import {PACKAGE}") == "loaded:"


@pytest.mark.skipif("cli" not in MODULES, reason="there is no command line")
def test_help_loads_nothing_heavy() -> None:
    code = f"""
import runpy, sys
sys.argv = ["unierase", "--help"]
try:
    runpy.run_module("{PACKAGE}", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    assert heavy_after(code) == "loaded:"


# --- imports --------------------------------------------------------------------------------------------------------


def test_the_layers_name_modules_that_exist_once() -> None:
    named = [module for layer in LAYERS for module in layer]
    assert len(named) == len(set(named))
    assert set(named) - MODULES.keys() <= {"hosts", "cli", "__main__"}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_run_downward(name: str) -> None:
    above = {other for other in own_imports(name) if layer_of(other) > layer_of(name)}
    assert not above, f"{name} imports from above: {sorted(above)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    waiting = {name: own_imports(name) for name in MODULES if name}
    while free := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"in or above a circle: { {name: sorted(needed) for name, needed in waiting.items()} }"


def test_solve_knows_linear_algebra_and_errors_alone() -> None:
    assert own_imports("locate_then_edit.solve") == {"errors"}
    assert imports_outside("locate_then_edit.solve") == {"torch", "scipy"}


def test_keys_values_and_statistics_do_not_know_one_another() -> None:
    three = {f"locate_then_edit.{name}" for name in ("keys", "values", "statistics")}
    assert three <= MODULES.keys()
    assert {name: own_imports(name) & three for name in three} == {name: set() for name in three}


@pytest.mark.parametrize("judged", ["pipeline", "locate_then_edit.edit", "methods"])
def test_evaluation_does_not_know_what_it_judges(judged: str) -> None:
    judges = [name for name in MODULES if within(name, "evaluation")]
    assert [name for name in judges if any(within(other, judged) for other in own_imports(name))] == []


@pytest.mark.parametrize("top", ["hosts", "cli"])
def test_nothing_below_imports(top: str) -> None:
    # What is built in is loaded by its name, as a plugin is.
    allowed = [top, "cli", "built_in", "__main__"]
    # The package itself is the table of contents, and imports from anywhere when asked for a name.
    others = [name for name in MODULES if name and not any(within(name, each) for each in allowed)]
    assert [name for name in others if any(within(other, top) for other in own_imports(name))] == []


# --- the sources ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_with_public_definitions_have_docstrings(name: str) -> None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node.name for node in TREES[name].body if isinstance(node, definitions) and node.name[0] != "_"]
    assert not public or ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, "cli")])
def test_only_the_command_line_prints(name: str) -> None:
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert lines == []


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """The names of the files in a wheel built from this checkout."""
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    path = next(builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]))
    with zipfile.ZipFile(path) as archive:
        return frozenset(archive.namelist())


def test_the_wheel_holds_every_hyper_parameter_file(wheel: frozenset[str]) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hparams").rglob("*.yaml")}
    assert files
    assert {f"{PACKAGE}/{file}" for file in files} <= wheel


def test_the_wheel_holds_every_module_and_data_file(wheel: frozenset[str]) -> None:
    files = [path for path in (ROOT / PACKAGE).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    # What Python reads at its start lies at the top of the wheel instead.
    files = [path for path in files if path.parent.name != "autoload"]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= wheel


def test_the_wheel_holds_nothing_but_the_package_and_what_python_reads_at_its_start(wheel: frozenset[str]) -> None:
    tops = {file.split("/")[0] for file in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PACKAGE, *AT_START}
    assert {path.name for path in (ROOT / "unierase_plugin" / "autoload").iterdir() if path.is_file()} == AT_START
