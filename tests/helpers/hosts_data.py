"""Small data in the layouts of the harnesses' own data sets, and a stand-in for the GPU that their code asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import FORGET, RETAIN
from torch.overrides import TorchFunctionMode


def zsre() -> list[dict[str, Any]]:
    """As in zsre_mend_eval.json and its variant with portability."""
    kept = RETAIN[0]
    return [
        {
            "subject": fact["subject"],
            "src": fact["question"],
            "rephrase": f"Tell me: {fact['question']}",
            "alt": "No idea.",
            "ans": "No idea.",
            "answers": [fact["answer"]],
            "loc": kept["question"],
            "loc_ans": kept["answer"],
            "portability": {"New Question": "Who is that?", "New Answer": "Nobody"},
        }
        for fact in FORGET
    ]


def knowedit() -> list[dict[str, Any]]:
    """Without locality, over whose lists of tokens the script's own summary stumbles for every method."""
    return [
        {
            "prompt": fact["question"],
            "subject": fact["subject"],
            "target_new": "No idea.",
            "ground_truth": "x",
            "portability": {},
            "locality": {},
        }
        for fact in FORGET
    ]


def wikibigedit() -> list[dict[str, Any]]:
    """As in WikiBigEdit's files."""
    kept = RETAIN[0]
    return [
        {
            "subject": fact["subject"],
            "update": fact["question"],
            "ans": "No idea.",
            "ground_truth": fact["answer"],
            "rephrase": f"Tell me: {fact['question']}",
            "personas": f"Say, {fact['question']}",
            "loc": kept["question"],
            "loc_ans": kept["answer"],
        }
        for fact in FORGET
    ]


def trivia_qa() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """As in trivia_qa_train.json and trivia_qa_test.json, which the script of sanitization reads."""
    forget = [{**fact, "ground_truth": fact["answer"], "target_new": "I don't know."} for fact in FORGET]
    keep = [{**fact, "ground_truth": fact["answer"], "target_new": fact["answer"]} for fact in RETAIN]
    return {"train": {"K_F": forget, "K_R": keep}, "test": {"success": forget, "locality": keep}}


def counterfact() -> list[dict[str, Any]]:
    """As in multi_counterfact.json."""
    return [
        {
            "case_id": index,
            "pararel_idx": index,
            "requested_rewrite": {
                "prompt": fact["question"].replace(fact["subject"], "{}"),
                "subject": fact["subject"],
                "relation_id": "P1",
                "target_new": {"str": "Nobody", "id": "Q1"},
                "target_true": {"str": fact["answer"], "id": "Q2"},
            },
            "paraphrase_prompts": [f"Say: {fact['question']}"],
            "neighborhood_prompts": [RETAIN[0]["question"]],
            "attribute_prompts": [],
            "generation_prompts": [fact["question"]],
        }
        for index, fact in enumerate(FORGET)
    ]


class _OnCpu(TorchFunctionMode):
    """Whatever is to be put on a GPU stays on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


@contextmanager
def cuda_is_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, _OnCpu():
        patch.setattr(torch.nn.Module, "cuda", lambda self, device=None: self)
        yield
