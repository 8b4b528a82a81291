"""`unierase eval`: lm-eval's own command line, with this package's tasks."""

from __future__ import annotations

import typer


def evaluate(context: typer.Context) -> None:
    """Runs lm-eval with this package's tasks: unierase eval --model DIR --tasks unierase_demo [lm-eval's options]."""
    from ..tasks.lm_eval_cli import run_lm_eval

    run_lm_eval(context.args)
