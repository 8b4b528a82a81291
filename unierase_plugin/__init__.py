"""UniErase for causal language models: unlearning by a learned token and a closed-form edit (arXiv 2505.15674)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UniEraseError
from .facts.request import ForgetRequest
from .hparams import UniEraseHyperParams
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .hosts.rome_family import apply_unierase_to_model
    from .pipeline import unlearn
    from .plugins.hookspecs import hookimpl
    from .results import UnlearnResult

__all__ = [
    "ForgetRequest",
    "UniEraseError",
    "UniEraseHyperParams",
    "UnlearnResult",
    "apply_unierase_to_model",
    "hookimpl",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    """Imports torch, transformers and pluggy when first needed, so that `import unierase_plugin` is instant."""
    if name == "unlearn":
        from .pipeline import unlearn

        return unlearn
    if name == "UnlearnResult":
        from .results import UnlearnResult

        return UnlearnResult
    if name == "apply_unierase_to_model":
        from .hosts.rome_family import apply_unierase_to_model

        return apply_unierase_to_model
    if name == "hookimpl":
        from .plugins.hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
