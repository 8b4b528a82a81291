"""EasyEdit's release of 2023, with what it wants of the packages of its day: run as a program, it edits and reports.

    pip install --no-deps --target DIR easyeditor==0.0.1.dev0
    UNIERASE_EASYEDIT_DIR=DIR python tests/helpers/easyedit_release.py SCRATCH

It imports three names that transformers no longer has, and puts everything on a GPU. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from easyedit_host import import_easyedit
from hosts_data import cuda_is_cpu
from small import FORGET, SHORT, save_base, shrink

from unierase_plugin.hosts import easyedit
from unierase_plugin.hosts.easyedit import EasyEditHyperParams

PROMPTS, SUBJECTS = [fact["question"] for fact in FORGET], [fact["subject"] for fact in FORGET]
GONE = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")


def edited(scratch: Path) -> dict[str, Any]:
    """Whether each way of editing left the model as it should, and what was measured."""
    for name in GONE:
        if not hasattr(transformers.modeling_utils, name):
            setattr(transformers.modeling_utils, name, None)
    import_easyedit()
    easyedit.register()
    from easyeditor import BaseEditor

    base = save_base(scratch / "tiny-llama")
    editor = BaseEditor.from_hparams(EasyEditHyperParams(**SHORT, model_name=str(base), device="cpu"))
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}

    def as_before() -> bool:
        now = editor.model.state_dict()
        return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)

    metrics, *_ = editor.edit(prompts=PROMPTS, subject=SUBJECTS, ground_truth=["x"] * 2, keep_original_weight=False)
    single = as_before()
    editor.hparams.batch_size = 2
    editor.batch_edit(prompts=PROMPTS, target_new=[None] * 2, subject=SUBJECTS, ground_truth=["x"] * 2)
    return {"single": single, "batch": as_before(), "measured": sorted(metrics[0]["post"])}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch, cuda_is_cpu():
        shrink(patch, folder / "cache")
        report = edited(folder)
    sys.stdout.write(json.dumps(report) + "\n")
