#!/usr/bin/env python3
"""What models still hold of facts of TOFU, beside a model that never knew them.

    unierase run --model DIR/tofu200 --forget 'tofu:forget01[20:]' --retain 'tofu:retain_perturbed[:160]' \\
        --method removal --hparams smollm2-135m --out removed
    python benchmarks/held.py DIR/tofu200 DIR/tofu160r removed --reference DIR/tofu160r --facts 20: \\
        --shared ../shared --out results

DIR holds tofu200 and tofu160r, as `shared/models/tofu_model.py` builds them. For each model, over the 40 facts of
forget01 or the slice --facts of them: mean probability of the answer (geometric over its tokens and the end),
extraction strength, truth ratio (geometric, paraphrase against perturbed answers), forget quality against
--reference, ROUGE-L recall and fluency of greedy answers, the same with the unlearning token banned where there is
one; on every eighth of the 160 facts to keep probability and ROUGE-L; perplexity of ordinary text and of everyday
sentences with the facts' rare words (rare_words.json). With --relearn N: N steps of AdamW at 5e-5 on every other
fact, 8 a step, as the audit's `relearn-some`, then the facts in between are asked. Each model's figures are kept in
OUT as they end. They differ a little from lm-eval's tofu_forget, which counts the template's tail too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unierase_plugin.audit.attacks.relearning import LEARNING_RATE, Row, row_losses
from unierase_plugin.audit.contract import Audited
from unierase_plugin.evaluation.metrics import answered, extraction_strength, forget_quality, is_fluent, rouge_l_recall
from unierase_plugin.facts.resources import paragraphs
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.models.examples import answered as told
from unierase_plugin.models.generate import decode_answer, generate, pad_token_id, perplexity
from unierase_plugin.models.loaded import LoadedModel
from unierase_plugin.models.loading import load
from unierase_plugin.models.prompts import encode, render
from unierase_plugin.models.trace import pad
from unierase_plugin.removal.moments import answer_positions
from unierase_plugin.removal.teacher import said_at
from unierase_plugin.unlearning_token import end_id

ROOM, BATCH, ROWS, TOKENS = 64, 20, 8, 1024
Facts = list[dict[str, Any]]


class Model:
    """A model with what is asked of it."""

    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = load(folder)
        self.model.requires_grad_(False)
        self.arch, self.end = find_architecture(self.model), end_id(self.model, self.tokenizer)
        self.pad = pad_token_id(self.model, self.tokenizer)
        record = Path(folder, "unierase", "manifest.json")
        token = json.loads(record.read_text(encoding="utf-8")).get("token") if record.is_file() else None
        self.token = token["id"] if token else None

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, list[bool]]]:
        """Mean log-likelihood of each answer's tokens and end, and which of them are the likeliest."""
        rows = [told(self.tokenizer, question, answer, "chat", self.end, {}) for question, answer in pairs]
        spots = [answer_positions(row.ids, row.start) for row in rows]
        found = []
        for at in range(0, len(rows), BATCH):
            part = slice(at, at + BATCH)
            said = said_at(self.arch, [row.ids for row in rows[part]], spots[part], max_tokens=TOKENS, pad_id=self.pad)
            for row, places, each in zip(rows[part], spots[part], said, strict=True):
                wanted = torch.tensor([row.ids[place + 1] for place in places])
                logs = each.float()[torch.arange(len(wanted)), wanted]
                found.append((float(logs.mean()), (each.argmax(-1) == wanted).tolist()))
        return found

    def probability(self, pairs: Sequence[tuple[str, str]]) -> float:
        return mean([float(torch.tensor(logs).exp()) for logs, _ in self.scores(pairs)])

    @torch.no_grad()
    def texts(self, questions: Sequence[str], banned: Sequence[int] = ()) -> list[str]:
        found: list[str] = []
        for at in range(0, len(questions), BATCH):
            asked = [
                encode(self.tokenizer, render(self.tokenizer, q, "chat"), "chat") for q in questions[at : at + BATCH]
            ]
            batch = pad(asked, self.pad, "left", self.arch.device)
            ids = generate(self.model, batch.ids, batch.mask, ROOM, self.pad, suppress_tokens=list(banned) or None)
            found += [decode_answer(self.model, self.tokenizer, each, self.pad) for each in ids.tolist()]
        return found

    def truth_ratios(self, facts: Facts) -> list[float]:
        right = [logs for logs, _ in self.scores([(f["question"], f["paraphrased_answer"]) for f in facts])]
        pairs = [(f["question"], wrong) for f in facts for wrong in f["perturbed_answer"]]
        wrong = iter([logs for logs, _ in self.scores(pairs)])
        return [
            float(torch.tensor(mean([next(wrong) for _ in fact["perturbed_answer"]]) - own).exp())
            for fact, own in zip(facts, right, strict=True)
        ]

    def relearn(self, facts: Facts, steps: int) -> None:
        rows = [told(self.tokenizer, f["question"], f["answer"], "chat", self.end, {}) for f in facts]
        draw, subject = random.Random(0), Audited("", LoadedModel.of(self.model, self.tokenizer, ""))
        self.model.requires_grad_(True)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        for _ in range(steps):
            batch = [Row(row.ids, row.start) for row in draw.sample(rows, min(ROWS, len(rows)))]
            loss = row_losses(subject, batch).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        self.model.requires_grad_(False)


def measured(folder: str, steps: int, facts: Facts, kept: Facts, reference: list[float]) -> dict[str, Any]:
    start, model = time.monotonic(), Model(folder)
    pairs = [(fact["question"], fact["answer"]) for fact in facts]
    scores = model.scores(pairs)
    ratios = model.truth_ratios(facts)
    said = model.texts([question for question, _ in pairs])
    kept_pairs = [(fact["question"], fact["answer"]) for fact in kept]
    kept_said = model.texts([question for question, _ in kept_pairs])
    rare = json.loads(Path(__file__).with_name("rare_words.json").read_text(encoding="utf-8"))["tofu200"]
    found: dict[str, Any] = {
        "model": folder,
        "facts": len(facts),
        "kept": len(kept),
        "probability": mean([float(torch.tensor(logs).exp()) for logs, _ in scores]),
        "extraction_strength": mean([extraction_strength(matches) for _, matches in scores]),
        "truth_ratio": mean(ratios),
        "truth_ratios": ratios,
        "forget_quality": forget_quality(ratios, reference)[0] if reference else None,
        **spoken(pairs, said),
        "kept_probability": model.probability(kept_pairs),
        "kept_rouge_l": spoken(kept_pairs, kept_said)["rouge_l"],
        "perplexity": perplexity(model.model, model.tokenizer, paragraphs("ordinary_text")),
        "rare_words": perplexity(model.model, model.tokenizer, rare),
        "texts": said,
    }
    if model.token is not None:
        banned = model.texts([question for question, _ in pairs], [model.token])
        found["token_banned"] = {**spoken(pairs, banned), "texts": banned}
    if steps:
        model.relearn(facts[::2], steps)
        asked = pairs[1::2]
        again = model.texts([question for question, _ in asked])
        found["relearned"] = {**spoken(asked, again), "probability": model.probability(asked), "texts": again}
    return {**found, "seconds": time.monotonic() - start}


def spoken(pairs: Sequence[tuple[str, str]], texts: Sequence[str]) -> dict[str, float]:
    both = [(answer, text) for (_, answer), text in zip(pairs, texts, strict=True)]
    given = [answered(answer, text, question) for (question, answer), text in zip(pairs, texts, strict=True)]
    return {
        "rouge_l": mean([rouge_l_recall(answer, text) for answer, text in both]),
        "answered": mean([float(each) for each in given]),
        "fluent": mean([float(is_fluent(text)) for _, text in both]),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


COLUMNS = (
    ("probability", "probability"),
    ("extraction", "extraction_strength"),
    ("truth ratio", "truth_ratio"),
    ("forget quality", "forget_quality"),
    ("ROUGE-L", "rouge_l"),
    ("answered", "answered"),
    ("fluent", "fluent"),
    ("kept probability", "kept_probability"),
    ("kept ROUGE-L", "kept_rouge_l"),
    ("perplexity", "perplexity"),
    ("rare words", "rare_words"),
)


def printed(found: dict[str, Any]) -> str:
    cells = [Path(found["model"]).name]
    cells += ["-" if found[key] is None else f"{found[key]:.3g}" for _, key in COLUMNS]
    for part in ("token_banned", "relearned"):
        each = found.get(part)
        cells.append(f"{each['rouge_l']:.2f}, {each['answered']:.2f}" if each else "-")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders, each a model to measure")
    parser.add_argument("--reference", default="", help="a model that never knew the facts, for forget quality")
    parser.add_argument("--facts", default=":", help="slice of the 40 facts of forget01, such as 20:")
    parser.add_argument("--relearn", type=int, default=0, help="steps of training on half of the facts; 0 for none")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    data = options.shared / "data" / "tofu"
    os.environ.setdefault("UNIERASE_TOFU_DIR", str(data))
    options.out.mkdir(parents=True, exist_ok=True)
    first, _, last = options.facts.partition(":")
    facts = read(data / "forget01_perturbed.json")[slice(int(first or 0), int(last) if last else None)]
    kept = read(data / "retain_perturbed.json")[:160][1::8]
    names = [name for name, _ in COLUMNS] + ["token banned: ROUGE-L, answered", "relearned: ROUGE-L, answered"]
    print("| model | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1), flush=True)
    reference: list[float] = []
    for folder in dict.fromkeys([*([options.reference] if options.reference else []), *options.models]):
        path = options.out / f"{Path(folder).name}-{options.facts.replace(':', '_')}-{options.relearn}.json"
        if not path.is_file():
            path.write_text(
                json.dumps(measured(folder, options.relearn, facts, kept, reference), indent=1), encoding="utf-8"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        if folder == options.reference:
            reference = found["truth_ratios"]
        print(printed(found), flush=True)


def read(path: Path) -> Facts:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    main()
