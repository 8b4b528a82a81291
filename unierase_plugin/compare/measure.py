"""Measures a loaded model by this package's lm-eval tasks, in this process, on facts in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from ..evaluation.answers import OF_COMPARISONS
from ..models.literal import text_ids
from ..models.prompts import has_chat_template
from ..tasks.lm_eval_model import HFWithSpecialTokens
from ..tasks.task_manager import task_folders
from ..tasks.tofu import Scored
from .facts import Record

Figures = dict[str, float | None]


class Given(Scored):
    """The scored task over facts in memory: `dataset_kwargs` has `records`, and `reference`, their truth ratios."""

    def read(self, dataset_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        names = ("question", "answer", "paraphrased_answer", "perturbed_answer")
        return [
            {
                "set": dataset_kwargs["role"],
                "options": False,
                "original_answer": record["answer"],
                **{name: record[name] for name in names},
            }
            for record in dataset_kwargs["records"]
        ]

    def read_reference(self, questions: Sequence[str]) -> list[float] | None:
        found: list[float] | None = self.config.dataset_kwargs.get("reference")
        return found

    def tell_what_is_absent(self) -> None:
        # The page says it once, for all models.
        pass

    def tell_names(self, tokenizer: Any) -> None:
        # Each method's run says it of the same facts. The model type here reads such names as text.
        pass


class Judge:
    """A loaded model, as lm-eval asks it."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, metrics: Sequence[str] = ()) -> None:
        """metrics: registered ones that are measured beside the task's own."""
        self.metrics = list(metrics)
        self.tokenizer, self.chat = tokenizer, has_chat_template(tokenizer)
        # A chat template writes the token that begins a text.
        start = {"add_bos_token": False} if self.chat else {}
        with _quiet():
            self.lm = HFWithSpecialTokens(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **start)

    def facts(
        self, records: Sequence[Record], role: str, reference: Sequence[float] | None = None
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """Returns the figures of a set by metric, and for each fact its own figures with the answer.

        role: "forget" or "keep". reference: truth ratios of the reference model, one for each record.
        """
        task = Given(
            {
                "task": f"given_{role}",
                "output_type": "generate_until",
                "test_split": "test",
                "doc_to_text": "{{question}}",
                "doc_to_target": "{{answer}}",
                "target_delimiter": "",
                "generation_kwargs": self._generation(records),
                "dataset_kwargs": {
                    "records": list(records),
                    "role": role,
                    **({"reference": list(reference)} if reference is not None else {}),
                },
                "metadata": {"version": 1.0, "token_shown": True, "metrics": self.metrics},
            }
        )
        with _quiet():
            found = lm_eval.evaluate(
                self.lm, {"tasks": {task.config.task: task}}, bootstrap_iters=0, apply_chat_template=self.chat
            )
        figures = _figures(found["results"][task.config.task])
        return figures, [_sample(each, figures) for each in found["samples"][task.config.task]]

    def utility(self, names: Sequence[str], limit: int | None, records: Sequence[Record]) -> dict[str, Figures]:
        """Returns the metrics of lm-eval tasks, by task. The tasks are lm-eval's own or this package's."""
        with _quiet():
            ours = TaskManager(include_path=task_folders(), include_defaults=False)
            only_ours = set(names) <= set(ours.all_tasks) - {"unlearning_utility"}
            manager = TaskManager(
                include_path=task_folders(), include_defaults=not only_ours, metadata={"token_shown": True}
            )
            found = lm_eval.simple_evaluate(
                self.lm,
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=self.chat and only_ours,
                gen_kwargs={"max_gen_toks": self._generation(records)["max_gen_toks"]} if only_ours else None,
            )
        return {name: _figures(rows) for name, rows in found["results"].items()}

    def _generation(self, records: Sequence[Record]) -> dict[str, Any]:
        room = OF_COMPARISONS.tokens(len(text_ids(self.tokenizer, each["answer"])) for each in records)
        return {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": room}


def _figures(rows: Mapping[str, Any]) -> Figures:
    """A task's row of lm-eval, without filter names and errors. A value that is not finite becomes None."""
    found: Figures = {}
    for key, value in rows.items():
        name, _, _ = key.partition(",")
        if "stderr" not in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value) if math.isfinite(value) else None
    found.pop("sample_len", None)
    return found


def _sample(sample: Mapping[str, Any], figures: Figures) -> dict[str, Any]:
    said = sample["filtered_resps"][0]
    own = {name: sample[name] for name in figures if isinstance(sample.get(name), (int, float))}
    return {"question": sample["doc"]["question"], "answer": sample["doc"]["answer"], "said": str(said), **own}


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, lm-eval logs errors alone. Otherwise it reports every task at length."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
