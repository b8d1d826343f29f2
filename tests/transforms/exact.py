"""Exact arithmetic for models that cast to float32 on their way, and the models the algebra is tested on."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_lowbit.plugin.experts import is_experts
from hf_lowbit.transforms.graph import Graph, find_graph

IDS = (torch.arange(14).view(2, 7) * 7) % 240 + 3
SMALL = {"vocab_size": 256, "max_position_embeddings": 64}
LLAMA = SMALL | {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "head_dim": 12, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
MHA = {"num_key_value_heads": 4}
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
OLD = {"vocab_size": 256, "hidden_size": 48, "tie_word_embeddings": False}

# name -> (config class, settings)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", LLAMA),
    "llama-mha-biased": ("LlamaConfig", LLAMA | MHA | BIASED),
    "llama-tied-biased": ("LlamaConfig", LLAMA | BIASED | TIED),
    "llama-one-kv-head": ("LlamaConfig", LLAMA | {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3-tied": ("Qwen3Config", LLAMA | TIED),
    "gemma2": ("Gemma2Config", LLAMA | {"query_pre_attn_scalar": 12}),
    "gemma3-tied": ("Gemma3TextConfig", LLAMA | TIED | {"query_pre_attn_scalar": 12}),
    "phi": ("PhiConfig", LLAMA | MHA),
    "phi3": ("Phi3Config", LLAMA | {"pad_token_id": 0}),
    "opt": ("OPTConfig", OLD | {"max_position_embeddings": 64, "ffn_dim": 64, "num_hidden_layers": 2,
                                "num_attention_heads": 4, "word_embed_proj_dim": 48}),
    "opt-post-norm": ("OPTConfig", OLD | {"max_position_embeddings": 64, "ffn_dim": 64, "num_hidden_layers": 2,
                                          "do_layer_norm_before": False, "num_attention_heads": 4,
                                          "word_embed_proj_dim": 48}),
    "gpt2": ("GPT2Config", {"vocab_size": 256, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4,
                            "tie_word_embeddings": False}),
    "gpt2-tied": ("GPT2Config", {"vocab_size": 256, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4}),
    "bloom": ("BloomConfig", OLD | {"n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeConfig", LLAMA | MOE | {"shared_expert_intermediate_size": 32}),
    "gpt-oss": ("GptOssConfig", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
                                         "layer_types": ["full_attention", "full_attention"],
                                         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "bert": ("BertConfig", {"vocab_size": 256, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                            "intermediate_size": 64, "max_position_embeddings": 64}),
}  # fmt: skip


def make_model(name: str) -> Any:
    """A random float64 model; norms, biases and matrices alike are far from their initial values."""
    config_class, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    factory = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model = factory.from_config(config).eval().double()
    model.config._experts_implementation = "eager"  # the grouped product knows no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.7 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class Float64(TorchFunctionMode):
    """Lets no operation cast a float64 tensor to float32, as norms and softmaxes do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        if getattr(func, "__name__", "") == "view":  # of a type: stored bits read as numbers, which is no cast
            return func(*args, **(kwargs or {}))
        kwargs = {key: wide(value) for key, value in (kwargs or {}).items()}
        if getattr(func, "__name__", "") == "float":
            return args[0].double()
        return func(*map(wide, args), **kwargs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What the model says of :data:`IDS`, in exact arithmetic."""
    with Float64():
        return model(input_ids=IDS, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))[0]


def graph_of(model: nn.Module) -> Graph:
    """The graph of a test model."""
    return find_graph(model, lambda: model(input_ids=IDS[:1, :5]), is_experts)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found - expected).norm() / expected.norm())
