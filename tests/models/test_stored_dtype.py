"""Half precision on a CPU: work is in float32, and what is written, measured and taken back is the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import FORGET, FORGET_MORE, HPARAMS, RETAIN, save_base, shrink
from tiny import tiny_model
from torch import Tensor

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import read_checkpoint, revert_checkpoint, take_back_requests
from unierase_plugin.checkpoint.verify import HOLDS, verify_folder
from unierase_plugin.errors import StepAppliedError
from unierase_plugin.finetune import finetune
from unierase_plugin.models.loading import load
from unierase_plugin.models.stored_dtype import stored_dtype
from unierase_plugin.models.weight_files import stored_weights

IDS = torch.tensor([[5, 60, 70, 8, 9, 100]])
KINDS = [(torch.bfloat16, True, 260), (torch.bfloat16, False, 275), (torch.float16, True, 275)]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")


def half(folder: Path, dtype: torch.dtype = torch.bfloat16, tied: bool = True, rows: int = 260) -> Path:
    return save_base(folder, tiny_model(tied=tied, vocabulary=rows, dtype=dtype))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in stored_weights(folder).items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def dtypes(folder: Path) -> set[torch.dtype | None]:
    return {stored.dtype for stored in stored_weights(folder).values()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "tied", "rows"), KINDS)
def test_a_folder_and_the_way_back_have_the_checkpoints_dtype(
    dtype: torch.dtype, tied: bool, rows: int, tmp_path: Path
) -> None:
    base = half(tmp_path / "base", dtype, tied, rows)
    result = unlearn(base, FORGET, retain=RETAIN, hparams=HPARAMS, out=tmp_path / "one")
    again = unlearn(result, FORGET_MORE, hparams=HPARAMS, out=tmp_path / "memory")
    from_folder = unlearn(tmp_path / "one", FORGET_MORE, hparams=HPARAMS, out=tmp_path / "two")
    for folder, made in (("memory", again), ("two", from_folder)):
        assert dtypes(tmp_path / folder) == {dtype}
        opened, _ = load(tmp_path / folder)
        # What was measured is what is written: the weights in memory are those of the folder, in float32.
        assert made.model.dtype == opened.dtype == torch.float32
        assert torch.equal(logits(made.model), logits(opened))
        originals = read_checkpoint(tmp_path / folder).originals
        assert originals is not None
        assert {weight.dtype for weight in originals.projections.values()} == {dtype}
        assert verify_folder(tmp_path / folder).weights == HOLDS
    # The statistics before the first step are found again, so that a step from the folder is the one from memory.
    assert from_folder.history.fingerprint == again.history.fingerprint
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, weights(tmp_path / "memory")[name], rtol=0, atol=2**-7)
    revert_checkpoint(tmp_path / "two", tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(base))
    revert_checkpoint(tmp_path / "two", tmp_path / "first", step=1)
    assert same(weights(tmp_path / "first"), weights(tmp_path / "one"))
    take_back_requests(tmp_path / "two", tmp_path / "less", [FORGET[0]["question"]])
    assert dtypes(tmp_path / "less") == {dtype}
    assert verify_folder(tmp_path / "less").weights == HOLDS


def test_a_result_is_taken_back_to_the_bit(tmp_path: Path) -> None:
    base = half(tmp_path / "base")
    result = unlearn(base, FORGET, hparams=HPARAMS)
    result.revert()
    before, now = load(base)[0].state_dict(), result.model.state_dict()
    assert same(before, now)


@pytest.mark.parametrize(("asked", "written"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_dtype_that_is_asked_for_is_worked_in_and_written(asked: str, written: torch.dtype, tmp_path: Path) -> None:
    result = unlearn(half(tmp_path / "base"), FORGET, hparams=HPARAMS, dtype=asked, out=tmp_path / "one")
    assert dtypes(tmp_path / "one") == {written}
    assert result.model.dtype == written
    unlearn(tmp_path / "one", FORGET_MORE, hparams=HPARAMS, out=tmp_path / "two")
    assert dtypes(tmp_path / "two") == {written}
    revert_checkpoint(tmp_path / "two", tmp_path / "back")
    wanted = {name: weight.to(written) for name, weight in weights(tmp_path / "base").items()}
    assert same(weights(tmp_path / "back"), wanted)


def test_trained_models_are_written_in_it_too(tmp_path: Path) -> None:
    base = half(tmp_path / "base")
    finetune(base, FORGET, tmp_path / "taught", options={"epochs": 3, "learning_rate": 0.01}, asked=0)
    settings = _trained("ga_gd").replace(epochs=3, learning_rate=0.01)
    result = unlearn(
        tmp_path / "taught", FORGET, retain=RETAIN, method="ga_gd", hparams=settings, out=tmp_path / "out", judged=0
    )
    assert dtypes(tmp_path / "taught") == dtypes(tmp_path / "out") == {torch.bfloat16}
    assert not same(weights(tmp_path / "taught"), weights(base))
    assert torch.equal(logits(result.model), logits(load(tmp_path / "out")[0]))


def _trained(method: str) -> Any:
    from unierase_plugin.plugins.registration import registry

    return registry().methods.find(method).hparams()


def test_an_adapter_is_merged_into_its_bases_dtype(tmp_path: Path) -> None:
    from test_wrapped import with_lora

    base = half(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    with_lora(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "adapter")
    unlearn(tmp_path / "adapter", FORGET, hparams=HPARAMS, out=tmp_path / "out")
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert dtypes(tmp_path / "out") == dtypes(tmp_path / "back") == {torch.bfloat16}
    assert torch.equal(logits(load(tmp_path / "back")[0]), logits(load(tmp_path / "adapter")[0]))


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float32, None), (torch.float16, torch.float16), ("mixed", None)], ids=str
)
def test_a_checkpoint_that_float32_alone_holds_stays_in_it(dtype: Any, wanted: Any, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        model.model.norm.float()
    loaded, _ = load(save_base(tmp_path / "base", model))
    assert stored_dtype(loaded) == wanted
    assert loaded.dtype == torch.float32


def test_a_step_in_place_is_not_applied_twice(tmp_path: Path) -> None:
    """A step is told by the weights before it as they were written, in whichever dtype they were worked on."""
    folder = tmp_path / "out"
    unlearn(half(tmp_path / "base"), FORGET, hparams=HPARAMS, out=folder)
    unlearn(folder, FORGET_MORE, hparams=HPARAMS, out=folder, overwrite=True)
    with pytest.raises(StepAppliedError):
        unlearn(folder, FORGET_MORE, hparams=HPARAMS, out=folder, overwrite=True)
