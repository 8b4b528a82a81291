"""Values, statistics and solve against the plain versions that the tests hold them to (`tests/helpers/reference.py`).

    python -m pytest benchmarks/ratios.py -n 0 --benchmark-columns=median,rounds

Read the ratios in brackets: in each group the faster one is 1.0. They hold for one thread of a CPU and for these sizes.
Both versions of a group give the same numbers, which is checked here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from families import FAMILIES
from reference import At, Fact
from torch import Tensor

from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.positions import Prompt
from unierase_plugin.locate_then_edit.solve import NullSpace, Ridge
from unierase_plugin.locate_then_edit.value_loss import ValueTarget
from unierase_plugin.locate_then_edit.values import optimise_values
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.statistics.second_moment import second_moments

#: What the two versions may differ by, as a share of the result: the plain one sums in another order.
NEAR = 1e-3
#: Width of the keys and of the states, requests: as of a small model, so that a round stays under a second.
M, D, N = 1536, 576, 20
TOKEN = 299


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moment(width: int) -> Tensor:
    """Of keys that lie mostly in a few directions, as real ones do."""
    keys = drawn(4 * width, width, 0) * torch.logspace(0, -2, width)
    return keys.T @ keys / len(keys)


@pytest.fixture(scope="module")
def arch() -> Architecture:
    return find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))


def compared(benchmark: Any, run: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
    found, wanted = benchmark(run), plain()
    assert float((found - wanted).norm() / wanted.norm()) < NEAR


@pytest.mark.parametrize("version", ["ours", "plain"])
@pytest.mark.parametrize("solver", ["ridge", "null_space"])
def test_solve(benchmark: Any, solver: str, version: str) -> None:
    """Ours works with n x n systems and two factors; the plain one inverts the whole m x m matrix."""
    keys, residual, corpus = drawn(M, N, 1), drawn(D, N, 2), moment(M)
    benchmark.group = f"solve, {solver}: {N} requests, m = {M}, d = {D}"

    def ours() -> Tensor:
        made = Ridge.of(corpus) if solver == "ridge" else NullSpace.of(corpus, 2e-2, 10.0)
        return made.solve(keys, residual).matrix()

    def plain() -> Tensor:
        if solver == "ridge":
            return reference.ridge(keys, residual, corpus)
        return reference.null_space(keys, residual, corpus, 2e-2, 10.0)

    compared(benchmark, ours if version == "ours" else plain, plain)


@pytest.mark.parametrize("version", ["ours", "plain"])
def test_statistics(benchmark: Any, arch: Architecture, version: str) -> None:
    """Ours makes one pass for all layers, in batches; the plain one a pass a layer, a token at a time."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 256, (24,), generator=generator).tolist() for _ in range(40)]
    layers = range(len(arch.blocks))
    benchmark.group = f"second moments: {len(layers)} layers, {sum(map(len, texts))} tokens"

    def ours() -> Tensor:
        found = second_moments(arch, texts, layers)
        return torch.stack([found.moments[layer] for layer in layers]).double()

    def plain() -> Tensor:
        with torch.no_grad():
            return torch.stack([reference.second_moment(arch, texts, layer)[0] for layer in layers]).double()

    compared(benchmark, ours if version == "ours" else plain, plain)


@pytest.mark.parametrize("version", ["ours", "plain"])
def test_values(benchmark: Any, arch: Architecture, version: str) -> None:
    """Ours optimises all requests at once, each prompt's start computed once; the plain one a request and a prompt."""
    hparams = UniEraseHyperParams(layers=(1, 2), v_num_grad_steps=10, v_stop_loss=0.0)
    facts = [
        Fact((At(tuple(range(at, at + 8)), 7), At(tuple(range(at + 9, at + 23)), 13)), None, (40, 41, 42, 2))
        for at in range(10, 130, 10)
    ]
    targets = [
        ValueTarget(tuple(Prompt(*prompt) for prompt in fact.prompts), None, fact.continuation, None) for fact in facts
    ]
    benchmark.group = f"values: {len(facts)} requests, 10 steps"

    def ours() -> Tensor:
        return optimise_values(arch, targets, TOKEN, hparams, max_tokens=4096, pad_id=0).states

    def plain() -> Tensor:
        return torch.stack([reference.value(arch, fact, TOKEN, hparams)[0] for fact in facts])

    compared(benchmark, ours if version == "ours" else plain, plain)
