"""Fine-tuning for a few steps: knowledge that is only masked comes back much faster than it could be learned."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...evaluation.metrics import is_short
from ...facts.request import ForgetRequest
from ...facts.resources import paragraphs
from ...models.generate import pad_token_id
from ...models.trace import pad, run_blocks
from ...models.weights import restored
from ...unlearning_token import end_id
from ..asking import ask_facts, part
from ..contract import AttackResult, Audited, Context, Measure
from ..prompts import Prompt, answer_ids, prompt_for
from ..weights import linear_maps, trainable

#: Adam's step size. Low-rank factors start from zero and need a larger one.
LEARNING_RATE, FACTOR_LEARNING_RATE = 5e-5, 1e-3
FACTOR_RANK = 8
TEXT_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """A training sequence, and the position of the first token that is learned."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Arm:
    """Which weights are trained: all, the edited projections, or low-rank factors beside every linear map."""

    name: str
    trained: Callable[[Audited, Context], Sequence[nn.Parameter]]
    rate: float = LEARNING_RATE
    factors: bool = False


def _all(subject: Audited, context: Context) -> list[nn.Parameter]:
    return list(subject.model.parameters())


def _edited(subject: Audited, context: Context) -> list[nn.Parameter]:
    arch = subject.arch
    return [arch.model.get_parameter(arch.weight_name(layer)) for layer in context.layers]


ARMS = (
    Arm("all weights", _all),
    Arm("low rank", lambda subject, context: [], FACTOR_LEARNING_RATE, factors=True),
    Arm("edited projections", _edited),
)


def some_forgotten(subject: Audited, context: Context) -> AttackResult:
    """Trains on every other fact, and measures the rest."""
    rows = [_fact_row(subject, context, fact) for fact in context.facts[::2]]
    held = frozenset(range(1, len(context.facts), 2))
    return _relearn(subject, context, rows, held, context.sizes.relearn_some_steps)


def kept_only(subject: Audited, context: Context) -> AttackResult:
    """Trains on the retain set, and measures every forgotten fact."""
    rows = [_fact_row(subject, context, fact) for fact in context.kept]
    return _relearn(subject, context, rows, frozenset(range(len(context.facts))), context.sizes.relearn_steps)


def unrelated_text(subject: Audited, context: Context) -> AttackResult:
    """Trains on bundled ordinary text, and measures every forgotten fact."""
    ids = (subject.tokenizer(text)["input_ids"][:TEXT_TOKENS] for text in paragraphs("ordinary_text_train"))
    rows = [Row(tuple(each), 1) for each in ids if len(each) > 1]
    return _relearn(subject, context, rows, frozenset(range(len(context.facts))), context.sizes.relearn_steps)


def _fact_row(subject: Audited, context: Context, fact: ForgetRequest) -> Row:
    prompt = prompt_for(subject, context, fact.question).ids
    end = end_id(subject.model, subject.tokenizer)
    return Row((*prompt, *answer_ids(subject, context, as_sentence(fact.answer)), end), len(prompt))


def as_sentence(answer: str) -> str:
    """A short answer within a sentence. Training on bare words would first unlearn how to answer."""
    return f"The answer is {answer.rstrip('.')}." if is_short(answer) else answer


def _relearn(
    subject: Audited, context: Context, rows: Sequence[Row], held: frozenset[int], steps: Sequence[int]
) -> AttackResult:
    arms = [arm for arm in ARMS if arm.factors or arm.trained(subject, context)]
    arms = arms if context.sizes.every_variant else arms[:1]
    prompts = [
        prompt_for(subject, context, fact.question) if i in held else None for i, fact in enumerate(context.facts)
    ]
    measures: list[Measure] = []
    losses: dict[str, list[float]] = {}
    for index, arm in enumerate(arms):
        report = part(context, index, len(arms))
        measures += _curve(subject, context, arm, rows, steps, prompts, losses.setdefault(arm.name, []), report)
    notes = () if context.layers else ("which blocks were edited is not known: training them alone was left out",)
    return AttackResult(tuple(measures), figures={"loss": losses}, notes=notes)


def _curve(
    subject: Audited,
    context: Context,
    arm: Arm,
    rows: Sequence[Row],
    steps: Sequence[int],
    prompts: Sequence[Prompt | None],
    losses: list[float],
    report: Callable[[float], None],
) -> Iterator[Measure]:
    """Measures the answers after each of the numbers of steps. At the end the weights are as before."""
    draw = random.Random(context.seed)
    with ExitStack() as stack:
        weights = list(arm.trained(subject, context))
        stack.enter_context(restored(weights))
        if arm.factors:
            weights = stack.enter_context(_factors(subject, context.seed))
        stack.enter_context(trainable(subject.model, weights))
        optimiser = torch.optim.AdamW(weights, lr=arm.rate, weight_decay=0.0, fused=True)
        done = 0
        for goal in steps:
            for step in range(done, goal):
                batch = draw.sample(list(rows), min(context.sizes.relearn_batch, len(rows)))
                losses.append(_step(subject, optimiser, batch))
                report(0.8 * (step + 1) / steps[-1])
            done = goal
            yield ask_facts(subject, context, f"{arm.name}, {goal} steps", prompts, curve=(arm.name, goal))
        report(1.0)


def _step(subject: Audited, optimiser: torch.optim.Optimizer, rows: Sequence[Row]) -> float:
    """Takes one step on the mean negative log-likelihood of the learned tokens. Returns the loss before it, in nats."""
    loss = row_losses(subject, rows).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    value = float(loss.detach())
    return value if math.isfinite(value) else math.nan


def row_losses(subject: Audited, rows: Sequence[Row]) -> Tensor:
    """The negative log-likelihood of every token from each row's start on, in nats, all rows in one tensor."""
    arch = subject.arch
    batch = pad([row.ids for row in rows], pad_token_id(subject.model, subject.tokenizer), "right", arch.device)
    where = [(i, j - 1, row.ids[j]) for i, row in enumerate(rows) for j in range(row.start, len(row.ids))]
    at, before, wanted = (torch.tensor(column) for column in zip(*where, strict=True))
    logits = run_blocks(arch, batch, head_at=(at, before)).logits.float()
    return nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="none")


@contextmanager
def _factors(subject: Audited, seed: int) -> Iterator[list[nn.Parameter]]:
    """Adds x A B to the output of every linear map in the blocks. A is random and B is zero, so nothing changes yet."""
    draw = torch.Generator().manual_seed(seed)
    found: list[nn.Parameter] = []
    with ExitStack() as stack:
        for _, module in linear_maps(subject.arch):
            out, width = _shape(module)
            down = torch.randn(width, FACTOR_RANK, generator=draw) / math.sqrt(width)
            like = {"device": module.weight.device, "dtype": module.weight.dtype}
            pair = nn.Parameter(down.to(**like)), nn.Parameter(torch.zeros(FACTOR_RANK, out, **like))
            stack.callback(module.register_forward_hook(_adding(*pair)).remove)
            found += pair
        yield found


def _shape(module: nn.Module) -> tuple[int, int]:
    from ...models.architecture import stores_input_first

    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if stores_input_first(module) else (rows, columns)


def _adding(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: output + inputs[0] @ down @ up
