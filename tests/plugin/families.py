"""Tiny random models of every family the plugin promises to serve, built from configs alone."""

from __future__ import annotations

import torch
import transformers

SMALL = {"vocab_size": 256, "max_position_embeddings": 128}
LLAMA_LIKE = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}

# name -> (config class, its settings)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "llama-tied-172": ("LlamaConfig", LLAMA_LIKE | {"tie_word_embeddings": True, "intermediate_size": 172}),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen3-tied": ("Qwen3Config", LLAMA_LIKE | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", LLAMA_LIKE),
    "gemma2": ("Gemma2Config", LLAMA_LIKE | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", LLAMA_LIKE | {"query_pre_attn_scalar": 16}),
    "phi": ("PhiConfig", LLAMA_LIKE | {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", LLAMA_LIKE | {"num_key_value_heads": 4}),
    "opt": ("OPTConfig", SMALL | {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                                  "word_embed_proj_dim": 64, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"vocab_size": 256, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4,
                            "bos_token_id": 1, "eos_token_id": 2}),
    "bloom": ("BloomConfig", {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeConfig", LLAMA_LIKE | MOE | {"shared_expert_intermediate_size": 64}),
    "qwen3-moe-tied": ("Qwen3MoeConfig", LLAMA_LIKE | MOE | {"tie_word_embeddings": True}),
    "gpt-oss": ("GptOssConfig", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2,
                                              "layer_types": ["full_attention", "full_attention"]}),
}  # fmt: skip


def make_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random float32 model of a family, with weights of trained-like size."""
    config_class, settings = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
    return model
