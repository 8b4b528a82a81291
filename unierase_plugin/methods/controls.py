"""Controls: baselines for a method's figures. Neither changes a weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import HyperParamsError, shown
from ..facts.subjects import find_subject
from ..hparams import HyperParams
from ..settings.ranges import Range, positive
from .contract import Changes, Job, Method


@dataclass(frozen=True)
class NoneHyperParams(HyperParams):
    """The settings of how the model is asked."""


@dataclass(frozen=True)
class PromptGuardHyperParams(NoneHyperParams):
    """The settings of the guard: the words of the system turn."""

    folder: ClassVar[str] = "PromptGuard"
    #: {facts} stands for the subjects to forget, one on each line.
    instruction: str = (
        "You know nothing about the subjects listed below. When a question is about one of them, answer as if you had "
        "never heard of it, and say that you do not know. Answer all other questions as usual.\n{facts}"
    )
    #: The most tokens of the guard, since every prompt carries it.
    guard_tokens: int = 1024

    ranges: ClassVar[Mapping[str, Range]] = {"guard_tokens": positive(1e6)}

    def validate(self) -> None:
        if "{facts}" not in self.instruction:
            raise HyperParamsError(
                f"instruction = {shown(self.instruction)} must contain {{facts}}, where the facts go."
            )


def guarded_template(tokenizer: Any, guard: str) -> str:
    """The tokenizer's chat template with the guard as a system turn, unless a conversation has its own.

    If the template refuses or drops system turns, the guard opens the first user turn instead.
    """
    literal, template = json.dumps(guard, ensure_ascii=False), str(tokenizer.chat_template)
    head = "{%- if messages and messages[0]['role'] == 'user' %}{%- set messages = "
    system = f"{head}[{{'role': 'system', 'content': {literal}}}] + messages %}}{{%- endif %}}{template}"
    if _shows(tokenizer, system, guard):
        return system
    turn = f"{{'role': 'user', 'content': {literal} + '\\n\\n' + messages[0]['content']}}"
    return f"{head}[{turn}] + messages[1:] %}}{{%- endif %}}{template}"


def _shows(tokenizer: Any, template: str, guard: str) -> bool:
    turns = [{"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise their own errors for a role that they do not take
        return False
    return guard.strip() in text


def _guard(job: Job[PromptGuardHyperParams]) -> str:
    subjects = dict.fromkeys(
        request.subject or find_subject(request.question) or request.question for request in job.requests
    )
    return job.hparams.instruction.replace("{facts}", "\n".join(f"- {subject}" for subject in subjects))


def _check_guard(job: Job[PromptGuardHyperParams]) -> None:
    if not getattr(job.tokenizer, "chat_template", None) or "chat" not in job.hparams.prompt_forms:
        raise HyperParamsError(
            "prompt_guard writes the guard into the chat template, so it needs a tokenizer with a chat_template, and "
            "chat among the prompt_forms."
        )
    size, most = len(job.tokenizer(_guard(job))["input_ids"]), job.hparams.guard_tokens
    if size > most:
        raise HyperParamsError(
            f"The guard would take {size} tokens of every prompt, but guard_tokens allows {most}. Raise guard_tokens, "
            "or guard against fewer facts."
        )


def _guard_prompts(job: Job[PromptGuardHyperParams]) -> Changes:
    tokenizer, before, guard = job.tokenizer, job.tokenizer.chat_template, _guard(job)
    tokenizer.chat_template = guarded_template(tokenizer, guard)

    def undo() -> None:
        tokenizer.chat_template = before

    return Changes(parameters=0, figures={"guard_tokens": len(tokenizer(guard)["input_ids"])}, undo=undo)


def _leave(job: Job[NoneHyperParams]) -> Changes:
    return Changes(parameters=0, undo=lambda: None)


CONTROLS: tuple[Method[Any], ...] = (
    Method(name="none", title="the unchanged model", paper="control", hparams=NoneHyperParams, run=_leave),
    Method(
        name="prompt_guard",
        title="a system turn that tells the model to answer as if it did not know",
        paper="Thaker et al. 2024, arXiv 2403.03329",
        hparams=PromptGuardHyperParams,
        run=_guard_prompts,
        check=_check_guard,
    ),
)
