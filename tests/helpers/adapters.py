"""An exported adapter, opened as its README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM


def attach(root: Path, adapter: Path) -> tuple[Any, Any]:
    """The untouched base, and the adapter on a copy of it, by the lines of the adapter's README."""
    lines = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    names: dict[str, Any] = {}
    code = lines[1].replace(f'"{adapter.name}"', repr(str(adapter)))
    assert code.count("\n") <= 6
    exec(code, names)
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype="auto")
    return base.eval(), names["model"].eval()
