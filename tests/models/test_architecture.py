"""Every family's parts are found where its own source puts them, and what cannot be edited is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hybrids
import pytest
import torch
import transformers
from families import BLOCKS, FAMILIES, GROUPED, HIDDEN, VOCABULARY, WIDTH, build, small_llama
from torch import nn

from unierase_plugin.errors import ArchitectureError
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.methods.editing.layers import settle_layers
from unierase_plugin.methods.removal.job import settle_removal
from unierase_plugin.methods.removal.method import RemovalHyperParams
from unierase_plugin.models.architecture import find_architecture, stores_input_first
from unierase_plugin.models.served import check_served

LLAMA_STYLE = "model.layers.{}.mlp.down_proj"
#: Written by hand from each family's source: the projection's path, and whether the released model ties its embeddings.
EXPECTED = {
    "smollm2-135m": (LLAMA_STYLE, True),
    "llama2-7b": (LLAMA_STYLE, False),
    "llama3-8b": (LLAMA_STYLE, False),
    "llama3.1-8b": (LLAMA_STYLE, False),
    "llama3.2-1b": (LLAMA_STYLE, True),
    "llama3.2-3b": (LLAMA_STYLE, True),
    "qwen2.5-7b": (LLAMA_STYLE, False),
    "qwen2.5-1.5b": (LLAMA_STYLE, True),
    "qwen3-8b": (LLAMA_STYLE, False),
    "mistral-7b": (LLAMA_STYLE, False),
    "gemma2-9b": (LLAMA_STYLE, True),
    "gemma3-1b": (LLAMA_STYLE, True),
    "phi3-mini": (LLAMA_STYLE, False),
    "olmo2-7b": (LLAMA_STYLE, False),
    "gpt2-xl": ("transformer.h.{}.mlp.c_proj", True),
    "gpt-j-6b": ("transformer.h.{}.mlp.fc_out", False),
    "pythia-6.9b": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", False),
}
NEWER = pytest.mark.skipif(not hybrids.installed(hybrids.nemotron_h), reason="needs transformers 5")
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --- what is found ---------------------------------------------------------------------------------------------------


def test_every_family_is_expected() -> None:
    assert set(EXPECTED) == set(FAMILIES)


def test_blocks_and_projections_are_found_where_the_family_has_them(family: str) -> None:
    model = FAMILIES[family]()
    template, tied = EXPECTED[family]
    arch = find_architecture(model)
    names = tuple(template.format(layer) for layer in range(BLOCKS))
    assert arch.projection_names == names
    assert all(a is model.get_submodule(name) for a, name in zip(arch.projections, names, strict=True))
    assert all(a is model.get_submodule(n.rsplit(".", 2)[0]) for a, n in zip(arch.blocks, names, strict=True))
    assert arch.weight_name(2) == names[2] + ".weight"
    assert arch.embedding is model.get_input_embeddings()
    assert arch.head is model.get_output_embeddings()
    assert arch.tied is tied


def test_sizes_come_from_the_weights(family: str) -> None:
    arch = find_architecture(FAMILIES[family]())
    assert (arch.hidden_size, arch.vocabulary, arch.device) == (HIDDEN, VOCABULARY, torch.device("cpu"))
    assert [arch.mlp_width(layer) for layer in range(BLOCKS)] == [WIDTH] * BLOCKS


def test_only_conv1d_stores_its_input_axis_first(family: str) -> None:
    projection = find_architecture(FAMILIES[family]()).projections[0]
    conv1d = isinstance(projection, transformers.pytorch_utils.Conv1D)
    assert conv1d is (family == "gpt2-xl")
    assert stores_input_first(projection) is conv1d
    assert tuple(projection.weight.shape) == ((WIDTH, HIDDEN) if conv1d else (HIDDEN, WIDTH))


def test_explicit_templates_give_the_same(family: str) -> None:
    model = FAMILIES[family]()
    template, _ = EXPECTED[family]
    found = find_architecture(model)
    told = find_architecture(model, rewrite_module_tmp=template, layer_module_tmp=template.rsplit(".", 2)[0])
    assert found == told


def test_looking_leaves_the_model_as_it_was(family: str) -> None:
    model = FAMILIES[family]().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    find_architecture(model)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_name_says_nothing() -> None:
    class Unheard(type(small_llama())):  # type: ignore[misc]
        """A family that no list of names would hold."""

    model = small_llama()
    model.__class__ = Unheard
    model.config.model_type = "unheard"
    assert find_architecture(model).projection_names[0] == LLAMA_STYLE.format(0)


def test_an_attention_output_is_never_taken_for_an_mlp() -> None:
    """With half as many key-value heads, Phi-3's fused projection is twice as wide as the attention's output."""
    model = build("Phi3Config", **TINY, **GROUPED, bos_token_id=1, eos_token_id=2)
    assert model.get_submodule("model.layers.0.self_attn.qkv_proj").weight.shape[0] == 2 * 32
    assert find_architecture(model).projection_names[0] == LLAMA_STYLE.format(0)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_encoder_is_refused() -> None:
    model = transformers.BertLMHeadModel(transformers.BertConfig(**TINY))
    with pytest.raises(ArchitectureError, match="BertLMHeadModel looks at later tokens: it is an encoder"):
        find_architecture(model)


def test_a_sequence_to_sequence_model_is_refused() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(ArchitectureError, match="sequence-to-sequence"):
        find_architecture(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("quantisation", [{"quant_method": "gptq"}, SimpleNamespace(quant_method="gptq")])
def test_quantised_weights_are_refused_with_the_remedy(quantisation: Any) -> None:
    model = small_llama()
    model.config.quantization_config = quantisation
    with pytest.raises(ArchitectureError, match=r"quantised weights \(gptq\).*quantise the result"):
        find_architecture(model)
    del model.config.quantization_config


def test_eight_bit_weights_are_refused_without_a_word_in_the_config() -> None:
    class EightBit(nn.Linear):
        """Keeps its weight in one byte and computes in float, as quantisers do."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.float().T

    model = small_llama()
    quantised = EightBit(WIDTH, HIDDEN)
    quantised.weight = nn.Parameter(torch.ones(HIDDEN, WIDTH).char(), requires_grad=False)
    model.model.layers[1].mlp.down_proj = quantised
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is torch\.int8"):
        find_architecture(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"no language-model head.*AutoModelForCausalLM"):
        find_architecture(small_llama().model)


def test_what_is_no_hugging_face_model_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="Linear is not a Hugging Face model"):
        find_architecture(nn.Linear(2, 2))


def test_layers_out_of_range_are_named() -> None:
    arch = find_architecture(small_llama())
    assert arch.check_layers([0, 3]) == (0, 3)
    with pytest.raises(ArchitectureError, match=r"4 blocks, numbered 0 to 3; there is no block 4, 9"):
        arch.check_layers([3, 4, 9])


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"}, r"there is no 'transformer\.h\.0\.mlp\.c_proj'"),
        ({"layer_module_tmp": "model.blocks.{}"}, r"there is no 'model\.blocks\.0'"),
        ({"rewrite_module_tmp": "model.layers.0.mlp.down_proj"}, "no place for the block's number"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp.up_proj"}, "vectors of size 64, not the hidden size 32"),
        ({"rewrite_module_tmp": "model.layers.{}.input_layernorm"}, "plain matrix"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp"}, "plain matrix"),
    ],
)
def test_wrong_templates_are_refused(templates: dict[str, str], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        find_architecture(small_llama(), **templates)


# --- blocks unlike one another ---------------------------------------------------------------------------------------


@NEWER
def test_projections_are_found_among_the_blocks_that_have_an_mlp() -> None:
    arch = find_architecture(hybrids.nemotron_h())
    assert arch.editable == (1, 3, 5)
    assert arch.projection_names == ("", *(f"model.layers.{n}.mixer.down_proj" if n % 2 else "" for n in range(1, 6)))
    assert arch.check_layers([1, 3]) == (1, 3)
    with pytest.raises(ArchitectureError, match=r"block 0, 2 of this model has no MLP.*Choose from 1, 3, 5"):
        arch.check_layers([0, 1, 2])


@NEWER
def test_layers_are_chosen_among_the_blocks_that_have_an_mlp() -> None:
    model = hybrids.nemotron_h()
    assert settle_layers(model, UniEraseHyperParams()).layers == (1, 3)
    settled = settle_removal(find_architecture(model), RemovalHyperParams())
    assert set(settled.removal_layers) | set(settled.removal_teacher_layers) == {1, 3, 5}


@NEWER
def test_a_template_may_name_a_module_of_some_blocks_alone() -> None:
    """The first block of DeepSeek and GLM has one MLP, the others have experts and one that is shared by all tokens."""
    model = build("DeepseekV3Config", **{**TINY, "num_hidden_layers": 3}, **hybrids.FEW_EXPERTS)
    assert find_architecture(model).editable == (0, 1, 2)
    templates = {"mlp.down_proj": (0,), "mlp.shared_experts.down_proj": (1, 2), "mlp.experts": (1, 2)}
    for template, blocks in templates.items():
        arch = find_architecture(model, f"model.layers.{{}}.{template}")
        assert arch.editable == blocks
        check_served(arch)


def test_a_projection_that_several_blocks_share_is_passed_over() -> None:
    model = hybrids.zamba2()
    with pytest.raises(ArchitectureError, match="serve several blocks do not count"):
        find_architecture(model)
    with pytest.raises(ArchitectureError, match="one weight that serves several blocks"):
        find_architecture(model, "model.layers.{}.shared_transformer.feed_forward.down_proj")
    # The mixers are the blocks' own, and no part of them is taken for experts.
    assert find_architecture(hybrids.zamba()).editable == (0, 1, 2, 3)


def test_blocks_of_another_width_than_the_embedding_are_refused_with_both() -> None:
    """OPT-350m projects its embedding to the width of its blocks."""
    model = build("OPTConfig", **TINY, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False)
    with pytest.raises(ArchitectureError, match="embedding gives vectors of size 16, which no linear map of block"):
        find_architecture(model)


def test_experts_side_by_side_in_one_matrix_are_experts() -> None:
    with pytest.raises(ArchitectureError, match=r"several MLPs in 'ffn\.experts\.mlp'"):
        find_architecture(hybrids.dbrx())


def test_heads_of_a_recurrent_block_are_no_experts() -> None:
    names = find_architecture(hybrids.recurrent_gemma()).projection_names
    assert names == tuple(f"model.layers.{layer}.mlp_block.down_proj" for layer in range(BLOCKS))


def test_a_second_narrow_mlp_is_not_taken_for_the_mlp() -> None:
    names = find_architecture(hybrids.gemma3n()).projection_names
    assert names == tuple(LLAMA_STYLE.format(layer) for layer in range(BLOCKS))
