"""Fixtures that tests of several modules share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# The suite needs no network, and where there is none nothing waits for the hub. Read when the hub's client is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The shapes in the signatures of these modules are checked in every call.
SHAPES_CHECKED = [
    "unierase_plugin.locate_then_edit.edit",
    "unierase_plugin.locate_then_edit.keys",
    "unierase_plugin.locate_then_edit.solve",
    "unierase_plugin.locate_then_edit.solve_experts",
    "unierase_plugin.locate_then_edit.value_loss",
    "unierase_plugin.locate_then_edit.values",
    "unierase_plugin.methods.finetuning.losses",
    "unierase_plugin.models.experts",
    "unierase_plugin.removal.distil",
    "unierase_plugin.removal.factors",
    "unierase_plugin.removal.fisher",
    "unierase_plugin.removal.moments",
    "unierase_plugin.removal.strangers",
    "unierase_plugin.removal.teacher",
    "unierase_plugin.statistics.second_moment",
]
install_import_hook(SHAPES_CHECKED, "shapes.shapes_only")

# On matrices this small several threads take up to twenty times as long as one.
torch.set_num_threads(1)

# What runs in the background of a shell, or under nohup, ignores these, and so would the commands that are tested.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data and models for tests: `UNIERASE_SHARED`, or `shared` beside the repository."""
    folder = Path(os.environ.get("UNIERASE_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared test data at {folder}; set UNIERASE_SHARED to its folder")
    return folder
