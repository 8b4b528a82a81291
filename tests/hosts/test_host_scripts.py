"""`unierase harness`: a choice added in memory to scripts that choose by a method's name, and real scripts run so."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import easyedit_host
import hosts_data
import pytest
from easyedit_host import easyedit_or_skip
from installed import installer
from small import SHORT, save_base, shrink
from tiny import tiny_model
from typer.testing import CliRunner

from unierase_plugin import UniEraseError
from unierase_plugin.cli import app
from unierase_plugin.hosts.scripts import run_script

CHAIN = """
import argparse, json
class ROMEHyperParams: pass
class FTHyperParams: pass
class FTTable: pass
parser = argparse.ArgumentParser()
parser.add_argument("--editing_method", choices=["ROME", "FT"])
parser.add_argument("--side", choices=["left", "right"])
args = parser.parse_args()
if args.editing_method == "ROME":
    hparams = ROMEHyperParams
elif args.editing_method == "FT":
    hparams = FTHyperParams
else:
    raise NotImplementedError
if args.editing_method == "FT":
    extra = "not a class of settings"
print(json.dumps([__name__, args.editing_method, hparams.__name__]))
"""
TABLE = """
import sys, json
class ROMEHyperParams: pass
def apply(): pass
TABLE = {"ROME": (ROMEHyperParams, apply)}
SETTINGS = {"ROME": ROMEHyperParams}
OTHER = {"ROME": "a name"}
print(json.dumps([TABLE[sys.argv[1]][1].__module__, SETTINGS[sys.argv[1]].__name__, len(OTHER), sys.argv[2:]]))
"""


WAYS = """
import sys, json
class MEMITHyperParams: pass
def apply_memit(): pass
class Experiment:
    def batch(self): return "a batch"
    def single(self): return "one by one"
    def run(self, method):
        return {"ROME": self.single, "MEMIT": self.batch}[method](), method in ["ROME", "MEMIT"], method in ["FT"]
SETTINGS = {"MEMIT": MEMITHyperParams}
FUNCTIONS = {"MEMIT": apply_memit}
print(json.dumps([*Experiment().run(sys.argv[1]), list(FUNCTIONS)]))
"""


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def script(folder: Path, source: str) -> Path:
    path = folder / "script.py"
    path.write_text(source, encoding="utf-8")
    return path


# --- what is added ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "wanted"), [("UniErase", "UniEraseHyperParams"), ("FT", "FTHyperParams")])
def test_a_chain_chooses_ours_and_its_own(tmp_path: Path, method: str, wanted: str) -> None:
    path = script(tmp_path, CHAIN)
    done = CliRunner().invoke(app, ["harness", str(path), "--editing_method", method])
    assert json.loads(done.stdout) == ["__main__", method, wanted]
    assert path.read_text(encoding="utf-8") == CHAIN


#: The hooks are enough for the launcher: a package of its own could bring it.
AS_A_PLUGIN = """
import typer
from unierase_plugin import hookimpl
from unierase_plugin.cli.harness import harness
app = typer.Typer()
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(harness)
@hookimpl
def register_commands(register):
    register("launch", app)
"""


def test_the_launcher_could_come_from_a_package_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer(tmp_path / "site", monkeypatch)("launcher", AS_A_PLUGIN)
    path = script(tmp_path, CHAIN)
    said = [
        CliRunner().invoke(app, [name, str(path), "--editing_method", "UniErase"]) for name in ("harness", "launch")
    ]
    assert said[0].stdout == said[1].stdout == '["__main__", "UniErase", "UniEraseHyperParams"]\n'
    assert "Runs a harness' script" in CliRunner().invoke(app, ["launch", "--help"]).output


def test_tables_get_an_entry_and_others_do_not(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["harness", str(script(tmp_path, TABLE)), "UniErase", "--help", "-x"])
    assert json.loads(done.stdout) == [
        "unierase_plugin.hosts.rome_family",
        "UniEraseHyperParams",
        1,
        ["--help", "-x"],
    ]


def test_where_a_script_goes_several_ways_ours_goes_memits_and_never_calls_its_function(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["harness", str(script(tmp_path, WAYS)), "UniErase"])
    assert json.loads(done.stdout) == ["a batch", True, False, ["MEMIT"]]


def test_an_option_that_is_none_of_the_methods_keeps_its_choices(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["harness", str(script(tmp_path, CHAIN)), "--side", "UniErase"])
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("source", "says"),
    [("print('hello')", r"by hand: docs/how-to/hosts.md"), ("if x = 1", "is not a Python script")],
)
def test_a_script_that_chooses_nothing_is_refused(tmp_path: Path, source: str, says: str) -> None:
    with pytest.raises(UniEraseError, match=says):
        run_script(script(tmp_path, source), [])


def test_a_script_that_is_not_there_is_refused() -> None:
    with pytest.raises(UniEraseError, match=r"'nowhere\.py' cannot be read"):
        run_script(Path("nowhere.py"), [])


def test_what_was_running_is_put_back_after_a_script_that_fails(tmp_path: Path) -> None:
    main, arguments = sys.modules["__main__"], sys.argv
    with pytest.raises(NotImplementedError):
        run_script(script(tmp_path, CHAIN), [])
    assert sys.modules["__main__"] is main
    assert sys.argv is arguments


# --- real scripts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run scripts in, with small data, a tiny Llama and settings for it."""
    shrink(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    named = {
        "zsre_mend_eval.json": hosts_data.zsre(),
        "zsre_mend_eval_portability_gpt4.json": hosts_data.zsre(),
        "zsre_eval_20k.json": hosts_data.zsre(),
        "knowedit.json": hosts_data.knowedit(),
        "wikibigedit.json": hosts_data.wikibigedit(),
        "multi_counterfact.json": hosts_data.counterfact(),
        "known_1000.json": [{"template": "Ask {} now", "subject": "Bob"}],
    }
    for name, records in named.items():
        (tmp_path / "data" / name).write_text(json.dumps(records), encoding="utf-8")
    settings = {**SHORT, "model_name": str(save_base(tmp_path / "tiny-llama"))}
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


def options(desk: Path, **more: str) -> list[str]:
    named = {"editing_method": "UniErase", "hparams_dir": str(desk / "tiny.yaml"), "data_dir": str(desk / "data")}
    return [part for name, value in {**named, **more}.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("name", "more", "written"),
    [
        ("run_AlphaEdit_editing.py", {"data_type": "ZsRE", "ds_size": "2", "output_dir": "out"}, "out/*.json"),
        (
            "run_knowedit_llama2.py",
            {"datatype": "zsre", "data_dir": "data/knowedit.json", "ds_size": "2", "metrics_save_dir": "out"},
            "out/*.json",
        ),
        ("run_ultraedit_editing.py", {"data_type": "zsre", "ds_size": "2", "output_dir": "out"}, "out/*.json"),
        ("run_zsre_llama2.py", {"ds_size": "2", "metrics_save_dir": "out"}, "out/UniErase_results.json"),
        (
            "run_WikiBigEdit.py",
            {"data_dir": "data/wikibigedit.json", "ds_size": "2", "metrics_save_dir": "out"},
            "out/UniErase_*.json",
        ),
        (
            "run_LLM_evaluation.py",
            {"datatype": "zsre", "data_dir": "data/knowedit.json", "ds_size": "2", "output_dir": "out"},
            "out/*.json",
        ),
    ],
)
def test_easyedits_own_scripts_run(
    desk: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: dict[str, str], written: str
) -> None:
    easyedit_or_skip()
    # Its measure of fluency wants data of nltk's that have to be downloaded.
    monkeypatch.setattr("nltk.word_tokenize", str.split)
    (desk / "out").mkdir()
    path = Path(os.environ["UNIERASE_EASYEDIT_DIR"]) / "examples" / name
    source = path.read_bytes()
    run_script(path, options(desk, **more))
    metrics = json.loads(next(desk.glob(written)).read_text(encoding="utf-8"))
    assert len(metrics) == 2
    assert all("rewrite_acc" in each["post"] for each in metrics)
    assert path.read_bytes() == source


def test_easyedits_sanitization_runs(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    easyedit_or_skip()
    monkeypatch.setattr("nltk.word_tokenize", str.split)
    for part, records in hosts_data.trivia_qa().items():
        (desk / "data" / f"trivia_qa_{part}.json").write_text(json.dumps(records), encoding="utf-8")
    path = Path(os.environ["UNIERASE_EASYEDIT_DIR"]) / "examples" / "run_santinization_llama2.py"
    with hosts_data.cuda_is_cpu():
        run_script(path, options(desk))
    assert "'success': " in capsys.readouterr().out


@pytest.fixture
def rome_desk(desk: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`desk` as the folder of a ROME-style checkout, whose modules are on the path for this test alone."""
    variable = request.param
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"{variable} is not set: give the folder of a checkout")
    checkout = Path(named)
    shutil.copy(checkout / "globals.yml", desk)
    (desk / "hparams" / "UniErase").mkdir(parents=True)
    settings = {**SHORT, "prompt_forms": ["bare"], "layer_module_tmp": "transformer.h.{}"}
    (desk / "hparams" / "UniErase" / "tiny.json").write_text(json.dumps(settings), encoding="utf-8")
    save_base(desk / "gpt2-xl", tiny_model("gpt2"))
    monkeypatch.syspath_prepend(str(checkout))
    # AlphaEdit's GLUE evaluation, which is off unless asked for, wants this of an older `datasets`.
    monkeypatch.setattr("datasets.load_metric", None, raising=False)
    # Its MEND wants packages that its other methods do without.
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, easyedit_host._Absentees()])
    before = set(sys.modules)
    yield checkout
    # All of them are found before any is taken away: a namespace looks for its parent.
    for name in [each for each in set(sys.modules) - before if _from(each, checkout)]:
        del sys.modules[name]


def _from(name: str, checkout: Path) -> bool:
    module = sys.modules[name]
    places = [getattr(module, "__file__", None), *getattr(module, "__dict__", {}).get("__path__", [])]
    return any(str(place).startswith(str(checkout)) for place in places)


@pytest.mark.parametrize("rome_desk", ["UNIERASE_MEMIT_DIR", "UNIERASE_ALPHAEDIT_DIR"], indirect=True)
def test_evaluate_of_memit_and_alphaedit_runs(rome_desk: Path, desk: Path) -> None:
    with hosts_data.cuda_is_cpu():
        run_script(
            rome_desk / "experiments" / "evaluate.py",
            [
                "--alg_name",
                "UniErase",
                "--model_name",
                "gpt2-xl",
                "--hparams_fname",
                "tiny.json",
                "--ds_name",
                "mcf",
                "--skip_generation_tests",
                "--num_edits",
                "1",
            ],
        )
    found = sorted((desk / "results" / "UniErase" / "run_000").glob("1_edits-case_*.json"))
    assert [json.loads(each.read_text())["case_id"] for each in found] == [0, 1]
    assert all("rewrite_prompts_probs" in json.loads(each.read_text())["post"] for each in found)
