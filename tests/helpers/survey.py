"""Looks at one model from the outside: whether passes, keys, edit, revert and folder are what they are to be.

It compares the package with plain forward passes and hooks of `reference`. Each check is one function that raises
AssertionError. `survey` says "works", "refused", "wrong" or "crash", with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import reference
import torch
from reference import At
from tiny import tiny_tokenizer
from torch import Tensor

from unierase_plugin.errors import ArchitectureError, UniEraseError
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import apply_edit, compute_edit, make_solver
from unierase_plugin.locate_then_edit.keys import KeyStream
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.values import Values
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.models.loading import load
from unierase_plugin.models.prefix import cache_prefixes, continue_from
from unierase_plugin.models.served import check_served
from unierase_plugin.models.trace import pad, run_blocks

#: Longer than sliding windows, and of different lengths.
SEQUENCES = ((5, 17, 200, 33, 8, 91, 44, 12, 250), (7, 61, 130, 9, 77, 102), (250, 3, 4))
PROMPTS = (
    (At((5, 17, 200, 33, 8, 91, 44), 3), At((9, 12, 61, 5, 17, 200, 33, 8, 91, 44), 6)),
    (At((7, 61, 130, 9), 3),),
    (At((250, 3, 4, 5, 6), 1), At((1, 250, 3, 4, 5), 2)),
)
#: The residual that may be left, as a share of the one before.
LEFT = 0.05


@dataclasses.dataclass(frozen=True)
class Found:
    """What a model turned out to be."""

    #: "works", "refused", "wrong" or "crash".
    outcome: str
    #: The reason, or the check that failed.
    reason: str = ""
    #: The share of the residual that is left after the edit, measured from outside.
    left: float | None = None


def survey(model: Any, folder: Path) -> Found:
    """Everything that an edit needs, on one model. folder: an empty folder to save it in."""
    try:
        arch = find_architecture(model.requires_grad_(False))
        check_served(arch)  # as every run does before it works
    except ArchitectureError as error:
        return Found("refused", str(error))
    except Exception as error:
        return Found("crash", f"finding its parts: {type(error).__name__}: {error}")
    left: list[float] = []
    try:
        check_served(arch, [layers_of(arch)[-1] + 1])
    except ArchitectureError as error:
        return Found("refused", str(error))
    checks: dict[str, Callable[[], Any]] = {
        "partial passes": lambda: check_partial_passes(arch),
        "cached passes": lambda: check_cached_passes(arch),
        "keys": lambda: check_keys(arch),
        "edit and revert": lambda: left.append(residual_left(arch)),
        "the saved folder": lambda: check_folder(model, folder),
    }
    for name, check in checks.items():
        try:
            check()
        except UniEraseError as error:
            return Found("refused", f"late, at {name}: {error}")
        except AssertionError as error:
            return Found("wrong", f"{name}: {' '.join(str(error).split())[:200]}", *left)
        except Exception as error:
            return Found("crash", f"{name}: {type(error).__name__}: {error}", *left)
    if left[0] > LEFT:
        return Found("wrong", "the edit does not reach its values", left[0])
    return Found("works", "", left[0])


@torch.no_grad()
def plain(model: Any, sequence: Sequence[int]) -> Tensor:
    """(T, V) logits of one sequence alone, through nothing but the model itself."""
    return model(torch.tensor([list(sequence)]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def check_partial_passes(arch: Architecture) -> None:
    """Blocks below and above compose to the model, padded on each side that the model reads as padding."""
    for side in ("right", "left") if arch.pads_left else ("right",):
        batch = pad(SEQUENCES, 0, side, arch.device)
        rows, columns = torch.ones_like(batch.ids).nonzero(as_tuple=True)
        for first in (1, len(arch.blocks) - 1):
            below = run_blocks(arch, batch, last=first - 1).hidden
            above = run_blocks(arch, batch, first=first, hidden=below, head_at=(rows, columns))
            logits = above.logits.reshape(*batch.ids.shape, -1)
            for row, sequence in enumerate(SEQUENCES):
                close(logits[row][batch.mask[row].bool()], plain(arch.model, sequence))


@torch.no_grad()
def check_cached_passes(arch: Architecture) -> None:
    """Sequences in two parts, the first one cached, give the logits of the whole."""
    cuts = (5, 2, 1)
    prefix = cache_prefixes(arch, [ids[:cut] for ids, cut in zip(SEQUENCES, cuts, strict=True)], 0)
    batch = continue_from(prefix, [ids[cut:] for ids, cut in zip(SEQUENCES, cuts, strict=True)], 0)
    rows, columns = torch.ones_like(batch.ids).nonzero(as_tuple=True)
    for _ in range(2):  # the second time from the same prefixes
        trace = run_blocks(arch, batch, cache=prefix.fresh(), head_at=(rows, columns))
        logits = trace.logits.reshape(*batch.ids.shape, -1)
        for row, (ids, cut) in enumerate(zip(SEQUENCES, cuts, strict=True)):
            close(logits[row][: len(ids) - cut], plain(arch.model, ids)[cut:])


def layers_of(arch: Architecture) -> tuple[int, ...]:
    """Two blocks with an MLP, neither the first nor the last where there are enough."""
    fit = arch.editable
    inner = [layer for layer in fit if 0 < layer < len(arch.blocks) - 1]
    return tuple((inner if len(inner) > 1 else fit)[:2])


def check_keys(arch: Architecture) -> None:
    layers = layers_of(arch)
    stream = KeyStream(arch, packed(), layers, 4096, 0)
    for layer in layers:
        keys, states = stream.advance(layer)
        close(keys, reference.keys(arch, PROMPTS, layer))
        close(states, reference.states(arch, PROMPTS, layers[-1]))


def residual_left(arch: Architecture) -> float:
    """The share of |z - h| that is left after an edit of two blocks. Checks that the way back is exact."""
    layers = layers_of(arch)
    before = copy.deepcopy(arch.model.state_dict())
    alone = [contexts[:1] for contexts in PROMPTS]
    start = reference.states(arch, alone, layers[-1])
    wanted = torch.stack([pushed(arch, layers[-1], contexts[0]) for contexts in alone], dim=1)
    figures = {field.name: torch.ones(len(alone)) for field in dataclasses.fields(Values)}
    values = Values(**{**figures, "states": wanted.T.contiguous(), "steps": torch.ones(3, dtype=torch.long)})
    hparams = UniEraseHyperParams(layers=layers, mom2_update_weight=1e-6)
    moments = {layer: torch.eye(arch.moment_shape(layer)[-1]).expand(arch.moment_shape(layer)) for layer in layers}
    solvers = {layer: make_solver(hparams, moments[layer], None) for layer in layers}
    prompts = [[Prompt(*each) for each in contexts] for contexts in alone]
    edit = compute_edit(arch, prompts, values, solvers, max_tokens=4096, pad_id=0)
    assert same(arch.model, before), "computing the edit changed the model"
    originals = apply_edit(arch, edit)
    after = reference.states(arch, alone, layers[-1])
    originals.restore()
    assert same(arch.model, before), "the way back is not exact"
    ratio = (wanted - after).norm(dim=0) / (wanted - start).norm(dim=0)
    return float(ratio.mean())


def pushed(arch: Architecture, layer: int, prompt: At) -> Tensor:
    """(d,): the block's output at the fact, a tenth from where it is, by a vector added to its projection's output.

    Behind a norm not every state can be reached. This one can.
    """
    module: Any = getattr(arch.projections[layer], "module", arch.projections[layer])  # that of routed experts
    way = torch.randn(arch.hidden_size, generator=torch.Generator().manual_seed(7 + prompt.position))
    start = reference.state(arch, prompt, layer)

    def moved(size: float) -> Tensor:
        def add(module: Any, args: Any, output: Tensor) -> Tensor:
            rows = output.reshape(-1, output.shape[-1]).clone()
            rows[prompt.position] += size * way
            return rows.reshape(output.shape)

        handle = module.register_forward_hook(add)
        try:
            return reference.state(arch, prompt, layer)
        finally:
            handle.remove()

    goal, size = 0.1 * float(start.norm()), 1e-2
    for _ in range(3):
        size *= goal / float((moved(size) - start).norm())
    return moved(size)


def same(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def check_folder(model: Any, folder: Path) -> None:
    """The saved model loads by name, and says the same."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    loaded, _ = load(folder)
    close(plain(loaded, SEQUENCES[0]), plain(model, SEQUENCES[0]))


def packed() -> list[list[Prompt]]:
    return [[Prompt(*prompt) for prompt in contexts] for contexts in PROMPTS]
