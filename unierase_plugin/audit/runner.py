"""An audit from facts and models to `audit.json` and `audit.html`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError
from ..facts.readers import Requests
from ..facts.request import HELD_OUT, TO_KEEP, check_not_forgotten, check_overlap
from ..plugins.registration import answer_metrics, registry
from ..settings.values import checked_seed
from ..storage.atomic import clear_strays, make_folder, write_json
from ..storage.fingerprints import plain
from ..storage.inputs import absolute_path
from ..storage.results_folder import results_folder
from .attacking import Progress, attack_model, settle
from .attacks import choose_attacks
from .contract import EDITED, QUICK, REFERENCE, UNEDITED, Context, Sizes
from .facts import judgeable, read_facts, sample
from .kept_results import PARTS
from .page import write_page
from .report import make_report
from .sources import Source, find_sources, remove_rebuilt, take_back

logger = logging.getLogger(__name__)

#: The controls come first, so that their results are there for the comparison.
ROLES = (REFERENCE, UNEDITED, EDITED)


def audit(
    model: Source,
    forget: Requests,
    *,
    out: str | os.PathLike[str],
    retain: Requests | None = None,
    holdout: Requests | None = None,
    allow_overlap: bool = False,
    base: Source | None = None,
    reference: Source | None = None,
    sizes: Sizes = QUICK,
    attacks: Sequence[str] = (),
    metrics: Sequence[str] = (),
    seed: int = 0,
    device: str = "",
    dtype: str = "",
    progress: Progress = lambda phase, share, note: None,
) -> dict[str, Any]:
    """Attacks an edited model and its controls, and writes `audit.json` and `audit.html` into `out`.

    An audit that was stopped goes on when it is called again with the same arguments.

    Args:
        model: The model, edited by any method: its folder, or a pair of the loaded model and its tokenizer.
        forget: The facts that were to be forgotten.
        out: The output folder.
        retain: Facts that were to be kept.
        holdout: Facts that the model never saw.
        allow_overlap: Whether a fact may be in two of the three sets, and a kept or held-out one in the record.
        base: The unedited model, given like `model`. Without it, the folder's record names it or gives it back.
        reference: A model that was trained on the same data without the facts to forget, given like `model`.
        sizes: QUICK or FULL.
        attacks: Names of attacks or groups. All attacks if it is empty.
        metrics: Registered metrics that also measure the answers to the plain questions.
        seed: The seed of all random choices.
        device: cpu, cuda, cuda:1, mps or auto; empty chooses.
        dtype: The dtype that models are loaded in; empty for the checkpoint's.
        progress: Called with a phase, the share that is done, and a note.

    Returns:
        What audit.json holds.

    Raises:
        UniEraseError: Names the value and the remedy.
    """
    checked_seed(seed)
    measured = answer_metrics(metrics)
    target = _output_folder(out, model)
    with results_folder(target, ("audit.json", "audit.html"), _began):
        make_folder(target / PARTS)
        for folder in (target, target / PARTS):
            clear_strays(folder)
        known, readers = registry().attacks, registry().readers
        chosen = choose_attacks(attacks, known)
        facts = read_facts(forget, readers)
        kept, held_out = (() if spec is None else read_facts(spec, readers) for spec in (retain, holdout))
        if not allow_overlap:
            check_overlap(facts, kept)
            check_overlap(facts, held_out, second=HELD_OUT)
            check_overlap(kept, held_out, TO_KEEP, HELD_OUT)
        sources = find_sources(model, base, reference, target)
        fit = sample(judgeable(facts), sizes.facts, seed)
        if not fit:
            raise RequestError(
                f"None of the {len(facts)} facts can be audited: every question already gives its answer. Give other "
                "facts."
            )
        if sources.record is not None and not allow_overlap:
            for each, what in ((kept, TO_KEEP), (held_out, HELD_OUT)):
                forgotten = sources.record.forgotten(fact.question for fact in each)
                check_not_forgotten(each, forgotten, sources.name(EDITED), what)
        if sources.record is not None and not any(sources.record.holds(fact.question) for fact in fit):
            logger.warning(
                "The record of %s names none of these facts. Check that --forget names the facts it was to forget.",
                sources.name(EDITED),
            )
        context = Context(
            facts=fit,
            kept=sample(judgeable(kept), sizes.kept, seed),
            sizes=sizes,
            seed=seed,
            holdout=sample(held_out, sizes.facts, seed),
            has_reference=reference is not None,
        )
        state = settle(context, known, chosen, sources)
        # Before the first attack, so that a folder that cannot be taken back costs no work.
        take_back(sources)
        for role in ROLES:
            if sources.source(role) is not None:
                attack_model(state, sources, role, target, device=device, dtype=dtype, progress=progress)
        report = make_report(state, sources, facts, kept, measured)
        write_json(target / "audit.json", report)
        write_page(target / "audit.html", plain(report))
        remove_rebuilt(target)
        return report


def _began(out: Path) -> bool:
    """Whether an audit was begun in the folder."""
    try:
        found = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any(True for role in ROLES for _ in (out / PARTS).glob(f"{role}.*.json"))
    return isinstance(found, dict) and {"schema", "verdict"} <= found.keys()


def _output_folder(out: str | os.PathLike[str], model: Source) -> Path:
    out = absolute_path(out, CheckpointError)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{str(out)!r} is a file. Give the name of a folder. It is created if needed.")
    if not isinstance(model, tuple) and out == absolute_path(model):
        raise CheckpointError(
            f"{str(out)!r} is the model's own folder. Choose another --out, such as {out.name}-audit."
        )
    return out
