"""Metrics that need a model of their own: similarity of meaning, entailment, gibberish. Only if one is named."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DependencyError, UniEraseError, did_you_mean, reason, shown
from ..storage.inputs import no_folder

#: What Yuan et al. 2024 (arXiv 2410.08109) and open-unlearning use.
SEMANTIC_MODELS = {
    "cosine": "sentence-transformers/paraphrase-MiniLM-L6-v2",
    "entailment": "sileod/deberta-v3-base-tasksource-nli",
    "gibberish": "madhurjindal/autonlp-Gibberish-Detector-492513457",
}

#: An answer with less ROUGE-L recall than this counts as wrong, even if it entails the true one (Yuan et al. 2024).
LEAST_ROUGE = 0.1


@dataclass(frozen=True)
class SemanticModels:
    """The models that were named. The others are None, and their metrics are left out."""

    embedder: Any = None
    entailment: Any = None
    gibberish: Any = None

    def measure(self, generated: str, answer: str, rouge: float, *, generated_first: bool) -> dict[str, float]:
        """`cosine_similarity`, `entailment` and `clean_text` of a generation, in [0, 1]; each needs its model.

        rouge: its ROUGE-L recall; generated_first: whether the generation entails the answer, or the reverse.
        """
        measured = {}
        if self.embedder is not None:
            texts = self.embedder.encode([generated, answer], normalize_embeddings=True, show_progress_bar=False)
            measured["cosine_similarity"] = max(0.0, min(1.0, float(texts[0] @ texts[1])))
        if self.entailment is not None:
            pair = (generated, answer) if generated_first else (answer, generated)
            entailed = max(self.entailment(*pair).items(), key=lambda item: item[1])[0] == "entailment"
            measured["entailment"] = float(entailed and rouge >= LEAST_ROUGE)
        if self.gibberish is not None:
            measured["clean_text"] = self.gibberish(generated)["clean"]
        return measured


class _Classifier:
    """A sequence classifier: the probability of each label, by its name in lower case, for a text or a pair."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForSequenceClassification.from_pretrained(name).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, *texts: str) -> dict[str, float]:
        import torch

        with torch.no_grad():
            inputs = self.tokenizer(*texts, truncation=True, return_tensors="pt").to(self.model.device)
            shares = self.model(**inputs).logits[0].float().softmax(-1).tolist()
        return {self.model.config.id2label[index].lower(): share for index, share in enumerate(shares)}


def load_semantic_models(wanted: bool | Mapping[str, str] | None) -> SemanticModels | None:
    """The models that `semantic` in lm-eval's metadata names: true for all, or {"cosine": FOLDER_OR_ID, ...} for some.

    Raises UniEraseError for another name or a model that cannot be loaded, DependencyError for a missing package.
    """
    if not wanted:
        return None
    named = SEMANTIC_MODELS if wanted is True else wanted
    if not isinstance(named, Mapping):
        raise UniEraseError(
            f"'semantic' is {shown(named)}: give true, or an object with some of {', '.join(SEMANTIC_MODELS)}."
        )
    for name in named.keys() - SEMANTIC_MODELS.keys():
        hint = did_you_mean(name, SEMANTIC_MODELS)
        raise UniEraseError(f"'semantic' has no model {shown(name)}.{hint} There are {', '.join(SEMANTIC_MODELS)}.")
    loaded = {name: _load(name, str(model)) for name, model in named.items()}
    return SemanticModels(loaded.get("cosine"), loaded.get("entailment"), loaded.get("gibberish"))


@functools.lru_cache(maxsize=len(SEMANTIC_MODELS))
def _load(name: str, model: str) -> Any:
    # Cached, since every task of a run asks for the same models.
    loader: Any = _Classifier
    if name == "cosine":
        try:
            from sentence_transformers import SentenceTransformer as loader  # noqa: N813
        except ImportError as error:
            raise DependencyError(
                'Cosine similarity needs sentence-transformers: pip install "unierase-plugin[eval-semantic]". '
                f'Or name only the others, such as {{"semantic": {{"entailment": "..."}}}} ({error}).'
            ) from error
    try:
        return loader(model)
    except Exception as error:
        # The hub client raises its own kinds, those of requests or httpx, OSError and ValueError, by version.
        raise UniEraseError(
            f"The model {shown(model)} for {name} cannot be loaded: {reason(error)}. {no_folder(model)}Give a folder "
            "that holds it: "
            f'--metadata \'{{"semantic": {{"{name}": "DIR"}}}}\', or leave it out.'
        ) from error
