"""transformers' Trainer with a method's loss, pairs of facts in their own order, and checkpoints by the clock."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from ...errors import TrainingError
from ..contract import Job
from .batches import TrainingData
from .reference import Batch, Reference, Watched
from .terms import Term

#: File that `Trainer` writes last into a checkpoint.
LAST_WRITTEN = "trainer_state.json"


@dataclass(frozen=True)
class Objective:
    """What a training minimises: the sum of weighted terms over a batch of pairs."""

    job: Job[Any]
    watched: Watched
    data: TrainingData
    reference: Reference
    #: The terms by the part of the facts that they are on: `forget`, `retain`.
    terms: Mapping[str, Term]

    @cached_property
    def direction(self) -> Tensor:
        """RMU's random unit vector: (hidden_size,)."""
        generator = torch.Generator().manual_seed(self.job.seed)
        drawn = torch.rand(self.watched.arch.hidden_size, generator=generator)
        direction: Tensor = drawn / drawn.norm()
        return direction.to(self.watched.arch.device)

    def losses(self, pairs: Tensor) -> dict[str, Tensor]:
        """The loss of each term on pairs: (pairs, 2), indices of facts to forget and to keep."""
        batch = Batch(
            model=self.watched, data=self.data, reference=self.reference, direction=self.direction, pairs=pairs
        )
        with self.watched.autocast():
            return {name: term.loss(batch, self.job.hparams) for name, term in self.terms.items()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms' losses: a scalar."""
        total = torch.zeros((), device=self.watched.arch.device)
        for name, loss in losses.items():
            total = total + getattr(self.job.hparams, f"{name}_weight") * loss.to(total.device)
        return total


class OneDevice(TrainingArguments):
    """Trains on one device. With several GPUs `Trainer` would use DataParallel, which the passes do not support."""

    @property
    def n_gpu(self) -> int:
        found: int = super().n_gpu
        return min(1, found)


class MethodTrainer(Trainer):
    """`Trainer` with the loss of a method, over pairs in their own order."""

    objective: Objective

    def __init__(self, objective: Objective, network: Any, arguments: TrainingArguments) -> None:
        super().__init__(
            model=network,
            args=arguments,
            train_dataset=[torch.tensor(pair) for pair in objective.data.pairs],
            data_collator=lambda found: {"pairs": torch.stack(found)},
        )
        self.objective = objective
        # The model's own forward pass never computes a loss here, so it cannot scale one.
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, list[float]] = {}

    def get_train_dataloader(self) -> Any:
        pairs: Any = self.train_dataset
        return self.accelerator.prepare(
            DataLoader(pairs, batch_size=self.args.train_batch_size, collate_fn=self.data_collator)
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses = self.objective.losses(inputs["pairs"])
        for name, loss in losses.items():
            self.parts.setdefault(name, []).append(float(loss.detach()))
        total = self.objective.total(losses)
        if not bool(torch.isfinite(total)):
            raise TrainingError(
                f"The loss became {float(total.detach())} at step {self.state.global_step + 1} "
                f"({', '.join(f'{name} {values[-1]:.3g}' for name, values in self.parts.items())}). "
                f"Lower learning_rate ({self.objective.job.hparams.learning_rate}) or forget_weight."
            )
        return (total, None) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {name: sum(values) / len(values) for name, values in self.parts.items() if values}
        self.parts = {}
        super().log({**logs, **means}, *args, **kwargs)


class Watch(TrainerCallback):
    """Reports progress, and asks for a checkpoint every `save_every` seconds; None for never."""

    def __init__(self, job: Job[Any], save_every: float | None) -> None:
        self.job, self.save_every, self.saved = job, save_every, time.monotonic()
        #: Whether `Trainer` is writing a checkpoint.
        self.writing = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.save_every is not None and time.monotonic() - self.saved >= self.save_every:
            control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            note = ", ".join(f"{name} {logs[name]:.3g}" for name in ("forget", "retain") if name in logs)
            self.job.progress("train", state.global_step / state.max_steps, note)
        # Every step is logged. The next thing that `Trainer` does is to write the checkpoint.
        self.writing = bool(control.should_save)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved, self.writing = time.monotonic(), False


def last_checkpoint(place: Path) -> Path | None:
    """The latest checkpoint that is complete."""
    found = []
    for folder in place.glob("checkpoint-*"):
        try:
            json.loads((folder / LAST_WRITTEN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found.append(folder)
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
