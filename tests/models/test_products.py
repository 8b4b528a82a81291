"""Faster products are float32 still, only inside, and not at all where the machine would round them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from unierase_plugin.models import products
from unierase_plugin.models.products import fast_linear_maps, fast_products

SHAPES = [(1, 576, 1536), (9, 33, 5), (63, 1536, 576), (200, 577, 191)]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for torch's setting on a machine where nothing is rounded."""
    made = SimpleNamespace(fp32_precision="none")
    monkeypatch.setattr(products, "_switch", lambda: made)
    monkeypatch.setattr(products, "_is_exact", lambda: True)
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_their_gradients_keep_the_precision_of_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(a, b, generator=generator) for a, b in ((rows, inner), (inner, columns)))
    left.requires_grad_(True)
    with fast_products():
        got = left @ right
        (gradient,) = torch.autograd.grad(got.sum(), left)
    for found, exact in (
        (got.detach(), left.detach().double() @ right.double()),
        (gradient, right.double().sum(1).expand(rows, -1)),
    ):
        assert float((found - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 33), (2, 7, 33)], ids=str)
def test_linear_maps_and_their_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    layer = torch.nn.Linear(33, 12, bias=bias).requires_grad_(False)
    inputs = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(*shape[:-1], 12, generator=generator)
    wanted = layer(inputs)
    with fast_linear_maps():
        got = layer(inputs)
        found = torch.autograd.grad((got * weight).sum(), inputs)[0]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(found, torch.autograd.grad((wanted * weight).sum(), inputs)[0])


def test_linear_maps_alone_have_the_setting(switch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    whole = torch.Tensor.__matmul__

    def seeing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(("linear" if len(seen) else "plain", switch.fp32_precision))
        return whole(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", seeing)
    inputs = torch.ones(2, 4, requires_grad=True)
    with fast_linear_maps():
        torch.ones(2, 4) @ torch.ones(4, 2)
        torch.nn.functional.linear(inputs, torch.ones(3, 4)).sum().backward()
    assert seen == [("plain", "none"), ("linear", "bf16"), ("linear", "bf16")]
    assert switch.fp32_precision == "none"


@pytest.mark.parametrize("what", ["trained", "half precision"])
def test_other_linear_maps_are_left_to_torch(what: str) -> None:
    """A trained map's gradient is not lost, and half precision stays what it is."""
    layer = torch.nn.Linear(4, 3, dtype=torch.float32 if what == "trained" else torch.bfloat16)
    with fast_linear_maps():
        out = layer(torch.ones(2, 4, dtype=layer.weight.dtype))
        out.sum().backward()
    assert out.dtype == layer.weight.dtype
    assert layer.weight.grad is not None


def test_the_setting_is_as_before_afterwards_also_when_something_fails(switch: SimpleNamespace) -> None:
    with fast_products():
        assert switch.fp32_precision == "bf16"
        with fast_products():
            assert switch.fp32_precision == "bf16"
        assert switch.fp32_precision == "bf16"
    assert switch.fp32_precision == "none"
    with pytest.raises(ZeroDivisionError), fast_products():
        raise ZeroDivisionError
    assert switch.fp32_precision == "none"


def test_a_decorated_function_has_the_setting_in_every_call(switch: SimpleNamespace) -> None:
    look = fast_products()(lambda: switch.fp32_precision)
    assert (look(), switch.fp32_precision, look()) == ("bf16", "none", "bf16")


def test_a_machine_that_rounds_is_left_as_it_is(switch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_exact", lambda: False)
    with fast_products():
        assert switch.fp32_precision == "none"


def test_rounding_to_bfloat16_is_noticed(switch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor with matrix units for bfloat16 would do."""
    monkeypatch.undo()
    monkeypatch.setattr(products, "_switch", lambda: switch)
    probe = products._is_exact.__wrapped__
    assert probe()
    whole = torch.Tensor.__matmul__

    def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and switch.fp32_precision == "bf16":
            return whole(left.bfloat16().float(), right.bfloat16().float())
        return whole(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not probe()
    assert switch.fp32_precision == "none"


def test_a_torch_without_the_setting_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_switch", lambda: None)
    with fast_products():
        assert float((torch.ones(2, 3) @ torch.ones(3, 2)).sum()) == 12
