"""Writes an edit as a PEFT adapter. It can be attached to the unchanged base model, detached and served.

The update of a block is Delta = up @ down, which is LoRA's lora_B @ lora_A at a scale of 1. The token's rows become
PEFT's trainable tokens. The file calls them deltas, but they are whole rows that replace the model's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..locate_then_edit.edit import WeightEdit
from ..models.adapters import PREFIX, adapter_base
from ..models.architecture import stores_input_first
from ..models.auto_class import auto_class, auto_class_name
from ..storage.tensor_files import write_tensors
from ..unlearning_token import UnlearningToken
from .companions import carry_companions
from .damage import misfits
from .folder import bytes_of
from .integrity import Examined, examine
from .older_transformers import write_for_older_transformers
from .originals import Originals
from .place import OutputFolder, output_folder
from .record import Checkpoint, join_edits

README = """# An unlearning edit as a PEFT adapter

A LoRA adapter of rank {rank} for `{model}`. It holds the edit that makes the model forget {requests} question(s). The
base model's own files do not change. Use `peft` 0.18 or later, and the path of this folder:

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}")
base = {auto}.from_pretrained("{model}"{untied})
{resize}model = PeftModel.from_pretrained(base, "{folder}")
```

`with model.disable_adapter():` gives the base model's answers; `model.merge_and_unload()` writes the edit into the
weights.

The parameters of the base model that this was made for have the SHA-256 fingerprint {fingerprint}.
{rows}"""

ROWS = """The adapter replaces row {token} of the embedding, `{name}`. A server that reads only LoRA matrices, without
PEFT's `trainable_token_indices`, does not get that row: merge first, and serve the merged model.
"""

RENAMED = """transformers before 5 has other names for {names} of this model. It cannot attach the adapter: use the
edited folder.
"""


def export_adapter(folder: str | Path, out: str | Path, overwrite: bool = False, step: int | None = None) -> Path:
    """Writes the edit recorded in `folder` as a PEFT adapter to `out`: the first `step` steps, or all of them.

    `out` gets adapter_config.json, adapter_model.safetensors (float32), the tokenizer (with the token, if the method
    has one), and a README.md with the code that loads the adapter. The weights in `folder` are not read, so training
    after the edit is not in the adapter. Raises CheckpointError if the record is damaged or the method kept no edit.
    Also raises it if the method has a token and the model's head has a bias, which PEFT's token rows leave out.
    """
    inputs = {"the edited model": Path(folder)}
    with output_folder(out, overwrite, inputs=inputs) as place:
        return _exported(examine(folder), place, step)


def _exported(found: Examined, place: OutputFolder, step: int | None) -> Path:
    source, checkpoint = found.folder, found.up_to(step)
    originals, token, steps = _exportable(checkpoint, source, step)
    skeleton = _skeleton(source, token is not None)
    _check_fit(skeleton, originals, token, source)
    edit = join_edits(checkpoint.edits[:steps])
    tensors = _tensors(edit, token, originals, skeleton)
    config = _config(edit, token, originals, skeleton, str(checkpoint.manifest["model"]))
    with place.filled(bytes_of(tensors.values())) as staging:
        write_tensors(staging / "adapter_model.safetensors", tensors, {"format": "pt"})
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (staging / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        _save_tokenizer(source, staging)
        auto = auto_class_name(skeleton.config)
        readme = _readme(checkpoint, edit, token, place.path, steps, auto) + _note_on_names(source, config)
        (staging / "README.md").write_text(readme, encoding="utf-8")
        carry_companions([source], staging, place.path)
    return place.path


def _exportable(
    checkpoint: Checkpoint, source: Path, step: int | None
) -> tuple[Originals, UnlearningToken | None, int]:
    steps = len(checkpoint.manifest["steps"])
    if checkpoint.originals is None or not checkpoint.edits:
        raise CheckpointError(
            f"{str(source)!r} was made by {checkpoint.manifest['method']!r}. This method leaves no edit that could be "
            "an adapter. Use the folder itself, which is a whole model."
        )
    base = adapter_base(str(checkpoint.manifest["model"]))
    if base:
        raise CheckpointError(
            f"{str(source)!r} was made from an adapter that was merged into {base!r}. An exported adapter would be "
            "attached to that base, without the first adapter. Use the folder itself, which is a whole model."
        )
    stacked = [
        checkpoint.originals.names[layer]
        for layer, weight in checkpoint.originals.projections.items()
        if weight.ndim != 2
    ]
    if stacked:
        raise CheckpointError(
            f"{str(source)!r} edits experts ({stacked[0]}), whose matrices are stacked in one weight. An exported LoRA "
            "adapter holds changes of single matrices. Use the folder itself, which is a whole model."
        )
    wanted = steps if step is None else step
    if not 1 <= wanted <= steps:
        raise CheckpointError(
            f"There is no step {wanted} to export: {str(source)!r} holds {steps}. Give 1 to {steps}, or leave it out."
        )
    return checkpoint.originals, checkpoint.token, wanted


def _skeleton(source: Path, has_token: bool) -> Any:
    """The model without its weights, for the names and kinds of its modules."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    if has_token and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise CheckpointError(
            f"The head of {type(model).__name__} has a bias, which PEFT's token rows leave out of the logits. Use the "
            f"edited folder itself: {str(source)!r}."
        )
    return model


def _check_fit(skeleton: nn.Module, originals: Originals, token: UnlearningToken | None, source: Path) -> None:
    wrong = misfits(skeleton, originals, token)
    if wrong:
        raise CheckpointError(
            f"The record in {str(source)!r} does not fit its config.json: {wrong[0]}. One of them was changed later."
        )


def _tensors(
    edit: WeightEdit, token: UnlearningToken | None, originals: Originals, skeleton: nn.Module
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, update in edit.updates.items():
        name = PREFIX + _module_name(originals, layer)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = update.down.float(), update.up.float()
    for name, row in _rows(token, skeleton).items():
        tensors[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = row.float()[None]
    return tensors


def _config(
    edit: WeightEdit, token: UnlearningToken | None, originals: Originals, skeleton: nn.Module, model: str
) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON. In every block alpha equals the rank, so the scale is 1."""
    ranks = {_module_name(originals, layer): edit.rank(layer) for layer in edit.layers}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(stores_input_first(skeleton.get_submodule(name)) for name in ranks),
        "trainable_token_indices": {name: [token.id] for name in _rows(token, skeleton)} if token else None,
    }


def _note_on_names(source: Path, config: dict[str, Any]) -> str:
    """Names modules that have other names in the files than in the model: transformers before 5 uses those."""
    stored: set[str] = set()
    for path in source.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(name.removesuffix(".weight") for name in file.keys())  # noqa: SIM118
    renamed = sorted({*config["target_modules"], *(config["trainable_token_indices"] or ())} - stored)
    return RENAMED.format(names=", ".join(f"`{name}`" for name in renamed)) if stored and renamed else ""


def _rows(token: UnlearningToken | None, skeleton: Any) -> dict[str, Tensor]:
    """The token's row (d,) by the name of the module that holds it: the embedding, and the head if it is untied."""
    if token is None:
        return {}
    names = {id(module): name for name, module in skeleton.named_modules()}
    rows = {names[id(skeleton.get_input_embeddings())]: token.input_row}
    if token.output_row is not None:
        rows[names[id(skeleton.get_output_embeddings())]] = token.output_row
    return rows


def _module_name(originals: Originals, layer: int) -> str:
    return originals.names[layer].removesuffix(".weight")


def _save_tokenizer(source: Path, staging: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(staging)
    write_for_older_transformers(staging)


def _readme(
    checkpoint: Checkpoint, edit: WeightEdit, token: UnlearningToken | None, target: Path, steps: int, auto: str
) -> str:
    manifest = checkpoint.manifest
    resize = ""
    if token is not None and manifest["token"]["rows_added"]:
        resize = f"base.resize_token_embeddings({token.id + 1}, mean_resizing=False)  # room for the token\n"
    return README.format(
        rank=max(edit.rank(layer) for layer in edit.layers),
        model=manifest["model"],
        requests=sum(entry["requests"] for entry in manifest["steps"][:steps]),
        folder=target.name,
        auto=auto,
        resize=resize,
        # Resizing must not tie a separate head to the embedding, whatever the config says.
        untied=", tie_word_embeddings=False" if token is not None and token.output_row is not None else "",
        fingerprint=manifest["model_fingerprint_before"],
        rows="" if token is None else ROWS.format(token=token.id, name=token.name),
    )
