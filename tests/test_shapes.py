"""The shapes and dtypes in signatures are checked while the tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from unierase_plugin.locate_then_edit.solve import LowRank, Ridge
from unierase_plugin.methods.finetuning.losses import descent
from unierase_plugin.removal.teacher import filtered

TOKENS = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: descent(torch.zeros(4, 5), TOKENS), id="a length"),
        pytest.param(lambda: descent(torch.zeros(3, 5), TOKENS.float()), id="a dtype"),
        pytest.param(lambda: LowRank(torch.zeros(2, 3), torch.zeros(4, 5)), id="a dataclass"),
        pytest.param(lambda: Ridge.of(torch.eye(3)).solve(torch.zeros(3, 2), torch.zeros(4, 3)), id="a method"),
        pytest.param(lambda: filtered(torch.zeros(2, 3), torch.eye(3), torch.eye(2), 1.0), id="a removal"),
    ],
)
def test_a_wrong_shape_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeCheckError):
        call()
    assert float(descent(torch.zeros(3, 5), TOKENS)) > 0
