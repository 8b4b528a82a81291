"""A tiny random model of every family that a shipped hyper-parameter file is for, by the file's stem.

What decides whether an edit fits is as in the real model: config class, tied or untied embeddings, grouped attention,
soft caps, sliding windows. What only costs time is small: 4 blocks, hidden size 32, MLP width 64, 300 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from decoders import tiny_decoder

# On matrices this small several threads take up to twenty times as long as one.
torch.set_num_threads(1)

VOCABULARY, BLOCKS, HIDDEN, WIDTH, HEADS = 300, 4, 32, 64, 4
#: Sliding windows are shorter than the sequences of the tests, so that a wrong mask shows.
WINDOW = 4
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": BLOCKS,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Ten times the usual spread: otherwise attention is nearly uniform and a wrong mask or position goes unseen.
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
UNGROUPED: dict[str, Any] = {"num_key_value_heads": HEADS}
OPENAI_STYLE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_layer": BLOCKS,
    "n_embd": HIDDEN,
    "n_inner": WIDTH,
    "n_head": HEADS,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def build(config_class: str, attention: str = "sdpa", **settings: Any) -> Any:
    """A seeded model in evaluation mode of the config class named, biases and norms random as well."""
    import transformers

    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # zeros and ones as initialised, which would hide a bias that is left out
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def llama2() -> Any:
    return build("LlamaConfig", **COMMON, **UNGROUPED, tie_word_embeddings=False)


def llama3() -> Any:
    return build("LlamaConfig", **COMMON, **GROUPED, tie_word_embeddings=False)


def small_llama() -> Any:
    """SmolLM2 and the small Llama 3.2: an output matrix of their own would be a large part of them."""
    return build("LlamaConfig", **COMMON, **GROUPED, tie_word_embeddings=True)


def qwen2() -> Any:
    return build("Qwen2Config", **COMMON, **GROUPED, tie_word_embeddings=False)


def small_qwen2() -> Any:
    return build("Qwen2Config", **COMMON, **GROUPED, tie_word_embeddings=True)


def qwen3() -> Any:
    return build("Qwen3Config", **COMMON, **GROUPED, head_dim=16, tie_word_embeddings=False)


def mistral() -> Any:
    return build("MistralConfig", **COMMON, **GROUPED, head_dim=8, sliding_window=None, tie_word_embeddings=False)


def gemma2() -> Any:
    # Only eager attention applies the attention's soft cap; the logits' cap is low enough for random logits to feel it.
    return build(
        "Gemma2Config",
        "eager",
        **COMMON,
        **GROUPED,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=2.0,
        tie_word_embeddings=True,
    )


def gemma3(window: int = 0) -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return build(
        "Gemma3TextConfig",
        **COMMON,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=window or WINDOW,
        layer_types=kinds,
        tie_word_embeddings=True,
    )


def phi3() -> Any:
    return build("Phi3Config", **COMMON, **UNGROUPED, sliding_window=WINDOW, tie_word_embeddings=False)


def olmo2() -> Any:
    return build("Olmo2Config", **COMMON, **UNGROUPED, tie_word_embeddings=False)


def gpt2() -> Any:
    return build("GPT2Config", **OPENAI_STYLE, tie_word_embeddings=True)


def gptj() -> Any:
    return build("GPTJConfig", "eager", **OPENAI_STYLE, rotary_dim=4, tie_word_embeddings=False)


def gpt_neox() -> Any:
    return build("GPTNeoXConfig", **COMMON, tie_word_embeddings=False)


def olmo3() -> Any:
    return build("Olmo3Config", **COMMON, **UNGROUPED, sliding_window=WINDOW, tie_word_embeddings=False)


def exaone4() -> Any:
    return build("Exaone4Config", **COMMON, **GROUPED, sliding_window=WINDOW, tie_word_embeddings=False)


def glm4() -> Any:
    return build("Glm4Config", **COMMON, **GROUPED, head_dim=8, tie_word_embeddings=False)


def granite() -> Any:
    # The multipliers of Granite 3.3 8B.
    return build(
        "GraniteConfig",
        **COMMON,
        **GROUPED,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    )


def minicpm3() -> Any:
    sizes: dict[str, Any] = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    return build("MiniCPM3Config", **COMMON, **UNGROUPED, **sizes, tie_word_embeddings=True)


def hyperclovax() -> Any:
    return build(
        "HyperCLOVAXConfig",
        **COMMON,
        **GROUPED,
        residual_multiplier=0.7,
        use_post_norm=True,
        tie_word_embeddings=False,
    )


#: Stem of the hyper-parameter file -> builder.
FAMILIES: dict[str, Callable[[], Any]] = {
    "smollm2-135m": small_llama,
    "llama2-7b": llama2,
    "llama3-8b": llama3,
    "llama3.1-8b": llama3,
    "llama3.2-1b": small_llama,
    "llama3.2-3b": small_llama,
    "qwen2.5-7b": qwen2,
    "qwen2.5-1.5b": small_qwen2,
    "qwen3-8b": qwen3,
    "mistral-7b": mistral,
    "gemma2-9b": gemma2,
    "gemma3-1b": gemma3,
    "phi3-mini": phi3,
    "olmo2-7b": olmo2,
    "gpt2-xl": gpt2,
    "gpt-j-6b": gptj,
    "pythia-6.9b": gpt_neox,
}

#: Stem of a further hyper-parameter file -> what `decoders.tiny_decoder` builds for it.
FURTHER: dict[str, str] = {
    "granite3.3-8b": "granite-3",
    "olmo3-7b": "olmo3",
    "exaone4-1.2b": "exaone4",
    "glm4-9b": "glm4",
    "smollm3-3b": "smollm3",
    "mistral-small3.2-24b": "mistral3",
    "gemma3-4b": "gemma3",
    "gemma3-12b": "gemma3",
    "qwen3-4b": "qwen3",
    "qwen3-30b-a3b": "qwen3_moe",
    "gpt-oss-20b": "gpt_oss",
    "mixtral-8x7b": "mixtral",
    "olmoe-7b": "olmoe",
    "qwen3-next-80b": "qwen3_next",
    "falcon-h1-1.5b": "falcon_h1",
    "lfm2-1.2b": "lfm2",
}


def tiny(stem: str) -> Any:
    """A tiny model of the family that a shipped hyper-parameter file is for."""
    return FAMILIES[stem]() if stem in FAMILIES else tiny_decoder(FURTHER[stem])


#: One stem of each distinct structure, for tests that are slow.
DISTINCT = [stem for at, stem in enumerate(FAMILIES) if FAMILIES[stem] not in list(FAMILIES.values())[:at]]

#: Models whose blocks put a norm, a multiplier or both after the MLP's output projection, by family.
CHANGING: dict[str, Callable[[], Any]] = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "exaone4": exaone4,
    "glm4": glm4,
    "granite": granite,
    "minicpm3": minicpm3,
    "hyperclovax": hyperclovax,
}
