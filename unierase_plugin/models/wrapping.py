"""Detects a model whose own weights cannot be edited or saved as they are, because something wraps them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ArchitectureError

#: Attributes of torch's wrappers that have the inner model, and what each wrapper does.
WITHIN = {
    "_orig_mod": "compiled (torch.compile)",
    "module": "wrapped for data parallel training",
    "_fsdp_wrapped_module": "spread over processes (FSDP)",
}


def refuse_wrapped(model: Any) -> None:
    """Raises ArchitectureError, with the lines that help, for a model with an adapter, a wrapper or a parametrisation.

    An edit would change weights that are not used, or the saved model would be incomplete or would not open.
    """
    if not isinstance(model, nn.Module):
        return
    within = next((name for name in WITHIN if name in model._modules and not hasattr(type(model), "config_class")), "")
    if within:
        raise ArchitectureError(
            f"The model is {WITHIN[within]}. Give the model within, model.{within}, and wrap it again after the edit."
        )
    if hasattr(model, "get_base_model") or any("base_layer" in module._modules for module in model.modules()):
        raise ArchitectureError(
            "The model has a PEFT adapter. An edit of the weights would not reach it, and saving the model would write "
            "only the adapter. Merge it first: model = PeftModel.from_pretrained(base, ADAPTER).merge_and_unload(), "
            "or give the adapter's folder, which is merged when it is opened."
        )
    for name, module in model.named_modules():
        _refuse_module(name, module)


def _refuse_module(name: str, module: nn.Module) -> None:
    spot = f"{name!r}" if name else "The model"
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        raise ArchitectureError(
            f"{spot} is compiled, so an edit cannot look inside it. Load the model again without compile(), edit it, "
            "and compile the edited one."
        )
    if parametrize.is_parametrized(module):
        part = next(iter(module.parametrizations))  # type: ignore[arg-type]
        raise ArchitectureError(
            f"{spot} computes its {part} from other tensors (a parametrisation), so it cannot be edited or saved as "
            "a plain weight. Make it one: torch.nn.utils.parametrize.remove_parametrizations("
            f"model.get_submodule({name!r}), {part!r})."
        )
    part = next((key for key in ("weight", "bias") if isinstance(vars(module).get(key), Tensor)), "")
    if part:
        raise ArchitectureError(
            f"The {part} of {spot} is computed from other tensors (pruning, or a weight norm). Make it a parameter: "
            f"torch.nn.utils.prune.remove(model.get_submodule({name!r}), {part!r}), or remove_weight_norm."
        )
    spread = next((key for key, each in module.named_parameters(recurse=False) if hasattr(each, "device_mesh")), "")
    if spread:
        raise ArchitectureError(
            f"The {spread} of {spot} is spread over processes (DTensor: FSDP or tensor parallel). Save the whole "
            "model, and give the folder."
        )
