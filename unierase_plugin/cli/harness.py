"""`unierase harness`: runs a script of a harness with UniErase among its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def harness(
    context: typer.Context,
    script: Annotated[
        Path, typer.Argument(help="A Python script of EasyEdit or of the ROME family. The file is not changed.")
    ],
) -> None:
    """Runs a harness' script with the method UniErase: unierase harness SCRIPT.py --editing_method UniErase OPTIONS.

    The script runs as `python SCRIPT.py` would run it, in the current folder. UniErase is added in memory to the
    methods that the script can choose. That works for EasyEdit's examples (--editing_method UniErase, --hparams_dir
    FILE.yaml) and for evaluate.py of MEMIT and AlphaEdit (--alg_name UniErase, --hparams_fname FILE.json). Everything
    after the script's name goes to the script, --help too.
    """
    from ..hosts.scripts import run_script

    run_script(script, context.args)
