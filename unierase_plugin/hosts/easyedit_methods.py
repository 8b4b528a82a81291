"""EasyEdit's own methods, run by this package: `unierase run --method easyedit_memit`, beside our `memit`.

Their names are EasyEdit's in lower case, after `easyedit_`. A question becomes an edit towards " I don't know.", or
towards the request's own target, in the form in which the model is asked. EasyEdit keeps statistics by the last part of
a model's name, and more in module globals. Here statistics are kept by the weights, and the globals are cleared before
a run.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DependencyError, EditError, HyperParamsError, RequestError, first_words, reason, shown
from ..hparams import HyperParams, read_yaml
from ..methods.contract import Changes, Job, Method
from ..models.literal import tell_special_names

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..models.architecture import Architecture

logger = logging.getLogger(__name__)

PREFIX = "easyedit_"
TARGET = "I don't know."
#: How EasyEdit's methods read names of special tokens in a text.
NAMES_READ = (
    "EasyEdit reads them as the tokens, so that it edits another prompt than the one that is asked. Leave such facts "
    "out, or take a method of this package."
)
#: Algorithms that change no plain weights (adapters, codebooks, prompts, a remote model), or that need more than facts
#: (a trained editor, safety data).
NOT_OFFERED = frozenset(
    {
        "DEFER",
        "DINM",
        "DPO",
        "DeepEdit-Api",
        "FT-Api",
        "GRACE",
        "IKE",
        "KN",
        "LoRA",
        "MELO",
        "MEND",
        "QLoRA",
        "SERAC",
        "SimIE",
        "WISE",
    }
)
#: Algorithms that count a fact's token from the left. EasyEdit pads on the right for them.
PADDED_RIGHT = frozenset({"AlphaEdit", "CORE", "EAMET", "EMMET", "MEMIT", "R-ROME", "ROME", "SPHERE"})
#: What its modules keep between calls, with the value at the start.
GLOBALS: Mapping[str, Any] = MappingProxyType(
    {"CONTEXT_TEMPLATES_CACHE": None, "COV_CACHE": {}, "P_loaded": False, "cache_c_new": False}
)


@dataclass(frozen=True)
class EasyEditSettings(HyperParams):
    """Settings of one of EasyEdit's methods: the content of its own YAML file, and how questions are asked."""

    #: EasyEdit's name of the method. Each method has a class of its own.
    algorithm: ClassVar[str] = ""

    #: The content of EasyEdit's YAML file. Its device, stats_dir and P_loc are not used.
    values: dict[str, Any] = field(default_factory=dict)
    #: Corpus of the second moment, as for our own methods. Empty for EasyEdit's own, which comes from the hub.
    mom2_dataset: str = ""

    @classmethod
    def from_hparams(cls, name_or_path: str | Path) -> Self:
        """Reads one of EasyEdit's YAML files. Raises HyperParamsError for the file of another method."""
        path = Path(name_or_path)
        if not path.is_file():
            raise HyperParamsError(
                f"There is no file {str(path)!r}. EasyEdit's {cls.algorithm} takes EasyEdit's own YAML file, such as "
                f"hparams/{cls.algorithm}/MODEL.yaml of its checkout."
            )
        values = read_yaml(path)
        if values.get("alg_name") != cls.algorithm:
            raise HyperParamsError(
                f"{path} is for {shown(values.get('alg_name'))}, not for EasyEdit's {cls.algorithm!r}."
            )
        return cls(values=values)

    @classmethod
    def for_model(cls, model: str) -> Self:
        """Reads the file in EasyEdit's checkout whose model_name ends like the model's name.

        Raises HyperParamsError where there is none.
        """
        folder = next((each for each in _hparams_folders() if _folded(each.name) == _folded(cls.algorithm)), None)
        for path in sorted(folder.glob("*.yaml")) if folder else ():
            values = read_yaml(path)
            name = Path(str(values.get("model_name", ""))).name
            if values.get("alg_name") == cls.algorithm and name.casefold() == Path(model).name.casefold():
                return cls(values=values)
        raise HyperParamsError(
            f"EasyEdit has no {cls.algorithm} settings for {shown(model)}{f' in {folder}' if folder else ''}. Give a "
            "YAML file in its layout: --hparams FILE."
        )


def easyedit_methods() -> Iterator[Method[Any]]:
    """A method for every algorithm of the installed EasyEdit that edits plain weights; none without EasyEdit.

    EasyEdit is not imported: its table is read as text.
    """
    for algorithm in _algorithms():
        if algorithm not in NOT_OFFERED:
            yield _method(algorithm)


def _method(algorithm: str) -> Method[Any]:
    name = PREFIX + "".join(each if each.isalnum() else "_" for each in algorithm.casefold())
    settings = type(f"EasyEdit{name.title().replace('_', '')}Settings", (EasyEditSettings,), {"algorithm": algorithm})
    return Method(
        name=name,
        title=f"EasyEdit's {algorithm}, towards {TARGET!r}",
        paper="Wang et al. 2023, arXiv 2308.07269",
        hparams=settings,
        run=_run,
        check=lambda job: _check(job),
        needs_subjects=True,
    )


def _algorithms() -> list[str]:
    root = _package()
    table = root / "util" / "alg_dict.py" if root else None
    if table is None or not table.is_file():
        return []
    for node in ast.parse(table.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
            continue
        if getattr(node.targets[0], "id", None) == "ALG_DICT":
            return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    return []


def _package() -> Path | None:
    try:
        spec = importlib.util.find_spec("easyeditor")
    except ValueError:  # a module that was put there by hand has no spec
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _hparams_folders() -> list[Path]:
    root = _package()
    return [each for each in sorted((root.parent / "hparams").glob("*")) if each.is_dir()] if root else []


def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


# --- a run -----------------------------------------------------------------------------------------------------------


def _check(job: Job[EasyEditSettings]) -> None:
    if not job.hparams.values:
        raise HyperParamsError(
            f"EasyEdit's {job.hparams.algorithm} needs its settings: --hparams hparams/{job.hparams.algorithm}/"
            "MODEL.yaml of EasyEdit's checkout."
        )
    if job.history is not None:
        raise EditError(f"EasyEdit's {job.hparams.algorithm} cannot go on from earlier steps. Start from a base model.")
    _requests(job)
    tell_special_names(job.tokenizer, job.requests, read=NAMES_READ)


def _requests(job: Job[EasyEditSettings]) -> list[dict[str, Any]]:
    """The facts as EasyEdit's requests. Raises RequestError for a fact that its templates cannot hold."""
    from ..models.prompts import render

    found = []
    for index, fact in enumerate(job.requests):
        text = render(job.tokenizer, fact.question, job.hparams.prompt_forms[0], job.hparams.chat_template_kwargs)
        text = _without_start(job.tokenizer, text)
        if text.count(str(fact.subject)) != 1 or "{" in text or "}" in text:
            raise RequestError(
                f"EasyEdit cannot edit {fact.label}: in {first_words(text)} the subject "
                f"{first_words(fact.subject)} must occur exactly once, and no braces. Give a longer 'subject', or "
                "leave the fact out."
            )
        found.append(
            {
                "case_id": index,
                "prompt": text,
                "subject": fact.subject,
                "target_new": fact.target or TARGET,
                "ground_truth": fact.answer,
                "portability": {},
                "locality": {},
            }
        )
    return found


def _without_start(tokenizer: Any, text: str) -> str:
    """The text without the start-of-text token. EasyEdit's tokenisation adds that even where a template has it."""
    start = tokenizer.bos_token
    added = bool(start) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(start) if added else text


def _run(job: Job[EasyEditSettings]) -> Changes:
    import torch

    table = _import("easyeditor.util.alg_dict").ALG_DICT
    apply = table[job.hparams.algorithm]
    package = importlib.import_module(apply.__module__.rpartition(".")[0])
    batchable = _import("easyeditor.editors.batch_editor").BatchEditor.is_batchable_method(job.hparams.algorithm)
    requests = _requests(job)
    batches = [requests] if batchable else [[request] for request in requests]
    before = {name: weight.detach().cpu().clone() for name, weight in job.model.named_parameters()}
    try:
        with _surroundings(job, package) as settings, torch.random.fork_rng():
            torch.manual_seed(job.seed)
            for number, batch in enumerate(batches):
                edited = apply(
                    job.model,
                    job.tokenizer,
                    batch,
                    settings,
                    copy=False,
                    return_orig_weights=True,
                    keep_original_weight=False,
                    train_ds=None,
                )
                if (edited[0] if isinstance(edited, tuple) else edited) is not job.model:
                    raise EditError(
                        f"EasyEdit's {job.hparams.algorithm} returned a model of its own instead of edited weights."
                    )
                job.progress("edit", (number + 1) / len(batches), f"{len(requests)} requests")
    except EditError:
        _write(job.model, before)
        raise
    except Exception as error:  # another package's code may raise anything
        _write(job.model, before)
        raise EditError(
            f"EasyEdit's {job.hparams.algorithm} failed: {type(error).__name__}: {reason(error)}. The model is as "
            "before. Settings are EasyEdit's own (--hparams); text for statistics can be given by --corpus."
        ) from error
    changed = {n: w for n, w in before.items() if not torch.equal(w, job.model.get_parameter(n).detach().cpu())}
    if not changed:
        raise EditError(
            f"EasyEdit's {job.hparams.algorithm} changed no weight. Look at its settings: AlphaEdit's "
            "nullspace_threshold, for example, is not a share, so that its null space can be empty."
        )
    return Changes(
        parameters=sum(weight.numel() for weight in changed.values()),
        figures={"weights_changed": sorted(changed)},
        undo=lambda: _write(job.model, changed),
    )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(
            f"EasyEdit is there but cannot be imported ({error}). Install its requirements.txt."
        ) from error


def _write(model: Any, weights: Mapping[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)


@contextlib.contextmanager
def _surroundings(job: Job[EasyEditSettings], package: Any) -> Iterator[Any]:
    """EasyEdit's settings, and what its code expects: a folder to write into, padding, no state of earlier calls."""
    from ..storage.cache import cache_folder
    from ..storage.fingerprints import digest

    side, folder = job.tokenizer.padding_side, Path.cwd()
    pad = job.tokenizer.pad_token
    key = digest(job.fingerprint, job.hparams.mom2_dataset, job.seed)[:16]
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(_Log()):
        settings = _settings(job, package, Path(scratch), cache_folder() / "easyedit" / key)
        _clear_globals(package)
        job.tokenizer.padding_side = "right" if job.hparams.algorithm in PADDED_RIGHT else "left"
        job.tokenizer.pad_token = pad or job.tokenizer.eos_token
        with _corpus(job, settings):
            os.chdir(scratch)
            try:
                yield settings
            finally:
                os.chdir(folder)
                job.tokenizer.padding_side = side
                job.tokenizer.pad_token = pad
                _clear_globals(package)


def _settings(job: Job[EasyEditSettings], package: Any, scratch: Path, statistics: Path) -> Any:
    """An object of EasyEdit's own class of settings, which reads the file's content itself."""
    import yaml

    from ..models.architecture import find_architecture

    base = _import("easyeditor.util.hparams").HyperParams
    kinds: list[Any] = [each for each in vars(package).values() if isinstance(each, type) and issubclass(each, base)]
    kind = next((each for each in kinds if each is not base and each.__module__.startswith(package.__name__)), None)
    if kind is None:
        raise EditError(f"EasyEdit's {job.hparams.algorithm} has no class of settings in {package.__name__}.")
    path = scratch / "settings.yaml"
    path.write_text(yaml.safe_dump({**job.hparams.values, "device": str(job.model.device)}), encoding="utf-8")
    made = kind.from_hparams(str(path))
    made.device, made.stats_dir = str(job.model.device), str(statistics)
    made.P_loc = str(scratch / "none.pt")
    arch = find_architecture(job.model)
    made.model_name = _family(arch, str(made.model_name))
    if arch.tied:  # EasyEdit looks for a parameter of that name; a tied one has the embedding's name only
        made.lm_head_module = next(name for name, each in job.model.named_modules() if each is arch.embedding)
    return made


def _family(arch: Architecture, name: str) -> str:
    """The model's name, with a family's name in it. EasyEdit tells the orientation of a projection by that."""
    from ..models.architecture import stores_input_first

    first = arch.dense(arch.editable[0])
    known = ("gpt2-xl",) if stores_input_first(first) else ("llama", "qwen", "gpt-j-6b")
    return name if any(each in name.casefold() for each in known) else f"{name} {known[0]}"


def _clear_globals(package: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package.__name__}."):
            for each, start in GLOBALS.items():
                if hasattr(module, each):
                    setattr(module, each, dict(start) if isinstance(start, dict) else start)


@contextlib.contextmanager
def _corpus(job: Job[EasyEditSettings], settings: Any) -> Iterator[None]:
    """Within it, EasyEdit reads the corpus that the settings name instead of the one from the hub."""
    if not job.hparams.mom2_dataset:
        yield
        return
    from datasets import Dataset

    texts = _texts(job, getattr(settings, "mom2_n_samples", 1))
    settings.mom2_n_samples = len(texts)
    module = _import("easyeditor.models.rome.layer_stats")
    theirs = module.load_dataset
    module.load_dataset = lambda *args, **kwargs: {"train": Dataset.from_dict({"text": texts})}
    try:
        yield
    finally:
        module.load_dataset = theirs


def _texts(job: Job[EasyEditSettings], samples: int) -> Sequence[str]:
    from ..facts.resources import lines
    from ..hparams import UniEraseHyperParams
    from ..models.generate import context_limit
    from ..statistics.corpus import corpus_tokens

    defaults = UniEraseHyperParams()
    longest = min(defaults.mom2_max_length, context_limit(job.model))
    own = job.hparams.mom2_dataset == "self"
    tokens = corpus_tokens(
        job.hparams.mom2_dataset,
        job.model,
        job.tokenizer,
        samples=min(samples, defaults.mom2_n_samples) if own else samples,
        max_length=longest,
        seed=job.seed,
        openings=lines("questions"),
        progress=lambda share: job.progress("statistics", share, "reading the corpus"),
    )
    return [job.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


class _Log(io.TextIOBase):
    """Writes what EasyEdit prints to the log."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("%s", text.rstrip())
        return len(text)
