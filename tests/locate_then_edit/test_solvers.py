"""The solver is chosen by name, among those of this package and of plugins."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import installer
from small import FORGET, HPARAMS, RETAIN, save_base, shrink

from unierase_plugin import UniEraseHyperParams, unlearn
from unierase_plugin.compare.entries import Entry, settings_of
from unierase_plugin.errors import HyperParamsError, PluginError
from unierase_plugin.locate_then_edit.solve import Exact, NullSpace, Ridge
from unierase_plugin.locate_then_edit.solvers import SOLVERS, System
from unierase_plugin.plugins.registration import check_solver, registry

#: The same as the ridge with both weights doubled.
TWICE = """
from unierase_plugin import hookimpl
def twice(system):
    from unierase_plugin.locate_then_edit.solve import Ridge
    return Ridge.of(2 * system.moment())
@hookimpl
def register_solvers(register):
    register("twice", twice)
"""


def test_the_names_give_the_solvers_of_the_papers() -> None:
    system = System(
        torch.eye(4).diag_embed()[0] + torch.eye(4), None, UniEraseHyperParams(), lambda moment, share: moment.double()
    )
    made = {name: type(make(system)) for name, make in SOLVERS.items()}
    assert made == {"ridge": Ridge, "null_space": NullSpace, "exact": Exact}
    assert dict(registry().solvers) == dict(SOLVERS)


def test_a_plugins_solver_makes_the_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer(tmp_path / "site", monkeypatch)("twice", TWICE)
    shrink(monkeypatch, tmp_path / "cache")
    base = save_base(tmp_path / "base")

    def edited(out: str, **changes: Any) -> Any:
        result = unlearn(base, FORGET, retain=RETAIN, hparams=HPARAMS.replace(**changes), out=tmp_path / out)
        assert result.edit is not None
        return result

    weights = {name: 2 * getattr(HPARAMS, name) for name in ("mom2_update_weight", "retain_update_weight")}
    by_weights, by_solver, plain = edited("weights", **weights), edited("solver", solver="twice"), edited("plain")
    for layer, update in by_solver.edit.updates.items():
        assert torch.equal(update.up, by_weights.edit.updates[layer].up)
        assert torch.equal(update.down, by_weights.edit.updates[layer].down)
        assert not torch.equal(update.down, plain.edit.updates[layer].down)
    assert by_solver.report.edit["solve_errors"] == by_weights.report.edit["solve_errors"]


def test_a_name_that_no_solver_has_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"Opening these weights would fail.")
    wrong = r"solver = 'nullspace' must be one of: ridge, null_space, exact\. Did you mean 'null_space'"
    with pytest.raises(HyperParamsError, match=wrong):
        unlearn(base, FORGET, hparams=HPARAMS.replace(solver="nullspace"))
    with pytest.raises(HyperParamsError, match=wrong):
        settings_of(Entry("memit", "memit", {"solver": "nullspace"}), "any")


def test_a_solver_that_two_plugins_claim_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer(tmp_path / "site", monkeypatch)("ridge", TWICE.replace('"twice"', '"ridge"'))
    with pytest.raises(PluginError, match=r"The solver 'ridge' is registered by 'built-in' .* and by 'ridge'"):
        check_solver(UniEraseHyperParams())
    check_solver(UniEraseHyperParams(solver="exact"))


def test_what_is_no_solver_is_told_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = TWICE.replace("Ridge.of(2 * system.moment())", "Counter()").replace(
        "def twice", "from collections import Counter\ndef twice"
    )
    installer(tmp_path / "site", monkeypatch)("count", code)
    with pytest.raises(PluginError, match=r"made Counter\(\), which has no protecting, solve, condition, error"):
        registry().solvers["twice"](Counter())  # type: ignore[arg-type]
