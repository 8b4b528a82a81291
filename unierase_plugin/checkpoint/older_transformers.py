"""Makes files that transformers 5 saves readable by earlier releases, since other harnesses are pinned to these.

Without it, earlier releases take a default for the base of the rotary embedding: the logits are wrong, without an
error. They do not know the tokenizer's class, its list of special tokens, and where the chat template is. And they
give the model token types, which most models refuse and GPT-2 adds to its embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The names in a family's configuration for the rotary embedding's base and for the share of a head that is rotated.
OLDER_ROTARY = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))


def write_for_older_transformers(folder: Path) -> None:
    """Adds the older names to config.json and tokenizer_config.json, if these exist, and the chat template."""
    template = folder / "chat_template.jinja"
    _rewritten(folder / "config.json", _with_older_names)
    _rewritten(folder / "tokenizer_config.json", _with_older_class)
    if template.is_file():
        text = template.read_text(encoding="utf-8")
        _rewritten(folder / "tokenizer_config.json", lambda config: {"chat_template": text, **config})


def _rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    after = change(before)
    if after != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Adds `rope_theta` and related keys beside `rope_parameters`, and `torch_dtype` beside `dtype`."""
    added: dict[str, Any] = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rotary = config.get("rope_parameters") or {}
    # If each kind of layer has its own parameters, the older base and scaling are those of full attention.
    local = rotary.get("sliding_attention") or {}
    rotary = rotary.get("full_attention") or rotary
    if "rope_theta" in local:
        added["rope_local_base_freq"] = local["rope_theta"]
    theta, share = OLDER_ROTARY.get(str(config.get("model_type")), ("rope_theta", "partial_rotary_factor"))
    for name, older in (("rope_theta", theta), ("partial_rotary_factor", share)):
        if name in rotary:
            added[older] = rotary[name]
    if theta in added:
        added["rope_theta"] = added[theta]
        scaling = {name: value for name, value in rotary.items() if name != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            added["rope_scaling"] = scaling
    return {**added, **config}


def _with_older_class(config: dict[str, Any]) -> dict[str, Any]:
    changed = dict(config)
    if changed.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Other tokenizer classes know their model's inputs.
        changed.setdefault("model_input_names", ["input_ids", "attention_mask"])
    special = changed.get("extra_special_tokens")
    if isinstance(special, list):
        del changed["extra_special_tokens"]
        changed["additional_special_tokens"] = special
    return changed
