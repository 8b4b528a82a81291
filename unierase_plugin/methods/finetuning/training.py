"""Fine-tuning by transformers' Trainer: full or LoRA, resumable, taken back where it fails."""

from __future__ import annotations

import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ...errors import DependencyError, TrainingError
from ...models.architecture import Architecture, find_architecture
from ...storage.phases import Phases
from ..contract import Changes, Job
from .batches import Material
from .reference import Batch, Reference, Watched, take_reference
from .terms import Term

logger = logging.getLogger(__name__)

#: Seconds of training between two checkpoints: what a kill can cost. Writing one takes a small part of that.
SAVE_SECONDS = 120.0
#: File that `Trainer` writes last into a checkpoint.
LAST_WRITTEN = "trainer_state.json"

#: Names of the weights to train, and the block whose states the terms watch.
Chooser = Callable[[Architecture, Any], tuple[list[str], int]]


def train(job: Job[Any], forget: Term, retain: Term | None, choose: Chooser | None = None) -> Changes:
    """Minimises forget_weight x forget + retain_weight x retain over the facts; trains the model in place.

    choose   restricts the weights that are trained; without it all of them are

    Raises TrainingError where the loss or a weight becomes NaN or the memory does not hold a batch; the weights are
    then as before.
    """
    return _Training(job, forget, retain, choose or _everything).run()


def check_trainable(job: Job[Any], forget: Term, retain: Term | None) -> None:
    """Raises a UniEraseError for facts that the model's context cannot hold or that a term lacks; quick."""
    if job.hparams.lora_rank:
        _peft()
    Material.of(job, _weighted(job, forget, retain).values())


def down_projections_below(arch: Architecture, hparams: Any) -> tuple[list[str], int]:
    """RMU: the MLP output projections of the block that is watched and of the two before it."""
    layer = int(hparams.layer)
    return [arch.weight_name(at) for at in range(max(0, layer - 2), layer + 1)], layer


def _everything(arch: Architecture, hparams: Any) -> tuple[list[str], int]:
    return [name for name, _ in arch.model.named_parameters()], 0


def _weighted(job: Job[Any], forget: Term, retain: Term | None) -> dict[str, Term]:
    return {"forget": forget, **({"retain": retain} if retain is not None and job.hparams.retain_weight else {})}


class _Training(Phases):
    """One training: what is prepared, run by `Trainer`, and put back where it fails."""

    def __init__(self, job: Job[Any], forget: Term, retain: Term | None, choose: Chooser) -> None:
        super().__init__(None)
        self.job, self.terms = job, _weighted(job, forget, retain)
        self.material = Material.of(job, self.terms.values())
        arch = find_architecture(job.model)
        names, layer = choose(arch, job.hparams)
        self.watched = Watched(job, arch, layer)
        self.weights = (_Adapter if job.hparams.lora_rank else _Weights)(arch, names, job.hparams)

    def run(self) -> Changes:
        job, weights = self.job, self.weights
        with _own_randomness(job.seed), _settings_kept(job.model, job.hparams.gradient_checkpointing):
            try:
                network = weights.open()
                with self.timed("reference"):
                    reference = take_reference(
                        self.watched,
                        self.material,
                        list(self.terms.values()),
                        not weights.trains_head,
                        lambda share: job.progress("reference", share, "the model before training"),
                    )
                with self.timed("train"):
                    history = self._fit(network, reference)
                weights.close()
                _check_finite(job)
            except BaseException as error:
                weights.undo()
                if isinstance(error, torch.OutOfMemoryError):
                    raise TrainingError(_no_room(self.micro, self.material.longest)) from error
                raise
        figures = {"loss": [entry["loss"] for entry in history], "steps": len(history), **_last_terms(history)}
        return Changes(parameters=weights.count, seconds=self.seconds, figures=figures, undo=weights.undo)

    @property
    def batch(self) -> int:
        """Pairs of an optimiser step: an epoch at most, so that few facts still get as many steps as epochs."""
        size: int = min(self.job.hparams.batch_size, self.material.epoch, len(self.material.pairs))
        return size

    @property
    def micro(self) -> int:
        """Pairs that are in memory together: the largest part of a batch within the device's budget."""
        room = max(1, self.job.max_tokens // self.material.longest)
        return max(size for size in range(1, self.batch + 1) if self.batch % size == 0 and size <= room)

    def _fit(self, network: Any, reference: Reference) -> list[dict[str, float]]:
        h = self.job.hparams
        # A run that is all warm-up would make its first step, and perhaps its only one, at a learning rate of 0.
        steps = math.ceil(len(self.material.pairs) / self.batch)
        warmup = min(round(h.warmup_epochs * self.material.epoch / self.batch), steps - 1)
        with ExitStack() as stack:
            work = self.job.work
            place = work / "training" if work else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            arguments = TrainingArguments(
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
            # Several GPUs would be made one by DataParallel, which the passes here do not go through.
            arguments._n_gpu = min(1, arguments.n_gpu)
            trainer = _Trainer(self, network, reference, arguments)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Watch(self.job, keeps=work is not None))
            found = _last_checkpoint(place)
            trainer.train(resume_from_checkpoint=str(found) if found else None)
            return [entry for entry in trainer.state.log_history if "loss" in entry]


class _Trainer(Trainer):
    """`Trainer` with the loss of a method, over pairs in their own order."""

    def __init__(self, training: _Training, network: Any, reference: Reference, arguments: TrainingArguments) -> None:
        pairs = [torch.tensor(pair) for pair in training.material.pairs]
        super().__init__(
            model=network,
            args=arguments,
            train_dataset=pairs,
            data_collator=lambda found: {"pairs": torch.stack(found)},
        )
        self.training, self.reference = training, reference
        # Whether the model's own forward pass would scale a loss: here it never computes one.
        self.model_accepts_loss_kwargs = False
        generator = torch.Generator().manual_seed(training.job.seed)
        direction = torch.rand(training.watched.arch.hidden_size, generator=generator)
        self.direction = (direction / direction.norm()).to(training.watched.arch.device)
        self.parts: dict[str, list[float]] = {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        training = self.training
        batch = Batch(training.watched, training.material, self.reference, self.direction, inputs["pairs"])
        total = torch.zeros((), device=training.watched.arch.device)
        with training.watched.autocast():
            for name, term in training.terms.items():
                loss = term.loss(batch, training.job.hparams)
                self.parts.setdefault(name, []).append(float(loss.detach()))
                total = total + getattr(training.job.hparams, f"{name}_weight") * loss.to(total.device)
        if not bool(torch.isfinite(total)):
            raise TrainingError(
                f"The loss became {float(total.detach())} at step {self.state.global_step + 1} "
                f"({', '.join(f'{name} {values[-1]:.3g}' for name, values in self.parts.items())}). "
                f"Lower learning_rate ({training.job.hparams.learning_rate}) or forget_weight."
            )
        return (total, None) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {name: sum(values) / len(values) for name, values in self.parts.items() if values}
        self.parts = {}
        super().log({**logs, **means}, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint saves time after a kill and must never end a training."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            logger.warning("No checkpoint was written, so that a stopped run would begin again: %s", error)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class _Watch(TrainerCallback):
    """Tells how far training is, and has a checkpoint written now and then."""

    def __init__(self, job: Job[Any], keeps: bool) -> None:
        self.job, self.keeps, self.saved = job, keeps, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            note = ", ".join(f"{name} {logs[name]:.3g}" for name in ("forget", "retain") if name in logs)
            self.job.progress("train", state.global_step / state.max_steps, note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.keeps and time.monotonic() - self.saved >= SAVE_SECONDS:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()


# --- weights ----------------------------------------------------------------------------------------------------------


class _Weights:
    """The weights themselves, trained in float32 whatever their dtype: steps of 1e-5 would be lost in bfloat16."""

    def __init__(self, arch: Architecture, names: Sequence[str], hparams: Any) -> None:
        self.arch, self.names, self.hparams = arch, list(names), hparams
        self.originals: dict[str, Tensor] = {}
        self.trains_head = any(arch.model.get_parameter(name) is arch.head.weight for name in self.names)

    @property
    def count(self) -> int:
        return sum(self.arch.model.get_parameter(name).numel() for name in self.names)

    def open(self) -> Any:
        """What `Trainer` is to train; the model behaves as before."""
        self._keep()
        for name in self.names:
            parameter = self.arch.model.get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return self.arch.model

    def close(self) -> None:
        """The model is plain again, with what it learned."""
        self.arch.model.requires_grad_(False)
        for name, original in self.originals.items():
            parameter = self.arch.model.get_parameter(name)
            parameter.data, parameter.grad = parameter.data.to(original.dtype), None

    @torch.no_grad()
    def undo(self) -> None:
        """The weights as they were, to the bit."""
        self.close()
        for name, original in self.originals.items():
            self.arch.model.get_parameter(name).copy_(original)

    def _keep(self) -> None:
        model = self.arch.model
        self.originals = {name: model.get_parameter(name).detach().cpu().clone() for name in self.names}


class _Adapter(_Weights):
    """A LoRA adapter on the linear maps within the blocks; their own weights stay until it is merged."""

    def __init__(self, arch: Architecture, names: Sequence[str], hparams: Any) -> None:
        chosen = {id(arch.model.get_parameter(name)) for name in names}
        inside = {id(module) for block in arch.blocks for module in block.modules()}
        self.targets = [
            name
            for name, module in arch.model.named_modules()
            if id(module) in inside and _is_linear(module) and id(module.weight) in chosen
        ]
        super().__init__(arch, [f"{name}.weight" for name in self.targets], hparams)
        self.network: Any = None

    def open(self) -> Any:
        h, peft = self.hparams, _peft()
        self._keep()
        settings = peft.LoraConfig(
            r=h.lora_rank,
            lora_alpha=h.lora_alpha,
            lora_dropout=h.lora_dropout,
            target_modules=self.targets,
            fan_in_fan_out=not isinstance(self.arch.model.get_submodule(self.targets[0]), torch.nn.Linear),
        )
        self.network = peft.get_peft_model(self.arch.model, settings)
        # Else saving the adapter asks the hub what the base model's vocabulary was.
        settings.base_model_name_or_path = None
        return self.network

    def close(self) -> None:
        if self.network is not None:
            network, self.network = self.network, None
            network.merge_and_unload()
        super().close()

    def undo(self) -> None:
        if self.network is not None:
            network, self.network = self.network, None
            network.unload()
        super().undo()


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            "lora_rank asks for an adapter, which needs the package peft: pip install 'unierase-plugin[peft]'. "
            "With lora_rank: 0 the weights themselves are trained."
        ) from error
    return peft


# --- around it --------------------------------------------------------------------------------------------------------


def _last_checkpoint(place: Path) -> Path | None:
    """The latest checkpoint that was written to its end."""
    found = []
    for folder in place.glob("checkpoint-*"):
        try:
            json.loads((folder / LAST_WRITTEN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found.append(folder)
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """`Trainer` seeds every generator there is; the caller's are put back."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def _settings_kept(model: Any, checkpointing: bool) -> Iterator[None]:
    """What training changes on a model beside its weights is put back."""
    cache, generation = getattr(model.config, "use_cache", None), model.generation_config
    # Published models have sampling settings that checkpoints cannot be written with.
    model.generation_config = GenerationConfig()
    if checkpointing:
        # Hooks are looked at in the forward pass, which the older, re-entrant way runs without gradients.
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
