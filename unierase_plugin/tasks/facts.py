"""Facts as an lm-eval task: a question for each document, greedy answers, and this package's metrics of their text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from datasets import Dataset
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from ..errors import UniEraseError
from ..evaluation.metrics import answered, is_fluent, reads_as_idk, rouge_l_recall
from ..hparams import UniEraseHyperParams
from ..locate_then_edit.positions import PLAIN_FORM
from ..plugins import registry
from ..readers import read_requests
from ..request import ForgetRequest
from ..resources import demo_facts, lines

#: Whether more is better on facts to forget; the other way round on facts to keep.
DIRECTIONS = {"answered": False, "rougeL_recall": False, "idk_rate": True, "token_first": True}


@dataclass(frozen=True)
class Settings:
    """What tasks read of lm-eval's `--metadata`; docs/tasks.md describes each."""

    unlearning_token: str = UniEraseHyperParams.unlearning_token
    token_shown: bool = False
    data_dir: str | None = None
    return_dir: str | None = None
    reference: str | Mapping[str, str] | None = None
    truth_ratio: str = "geometric"
    end_counts: bool = True
    semantic: bool | Mapping[str, str] = False


#: Their keys, and those that say whose tokens are counted.
SETTINGS = frozenset({field.name for field in fields(Settings)} | {"tokenizer", "pretrained", "revision"})


class Facts(ConfigurableTask):  # type: ignore[misc]
    """A task over the facts that `dataset_kwargs.facts` names: `demo:forget`, `demo:retain` or a forget spec.

    `dataset_kwargs.role` is `forget` or `keep`, and gives the metrics a direction.
    """

    chat = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        # `class` brought lm-eval here; its TaskConfig does not know the key.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        metadata = self.config.metadata or {}
        known = {field.name for field in fields(Settings)}
        self.settings = Settings(**{name: value for name, value in metadata.items() if name in known})
        self.token_shown = self.settings.token_shown
        self.role = (dataset_kwargs or {}).get("role")
        self.dataset = {"test": Dataset.from_list(self.documents(dataset_kwargs or {}))}

    def documents(self, dataset_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The task's documents, each with `question` and `answer`."""
        return [{"question": f.question, "answer": f.answer} for f in _read(dataset_kwargs["facts"])]

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        if key == "num_fewshot" and value:
            raise UniEraseError(
                f"{self.config.task} asks without examples, but --num_fewshot is {value}: its questions are about "
                "facts of their own, and an example gives some away. Leave it out; run tasks that need it separately."
            )
        super().set_config(key, value, update)

    def build_all_requests(self, *, chat_template: Callable[..., str] | None = None, **options: Any) -> None:
        # A model's own method renders the template, so the model is at hand where there is one.
        self.prepare(getattr(chat_template, "__self__", None), bool(options.get("apply_chat_template")))
        # lm-eval keeps built requests by the task's name, whatever folder the facts came from.
        options["cache_requests"] = False
        super().build_all_requests(chat_template=chat_template, **options)

    def prepare(self, model: Any, chat: bool) -> None:
        """Takes note of how the model will be asked; without a chat template lm-eval does not show `model` to tasks."""
        self.chat = chat
        self.token_shown = self.token_shown or getattr(model, "shows_special_tokens", False)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        """The prompt: the question as it is in a chat, or in the plain form in which `unierase run` asks it."""
        # lm-eval before 0.4.10 says it by position.
        if not (self.chat or kwargs.get("apply_chat_template")):
            doc = {**doc, "question": PLAIN_FORM.format(question=doc["question"])}
        return super().fewshot_context(doc, num_fewshot, *args, **kwargs)

    def process_results(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        if "bypass" in self._metric_fn_list:
            # --predict_only
            return {"bypass": 999}
        return self.measure(doc, results)

    def measure(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """The metrics of a document, from its requests' results in order."""
        return self.measure_text(doc, results[0])

    def measure_text(self, doc: Mapping[str, Any], generated: str) -> dict[str, float]:
        """Metrics of one generation, of which the unlearning token is taken out before it is compared."""
        said = " ".join(self.plain(generated).split())
        measured = {
            "answered": float(answered(doc["answer"], said, doc["question"])),
            "rougeL_recall": rouge_l_recall(doc["answer"], said),
            "idk_rate": float(reads_as_idk(said, lines("idk_phrases"))),
            "gibberish": float(not is_fluent(said)),
        }
        if self.token_shown:
            measured["token_first"] = float(generated.lstrip().startswith(self.settings.unlearning_token))
        return measured

    def plain(self, generated: str) -> str:
        """A generation without the unlearning token."""
        return generated.replace(self.settings.unlearning_token, " ")

    def aggregation(self) -> dict[str, Callable[..., float]]:
        return dict.fromkeys((*DIRECTIONS, "gibberish", "bypass"), mean)

    def higher_is_better(self) -> dict[str, bool | None]:
        forget = self.role == "forget"
        directions = {name: better == forget if self.role else None for name, better in DIRECTIONS.items()}
        return {**directions, "gibberish": False}


def _read(spec: str) -> Sequence[ForgetRequest]:
    source, _, part = spec.partition(":")
    return read_requests(demo_facts()[part] if source == "demo" else spec, registry().readers)
