"""Settings files of the baselines: every one loads, spells out and explains every key, and stays with its method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from unierase_plugin.errors import HyperParamsError
from unierase_plugin.hparams import (
    HyperParams,
    RemovalSettings,
    UniEraseHyperParams,
    hparams_folder,
    read_yaml,
    shipped_hparams,
)
from unierase_plugin.methods.editing.rome_memit_alphaedit import EDITING, EditingHyperParams, MEMITHyperParams
from unierase_plugin.methods.finetuning.settings import FineTuneHyperParams
from unierase_plugin.methods.removal.method import RemovalHyperParams
from unierase_plugin.plugins.registration import registry

KINDS: dict[str, Any] = {
    kind.folder: kind  # type: ignore[attr-defined]
    for kind in (*(method.hparams for method in registry().methods.values()), FineTuneHyperParams)
    if kind.folder and kind is not UniEraseHyperParams  # type: ignore[attr-defined]
}
#: All but this package's own.
PUBLISHED = sorted({*KINDS} - {RemovalHyperParams.folder})
FILES = [path for folder in KINDS for path in shipped_hparams(folder).values()]
IDS = [f"{path.parent.name}-{path.stem}" for path in FILES]


def test_every_folder_belongs_to_one_class_and_every_class_has_its_published_values() -> None:
    folders = {path.name for path in hparams_folder().iterdir() if path.is_dir()}
    assert folders == {*KINDS, UniEraseHyperParams.folder}
    assert all("published" in shipped_hparams(folder) for folder in PUBLISHED)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_has_its_methods_keys_each_with_its_own_comment(path: Path) -> None:
    """Every key of a training method; of one that shares UniErase's settings those that it sets otherwise.

    A method's own keys stand in the dataclass' order; those that all methods have stand where they belong.
    """
    kind = KINDS[path.parent.name]
    keys = [spec.name for spec in dataclasses.fields(kind)]
    if issubclass(kind, RemovalSettings):
        values, common = kind.from_hparams(str(path)).as_dict(), UniEraseHyperParams().as_dict()
        named = ("alg_name", "model_name")
        keys = [key for key in keys if key in named or key not in common or values[key] != common[key]]
    given, shared = list(read_yaml(path)), {spec.name for spec in dataclasses.fields(HyperParams)}
    assert set(given) <= set(keys)
    assert [key for key in given if key not in shared] == [key for key in keys if key not in shared]
    lines = path.read_text(encoding="utf-8").splitlines()
    keyed = [at for at, line in enumerate(lines) if line and not line.startswith("#")]
    bare = [lines[at] for at in keyed if not lines[at - 1].startswith("# ") or lines[at - 1].startswith("# ---")]
    assert len(keyed) == len(given)
    assert not bare
    assert max(len(line) for line in lines if line.startswith("#")) <= 120


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_says_where_its_values_are_from(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert ("Measured:" in header) == (path.stem != "published")
    assert ("Not tested" in header) == (path.stem == "published")


@pytest.mark.parametrize("folder", PUBLISHED)
def test_defaults_are_the_published_values(folder: str) -> None:
    """But for the model, and what depends on it and on what can be downloaded."""
    kind = KINDS[folder]
    published, defaults = kind.from_hparams("published").as_dict(), kind().as_dict()
    by_model = {"model_name", "layers", "prompt_forms", "mom2_dataset", "mom2_n_samples"}
    assert {key for key in defaults if published[key] != defaults[key]} <= by_model


def test_a_model_gets_the_file_that_was_made_for_it() -> None:
    found = MEMITHyperParams.for_model("somewhere/gpt-j-6b")
    assert found == MEMITHyperParams.from_hparams("published")
    assert MEMITHyperParams.for_model("another") == MEMITHyperParams() != found


def test_editing_methods_differ_in_their_closed_form() -> None:
    assert [method.hparams().solver for method in EDITING] == ["exact", "ridge", "null_space"]


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(HyperParamsError, match=r"target = 'idkk' must be one of: idk, .* Did you mean 'idk'"):
        EditingHyperParams(target="idkk")
