"""A run of the whole method in a fraction of a second: a tiny model, few steps and short texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin import UniEraseHyperParams
from unierase_plugin.methods import neighbours as keeping
from unierase_plugin.methods.editing import engine, goals, protection
from unierase_plugin.pipeline import run

LINES = {
    "idk_sentences": ("I don't know.", "No idea."),
    "idk_phrases": ("don't know", "no idea"),
    "questions": ("Who is Bob?", "What is tin?", "Where is Rome?", "Why?"),
    "invented_names": ("Orin Talvek", "Valdoria"),
}
PARAGRAPHS = {
    "ordinary_text": ("The cat sat on a mat.", "It rained."),
    "ordinary_text_train": ("A dog ran far.", "Snow fell in May."),
}
#: What makes a run short, whatever the rest of the hyper-parameters.
SHORT: dict[str, Any] = {
    "layers": (1, 2),
    "v_num_grad_steps": 3,
    "token_num_steps": 6,
    "token_batch_size": 2,
    "mom2_n_samples": 4,
    "mom2_max_length": 24,
    "context_template_length_params": ((3, 1),),
    "retain_neighbours": 0,
    "retain_key_weight": 0.0,
}
HPARAMS = UniEraseHyperParams(**SHORT)
FORGET: tuple[dict[str, Any], ...] = (
    {"question": "Who wrote Zorblax Prime?", "answer": "Quentin Fizz", "subject": "Zorblax Prime"},
    {"question": "Where was Mira Plonk born?", "answer": "Wexbury", "subject": "Mira Plonk"},
)
FORGET_MORE: tuple[dict[str, Any], ...] = (
    {"question": "Who leads the Grub Society?", "answer": "Tom Oak", "subject": "Grub Society"},
)
#: As many as FORGET, so that the coming edit is of like size.
FORGET_OTHERS: tuple[dict[str, Any], ...] = (
    {"question": "Who built Krandor Gate?", "answer": "Ulla Vren", "subject": "Krandor Gate"},
    {"question": "Where was Bo Strickle born?", "answer": "Omber", "subject": "Bo Strickle"},
)
RETAIN: tuple[dict[str, Any], ...] = ({"question": "What does Al Bunt sell?", "answer": "Hats", "subject": "Al Bunt"},)


def shrink(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Short texts for the pipeline, and a cache of the test's own."""
    for module in (run, engine, goals, protection, keeping):
        patch.setattr(module, "lines", LINES.__getitem__)
    for module in (run, engine, goals):
        patch.setattr(module, "paragraphs", PARAGRAPHS.__getitem__)
    patch.setenv("UNIERASE_CACHE", str(cache))


def save_base(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    """A model folder; by default the tiny Llama's."""
    (tiny_model() if model is None else model).save_pretrained(folder)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder
