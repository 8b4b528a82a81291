"""Self-registration: nothing until a host is imported, then once; off by a switch, and gone when uninstalled."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fresh import ROOT, Environment

from unierase_plugin.errors import DependencyError
from unierase_plugin.hosts import lm_eval as host

TASKS = str(ROOT / "unierase_plugin" / "tasks")


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


# --- the finder, in this process -------------------------------------------------------------------------------------


@pytest.fixture
def autoload(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that Python runs at its start, waiting for stand-ins; what it does to this process is undone."""
    monkeypatch.delenv("UNIERASE_AUTOLOAD", raising=False)
    finders, modules = list(sys.meta_path), set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", [each for each in finders if not hasattr(each, "unierase_hosts")])
    source = ROOT / "unierase_plugin" / "autoload" / "_unierase_autoload.py"
    spec = importlib.util.spec_from_file_location("autoload_here", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HOSTS = {"hostone.tasks": "ours_for_one", "hosttwo": "ours_for_two"}  # type: ignore[attr-defined]
    yield module
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("hostone", "hosttwo", "ours_for_one", "ours_for_two"):
            del sys.modules[name]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hosts that say when they are ready, and modules of ours that note how often they were called, and when."""
    ours = "calls = []\ndef register():\n    import {host} as host\n    calls.append(host.ready)\n"
    write(
        tmp_path,
        {
            "hostone/__init__.py": "",
            "hostone/tasks/__init__.py": "ready = True",
            "hosttwo/__init__.py": "ready = True",
            "ours_for_one.py": ours.format(host="hostone.tasks"),
            "ours_for_two.py": ours.format(host="hosttwo"),
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def calls(name: str) -> list[bool]:
    return list(importlib.import_module(name).calls)


def waiting() -> list[Any]:
    return [finder for finder in sys.meta_path if hasattr(finder, "unierase_hosts")]


def test_each_host_is_told_once_when_it_is_ready_and_then_nothing_is_left(autoload: ModuleType, places: Path) -> None:
    autoload.install()
    autoload.install()
    assert len(waiting()) == 1
    importlib.import_module("hostone")
    assert "ours_for_one" not in sys.modules
    module = importlib.import_module("hostone.tasks")
    importlib.reload(module)
    assert calls("ours_for_one") == [True]
    assert "ours_for_two" not in sys.modules
    importlib.import_module("hosttwo")
    assert calls("ours_for_two") == [True]
    assert waiting() == []


def test_the_host_is_loaded_by_its_own_loader(autoload: ModuleType, places: Path) -> None:
    plain = importlib.util.find_spec("hosttwo")
    autoload.install()
    spec = importlib.import_module("hosttwo").__spec__
    assert plain is not None
    assert spec is not None
    assert spec.origin == plain.origin
    assert type(spec.loader) is type(plain.loader)
    assert vars(spec.loader).keys() == vars(plain.loader).keys()


def test_asking_whether_a_host_is_there_does_not_use_the_wait_up(autoload: ModuleType, places: Path) -> None:
    autoload.install()
    assert importlib.util.find_spec("hosttwo") is not None
    assert "hosttwo" not in sys.modules
    importlib.import_module("hosttwo")
    assert calls("ours_for_two") == [True]


def test_a_host_that_is_not_there_is_missed_as_ever_and_found_later(
    autoload: ModuleType, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoload.install()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [each for each in sys.path if each != str(places)])
        with pytest.raises(ModuleNotFoundError, match="No module named 'hosttwo'"):
            importlib.import_module("hosttwo")
    importlib.import_module("hosttwo")
    assert calls("ours_for_two") == [True]


def test_a_host_that_fails_to_load_is_told_when_it_does(autoload: ModuleType, places: Path) -> None:
    autoload.install()
    source = places / "hosttwo" / "__init__.py"
    source.write_text("raise RuntimeError('half installed')")
    with pytest.raises(RuntimeError, match="half installed"):
        importlib.import_module("hosttwo")
    source.write_text("ready = 'at last, and longer than before'")
    importlib.invalidate_caches()
    importlib.import_module("hosttwo")
    assert calls("ours_for_two") == ["at last, and longer than before"]  # type: ignore[comparison-overlap]


def test_a_host_in_an_archive(autoload: ModuleType, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules of an archive share one loader."""
    with zipfile.ZipFile(places / "hosts.zip", "w") as archive:
        for path in ("hostone/__init__.py", "hostone/tasks/__init__.py", "hosttwo/__init__.py"):
            archive.writestr(path, (places / path).read_text())
    monkeypatch.syspath_prepend(str(places / "hosts.zip"))
    autoload.install()
    importlib.util.find_spec("hosttwo")
    for name in ("hosttwo", "hostone.tasks"):
        assert ".zip" in str(importlib.import_module(name).__file__)
    assert (calls("ours_for_one"), calls("ours_for_two")) == ([True], [True])


def test_a_host_that_another_finder_knows(autoload: ModuleType, places: Path, tmp_path: Path) -> None:
    """As setuptools finds packages that are installed as editable: a finder at the end, files anywhere."""
    (tmp_path / "elsewhere").mkdir()
    source = write(tmp_path / "elsewhere", {"code.py": "ready = 'from elsewhere'"}) / "code.py"
    (places / "hosttwo" / "__init__.py").unlink()
    (places / "hosttwo").rmdir()

    class Editable(MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            return importlib.util.spec_from_file_location(name, source) if name == "hosttwo" else None

    autoload.install()
    sys.meta_path.append(Editable())
    importlib.import_module("hosttwo")
    assert calls("ours_for_two") == ["from elsewhere"]  # type: ignore[comparison-overlap]


def test_a_failure_of_ours_is_a_warning_and_the_host_works(autoload: ModuleType, places: Path) -> None:
    write(places, {"ours_for_two.py": "def register():\n    raise ValueError('no such table')\n"})
    autoload.install()
    with pytest.warns(UserWarning, match=r"known to hosttwo.*ValueError: no such table.*UNIERASE_AUTOLOAD=0"):
        assert importlib.import_module("hosttwo").ready


@pytest.mark.parametrize("failure", ["raise ValueError('no')", "raise SystemExit(3)", "1 / 0"])
@pytest.mark.filterwarnings("error")
def test_a_failure_of_ours_does_not_end_the_host_where_warnings_are_errors(
    failure: str, autoload: ModuleType, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(places, {"ours_for_two.py": f"def register():\n    {failure}\n"})
    autoload.install()
    assert importlib.import_module("hosttwo").ready
    assert "could not make itself known to hosttwo" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "false", "Off"])
def test_switched_off_nothing_waits(
    value: str, autoload: ModuleType, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoload.install()
    monkeypatch.setenv("UNIERASE_AUTOLOAD", value)
    importlib.import_module("hosttwo")  # switched off after the start
    assert "ours_for_two" not in sys.modules
    sys.meta_path.remove(waiting()[0])
    autoload.install()
    assert waiting() == []


def test_every_host_of_ours_that_is_waited_for_has_its_module() -> None:
    source = (ROOT / "unierase_plugin" / "autoload" / "_unierase_autoload.py").read_text()
    names = {name: path for name, path in _table(source).items() if (ROOT / f"{path.replace('.', '/')}.py").exists()}
    assert names[host.LM_EVAL.module] == host.__name__


def _table(source: str) -> dict[str, str]:
    found: dict[str, Any] = {}
    exec(compile(source, "autoload", "exec"), found)
    return dict(found["HOSTS"])


# --- lm-eval ---------------------------------------------------------------------------------------------------------


class Manager:
    """Takes what lm-eval's TaskManager takes."""

    def __init__(
        self, verbosity: Any = None, include_path: Any = None, include_defaults: bool = True, metadata: Any = None
    ) -> None:
        self.given = (verbosity, include_path, include_defaults, metadata)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> type[Manager]:
    """A TaskManager of its own in the place of lm-eval's, which reads thousands of files."""

    class Fresh(Manager):
        __init__ = Manager.__init__

    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=Fresh))  # type: ignore[arg-type]
    return Fresh


def test_our_folder_comes_before_the_users_and_only_beside_lm_evals_own(manager: Any) -> None:
    host.register()
    once = manager.__init__
    host.register()
    assert manager.__init__ is once
    assert manager().given == (None, [TASKS], True, None)
    assert manager("INFO", "a").given == ("INFO", [TASKS, "a"], True, None)
    assert manager(include_path=[Path("a"), "b"], metadata={"c": 1}).given == (None, [TASKS, "a", "b"], True, {"c": 1})
    assert manager(include_path=["a", TASKS]).given == (None, ["a", TASKS], True, None)
    assert manager(include_path="a", include_defaults=False).given == (None, "a", False, None)
    assert manager(None, "a", False).given == (None, "a", False, None)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        manager(no_such=1)


def test_a_task_that_is_nearly_one_of_ours_is_hinted_at(manager: Any, caplog: pytest.LogCaptureFixture) -> None:
    manager.match_tasks = lambda self, names: [name for name in names if name == "theirs"]
    host.register()
    assert manager().match_tasks(["theirs", "tofu_forgot", "something else"]) == ["theirs"]
    assert [record.getMessage() for record in caplog.records] == [
        "There is no task 'tofu_forgot'. Did you mean 'tofu_forget'?"
    ]


def test_an_lm_eval_that_takes_no_folder_is_left_alone(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any, verbosity: Any = None) -> None:
        pass

    monkeypatch.setattr(manager, "__init__", init)
    with pytest.raises(DependencyError, match=r"takes no include_defaults and no include_path.*tasks-path"):
        host.register()
    assert manager.__init__ is init


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DependencyError, match="pip install lm-eval"):
        host.register()


# --- installed -------------------------------------------------------------------------------------------------------

#: What a program sees: what of ours is loaded before and after a host is, and the folders that the host is given.
PROGRAM = """
import json, sys
def ours():
    return sorted(name for name in sys.modules if "unierase" in name)
start = ours()
import argparse, http.client
quiet = ours()
from lm_eval.tasks import TaskManager
import inspect
given = getattr(TaskManager(include_path="theirs"), "include_path", None)
print(json.dumps({"start": start, "quiet": quiet, "given": given, "host": inspect.getfile(sys.modules["lm_eval"])}))
"""
STAND_IN = {
    "lm_eval/__init__.py": "",
    "lm_eval/tasks/__init__.py": """
        class TaskManager:
            def __init__(self, include_path=None, include_defaults=True):
                self.include_path = include_path
    """,
}


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Environments with the package in them, in both ways in which pip installs."""
    pytest.importorskip("hatchling", reason="it builds what is installed")
    environment = Environment(tmp_path_factory.mktemp(request.param) / "env")
    environment.pip("install", *(["-e"] if request.param == "editable" else []), ROOT)
    return environment


def seen(environment: Environment, **variables: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(environment.output(PROGRAM, **variables))
    return found


@pytest.mark.parametrize("editable", [False, True])
def test_an_installed_package_waits_for_an_installed_host(
    installed: Environment, editable: bool, tmp_path: Path
) -> None:
    place = write(tmp_path if editable else installed.site, STAND_IN)
    pointer = installed.site / "a_host.pth"
    if editable:
        pointer.write_text(f"{place}\n")
    try:
        found, off = seen(installed), seen(installed, UNIERASE_AUTOLOAD="0")
        hosts = installed.run("-m", "unierase_plugin", "hosts", "--json")
    finally:
        pointer.unlink(missing_ok=True)
        for path in (installed.site / "lm_eval", installed.site / "lm_eval" / "tasks"):
            for file in path.glob("*.py"):
                file.unlink()
    assert Path(found["host"]).is_relative_to(place)
    assert found["start"] == found["quiet"] == off["quiet"] == ["_unierase_autoload"]
    assert [Path(path).parts[-2:] for path in found["given"]] == [("unierase_plugin", "tasks"), ("theirs",)]
    assert off["given"] == "theirs"
    assert {each["name"]: each["registers_itself"] for each in json.loads(hosts.stdout)}["lm_eval"]


REAL = """
import sys, pathlib
empty, theirs = sys.argv[1:]
import lm_eval.tasks as tasks
from lm_eval.tasks import manager
manager.__file__ = empty + "/manager.py"  # lm-eval's own thousands of tasks take many seconds
print("unierase_demo" in tasks.TaskManager().all_tasks)
entry = tasks.TaskManager(include_path=theirs).task_index["tofu_forget"]
print(pathlib.Path(entry.yaml_path).parent == pathlib.Path(theirs))
from lm_eval.api.registry import MODEL_REGISTRY
print({"hf", "unierase_hf"} <= set(MODEL_REGISTRY))
"""
#: lm-eval's command line, on a model that is not there: whatever comes of the model comes too late.
LACKING = """
import sys
empty = sys.argv[1]
from lm_eval.tasks import manager
manager.__file__ = empty + "/manager.py"
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", "run", "--model", "unierase_hf", "--model_args", "pretrained=none", "--tasks", "tofu_forget01"]
cli_evaluate()
"""


def test_the_real_lm_eval_finds_our_tasks_and_prefers_the_users(installed: Environment, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.tasks.manager", reason="lm-eval before 0.4.10 has its TaskManager elsewhere")
    (tmp_path / "empty").mkdir()
    theirs = write(tmp_path / "theirs", {"mine.yaml": "task: tofu_forget\ndataset_path: none\n"})
    assert installed.output(REAL, tmp_path / "empty", theirs).split() == ["True", "True", "True"]


def test_the_real_lm_eval_ends_in_our_line_where_data_are_missing(installed: Environment, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.tasks.manager", reason="lm-eval before 0.4.10 has its TaskManager elsewhere")
    done = installed.run("-c", LACKING, tmp_path, UNIERASE_TOFU_DIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "forget01_perturbed.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_real_command_line_lists_our_tasks_among_its_own(installed: Environment) -> None:
    listed = installed.run("-m", "lm_eval", "ls", "tasks").stdout
    assert "tofu_forget01" in listed
    assert "hellaswag" in listed


def test_python_3_15_reads_the_same_function_from_its_own_file(installed: Environment) -> None:
    """PEP 829: a .start file has `module:callable` on a line, and makes the .pth file of its name be passed over."""
    code = """
import pkgutil, sys
sys.meta_path[:] = [each for each in sys.meta_path if not hasattr(each, "unierase_hosts")]
pkgutil.resolve_name(open(sys.argv[1]).read().strip())()
print(sum(hasattr(each, "unierase_hosts") for each in sys.meta_path))
"""
    names = [installed.site / f"unierase_autoload.{kind}" for kind in ("start", "pth")]
    assert all(name.read_text(encoding="ascii").count("\n") == 1 for name in names)
    assert installed.output(code, names[0]).strip() == "1"


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_uninstalling_leaves_nothing(how: str, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="it builds what is installed")
    environment = Environment(tmp_path / "env")
    before = set(environment.site.rglob("*"))
    environment.pip("install", *(["-e"] if how == "editable" else []), ROOT)
    assert (environment.site / "unierase_autoload.pth").is_file()
    environment.pip("uninstall", "unierase-plugin")
    left = {path for path in set(environment.site.rglob("*")) - before if "__pycache__" not in path.parts}
    assert left == set()
    write(environment.site, STAND_IN)
    assert seen(environment) == {
        "start": [],
        "quiet": [],
        "given": "theirs",
        "host": str(environment.site / "lm_eval" / "__init__.py"),
    }
