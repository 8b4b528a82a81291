"""How a model goes on from earlier tokens, and whether it reads padding on the left. Both are tried on a few tokens.

A cache of transformers is right for generation: it reads a prompt, then single tokens. Whether a model can also go on
with several tokens, after padding, depends on its code. So it is compared with a plain pass and never assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: How far the logits of two ways may differ, in standard deviations of all logits: in float32, and in coarser types.
EXACT, COARSE = 0.01, 0.3
#: The texts that are tried, of several lengths, and where they are cut: also before the first token.
ROWS = ((1, 2, 3, 2, 1, 3), (3, 1, 2, 2), (2, 3))
CUTS = (4, 2, 0)


def keeps_plain_layers(model: Any) -> bool:
    """Whether a cache made from the model's config holds keys and values alone, in every block."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a config that does not tell the kinds of its layers
        return True
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


@torch.no_grad()
def reads_left_padding(model: Any) -> bool:
    """Whether left-padded texts get the logits that each gets alone. Recurrent blocks may read padding as text."""
    from .trace import pad

    device = model.get_input_embeddings().weight.device
    with evaluating(model), in_float32(model) as exact:
        batch = pad(ROWS, 0, "left", device)
        places = {"position_ids": batch.positions} if accepts_position_ids(model) else {}
        try:
            found = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **places).logits[:, -1]
            alone = [model(torch.tensor([row], device=device), use_cache=False).logits[0, -1] for row in ROWS]
        except Exception:  # whatever a model's own code raises: the check before work tells it
            return False
    return agree(found, torch.stack(alone), exact)


def accepts_position_ids(model: Any) -> bool:
    """Whether the model takes the positions of its tokens."""
    return "position_ids" in inspect.signature(model.forward).parameters


def agree(found: Tensor, wanted: Tensor, exact: bool) -> bool:
    """Whether logits of two ways differ by rounding at most. NaN counts as agreement: another check reports it.

    exact: whether they were computed in float32.
    """
    allowed = (EXACT if exact else COARSE) * wanted.float().std()
    return not bool((found.float() - wanted.float()).abs().max() > allowed)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts the model in evaluation mode for a while; its former mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def in_float32(model: Any) -> Iterator[bool]:
    """Inside, a model in half precision computes in float32, so that rounding hides no error of the way it is run.

    Each block's weights are converted while it runs, so the memory holds one block's more. They are the same tensors
    afterwards. The head, which is large, hands its input on: logits are inputs of the head. A model with plain layers
    alone, or with weights that are not loaded, stays as it is. Gives whether the model computes in float32 inside.
    """
    half = (torch.bfloat16, torch.float16)
    parameters = list(model.parameters())
    exact = all(each.dtype not in half for each in parameters)
    if exact or any(each.is_meta for each in parameters) or keeps_plain_layers(model):
        yield exact
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, args: Any) -> None:
        for each in module.parameters():
            if each.dtype in half:
                own[each] = each.data
                each.data = each.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for each in module.parameters():
            if each in own:
                each.data = own.pop(each)

    def restore_all() -> None:
        for each, data in own.items():
            each.data = data

    with ExitStack() as stack:
        stack.callback(restore_all)
        stack.callback(embedding.register_forward_hook(lambda module, args, out: out.float()).remove)
        stack.enter_context(replaced_forward([head], lambda hidden: hidden))
        for module in _units(model):
            if module not in (embedding, head):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(restore).remove)
        yield True


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, and the modules outside of them that have weights of their own."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif next(child.parameters(recurse=False), None) is not None:
            yield child
        else:
            yield from _units(child)


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Modules compute `forward` for a while. A `forward` of their own, as accelerate sets it, comes back afterwards."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before
