"""What holds for the whole package: a quick start, and a complete wheel. Linters hold the rest (pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = "unierase_plugin"
ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "lm_eval", "datasets")
#: Files that Python reads at its start, and the module that they name.
AT_START = {"_unierase_autoload.py", "unierase_autoload.pth", "unierase_autoload.start"}


# --- start-up -------------------------------------------------------------------------------------------------------


def heavy_after(code: str) -> str:
    """Which heavy packages a fresh interpreter has loaded after running `code`."""
    code += f"\nimport sys\nprint('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_after(f"import {PACKAGE}") == "loaded:"


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


def test_the_wheel_tells_type_checkers_to_read_the_annotations(wheel: frozenset[str]) -> None:
    assert f"{PACKAGE}/py.typed" in wheel


def test_the_wheel_holds_nothing_but_the_package_and_what_python_reads_at_its_start(wheel: frozenset[str]) -> None:
    tops = {file.split("/")[0] for file in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PACKAGE, *AT_START}
    assert {path.name for path in (ROOT / "unierase_plugin" / "autoload").iterdir() if path.is_file()} == AT_START
