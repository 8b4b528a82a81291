"""A tiny random model of every decoder that transformers maps, with its vision part if it has one.

It is made from the family's own default config. Every size in the config is replaced by a small one, by its name. What
decides the structure stays: kinds of layers, norms, multipliers, experts, caches. Lists with an entry for each layer
are cut so that each kind is among them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

BLOCKS = 4
#: Room for tests/helpers/tiny.py's tokenizer and for an added token.
VOCABULARY = 300
#: Sizes by the names that families have for them.
SIZES: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input padded_vocab_size"),
    (BLOCKS, "num_hidden_layers n_layer n_layers num_layers"),
    (32, "hidden_size n_embd n_embed d_model dim dim_model embedding_dim embed_dim embedding_size emb_dim"),
    (32, "input_embedding_size output_embedding_size word_embed_proj_dim lru_width hidden_dim"),
    (32, "projection_dim text_hidden_size vision_hidden_size out_hidden_size"),
    (64, "intermediate_size n_inner d_ff ffn_dim dim_ff ffn_hidden_size mlp_dim ffn_intermediate_size ffn_size"),
    (64, "dense_intermediate_size intermediate_size_mlp attention_hidden_size mamba_d_ssm"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads num_mem_heads linear_num_value_heads"),
    (2, "num_key_value_heads num_kv_heads n_head_kv num_global_key_value_heads swa_num_key_value_heads"),
    (2, "linear_num_key_heads"),
    (8, "head_dim d_kv d_head kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim global_head_dim head_size"),
    (8, "attention_head_dim swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (4, "linear_num_heads linear_conv_kernel_dim rotary_dim hc_lowrank"),
    (16, "qk_head_dim kv_lora_rank q_lora_rank o_lora_rank index_head_dim num_position_embeddings"),
    # Shorter than the sequences that are checked, so that a wrong mask shows.
    (4, "sliding_window attention_window_size window_size local_attention_window attention_chunk_size index_topk"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_top_k moe_topk moe_k top_k_experts experts_per_token"),
    (2, "num_selected_experts n_activated_experts"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_intermediate_size"),
    (32, "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size"),
    (32, "moe_ffn_hidden_size moe_shared_intermediate_size expert_hidden_size"),
    (1, "n_group topk_group num_expert_group n_groups n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "num_nextn_predict_layers first_k_dense_replace first_k_dense num_dense_layers"),
    (1, "moe_layer_start_index decoder_sparse_step hash_layers num_hash_layers num_mem_blocks num_memory_blocks"),
    (8, "mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size mamba_num_heads mamba_head_dim mamba_headdim"),
    (8, "ssm_state_size state_size mamba_dt_rank time_step_rank chunk_size hidden_size_per_layer_input laurel_rank"),
    (1, "mamba_n_groups mamba_ngroups n_mamba_heads"),
    (128, "max_position_embeddings n_positions max_seq_len n_ctx seq_length max_sequence_length"),
    # With few heads many scores of an indexer are 0, and which of them it takes depends on the padding.
    (16, "index_n_heads"),
    (128, "original_max_position_embeddings"),
    (2, "mamba_expand num_codebooks depth max_window_layers"),
    (4, "adapter_rank use_mem_rank altup_num_inputs"),
    (28, "image_size"),
    (14, "patch_size"),
    (0, "num_kv_shared_layers pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    # Ten times the usual spread: otherwise attention is nearly uniform, and a wrong mask or position goes unseen.
    (0.2, "initializer_range initializer_std"),
    (False, "use_mamba_kernels use_triton_kernels"),
    (290, "image_token_id image_token_index"),
    (291, "video_token_id"),
    (292, "audio_token_id"),
    (293, "vision_start_token_id boi_token_id boi_token_index"),
    (294, "vision_end_token_id eoi_token_id eoi_token_index"),
    (295, "video_start_token_id boa_token_id"),
    (296, "video_end_token_id eoa_token_id"),
)
SMALL: Mapping[str, Any] = {name: size for size, names in SIZES for name in names.split()}
#: Entries of a list that has one for each layer.
EACH_LAYER: Mapping[str, Any] = {
    "intermediate_size": 64,
    "num_attention_heads_per_layer": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: These get their small size even where the default is None.
ALWAYS = ("head_dim", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")
NO_SETTINGS = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TURNED = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}}
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
}
INDEXED = {
    "indexer_n_heads": 1,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
#: What a family needs beyond the rules.
OWN: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": COMPASS,
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "dots3_note_text": {"swa_head_dim": 16},
    "qwen4_exp_text": INDEXED,
    "qwen4_exp": {"text_config": INDEXED},
    "zaya": {"num_experts_per_tok": 1},
    # Positions in three parts, which together are half of a head's size, or of the part of it that is turned.
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm_ocr", "glm46v", "glm4v", "glmga"), TURNED),
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}
    },
    "glm5_next": {"text_config": {"index_topk": 16}},
    "mistral4": {"text_config": {"num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8}},
    "qwen2_5_omni_thinker": {"audio_config": {"encoder_attention_heads": 4}, **TURNED},
    "qwen3_omni_moe_thinker": {"audio_config": {"encoder_attention_heads": 4}, **TURNED},
    "cohere_compass": {"text_config": COMPASS},
}
#: Settings of published checkpoints that decide the structure and that the default config does not have, by name.
RELEASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "granite-3": (
        "granite",
        {
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
            "logits_scaling": 8.0,
        },
    ),
    "hyperclovax-think": ("hyperclovax", {"use_post_norm": True, "residual_multiplier": 0.22}),
    "cohere-parallel": ("cohere", {"use_qk_norm": True}),
    "gpt-neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon-old": ("falcon", {"new_decoder_architecture": False, "parallel_attn": False, "alibi": True}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "layer_types": None}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
}
#: Encoders that a switch of their config makes decoders. No published checkpoint of a decoder has it set.
ENCODERS = frozenset(
    (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr"),
        *("xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
    )
)
#: Not built, with the reason.
NOT_BUILT: Mapping[str, str] = {
    "blt": "reads bytes, in patches that a model of their own makes",
    "zamba2": "its default config names shared blocks by layer numbers that a small model lacks",
    "dbrx": "its default config lacks rope_theta, which the model reads",
    "gemma4_assistant": "drafts tokens for Gemma 4 and cannot run alone",
    "gemma4_unified_assistant": "drafts tokens for Gemma 4 and cannot run alone",
    "hunyuan_vl": "its default config lacks mrope_section, which the model reads",
    "shieldgemma2": "classifies images",
    "step3p7": "its default config lacks sliding_window, which the model reads",
    "gemma3n": "its vision part needs timm; the text model is gemma3n_text",
}


def decoders() -> list[str]:
    """The config types that AutoModelForCausalLM knows, without encoders and encoder-decoders."""
    kinds = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - ENCODERS)
    return [kind for kind in kinds if kind in NOT_BUILT or not CONFIG_MAPPING[kind]().is_encoder_decoder]


def wrappers() -> list[str]:
    """The config types of image-text models that AutoModelForCausalLM does not know, without encoder-decoders."""
    kinds = sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})
    return [kind for kind in kinds if kind in NOT_BUILT or not CONFIG_MAPPING[kind]().is_encoder_decoder]


def tiny_config(kind: str, **settings: Any) -> Any:
    """The family's default config with small sizes."""
    of = CONFIG_MAPPING[kind]
    small = _shrunk(of().to_dict(), BLOCKS)
    for name, value in {**OWN.get(kind, {}), **settings}.items():
        small[name] = {**small[name], **value} if isinstance(value, dict) and name.endswith("config") else value
    return of(**small)


def tiny_decoder(kind: str) -> Any:
    """A seeded float32 model in evaluation mode, biases and norms random as well. kind: a config type, or a release."""
    kind, settings = RELEASES.get(kind, (kind, {}))
    torch.manual_seed(0)
    config = tiny_config(kind, **settings)
    image = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    auto = transformers.AutoModelForImageTextToText if image else transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zeros as initialised would hide what is left out, and hold back what follows them.
            if parameter.is_floating_point() and (parameter.ndim == 1 or not parameter.any()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _shrunk(config: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    depth = next((config[name] for name in DEPTHS if isinstance(config.get(name), int)), 0)
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in NO_SETTINGS:
            continue
        if name == "per_layer_config":
            out[name] = {at: _shrunk(each, blocks) for at, each in value.items() if int(at) < blocks}
        elif isinstance(value, dict) and "config" in name:
            out[name] = _shrunk(value, 2 if "vision" in name or "audio" in name else blocks)
        elif isinstance(value, dict) and "mrope_section" in value:
            out[name] = {**value, "mrope_section": [2, 1, 1]}  # half of a head's size, in three parts
        elif isinstance(value, (list, tuple)) and depth > 2 and len(value) == depth:
            out[name] = _cut(name, list(value), blocks)
        elif name in SMALL and not isinstance(value, (list, tuple, dict)):
            small = SMALL[name]
            if value is None and name not in ALWAYS:
                continue
            out[name] = value if isinstance(value, bool) != isinstance(small, bool) else small
        else:
            out[name] = value
    out |= {name: blocks for name in DEPTHS if name in out}
    if "kv_lora_rank" in out and "num_key_value_heads" in out:
        out["num_key_value_heads"] = 4  # latent attention has a key for every head
    return out


def _cut(name: str, values: list[Any], blocks: int) -> list[Any]:
    """A list with an entry for each layer, cut so that every kind of layer is there."""
    if not isinstance(values[0], str):
        return [EACH_LAYER[name]] * blocks if name in EACH_LAYER else values[:blocks]
    kinds = list(dict.fromkeys(values))
    # Dense layers come first, and once.
    ordered = kinds[:1] + kinds[1:] * blocks if name == "mlp_layer_types" and len(kinds) > 1 else kinds * blocks
    return ordered[:blocks]
