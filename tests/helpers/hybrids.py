"""Tiny random models that keep more than keys and values of earlier tokens, or whose blocks are built in another way.

One of each layer type. What only costs time is small: 4 blocks or a few more, hidden size 32, 300 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers
from families import BLOCKS, COMMON, GROUPED, HEADS, HIDDEN, UNGROUPED, WIDTH, build

GATED_DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
MAMBA1: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
#: DeepSeek's: the first block dense, experts and a shared expert in the others.
FEW_EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MIXERS = ["mamba", "attention", "mamba", "mamba"]

qwen3_5 = partial(build, "Qwen3_5TextConfig", **COMMON, **GROUPED, **GATED_DELTA)
qwen3_next = partial(build, "Qwen3NextConfig", **COMMON, **GROUPED, **GATED_DELTA, mlp_only_layers=[0, 1, 2, 3])
olmo_hybrid = partial(
    build,
    "OlmoHybridConfig",
    **COMMON,
    **UNGROUPED,
    **{**GATED_DELTA, "linear_num_value_heads": 2},
)
falcon_h1 = partial(build, "FalconH1Config", **COMMON, **GROUPED, **MAMBA2, head_dim=8, mamba_d_ssm=64)
bamba = partial(build, "BambaConfig", **COMMON, **GROUPED, **MAMBA2, attn_layer_indices=[1])
granite_hybrid = partial(
    build,
    "GraniteMoeHybridConfig",
    **COMMON,
    **GROUPED,
    **MAMBA2,
    layer_types=MIXERS,
    num_local_experts=0,
    shared_intermediate_size=WIDTH,
)
lfm2 = partial(
    build,
    "Lfm2Config",
    **COMMON,
    **GROUPED,
    block_auto_adjust_ff_dim=False,
    layer_types=["conv", "full_attention", "conv", "conv"],
)
jamba = partial(
    build,
    "JambaConfig",
    **COMMON,
    **GROUPED,
    **MAMBA1,
    use_mamba_kernels=False,  # transformers 4 asks for kernels by default
    num_experts=1,
    attn_layer_period=4,
    attn_layer_offset=1,
)
recurrent_gemma = partial(
    build,
    "RecurrentGemmaConfig",
    "eager",
    **COMMON,
    num_key_value_heads=1,
    lru_width=HIDDEN,
    head_dim=8,
    attention_window_size=64,
    block_types=["recurrent", "attention", "recurrent", "recurrent"],
)
zamba = partial(
    build,
    "ZambaConfig",
    "eager",
    **COMMON,
    **UNGROUPED,
    **MAMBA1,
    use_mamba_kernels=False,
    n_mamba_heads=2,
    attention_hidden_size=2 * HIDDEN,
    attention_head_dim=16,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
)
zamba2 = partial(
    build,
    "Zamba2Config",
    **COMMON,
    **UNGROUPED,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_ngroups=1,
    n_mamba_heads=8,
    chunk_size=8,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    num_mem_blocks=1,
)
mamba = partial(build, "MambaConfig", "eager", **COMMON, state_size=8, use_mambapy=False)
mamba2 = partial(
    build, "Mamba2Config", "eager", **COMMON, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8
)
falcon_mamba = partial(build, "FalconMambaConfig", "eager", **COMMON, state_size=8)
nemotron_h = partial(
    build,
    "NemotronHConfig",
    **{**COMMON, "num_hidden_layers": 6},
    **GROUPED,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    n_groups=1,
    ssm_state_size=8,
    conv_kernel=4,
    chunk_size=8,
    layers_block_type=["mamba", "mlp", "attention", "mlp", "mamba", "mlp"],
)
opt = partial(
    build, "OPTConfig", **COMMON, ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN, do_layer_norm_before=True, init_std=0.2
)
gemma3n = partial(
    build,
    "Gemma3nTextConfig",
    **{**COMMON, "intermediate_size": [WIDTH] * BLOCKS},
    num_key_value_heads=1,
    head_dim=8,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=300,
    num_kv_shared_layers=0,
    laurel_rank=8,
    activation_sparsity_pattern=[0.0] * BLOCKS,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    sliding_window=4,
)
dbrx = partial(
    build,
    "DbrxConfig",
    vocab_size=300,
    d_model=HIDDEN,
    n_heads=HEADS,
    n_layers=BLOCKS,
    max_seq_len=128,
    initializer_range=0.2,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    ffn_config={"ffn_hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
)


def installed(builder: Any) -> bool:
    """Whether the transformers at hand has the family."""
    return hasattr(transformers, builder.args[0])


#: Served models, by name, with a recurrence of one kind each, whatever of it a pass can go on from.
ALL: dict[str, Any] = {
    "qwen3_5": qwen3_5,
    "qwen3_next": qwen3_next,
    "olmo_hybrid": olmo_hybrid,
    "falcon_h1": falcon_h1,
    "bamba": bamba,
    "granite_hybrid": granite_hybrid,
    "lfm2": lfm2,
    "jamba": jamba,
    "recurrent_gemma": recurrent_gemma,
    "zamba": zamba,
    "mamba": mamba,
    "falcon_mamba": falcon_mamba,
    "nemotron_h": nemotron_h,
    "opt": opt,
}
HYBRIDS: dict[str, Callable[[], Any]] = {name: builder for name, builder in ALL.items() if installed(builder)}
if not installed(qwen3_5):  # transformers 4 keeps RecurrentGemma's states in its modules, so passes are not independent
    del HYBRIDS["recurrent_gemma"]
