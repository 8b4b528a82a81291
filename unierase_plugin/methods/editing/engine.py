"""The locate-then-edit engine: computes statistics, values and the edit that leads answers to a `Goal`."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from typing import Any

from torch import Tensor

from ... import checkpoint as files
from ...evaluation.metrics import reads_as_idk
from ...facts.resources import lines, paragraphs
from ...hparams import UniEraseHyperParams
from ...locate_then_edit.edit import WeightEdit, add_updates, compute_edit, make_solver
from ...locate_then_edit.protected import ProtectedKeys
from ...locate_then_edit.solve import Ridge, Solver, protected_directions
from ...locate_then_edit.solve_experts import ExpertsRidge
from ...locate_then_edit.solvers import SOLVERS
from ...locate_then_edit.targets import forms_of, targets_a_request
from ...locate_then_edit.value_loss import ValueTarget
from ...locate_then_edit.values import Values, optimise_values
from ...models.added_token import TokenRoom, add_to_tokenizer
from ...models.architecture import Architecture
from ...models.generate import continue_greedily
from ...models.prompts import encode, render
from ...models.response import changes_on_the_way
from ...models.routes import route_changes, routes
from ...statistics.collection import Corpus, CorpusMoment
from ...statistics.corpus import corpus_identity
from ...statistics.second_moment import SecondMoment
from ...storage.cache import Store, cache_folder
from ...storage.fingerprints import CACHE_VERSION, digest
from ...storage.phases import Phases
from ...storage.tensor_files import Packed
from ...unlearning_token import UnlearningToken, end_id, install_token
from ..contract import Changes, Job
from ..neighbours import Kept, find_kept
from ..removal.job import check_removal, removal_of
from .layers import architecture, changed_layers
from .protection import CORPUS_SHARE, Protection

logger = logging.getLogger(__name__)

#: From this share on, the states are nearer to where they were than to their values.
MUCH_LEFT = 0.5
#: Ids that follow the token, by (question, prompt form).
Own = dict[tuple[str, str], tuple[int, ...]]
#: Ordinary texts, and tokens of each, whose experts are compared before and after the edit.
ROUTED_TEXTS, ROUTED_LENGTH = 16, 64
#: The most tokens of a sentence that the model says after the token.
SENTENCE_MOST = 24


@dataclass(frozen=True)
class Goal:
    """How answers to forgotten questions shall begin."""

    #: Gives the target of each request in every prompt form. Called with the edit under way, and with the model's own
    #: sentences after the token by (question, form).
    targets: Callable[[Editing, Own], list[ValueTarget]]
    #: Makes the rows of a new token with which answers shall begin; None if the model has the words already.
    token: Callable[[Editing, Architecture, SecondMoment], UnlearningToken] | None = None
    #: Whether requests are optimised and edited one after another on the changed model, instead of all together.
    one_by_one: bool = False


def edit(job: Job[Any], goal: Goal) -> Changes:
    """Computes the edit that leads forgotten questions to the goal, and applies it.

    Raises a UniEraseError that names value and remedy. The model is then as before.
    """
    return Editing(job, goal).run()


def check_edit(job: Job[Any], goal: Goal) -> None:
    """Raises a UniEraseError for a token, a fact or a corpus that `edit` cannot take. It is quick."""
    Editing(job, goal).check()


def corpus_of(job: Job[UniEraseHyperParams]) -> Corpus:
    """The ordinary text that a job's edit shall leave alone."""
    return Corpus(
        loaded=job.loaded,
        hparams=job.hparams,
        cache=Store(cache_folder(job.hparams.stats_dir)),
        openings=lines("questions"),
        prose=paragraphs("ordinary_text_train"),
        progress=lambda share, note: job.progress("statistics", CORPUS_SHARE * share, note),
    )


class Editing:
    """One edit under way: a job, its goal, and the results so far. Results of phases are kept for the next start."""

    def __init__(self, job: Job[Any], goal: Goal) -> None:
        self.job, self.goal = job, goal
        self.model, self.tokenizer, self.hparams = job.model, job.tokenizer, job.hparams
        self.corpus = corpus_of(job)
        self.cache = self.corpus.cache
        self.phases = Phases(job.work)
        for phase in ("token", "statistics", "values", "edit") if goal.token else ("statistics", "values", "edit"):
            self.phases.seconds[phase] = 0.0
        #: The token with which answers begin if a target names no other. Before the token has its id, any id will do.
        self.token_id = 0
        #: Neighbours with the model's answers, and the retain set. `run` finds the neighbours.
        self.kept = Kept((), job.retain)

    def check(self) -> None:
        """Raises a UniEraseError for a job that `run` cannot do. It is quick."""
        if self.hparams.remove:
            check_removal(self.job)
        if self.goal.token is not None and self.job.history is None:
            # On a copy, so that a refused token leaves no trace.
            add_to_tokenizer(copy.deepcopy(self.tokenizer), self.hparams.unlearning_token)
        self.goal.targets(self, {})
        # A corpus that cannot be read is reported before the long work.
        if self._first_corpus() is None:
            self.corpus.check()

    def run(self) -> Changes:
        """Computes the edit and applies it."""
        job = self.job
        # First, since after the next lines the model could say the token.
        self.kept = find_kept(
            job, self.phases, own_words=bool(self.hparams.retain_key_weight), reverse=self.hparams.reverse
        )
        corpus = self._corpus_moments()
        if self.goal.token is None:
            return self._run(architecture(self.model, self.hparams), corpus, None, None)
        if job.history is not None and job.history.token is not None:
            self.token_id = job.history.token.id
            return self._run(architecture(self.model, self.hparams), corpus, job.history.token, None)
        room = TokenRoom(self.model, self.tokenizer, self.hparams.unlearning_token)
        self.token_id = room.id
        try:
            arch = architecture(self.model, self.hparams)
            return self._run(arch, corpus, self.goal.token(self, arch, corpus), room)
        except BaseException:
            room.leave()
            raise

    def _run(
        self, arch: Architecture, corpus: SecondMoment, token: UnlearningToken | None, room: TokenRoom | None
    ) -> Changes:
        vocabulary = room.vocabulary if room else len(arch.embedding.weight)
        originals = files.take_originals(arch, changed_layers(self.hparams), vocabulary, room.id if room else None)
        key, own = "plain", Own()
        if token is not None:
            install_token(arch, token)
            key = digest(token.input_row.tolist())[:32]
        protection = self._protection(None if token is None else self.token_id)
        retain = None if self.hparams.remove else protection.moments(arch, key)
        with self.phases.timed("values"):
            if token is not None:
                own = self._own_sentences()
            targets = self.goal.targets(self, own)
        try:
            if self.hparams.remove:
                edit, figures = self._distilled(arch, targets)
            else:
                edit, figures = self._edited(arch, targets, key, corpus, retain, protection)
        except BaseException:
            originals.restore_projections(self.model)
            raise
        changed = sum(weight.numel() for weight in originals.projections.values())
        if room is not None:  # for a later step, the token's rows are there already
            changed += arch.hidden_size * (1 if arch.tied else 2)

        def undo() -> None:
            originals.restore_projections(self.model)
            if room is not None:
                room.leave()

        return Changes(
            edit=edit,
            originals=originals,
            token=token,
            token_leak=token.leak if token else None,
            parameters=changed,
            seconds=self.phases.seconds,
            figures=figures,
            neighbours=self.kept.neighbours,
            undo=undo,
        )

    # --- what the edit leaves alone -----------------------------------------------------------------------------------

    def _corpus_moments(self) -> SecondMoment:
        with self.phases.timed("statistics"):
            return (self._first_corpus() or self.corpus.moment()).moment

    def _first_corpus(self) -> CorpusMoment | None:
        """The statistics from before the first step, if they are in the cache. Peers use these for all steps too."""
        history = self.job.history
        if history is None:
            return None
        before = replace(
            self.job.loaded, fingerprint=history.fingerprint, tokenizer_fingerprint=history.tokenizer_fingerprint
        )
        return replace(self.corpus, loaded=before).kept()

    def _protection(self, token_id: int | None) -> Protection:
        return Protection(
            job=self.job,
            kept=self.kept,
            token_id=token_id,
            dtype=self.corpus.dtype,
            cache=self.cache,
            phases=self.phases,
        )

    # --- what it aims at ----------------------------------------------------------------------------------------------

    def _own_sentences(self) -> Own:
        """The unedited model's own sentence after the token, if it is an "I don't know" sentence.

        This target needs the least change: the edit must raise the token, and only keep what follows.
        """
        found: Own = {}
        eos = end_id(self.model, self.tokenizer)
        closing = (self.token_id, eos) if self.hparams.token_closes_answer else (eos,)
        for form in forms_of(self.tokenizer, self.hparams):
            shown = [
                render(self.tokenizer, request.question, form, self.hparams.chat_template_kwargs)
                for request in self.job.requests
            ]
            prompts = [(*encode(self.tokenizer, text, form), self.token_id) for text in shown]
            said = continue_greedily(self.model, self.tokenizer, prompts, SENTENCE_MOST, 2 * self.job.max_tokens)
            for request, ids in zip(self.job.requests, said, strict=True):
                sentence = ids[: ids.index(eos)] if eos in ids else []
                text = self.tokenizer.decode(sentence, skip_special_tokens=True)
                if self.token_id not in sentence and reads_as_idk(text, lines("idk_phrases")):
                    found[request.question, form] = (*sentence, *closing)
        return found

    # --- the edit -----------------------------------------------------------------------------------------------------

    def _edited(
        self,
        arch: Architecture,
        targets: list[ValueTarget],
        key: str,
        corpus: SecondMoment,
        retain: SecondMoment | None,
        protection: Protection,
    ) -> tuple[WeightEdit, dict[str, Any]]:
        """Computes and applies the edit, for all targets together or one request after another, with its figures."""
        size = targets_a_request(self.tokenizer, self.hparams) if self.goal.one_by_one else len(targets)
        groups = [targets[at : at + size] for at in range(0, len(targets), size)]
        weights = {layer: float(arch.projections[layer].weight.float().norm()) for layer in self.hparams.layers}
        routed = self._routes(arch)
        edits: list[WeightEdit] = []
        values: list[Values] = []
        solved: dict[str, Any] = {}
        # Computed and factorised once, and only if an edit is not in the cache.
        protected = cache(partial(protection.keys, arch))
        solvers = cache(lambda: self.solvers(corpus, retain, protected()))
        for at, group in enumerate(groups):
            # A single group has the key itself.
            own = digest(key, at)[:32] if len(groups) > 1 else key
            values.append(self._values(arch, group, own, partial(_share, at, len(groups))))
            moved = partial(_moved, protection, arch, protected)
            edit, solved = self._edit(arch, group, values[-1], own, solvers, moved)
            edits.append(edit)
            add_updates(arch, edit)
        joined = files.join_edits(edits)
        if len(edits) > 1:
            ratios = {layer: update.norm() / weights[layer] for layer, update in joined.updates.items()}
            joined = replace(joined, norm_ratios=ratios)
        figures = {
            "corpus_tokens": corpus.count,
            "retain_tokens": retain.count if retain else 0,
            "neighbours": len(self.kept.neighbours),
            **solved,
            **_value_figures(values),
            "residual_norms": list(joined.residual_norms),
            "residual_left": _residual_left(edits),
            "ranks": {str(layer): joined.rank(layer) for layer in joined.layers},
        }
        if routed:
            figures["routes"] = route_changes(routed, self._routes(arch))
        return joined, figures

    def _routes(self, arch: Architecture) -> dict[int, Tensor]:
        """The experts of tokens of ordinary text in the blocks above the first edited one; empty without experts."""
        ids = [self.tokenizer(text)["input_ids"][:ROUTED_LENGTH] for text in paragraphs("ordinary_text")[:ROUTED_TEXTS]]
        above = range(self.hparams.layers[0] + 1, len(arch.blocks))
        loaded = self.job.loaded
        return routes(arch, ids, above, max_tokens=loaded.max_tokens, pad_id=loaded.pad_id)

    def _distilled(self, arch: Architecture, targets: Sequence[ValueTarget]) -> tuple[WeightEdit, dict[str, Any]]:
        """Computes and applies the removal. Its passes also learn the targets' replacement answers."""
        instead = []
        for target in targets:
            asked = target.prompts[0].ids
            opening = self.token_id if target.opening is None else target.opening
            instead.append(((*asked, opening, *target.continuation), len(asked)))
        removal = removal_of(self.job, arch, self.phases, self.kept, instead)
        add_updates(arch, removal.edit)
        return removal.edit, {"neighbours": len(self.kept.neighbours), "removal": removal.figures}

    def _values(
        self, arch: Architecture, targets: list[ValueTarget], key: str, share: Callable[[float], float]
    ) -> Values:
        loaded = self.job.loaded
        compute = partial(
            optimise_values,
            arch,
            targets,
            self.token_id,
            self.hparams,
            max_tokens=loaded.max_tokens,
            pad_id=loaded.pad_id,
            progress=lambda part: self.job.progress("values", share(part), f"{len(targets)} requests together"),
        )
        if changes_on_the_way(arch, self.hparams.layers[-1:]):
            key = digest(key, "vectors")[:32]
        with self.phases.timed("values"):
            return self.phases.record(Values, "values", key, compute)

    def _edit(
        self,
        arch: Architecture,
        targets: list[ValueTarget],
        values: Values,
        key: str,
        solvers: Callable[[], Mapping[int, Solver]],
        moved: Callable[[WeightEdit], dict[str, Any]],
    ) -> tuple[WeightEdit, dict[str, Any]]:
        """The edit of a group of targets, and figures of its solved systems."""
        loaded = self.job.loaded

        def compute() -> Packed:
            edit = compute_edit(
                arch,
                [target.prompts for target in targets],
                values,
                solvers(),
                max_tokens=loaded.max_tokens,
                pad_id=loaded.pad_id,
                progress=lambda share: self.job.progress("edit", share, ""),
            )
            tensors, metadata = files.pack_edits([edit])
            return tensors, {**metadata, "solved": json.dumps({**_solve_figures(solvers(), edit), **moved(edit)})}

        # Beside the run's own key, the edit depends on its targets and on a corpus file's content.
        # Earlier versions took every block for one that adds its projection's output as it is.
        changing = ["vectors"] if changes_on_the_way(arch, self.hparams.layers) else []
        name = digest(key, corpus_identity(self.hparams.mom2_dataset), *changing)[:32]
        with self.phases.timed("edit"):
            tensors, metadata = self.phases.resumed("edit", name, compute)
        return files.unpack_edits(tensors, metadata)[0], json.loads(metadata["solved"])

    def solvers(
        self, corpus: SecondMoment, retain: SecondMoment | None, protected: ProtectedKeys | None = None
    ) -> dict[int, Solver]:
        """The solver of every block."""
        edits = self.job.history.edits if self.job.history else ()
        earlier: Mapping[int, Tensor] = files.join_edits(edits).keys if edits else {}
        return {
            layer: make_solver(
                self.hparams,
                corpus.moments[layer],
                retain.moments[layer] if retain else None,
                earlier.get(layer),
                # The directions of the corpus alone serve other runs too.
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


def _moved(
    protection: Protection, arch: Architecture, protected: Callable[[], ProtectedKeys | None], edit: WeightEdit
) -> dict[str, Any]:
    return protection.moved(arch, edit, protected())


def _share(done: int, count: int, part: float) -> float:
    return (done + part) / count


def _solve_figures(solvers: Mapping[int, Solver], edit: WeightEdit) -> dict[str, dict[str, float]]:
    """By block: the condition of the system, and how far the stored update is from solving it."""
    by_layer = {str(layer): (solver, edit.keys[layer], edit.updates[layer]) for layer, solver in solvers.items()}
    return {
        "jitter": {
            name: solver.jitter
            for name, (solver, _, _) in by_layer.items()
            if isinstance(solver, (Ridge, ExpertsRidge))
        },
        "condition_numbers": {name: solver.condition() for name, (solver, _, _) in by_layer.items()},
        "solve_errors": {name: solver.error(keys, update) for name, (solver, keys, update) in by_layer.items()},
    }


def _residual_left(edits: Sequence[WeightEdit]) -> float:
    """The share of the way from the states to their values that is left, measured after each edit.

    It is 0 if the states were at their values before. A large one is told.
    """
    before = sum(edit.residual_norms[0] * edit.rank(edit.layers[0]) for edit in edits)
    after = sum(edit.residual_norms[-1] * edit.rank(edit.layers[0]) for edit in edits)
    left = after / before if before else 0.0
    if left > MUCH_LEFT:
        logger.warning(
            "The edit does not reach its values: %.0f %% of the way is left (edit.residual_left in the report), so the "
            "model may go on answering. Give less weight to what holds it back (mom2_update_weight, "
            "retain_update_weight, retain_key_weight or L2), lower clamp_norm_factor, edit more blocks (layers), or "
            "forget fewer facts at once.",
            100 * left,
        )
    return left


def _value_figures(values: Sequence[Values]) -> dict[str, Any]:
    def joined(name: str) -> list[float]:
        return [float(value) for each in values for value in getattr(each, name)]

    return {
        "token_probability": joined("probability"),
        "value_nll": joined("nll"),
        "relative_norm": joined("relative_norm"),
        "value_steps": [int(steps) for each in values for steps in each.steps],
    }
