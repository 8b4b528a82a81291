"""`unierase harness`: a harness' own script, run as it stands with UniErase among its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def harness(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="Python script of EasyEdit or of ROME's family; it is not changed.")],
) -> None:
    """Runs a harness' script with the method UniErase: unierase harness SCRIPT.py --editing_method UniErase OPTIONS.

    The script is run as `python SCRIPT.py` would run it, in the current folder. In memory, UniErase is added to the
    methods that it chooses settings for: EasyEdit's examples (--editing_method UniErase, --hparams_dir FILE.yaml) and
    evaluate.py of MEMIT and AlphaEdit (--alg_name UniErase, --hparams_fname FILE.json). What follows the script's name
    is the script's own, --help included.
    """
    from ..hosts.scripts import run_script

    run_script(script, context.args)
