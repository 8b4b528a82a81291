"""The locate-then-edit engine: statistics, values and the edit that lead answers to a `Goal`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from typing import Any

from torch import Tensor

from ... import checkpoint as files
from ...errors import HyperParamsError, shown
from ...evaluation.metrics import reads_as_idk
from ...facts.resources import lines, paragraphs
from ...facts.subjects import find_subject
from ...hparams import UniEraseHyperParams
from ...locate_then_edit.edit import (
    Applied,
    WeightEdit,
    apply_edit,
    compute_edit,
    make_solver,
    revert_edit,
)
from ...locate_then_edit.positions import locate_kept
from ...locate_then_edit.protected import KeptPrompt, ProtectedKeys, moved, moved_figures, protected_keys
from ...locate_then_edit.solve import Ridge, Solver, protected_directions
from ...locate_then_edit.solvers import SOLVERS
from ...locate_then_edit.targets import context_texts, forms_of, targets_a_request
from ...locate_then_edit.values import Values, ValueTarget, optimise_values
from ...models.architecture import Architecture, find_architecture
from ...models.generate import continue_greedily
from ...models.literal import text_ids
from ...models.prompts import answer_text, encode, render
from ...models.served import check_served
from ...statistics.collection import Corpus, CorpusMoment
from ...statistics.corpus import corpus_identity
from ...statistics.second_moment import SecondMoment, join_moments, second_moments
from ...storage.cache import Store, cache_folder
from ...storage.fingerprints import CACHE_VERSION, digest
from ...storage.phases import Phases
from ...storage.tensor_files import Packed, pack, unpack
from ...unlearning_token import (
    TokenRoom,
    UnlearningToken,
    add_to_tokenizer,
    answer_ids,
    choose_sentence,
    end_id,
    install_token,
)
from ..contract import Changes, Job
from ..neighbours import Kept, find_kept
from ..removal.job import check_removal, removal_of, settle_removal

#: Ids that follow the token, by (question, prompt form).
Own = dict[tuple[str, str], tuple[int, ...]]
#: Tokens at most of a sentence that the model says after the token.
SENTENCE_MOST = 24
#: Bundled questions whose declined form joins what is to be kept.
DECLINED_QUESTIONS = 40
#: Of the progress of the statistics, what is over when the corpus' own are done.
CORPUS_SHARE = 0.9


@dataclass(frozen=True)
class Goal:
    """What answers to forgotten questions are to begin with."""

    #: Called with the edit under way, the texts before prompts, and what the model itself says after the token by
    #: (question, form): what each request aims at, in every prompt form.
    targets: Callable[[Editing, Sequence[str], Own], list[ValueTarget]]
    #: Makes the rows of a new token that answers are to begin with; None where the model has the words already.
    token: Callable[[Editing, Architecture, Sequence[str], SecondMoment], UnlearningToken] | None = None
    #: Whether each request is optimised and edited on the model that the one before left, instead of all together.
    one_by_one: bool = False


def edit(job: Job[Any], goal: Goal) -> Changes:
    """Computes the edit that leads forgotten questions to the goal, and applies it.

    Raises a UniEraseError that names value and remedy; the model is then as before.
    """
    return Editing(job, goal).run()


def check_edit(job: Job[Any], goal: Goal) -> None:
    """Raises a UniEraseError for a token, a fact or a corpus that `edit` could not take; quick."""
    Editing(job, goal).check()


def corpus_of(job: Job[UniEraseHyperParams]) -> Corpus:
    """The ordinary text that a job's edit is to leave alone."""
    return Corpus(
        job.loaded,
        job.hparams,
        Store(cache_folder(job.hparams.stats_dir)),
        lines("questions"),
        paragraphs("ordinary_text_train"),
        lambda share, note: job.progress("statistics", CORPUS_SHARE * share, note),
    )


class Editing(Phases):
    """One edit under way: a job and its goal, with the caches that let it go on after a kill."""

    def __init__(self, job: Job[Any], goal: Goal) -> None:
        super().__init__(job.work)
        self.job, self.goal = job, goal
        self.model, self.tokenizer, self.hparams = job.model, job.tokenizer, job.hparams
        self.requests, self.retain = job.requests, job.retain
        self.progress, self.history, self.max_tokens = job.progress, job.history, job.max_tokens
        self.seconds = {"token": 0.0} if goal.token else {}
        self.seconds.update({"statistics": 0.0, "values": 0.0, "edit": 0.0})
        #: What the values aim at where a target does not say; until the token has its id, any stands for its length.
        self.token_id = 0
        #: Neighbours that the model answers, with its answers, and all that is to be kept; found by `run`.
        self.kept = Kept((), self.retain)
        self.pad_id, self.context = job.loaded.pad_id, job.loaded.context
        self.corpus = corpus_of(job)
        self.cache = self.corpus.cache

    def check(self) -> None:
        """Raises a UniEraseError for what `run` could not take; quick."""
        if self.hparams.remove:
            check_removal(self.job)
        if self.goal.token is not None and self.history is None:
            # On a copy: what is refused leaves nothing behind.
            add_to_tokenizer(copy.deepcopy(self.tokenizer), self.hparams.unlearning_token)
        self.goal.targets(self, self._contexts(), {})
        # A corpus that cannot be read is told before anything takes time.
        if self._first_corpus() is None:
            self.corpus.check()

    def run(self) -> Changes:
        """Computes the edit and applies it."""
        # Before there is a token that the model could say.
        self.kept = find_kept(
            self.job, self, own_words=bool(self.hparams.retain_key_weight), reverse=self.hparams.reverse
        )
        contexts, corpus = self._contexts(), self._corpus_moments()
        if self.goal.token is None:
            return self._run(architecture(self.model, self.hparams), contexts, corpus, None, None)
        if self.history is not None and self.history.token is not None:
            self.token_id = self.history.token.id
            return self._run(architecture(self.model, self.hparams), contexts, corpus, self.history.token, None)
        room = TokenRoom(self.model, self.tokenizer, self.hparams.unlearning_token)
        self.token_id = room.id
        try:
            arch = architecture(self.model, self.hparams)
            return self._run(arch, contexts, corpus, self.goal.token(self, arch, contexts, corpus), room)
        except BaseException:
            room.leave()
            raise

    def _run(
        self,
        arch: Architecture,
        contexts: Sequence[str],
        corpus: SecondMoment,
        token: UnlearningToken | None,
        room: TokenRoom | None,
    ) -> Changes:
        vocabulary = room.vocabulary if room else len(arch.embedding.weight)
        originals = files.take_originals(arch, changed_layers(self.hparams), vocabulary, room.id if room else None)
        key, own = "plain", Own()
        if token is not None:
            install_token(arch, token)
            key = digest(token.input_row.tolist())[:32]
        retain = None if self.hparams.remove else self._retain_moments(arch, key)
        with self.timed("values"):
            if token is not None:
                own = self._own_sentences()
            targets = self.goal.targets(self, contexts, own)
        edit, figures, revert = self._edited(arch, targets, key, corpus, retain)
        changed = self._changed(arch, edit)
        if room is not None:  # a later step finds the token's rows as they are to be
            changed += arch.hidden_size * (1 if arch.tied else 2)

        def undo() -> None:
            revert()
            if room is not None:
                room.leave()

        return Changes(
            edit=edit,
            originals=originals,
            token=token,
            token_leak=token.leak if token else None,
            parameters=changed,
            seconds=self.seconds,
            figures=figures,
            neighbours=self.kept.neighbours,
            undo=undo,
        )

    def _contexts(self) -> tuple[str, ...]:
        return context_texts(self.model, self.tokenizer, self.hparams.context_template_length_params, self.pad_id)

    def _corpus_moments(self) -> SecondMoment:
        with self.timed("statistics"):
            return (self._first_corpus() or self.corpus.moment()).moment

    def _first_corpus(self) -> CorpusMoment | None:
        """The statistics before the first step where they are at hand, as the peers use them for all steps."""
        if self.history is None:
            return None
        first, words = self.history.fingerprint, self.history.tokenizer_fingerprint
        before = replace(self.job.loaded, fingerprint=first, tokenizer_fingerprint=words)
        return replace(self.corpus, loaded=before).kept()

    def _retain_moments(self, arch: Architecture, key: str) -> SecondMoment | None:
        """Second moments of what is to be kept; with a token, of what follows it as well.

        The edit is to leave alone the sentence that the token leads to.
        """
        h, declined = self.hparams, None
        if self.goal.token is not None and h.retain_update_weight:
            with self.timed("statistics"):
                tokens = self._declined_tokens()
                # As with the corpus, those of the model before its first step serve all steps.
                first = self.history.fingerprint if self.history else self.job.fingerprint
                name = digest(CACHE_VERSION, first, key, h.layers, h.mom2_dtype, tokens)[:32]
                packed = self.cache.cached("declined", name, lambda: self._counted(arch, tokens))
            declined = unpack(SecondMoment, *packed)
        sequences, kept = self._retain_tokens() if h.retain_update_weight else [], None
        if sequences:
            with self.timed("statistics"):
                # Beside the output folder, not in the cache: the next run has other facts to keep.
                packed = self.resumed("retain", key, lambda: self._counted(arch, sequences))
            kept = unpack(SecondMoment, *packed)
        self.progress("statistics", 1.0, "")
        return join_moments(declined, kept) if declined and kept else declined or kept

    def _counted(self, arch: Architecture, sequences: list[list[int]]) -> Packed:
        return pack(
            second_moments(
                arch,
                sequences,
                self.hparams.layers,
                max_tokens=self.max_tokens,
                dtype=self.corpus.dtype,
                pad_id=self.pad_id,
                progress=lambda share: self.progress(
                    "statistics", CORPUS_SHARE + (1 - CORPUS_SHARE) * 0.99 * share, "keys to keep"
                ),
            )
        )

    def _retain_tokens(self) -> list[list[int]]:
        """What the edit is to leave alone: the facts to keep, and neighbours, with their answers."""
        return self._asked((fact.question, partial(self._answer, fact.answer)) for fact in self.kept.facts)

    def _asked(self, pairs: Iterable[tuple[str, Callable[[str], Sequence[int]]]]) -> list[list[int]]:
        """Questions in every form, each with the tokens that follow it in that form."""
        return [
            [*encode(self.tokenizer, self._rendered(question, form), form), *answer(form)][: self.context]
            for question, answer in pairs
            for form in forms_of(self.tokenizer, self.hparams)
        ]

    def _declined_tokens(self) -> list[list[int]]:
        """Bundled questions with the token and its sentence."""
        eos, sentences = end_id(self.model, self.tokenizer), lines("idk_sentences")[: self.hparams.token_num_sentences]

        def said(question: str, form: str) -> tuple[int, ...]:
            # The token stands before the sentence in every form, so that no form puts a space there.
            return self.token_id, *answer_ids(self.tokenizer, choose_sentence(question, sentences), eos, None)

        return self._asked((question, partial(said, question)) for question in lines("questions")[:DECLINED_QUESTIONS])

    def _own_sentences(self) -> Own:
        """What the unedited model itself says after the token, where that is an "I don't know" sentence.

        Aiming at it asks for the least change: the edit has to raise the token, and only to keep what follows.
        """
        found: Own = {}
        eos = end_id(self.model, self.tokenizer)
        closing = (self.token_id, eos) if self.hparams.token_closes_answer else (eos,)
        for form in forms_of(self.tokenizer, self.hparams):
            prompts = [
                (*encode(self.tokenizer, self._rendered(request.question, form), form), self.token_id)
                for request in self.requests
            ]
            said = continue_greedily(self.model, self.tokenizer, prompts, SENTENCE_MOST, 2 * self.max_tokens)
            for request, ids in zip(self.requests, said, strict=True):
                sentence = ids[: ids.index(eos)] if eos in ids else []
                text = self.tokenizer.decode(sentence, skip_special_tokens=True)
                if self.token_id not in sentence and reads_as_idk(text, lines("idk_phrases")):
                    found[request.question, form] = (*sentence, *closing)
        return found

    def _answer(self, answer: str, form: str) -> list[int]:
        return text_ids(self.tokenizer, answer_text(self.tokenizer, answer, form))

    def _rendered(self, question: str, form: str) -> str:
        return render(self.tokenizer, question, form, self.hparams.chat_template_kwargs)

    def _edited(
        self,
        arch: Architecture,
        targets: list[ValueTarget],
        key: str,
        corpus: SecondMoment,
        retain: SecondMoment | None,
    ) -> tuple[WeightEdit, dict[str, Any], Callable[[], None]]:
        """The edit, applied: all targets together, or one request after another; its figures, and the way back."""
        if self.hparams.remove:
            return self._distilled(arch, targets)
        size = targets_a_request(self.tokenizer, self.hparams) if self.goal.one_by_one else len(targets)
        groups = [targets[at : at + size] for at in range(0, len(targets), size)]
        weights = {layer: float(arch.projections[layer].weight.float().norm()) for layer in self.hparams.layers}
        edits: list[WeightEdit] = []
        values: list[Values] = []
        first: Applied | None = None
        # Found and factorised once, and only where an edit is not at hand.
        protected = cache(partial(self._protected, arch))
        solvers = cache(lambda: self.solvers(corpus, retain, protected()))

        def revert() -> None:
            if first is not None:  # all have the same blocks
                revert_edit(arch, first)

        try:
            for at, group in enumerate(groups):
                # Alone, a group has the key itself.
                own = digest(key, at)[:32] if len(groups) > 1 else key
                values.append(self._values(arch, group, own, partial(_share, at, len(groups))))
                edit, solved = self._edit(arch, group, values[-1], own, solvers, protected)
                edits.append(edit)
                applied = apply_edit(arch, edit)
                first = first or applied
        except BaseException:
            revert()
            raise
        joined = files.join_edits(edits)
        if len(edits) > 1:
            ratios = {layer: update.norm() / weights[layer] for layer, update in joined.updates.items()}
            joined = replace(joined, norm_ratios=ratios)
        counts = {
            "corpus_tokens": corpus.count,
            "retain_tokens": retain.count if retain else 0,
            "neighbours": len(self.kept.neighbours),
        }
        figures = {
            **counts,
            **solved,
            **_value_figures(values),
            "residual_norms": list(joined.residual_norms),
            "ranks": {str(layer): joined.rank(layer) for layer in joined.layers},
        }
        return joined, figures, revert

    def _distilled(
        self, arch: Architecture, targets: Sequence[ValueTarget]
    ) -> tuple[WeightEdit, dict[str, Any], Callable[[], None]]:
        """The removal, in whose passes what the targets say in the answers' place is learned as well, applied."""
        instead = []
        for target in targets:
            asked = target.prompts[0].ids
            opening = self.token_id if target.opening is None else target.opening
            instead.append(((*asked, opening, *target.continuation), len(asked)))
        removal = removal_of(self.job, arch, self, self.kept, instead)
        applied = apply_edit(arch, removal.edit)
        return (
            removal.edit,
            {"neighbours": len(self.kept.neighbours), "removal": removal.figures},
            partial(revert_edit, arch, applied),
        )

    def _changed(self, arch: Architecture, edit: WeightEdit) -> int:
        return sum(self.model.get_parameter(arch.weight_name(layer)).numel() for layer in edit.layers)

    def _values(
        self, arch: Architecture, targets: list[ValueTarget], key: str, share: Callable[[float], float]
    ) -> Values:
        with self.timed("values"):
            return unpack(
                Values,
                *self.resumed(
                    "values",
                    key,
                    lambda: pack(
                        optimise_values(
                            arch,
                            targets,
                            self.token_id,
                            self.hparams,
                            max_tokens=self.max_tokens,
                            pad_id=self.pad_id,
                            progress=lambda part: self.progress(
                                "values", share(part), f"{len(targets)} requests together"
                            ),
                        )
                    ),
                ),
            )

    def _edit(
        self,
        arch: Architecture,
        targets: list[ValueTarget],
        values: Values,
        key: str,
        solvers: Callable[[], Mapping[int, Solver]],
        protected: Callable[[], ProtectedKeys | None],
    ) -> tuple[WeightEdit, dict[str, Any]]:
        def compute() -> Packed:
            edit = compute_edit(
                arch,
                [target.prompts for target in targets],
                values,
                solvers(),
                max_tokens=self.max_tokens,
                pad_id=self.pad_id,
                progress=lambda share: self.progress("edit", share, ""),
            )
            tensors, metadata = files.pack_edits([edit])
            solved = {**_solve_figures(solvers(), edit), **self._moved(arch, edit, protected())}
            return tensors, {**metadata, "solved": json.dumps(solved)}

        with self.timed("edit"):
            tensors, metadata = self.resumed("edit", self._edit_key(key), compute)
        return files.unpack_edits(tensors, metadata)[0], json.loads(metadata["solved"])

    def _protected(self, arch: Architecture) -> ProtectedKeys | None:
        """Keys of what is to be kept, from where an edit would act to the answer's end; None if they weigh nothing."""
        h = self.hparams
        if not self.kept.facts or not h.retain_key_weight:
            return None
        prompts: list[KeptPrompt] = []
        for number, fact in enumerate(self.kept.facts):
            subject = fact.subject or find_subject(fact.question)
            for form in forms_of(self.tokenizer, h):
                found = locate_kept(self.tokenizer, fact.question, subject, form, h.fact_token, h.chat_template_kwargs)
                ids = (*found.ids, *self._answer(fact.answer, form))[: self.context]
                if found.position < len(ids):
                    prompts.append(KeptPrompt(ids, range(found.position, len(ids)), number))
        if not prompts:
            return None
        return protected_keys(arch, prompts, h.layers, max_tokens=self.max_tokens, pad_id=self.pad_id)

    def _moved(self, arch: Architecture, edit: WeightEdit, protected: ProtectedKeys | None) -> dict[str, Any]:
        """How far the outputs of protected keys move; facts by case_id or number, since a report repeats no texts."""
        if protected is None:
            return {}

        def name(fact: int) -> str:
            if fact < len(self.retain):
                return self.retain[fact].case_id or f"retain {fact}"
            return f"neighbour {self.kept.neighbours[fact - len(self.retain)].case_id}"

        return {"protected": moved_figures(moved(arch, edit.updates, protected), protected.facts, name)}

    def solvers(
        self, corpus: SecondMoment, retain: SecondMoment | None, protected: ProtectedKeys | None = None
    ) -> dict[int, Solver]:
        """The closed form's system of every block."""
        edits = self.history.edits if self.history else ()
        earlier: Mapping[int, Tensor] = files.join_edits(edits).keys if edits else {}
        return {
            layer: make_solver(
                self.hparams,
                corpus.moments[layer],
                retain.moments[layer] if retain else None,
                earlier.get(layer),
                # That of the corpus alone serves other runs as well.
                self._kept_directions if retain is None else protected_directions,
                kept=protected.keys[layer] if protected else None,
                solvers=self.job.solvers or SOLVERS,
            )
            for layer in self.hparams.layers
        }

    def _kept_directions(self, moment: Tensor, threshold: float) -> Tensor:
        name = digest(CACHE_VERSION, sha256(moment.numpy().tobytes()).hexdigest(), threshold)[:32]
        return self.cache.cached(
            "protected-directions", name, lambda: ({"directions": protected_directions(moment, threshold)}, {})
        )[0]["directions"]

    def _edit_key(self, key: str) -> str:
        """What the edit depends on beyond the run's own key: what it aims at, and a corpus file's content."""
        return digest(key, corpus_identity(self.hparams.mom2_dataset))[:32]


def settle_layers(model: Any, hparams: UniEraseHyperParams) -> UniEraseHyperParams:
    """The blocks to edit, and those of a removal before it, chosen by the model's depth, or checked against it."""
    arch = architecture(model, hparams)
    layers = arch.check_layers(hparams.layers or default_layers(len(arch.blocks)))
    if layers[-1] == len(arch.blocks) - 1:
        raise HyperParamsError(
            f"layers = {shown(list(layers))}: the last block cannot be edited, since no attention follows that could "
            f"carry the edit from the fact to the answer. Choose from 0 to {len(arch.blocks) - 2}."
        )
    check_served(arch)
    settled = hparams.replace(layers=layers)
    return settle_removal(arch, settled) if hparams.remove else settled


def changed_layers(hparams: UniEraseHyperParams) -> tuple[int, ...]:
    """The blocks that settled hyper-parameters change, ascending."""
    return hparams.removal_layers if hparams.remove else hparams.layers


def default_layers(blocks: int) -> tuple[int, ...]:
    """Five early blocks in proportion to depth, 4 to 8 of 32 as for Llama; fewer in shallow models, never the last."""
    first = round(blocks / 8)
    return tuple(range(first, max(first + 1, min(first + 5, blocks - 1))))


def architecture(model: Any, hparams: UniEraseHyperParams) -> Architecture:
    """Finds the blocks and MLP output projections, by the module templates of the settings where these are given.

    Raises the errors of `find_architecture`.
    """
    return find_architecture(model, hparams.rewrite_module_tmp, hparams.layer_module_tmp)


def _share(done: int, count: int, part: float) -> float:
    return (done + part) / count


def _solve_figures(solvers: Mapping[int, Solver], edit: WeightEdit) -> dict[str, dict[str, float]]:
    """By block: how ill-conditioned the system was, and how far the update, as it is kept, is from solving it."""
    by_layer = {str(layer): (solver, edit.keys[layer], edit.updates[layer]) for layer, solver in solvers.items()}
    return {
        "jitter": {name: solver.jitter for name, (solver, _, _) in by_layer.items() if isinstance(solver, Ridge)},
        "condition_numbers": {name: solver.condition() for name, (solver, _, _) in by_layer.items()},
        "solve_errors": {name: solver.error(keys, update) for name, (solver, keys, update) in by_layer.items()},
    }


def _value_figures(values: Sequence[Values]) -> dict[str, Any]:
    def joined(name: str) -> list[float]:
        return [float(value) for each in values for value in getattr(each, name)]

    return {
        "token_probability": joined("probability"),
        "value_nll": joined("nll"),
        "relative_norm": joined("relative_norm"),
        "value_steps": [int(steps) for each in values for steps in each.steps],
    }
