"""Quantised checkpoints are opened in plain weights, to the value that their numbers mean, or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import tiny_decoder
from safetensors.torch import load_file, save_file
from small import FORGET, HPARAMS, shrink
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import revert_checkpoint
from unierase_plugin.errors import ArchitectureError
from unierase_plugin.models.loading import check_stated_blocks, load

BLOCK = 16
pytestmark = pytest.mark.skipif(
    not hasattr(FineGrainedFP8Config(), "dequantize"), reason="this release of transformers cannot de-quantise"
)
#: What the sixteen numbers of MXFP4 mean (OCP Microscaling Formats 1.0, E2M1).
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def state(folder: Path, stated: dict[str, Any], weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": stated, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def fp8(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny Qwen3 in blocks of float8, as DeepSeek-V3 and Qwen3 are published, and the values that it means."""
    folder = tmp_path / "fp8"
    tiny_decoder("qwen3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = meant[name] = weight.bfloat16()
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        stored[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        meant[name] = stored[name].float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    state(folder, how, stored)
    return folder, meant


@pytest.fixture
def mxfp4(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny gpt-oss whose experts are in MXFP4, as it is published, and the values that it means."""
    folder = tmp_path / "mxfp4"
    model = tiny_decoder("gpt_oss")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stored, meant = {}, {}
    draw = torch.Generator().manual_seed(3)
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = meant[name] = weight.bfloat16()
            continue
        experts, wide, out = weight.shape  # the model has them transposed
        numbers = torch.randint(0, 16, (experts, out, wide // 32, 32), generator=draw, dtype=torch.uint8)
        powers = torch.randint(124, 128, (experts, out, wide // 32), generator=draw, dtype=torch.uint8)
        stored[name + "_blocks"] = (numbers[..., 0::2] | (numbers[..., 1::2] << 4)).contiguous()
        stored[name + "_scales"] = powers
        values = FP4[numbers.long()] * torch.exp2(powers.float() - 127)[..., None]
        meant[name] = values.reshape(experts, out, wide).transpose(1, 2)
    state(folder, {"quant_method": "mxfp4", "modules_to_not_convert": []}, stored)
    return folder, meant


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_weights_are_the_values_that_the_numbers_mean(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, meant = request.getfixturevalue(kind)
    with caplog.at_level(logging.WARNING):
        model, _ = load(folder)
    assert f"are quantised ({kind}). They are de-quantised, and the output holds plain bfloat16 weights" in caplog.text
    held = model.state_dict()
    assert held.keys() >= meant.keys()
    for name, value in meant.items():
        assert torch.equal(held[name].float(), value.float()), name
    assert getattr(model.config, "quantization_config", None) is None
    # Saved as they are, and not quantised again.
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for name, value in again.state_dict().items():
        assert torch.equal(value, held[name]), name


def test_the_output_is_plain_and_the_way_back_gives_the_plain_model(
    fp8: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not quantised again, as transformers would save it."""
    shrink(monkeypatch, tmp_path / "cache")
    folder, meant = fp8
    unlearn(folder, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    for name, value in meant.items():
        assert torch.equal(back[name], value.bfloat16()), name


@pytest.mark.parametrize("stated", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "unheard-of"}])
def test_a_kind_that_cannot_be_undone_is_refused_before_its_weights_are_read(
    stated: dict[str, Any], fp8: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, _ = fp8
    state(folder, stated, {"nothing": torch.zeros(1)})
    for refused in (lambda: load(folder), lambda: check_stated_blocks(str(folder), HPARAMS)):
        with pytest.raises(
            ArchitectureError, match=rf"\({stated['quant_method']}\).*transformers cannot undo this kind"
        ):
            refused()
