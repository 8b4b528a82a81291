"""Keeps the result of each attack as it comes, so that an audit that was stopped goes on."""

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

#: Version of audit.json's schema (docs/explanation/audit.md), and part of every kept result's key.
SCHEMA = 1
#: Folder within the output in which results are kept.
PARTS = "results"

#: Fields of the context that a result depends on, beside the facts.
_SHARED = ("sizes", "seed", "form", "template_kwargs", "token", "layers")


def kept_or_run(
    attack: Attack,
    subject: Audited,
    context: Context,
    identities: Mapping[str, list[str]],
    path: Path,
    plugin: Plugin | None = None,
) -> AttackResult:
    """The result that an earlier call kept under the same key, else that of the attack, which is then kept.

    identities: fingerprints of the models, by role. plugin: where the attack is from, if not from this package.

    Raises PluginError for an attack of a plugin that gives no usable result, or that leaves a model changed.
    """
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
        if [model_fingerprint(subject.model), tokenizer_fingerprint(subject.tokenizer)] != identities[subject.role]:
            raise PluginError(
                f"The attack {attack.name!r} of the plugin {plugin} changed the {subject.role} model or its tokenizer, "
                "and did not put it back. What later attacks find would mean nothing, so the audit ends here. Results "
                "of earlier attacks are kept. Tell the plugin's authors, or leave the attack out by --attacks."
            )


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
