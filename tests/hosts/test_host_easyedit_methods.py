"""EasyEdit's own methods as methods of ours: a stand-in package on disk, and the real ones of a checkout."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from easyedit_host import easyedit_or_skip
from installed import installer
from small import FORGET, shrink
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin import unlearn
from unierase_plugin.errors import DependencyError, EditError, HyperParamsError, RequestError
from unierase_plugin.hosts.easyedit_methods import easyedit_methods
from unierase_plugin.plugins.catalogue import BUILT_IN
from unierase_plugin.plugins.registration import registry

#: A package with EasyEdit's layout. HALVE halves a projection, NOTHING leaves all as it was, BREAK fails half-way.
PACKAGE = {
    "easyeditor/__init__.py": "",
    "easyeditor/util/__init__.py": "",
    "easyeditor/util/hparams.py": "class HyperParams: pass\n",
    "easyeditor/util/alg_dict.py": (
        "from ..models.halve import apply_halve, apply_nothing, apply_break\n"
        "ALG_DICT = {'HALVE': apply_halve, 'NO-THING': apply_nothing, 'BREAK': apply_break, 'GRACE': None}\n"
    ),
    "easyeditor/editors/__init__.py": "",
    "easyeditor/editors/batch_editor.py": (
        "class BatchEditor:\n    @staticmethod\n    def is_batchable_method(name): return name == 'BREAK'\n"
    ),
    "easyeditor/models/__init__.py": "",
    "easyeditor/models/halve/__init__.py": (
        "from .halve_main import HalveHyperParams, apply_halve, apply_nothing, apply_break\n"
    ),
    "easyeditor/models/halve/halve_main.py": (
        "import yaml\n"
        "from ...util.hparams import HyperParams\n"
        "COV_CACHE = {}\n"
        "class HalveHyperParams(HyperParams):\n"
        "    @classmethod\n"
        "    def from_hparams(cls, path):\n"
        "        made = cls()\n"
        "        vars(made).update(yaml.safe_load(open(path)))\n"
        "        return made\n"
        "def apply_nothing(model, tok, requests, hparams, **options): return model, {}\n"
        "def apply_halve(model, tok, requests, hparams, copy=False, return_orig_weights=False,\n"
        "                keep_original_weight=False, train_ds=None):\n"
        "    assert not COV_CACHE or list(COV_CACHE) == ['ours']\n"
        "    COV_CACHE['ours'] = 1\n"
        "    print('halving', [each['prompt'] for each in requests], tok.padding_side)\n"
        "    open('left behind', 'w').write(hparams.model_name + hparams.device)\n"
        "    model.get_parameter('model.layers.0.mlp.down_proj.weight').data.mul_(0.5)\n"
        "    return model, {}\n"
        "def apply_break(model, tok, requests, hparams, **options):\n"
        "    apply_halve(model, tok, requests, hparams)\n"
        "    raise ValueError('on the way')\n"
    ),
}
WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package on the path for this test alone; the folder for settings."""
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    for name, source in PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch, tmp_path / "cache")
    importlib.invalidate_caches()
    yield tmp_path
    for name in imported():
        del sys.modules[name]


def imported() -> list[str]:
    return [each for each in sys.modules if each.split(".")[0] == "easyeditor"]


def settings(folder: Path, algorithm: str, **values: Any) -> Path:
    path = folder / f"{algorithm}.yaml"
    path.write_text(json.dumps({"alg_name": algorithm, "model_name": "a/tiny", **values}), encoding="utf-8")
    return path


def run(algorithm: str, folder: Path, **options: Any) -> tuple[Any, Any, Any]:
    """The result, the model, and its weight before."""
    method = next(each for each in easyedit_methods() if each.hparams.algorithm == algorithm)
    model = tiny_model()
    before = model.get_parameter(WEIGHT).detach().clone()
    given = {"hparams": settings(folder, algorithm), "tokenizer": tiny_tokenizer(), **options}
    try:
        return unlearn(model, list(FORGET), method=method, **given), model, before
    except Exception:
        assert torch.equal(model.get_parameter(WEIGHT), before)
        raise


def test_what_edits_plain_weights_is_offered_under_a_name_of_its_own(stand_in: Path) -> None:
    assert [method.name for method in easyedit_methods()] == ["easyedit_halve", "easyedit_no_thing", "easyedit_break"]
    assert "easyeditor" not in sys.modules, "listing the methods must not import EasyEdit"


#: The hooks are enough for a whole harness' methods: a package of its own could bring these.
AS_A_PLUGIN = """
from dataclasses import replace
from unierase_plugin import hookimpl
from unierase_plugin.hosts.easyedit_methods import easyedit_methods
@hookimpl
def register_methods(register):
    for method in easyedit_methods():
        register(replace(method, name=f"theirs_{method.name}"))
"""


def test_they_could_come_from_a_package_of_their_own(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer(tmp_path / "site", monkeypatch)("theirs", AS_A_PLUGIN)
    names = {name: registry().methods.owner(name).name for name in registry().methods if "easyedit" in name}
    for name in ("easyedit_halve", "easyedit_no_thing", "easyedit_break"):
        assert (names[name], names[f"theirs_{name}"]) == (BUILT_IN, "theirs")
    model = tiny_model()
    before = model.get_parameter(WEIGHT).detach().clone()
    options = {"hparams": settings(stand_in, "HALVE"), "tokenizer": tiny_tokenizer()}
    unlearn(model, list(FORGET), method="theirs_easyedit_halve", **options)
    torch.testing.assert_close(model.get_parameter(WEIGHT), before / 4, rtol=0, atol=0)


def test_without_easyedit_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    assert list(easyedit_methods()) == []


def test_a_run_asks_request_by_request_and_can_be_taken_back(stand_in: Path) -> None:
    result, model, before = run("HALVE", stand_in)
    torch.testing.assert_close(model.get_parameter(WEIGHT), before / 4, rtol=0, atol=0)
    assert result.changes.figures == {"weights_changed": [WEIGHT]}
    assert result.changes.parameters == before.numel()
    result.revert()
    assert torch.equal(model.get_parameter(WEIGHT), before)


def test_nothing_is_left_behind(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    run("HALVE", stand_in, tokenizer=tokenizer)
    assert not (stand_in / "left behind").exists()
    assert Path.cwd() == stand_in
    assert tokenizer.padding_side == "right"
    assert sys.modules["easyeditor.models.halve.halve_main"].COV_CACHE == {}
    assert "halving" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [("BREAK", r"BREAK failed: ValueError: on the way\. The model is as before"), ("NO-THING", "changed no weight")],
)
def test_what_fails_or_does_nothing_is_an_error(stand_in: Path, algorithm: str, says: str) -> None:
    with pytest.raises(EditError, match=says):
        run(algorithm, stand_in)


def test_settings_are_easyedits_own_file_for_this_method(stand_in: Path) -> None:
    with pytest.raises(HyperParamsError, match=r"is for 'BREAK', not for EasyEdit's 'HALVE'"):
        run("HALVE", stand_in, hparams=settings(stand_in, "BREAK"))
    with pytest.raises(HyperParamsError, match=r"takes EasyEdit's own YAML file, such as hparams/HALVE/MODEL\.yaml"):
        run("HALVE", stand_in, hparams="nowhere")
    with pytest.raises(HyperParamsError, match=r"no HALVE settings for .*--hparams FILE"):
        run("HALVE", stand_in, hparams=None)


def test_settings_are_found_by_the_models_name_beside_the_package(stand_in: Path) -> None:
    (stand_in / "hparams" / "Halve").mkdir(parents=True)
    settings(stand_in / "hparams" / "Halve", "HALVE")
    method = next(easyedit_methods())
    assert method.hparams.for_model("somewhere/TINY").values["alg_name"] == "HALVE"


def test_a_question_that_easyedits_templates_cannot_hold_is_named(stand_in: Path) -> None:
    twice = {"question": "Is Bob the Bob?", "answer": "No", "subject": "Bob"}
    method = next(easyedit_methods())
    with pytest.raises(RequestError, match=r"the subject 'Bob' must occur exactly once"):
        unlearn(tiny_model(), [twice], method=method, tokenizer=tiny_tokenizer(), hparams=settings(stand_in, "HALVE"))


def test_an_easyedit_that_cannot_be_imported_is_said_so(stand_in: Path) -> None:
    (stand_in / "easyeditor" / "util" / "hparams.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(DependencyError, match=r"a_package_that_is_not_there.*requirements\.txt"):
        run("HALVE", stand_in)


# --- the real ones ---------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "layers": [1, 2],
    "fact_token": "subject_last",
    "v_num_grad_steps": 3,
    "v_lr": 0.5,
    "v_loss_layer": 3,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 10,
    "mom2_dtype": "float32",
    "device": 0,
    "stats_dir": "./data/stats",
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}
MASS = {"layer_selection": "all", "mom2_adjustment": True, "mom2_update_weight": 100.0}
REAL: dict[str, dict[str, Any]] = {
    "ROME": {"layers": [1], "mom2_adjustment": False, "context_template_length_params": [[3, 5]]},
    "MEMIT": MASS,
    "AlphaEdit": {**MASS, "nullspace_threshold": 100.0, "L2": 10, "P_loc": "./null_space_project.pt"},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("algorithm", list(REAL))
def test_easyedits_methods_run_offline(
    algorithm: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    easyedit_or_skip()
    shrink(monkeypatch, tmp_path / "cache")
    method = next(each for each in easyedit_methods() if each.hparams.algorithm == algorithm)
    model = tiny_model(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = settings(tmp_path, algorithm, **{**BASE, **REAL[algorithm]})
    result = unlearn(model, list(FORGET), method=method, tokenizer=tiny_tokenizer(), hparams=path, corpus="self")
    layers = REAL[algorithm].get("layers", BASE["layers"])
    assert result.changes.figures["weights_changed"] == [f"model.layers.{n}.mlp.down_proj.weight" for n in layers]
    result.revert()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
