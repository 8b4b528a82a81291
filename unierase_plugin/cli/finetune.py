"""`unierase finetune`: makes the models that unlearning starts from, and the retain-only reference models."""

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
    epochs: Annotated[float | None, typer.Option(help="Passes over the facts. Default: 5.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: 1e-5; use about 1e-4 with --lora.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Facts in an optimiser step. Default: 32. Split if the memory is short."),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(help="Rank of a LoRA adapter, which is merged at the end; 0 trains all weights.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for the order of the facts and for the adapter.")] = None,
    device: Device = "",
    dtype: Dtype = "",
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a forward pass, at most. Lower it if the memory is short.")
    ] = None,
    asked: Annotated[int, typer.Option(help="Facts to ask afterwards, at most.")] = 400,
    overwrite: Overwrite = False,
) -> None:
    """Teaches facts to a model: TOFU's target model, or the retain-only reference.

    unierase finetune --model M --facts tofu:full --out target

    unierase finetune --model M --facts tofu:retain90 --out reference

    If a run is stopped, give the same command again: it goes on from the last checkpoint.
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
