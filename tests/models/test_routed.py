"""Routed experts as one wide projection: what is found, what keys are, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import survey
import torch
import transformers
from decoders import tiny_config, tiny_decoder
from torch import Tensor, nn

from unierase_plugin.audit.weights import change_each_expert, expert_weights, linear_maps
from unierase_plugin.errors import ArchitectureError
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.models.experts import Experts, Routing, find_experts
from unierase_plugin.models.served import check_served
from unierase_plugin.models.trace import EarlierTokens, TokenBatch, run_blocks

#: With shared experts, dense first blocks, biases, both layouts, an inner width above the hidden size, and experts that
#: each read their own inputs.
KINDS = (
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "glm4_moe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "qwen2_moe",
    "llama4_text",
)


pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="needs transformers 5")


def mixed(kind: str) -> Architecture:
    """A tiny random mixture of experts, biases of experts random as well."""
    model = tiny_decoder(kind).requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "experts" in name and "bias" in name:
            parameter.normal_(0, 0.3)
    return find_architecture(model)


def experts_of(arch: Architecture) -> list[Experts]:
    return [projection for projection in arch.projections if isinstance(projection, Experts)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_serves_an_edit_whole(kind: str, tmp_path: Path) -> None:
    """Passes, keys against gradients, the residual measured from outside, the way back, and the saved folder."""
    found = survey.survey(mixed(kind).model, tmp_path)
    assert (found.outcome, found.reason) == ("works", "")
    assert found.left is not None
    assert found.left < 0.05


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_experts_are_one_projection(kind: str) -> None:
    arch = mixed(kind)
    check_served(arch)
    dense = 1 if kind == "deepseek_v3" else 0
    assert [isinstance(projection, Experts) for projection in arch.projections] == [False] * dense + [True] * (
        4 - dense
    )
    for layer, experts in enumerate(arch.projections):
        if isinstance(experts, Experts):
            assert arch.weight_name(layer) == f"model.layers.{layer}.mlp.experts.down_proj"
            assert arch.model.get_parameter(arch.weight_name(layer)) is experts.weight
            assert arch.mlp_width(layer) == experts.count * experts.inner
            assert arch.moment_shape(layer) == (experts.count, experts.inner, experts.inner)
            side_by_side = torch.cat([experts.of_expert(number) for number in range(experts.count)], dim=1)
            assert torch.equal(arch.matrix(layer), side_by_side)
            assert experts.bias_name == ("down_proj_bias" if kind == "gpt_oss" else "")
            with pytest.raises(ArchitectureError, match=f"Block {layer} is a mixture of experts"):
                arch.dense(layer)


def test_no_expert_has_no_part_in_a_key_and_one_that_is_chosen_twice_has_both() -> None:
    experts = experts_of(mixed("qwen3_moe"))[0]
    hidden = torch.randn(3, 32)
    weights = torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.5, 0.25]])
    keys = experts.keys(Routing(hidden, torch.tensor([[1, 4], [2, 2], [3, -1]]), weights))
    alone = experts.keys(Routing(hidden, torch.tensor([[1], [2], [3]]), torch.ones(3, 1)))
    shares = torch.tensor([[0.5], [0.75], [0.5]])
    torch.testing.assert_close(keys, shares * alone)
    reached = keys.reshape(3, 4, 32).any(2)
    assert reached.nonzero().tolist() == [[0, 1], [1, 2], [2, 3]]


def test_an_expert_that_hands_on_what_it_reads_has_no_part_in_a_key() -> None:
    """LongCat sends some tokens to such experts alone. Its experts also fail where a token is sent to one only."""
    torch.manual_seed(0)
    config = tiny_config("longcat_flash", zero_expert_num=2)
    arch = find_architecture(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    assert {experts.slots for experts in experts_of(arch)} == {2}
    survey.check_keys(arch)


def test_a_bias_that_is_zero_is_still_found() -> None:
    """Another block may have another one."""
    model = tiny_decoder("gpt_oss").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "experts" in name and "bias" in name:
            parameter.zero_()
    assert {experts.bias_name for experts in experts_of(find_architecture(model))} == {"down_proj_bias"}


class Normed(nn.Module):
    """Experts with a norm after each: their output is not linear in the down projections."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.inside = [experts]

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        own = self.inside[0]
        out = torch.func.functional_call(own, {"down_proj": self.down_proj}, (hidden, index, weights))
        return nn.functional.normalize(out, dim=-1)


def test_experts_that_are_not_linear_are_refused() -> None:
    arch = mixed("qwen3_moe")
    module: Any = experts_of(arch)[0].module
    given = [torch.randn(4, 32), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]), torch.rand(4, 2)]
    assert find_experts("e", module, given, 32).parameter == "down_proj"
    with pytest.raises(ArchitectureError, match="not rebuilt from any of their stacked weights: a norm may follow"):
        find_experts("e", Normed(module), given, 32)
    with pytest.raises(ArchitectureError, match="their output is projected again"):
        find_experts("e", module, given, 64)
    with pytest.raises(ArchitectureError, match="it is not known which token goes to which expert"):
        find_experts("e", module, given[:2], 32)


def test_experts_in_a_list_are_refused_with_the_remedy() -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_decoder("llama").config)
    for block in model.model.layers:
        block.mlp.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
    with pytest.raises(ArchitectureError, match="without trust_remote_code"):
        find_architecture(model)


def test_experts_that_see_tokens_in_another_order_are_refused() -> None:
    """All else is right in this model: the first tokens of all texts come first, and go back to their places."""
    arch = mixed("qwen3_moe")
    module: Any = arch.blocks[0].mlp
    with torch.no_grad():
        before = arch.model(torch.tensor([[1, 2, 3], [3, 1, 2]])).logits
        module.register_forward_pre_hook(lambda m, args: (args[0].transpose(0, 1).contiguous(),))
        module.register_forward_hook(lambda m, args, out: out.transpose(0, 1).contiguous())
        torch.testing.assert_close(arch.model(torch.tensor([[1, 2, 3], [3, 1, 2]])).logits, before)
    with pytest.raises(ArchitectureError, match="does not hold one text"):
        check_served(find_architecture(arch.model))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_an_attack_on_weights_reaches_every_expert_and_no_router(kind: str) -> None:
    arch = mixed(kind)
    assert {id(weight) for weight, _ in expert_weights(arch)} == {
        id(weight) for name, weight in arch.model.named_parameters() if "experts" in name and weight.ndim == 3
    }
    assert not [name for name, _ in linear_maps(arch) if "gate" in name.split(".")[-1] or "router" in name]
    for weight, input_first in expert_weights(arch):
        before = weight.clone()
        seen: list[Tensor] = []
        change_each_expert(weight, input_first, lambda matrix, seen=seen: seen.append(matrix) or matrix * 2)
        assert torch.equal(weight, 2 * before)
        # The rows of gate and up projections are outputs, those of down projections are the hidden size.
        assert all(matrix.shape in ((32, 64), (32, 32), (64, 32), (128, 32)) for matrix in seen)


@torch.no_grad()
def test_keys_after_earlier_tokens_are_those_of_the_whole_texts() -> None:
    """Where the earlier tokens run again, the keys are picked at the later ones."""
    arch = mixed("qwen3_moe")
    texts, cuts = ((5, 17, 200, 33, 8), (7, 61, 130)), (3, 1)
    earlier = EarlierTokens(torch.tensor([[5, 17, 200], [0, 0, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]]))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    later = TokenBatch(torch.tensor([[33, 8], [61, 130]]), mask, torch.tensor([[3, 4], [1, 2]]))
    found = run_blocks(arch, later, cache=earlier, inputs_of=[2]).projection_inputs[2]
    for row, (text, cut) in enumerate(zip(texts, cuts, strict=True)):
        survey.close(found[row], reference.inputs(arch, text, 2)[cut:])
