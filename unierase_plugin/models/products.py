"""Float32 matrix products on a CPU through oneDNN, where torch's default library is slower and no more exact.

torch uses MKL, which avoids wide instructions on processors of other makers: on a recent AMD core oneDNN takes 0.45 of
the time. torch has no switch for the library alone. It uses oneDNN if products may be rounded to bfloat16, and oneDNN
rounds only with matrix units for bfloat16; otherwise it computes in float32. A test on this machine decides once: if
anything is rounded, torch's setting stays.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: (rows, inner, columns) of the test products: few and many rows, odd sizes.
PROBES = ((1, 96, 128), (7, 573, 331), (64, 256, 256), (300, 192, 640))
#: Relative error up to which a product counts as float32. bfloat16 has an error of 2e-3.
FLOAT32_ERROR = 2e-6


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, float32 products on the CPU go through oneDNN if that is exact here. Also usable as a decorator.

    Not for a whole model: attention on a CPU consists of many small products, and oneDNN is slower at those.
    """
    switch = _switch()
    if switch is None or not _is_exact():
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def fast_linear_maps() -> Iterator[None]:
    """Inside, frozen linear maps of a float32 model on the CPU, and their gradients, use `fast_products`."""
    if _switch() is None or not _is_exact():
        yield
        return
    with _Mode():
        yield


class _Mode(TorchFunctionMode):
    """Replaces `torch.nn.functional.linear` if only its input may need a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear or not _is_plain(args, kwargs):
            return func(*args, **(kwargs or {}))
        product = _Product.apply(args[0], args[1])
        return product if len(args) < 3 or args[2] is None else product + args[2]


def _is_plain(args: Any, kwargs: Any) -> bool:
    tensors = [each for each in args if each is not None]
    return not kwargs and all(
        each.dtype == torch.float32 and each.device.type == "cpu" and (each is args[0] or not each.requires_grad)
        for each in tensors
    )


class _Product(torch.autograd.Function):
    """x W^T, with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        with fast_products():
            return inputs @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with fast_products():
            return gradients[0] @ ctx.weight, None


def _switch() -> Any:
    """torch's setting for products through oneDNN; None if there is none (before torch 2.9, or without oneDNN)."""
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    return switch if torch.backends.mkldnn.is_available() and hasattr(switch, "fp32_precision") else None


@functools.cache
def _is_exact() -> bool:
    """Whether products that may be rounded to bfloat16 keep float32 precision, also transposed."""
    switch = _switch()
    before = switch.fp32_precision
    generator = torch.Generator().manual_seed(0)
    switch.fp32_precision = "bf16"
    try:
        for rows, inner, columns in PROBES:
            left = torch.randn(rows, inner, generator=generator)
            right = torch.randn(inner, columns, generator=generator)
            for got, a, b in ((left @ right, left, right), (right.T @ left.T, right.T, left.T)):
                exact = a.double() @ b.double()
                if not float((got - exact).norm() / exact.norm()) <= FLOAT32_ERROR:  # NaN is no precision
                    return False
    finally:
        switch.fp32_precision = before
    return True
