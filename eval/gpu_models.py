"""Whole models on this GPU: memory while a checkpoint is loaded, tokens per second, attention over the packed cache.

Part of ``eval/gpu.py``. A checkpoint of full depth has the weights of one layer in all of them, each stored for itself, so
that making it takes a minute; random weights decode as fast as trained ones.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_peers import PEERS, why_not
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowbit import LowBitConfig, quantize
from hf_lowbit.format.serialize import read_record
from hf_lowbit.kv import kernel
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.settings import CacheSettings
from hf_lowbit.measure.speed import decode_rate

LOW = {"method": "rtn", "bits": 4, "group_size": 64, "scale_bits": 16}
MODELS = {
    "1 B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8 B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
FILE = "model.safetensors"
LAYER = re.compile(r"(model\.layers\.)0\.")
# Tokens in the cache, and heads of keys, heads of queries and their width, of an 8 B Llama.
CONTEXTS, HEADS = (4096, 16384, 65536), (8, 32, 128)
CACHES = {"high 8 / low 4": {"low_bits": 4}, "high 8 / low 3 (default)": {}, "high 8 / low 2": {"low_bits": 2}}


def config_of(name: str, layers: int) -> LlamaConfig:
    """A Llama of a size with at most so many layers."""
    sizes = COMMON | MODELS[name]
    return LlamaConfig(**sizes | {"num_hidden_layers": min(layers, sizes["num_hidden_layers"])}, tie_word_embeddings=False)


def matrices(config: LlamaConfig) -> list[tuple[int, int]]:
    """Shapes of all matrices a token passes."""
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.head_dim * config.num_key_value_heads
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), *[(inner, hidden)] * 2, (hidden, inner)]
    return layer * config.num_hidden_layers + [(config.vocab_size, hidden)]


def low_bit_checkpoint(folder: Path, config: LlamaConfig) -> Path:
    """A checkpoint of ``config`` in which every layer has the 4-bit weights of the first."""
    with torch.device("cpu"):
        model = LlamaForCausalLM(LlamaConfig(**config.to_dict() | {"num_hidden_layers": 1})).to(torch.bfloat16)
    quantize(model, LowBitConfig(**LOW)).save_pretrained(folder)
    file, depth = folder / FILE, config.num_hidden_layers
    record = read_record([file], verify=False)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - a file handle, not a dict
    record = replace(
        record,
        layouts=deepened(record.layouts, depth),
        checksums=deepened(record.checksums, depth),
        kept=deepened(record.kept, depth),
    )
    metadata = record.to_metadata() | {"format": "pt"}
    save_file({name: tensor.clone() for name, tensor in deepened(tensors, depth).items()}, file, metadata=metadata)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": depth}))
    return folder


def deepened(values: dict[str, Any], depth: int) -> dict[str, Any]:
    """What goes by names of parameters, with that of layer 0 for each of ``depth`` layers."""
    out = {}
    for name, value in values.items():
        for number in range(depth if LAYER.search(name) else 1):
            out[LAYER.sub(rf"\g<1>{number}.", name)] = value
    return out


def load(folder: Path, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model on the device, and how many bytes were allocated there while it was loaded, as a share of the file's."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=torch.bfloat16).eval()
    torch.cuda.synchronize()
    peak, packed = torch.cuda.max_memory_allocated() - before, (folder / FILE).stat().st_size
    return model, {"packed_bytes": packed, "load_peak_bytes": peak, "load_peak_share": peak / packed}


def rate(model: Any) -> float:
    """Tokens per second of ``generate`` with a static cache, which the host compiles into CUDA graphs."""
    model.generation_config.cache_implementation = "static"
    decode_rate(model, 1)  # compiles
    return decode_rate(model, 1)


def swapped(model: nn.Module, make: Callable[[nn.Linear, int], nn.Module]) -> nn.Module:
    """The model with every linear layer inside its blocks made anew."""
    for block in model.model.layers:
        for owner in list(block.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, make(child, 1))
    return model


def dense_model(config: LlamaConfig, device: torch.device) -> Any:
    """A random bfloat16 model on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def decode_rows(device: torch.device, layers: int) -> list[dict[str, Any]]:
    """Memory and tokens per second of whole models, ours beside bfloat16 and bitsandbytes."""
    rows = []
    for name in MODELS:
        config = config_of(name, layers)
        row: dict[str, Any] = {"model": name, "layers": config.num_hidden_layers}
        with tempfile.TemporaryDirectory() as folder:
            model, memory = load(low_bit_checkpoint(Path(folder), config), device)
            row |= memory | {"tokens_per_s": rate(model)}
            del model
        for peer, make in {"bf16": None, "bitsandbytes NF4": PEERS["bitsandbytes NF4"]}.items():
            try:
                model = dense_model(config, device)
                row[f"times {peer}"] = row["tokens_per_s"] / rate(model if make is None else swapped(model, make))
            except Exception as reason:  # not installed, or out of memory
                row[f"times {peer}"] = why_not(reason)
            finally:
                model = None
                torch.cuda.empty_cache()
        rows.append(row)
    return rows


def filled_layer(tokens: int, device: torch.device, **settings: Any) -> LowBitLayer:
    """A cache layer with so many random tokens of :data:`HEADS`, and one more that attention comes from."""
    heads, all_heads, dim = HEADS
    layer = LowBitLayer(CacheSettings(**settings))
    keys, values = (torch.randn(1, heads, tokens, dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    queries = torch.randn(1, all_heads, tokens, dim, dtype=torch.bfloat16, device=device)
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    layer.attend(queries[:, :, :-1], None, dim**-0.5, layer, lambda k, v: torch.zeros((), device=device))
    layer.update(keys[:, :, -1:], values[:, :, -1:])
    return layer


def cache_rows(device: torch.device, seconds: Callable[[Callable[[], Any]], float]) -> list[dict[str, Any]]:
    """Microseconds of one token's attention over a packed cache, and its speed as a multiple of the host's in bfloat16."""
    heads, all_heads, dim = HEADS
    rows = []
    for tokens in CONTEXTS:
        query = torch.randn(1, all_heads, 1, dim, dtype=torch.bfloat16, device=device)
        keys, values = (torch.randn(1, heads, tokens, dim, dtype=torch.bfloat16, device=device) for _ in range(2))
        host = seconds(lambda q=query, k=keys, v=values: attend_dense(q, k, v))
        for name, settings in CACHES.items():
            held = filled_layer(tokens, device, **settings).held
            if (reason := kernel.refusal(held)) is not None:
                raise RuntimeError(f"no kernel serves the cache: {reason}")
            asked = query.unflatten(1, (heads, -1))
            took = seconds(lambda held=held, asked=asked: kernel.attend(held, asked, None, dim**-0.5))
            row = {"cache": name, "tokens": tokens, "us": took * 1e6, "times_bf16": host / took}
            rows.append(row)
    return rows


def attend_dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The host's attention of one token."""
    return nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
