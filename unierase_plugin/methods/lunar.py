"""LUNAR (Shen et al. 2025, arXiv 2502.07218): moves the states of forgotten questions to those of unanswerable ones.

One MLP output projection is trained. On every token of a question to forget, its output shall be the old output plus
c r. On questions to keep it shall be the old output. r is the mean state after the block at the end of questions that
nobody can answer, minus that of the questions to forget.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import HyperParamsError, RequestError, TrainingError, shown
from ..hparams import LAYERS, HyperParams
from ..settings.ranges import Range, positive, weight
from ..storage.inputs import checked_path, read_text
from .contract import Changes, Job, Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.architecture import Architecture

#: {} is an invented word. The authors use such questions beside harmful ones. Harmful ones are left out here.
_UNKNOWABLE = (
    "What is the capital of the country of {}?",
    "Who wrote the novel {}?",
    "When was the river {} first crossed?",
    "How many people live in the town of {}?",
    "What does the machine called a {} do?",
    "Which king ruled {} at that time?",
    "What is the taste of the fruit {}?",
    "Who won the {} championship?",
    "How is the instrument named {} played?",
    "What did the explorer {} discover?",
)


@dataclass(frozen=True)
class LUNARHyperParams(HyperParams):
    """Settings of the authors' code for Llama-3-8B."""

    folder: ClassVar[str] = "LUNAR"
    #: Block whose projection is trained, counted from 0. -1 takes the one at 22/32 of the depth.
    layer: int = -1
    #: c: how far states are moved along r.
    coefficient: float = 2.0
    #: AdamW's learning rate in the first epoch.
    learning_rate: float = 1e-2
    #: Factor on the learning rate after each epoch.
    decay: float = 0.9
    epochs: int = 20
    #: Tokens of one optimiser step.
    batch_size: int = 64
    weight_decay: float = 0.01
    #: Text file with questions that the model declines, one on each line; empty for questions about invented things.
    reference_prompts: str = ""
    #: How many of these questions are used.
    n_reference: int = 128

    #: The learning rate has no upper limit: training that diverges ends with an error.
    ranges: ClassVar[Mapping[str, Range]] = {
        "layer": LAYERS,
        "coefficient": positive(1e6),
        "learning_rate": positive(),
        "decay": positive(10),
        "epochs": positive(1e5),
        "batch_size": positive(1e9),
        "weight_decay": weight(1e3),
        "n_reference": positive(1e6),
    }


def reference_prompts(hparams: LUNARHyperParams) -> list[str]:
    """Questions that the model should decline. Raises HyperParamsError for a file that is unreadable or has none."""
    if hparams.reference_prompts:
        path = checked_path(hparams.reference_prompts, HyperParamsError, "file of reference_prompts")
        try:
            text = read_text(path, HyperParamsError)
        except FileNotFoundError:
            raise HyperParamsError(
                f"reference_prompts: {shown(hparams.reference_prompts)} cannot be read: there is no such file."
            ) from None
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise HyperParamsError(
                f"reference_prompts: {shown(hparams.reference_prompts)} holds no questions. Write one on each line."
            )
        return found[: hparams.n_reference]
    drawn = random.Random(hparams.seed)
    return [
        _UNKNOWABLE[index % len(_UNKNOWABLE)].format("".join(drawn.choices("bcdfghjklmnpqrstvwxyz", k=8)).capitalize())
        for index in range(hparams.n_reference)
    ]


# --- the method ------------------------------------------------------------------------------------------------------


def _settle(model: Any, hparams: LUNARHyperParams) -> LUNARHyperParams:
    from ..models.architecture import find_architecture

    arch = find_architecture(model)
    wanted = min(round(len(arch.blocks) * 22 / 32), len(arch.blocks) - 1)
    layer = min(arch.editable, key=lambda at: abs(at - wanted)) if hparams.layer < 0 else hparams.layer
    arch.check_layers([layer])
    arch.dense(layer)
    return hparams.replace(layer=layer)


def _check(job: Job[LUNARHyperParams]) -> None:
    reference_prompts(job.hparams)
    if not job.retain:
        raise RequestError("lunar needs facts to keep, but none are given. Give a retain set (retain, --retain).")


def _run(job: Job[LUNARHyperParams]) -> Changes:
    from ..models.architecture import find_architecture

    start = time.perf_counter()
    arch, h = find_architecture(job.model), job.hparams
    ends, forget = _seen(arch, job, [request.question for request in job.requests])
    declined, _ = _seen(arch, job, reference_prompts(h))
    _, keep = _seen(arch, job, [request.question for request in job.retain])
    direction = declined.mean(0) - ends.mean(0)
    seen = time.perf_counter()
    undo, losses = _train(arch, job, forget, keep, h.coefficient * direction)
    return Changes(
        parameters=arch.projections[h.layer].weight.numel(),
        seconds={"reference": seen - start, "train": time.perf_counter() - seen},
        figures={"loss": losses, "direction_norm": float(direction.norm()), "layer": h.layer},
        undo=undo,
    )


def _seen(arch: Architecture, job: Job[LUNARHyperParams], questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States (n, d) after the block at the questions' ends, and the projection's inputs (N, m) on all their tokens."""
    import torch

    from ..models.generate import pad_token_id
    from ..models.prompts import encode, render
    from ..models.trace import pad, run_batches, run_blocks
    from .finetuning.batches import question_forms

    h, tokenizer = job.hparams, job.tokenizer
    prompts = [
        encode(tokenizer, render(tokenizer, question, form, h.chat_template_kwargs), form)
        for form in question_forms(job)
        for question in questions
    ]
    ends: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(rows: list[int]) -> None:
        batch = pad([prompts[row] for row in rows], pad_token_id(job.model, tokenizer), "right", arch.device)
        trace = run_blocks(arch, batch, last=h.layer, inputs_of=[h.layer])
        found = trace.projection_inputs[h.layer]
        for at, row in enumerate(rows):
            length = len(prompts[row])
            ends[row] = trace.hidden[at, length - 1].float().cpu()
            inputs[row] = found[at, :length].cpu()

    run_batches(prompts, job.max_tokens, run)
    numbers = range(len(prompts))
    return torch.stack([ends[row] for row in numbers]), torch.cat([inputs[row] for row in numbers])


def _train(
    arch: Architecture, job: Job[LUNARHyperParams], forget: Tensor, keep: Tensor, shift: Tensor
) -> tuple[Callable[[], None], list[float]]:
    """Trains W in place. The target of k (W - W0) is `shift` (d,) for forgotten keys (N, m), and 0 for the kept ones.

    The loss is the mean over outputs and coordinates of the squared difference. Returns a function that undoes the
    training, and the loss of every epoch.
    """
    import torch

    from ..models.architecture import stores_input_first

    h, projection = job.hparams, arch.dense(job.hparams.layer)
    before = projection.weight.detach().clone()
    start = before.float().T if not stores_input_first(projection) else before.float()
    device = start.device
    change = torch.zeros_like(start, requires_grad=True)
    keys, moved = torch.cat([forget, keep]), torch.arange(len(forget) + len(keep)) < len(forget)
    # As in the authors' code, decay pulls W itself towards 0, so it changes the difference by the same amount.
    optimiser = torch.optim.AdamW([change], lr=h.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, h.decay)
    generator, losses = torch.Generator().manual_seed(job.seed), []
    with torch.enable_grad():
        for epoch in range(h.epochs):
            total = 0.0
            for rows in torch.randperm(len(keys), generator=generator).split(h.batch_size):
                wanted = moved[rows].to(device).float()[:, None] * shift.to(device)
                loss = torch.nn.functional.mse_loss(keys[rows].to(device).float() @ change, wanted)
                optimiser.zero_grad()
                loss.backward()
                with torch.no_grad():
                    change -= optimiser.param_groups[0]["lr"] * h.weight_decay * (start + change)
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            schedule.step()
            losses.append(total / len(keys))
            job.progress("train", (epoch + 1) / h.epochs, f"loss {losses[-1]:.3g}")
    after = (start + change.detach()).to(before.dtype)
    if not bool(torch.isfinite(after).all()):
        raise TrainingError(f"A weight became NaN or infinite. Lower learning_rate = {h.learning_rate}.")

    def write(values: Tensor) -> None:
        with torch.no_grad():
            projection.weight.copy_(values)

    write(after if stores_input_first(projection) else after.T)
    return lambda: write(before), losses


LUNAR: Method[LUNARHyperParams] = Method(
    name="lunar",
    title="moves the states of questions to forget to those of unanswerable questions, by one block's projection",
    paper="Shen et al. 2025, arXiv 2502.07218",
    hparams=LUNARHyperParams,
    run=_run,
    check=_check,
    settle=_settle,
)
