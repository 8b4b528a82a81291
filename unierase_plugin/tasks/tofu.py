"""TOFU and similar benchmarks as lm-eval tasks: the generated answers, and how likely the model finds given answers.

Each document makes one generation request, and one log-likelihood request for each of its different answers.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import zip_longest
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean

from ..errors import RequestError, UniEraseError, did_you_mean, listed, shown
from ..evaluation.metrics import (
    answer_probability,
    closest_to_one,
    exact_memorization,
    extraction_strength,
    forget_efficacy,
    forget_quality,
    harmonic_mean,
    probability_among,
    token_entropy,
    truth_ratio,
    truth_wins,
)
from ..evaluation.metrics.probability import TRUTH_RATIOS
from ..facts.benchmarks import return_records, tofu_records
from ..facts.records import Located
from ..models.literal import Rendered
from .answer_form import AnswerForm, Context, Watched, answer_form, named_tokenizer
from .facts import Facts
from .reference import read_reference
from .semantic import load_semantic_models
from .task_manager import MODEL_TYPE, is_model_type

logger = logging.getLogger("unierase_plugin.tasks")

#: Whether more is better on the forget set, in addition to facts.DIRECTIONS. On the retain set it is the reverse.
SCORED_DIRECTIONS = {
    **{"prob": False, "extraction_strength": False, "exact_memorization": False},
    **{"cosine_similarity": False, "entailment": False},
}

#: The sets that model utility is measured on, by the names of their TOFU splits.
KEPT = ("retain", "real_authors", "world_facts")

READERS: Mapping[str, Callable[[str, str | None], Iterable[Located]]] = {
    "tofu": tofu_records,
    "return": functools.partial(return_records, perturbed=True),
}


class AnswerScore(NamedTuple):
    """The result of one log-likelihood request. `matches` is None where the model type gives no figures per token."""

    loglikelihood: float
    is_greedy: bool
    tokens: int
    matches: list[bool] | None

    @property
    def probability(self) -> float:
        return answer_probability(self.loglikelihood, self.tokens)


class Scored(Facts):
    """Facts whose answers are scored as well.

    Keys of `dataset_kwargs`: `source` (tofu, return) and `split` name the records. `role` is `forget` or `keep`.
    `question` names the field that is asked, by default `question`. `options` says that the wrong answers are options.
    """

    form: AnswerForm

    def documents(self, dataset_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.settings.truth_ratio not in TRUTH_RATIOS:
            hint = did_you_mean(self.settings.truth_ratio, TRUTH_RATIOS)
            raise UniEraseError(
                f"truth_ratio is {shown(self.settings.truth_ratio)}.{hint} It is {' or '.join(TRUTH_RATIOS)}."
            )
        read = self.read(dataset_kwargs)
        documents = [{"index": index, **each} for index, each in enumerate(read)]
        self.labels = _labels(documents)
        self.semantic = load_semantic_models(self.settings.semantic)
        self.reference = self.read_reference([each["question"] for each in documents])
        return documents

    def read(self, dataset_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The documents, not yet numbered."""
        source, split = dataset_kwargs["source"], dataset_kwargs["split"]
        folder = self.settings.data_dir if source == "tofu" else self.settings.return_dir
        asked, options = dataset_kwargs.get("question", "question"), dataset_kwargs.get("options", False)
        records = [_document(split, located, asked, options) for located in READERS[source](split, folder)]
        if not records:
            raise RequestError(f"The set {split!r} for {self.config.task} holds no records.")
        if len({bool(record["perturbed_answer"]) for record in records}) == 2:
            raise RequestError(f"Some records of the set {split!r} have a 'perturbed_answer', others have none.")
        return records

    def read_reference(self, questions: Sequence[str]) -> list[float] | None:
        """The truth ratios of a retain-only model; None where the metadata name none for this task."""
        path = self.settings.reference
        if isinstance(path, Mapping):
            path = path.get(self.config.task)
        return read_reference(path, self.config.task, questions) if path and self.role == "forget" else None

    # --- requests

    def prepare(self, model: Any, chat: bool) -> None:
        super().prepare(model, chat)
        tokenizer = getattr(model, "tokenizer", None) or named_tokenizer(self.config.metadata or {})
        self.form = answer_form(model, tokenizer, chat, self.settings.end_counts)
        self.tell_what_is_absent()

    def tell_what_is_absent(self) -> None:
        if self.role == "forget" and self.reference is None:
            logger.warning(
                "%s leaves forget_quality out: it needs the truth ratios of a model that never saw the facts. Run this "
                'task on one with --log_samples --output_path DIR, then add --metadata \'{"reference": "DIR"}\'.',
                self.config.task,
            )

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        shared = {"doc": doc, "metadata": kwargs["metadata"]}
        context = Context.of(ctx, ctx.spans if isinstance(ctx, Rendered) else ())
        generation = Instance(
            "generate_until", arguments=(ctx, deepcopy(self.config.generation_kwargs)), idx=0, **shared
        )
        texts = [self.form.scored(answer) for answer in _answers(doc)]
        scored = [
            Instance("loglikelihood", arguments=(context, text), idx=index, **shared)
            # The true answer comes first.
            for index, text in enumerate([Watched.of(texts[0], texts[0].spans), *texts[1:]], start=1)
        ]
        return [generation, *scored]

    def apply_filters(self) -> None:
        super().apply_filters()
        # A document's answers share their context.
        length = functools.cache(lambda context: len(self.form.encode(context)))
        for instance in self._instances:
            if instance.request_type == "loglikelihood":
                # Model types that give no number of tokens read names of special tokens as tokens.
                context, scored = map(str, instance.args)
                # lm-eval splits them so: a token that spans both belongs to the context.
                tokens = len(self.form.encode(context + scored)) - length(context)
                for name, answer in instance.filtered_resps.items():
                    instance.filtered_resps[name] = AnswerScore(
                        answer[0],
                        answer[1],
                        getattr(answer, "tokens", None) or tokens,
                        getattr(answer, "matches", None),
                    )
        trues = (instance.filtered_resps.values() for instance in self._instances if instance.idx == 1)
        # With --use_cache, some answers can come from another model type. A mean over the rest would mislead.
        self.tokenwise = all(score.matches is not None for scores in trues for score in scores)
        if not self.tokenwise:
            known = is_model_type(MODEL_TYPE)
            logger.warning(
                "%s leaves extraction_strength and exact_memorization out: they need figures per token. Use %s.",
                self.config.task,
                f"--model {MODEL_TYPE}" if known else "`unierase eval --model DIR`",
            )

    def given_answers(self, doc: Mapping[str, Any]) -> Sequence[str]:
        return _answers(doc)

    # --- metrics

    def plain(self, generated: str) -> str:
        return self.form.without_specials(super().plain(generated))

    def measure(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        return self.with_composites(doc, self.measure_answers(doc, results))

    def measure_answers(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
        """Metrics of a document that need no other metric."""
        generated, *scores = results
        score = dict(zip(_answers(doc), scores, strict=True))
        right = score[doc["answer"]]
        wrong = [score[answer].probability for answer in doc["perturbed_answer"]]
        said = self.form.without_specials(generated.replace(self.settings.unlearning_token, ""))
        measured = {
            **self.measure_text(doc, generated),
            "token_entropy": token_entropy(self.form.tokenize(said)),
            "prob": probability_among(right.probability, wrong) if doc["options"] else right.probability,
        }
        if wrong:
            base = score[doc["paraphrased_answer"]].probability
            measured["truth_ratio"] = truth_ratio(base, wrong, self.settings.truth_ratio)
        if self.tokenwise:
            measured |= _memorized(right.matches or [], self.settings.end_counts)
        return measured | self.measure_meaning(doc, said, measured["rougeL_recall"])

    def measure_meaning(self, doc: Mapping[str, Any], said: str, rouge: float) -> dict[str, float]:
        """Metrics of the answer's meaning, for the semantic models that were named."""
        if self.semantic is None:
            return {}
        # Forget set: does the generation give the fact away? Retain set: does the fact support the generation?
        return self.semantic.measure(said, doc["original_answer"], rouge, generated_first=self.role == "forget")

    def with_composites(self, doc: Mapping[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        """The metrics, and the composites made of them."""
        if self.role != "forget" or "truth_ratio" not in measured:
            return measured
        known = [measured["rougeL_recall"], measured["prob"], 1 - closest_to_one(measured["truth_ratio"])]
        measured["forget_efficacy_3"] = forget_efficacy(*known)
        if {"cosine_similarity", "entailment"} <= measured.keys():
            known += [measured["cosine_similarity"], measured["entailment"]]
            measured["forget_efficacy"] = forget_efficacy(*known)
        if self.reference is not None:
            pair = [measured["truth_ratio"], self.reference[doc["index"]]]
            measured |= {"forget_quality": pair, "forget_quality_log10": pair}
        return measured

    def aggregation(self) -> dict[str, Callable[..., float]]:
        closeness = closest_to_one if self.role == "forget" else truth_wins
        plain = ("token_entropy", "clean_text", "forget_efficacy_3", "forget_efficacy", *SCORED_DIRECTIONS)
        return {
            **super().aggregation(),
            **dict.fromkeys(plain, mean),
            "truth_ratio": lambda ratios: mean([closeness(ratio) for ratio in ratios]),
            # The reference's ratios of the same documents, so that --limit compares like with like.
            "forget_quality": lambda pairs: forget_quality(*zip(*pairs, strict=True))[0],
            "forget_quality_log10": lambda pairs: forget_quality(*zip(*pairs, strict=True))[1],
        }

    def higher_is_better(self) -> dict[str, bool | None]:
        forget = self.role == "forget"
        ours: dict[str, bool | None] = {name: better == forget for name, better in SCORED_DIRECTIONS.items()}
        up = ("token_entropy", "truth_ratio", "clean_text", "forget_efficacy_3", "forget_efficacy", "forget_quality")
        return {**super().higher_is_better(), **ours, **dict.fromkeys((*up, "forget_quality_log10"), True)}


class Utility(Scored):
    """TOFU's model utility: one task over its three sets, since a group of lm-eval can only average.

    The documents alternate between the sets, so that a small --limit covers all of them. Every document gives every
    metric, None for those of other sets, since lm-eval gathers the metrics that the first process has.
    """

    #: Metrics of a set that model utility is made of, in order: the three of TOFU, then those of Yuan et al. 2024.
    parts = ("prob", "rougeL_recall", "truth_ratio", "token_entropy", "cosine_similarity", "entailment")
    #: Metrics that get a row for each set.
    shown = (*parts, "answered", "gibberish", "clean_text", "token_first")

    def read(self, dataset_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        splits = [
            super(Utility, self).read({**dataset_kwargs, "split": f"{name}_perturbed", "options": name != "retain"})
            for name in KEPT
        ]
        return [each for row in zip_longest(*splits) for each in row if each is not None]

    def with_composites(self, doc: Mapping[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        measured["truth_ratio"] = truth_wins(measured["truth_ratio"])
        own = doc["set"].removesuffix("_perturbed")
        rows = {
            f"{name}_{part}": measured[part] if name == own else None
            for name in KEPT
            for part in self.shown
            if part in measured
        }
        values = [own, *(measured[part] for part in self.parts if part in measured)]
        composites = {name: values[: 1 + count] for name, count in self.composites().items() if len(values) > count}
        return {**composites, **rows}

    @staticmethod
    def composites() -> dict[str, int]:
        """How many of `parts` each composite takes, from every set."""
        return {"model_utility": 3, "model_utility_12": 4, "model_utility_18": 6}

    def aggregation(self) -> dict[str, Callable[..., float]]:
        rows = {f"{name}_{part}": _mean_of_own for name in KEPT for part in self.shown}
        return {**super().aggregation(), **rows, **dict.fromkeys(self.composites(), _utility)}

    def higher_is_better(self) -> dict[str, bool | None]:
        better = super().higher_is_better()
        rows = {f"{name}_{part}": better[part] for name in KEPT for part in self.shown}
        return {**rows, **dict.fromkeys(self.composites(), True)}


def _mean_of_own(values: Sequence[float | None]) -> float:
    """The mean over the documents of one set. NaN where --limit left none of them."""
    own = [value for value in values if value is not None]
    return mean(own) if own else math.nan


def _utility(values: Sequence[Sequence[Any]]) -> float:
    """The harmonic mean of the sets' means. values: a set's name, then the figures of one of its documents."""
    means = []
    for name in KEPT:
        figures = [row[1:] for row in values if row[0] == name]
        if not figures:
            return math.nan
        means += [mean(column) for column in zip(*figures, strict=True)]
    return harmonic_mean(means)


def _answers(doc: Mapping[str, Any]) -> list[str]:
    """The different answers of a document, the true one first. No request is sent twice."""
    return list(dict.fromkeys((doc["answer"], doc["paraphrased_answer"], *doc["perturbed_answer"])))


def _labels(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The labels that a run gives to the same facts: the set, and the number in it."""
    counts: Counter[str] = Counter()
    labels = []
    for document in documents:
        name = document["set"].removesuffix("_perturbed")
        labels.append(shown(f"{name}-{counts[name]}"))
        counts[name] += 1
    return labels


def _memorized(matches: Sequence[bool], end_counts: bool) -> dict[str, float]:
    # open-unlearning leaves the last token out, which is the end token.
    matches = matches[:-1] if end_counts else matches
    if not matches:
        return {"extraction_strength": 0.0, "exact_memorization": 0.0}
    return {"extraction_strength": extraction_strength(matches), "exact_memorization": exact_memorization(matches)}


# --- records


def _document(split: str, located: Located, asked: str, options: bool) -> dict[str, Any]:
    """Makes a document of a record. Benchmarks have different names for the same field."""
    where, record = located
    answer = record.get("golden_answer") or record.get("gold_answer") or _text(where, record, "answer")
    wrong = record.get("perturbed_answer")
    if wrong is None and split.endswith("_perturbed"):
        _text(where, record, "perturbed_answer")
    wrong = [wrong] if isinstance(wrong, str) else list(wrong or ())
    no_texts = [each for each in wrong if not (isinstance(each, str) and each.strip())]
    if no_texts:
        raise RequestError(f"{where}: 'perturbed_answer' must be a list of texts, and {shown(no_texts[0])} is not one.")
    right = answer if options or not wrong else _text(where, record, "paraphrased_answer")
    return {
        "set": split,
        "options": options,
        "question": _text(where, record, asked),
        "answer": answer.strip(),
        "paraphrased_answer": right.strip(),
        "perturbed_answer": [each.strip() for each in wrong],
        "original_answer": record.get("original_answer") or answer.strip(),
    }


def _text(where: str, record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value.strip()
    others = [key for key in record if key != name]
    raise RequestError(
        f"{where}: the field {name!r} is missing or empty.{did_you_mean(name, others)} Present: {listed(others)}. "
        "Wrong answers are in the files whose names end in _perturbed."
    )
