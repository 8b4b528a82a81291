"""Several processes on one task, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UniEraseError

#: How long the others wait while the first process reads a corpus. The death of a process is noticed at once.
PATIENCE = timedelta(days=1)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Processes:
    """This process and the processes that it works with. By default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agreed(self, compute: Callable[[], _Result]) -> _Result:
        """The result of `compute` in the first process, for all. An error of this package is raised in all."""
        if self.size == 1:
            return compute()
        result: list[_Result | None] = [None]
        error: list[UniEraseError | None] = [None]
        if self.leads:
            try:
                result[0] = compute()
            except UniEraseError as found:
                error[0] = found
        torch.distributed.broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]
        torch.distributed.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def total(self, number: int) -> int:
        """The sum over all processes."""
        boxed = torch.tensor(number)
        self.add_up([boxed])
        return int(boxed)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes."""
        if self.size == 1:
            return
        for tensor in tensors:
            local = tensor.cpu()
            torch.distributed.all_reduce(local)
            if local is not tensor:
                tensor.copy_(local)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes that a launcher started together; without a launcher, this process alone.

    They communicate through gloo, also on GPUs: they exchange only text and, at the end, one sum of matrices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
