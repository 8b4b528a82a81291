"""The methods that are compared, with their settings, as the command line names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import HyperParamsError, PluginError, did_you_mean, shown
from ..methods.contract import Method
from ..methods.editing.rome_memit_alphaedit import TARGETS, EditingHyperParams
from ..plugins.registration import check_solver, registry
from ..storage.inputs import parse_yaml

#: Two controls: the unedited model, which every comparison has, and the reference model that never saw the facts.
UNEDITED, REFERENCE = "none", "reference"

_EDITED = tuple(f"{method}:{target}" for method in ("rome", "memit", "alphaedit") for target in TARGETS)
_PAPER = ("ga_gd", "ga_kl", "npo_gd", "npo_kl", "me_gd", "dpo_gd", "dpo_kl", "idk_ap")

#: Names that stand for several methods.
SETS: Mapping[str, tuple[str, ...]] = {
    "paper": ("unierase", *_PAPER),
    "editing": ("unierase", *_EDITED),
    "controls": (UNEDITED, "prompt_guard"),
    "all": ("unierase", "removal", *_PAPER, "simnpo", "rmu", "undial", "lunar", *_EDITED, "prompt_guard"),
}


@dataclass(frozen=True)
class Entry:
    """One method of a comparison, with the settings that were set by hand."""

    #: Its name in tables and charts: as it was written, or the value of `as`.
    label: str
    method: str
    #: Settings that replace the published ones. `hparams` names a file of settings.
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_control(self) -> bool:
        return self.method in (UNEDITED, REFERENCE, "prompt_guard")


def parse_methods(text: str) -> tuple[Entry, ...]:
    """Reads a list with commas: `npo_gd`, `memit:eos`, `memit@target=eos`, `npo_gd@learning_rate=2e-5@epochs=3`.

    Values are read as YAML. Commas inside square brackets belong to a value (`memit@layers=[3,4]`). `@hparams=FILE`
    names a file of settings, and `@as=NAME` names the row. The name of a set (`SETS`) stands for its methods. Raises
    PluginError for an unknown method or a name that is given twice, and HyperParamsError for an unknown setting.
    """
    names = [name.strip() for name in re.split(r",(?![^\[\]]*\])", text) if name.strip()]
    spread = [each for name in names for each in _members(name)]
    if not spread:
        raise PluginError(f"--methods names none. Give names with commas; sets: {', '.join(SETS)}.")
    entries = tuple(parse_method(name) for name in dict.fromkeys(spread))
    labels = [entry.label for entry in entries]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise PluginError(
            f"Two methods are called {shown(twice[0])}. Give one of them another name: {twice[0]}@as=NAME."
        )
    return entries


def _members(name: str) -> Sequence[str]:
    """The installed methods of a set. Any other name stands for itself."""
    known = registry().methods
    return [each for each in SETS[name] if each.partition(":")[0] in known] if name in SETS else [name]


def parse_method(text: str) -> Entry:
    """Reads one entry, and checks that the method has its settings."""
    head, *settings = text.split("@")
    name, _, target = head.partition(":")
    changes = dict(_setting(text, each) for each in settings)
    if target:
        changes["target"] = target
    label = str(changes.pop("as", text))
    entry = Entry(label, name.casefold(), changes)
    settings_of(entry, "")
    return entry


def _setting(text: str, part: str) -> tuple[str, Any]:
    key, sign, value = part.partition("=")
    if not sign or not key.strip():
        raise HyperParamsError(
            f"{shown(part)} in {shown(text)} is no setting: write method@key=value, such as memit@target=eos."
        )
    return key.strip(), parse_yaml(value, f"{key.strip()} in {shown(text)}", HyperParamsError)[0]


def method_of(entry: Entry) -> Method[Any]:
    """The method of an entry. Raises PluginError, with the known names, if there is none."""
    if entry.method not in registry().methods and entry.method in SETS:
        raise PluginError(f"{shown(entry.method)} is a set of methods and takes no settings.")
    return registry().methods.find(entry.method)


def settings_of(entry: Entry, model: str, more: Mapping[str, Any] | None = None) -> Any:
    """The settings of a method, with the entry's changes.

    They are those of the file that the entry names, else of the shipped file for the model, else the published ones.
    more: settings that win over all of these. Names that the method does not have are ignored.
    """
    kind = method_of(entry).hparams
    changes = dict(entry.changes)
    named = changes.pop("hparams", None)
    chosen = kind.for_model(model) if named is None else kind.from_hparams(str(named))
    known = chosen.as_dict()
    if "target" in changes and not issubclass(kind, EditingHyperParams):
        raise HyperParamsError(
            f"{shown(entry.label)} names a target, which {shown(entry.method)} does not "
            f"have.{did_you_mean('target', known)} Targets are for rome, memit and alphaedit."
        )
    settings = chosen.replace(**changes, **{key: value for key, value in (more or {}).items() if key in known})
    check_solver(settings)
    return settings
