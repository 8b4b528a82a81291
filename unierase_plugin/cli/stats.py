"""`unierase stats`: computes or imports the covariance statistics of ordinary text."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import UniEraseError, shown
from .console import Device, Dtype, Screen, progress

if TYPE_CHECKING:
    from ..statistics.collection import CorpusMoment
    from ..statistics.distributed import Processes


def stats(
    model: Annotated[str, typer.Option(help="Folder or hub id of a causal language model in plain weights.")],
    hparams: Annotated[str, typer.Option(help="YAML file, or a shipped one's name (see `unierase hparams`).")] = "",
    corpus: Annotated[
        str,
        typer.Option(
            help="Ordinary text: self (sampled from the model), a text file, or a hub dataset as name:config:column. "
            "Of a dataset, only the needed part is read."
        ),
    ] = "",
    layers: Annotated[str, typer.Option(help="Blocks, as in 3-7 or 3,5,7. Default: those of the hparams.")] = "",
    samples: Annotated[int, typer.Option(help="Texts to read. Default: as many as the hparams say.")] = 0,
    sources: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            help="Import statistics instead of computing them: .npz files of EasyEdit or MEMIT, a folder of such "
            "files, or a file that --out wrote. Can be given several times.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the statistics to this .safetensors file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampled text. Default: that of the hparams.")] = None,
    device: Device = "",
    dtype: Dtype = "",
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, at most. Lower it if memory is short.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Computes or imports the covariance statistics of ordinary text, and keeps them for later runs.

    An edit needs them. `unierase run` finds them if model, corpus, blocks, samples and seed are the same. If a pass is
    stopped, give the same command again: it goes on. `accelerate launch -m unierase_plugin stats ...`, or torchrun,
    divides the work among several processes.
    """
    from ..pipeline import corpus_moment
    from ..session import choose_hparams
    from ..statistics.distributed import joined_processes
    from ..storage.tensor_files import refuse_other

    changes: dict[str, Any] = {
        "layers": _blocks(layers),
        "mom2_n_samples": samples,
        "max_batch_tokens": max_batch_tokens,
    }
    settings = choose_hparams(hparams or None, model).replace(**{key: each for key, each in changes.items() if each})
    if out is not None and out.suffix != ".safetensors":
        raise UniEraseError(f"--out {shown(str(out))} must end in .safetensors.")
    if out is not None:
        refuse_other(out, "SecondMoment", "statistics")
        if any(source.exists() and out.exists() and source.samefile(out) for source in sources or ()):
            raise UniEraseError(f"--out {shown(str(out))} is also the file to import. Name another file.")
    if sources and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UniEraseError("--import runs in one process: there is no work to divide. Start it without a launcher.")
    console = Screen(stderr=True)
    with joined_processes() as processes, progress(console) if processes.leads else nullcontext(_silent) as report:
        try:
            found = corpus_moment(
                model,
                hparams=settings,
                corpus=corpus or None,
                sources=sources or (),
                out=out,
                seed=seed,
                device=_own_device(device, processes),
                dtype=dtype,
                processes=processes,
                progress=report,
            )
        except UniEraseError:
            if processes.leads:
                raise
            raise typer.Exit(1) from None  # the first process reports the error for all
    if not processes.leads:
        return
    if as_json:
        Screen().json(_figures(found))
    else:
        _print(Screen(), found)


def _silent(phase: str, share: float, note: str) -> None:
    """Only the first process reports progress, for all."""


def _blocks(text: str) -> tuple[int, ...]:
    """3-5,9 as (3, 4, 5, 9)."""
    chosen: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        # No model has ten thousand blocks, and a longer range would fill the memory.
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not found:
            raise UniEraseError(f"--layers {shown(text)} is not a list of blocks. Write it as 3-7 or 3,5,7.")
        chosen += found
    return tuple(chosen)


def _own_device(device: str, processes: Processes) -> str:
    """With several processes each one takes the GPU of its own number, unless a device is named."""
    import torch

    if processes.size > 1 and device in ("", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', processes.rank)) % torch.cuda.device_count()}"
    return device


def _figures(found: CorpusMoment) -> dict[str, Any]:
    return {
        "file": str(found.file),
        "source": found.source,
        "tokens": found.moment.count,
        "seconds": {"reading": found.reading, "counting": found.counting},
        "blocks": {
            str(layer): {"width": len(moment), "mean_eigenvalue": float(moment.trace()) / len(moment)}
            for layer, moment in found.moment.moments.items()
        },
    }


def _print(console: Screen, found: CorpusMoment) -> None:
    table = Table("block", "width", "tokens", "mean eigenvalue")
    for layer, block in _figures(found)["blocks"].items():
        table.add_row(layer, str(block["width"]), str(found.moment.count), f"{block['mean_eigenvalue']:.4g}")
    console.print(table)
    spent = (
        f"{found.reading:.1f} s to read, {found.counting:.1f} s to count" if found.reading else "from the cache: 0 s"
    )
    source = ", ".join(f"{key} {value}" for key, value in found.source.items())
    console.print(f"{source}; {spent}\nKept in {found.file!s}", soft_wrap=True)
