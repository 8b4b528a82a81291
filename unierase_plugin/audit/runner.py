"""Runs the attacks on each model, keeps every result as it comes, and puts the page together."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..attack import check_result
from ..checkpoint import Checkpoint, examine, is_edited, is_whole, revert_checkpoint
from ..errors import CheckpointError, PluginError, RequestError, UniEraseError, WriteError, reason, shown
from ..facts.readers import Requests
from ..facts.request import HELD_OUT, TO_KEEP, ForgetRequest, check_not_forgotten, check_overlap
from ..models.chat_templates import check_chat_template
from ..models.literal import tell_special_names
from ..models.loading import load, read_tokenizer
from ..models.memory import peak_memory_bytes
from ..models.prompts import has_chat_template
from ..plugins.catalogue import BUILT_IN, Catalogue, Plugin
from ..plugins.registration import registry
from ..settings.values import checked_seed
from ..storage.atomic import clear_strays, make_folder, remove_folder, write_json
from ..storage.fingerprints import digest, model_fingerprint, plain, tokenizer_fingerprint
from ..storage.inputs import absolute_path, no_folder
from ..storage.results_folder import results_folder
from .attacks import choose_attacks, in_order
from .contract import (
    EDITED,
    GROUPS,
    QUICK,
    REFERENCE,
    UNEDITED,
    Attack,
    AttackResult,
    Audited,
    Context,
    Measure,
    Sizes,
)
from .facts import judgeable, read_facts, sample
from .page import write_page
from .verdict import Finding, compare, find_damage, judge

logger = logging.getLogger(__name__)

#: Version of audit.json's schema (docs/explanation/audit.md), and part of every kept result's key.
SCHEMA = 1
#: Folder within the output in which results are kept as they come.
PARTS = "results"
#: And the unedited model, where it is taken back, until the audit is done; its fingerprint follows, since a folder that
#: a stopped audit left may be of another model.
REBUILT = "unedited"
#: Digits of the fingerprint in its name.
FINGERPRINT = 12
#: In this order, so that what is compared with a control finds it there.
ROLES = (REFERENCE, UNEDITED, EDITED)
#: Examples of each attack that the page shows.
EXAMPLES = 4

Progress = Callable[[str, float, str], None]
#: A folder or hub id, or a model at hand with its tokenizer.
Source = str | os.PathLike[str] | tuple[Any, Any]


@dataclass(frozen=True)
class _Models:
    """Where each model comes from."""

    edited: Source
    unedited: Source
    reference: Source | None
    record: Checkpoint | None
    #: How the unedited model was found, in words.
    how: str
    #: Where it is taken back to, from the edited folder.
    rebuilt: Path | None = None

    def source(self, role: str) -> Source | None:
        return {EDITED: self.edited, UNEDITED: self.unedited, REFERENCE: self.reference}[role]

    def name(self, role: str) -> str:
        return _named(self.source(role))


def _named(source: Source | None) -> str:
    return "a model at hand" if isinstance(source, tuple) else str(source)


@dataclass
class _Run:
    """What is known of a running audit."""

    context: Context
    #: Every attack that there is, and those that were chosen.
    known: Catalogue[Attack]
    attacks: tuple[Attack, ...]
    not_run: dict[str, str]
    inapplicable: dict[str, str]
    #: What tells each model from any other.
    identities: dict[str, list[str]] = field(default_factory=dict)
    results: dict[str, dict[str, AttackResult]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


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
    seed: int = 0,
    device: str = "",
    dtype: str = "",
    progress: Progress = lambda phase, share, note: None,
) -> dict[str, Any]:
    """Attacks an edited model and its controls, and writes `audit.json` and `audit.html` into `out`.

    An audit that was stopped goes on when it is called again with the same arguments.

    Args:
        model: The edited model, by whatever method: its folder, or the model at hand with its tokenizer, as a pair.
        forget: The facts that were to be forgotten.
        out: The output folder.
        retain: Facts that were to be kept.
        holdout: Facts that the model never saw.
        allow_overlap: Whether a fact may be in two of the three sets, and a kept or held-out one in the record.
        base: The unedited model, given like `model`. Without it: the one that the folder's record names, or that is
            taken back from it.
        reference: A model trained on everything but the facts to forget, given like `model`.
        sizes: QUICK or FULL.
        attacks: Names of attacks or groups; all where none is given.
        seed: Seed of everything random.
        device: cpu, cuda, cuda:1, mps or auto; empty chooses.
        dtype: The dtype that models are loaded in; empty for the checkpoint's.
        progress: Called with a phase, the share of it that is done, and a note.

    Returns:
        What audit.json holds.

    Raises:
        UniEraseError: Names the value and the remedy.
    """
    checked_seed(seed)
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
        models = _find_models(model, base, reference, target)
        fit = sample(judgeable(facts), sizes.facts, seed)
        if not fit:
            raise RequestError(
                f"None of the {len(facts)} facts can be audited: each question already holds its answer. Give others."
            )
        if models.record is not None and not allow_overlap:
            for each, what in ((kept, TO_KEEP), (held_out, HELD_OUT)):
                forgotten = models.record.forgotten(fact.question for fact in each)
                check_not_forgotten(each, forgotten, models.name(EDITED), what)
        if models.record is not None and not any(models.record.holds(fact.question) for fact in fit):
            logger.warning("The record of %s names none of these facts: was it to forget others?", models.name(EDITED))
        context = Context(
            fit,
            sample(judgeable(kept), sizes.kept, seed),
            sizes,
            seed,
            sample(held_out, sizes.facts, seed),
            has_reference=reference is not None,
        )
        run = _settled(context, known, chosen, models)
        # Before the first attack: a folder that cannot be taken back is to be known now, not after half of the work.
        _take_back(models)
        for role in ROLES:
            if models.source(role) is not None:
                _attack(run, models, role, target, device, dtype, progress)
        report = _report(run, models, facts, kept)
        write_json(target / "audit.json", report)
        write_page(target / "audit.html", plain(report))
        for rebuilt in target.glob(f"{REBUILT}-{'[0-9a-f]' * FINGERPRINT}"):
            remove_folder(rebuilt)
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


def _settled(context: Context, known: Catalogue[Attack], chosen: tuple[Attack, ...], models: _Models) -> _Run:
    """The context with what the edited folder tells (token, prompt form, edited blocks), and what is left out."""
    tokenizer = _tokenizer(models.edited)
    tell_special_names(tokenizer, (*context.facts, *context.kept))
    record, token = models.record, _unlearning_token(models.record, tokenizer)
    settings = record.manifest["hparams"] if record else {}
    context = replace(
        context,
        token=token,
        form="chat" if has_chat_template(tokenizer) else "plain",
        template_kwargs=settings.get("chat_template_kwargs") or {},
        layers=tuple(record.manifest["layers"]) if record else (),
    )
    names = {attack.name for attack in chosen}
    missing = {attack.name: "not chosen (--attacks)" for attack in in_order(known) if attack.name not in names}
    missing.update({attack.name: attack.unfit(context) for attack in chosen if attack.unfit(context)})
    needing = [] if token else [attack.name for attack in in_order(known) if attack.needs_token]
    inapplicable = dict.fromkeys(needing, "the model has no unlearning token")
    check_chat_template(tokenizer, context.template_kwargs)
    not_run = {name: why for name, why in missing.items() if name not in needing}
    return _Run(context, known, chosen, not_run, inapplicable)


def _tokenizer(source: Source) -> Any:
    if isinstance(source, tuple):
        return source[1]
    try:
        return read_tokenizer(str(source))
    except Exception as error:  # the hub, the file system and the tokenizer each have their own errors
        raise UniEraseError(
            f"No tokenizer can be loaded from {shown(str(source))}. {no_folder(str(source))}Give the folder or hub id "
            f"of a model with its tokenizer ({reason(error)})."
        ) from error


# --- models ----------------------------------------------------------------------------------------------------------


def _find_models(model: Source, base: Source | None, reference: Source | None, target: Path) -> _Models:
    record = None
    if not isinstance(model, tuple) and is_edited(model):
        record = examine(model).up_to()
    name = _named(model)
    if base is not None:
        return _Models(model, base, reference, record, "given as --base")
    if record is None:
        missing = "" if isinstance(model, tuple) else no_folder(model)
        raise UniEraseError(
            f"{missing}{name!r} has no record of its edit, so that the unedited model is not known. Name it: --base "
            "DIR_OR_ID."
        )
    if record.originals is not None:
        rebuilt = target / f"{REBUILT}-{record.manifest['model_fingerprint_before'][:FINGERPRINT]}"
        return _Models(model, rebuilt, reference, record, f"taken back to the bit from {name}", rebuilt)
    return _Models(model, str(record.manifest["model"]), reference, record, f"named in the record of {name}")


def _take_back(models: _Models) -> None:
    """Writes the unedited model where the record is to give it, unless an audit that was stopped left it whole."""
    if models.rebuilt is None or is_whole(models.rebuilt):
        return
    remove_folder(models.rebuilt)
    try:
        revert_checkpoint(models.name(EDITED), models.rebuilt)
    except WriteError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error} For the audit: --base DIR_OR_ID names the unedited model.") from error


def _load(models: _Models, role: str, token: str, device: str, dtype: str) -> Audited:
    source = models.source(role)
    model, tokenizer = source if isinstance(source, tuple) else load(str(source), device, dtype)
    return Audited(role, model, tokenizer, tokenizer.get_vocab().get(token) if token else None)


def _unlearning_token(record: Checkpoint | None, tokenizer: Any) -> str:
    """Its text, from the record or, for folders of other tools, from the tokenizer's added tokens; "" without one."""
    if record is not None:
        return record.token.name if record.token else ""
    return min((name for name in tokenizer.get_added_vocab() if re.fullmatch(r"<unlearn_?\d*>", name)), default="")


# --- attacks ---------------------------------------------------------------------------------------------------------


def _attack(run: _Run, models: _Models, role: str, target: Path, device: str, dtype: str, progress: Progress) -> None:
    """Every attack on one model; results that were kept are read instead."""
    progress(f"{role}: load", 0.0, "")
    subject = _load(models, role, run.context.token, device, dtype)
    run.identities[role] = _identity(subject)
    progress(f"{role}: load", 1.0, models.name(role))
    wanted = [attack for attack in run.attacks if attack.name not in {**run.not_run, **run.inapplicable}]
    if role == REFERENCE:
        wanted = [attack for attack in wanted if not attack.of_the_edit]
    run.results.setdefault(role, {})
    for attack in wanted:
        earlier = {other: found[attack.name] for other, found in run.results.items() if attack.name in found}
        context = replace(
            run.context,
            earlier={other: found for other, found in earlier.items() if other != role},
            plain=run.results[role].get("plain"),
            progress=partial(_forward, progress, f"{role}: {attack.name}"),
        )
        if attack.needs_original:
            # Loaded for this attack alone, so that other attacks have the memory.
            original = subject if role == UNEDITED else _load(models, UNEDITED, run.context.token, device, dtype)
            run.identities.setdefault(UNEDITED, _identity(original))
            context = replace(context, original=original)
        path = target / PARTS / f"{role}.{attack.name}.json"
        owner = run.known.owner(attack.name)
        result = _kept_or_run(attack, subject, context, run.identities, path, None if owner.name == BUILT_IN else owner)
        run.results[role][attack.name] = result
        run.seconds[role] = run.seconds.get(role, 0.0) + result.seconds
        context.progress(1.0)


def _identity(subject: Audited) -> list[str]:
    return [model_fingerprint(subject.model), tokenizer_fingerprint(subject.tokenizer)]


def _kept_or_run(
    attack: Attack,
    subject: Audited,
    context: Context,
    identities: Mapping[str, list[str]],
    path: Path,
    plugin: Plugin | None,
) -> AttackResult:
    """The attack's result, from an earlier call where there is one. `plugin`: where the attack is from, if not ours."""
    shared = {name: plain(getattr(context, name)) for name in _SHARED}
    shared |= {name: [_key_of(fact) for fact in getattr(context, name)] for name in ("facts", "kept", "holdout")}
    seen = (subject.role, *context.earlier, *([UNEDITED] if attack.needs_original else []))
    models = {role: identities[role] for role in seen}
    version = [] if plugin is None else [plugin.package, plugin.version]
    key = digest([SCHEMA], [attack.name, subject.role, *version], models, shared)
    kept = _read_part(path, key)
    if kept is not None:
        return kept
    start = time.monotonic()
    result = attack.run(subject, context)
    seconds = round(time.monotonic() - start, 2)
    if plugin is not None:
        check_result(attack, result, len(context.facts))
        _check_unchanged(attack, plugin, [subject, *([context.original] if context.original else [])], identities)
    found = plain(replace(result, seconds=seconds))
    write_json(path, {"key": key, "sha256": digest(found), "result": found})
    return _from_plain(found)


def _check_unchanged(
    attack: Attack, plugin: Plugin, subjects: Sequence[Audited], identities: Mapping[str, list[str]]
) -> None:
    """Raises PluginError where an attack left other weights than it found. Those of this package are tested for it."""
    for subject in subjects:
        if _identity(subject) != identities[subject.role]:
            raise PluginError(
                f"The attack {attack.name!r} of the plugin {plugin} changed the {subject.role} model or its tokenizer, "
                "and did not put it back. What later attacks find would mean nothing, so the audit ends here. Results "
                "of earlier attacks are kept. Tell the plugin's authors, or leave the attack out by --attacks."
            )


def _forward(progress: Progress, phase: str, share: float) -> None:
    progress(phase, share, "")


#: Fields of the context that a result depends on, beside the facts.
_SHARED = ("sizes", "seed", "form", "template_kwargs", "token", "layers")


def _key_of(fact: ForgetRequest) -> dict[str, Any]:
    """What a result depends on of a fact."""
    return {
        "question": fact.question,
        "answer": fact.answer,
        "subject": fact.subject,
        "paraphrases": list(fact.paraphrases),
        "wrong": list(dict.fromkeys(fact.wrong_answers)),
    }


def _read_part(path: Path, key: str) -> AttackResult | None:
    """A result kept by an earlier call with the same key; what cannot be read counts as absent."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions wrote no digest.
        if kept.get("sha256", digest(kept["result"])) != digest(kept["result"]):
            raise ValueError("it is not what was written")
        return _from_plain(kept["result"]) if kept["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("Running again what %s cannot give back: %s", path, error)
        return None


def _from_plain(value: Mapping[str, Any]) -> AttackResult:
    """The result as it is read back, so that a fresh one and a kept one are the same."""
    measures = tuple(
        Measure(
            each["name"],
            tuple(each["values"]),
            tuple(map(tuple, each["others"])),
            tuple(each["prompts"]),
            tuple(each["texts"]),
            tuple(each["curve"]) if each["curve"] else None,
        )
        for each in value["measures"]
    )
    return AttackResult(
        measures, value["series"], value["figures"], tuple(value["notes"]), value["unfit"], value["seconds"]
    )


# --- the report ------------------------------------------------------------------------------------------------------


def _report(
    run: _Run, models: _Models, facts: Sequence[ForgetRequest], kept: Sequence[ForgetRequest]
) -> dict[str, Any]:
    context = run.context
    by_attack = {
        attack.name: {role: found[attack.name] for role, found in run.results.items() if attack.name in found}
        for attack in run.attacks
    }
    run.not_run.update(
        (name, result.unfit) for name, by_role in by_attack.items() for result in by_role.values() if result.unfit
    )
    found = {attack.name: compare(attack, by_attack[attack.name]) for attack in run.attacks}
    findings = [finding for finding in found.values() if finding is not None]
    damage = find_damage(by_attack)
    verdict = judge(
        findings,
        damage,
        run.not_run,
        complete=context.sizes.every_variant and len(facts) <= context.sizes.facts,
        membership=by_attack.get("membership"),
    )
    return {
        "schema": SCHEMA,
        "verdict": verdict.text,
        "doubts": list(verdict.reasons),
        "not_run": [
            {"attack": attack.name, "group": attack.group, "why": run.not_run[attack.name]}
            for attack in in_order(run.known)
            if attack.name in run.not_run
        ],
        "does_not_apply": [{"attack": name, "why": why} for name, why in run.inapplicable.items()],
        "model": models.name(EDITED),
        "unedited": f"{models.name(UNEDITED)} ({models.how})" if models.rebuilt is None else models.how,
        "reference": models.name(REFERENCE) if models.reference is not None else None,
        "method": models.record.manifest["method"] if models.record else None,
        "token": context.token or None,
        "form": context.form,
        "n_forget": len(facts),
        "n_echo": len(facts) - len(judgeable(facts)),
        "n_audited": len(context.facts),
        "n_kept": len(kept),
        "n_kept_audited": len(context.kept),
        "sizes": asdict(context.sizes),
        "seed": context.seed,
        "groups": dict(GROUPS),
        "attacks": [
            _entry(attack, found[attack.name], by_attack[attack.name], context)
            for attack in run.attacks
            if by_attack[attack.name]
        ],
        "damage": [asdict(each) for each in damage],
        "seconds": run.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _entry(
    attack: Attack, finding: Finding | None, results: Mapping[str, AttackResult], context: Context
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": attack.name, "group": attack.group, "asks": attack.asks, "cost": attack.cost}
    if finding is not None:
        entry |= {
            "status": finding.status,
            "control": finding.control,
            "chance": finding.chance,
            "excess": finding.excess,
            "excess_interval": list(finding.excess_interval),
            "shares": {role: asdict(share) for role, share in finding.shares.items()},
        }
    return entry | {
        "variants": {role: [_variant(measure) for measure in found.measures] for role, found in results.items()},
        "figures": {role: dict(found.figures) for role, found in results.items() if found.figures},
        "notes": sorted({note for found in results.values() for note in found.notes}),
        "seconds": {role: found.seconds for role, found in results.items()},
        "examples": _examples(results, context),
    }


def _variant(measure: Measure) -> dict[str, Any]:
    known = [value for value in measure.values if value is not None]
    return {
        "name": measure.name,
        "n": len(known),
        "mean": sum(known) / len(known) if known else None,
        "values": list(measure.values),
        "curve": list(measure.curve) if measure.curve else None,
    }


def _examples(results: Mapping[str, AttackResult], context: Context) -> list[dict[str, Any]]:
    """What was asked and said: facts that the attack got out of the edited model first."""
    if EDITED not in results:
        return []
    pairs = [
        (measure, index)
        for measure in results[EDITED].measures
        for index in range(len(measure.texts))
        if measure.values[index] is not None
    ]
    best: dict[int, tuple[Measure, int]] = {}
    for measure, index in sorted(pairs, key=lambda pair: -(pair[0].values[pair[1]] or 0.0)):
        best.setdefault(index, (measure, index))
    return [
        {
            "variant": measure.name,
            "prompt": measure.prompts[index],
            "answer": context.facts[index].answer,
            "recovered": measure.values[index],
            "said": {role: _said(found, measure.name, index) for role, found in results.items()},
        }
        for measure, index in list(best.values())[:EXAMPLES]
    ]


def _said(result: AttackResult, variant: str, index: int) -> str | None:
    """What the same variant drew from another model."""
    return next((each.texts[index] for each in result.measures if each.name == variant and each.texts), None)
