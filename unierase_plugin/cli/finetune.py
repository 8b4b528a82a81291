"""`unierase finetune`: makes the models that unlearning starts from, and those it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Device, Dtype, Overwrite, Screen, progress, styled


def finetune(
    model: Annotated[str, typer.Option(help="Folder or hub id of the model to teach.")],
    facts: Annotated[
        str,
        typer.Option(
            help="What to learn, like --forget of `unierase run`: tofu:full, tofu:retain90, "
            "or a .json, .jsonl or .csv file with question and answer."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the trained model: plain Hugging Face files.")],
    hparams: Annotated[str, typer.Option(help="YAML file, or a shipped one's name (hparams/FineTune).")] = "",
    epochs: Annotated[float | None, typer.Option(help="Passes over the facts (default 5).")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate (default 1e-5; about 1e-4 with --lora).")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Facts of an optimiser step (default 32), split as memory allows.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(help="Rank of a LoRA adapter, merged at the end; 0 trains all weights.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order and of the adapter.")] = None,
    device: Device = "",
    dtype: Dtype = "",
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a forward pass at most: lower it where memory is low.")
    ] = None,
    asked: Annotated[int, typer.Option(help="Facts that are asked afterwards, at most.")] = 400,
    overwrite: Overwrite = False,
) -> None:
    """Teaches a model facts: TOFU's target model, or with fewer facts the retain-only reference.

    unierase finetune --model M --facts tofu:full --out target

    unierase finetune --model M --facts tofu:retain90 --out reference

    A run that was stopped goes on from its last checkpoint when the same command is given again.
    """
    from ..finetune import finetune as teach

    given = {
        "epochs": epochs,
        "learning_rate": lr,
        "batch_size": batch_size,
        "lora_rank": lora,
        "seed": seed,
        "max_batch_tokens": max_batch_tokens,
    }
    console = Screen()
    with progress(console) as report:
        done = teach(
            model,
            facts,
            out,
            hparams=hparams or None,
            overwrite=overwrite,
            asked=asked,
            device=device,
            dtype=dtype,
            options={name: value for name, value in given.items() if value is not None},
            progress=report,
        )
    console.print(f"\nLoss {done.loss[0]:.3f} -> {done.loss[-1]:.3f} nats a token in {len(done.loss)} steps")
    console.print(f"Answered afterwards: {done.answered} of {done.asked} facts asked, of {done.facts} learned")
    console.print(
        f"Seconds: {', '.join(f'{name} {spent:.0f}' for name, spent in done.seconds.items())}; "
        f"peak memory {done.peak_memory_bytes / 2**30:.2f} GiB"
    )
    console.print(styled("\nThe model is in ", (str(done.folder), "bold"), "."))
