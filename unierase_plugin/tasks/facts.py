"""Facts as an lm-eval task: each document is a question, and this package's metrics judge the greedy answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from datasets import Dataset
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from ..errors import UniEraseError
from ..evaluation.metrics import answered, is_fluent, reads_as_idk, rouge_l_recall
from ..facts.readers import read_requests
from ..facts.request import ForgetRequest
from ..facts.resources import demo_facts, lines
from ..hparams import UniEraseHyperParams
from ..models.literal import rendered, spanned, tell_special_names
from ..models.prompts import PLAIN_FORM
from ..models.thinking import thinking_of, to_answer
from ..plugins.catalogue import BUILT_IN
from ..plugins.hookspecs import AnswerMetric
from ..plugins.registration import answer_metrics, registry
from .answer_form import named_tokenizer

#: Whether more is better on the forget set. On the retain set it is the reverse.
DIRECTIONS = {"answered": False, "rougeL_recall": False, "idk_rate": True, "token_first": True}


@dataclass(frozen=True)
class Settings:
    """The keys of lm-eval's `--metadata` that tasks read. docs/reference/tasks.md describes each."""

    unlearning_token: str = UniEraseHyperParams.unlearning_token
    token_shown: bool = False
    data_dir: str | None = None
    return_dir: str | None = None
    reference: str | Mapping[str, str] | None = None
    truth_ratio: str = "geometric"
    end_counts: bool = True
    semantic: bool | Mapping[str, str] = False
    metrics: str | Sequence[str] = ()


#: How the model types of lm-eval read names of special tokens.
NAMES_READ = (
    "`unierase eval --model DIR` and the model type unierase_hf read them as text. Other model types of lm-eval give "
    "the texts to the tokenizer, which reads the tokens."
)

#: The keys of `--metadata` that are known: those of Settings, and those that name the tokenizer.
SETTINGS = frozenset({field.name for field in fields(Settings)} | {"tokenizer", "pretrained", "revision"})


class Asked(NamedTuple):
    """A document in the form that `literal.tell_special_names` reads."""

    label: str
    question: str
    answer: str


class Facts(ConfigurableTask):  # type: ignore[misc]
    """A task over the facts that `dataset_kwargs.facts` names: `demo:forget`, `demo:retain` or a forget spec.

    `dataset_kwargs.role` is `forget` or `keep`, and gives the metrics a direction.
    """

    chat = False
    #: The tokenizer, if the model reads names of special tokens in a chat's question as text.
    reader: Any = None
    #: The names of the documents in messages: the case_id that the fact has in a run.
    labels: Sequence[str]
    #: Registered metrics that are measured beside the task's own.
    more: Sequence[AnswerMetric] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        # lm-eval found this class by the key `class`, which its TaskConfig does not know.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        metadata = self.config.metadata or {}
        known = {field.name for field in fields(Settings)}
        self.settings = Settings(**{name: value for name, value in metadata.items() if name in known})
        self.token_shown = self.settings.token_shown
        self.role = (dataset_kwargs or {}).get("role")
        self.more = self.named_metrics()
        self.dataset = {"test": Dataset.from_list(self.documents(dataset_kwargs or {}))}

    def named_metrics(self) -> Sequence[AnswerMetric]:
        """The registered metrics that the metadata name, without those that every task measures.

        Raises UniEraseError for a plugin's metric that has the name of a figure of this task.
        """
        named, own = self.settings.metrics, self.aggregation()
        names = [name.strip() for name in named.split(",")] if isinstance(named, str) else named
        found = answer_metrics([name for name in names if name])
        taken = [
            metric.name
            for metric in found
            if metric.name in own and registry().metrics.owner(metric.name).name != BUILT_IN
        ]
        if taken:
            raise UniEraseError(
                f"{self.config.task} has a figure called {taken[0]!r} already. Leave it out of `metrics`, or give the "
                "plugin's metric another name."
            )
        return [metric for metric in found if metric.name not in own]

    def documents(self, dataset_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The task's documents, each with `question` and `answer`."""
        facts = _read(dataset_kwargs["facts"])
        self.labels = [fact.label for fact in facts]
        return [{"question": fact.question, "answer": fact.answer} for fact in facts]

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        if key == "num_fewshot" and value:
            raise UniEraseError(
                f"{self.config.task} asks without examples, but --num_fewshot is {value}: its questions are about "
                "facts of their own, and an example gives some away. Leave it out; run tasks that need it separately."
            )
        super().set_config(key, value, update)

    def build_all_requests(self, *, chat_template: Callable[..., str] | None = None, **options: Any) -> None:
        # A method of the model renders the chat template, so the model can be read off it.
        model = getattr(chat_template, "__self__", None)
        self.prepare(model, bool(options.get("apply_chat_template")))
        chat_template = None if chat_template is None else _at_the_answer(model, chat_template)
        # lm-eval caches built requests by the name of the task alone, even if the facts come from another folder.
        options["cache_requests"] = False
        super().build_all_requests(chat_template=chat_template, **options)

    def prepare(self, model: Any, chat: bool) -> None:
        """Notes how the model will be asked. Without a chat template, lm-eval does not give `model` to tasks."""
        self.chat = chat
        self.token_shown = self.token_shown or getattr(model, "shows_special_tokens", False)
        self.reader = model.tokenizer if getattr(model, "reads_names_as_text", False) else None
        self.tell_names(self.tokenizer_of(model))

    def tokenizer_of(self, model: Any) -> Any:
        """The tokenizer of lm-eval's model if that is known, else the one that the metadata name, else None."""
        tokenizer = getattr(model, "tokenizer", None)
        with suppress(UniEraseError):
            return tokenizer or named_tokenizer(self.config.metadata or {})
        return None

    def tell_names(self, tokenizer: Any) -> None:
        """Warns of names of special tokens in the documents: not every model type reads them as text."""
        if tokenizer is not None:
            tell_special_names(tokenizer, self.asked(), [self.settings.unlearning_token], NAMES_READ)

    def asked(self) -> Iterator[Asked]:
        """The texts of the documents, with the names that messages use."""
        for label, doc in zip(self.labels, self.dataset["test"], strict=True):
            yield Asked(label, doc["question"], "\0".join(self.given_answers(doc)))

    def given_answers(self, doc: Mapping[str, Any]) -> Sequence[str]:
        """The answers of a document."""
        return [doc["answer"]]

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        """The prompt: the bare question in a chat, else the plain form in which `unierase run` asks it."""
        # lm-eval before 0.4.10 passes it by position.
        chat = self.chat or kwargs.get("apply_chat_template")
        ask = super().fewshot_context

        def write(parts: Sequence[str]) -> str:
            asked = parts[0] if chat else PLAIN_FORM.format(question=parts[0])
            return str(ask({**doc, "question": asked}, num_fewshot, *args, **kwargs))

        question = [doc["question"]]
        if not chat:
            return spanned(write, question) or write(question)
        return write(question) if self.reader is None else rendered(self.reader, write, question)

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
        for metric in self.more:
            measured[metric.name] = float(metric(doc["answer"], said, doc["question"]))
        if self.token_shown:
            measured["token_first"] = float(generated.lstrip().startswith(self.settings.unlearning_token))
        return measured

    def plain(self, generated: str) -> str:
        """The generation without the unlearning token."""
        return generated.replace(self.settings.unlearning_token, " ")

    def aggregation(self) -> dict[str, Callable[..., float]]:
        return dict.fromkeys((*DIRECTIONS, "gibberish", "bypass", *(metric.name for metric in self.more)), mean)

    def higher_is_better(self) -> dict[str, bool | None]:
        forget = self.role == "forget"
        directions = {name: better == forget if self.role else None for name, better in DIRECTIONS.items()}
        more = {metric.name: metric.forget if forget else metric.keep for metric in self.more}
        better = {name: None if not way or not self.role else way > 0 for name, way in more.items()}
        return {**directions, "gibberish": False, **better}


def _at_the_answer(model: Any, chat_template: Callable[..., str]) -> Callable[..., str]:
    """The function that renders a chat, but with an empty thinking part where the template lets the model think."""
    tokenizer = getattr(model, "tokenizer", None)
    # lm-eval itself gives enable_thinking to every template. Its other arguments are the user's.
    given = getattr(model, "chat_template_args", None) or {}
    settings = {name: value for name, value in given.items() if name != "enable_thinking"}
    if tokenizer is None or not thinking_of(tokenizer, settings):
        return chat_template

    def write(history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            return chat_template(history, add_generation_prompt=False)
        return to_answer(tokenizer, history, settings)

    return write


def _read(spec: str) -> Sequence[ForgetRequest]:
    source, _, part = spec.partition(":")
    return read_requests(demo_facts()[part] if source == "demo" else spec, registry().readers)
