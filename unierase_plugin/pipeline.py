"""The whole method on one page: requests in, token learned, edit computed and applied, both judged, folder written.

Every phase that takes long is kept when it ends, so that a run that was killed goes on where it was: token and
statistics in the user's cache, since other runs want them too; answers, values and the edit beside the output folder.
"""

from __future__ import annotations

import copy
import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint as files
from .architecture import Architecture, find_architecture, refuse_unfit
from .corpus import corpus_tokens
from .errors import CheckpointError, HyperParamsError, RequestError, UniEraseError
from .evaluation.generate import answers, context_limit, continue_greedily, pad_token_id, perplexity, token_leak
from .evaluation.metrics import reads_as_idk
from .evaluation.report import Outcome, Report, judge
from .hparams import UniEraseHyperParams, shipped_hparams
from .loading import load
from .locate_then_edit.edit import Applied, WeightEdit, apply_edit, compute_edit, make_solver, revert_edit
from .locate_then_edit.positions import PLAIN_FORM, encode, has_chat_template, render
from .locate_then_edit.solve import Ridge, Solver
from .locate_then_edit.statistics import SecondMoment, second_moments
from .locate_then_edit.targets import context_texts, forms_of, make_targets
from .locate_then_edit.values import Values, ValueTarget, optimise_values
from .readers import read_requests
from .request import ForgetRequest, check_requests, with_subjects
from .resources import lines, paragraphs
from .store import (
    Packed,
    Store,
    cache_folder,
    digest,
    model_fingerprint,
    pack_moment,
    pack_token,
    pack_values,
    tokenizer_fingerprint,
    unpack_moment,
    unpack_token,
    unpack_values,
)
from .unlearning_token import (
    UnlearningToken,
    add_to_tokenizer,
    add_token,
    answer_ids,
    choose_sentence,
    end_id,
    install_token,
    learn_token,
)

logger = logging.getLogger(__name__)

#: Part of every cache key: raised when what a phase computes changes.
CACHE_VERSION = "1"
#: Tokens generated for a judged answer, beyond the longest answer asked for.
ANSWER_ROOM, ANSWER_LEAST, ANSWER_MOST = 8, 32, 128
#: Tokens at most of a sentence that the model says after the token.
SENTENCE_MOST = 24
#: Bundled questions whose declined form joins what is to be kept.
DECLINED_QUESTIONS = 40

Requests = str | os.PathLike[str] | Iterable[ForgetRequest | Mapping[str, Any]]
#: Called with (phase, share done from 0 to 1, note).
Progress = Callable[[str, float, str], None]


@dataclass(frozen=True)
class UnlearnResult:
    """What a run leaves: the edited model in memory, the edit as data, and what was measured."""

    model: Any
    tokenizer: Any
    token: UnlearningToken
    edit: WeightEdit
    requests: tuple[ForgetRequest, ...]
    hparams: UniEraseHyperParams
    report: Report
    folder: Path | None
    applied: Applied = field(repr=False)

    def revert(self) -> None:
        """Puts the edited projections back to the bit; the token's row, which nothing then calls, stays."""
        revert_edit(_architecture(self.model, self.hparams), self.applied)


def unlearn(
    model: Any,
    forget: Requests,
    *,
    tokenizer: Any = None,
    retain: Requests | None = None,
    hparams: UniEraseHyperParams | str | os.PathLike[str] | None = None,
    corpus: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    keep_requests: bool = False,
    judged: int = 400,
    seed: int | None = None,
    device: str = "",
    dtype: str = "",
    progress: Progress = lambda phase, share, note: None,
) -> UnlearnResult:
    """Makes a model answer given questions with the unlearning token and "I don't know" (UniErase, both stages).

    model     folder, hub id, or a loaded causal LM (then give `tokenizer` too; it is edited in place)
    forget    a SPEC, or an iterable of ForgetRequest or mappings with question, answer and optionally subject
    retain    the same for facts to be kept: their keys join the statistics, and they are judged
    hparams   an object, a YAML file, a shipped file's stem; without it the shipped file for this model, else defaults
    corpus    text for the second moment: "self", a text file, or a hub dataset as name[:config[:column]]
    out       output folder; without it nothing is written but the caches
    judged    how many facts of each set are answered before and after, since generating takes time

    Raises a UniEraseError that names the value, the alternatives and the remedy; no projection is then changed.
    """
    requests = with_subjects(check_requests(read_requests(forget)))
    kept = () if retain is None else tuple(read_requests(retain))
    folder = None if out is None else files.check_output_folder(Path(out), overwrite)
    run = _Run.begin(model, tokenizer, requests, kept, hparams, corpus, seed, device, dtype, folder, judged, progress)
    result = run.unlearn()
    if folder is None:
        return result
    try:
        run.save(result, folder, overwrite, keep_requests)
    except BaseException:
        result.revert()
        raise
    return replace(result, folder=folder)


class _Run:
    """One run: what every phase needs, and the caches that let it go on after a kill."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str, requests: tuple[ForgetRequest, ...],
        retain: tuple[ForgetRequest, ...], hparams: UniEraseHyperParams, folder: Path | None, judged: int,
        progress: Progress, earlier: files.Checkpoint | None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.requests, self.retain, self.hparams, self.progress, self.earlier = (
            requests,
            retain,
            hparams,
            progress,
            earlier,
        )
        self.judged, self.judged_forget = (*requests[:judged], *retain[:judged]), len(requests[:judged])
        self.seconds = {"token": 0.0, "statistics": 0.0, "values": 0.0, "edit": 0.0, "evaluate": 0.0}
        self.pad_id = pad_token_id(model, tokenizer)
        self.max_tokens = hparams.max_batch_tokens or (4096 if model.device.type == "cpu" else 32768)
        self.context = context_limit(model)
        self.fingerprint = model_fingerprint(model)
        self.words = tokenizer_fingerprint(tokenizer)
        self.cache = Store(cache_folder(hparams.stats_dir))
        key = digest(
            CACHE_VERSION, self.fingerprint, self.words, hparams.as_dict(), _plain(requests), _plain(retain), [judged]
        )[:32]
        self.work = files.work_folder(folder, key) if folder else None
        self.secret = digest("answers", _plain(requests), _plain(retain))

    @classmethod
    def begin(
        cls, model: Any, tokenizer: Any, requests: tuple[ForgetRequest, ...], retain: tuple[ForgetRequest, ...],
        hparams: UniEraseHyperParams | str | os.PathLike[str] | None, corpus: str | None, seed: int | None,
        device: str, dtype: str, folder: Path | None, judged: int, progress: Progress,
    ) -> _Run:  # fmt: skip
        progress("load", 0.0, "")
        earlier = None
        if isinstance(model, (str, os.PathLike)):
            name = os.fspath(model)
            settings = choose_hparams(hparams, name)
            earlier = _earlier_checkpoint(name)
            model, tokenizer = load(name, device or settings.device, dtype or _dtype_of(earlier))
            _check_unchanged(model, earlier, name)
        else:
            _check_loaded(model, tokenizer, device or dtype)
            name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
            settings = choose_hparams(hparams, name)
        changes = {"mom2_dataset": corpus, "seed": seed}
        settings = settings.replace(**{key: value for key, value in changes.items() if value is not None})
        settings = _with_layers(settings, _architecture(model, settings))
        if earlier is None:
            # On a copy: what is refused leaves nothing behind.
            add_to_tokenizer(copy.deepcopy(tokenizer), settings.unlearning_token)
        _tell_form(name, tokenizer, settings)
        progress("load", 1.0, name)
        return cls(model, tokenizer, name, requests, retain, settings, folder, judged, progress, earlier)

    def unlearn(self) -> UnlearnResult:
        with _frozen(self.model):
            contexts = self._contexts()
            self._check_fit(contexts)
            self._check_corpus()
            before, perplexity_before = self._before()
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            arch, token = self._token()
            self.originals = files.take_originals(
                arch, self.hparams.layers, vocabulary, None if self.earlier else token.id
            )
            with self._timed("token"):
                install_token(arch, token)
                leak = token_leak(self.model, self.tokenizer, paragraphs("ordinary_text"), token.id)
            corpus, retain = self._statistics(arch, token)
            with self._timed("values"):
                targets = self._targets(contexts, token.id, self._own_sentences(token))
            values = self._values(arch, targets, token)
            edit, solved = self._edit(arch, targets, values, token, corpus, retain)
            applied = apply_edit(arch, edit)
            try:
                forget, kept, perplexity_after = self._after(before, token)
            except BaseException:
                revert_edit(arch, applied)
                raise
            details = {**solved, **_value_figures(values), "residual_norms": list(edit.residual_norms)}
            report = self._report(arch, edit, forget, kept, perplexity_before, perplexity_after, leak, details)
        return UnlearnResult(
            self.model, self.tokenizer, token, edit, self.requests, self.hparams, report, None, applied
        )

    def save(self, result: UnlearnResult, folder: Path, overwrite: bool, keep_requests: bool) -> None:
        self.progress("save", 0.0, str(folder))
        files.save_checkpoint(
            folder, model=result.model, tokenizer=result.tokenizer, token=result.token, edit=result.edit,
            originals=self.originals, requests=self.requests, hparams=self.hparams,
            manifest_extra={
                "method": "unierase", "model": self.name, "model_fingerprint_before": self.fingerprint,
                "tokenizer_fingerprint_before": self.words,
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            },
            report=result.report.as_dict(), overwrite=overwrite, keep_requests=keep_requests, earlier=self.earlier,
        )  # fmt: skip
        files.discard_work(folder)
        self.progress("save", 1.0, str(folder))

    # --- phases, in order ---------------------------------------------------------------------------------------------

    def _contexts(self) -> tuple[str, ...]:
        return context_texts(self.model, self.tokenizer, self.hparams.context_template_length_params, self.pad_id)

    def _check_fit(self, contexts: Sequence[str]) -> None:
        """RequestError for a fact that the model's context cannot hold, before anything takes time."""
        # The token has no id yet; any stands for its length.
        self._targets(contexts, 0, {})
        form, room = forms_of(self.tokenizer, self.hparams)[0], self._answer_room()
        for fact in self.judged:
            text = self._rendered(fact.question, form)
            needed = len(encode(self.tokenizer, text, form)) + room
            if needed > self.context:
                raise RequestError(
                    f"The question of {fact.case_id or fact.question[:60]!r} needs {needed} tokens with its answer; "
                    f"the model's context holds {self.context}. Shorten it, or leave it out."
                )

    def _check_corpus(self) -> None:
        """Whatever is wrong with the corpus, before anything takes time; not where its statistics are at hand."""
        if self.hparams.mom2_dataset != "self" and not self.cache.path("statistics", self._statistics_key()).is_file():
            self._corpus(samples=1)

    def _before(self) -> tuple[list[str], float]:
        """The unedited model's answers to what is to be forgotten, then to what is to be kept; and its perplexity."""

        with self._timed("evaluate"):
            return self._measured("before", "model")

    def _measured(self, phase: str, key: str) -> tuple[list[str], float]:
        """Answers to the judged facts and perplexity of ordinary text, by the model as it is now."""

        def measure() -> Packed:
            level = perplexity(self.model, self.tokenizer, paragraphs("ordinary_text"))
            if phase == "before" and not math.isfinite(level):
                raise UniEraseError(_why_not_finite(self.name, self.model))
            return {}, {"answers": files.seal(json.dumps(self._answers(phase)), self.secret), "perplexity": repr(level)}

        metadata = self._resumed(phase, key, measure)[1]
        return json.loads(files.unseal(metadata["answers"], self.secret)), float(metadata["perplexity"])

    def _token(self) -> tuple[Architecture, UnlearningToken]:
        """Room for the token, and its rows: from the checkpoint gone on from, from the cache, or learned now."""
        h = self.hparams
        with self._timed("token"):
            if self.earlier is not None and self.earlier.token is not None:
                return _architecture(self.model, h), self.earlier.token
            sentences, questions, text = lines("idk_sentences"), lines("questions"), paragraphs("ordinary_text_train")
            sentences = sentences[: h.token_num_sentences]
            settings = {key: value for key, value in h.as_dict().items() if key.startswith(("token_", "unlearning_"))}
            key = digest(
                CACHE_VERSION, self.fingerprint, self.words, settings, h.layers, h.seed, h.chat_template_kwargs,
                sentences, questions, text,
            )[:32]  # fmt: skip
            index = add_token(self.model, self.tokenizer, h.unlearning_token)
            arch = _architecture(self.model, h)
            packed = _cached(self.cache, "tokens", key, lambda: pack_token(learn_token(
                arch, self.tokenizer, index, questions, sentences, text, h, max_tokens=self.max_tokens,
                pad_id=self.pad_id, progress=lambda share, note: self.progress("token", share, note),
            )))  # fmt: skip
        return arch, unpack_token(*packed)

    def _statistics(self, arch: Architecture, token: UnlearningToken) -> tuple[SecondMoment, SecondMoment | None]:
        """Second moments of the corpus, and of what is to be kept: the retain set, and what follows the token."""
        h = self.hparams
        dtype = torch.float64 if h.mom2_dtype == "float64" else torch.float32
        with self._timed("statistics"):
            corpus = unpack_moment(*_cached(
                self.cache, "statistics", self._statistics_key(),
                lambda: pack_moment(self._moments(arch, self._corpus(h.mom2_n_samples), dtype, 0.5)),
            ))  # fmt: skip
            if not h.retain_update_weight:
                return corpus, None
            # Beside the output folder, not in the cache: the next run has other facts to keep.
            return corpus, unpack_moment(*self._resumed(
                "retain", _row_key(token),
                lambda: pack_moment(self._moments(arch, self._retain_tokens(token), dtype, 0.9)),
            ))  # fmt: skip

    def _statistics_key(self) -> str:
        h = self.hparams
        return digest(
            CACHE_VERSION, self.fingerprint, self.words, h.layers, h.mom2_dataset, _file_identity(h.mom2_dataset),
            h.mom2_n_samples, h.mom2_max_length, h.mom2_dtype, h.seed, lines("questions"),
            paragraphs("ordinary_text_train"),
        )[:32]  # fmt: skip

    def _corpus(self, samples: int) -> list[list[int]]:
        h = self.hparams
        longest = min(h.mom2_max_length, self.context)
        own = [self.tokenizer(text)["input_ids"][:longest] for text in paragraphs("ordinary_text_train")]
        sequences = corpus_tokens(
            h.mom2_dataset, self.model, self.tokenizer, samples=samples, max_length=longest, seed=h.seed,
            openings=lines("questions"),
            progress=lambda share: self.progress("statistics", share / 2, "reading the corpus"),
        )  # fmt: skip
        # Sampled text is what the model says; the bundled prose adds what others say to it.
        return sequences + own if h.mom2_dataset == "self" else sequences

    def _retain_tokens(self, token: UnlearningToken) -> list[list[int]]:
        """The facts to keep with their answers, and bundled questions with the token and its sentence.

        The latter keep the edit from disturbing, at the positions after the token, the very sentence it leads to.
        """
        eos, sentences = end_id(self.model, self.tokenizer), lines("idk_sentences")[: self.hparams.token_num_sentences]
        pairs = [
            (fact.question, self.tokenizer(fact.answer, add_special_tokens=False)["input_ids"]) for fact in self.retain
        ]
        for question in lines("questions")[:DECLINED_QUESTIONS]:
            said = answer_ids(self.tokenizer, choose_sentence(question, sentences), eos, None)
            pairs.append((question, [token.id, *said]))
        return [
            [*encode(self.tokenizer, self._rendered(question, form), form), *answer][: self.context]
            for question, answer in pairs
            for form in forms_of(self.tokenizer, self.hparams)
        ]

    def _moments(self, arch: Architecture, sequences: list[list[int]], dtype: torch.dtype, base: float) -> SecondMoment:
        return second_moments(
            arch, sequences, self.hparams.layers, max_tokens=self.max_tokens, dtype=dtype, pad_id=self.pad_id,
            progress=lambda share: self.progress("statistics", base + (1 - base) * share, "keys of the corpus"),
        )  # fmt: skip

    def _targets(
        self, contexts: Sequence[str], token_id: int, own: Mapping[tuple[str, str], tuple[int, ...]]
    ) -> list[ValueTarget]:
        """own: what follows the token for a question in a form; else a bundled sentence does."""
        h = self.hparams
        eos = end_id(self.model, self.tokenizer)
        sentences = lines("idk_sentences")[: h.token_num_sentences]
        close = token_id if h.token_closes_answer else None

        def continuation(question: str, form: str) -> tuple[int, ...]:
            chosen = answer_ids(self.tokenizer, choose_sentence(question, sentences), eos, close)
            return own.get((question, form), chosen)

        return make_targets(self.tokenizer, self.requests, contexts, h, continuation, self.context)

    def _own_sentences(self, token: UnlearningToken) -> dict[tuple[str, str], tuple[int, ...]]:
        """What the unedited model itself says after the token, where that is an "I don't know" sentence.

        Aiming at it asks for the least change: the edit has to raise the token, and only to keep what follows.
        """
        found: dict[tuple[str, str], tuple[int, ...]] = {}
        eos = end_id(self.model, self.tokenizer)
        closing = (token.id, eos) if self.hparams.token_closes_answer else (eos,)
        for form in forms_of(self.tokenizer, self.hparams):
            prompts = [
                (*encode(self.tokenizer, self._rendered(request.question, form), form), token.id)
                for request in self.requests
            ]
            said = continue_greedily(self.model, self.tokenizer, prompts, SENTENCE_MOST, 2 * self.max_tokens)
            for request, ids in zip(self.requests, said, strict=True):
                sentence = ids[: ids.index(eos)] if eos in ids else []
                text = self.tokenizer.decode(sentence, skip_special_tokens=True)
                if token.id not in sentence and reads_as_idk(text, lines("idk_phrases")):
                    found[request.question, form] = (*sentence, *closing)
        return found

    def _rendered(self, question: str, form: str) -> str:
        return render(self.tokenizer, question, form, self.hparams.chat_template_kwargs)

    def _values(self, arch: Architecture, targets: list[ValueTarget], token: UnlearningToken) -> Values:
        with self._timed("values"):
            return unpack_values(*self._resumed("values", _row_key(token), lambda: pack_values(
                optimise_values(
                    arch, targets, token.id, self.hparams, max_tokens=self.max_tokens, pad_id=self.pad_id,
                    progress=lambda share: self.progress("values", share, f"{len(targets)} requests together"),
                )
            )))  # fmt: skip

    def _edit(
        self, arch: Architecture, targets: list[ValueTarget], values: Values, token: UnlearningToken,
        corpus: SecondMoment, retain: SecondMoment | None,
    ) -> tuple[WeightEdit, dict[str, Any]]:  # fmt: skip
        def compute() -> Packed:
            solvers = self._solvers(corpus, retain)
            edit = compute_edit(
                arch, [target.prompts for target in targets], values, solvers, max_tokens=self.max_tokens,
                pad_id=self.pad_id, progress=lambda share: self.progress("edit", share, ""),
            )  # fmt: skip
            jitters = {str(layer): solver.jitter for layer, solver in solvers.items() if isinstance(solver, Ridge)}
            tensors, metadata = files.pack_edits([edit])
            return tensors, {**metadata, "jitter": json.dumps(jitters)}

        with self._timed("edit"):
            tensors, metadata = self._resumed("edit", self._edit_key(token), compute)
        counts = {"corpus_tokens": corpus.count, "retain_tokens": retain.count if retain else 0}
        return files.unpack_edits(tensors, metadata)[0], {**counts, "jitter": json.loads(metadata["jitter"])}

    def _solvers(self, corpus: SecondMoment, retain: SecondMoment | None) -> dict[int, Solver]:
        earlier: Mapping[int, Tensor] = self.earlier.edit.keys if self.earlier and self.earlier.edits else {}
        return {
            layer: make_solver(
                self.hparams, corpus.moments[layer], retain.moments[layer] if retain else None, earlier.get(layer)
            )
            for layer in self.hparams.layers
        }

    def _after(self, before: Sequence[str], token: UnlearningToken) -> tuple[list[Outcome], list[Outcome], float]:
        with self._timed("evaluate"):
            after, level = self._measured("after", self._edit_key(token))
        ends = [text for text in (self.tokenizer.eos_token, self.tokenizer.pad_token) if text]
        outcomes = [
            judge(fact.question, fact.answer, old, new, token.name, ends, lines("idk_phrases"))
            for fact, old, new in zip(self.judged, before, after, strict=True)
        ]
        return outcomes[: self.judged_forget], outcomes[self.judged_forget :], level

    def _answers(self, phase: str) -> list[str]:
        if not self.judged:
            return []
        return answers(
            self.model, self.tokenizer, [fact.question for fact in self.judged],
            form=forms_of(self.tokenizer, self.hparams)[0], template_kwargs=self.hparams.chat_template_kwargs,
            max_new_tokens=self._answer_room(), max_tokens=2 * self.max_tokens,
            progress=lambda share: self.progress(phase, share, f"{len(self.judged)} answers"),
        )  # fmt: skip

    def _answer_room(self) -> int:
        """Tokens generated for a judged answer."""
        sizes = [len(self.tokenizer(fact.answer, add_special_tokens=False)["input_ids"]) for fact in self.judged]
        return min(max(max(sizes, default=0) + ANSWER_ROOM, ANSWER_LEAST), ANSWER_MOST)

    def _report(
        self, arch: Architecture, edit: WeightEdit, forget: list[Outcome], kept: list[Outcome], before: float,
        after: float, leak: float, details: Mapping[str, Any],
    ) -> Report:  # fmt: skip
        changed = sum(self.model.get_parameter(arch.weight_name(layer)).numel() for layer in edit.layers)
        if self.earlier is None:  # a later step finds the token's rows as they are to be
            changed += arch.hidden_size * (1 if arch.tied else 2)
        share = changed / sum(parameter.numel() for parameter in self.model.parameters())
        return Report(
            self.name, "unierase", forget, kept, before, after, leak, edit.norm_ratios, share, dict(self.seconds),
            peak_memory_bytes(), {**details, "ranks": {str(layer): edit.rank(layer) for layer in edit.layers}},
        )  # fmt: skip

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _edit_key(self, token: UnlearningToken) -> str:
        """What the edit depends on beyond the run's own key: the token's row, and a corpus file's content."""
        return digest(_row_key(token), _file_identity(self.hparams.mom2_dataset))[:32]

    def _resumed(self, kind: str, key: str, compute: Callable[[], Packed]) -> Packed:
        return compute() if self.work is None else _cached(self.work, kind, key, compute)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


def choose_hparams(given: UniEraseHyperParams | str | os.PathLike[str] | None, model: str) -> UniEraseHyperParams:
    """The hyper-parameters given; else the shipped file whose model_name is this model's; else the defaults."""
    if isinstance(given, UniEraseHyperParams):
        return given
    if given is not None:
        return UniEraseHyperParams.from_hparams(os.fspath(given))
    wanted = Path(model).name.casefold()
    for path in shipped_hparams().values():
        hparams = UniEraseHyperParams.from_hparams(path)
        if Path(hparams.model_name).name.casefold() == wanted:
            return hparams
    return UniEraseHyperParams()


def default_layers(blocks: int) -> tuple[int, ...]:
    """Five early blocks in proportion to depth, 4 to 8 of 32 as for Llama; fewer in shallow models, never the last."""
    first = round(blocks / 8)
    return tuple(range(first, max(first + 1, min(first + 5, blocks - 1))))


def peak_memory_bytes() -> int:
    """The GPU's peak allocation where there is one, else the process' peak resident size."""
    if torch.cuda.is_available():
        return int(sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())))
    import resource

    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _architecture(model: Any, hparams: UniEraseHyperParams) -> Architecture:
    return find_architecture(model, hparams.rewrite_module_tmp, hparams.layer_module_tmp)


def _with_layers(hparams: UniEraseHyperParams, arch: Architecture) -> UniEraseHyperParams:
    layers = arch.check_layers(hparams.layers or default_layers(len(arch.blocks)))
    if layers[-1] == len(arch.blocks) - 1:
        raise HyperParamsError(
            f"layers = {list(layers)}: the last block cannot be edited, since no attention follows that could carry "
            f"the edit from the fact to the answer. Choose from 0 to {len(arch.blocks) - 2}."
        )
    return hparams.replace(layers=layers)


def _earlier_checkpoint(name: str) -> files.Checkpoint | None:
    """The record of a folder that was edited before, whose steps this run goes on from."""
    if not (Path(name) / files.RECORD / "manifest.json").is_file():
        return None
    found = files.read_checkpoint(name)
    if found.token is None:
        raise CheckpointError(
            f"{name!r} was made by another method; start from its base model {found.manifest['model']!r}."
        )
    return found


def _check_loaded(model: Any, tokenizer: Any, placement: str) -> None:
    if tokenizer is None:
        raise UniEraseError("A loaded model needs its tokenizer: unlearn(model, forget, tokenizer=tokenizer).")
    refuse_unfit(model)
    if placement:
        raise UniEraseError("device and dtype are for models given by name; move the loaded model yourself.")


def _tell_form(name: str, tokenizer: Any, hparams: UniEraseHyperParams) -> None:
    if "chat" in hparams.prompt_forms and not has_chat_template(tokenizer):
        logger.warning(
            "%s has no chat template: questions are edited and asked as %r. A chat model needs its chat_template.",
            name, PLAIN_FORM,
        )  # fmt: skip


def _dtype_of(earlier: files.Checkpoint | None) -> str:
    """The dtype in which an edited folder was made: in another one, its first step could not be taken back."""
    if earlier is None or earlier.originals is None:
        return ""
    return str(next(iter(earlier.originals.projections.values())).dtype).removeprefix("torch.")


def _check_unchanged(model: Any, earlier: files.Checkpoint | None, name: str) -> None:
    if earlier is not None and model_fingerprint(model) != earlier.manifest["model_fingerprint_after"]:
        raise CheckpointError(
            f"The weights in {name!r} are not those that its record was written for: they were trained further, or "
            f"loaded in another dtype than {_dtype_of(earlier) or 'before'}. Leave dtype out, or start from the base "
            f"model {earlier.manifest['model']!r}."
        )


def _why_not_finite(name: str, model: Any) -> str:
    bad = next((n for n, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
    if bad is not None:
        return f"The weight {bad!r} of {name!r} holds NaN or infinity. The checkpoint is damaged: fetch it again."
    return (
        f"{name!r} gives NaN or infinity on ordinary text in {model.dtype}. "
        "Load it in another dtype: float32, or bfloat16."
    )


def _row_key(token: UnlearningToken) -> str:
    return digest(token.input_row.tolist())[:32]


def _cached(store: Store, kind: str, key: str, compute: Callable[[], Packed]) -> Packed:
    found = store.get(kind, key)
    if found is None:
        found = compute()
        store.put(kind, key, *found)
    return found


def _plain(requests: Sequence[ForgetRequest]) -> list[list[str | None]]:
    return [[request.question, request.answer, request.subject] for request in requests]


def _file_identity(spec: str) -> list[int | str]:
    """What tells a local corpus' content from another's under the same name."""
    path = Path(spec)
    return [digest(path.read_bytes())] if path.is_file() else []


def _value_figures(values: Values) -> dict[str, Any]:
    return {
        "token_probability": values.probability.tolist(),
        "value_nll": values.nll.tolist(),
        "relative_norm": values.relative_norm.tolist(),
        "value_steps": values.steps.tolist(),
    }


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter gets a gradient inside; training mode and gradients are put back after."""
    training = model.training
    # By name: room for the token makes the embedding another parameter.
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name in wanted:
            model.get_parameter(name).requires_grad_(True)
        model.train(training)
