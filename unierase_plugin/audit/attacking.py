"""Makes the attacks, on one model after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..models.chat_templates import check_chat_template
from ..models.literal import tell_special_names
from ..models.prompts import has_chat_template
from ..models.thinking import thinking_of
from ..plugins.catalogue import BUILT_IN, Catalogue
from .attacks import in_order
from .contract import REFERENCE, UNEDITED, Attack, AttackResult, Audited, Context
from .kept_results import PARTS, kept_or_run
from .sources import Sources, open_audited, tokenizer_of, unlearning_token

Progress = Callable[[str, float, str], None]


@dataclass
class AuditState:
    """The state of a running audit."""

    context: Context
    #: Every registered attack.
    known: Catalogue[Attack]
    #: The attacks that were chosen.
    attacks: tuple[Attack, ...]
    #: Why an attack was left out, by name: it was not chosen, or it cannot be made on these facts.
    not_run: dict[str, str]
    #: Why an attack does not apply to the model, by name.
    inapplicable: dict[str, str]
    #: Fingerprints of each model and its tokenizer, by role.
    identities: dict[str, list[str]] = field(default_factory=dict)
    #: By role and attack.
    results: dict[str, dict[str, AttackResult]] = field(default_factory=dict)
    #: By role.
    seconds: dict[str, float] = field(default_factory=dict)


def settle(context: Context, known: Catalogue[Attack], chosen: tuple[Attack, ...], sources: Sources) -> AuditState:
    """The state before the first attack. The edited folder gives the token, the prompt form and the edited blocks."""
    tokenizer = tokenizer_of(sources.edited)
    tell_special_names(tokenizer, (*context.facts, *context.kept))
    record, token = sources.record, unlearning_token(sources.record, tokenizer)
    settings = record.manifest["hparams"] if record else {}
    context = replace(
        context,
        token=token,
        form="chat" if has_chat_template(tokenizer) else "plain",
        template_kwargs=settings.get("chat_template_kwargs") or {},
        thinks=bool(thinking_of(tokenizer, settings.get("chat_template_kwargs"))),
        layers=tuple(record.manifest["layers"]) if record else (),
    )
    names = {attack.name for attack in chosen}
    missing = {attack.name: "not chosen (--attacks)" for attack in in_order(known) if attack.name not in names}
    missing.update({attack.name: attack.unfit(context) for attack in chosen if attack.unfit(context)})
    inapplicable = {
        attack.name: why
        for needs, has, why in (
            ("needs_token", token, "the model has no unlearning token"),
            ("needs_thinking", context.thinks, "the chat template has no thinking part"),
        )
        for attack in in_order(known)
        if getattr(attack, needs) and not has
    }
    check_chat_template(tokenizer, context.template_kwargs)
    return AuditState(
        context=context,
        known=known,
        attacks=chosen,
        not_run={name: why for name, why in missing.items() if name not in inapplicable},
        inapplicable=inapplicable,
    )


def attack_model(
    state: AuditState, sources: Sources, role: str, target: Path, *, device: str, dtype: str, progress: Progress
) -> None:
    """Makes every attack on one model, or reads the result that an earlier call kept."""
    progress(f"{role}: load", 0.0, "")
    opened = partial(open_audited, sources, token=state.context.token, device=device, dtype=dtype)
    subject = opened(role)
    state.identities[role] = fingerprints(subject)
    progress(f"{role}: load", 1.0, sources.name(role))
    wanted = [attack for attack in state.attacks if attack.name not in {**state.not_run, **state.inapplicable}]
    if role == REFERENCE:
        wanted = [attack for attack in wanted if not attack.of_the_edit]
    state.results.setdefault(role, {})
    for attack in wanted:
        earlier = {other: found[attack.name] for other, found in state.results.items() if attack.name in found}
        context = replace(
            state.context,
            earlier={other: found for other, found in earlier.items() if other != role},
            plain=state.results[role].get("plain"),
            progress=partial(_forward, progress, f"{role}: {attack.name}"),
        )
        if attack.needs_original:
            # It is loaded for this attack alone, to leave memory for the others.
            original = subject if role == UNEDITED else opened(UNEDITED)
            state.identities.setdefault(UNEDITED, fingerprints(original))
            context = replace(context, original=original)
        path = target / PARTS / f"{role}.{attack.name}.json"
        owner = state.known.owner(attack.name)
        plugin = None if owner.name == BUILT_IN else owner
        result = kept_or_run(attack, subject, context, state.identities, path, plugin)
        state.results[role][attack.name] = result
        state.seconds[role] = state.seconds.get(role, 0.0) + result.seconds
        context.progress(1.0)


def _forward(progress: Progress, phase: str, share: float) -> None:
    progress(phase, share, "")


def fingerprints(subject: Audited) -> list[str]:
    """The SHA-256 of a model and its tokenizer, as they were opened."""
    return [subject.loaded.fingerprint, subject.loaded.tokenizer_fingerprint]
