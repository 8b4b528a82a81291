"""UniErase itself: token learned, statistics, values, edit. `pipeline` loads the model before and judges it after."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import checkpoint as files
from .architecture import Architecture, find_architecture
from .corpus import corpus_identity
from .errors import HyperParamsError
from .evaluation.generate import context_limit, continue_greedily, pad_token_id, token_leak
from .evaluation.metrics import reads_as_idk
from .hparams import UniEraseHyperParams
from .locate_then_edit.edit import WeightEdit, apply_edit, compute_edit, expected_norm_ratio, make_solver, revert_edit
from .locate_then_edit.positions import encode, render
from .locate_then_edit.solve import Ridge, Solver
from .locate_then_edit.statistics import SecondMoment, join_moments, second_moments
from .locate_then_edit.targets import context_texts, forms_of, make_targets
from .locate_then_edit.values import Values, ValueTarget, optimise_values
from .methods.contract import Changes, Earlier, Job
from .phases import Phases
from .resources import lines, paragraphs
from .second_moment import Corpus, CorpusMoment
from .store import (
    CACHE_VERSION,
    Packed,
    Store,
    cache_folder,
    digest,
    pack_moment,
    pack_token,
    pack_values,
    tokenizer_fingerprint,
    unpack_moment,
    unpack_token,
    unpack_values,
)
from .unlearning_token import (
    TokenRoom,
    UnlearningToken,
    add_to_tokenizer,
    answer_ids,
    choose_sentence,
    end_id,
    install_token,
    learn_token,
)

#: Tokens at most of a sentence that the model says after the token.
SENTENCE_MOST = 24
#: Within these the noise on the edited projections follows the size of the coming edit.
NOISE_LEAST, NOISE_MOST = 2**-6, 1.0
#: Bundled questions whose declined form joins what is to be kept.
DECLINED_QUESTIONS = 40
#: Of the progress of the statistics, what is over when the corpus' own are done.
CORPUS_SHARE = 0.9


def erase(job: Job[UniEraseHyperParams]) -> Changes:
    """UniErase, both stages, on a loaded model: learns the token, computes the edit and applies it."""
    return _Erasure(job).run()


def check_erasable(job: Job[UniEraseHyperParams]) -> None:
    """Raises a UniEraseError for a token, a fact or a corpus that `erase` could not take; quick."""
    _Erasure(job).check()


def corpus_of(job: Job[UniEraseHyperParams]) -> Corpus:
    """The ordinary text that a job's edit is to leave alone."""
    return Corpus(
        job.model, job.tokenizer, job.name, job.hparams, Store(cache_folder(job.hparams.stats_dir)), job.fingerprint,
        tokenizer_fingerprint(job.tokenizer), lines("questions"), paragraphs("ordinary_text_train"), job.max_tokens,
        lambda share, note: job.progress("statistics", CORPUS_SHARE * share, note),
    )  # fmt: skip


class _Erasure(Phases):
    """UniErase on one job: what its phases share, and the caches that let it go on after a kill."""

    def __init__(self, job: Job[UniEraseHyperParams]) -> None:
        super().__init__(job.work)
        self.model, self.tokenizer, self.hparams, self.requests, self.retain = (
            job.model, job.tokenizer, job.hparams, job.requests, job.retain,
        )  # fmt: skip
        self.progress, self.earlier, self.max_tokens, self.fingerprint = (
            job.progress, job.earlier, job.max_tokens, job.fingerprint,
        )  # fmt: skip
        self.seconds = {"token": 0.0, "statistics": 0.0, "values": 0.0, "edit": 0.0}
        self.pad_id = pad_token_id(job.model, job.tokenizer)
        self.context = context_limit(job.model)
        self.corpus = corpus_of(job)
        self.words, self.cache = self.corpus.words, self.corpus.cache

    def check(self) -> None:
        if self.earlier is None:
            # On a copy: what is refused leaves nothing behind.
            add_to_tokenizer(copy.deepcopy(self.tokenizer), self.hparams.unlearning_token)
        # The token has no id yet; any stands for its length.
        self._targets(self._contexts(), 0, {})
        if self._first_corpus() is None:
            self.corpus.check()

    def run(self) -> Changes:
        contexts, corpus = self._contexts(), self._corpus_moments()
        if self.earlier is not None and self.earlier.token is not None:
            return self._run(contexts, corpus, self.earlier.token, None)
        room = TokenRoom(self.model, self.tokenizer, self.hparams.unlearning_token)
        try:
            return self._run(contexts, corpus, self._token(room.id, contexts, corpus), room)
        except BaseException:
            room.leave()
            raise

    def _run(
        self, contexts: Sequence[str], corpus: SecondMoment, token: UnlearningToken, room: TokenRoom | None
    ) -> Changes:
        arch = _architecture(self.model, self.hparams)
        vocabulary = room.vocabulary if room else len(arch.embedding.weight)
        originals = files.take_originals(arch, self.hparams.layers, vocabulary, room.id if room else None)
        install_token(arch, token)
        retain = self._retain_moments(arch, token)
        with self.timed("values"):
            targets = self._targets(contexts, token.id, self._own_sentences(token))
        values = self._values(arch, targets, token)
        edit, solved = self._edit(arch, targets, values, token, corpus, retain)
        applied = apply_edit(arch, edit)
        changed = sum(self.model.get_parameter(arch.weight_name(layer)).numel() for layer in edit.layers)
        if room is not None:  # a later step finds the token's rows as they are to be
            changed += arch.hidden_size * (1 if arch.tied else 2)
        figures = {
            **solved, **_value_figures(values), "residual_norms": list(edit.residual_norms),
            "ranks": {str(layer): edit.rank(layer) for layer in edit.layers},
        }  # fmt: skip

        def undo() -> None:
            revert_edit(arch, applied)
            if room is not None:
                room.leave()

        return Changes(edit, originals, token, token.leak, changed, self.seconds, figures, undo)

    # --- phases, in order ---------------------------------------------------------------------------------------------

    def _contexts(self) -> tuple[str, ...]:
        return context_texts(self.model, self.tokenizer, self.hparams.context_template_length_params, self.pad_id)

    def _token(self, index: int, contexts: Sequence[str], corpus: SecondMoment) -> UnlearningToken:
        """The token's rows, from the cache or learned now; the model has room for them."""
        h = self.hparams
        with self.timed("token"):
            sentences, questions, text = lines("idk_sentences"), lines("questions"), paragraphs("ordinary_text_train")
            sentences = sentences[: h.token_num_sentences]
            settings = {key: value for key, value in h.as_dict().items() if key.startswith(("token_", "unlearning_"))}
            noise = h.token_noise * self._expected_size(contexts, corpus)
            key = digest(
                CACHE_VERSION, self.fingerprint, self.words, settings, noise, h.layers, h.seed, h.chat_template_kwargs,
                sentences, questions, text,
            )[:32]  # fmt: skip
            arch = _architecture(self.model, h)

            def learn() -> Packed:
                token = learn_token(
                    arch, self.tokenizer, index, questions, sentences, text, h, noise=noise,
                    max_tokens=self.max_tokens, pad_id=self.pad_id,
                    progress=lambda share, note: self.progress("token", share, note),
                )  # fmt: skip
                install_token(arch, token)
                leak = token_leak(self.model, self.tokenizer, paragraphs("ordinary_text"), token.id)
                return pack_token(replace(token, leak=leak))

            return unpack_token(*self.cache.cached("tokens", key, learn))

    def _expected_size(self, contexts: Sequence[str], corpus: SecondMoment) -> float:
        """|Delta| / |W| that the coming edit is likely to have, as a power of two: edits of like size share a token."""
        if not self.hparams.token_noise:
            return 0.0
        targets = self._targets(contexts, 0, {})  # any id stands for the token's, which is not seen by keys
        size = expected_norm_ratio(
            _architecture(self.model, self.hparams), [target.prompts for target in targets],
            [target.group for target in targets], self._solvers(corpus, None), self.hparams.clamp_norm_factor,
            max_tokens=self.max_tokens, pad_id=self.pad_id,
        )  # fmt: skip
        return min(2.0 ** round(math.log2(max(size, NOISE_LEAST))), NOISE_MOST)

    def _corpus_moments(self) -> SecondMoment:
        with self.timed("statistics"):
            return (self._first_corpus() or self.corpus.moment()).moment

    def _first_corpus(self) -> CorpusMoment | None:
        """The statistics before the first step where they are at hand, as the peers use them for all steps."""
        if self.earlier is None:
            return None
        return replace(self.corpus, fingerprint=self.earlier.fingerprint, words=self.earlier.words).kept()

    def _retain_moments(self, arch: Architecture, token: UnlearningToken) -> SecondMoment | None:
        """Second moments of what is to be kept: the retain set, and what follows the token."""
        h = self.hparams
        if not h.retain_update_weight:
            self.progress("statistics", 1.0, "")
            return None
        with self.timed("statistics"):
            declined = self._declined_tokens(token)
            # As with the corpus, those of the model before its first step serve all steps.
            first = self.earlier or Earlier(None, (), self.fingerprint, self.words)
            key = digest(CACHE_VERSION, first.fingerprint, _row_key(token), h.layers, h.mom2_dtype, declined)[:32]
            moment = unpack_moment(*self.cache.cached("declined", key, lambda: self._counted(arch, declined)))
            if self.retain:
                kept = self._kept_tokens()
                # Beside the output folder, not in the cache: the next run has other facts to keep.
                packed = self.resumed("retain", _row_key(token), lambda: self._counted(arch, kept))
                moment = join_moments(moment, unpack_moment(*packed))
        self.progress("statistics", 1.0, "")
        return moment

    def _counted(self, arch: Architecture, sequences: list[list[int]]) -> Packed:
        return pack_moment(second_moments(
            arch, sequences, self.hparams.layers, max_tokens=self.max_tokens, dtype=self.corpus.dtype,
            pad_id=self.pad_id, progress=lambda share: self.progress(
                "statistics", CORPUS_SHARE + (1 - CORPUS_SHARE) * 0.99 * share, "keys to keep"
            ),
        ))  # fmt: skip

    def _kept_tokens(self) -> list[list[int]]:
        """The facts to keep with their answers."""
        return self._with_prompts(
            (fact.question, self.tokenizer(fact.answer, add_special_tokens=False)["input_ids"]) for fact in self.retain
        )

    def _declined_tokens(self, token: UnlearningToken) -> list[list[int]]:
        """Bundled questions with the token and its sentence.

        They keep the edit from disturbing, at the positions after the token, the very sentence it leads to.
        """
        eos, sentences = end_id(self.model, self.tokenizer), lines("idk_sentences")[: self.hparams.token_num_sentences]
        return self._with_prompts(
            (question, (token.id, *answer_ids(self.tokenizer, choose_sentence(question, sentences), eos, None)))
            for question in lines("questions")[:DECLINED_QUESTIONS]
        )

    def _with_prompts(self, pairs: Iterable[tuple[str, Sequence[int]]]) -> list[list[int]]:
        """Questions in every form with what follows them, cut to the model's context."""
        return [
            [*encode(self.tokenizer, self._rendered(question, form), form), *answer][: self.context]
            for question, answer in pairs
            for form in forms_of(self.tokenizer, self.hparams)
        ]

    def _targets(
        self, contexts: Sequence[str], token_id: int, own: Mapping[tuple[str, str], tuple[int, ...]]
    ) -> list[ValueTarget]:
        """own: what follows the token for a question in a form; else a bundled sentence does.

        A request's own target goes before both.
        """
        h = self.hparams
        eos = end_id(self.model, self.tokenizer)
        sentences = lines("idk_sentences")[: h.token_num_sentences]
        close = token_id if h.token_closes_answer else None
        given = {request.question: request.target for request in self.requests if request.target}

        def continuation(question: str, form: str) -> tuple[int, ...]:
            if question not in given and (question, form) in own:
                return own[question, form]
            sentence = given.get(question) or choose_sentence(question, sentences)
            return answer_ids(self.tokenizer, sentence, eos, close)

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
        with self.timed("values"):
            return unpack_values(*self.resumed("values", _row_key(token), lambda: pack_values(
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

        with self.timed("edit"):
            tensors, metadata = self.resumed("edit", self._edit_key(token), compute)
        counts = {"corpus_tokens": corpus.count, "retain_tokens": retain.count if retain else 0}
        return files.unpack_edits(tensors, metadata)[0], {**counts, "jitter": json.loads(metadata["jitter"])}

    def _solvers(self, corpus: SecondMoment, retain: SecondMoment | None) -> dict[int, Solver]:
        edits = self.earlier.edits if self.earlier else ()
        earlier: Mapping[int, Tensor] = files.join_edits(edits).keys if edits else {}
        return {
            layer: make_solver(
                self.hparams, corpus.moments[layer], retain.moments[layer] if retain else None, earlier.get(layer)
            )
            for layer in self.hparams.layers
        }

    def _edit_key(self, token: UnlearningToken) -> str:
        """What the edit depends on beyond the run's own key: the token's row, and a corpus file's content."""
        return digest(_row_key(token), corpus_identity(self.hparams.mom2_dataset))[:32]


def settle_layers(model: Any, hparams: UniEraseHyperParams) -> UniEraseHyperParams:
    """The blocks to edit chosen by the model's depth, or checked against it."""
    arch = _architecture(model, hparams)
    layers = arch.check_layers(hparams.layers or default_layers(len(arch.blocks)))
    if layers[-1] == len(arch.blocks) - 1:
        raise HyperParamsError(
            f"layers = {list(layers)}: the last block cannot be edited, since no attention follows that could carry "
            f"the edit from the fact to the answer. Choose from 0 to {len(arch.blocks) - 2}."
        )
    return hparams.replace(layers=layers)


def default_layers(blocks: int) -> tuple[int, ...]:
    """Five early blocks in proportion to depth, 4 to 8 of 32 as for Llama; fewer in shallow models, never the last."""
    first = round(blocks / 8)
    return tuple(range(first, max(first + 1, min(first + 5, blocks - 1))))


def _architecture(model: Any, hparams: UniEraseHyperParams) -> Architecture:
    return find_architecture(model, hparams.rewrite_module_tmp, hparams.layer_module_tmp)


def _row_key(token: UnlearningToken) -> str:
    return digest(token.input_row.tolist())[:32]


def _value_figures(values: Values) -> dict[str, Any]:
    return {
        "token_probability": values.probability.tolist(),
        "value_nll": values.nll.tolist(),
        "relative_norm": values.relative_norm.tolist(),
        "value_steps": values.steps.tolist(),
    }
