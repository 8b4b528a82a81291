"""Numbers that cannot be meant are refused by name, and NaN slips through no comparison."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from small import FORGET, HPARAMS, save_base, shrink
from tiny import tiny_model
from typer.testing import CliRunner

from unierase_plugin import unlearn
from unierase_plugin.audit import verdict
from unierase_plugin.audit.contract import EDITED, REFERENCE, AttackResult
from unierase_plugin.checkpoint.downdate import without_columns
from unierase_plugin.cli import app
from unierase_plugin.compare.search import choose
from unierase_plugin.errors import CheckpointError, EditError, HyperParamsError
from unierase_plugin.finetune import finetune
from unierase_plugin.hparams import HyperParams, UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import WeightEdit, apply_edit
from unierase_plugin.locate_then_edit.solve import LowRank, NullSpace
from unierase_plugin.methods.finetuning.settings import FineTuneHyperParams
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.pipeline import corpus_moment
from unierase_plugin.plugins.registration import registry
from unierase_plugin.removal.distil import chosen_fraction, linear_rate
from unierase_plugin.settings.ranges import Range
from unierase_plugin.settings.values import in_words
from unierase_plugin.statistics.files import check_likeness, read_moments
from unierase_plugin.statistics.second_moment import MomentSums, SecondMoment, mean_moments
from unierase_plugin.storage.tensor_files import pack, read_tensors, write_tensors

NAN = math.nan
SETTINGS: dict[str, type[HyperParams]] = {
    method.hparams.__name__: method.hparams
    for method in registry().methods.values()
    if not method.name.startswith("easyedit")
} | {"FineTuneHyperParams": FineTuneHyperParams}


WORDS = set(re.findall(r"\w+", "a list of lists, whole, finite number or numbers, text or texts, true, false, mapping"))


def numeric(kind: type[HyperParams]) -> set[str]:
    """Its fields that are numbers; seeds are checked by the reader of values."""
    hints = get_type_hints(kind)
    return {spec.name for spec in dataclasses.fields(kind) if hints[spec.name] in (int, float)} - {"seed"}


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_number_of_every_method_has_a_range(name: str) -> None:
    assert set(SETTINGS[name].all_ranges()) == numeric(SETTINGS[name])


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_type_of_a_setting_has_words_that_are_not_pythons(name: str) -> None:
    hints = get_type_hints(SETTINGS[name])
    for spec in dataclasses.fields(SETTINGS[name]):
        words = in_words(hints[spec.name])
        assert set(words.split()) <= WORDS, words


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_number_out_of_its_range_is_refused_with_name_value_and_range(name: str) -> None:
    kind = SETTINGS[name]
    for setting, allowed in kind.all_ranges().items():
        beyond = [allowed.least - 1, *([allowed.most * 2, 1e300] if allowed.most < math.inf else [])]
        beyond += [allowed.least] if allowed.above else []
        beyond += [allowed.most] if allowed.below else []
        for value in beyond:
            with pytest.raises(HyperParamsError) as caught:
                kind.from_dict({setting: value})
            assert str(caught.value).startswith(f"{setting} = ")
            assert str(caught.value).endswith(f"must {allowed}.")
        for value in (NAN, math.inf, -math.inf):
            with pytest.raises(HyperParamsError, match=f"{setting} = "):
                kind.from_dict({setting: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nullspace_threshold: 1.5", "nullspace_threshold = 1.5 must be greater than 0 and less than 1"),
        ("v_lr: 1e30", r"v_lr = 1e\+30 must be greater than 0 and at most 100"),
        ("clamp_norm_factor: 1e-30", "clamp_norm_factor = 1e-30 must be from 0.001 to 1000"),
        ("mom2_n_samples: 1e12", "mom2_n_samples = 1000000000000 must be greater than 0 and at most 100000000"),
        ("v_lr: .nan", "v_lr = nan is not a finite number"),
        ("mom2_n_samples: .inf", "mom2_n_samples = inf is not a whole number"),
        ("L2: -.inf", "L2 = -inf is not a finite number"),
        ("context_template_length_params: [[1000000000, 1]]", "both from 1 to 1000"),
    ],
)
def test_a_file_with_such_a_number_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(HyperParamsError, match=message):
        UniEraseHyperParams.from_hparams(tmp_path / "x.yaml")


def test_a_range_holds_its_ends_but_where_it_does_not() -> None:
    assert [value in Range(0, 1) for value in (-1e-9, 0, 1, 1 + 1e-9, NAN)] == [False, True, True, False, False]
    assert [value in Range(0, 1, True, True) for value in (0, 1e-9, 1)] == [False, True, False]
    assert [value in Range(0) for value in (0, 1e300, math.inf, NAN)] == [True, True, True, False]


def test_counts_of_a_call_are_not_negative(tmp_path: Path) -> None:
    for name in ("judged", "max_batch_tokens"):
        with pytest.raises(HyperParamsError, match=f"{name} = -1 must not be negative"):
            unlearn("nowhere", FORGET, **{name: -1})  # type: ignore[arg-type]
    with pytest.raises(HyperParamsError, match="asked = -2 must not be negative"):
        finetune("nowhere", FORGET, tmp_path / "out", asked=-2)
    words = ["run", "--model", "nowhere", "--forget", "facts.jsonl", "--out", str(tmp_path / "out"), "--judged", "-1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "judged = -1 must not be negative" in done.output


# --- Statistics ------------------------------------------------------------------------------------------------------


def moment(matrix: torch.Tensor) -> SecondMoment:
    return SecondMoment({1: matrix}, 10)


@pytest.mark.parametrize("matrix", [torch.zeros(64, 64), -torch.eye(64), torch.full((64, 64), NAN)])
def test_a_moment_of_nothing_is_no_moment(matrix: torch.Tensor) -> None:
    with pytest.raises(EditError, match="second moment of block 1"):
        mean_moments(MomentSums({1: matrix.double()}, 10), torch.float32)


def poison(matrix: torch.Tensor, file: Path) -> None:
    """Puts a matrix in the place of every moment of a file, as a program that trusts it would have written it."""
    tensors, metadata = read_tensors(file)
    write_tensors(file, dict.fromkeys(tensors, matrix), metadata)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_a_cache_that_holds_no_moment_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    base = save_base(tmp_path / "base")
    first = corpus_moment(base, hparams=HPARAMS)
    poison(torch.full((64, 64), value), first.file)
    again = corpus_moment(base, hparams=HPARAMS)
    assert all(torch.equal(again.moment.moments[layer], first.moment.moments[layer]) for layer in (1, 2))
    assert "Computing again: The second moment of block 1 is zero, negative or NaN" in caplog.text


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(64, 64), "all zeros"),
        (torch.full((64, 64), NAN), "NaN"),
        (-torch.eye(64), "positive diagonal"),
        (torch.eye(64), "not of block 1 of this model"),
    ],
)
def test_an_import_that_holds_no_moment_is_refused(tmp_path: Path, matrix: torch.Tensor, message: str) -> None:
    """The unit matrix too: its diagonal has no pattern, and its correlation with the model's is NaN."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, *pack(moment(matrix)))
    own = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    arch = find_architecture(tiny_model())
    with pytest.raises(EditError, match=message):
        check_likeness(read_moments([path], arch, [1], [])[0], moment(own @ own.T), {1: str(path)})


def test_imported_zeros_do_not_reach_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    base, path = save_base(tmp_path / "base"), tmp_path / "x.safetensors"
    write_tensors(path, *pack(SecondMoment(dict.fromkeys((1, 2), torch.zeros(64, 64)), 10)))
    with pytest.raises(EditError, match="all zeros"):
        corpus_moment(base, hparams=HPARAMS, sources=[path])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# --- Comparisons with NaN --------------------------------------------------------------------------------------------


def test_a_null_space_needs_a_share_and_a_moment() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, 1e-3, 1e-4]))
    assert NullSpace.of(matrix, 0.1, 1.0).protected.shape == (4, 2)
    for threshold in (1.5, 0.0, NAN):
        with pytest.raises(EditError, match=f"nullspace_threshold = {threshold} is a share"):
            NullSpace.of(matrix, threshold, 1.0)
    with pytest.raises(EditError, match="is zero"):
        NullSpace.of(torch.zeros(4, 4), 0.1, 1.0)


COMPARED: list[tuple[str, Callable[[], Any]]] = [
    ("keys", lambda: without_columns(LowRank(torch.ones(4, 2), torch.ones(2, 6)), torch.full((6, 2), NAN), [0])),
    ("loss", lambda: chosen_fraction(lambda step: NAN)),
    ("gradient", lambda: linear_rate(1.0, {0: torch.full((2, 2), NAN)}, {0: torch.ones(2, 2)})),
]


@pytest.mark.parametrize("name", [name for name, _ in COMPARED])
def test_nan_is_an_error_where_a_comparison_would_let_it_pass(name: str) -> None:
    with pytest.raises((EditError, CheckpointError)):
        dict(COMPARED)[name]()


def test_an_audit_does_not_take_nan_for_a_model_without_damage_or_trace() -> None:
    for bound in ({"least": 0.5}, {"most": 0.5}):
        assert [each.beyond for each in verdict._damage("kept", [NAN, 1.0], "", **bound)] == [True]
    areas = {role: AttackResult(figures={"auc": {"loss": area}}) for role, area in ((EDITED, NAN), (REFERENCE, 0.5))}
    assert verdict._telling(areas) == ["loss"]


def test_a_try_without_a_figure_is_never_chosen() -> None:
    tries = [{"left": 0.0, "retention": NAN}, {"left": 0.5, "retention": 0.4}, {"left": 0.4, "retention": 0.3}, None]
    assert choose(tries, target=0.9) == 1
    assert choose(tries[:1], target=0.9) is None


def test_an_edit_that_overflows_the_models_dtype_is_refused() -> None:
    model = tiny_model(dtype=torch.float16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit = WeightEdit({1: LowRank(torch.full((32, 1), 1e3), torch.full((1, 64), 1e3))})
    with pytest.raises(EditError, match=r"block 1 is too large for float16.*bfloat16 or float32"):
        apply_edit(find_architecture(model), edit)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
