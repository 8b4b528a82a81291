"""A block that fails as a full GPU does, for tests of what happens then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Scarce:
    """Makes a block run out of memory whenever more than so many rows come to it."""

    def __init__(self, block: nn.Module, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, self.refused, self.forward = rows, 0, block.forward
        monkeypatch.setattr(block, "forward", self)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden) > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError
        return self.forward(hidden, *args, **kwargs)
