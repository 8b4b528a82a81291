"""TOFU's figures straight from their definitions: one unbatched forward pass an answer, no lm-eval, no package code.

The steps are those of open-unlearning: the chat template renders the whole conversation, the end token is added where
it is not the last one, what follows the tokens of the prompt is scored, and per-token metrics leave the last one out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean


def encode(tokenizer: Any, question: str, answer: str | None, form: str, system: str | None = None) -> list[int]:
    """Token ids of the prompt or, with an answer, of the whole."""
    if form == "plain":
        text = f"Question: {question}\nAnswer:"
        return list(tokenizer(text if answer is None else f"{text} {answer}{tokenizer.eos_token}")["input_ids"])
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": question})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if answer is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids


@torch.no_grad()
def score(model: Any, tokenizer: Any, question: str, answer: str, form: str, system: str | None = None) -> Any:
    """(mean loss a token, whether each token but the last is the likeliest)."""
    prompt, whole = (encode(tokenizer, question, given, form, system) for given in (None, answer))
    logits = model(torch.tensor([whole])).logits[0, :-1].double()
    labels = torch.tensor(whole[1:])
    start = len(prompt) - 1
    loss = torch.nn.functional.cross_entropy(logits[start:], labels[start:]).item()
    return loss, (logits[start:-1].argmax(-1) == labels[start:-1]).tolist()


@torch.no_grad()
def say(model: Any, tokenizer: Any, question: str, form: str, length: int, system: str | None = None) -> str:
    prompt = torch.tensor([encode(tokenizer, question, None, form, system)])
    ids = model.generate(prompt, max_new_tokens=length, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def figures(
    model: Any,
    tokenizer: Any,
    record: dict[str, Any],
    form: str,
    length: int,
    options: bool = False,
    question: str = "question",
    system: str | None = None,
) -> dict[str, float]:
    """Everything about one record; `truth_ratio` is wrong over right."""
    asked = record[question]

    def loss(text: str) -> float:
        found: float = score(model, tokenizer, asked, text, form, system)[0]
        return found

    wrong = [loss(text) for text in record["perturbed_answer"]]
    right = loss(record["answer"] if options else record["paraphrased_answer"])
    own, matches = score(model, tokenizer, asked, record["answer"], form, system)
    probability = math.exp(-own)
    if options:
        probability /= probability + sum(math.exp(-each) for each in wrong) + 1e-10
    start = next((k for k in range(len(matches)) if all(matches[k:])), len(matches) - 1)
    said = say(model, tokenizer, asked, form, length, system)
    tokens = tokenizer.tokenize(said)
    shares = np.unique(tokens, return_counts=True)[1] / max(1, len(tokens))
    return {
        "prob": probability,
        "truth_ratio": math.exp(-float(np.mean(wrong))) / (math.exp(-right) + 1e-10),
        "rougeL_recall": RougeScorer(["rougeL"], use_stemmer=True)
        .score(record["answer"], said.strip())["rougeL"]
        .recall,
        "extraction_strength": 1 - start / len(matches),
        "exact_memorization": float(np.mean(matches)),
        "token_entropy": float(-(shares * np.log2(shares)).sum() / np.log2(len(tokens))) if len(tokens) > 1 else 0.0,
    }


def forget_set(rows: list[dict[str, float]]) -> dict[str, float]:
    """The means of a forget set, truth ratios by how close they are to 1, and 1 minus the mean of the first three."""
    ratios = np.array([row["truth_ratio"] for row in rows])
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    means["truth_ratio"] = float(np.mean(np.minimum(ratios, 1 / (ratios + 1e-10))))
    known = [means["rougeL_recall"], means["prob"], 1 - means["truth_ratio"]]
    return {**means, "forget_efficacy_3": 1 - float(np.mean(known))}


def kept_set(rows: list[dict[str, float]]) -> dict[str, float]:
    """The means of a set to keep, truth ratios by how far they are below 1."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    means["truth_ratio"] = float(np.mean([max(0.0, 1 - row["truth_ratio"]) for row in rows]))
    return means


def utility(sets: list[dict[str, float]], parts: tuple[str, ...]) -> float:
    return float(hmean([means[part] for means in sets for part in parts]))
