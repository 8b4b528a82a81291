"""Fine-tuning by transformers' Trainer: full or LoRA, resumable, and undone if it fails."""

from __future__ import annotations

import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.trainer_callback import PrinterCallback

from ...errors import TrainingError
from ...models.architecture import Architecture, find_architecture
from ...storage.phases import Phases
from ..contract import Changes, Job
from .batches import TrainingData
from .reference import Watched, take_reference
from .terms import Term
from .trainer import MethodTrainer, Objective, OneDevice, Watch, last_checkpoint
from .weights import TrainedAdapter, TrainedWeights, import_peft

logger = logging.getLogger(__name__)

#: Seconds of training between two checkpoints. A kill costs at most that much. Writing a checkpoint takes far less.
SAVE_SECONDS = 120.0

#: Gives the names of the weights to train, and the block whose states the terms watch.
Chooser = Callable[[Architecture, Any], tuple[list[str], int]]


def train(
    job: Job[Any], forget: Term, retain: Term | None, choose: Chooser | None = None, save_every: float = SAVE_SECONDS
) -> Changes:
    """Minimises forget_weight x forget + retain_weight x retain over the facts. Trains the model in place.

    choose:     restricts the weights that are trained; without it all of them are.
    save_every: seconds between two checkpoints, where the job has a work folder.

    Raises TrainingError where the loss or a weight becomes NaN, or where the memory does not hold a batch. The weights
    are then as before.
    """
    return _Training(job=job, forget=forget, retain=retain, choose=choose or _everything, save_every=save_every).run()


def check_trainable(job: Job[Any], forget: Term, retain: Term | None) -> None:
    """Raises UniEraseError if a fact does not fit into the model's context, or if a term lacks its facts. Quick."""
    if job.hparams.lora_rank:
        import_peft()
    TrainingData.of(job, _weighted(job, forget, retain).values())


def down_projections_below(arch: Architecture, hparams: Any) -> tuple[list[str], int]:
    """RMU: the MLP output projections of the watched block and of the two below it that have one."""
    layer = int(hparams.layer)
    return [arch.weight_name(at) for at in arch.editable if at <= layer][-3:], layer


def _everything(arch: Architecture, hparams: Any) -> tuple[list[str], int]:
    return [name for name, _ in arch.model.named_parameters()], 0


def _weighted(job: Job[Any], forget: Term, retain: Term | None) -> dict[str, Term]:
    return {"forget": forget, **({"retain": retain} if retain is not None and job.hparams.retain_weight else {})}


class _Training(Phases):
    """One training: prepared here, run by `Trainer`, and undone if it fails."""

    def __init__(self, job: Job[Any], forget: Term, retain: Term | None, choose: Chooser, save_every: float) -> None:
        super().__init__(None)
        self.job, self.terms, self.save_every = job, _weighted(job, forget, retain), save_every
        self.data = TrainingData.of(job, self.terms.values())
        arch = find_architecture(job.model)
        names, layer = choose(arch, job.hparams)
        self.watched = Watched(job, arch, layer)
        self.weights = (TrainedAdapter if job.hparams.lora_rank else TrainedWeights)(arch, names, job.hparams)

    def run(self) -> Changes:
        job, weights = self.job, self.weights
        with _own_randomness(), _settings_kept(job.model, job.hparams.gradient_checkpointing):
            try:
                network = self._opened()
                with self.timed("reference"):
                    reference = take_reference(
                        self.watched,
                        self.data,
                        list(self.terms.values()),
                        not weights.trains_head,
                        lambda share: job.progress("reference", share, "the model before training"),
                    )
                with self.timed("train"):
                    history = self._fit(
                        network,
                        Objective(job=job, watched=self.watched, data=self.data, reference=reference, terms=self.terms),
                    )
                weights.close()
                _check_finite(job)
            except BaseException as error:
                weights.undo()
                if isinstance(error, torch.OutOfMemoryError):
                    raise TrainingError(_no_room(self.micro, self.data.longest)) from error
                raise
        figures = {"loss": [entry["loss"] for entry in history], "steps": len(history), **_last_terms(history)}
        return Changes(parameters=weights.count, seconds=self.seconds, figures=figures, undo=weights.undo)

    @property
    def batch(self) -> int:
        """Pairs in an optimiser step: at most an epoch, so that a small forget set gets as many steps as epochs."""
        size: int = min(self.job.hparams.batch_size, self.data.epoch, len(self.data.pairs))
        return size

    @property
    def micro(self) -> int:
        """Pairs in one forward pass: the largest part of a batch that the device's budget allows."""
        room = max(1, self.job.max_tokens // self.data.longest)
        return max(size for size in range(1, self.batch + 1) if self.batch % size == 0 and size <= room)

    def _opened(self) -> Any:
        torch.manual_seed(self.job.seed)
        return self.weights.open()

    def _fit(self, network: Any, objective: Objective) -> list[dict[str, float]]:
        """Trains, and returns `Trainer`'s log. A checkpoint that cannot be written must not end a training."""
        if self.job.work is None:
            with tempfile.TemporaryDirectory() as folder:
                return self._trained(network, objective, Path(folder), Watch(self.job, None))
        place, watch = self.job.work / "training", Watch(self.job, self.save_every)
        try:
            return self._trained(network, objective, place, watch)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not watch.writing:
                raise
            logger.warning(
                "No checkpoint can be written. Training goes on from the last one, without further ones: %s",
                error,
            )
        self.weights.undo()
        return self._trained(self._opened(), objective, place, Watch(self.job, None))

    def _trained(self, network: Any, objective: Objective, place: Path, watch: Watch) -> list[dict[str, float]]:
        trainer = MethodTrainer(objective, network, self._arguments(place))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        found = last_checkpoint(place)
        trainer.train(resume_from_checkpoint=str(found) if found else None)
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    def _arguments(self, place: Path) -> OneDevice:
        h = self.job.hparams
        # At least one step comes after the warm-up: a single step would otherwise have a learning rate of 0.
        steps = math.ceil(len(self.data.pairs) / self.batch)
        warmup = min(round(h.warmup_epochs * self.data.epoch / self.batch), steps - 1)
        return OneDevice(
            output_dir=str(place),
            per_device_train_batch_size=self.micro,
            gradient_accumulation_steps=self.batch // self.micro,
            num_train_epochs=1,
            learning_rate=h.learning_rate,
            weight_decay=h.weight_decay,
            warmup_steps=warmup,
            lr_scheduler_type="linear",
            max_grad_norm=h.max_grad_norm,
            seed=self.job.seed,
            save_strategy="no",
            save_total_limit=1,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=self.job.model.device.type == "cpu",
        )


# --- around it --------------------------------------------------------------------------------------------------------


@contextmanager
def _own_randomness() -> Iterator[None]:
    """`Trainer` seeds all random generators. The caller's states are restored afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def _settings_kept(model: Any, checkpointing: bool) -> Iterator[None]:
    """Restores what training changes on a model in addition to its weights."""
    cache, generation = getattr(model.config, "use_cache", None), model.generation_config
    # Some published models have sampling settings with which transformers refuses to write a checkpoint.
    model.generation_config = GenerationConfig()
    if checkpointing:
        # The older, re-entrant way runs the forward pass without gradients, and the hooks would see that pass.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.generation_config = generation
        if cache is not None:
            model.config.use_cache = cache
        if checkpointing:
            model.gradient_checkpointing_disable()


def _check_finite(job: Job[Any]) -> None:
    bad = next((name for name, weight in job.model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
    if bad is not None:
        raise TrainingError(
            f"Training made {bad!r} NaN or infinite. Lower learning_rate ({job.hparams.learning_rate})."
        )


def _last_terms(history: Sequence[dict[str, float]]) -> dict[str, float]:
    return {f"{name}_term": history[-1][name] for name in ("forget", "retain") if history and name in history[-1]}


def _no_room(micro: int, longest: int) -> str:
    return (
        f"The memory does not hold training on {micro} pairs of facts at a time ({micro * longest} tokens). Lower "
        "max_batch_tokens (--max-batch-tokens), set gradient_checkpointing: true, or train an adapter (lora_rank: 8)."
    )
