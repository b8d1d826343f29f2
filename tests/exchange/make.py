"""Makes the golden checkpoints beside this file, with the tools whose formats they are in. Run once; tests only read them.

    python tests/exchange/make.py AUTO_GPTQ AUTOAWQ

Needs bitsandbytes 0.50.2 and compressed-tensors 0.20.0 in the environment, and the unpacked sources of auto-gptq 0.7.1 and
AutoAWQ 0.2.9, which do not install beside a current Transformers: of those only the modules that pack and unpack a layer are
loaded.
``expected.json`` holds, for each matrix, the CRC-32 of the bytes the tool itself decodes it to, in the checkpoint's dtype.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "golden"
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 32, "num_attention_heads": 2}


def model_of(dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama of 45,000 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, dtype=dtype)
    model = LlamaForCausalLM(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(0.1 * torch.randn(module.weight.shape))
    return model


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The matrices of the decoder layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def save(name: str, model: LlamaForCausalLM, packed: dict, decoded: dict, settings: dict, made_by: str) -> None:
    """Write one golden checkpoint."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = {
        n: v for n, v in model.state_dict().items() if n != "lm_head.weight" and n.removesuffix(".weight") not in decoded
    }
    state |= {n: v.contiguous() for n, v in packed.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    sums = {n: checksum(v) for n, v in decoded.items()}
    expected = {"made_by": made_by, "dtype": str(model.dtype).removeprefix("torch."), "crc32": sums}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def grid(weight: torch.Tensor, bits: int, size: int, symmetric: bool, groups: torch.Tensor) -> tuple:
    """fp16 scales and integer zero points ``[out, groups]``, and the weight on that grid."""
    top = (1 << bits) - 1
    columns = [weight[:, groups == g].float() for g in range(int(groups.max()) + 1)]
    low = torch.stack([c.amin(1) for c in columns], 1).clamp_max(0)
    high = torch.stack([c.amax(1) for c in columns], 1).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).half()
    zero = torch.full_like(low, 1 << (bits - 1)) if symmetric else (-low / scale.float()).round().clamp(1, top)
    s, z = scale.float()[:, groups], zero[:, groups]
    codes = (weight.float() / s + z).round().clamp(0, top)
    return scale, zero, (codes - z) * s


def gptq(source: str, name: str, bits: int, size: int, symmetric: bool, act_order: bool) -> None:
    """Packed and decoded by auto-gptq's QuantLinear, first zero-point convention."""
    sys.path.insert(0, f"{source}/auto_gptq/nn_modules/qlinear")
    layer_of = importlib.import_module("qlinear_cuda").QuantLinear
    model, packed, decoded = model_of(torch.float16), {}, {}
    for module, linear in linears(model).items():
        columns, width = linear.in_features, linear.in_features if size == -1 else size
        groups = torch.arange(columns) // width
        if act_order:
            groups = groups[torch.randperm(columns)]
        scale, zero, on_grid = grid(linear.weight, bits, width, symmetric, groups)
        layer = layer_of(bits, size, columns, linear.out_features, False, weight_dtype=torch.float16)
        dense = torch.nn.Linear(columns, linear.out_features, bias=False)
        dense.weight.data = on_grid
        layer.pack(dense, scale.float(), zero.clone(), groups.int())
        layer.scales = layer.scales.half()
        packed |= {f"{module}.{field}": getattr(layer, field) for field in ("qweight", "qzeros", "scales", "g_idx")}
        decoded[module] = layer(torch.eye(columns, dtype=torch.float16)).T.contiguous()
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": act_order}
    save(name, model, packed, decoded, settings | {"damp_percent": 0.01, "checkpoint_format": "gptq"}, "auto-gptq 0.7.1")


def awq(source: str, name: str) -> None:
    """Packed and decoded by AutoAWQ's WQLinear_GEMM and dequantize_gemm."""
    for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        module = sys.modules[package] = types.ModuleType(package)
        module.__path__ = [f"{source}/{package.replace('.', '/')}"]  # without running what its __init__ imports
    layer_of = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    decode = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    model, packed, decoded = model_of(torch.float16), {}, {}
    for module, linear in linears(model).items():
        groups = torch.arange(linear.in_features) // 32
        scale, zero, on_grid = grid(linear.weight, 4, 32, False, groups)
        dense = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        dense.weight.data = on_grid
        layer = layer_of.from_linear(dense, 4, 32, scales=scale.T.float().contiguous(), zeros=zero.T.contiguous())
        packed |= {f"{module}.{field}": getattr(layer, field) for field in ("qweight", "qzeros", "scales")}
        decoded[module] = decode(layer.qweight, layer.qzeros, layer.scales, 4, 32).T.contiguous()
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    save(name, model, packed, decoded, settings, "AutoAWQ 0.2.9")


def nf4(name: str, dtype: torch.dtype, nested: bool) -> None:
    """Quantized and decoded by bitsandbytes."""
    functional = importlib.import_module("bitsandbytes.functional")
    model, packed, decoded = model_of(dtype), {}, {}
    for module, linear in linears(model).items():
        codes, state = functional.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=nested)
        packed[f"{module}.weight"] = codes
        packed |= {f"{module}.weight.{field}": value for field, value in state.as_dict(packed=True).items()}
        decoded[module] = functional.dequantize_4bit(codes, state)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
    settings |= {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8"}
    settings |= {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."), "llm_int8_skip_modules": ["lm_head"]}
    save(name, model, packed, decoded, settings, "bitsandbytes 0.50.2")


def pack_quantized(name: str, dtype: torch.dtype, **weights) -> None:
    """Packed and decoded by compressed-tensors."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    helpers = importlib.import_module("compressed_tensors.quantization.utils")
    packer = importlib.import_module("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    model, packed, decoded = model_of(dtype), {}, {}
    for module, linear in linears(model).items():
        value, size = linear.weight.data, weights.get("group_size") or linear.in_features
        grouped = value.view(len(value), -1, size)
        scale, zero = helpers.calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        state = packer.compress({"weight": value, "weight_scale": scale.to(dtype), "weight_zero_point": zero}, scheme)
        packed |= {f"{module}.{field}": value for field, value in state.items()}
        decoded[module] = packer.decompress(state, scheme)["weight"]
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"], quantization_status="compressed"
    )
    settings = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors"}
    save(name, model, packed, decoded, settings, "compressed-tensors 0.20.0")


if __name__ == "__main__":
    auto_gptq, auto_awq = sys.argv[1:]
    gptq(auto_gptq, "gptq-4-act-order", 4, 32, symmetric=False, act_order=True)
    gptq(auto_gptq, "gptq-3-rows", 3, -1, symmetric=True, act_order=False)
    awq(auto_awq, "awq-4")
    nf4("nf4-nested", torch.bfloat16, nested=True)
    pack_quantized("packed-4", torch.bfloat16, num_bits=4, strategy="group", group_size=32, symmetric=True)
    pack_quantized("packed-8-zero-points", torch.float32, num_bits=8, strategy="channel", symmetric=False)
