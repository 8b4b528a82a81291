"""What an edit's passes rely on is tried before work: a model that lacks it is refused with that as the reason."""

from __future__ import annotations

from typing import Any

import hybrids
import pytest
import torch
from families import FAMILIES
from small import FORGET, HPARAMS
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from unierase_plugin import unlearn
from unierase_plugin.errors import ArchitectureError
from unierase_plugin.hosts.in_place import edit_in_place
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.models.served import check_served
from unierase_plugin.models.trace import pad, run_blocks

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Settings beyond the sizes, and the reason.
UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "rwkv": ({"attention_hidden_size": 32}, "does not run as an edit's passes run it"),
    "mamba2": ({"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "Set rewrite_module_tmp"),
}


def unserved(family: str) -> Any:
    config = AutoConfig.for_model(family, **{**SIZES, **UNSERVED[family][0]})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("method", ["unierase", "memit", "removal"])
@pytest.mark.parametrize("family", UNSERVED)
def test_an_unserved_model_is_refused_before_work(family: str, method: str) -> None:
    model, seen = unserved(family), []
    with pytest.raises(ArchitectureError, match=UNSERVED[family][1]) as caught:
        unlearn(
            model,
            FORGET,
            method=method,
            tokenizer=tiny_tokenizer(),
            progress=lambda phase, share, note: seen.append(phase),
        )
    assert "mixture-of-experts" not in str(caught.value)
    assert set(seen) <= {"load"}


def test_a_harness_hears_the_same() -> None:
    with pytest.raises(ArchitectureError, match=UNSERVED["rwkv"][1]):
        edit_in_place(unserved("rwkv"), tiny_tokenizer(), (), HPARAMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_served_family_passes(family: str) -> None:
    model = FAMILIES[family]().train()
    check_served(find_architecture(model))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_count(dtype: torch.dtype) -> None:
    check_served(find_architecture(tiny_model(dtype=dtype)))


def test_a_pass_that_comes_out_otherwise_is_refused() -> None:
    model = tiny_model()
    arch = find_architecture(model)
    block = model.model.layers[1]
    forward, calls = block.forward, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs) * len(calls)

    block.forward = counting
    with pytest.raises(ArchitectureError, match="gives other logits when a pass"):
        check_served(arch)


def test_several_streams_in_one_state_are_refused_with_the_shape() -> None:
    """A block of Gemma 3n gives four streams for each token."""
    model = hybrids.gemma3n()
    with pytest.raises(ArchitectureError, match=r"input of block 0 is \[4, 2, 3, 32\] for 2 texts of 3 tokens"):
        check_served(find_architecture(model))
    with pytest.raises(ArchitectureError, match=r"gives \[4, 2, 3, 32\] for 2 texts of 3 tokens"):
        run_blocks(find_architecture(model), pad([[1, 2, 3], [3, 1, 2]], 0, "right", torch.device("cpu")), last=1)


def test_a_model_that_does_not_run_is_refused_with_its_reason() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(7, 32)
    with pytest.raises(ArchitectureError, match="does not run on two tokens: RuntimeError: mat1 and mat2"):
        find_architecture(model)


@torch.no_grad()
def test_blocks_may_give_a_list() -> None:
    config = AutoConfig.for_model("openai-gpt", vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    arch = find_architecture(AutoModelForCausalLM.from_config(config).eval())
    check_served(arch, [1, 2])


def test_flattened_inputs_must_keep_the_order_of_tokens() -> None:
    """OPT flattens texts and tokens before its MLP. If they were turned round there, a key would be another token's."""
    model = hybrids.opt()
    check_served(find_architecture(model))
    for layer in model.model.decoder.layers:
        for module in (layer.fc1, layer.fc2):
            module.register_forward_hook(lambda module, args, output: output.flip(0))
    with pytest.raises(ArchitectureError, match="does not hold one text's tokens after another"):
        check_served(find_architecture(model))
