"""Makes what transformers 5 saves readable by earlier releases too, which other harnesses are pinned to.

Without it they read a rotary embedding's base as the family's default, which gives other logits and no error, and know
neither the tokenizer's class nor its list of special tokens nor where the chat template is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_for_older_readers(folder: Path) -> None:
    """Adds the older names to config.json and tokenizer_config.json where these are there, the chat template too."""
    template = folder / "chat_template.jinja"
    _rewritten(folder / "config.json", _with_older_rotary)
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


def _with_older_rotary(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` beside `rope_parameters`; not where each kind of layer has its own."""
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, dict) or "rope_theta" not in rotary:
        return config
    scaling = {name: value for name, value in rotary.items() if name != "rope_theta"}
    added: dict[str, Any] = {"rope_theta": rotary["rope_theta"]}
    if scaling.get("rope_type", "default") != "default":
        added["rope_scaling"] = scaling
    if "dtype" in config:
        added["torch_dtype"] = config["dtype"]
    return {**added, **config}


def _with_older_class(config: dict[str, Any]) -> dict[str, Any]:
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = changed.get("extra_special_tokens")
    if isinstance(special, list):
        del changed["extra_special_tokens"]
        changed["additional_special_tokens"] = special
    return changed
