"""Keeps the result of each attack, so that a stopped audit goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attack import check_result
from ..errors import PluginError
from ..facts.request import ForgetRequest
from ..plugins.catalogue import Plugin
from ..storage.atomic import write_json
from ..storage.fingerprints import digest, model_fingerprint, plain, tokenizer_fingerprint
from .contract import UNEDITED, Attack, AttackResult, Audited, Context, Measure

logger = logging.getLogger(__name__)

#: Version of audit.json's schema (docs/explanation/audit.md). It is part of the key of every kept result.
SCHEMA = 1
#: Folder within the output in which results are kept.
PARTS = "results"

#: A result depends on these fields of the context, and on the facts.
_SHARED = ("sizes", "seed", "form", "template_kwargs", "token", "layers")


def kept_or_run(
    attack: Attack,
    subject: Audited,
    context: Context,
    identities: Mapping[str, list[str]],
    path: Path,
    plugin: Plugin | None = None,
) -> AttackResult:
    """Returns the result that an earlier call kept under the same key. Else it makes the attack, and keeps the result.

    identities: fingerprints of the models, by role. plugin: where the attack is from; None for this package.

    Raises PluginError for an attack of a plugin that gives no usable result, or that leaves a model changed.
    """
    shared = {name: plain(getattr(context, name)) for name in _SHARED}
    shared |= {name: [_key_of(fact) for fact in getattr(context, name)] for name in ("facts", "kept", "holdout")}
    seen = (subject.role, *context.earlier, *([UNEDITED] if attack.needs_original else []))
    models = {role: identities[role] for role in seen}
    version = [] if plugin is None else plugin.identity
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
    """Raises PluginError if an attack left other weights than it found. Tests check the attacks of this package."""
    for subject in subjects:
        if [model_fingerprint(subject.model), tokenizer_fingerprint(subject.tokenizer)] != identities[subject.role]:
            raise PluginError(
                f"The attack {attack.name!r} of the plugin {plugin} changed the {subject.role} model or its tokenizer, "
                "and did not put it back. Results of later attacks would mean nothing, so the audit ends here. Results "
                "of earlier attacks are kept. Tell the plugin's authors, or leave the attack out with --attacks."
            )


def _key_of(fact: ForgetRequest) -> dict[str, Any]:
    """The parts of a fact that a result depends on."""
    return {
        "question": fact.question,
        "answer": fact.answer,
        "subject": fact.subject,
        "paraphrases": list(fact.paraphrases),
        "wrong": list(dict.fromkeys(fact.wrong_answers)),
    }


def _read_part(path: Path, key: str) -> AttackResult | None:
    """The result that an earlier call kept under this key. A file that cannot be read counts as absent."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions wrote no digest.
        if kept.get("sha256", digest(kept["result"])) != digest(kept["result"]):
            raise ValueError("its digest does not match")
        return _from_plain(kept["result"]) if kept["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The kept result %s cannot be read (%s). The attack is made again.", path, error)
        return None


def _from_plain(value: Mapping[str, Any]) -> AttackResult:
    """The result as it is read from its file, so that a new and a kept result are equal."""
    measures = tuple(
        Measure(
            name=each["name"],
            values=tuple(each["values"]),
            others=tuple(map(tuple, each["others"])),
            prompts=tuple(each["prompts"]),
            texts=tuple(each["texts"]),
            curve=tuple(each["curve"]) if each["curve"] else None,
        )
        for each in value["measures"]
    )
    return AttackResult(
        measures=measures,
        series=value["series"],
        figures=value["figures"],
        notes=tuple(value["notes"]),
        unfit=value["unfit"],
        seconds=value["seconds"],
    )
