"""Loads a model and its tokenizer for an edit. If that is not possible, the error says why."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ArchitectureError, UniEraseError, did_you_mean, reason, shown
from ..hparams import EditSettings, EngineSettings, HyperParams
from ..storage.inputs import checked_path, no_folder
from .adapters import adapter_base, check_tokenizer, first_base, merged, refuse_without_peft
from .architecture import check_blocks
from .auto_class import auto_class
from .quantised import dequantising, dtype_of, settle_dequantised, tell_dequantised
from .stored_dtype import round_to_stored, set_stored_dtype
from .tying import is_tied, says_tied, settle_config
from .weight_files import stored_weights

logger = logging.getLogger(__name__)

#: An error names at most this many weights.
NAMED = 3
#: Settings of the methods that name layers of the model.
BLOCKS = ("layers", "layer", "removal_layers", "removal_teacher_layers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "") -> str:
    """The device as named, else the best one. Raises UniEraseError for a device that this machine does not have."""
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if torch.backends.mps.is_available():
        available.append("mps")
    chosen = name or ("cuda" if "cuda" in available else "cpu")
    if chosen != "auto" and chosen.split(":")[0] not in available:
        raise UniEraseError(
            f"There is no device {shown(chosen)} here.{did_you_mean(chosen, available)} "
            f"Available: {', '.join(available)}, auto."
        )
    return chosen


def choose_dtype(name: str, device: str) -> torch.dtype | str:
    """The dtype to work in: as named, else the checkpoint's on a GPU and float32 on a CPU, where others are slow."""
    if not name:
        return torch.float32 if device == "cpu" else "auto"
    if name not in DTYPES:
        raise UniEraseError(
            f"dtype = {shown(name)} is not known.{did_you_mean(name, DTYPES)} Known: {', '.join(DTYPES)}."
        )
    return DTYPES[name]


def load(model: str | os.PathLike[str], device: str = "", dtype: str = "") -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or hub id. Device "auto" spreads the model over all GPUs (needs accelerate).

    A PEFT adapter is opened as its base model with the adapter merged into the weights. An image-text model is opened
    with its vision part, which no edit changes. Quantised weights are de-quantised where transformers can. A model
    that is loaded in float32 without a request for it remembers the checkpoint's dtype (`stored_dtype`).

    Raises ArchitectureError for anything but a causal language model in plain weights, and UniEraseError if there is no
    such model.
    """
    from transformers import AutoTokenizer

    name = os.fspath(model)
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    _refuse_gguf(name)
    base = adapter_base(name)
    if base:
        return _load_merged(name, base, device, dtype)
    config = read_config(name)
    _refuse_config(name, config)
    spread = {"device_map": "auto"} if place == "auto" else {}
    plainly = dequantising(name, config)
    if plainly and kind == "auto":
        kind = dtype_of(config)
    try:
        loaded, found = open_weights(name, dtype=kind, **spread, **plainly)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UniEraseError(
            f"The model {name!r} cannot be loaded ({_first_line(error)}). UniErase edits decoder-only models with "
            "weights and tokenizer beside config.json; fetch the folder again where a file is missing or damaged."
        ) from error
    refuse_drawn(name, loaded, found)
    if plainly:
        settle_dequantised(loaded, kind)
    _tell_differences(name, config, loaded, found)
    if not dtype and kind is torch.float32:
        set_stored_dtype(loaded, dtype_of(config) if plainly else _half(name))
    tell_dequantised(name, config)
    loaded.eval()
    return (loaded if spread else loaded.to(place)), tokenizer


def read_config(name: str) -> Any:
    """The config of a model, or of an adapter's base. Raises UniEraseError if there is none to read."""
    from transformers import AutoConfig

    place = first_base(name) if adapter_base(name) else name
    try:
        return AutoConfig.from_pretrained(place)
    except Exception as error:  # the hub, the file system and the config each have their own errors
        raise UniEraseError(
            f"The model {place!r} cannot be read. {no_folder(place)}Give a folder with config.json and safetensors "
            f"weights, or the id of a model on the hub that this machine can reach ({_first_line(error)})."
        ) from error


def check_stated_blocks(name: str, hparams: HyperParams) -> None:
    """Raises ArchitectureError if the settings name layers that the model's config does not have. Loads no weights.

    It also refuses the config of a model that cannot be edited at all. `Architecture.check_layers` checks what the
    config does not tell.
    """
    removes = hparams.remove if isinstance(hparams, EngineSettings) else True
    used = [each for each in BLOCKS if hasattr(hparams, each) and (removes or not each.startswith("removal"))]
    named = {each: getattr(hparams, each) for each in used}
    layers = {each: value if isinstance(value, tuple) else (value,) for each, value in named.items() if value != -1}
    template = hparams.layer_module_tmp if isinstance(hparams, EditSettings) else ""
    if template or not any(layers.values()):
        return
    try:
        config = read_config(name)
    except UniEraseError:
        if os.path.exists(name):
            return  # loading reports the fault
        raise
    _refuse_config(name, config)
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    for setting, value in layers.items():
        if isinstance(blocks, int):
            check_blocks(value, blocks, setting)


def read_tokenizer(name: str) -> Any:
    """The tokenizer of a model that can be edited. For an adapter, its own tokenizer, else its base's.

    Raises ArchitectureError as `adapter_base` does, and whatever transformers raises.
    """
    from transformers import AutoTokenizer

    adapter_base(name)
    return AutoTokenizer.from_pretrained(tokenizer_place(name))


def tokenizer_place(name: str) -> str:
    """The place of a model's tokenizer. For an adapter: beside it, else with its base."""
    base = adapter_base(name, exported=True)
    if not base:
        return name
    if Path(name).is_dir():
        return name if Path(name, "tokenizer_config.json").is_file() else tokenizer_place(base)
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name)
    except Exception:  # an adapter on the hub need not have one
        return tokenizer_place(base)
    return name


def _load_merged(name: str, base: str, device: str, dtype: str) -> tuple[Any, Any]:
    refuse_without_peft(name)
    try:
        model, _ = load(base, device, dtype)
    except UniEraseError as error:
        raise UniEraseError(f"The base model {base!r} of the adapter {name!r} is not available: {error}") from error
    try:
        whole, tokenizer = merged(name, model), read_tokenizer(name)
        check_tokenizer(name, whole, tokenizer)
    except UniEraseError:
        raise
    except Exception as error:  # of PEFT or of torch, depending on what does not fit
        raise UniEraseError(
            f"The adapter {name!r} cannot be merged into {base!r} ({_first_line(error)}). Merge it yourself with "
            "PEFT's merge_and_unload(), save the result with its tokenizer, and give that folder."
        ) from error
    round_to_stored(whole)
    logger.warning(
        "The adapter %s is merged into its base model %s. The merged model is edited and written, and a revert gives "
        "it back.",
        name,
        base,
    )
    return whole, tokenizer


def open_weights(name: str, kind: Any = None, *args: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model with the weights of its files, and transformers' report on the keys. Raises what transformers raises.

    kind   one of transformers' Auto classes; by default the one that fits the config

    If the files have a head of their own, the model keeps it, whatever the config says. The config is then corrected.
    """
    from transformers import AutoConfig

    kind = kind or auto_class(AutoConfig.from_pretrained(name))
    opened: Any = kind.from_pretrained(name, *args, output_loading_info=True, **options)
    if _lost_its_head(name, opened[0]):
        options["tie_word_embeddings"] = False
        opened = kind.from_pretrained(name, *args, output_loading_info=True, **options)
    model, found = opened
    return model, found


def _half(name: str) -> torch.dtype | None:
    """bfloat16 or float16 if the files have nothing else. A mixed checkpoint is loaded in float32, without loss."""
    kinds = {stored.dtype for stored in stored_weights(name).values()} - {None}
    return kinds.pop() if len(kinds) == 1 and kinds <= {torch.bfloat16, torch.float16} else None


def _lost_its_head(name: str, model: Any) -> bool:
    """transformers 4 ties the head if the config says so, even if the checkpoint has another head."""
    if not is_tied(model):
        return False
    head = model.get_output_embeddings()
    key = next(path for path, module in model.named_modules() if module is head) + ".weight"
    stored = stored_weights(name).get(key)
    return stored is not None and not torch.equal(stored.read().to(head.weight), head.weight)


def _tell_differences(name: str, config: Any, model: Any, found: Mapping[str, Any]) -> None:
    if not is_tied(model) and says_tied(config):
        logger.warning(
            "The config of %s says that the head is the embedding, but the checkpoint has a head of its own. The "
            "head is kept, and the config of the output says so.",
            name,
        )
    settle_config(model)
    unknown = sorted(map(str, found["unexpected_keys"]))
    if unknown:
        logger.warning(
            "The checkpoint %s holds %d weights that the model of its config does not have, such as %s. They are "
            "ignored, and the output does not have them.",
            name,
            len(unknown),
            unknown[0],
        )


def _refuse_gguf(name: str) -> None:
    folder = checked_path(name, UniEraseError, "model")
    found = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if found and not (folder / "config.json").is_file():
        raise ArchitectureError(
            f"{name!r} holds weights in GGUF alone ({found[0].name}), mostly quantised ones, which a closed-form edit "
            "cannot change. Load the original bf16, fp16 or fp32 weights, edit them, and convert the result to GGUF."
        )


def _refuse_config(name: str, config: Any) -> None:
    """Before gigabytes are read."""
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{name!r} is a sequence-to-sequence model ({config.model_type}). "
            "UniErase edits decoder-only language models."
        )
    dequantising(name, config)


def refuse_drawn(name: str, model: Any, found: Mapping[str, Any]) -> None:
    """Raises UniEraseError if `model` has weights that its checkpoint lacks. `found` is transformers' loading info.

    transformers draws such weights at random and reports it only in a table. A tied weight counts as present.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    drawn = {str(key) for key in found["missing_keys"]} & weights.keys()
    # A tied weight is not in the file. It is the weight that it is tied to.
    held = {id(weight) for key, weight in weights.items() if key not in drawn}
    missing = sorted(key for key in drawn if id(weights[key]) not in held)
    if not missing:
        return
    named = ", ".join(missing[:NAMED]) + (" and others" if len(missing) > NAMED else "")
    unknown = sorted(map(str, found["unexpected_keys"]))
    instead = f" It has {unknown[0]} instead, which the model does not know." if unknown else ""
    raise UniEraseError(
        f"The checkpoint {name!r} does not hold {named}: {len(missing)} of {len(weights)} weights would be drawn at "
        f"random.{instead} Save the model anew: without its wrapper (a compiled model's is model._orig_mod, that of "
        "data parallel training model.module), with all its weights, and with the config that fits them."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"
