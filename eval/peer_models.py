"""One peer, measured: quantize a checkpoint with a library's own means, and say what the result costs and how far it drifts.

    python eval/peer_models.py ROW ... --model DIR --text FILE --calibration FILE [--characters N]

``eval/peers.py`` starts it inside the environment where the peers are installed; it prints a line for each row. Each
library quantizes what it does by default: llama.cpp the embedding too, the others the matrices inside blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_lowbit.measure import divergence

LLAMA_NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}
# Begins the line of a row; what libraries print besides is passed over.
ROW = "row: "
# Calibration windows of our calibrated rows, a quarter of the default: they show most of the gain in a quarter of the time.
SEQUENCES = 32
# What a peer gives: the model to measure, and the bytes of all it stores.
Made = tuple[Any, int]


def dense(model: str, **options: Any) -> Any:
    """The original with 16-bit weights, as the checkpoint holds them."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16, **options).eval()


def saved_bytes(model: Any) -> int:
    """Bytes of the weight files that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def tensor_bytes(tensors: Any) -> int:
    """Bytes of tensors, each storage once; a tensor subclass is counted by its parts."""
    seen: dict[int, int] = {}
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            pending += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def held_bytes(model: Any) -> int:
    """Bytes of all tensors a model holds in memory."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def hf_lowbit(model: str, calibration: str, **settings: Any) -> Made:
    """Ours: quantized while loading, saved, counted as files, opened again."""
    from hf_lowbit import LowBitConfig
    from hf_lowbit.solvers import SOLVERS

    if SOLVERS[settings["method"]].evidence != "none":
        settings["calibration"] = {"source": calibration, "sequences": SEQUENCES}
    made = dense(model, quantization_config=LowBitConfig(**settings))
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), size


def quanto(model: str, calibration: str, kind: str) -> Made:
    """optimum-quanto, groups of 128."""
    from optimum import quanto as library

    def made(dtype: torch.dtype) -> Any:
        out = dense(model).to(dtype)
        library.quantize(out, weights=getattr(library, kind), exclude="lm_head")
        library.freeze(out)
        return out

    return made(torch.float32), held_bytes(made(torch.float16))


def bitsandbytes(model: str, calibration: str, kind: str, double: bool) -> Made:
    """bitsandbytes, blocks of 64."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    made = dense(model, quantization_config=config, device_map="cpu")
    return made, saved_bytes(made)


def hqq(model: str, calibration: str, bits: int) -> Made:
    """HQQ, groups of 64 along the inputs, by its own loader (Transformers 5.23 has none that works)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    made = dense(model)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    AutoHQQHFModel.quantize_model(made, quant_config=config, compute_dtype=torch.float16, device="cpu")
    layers = [module for module in made.modules() if isinstance(module, HQQLinear)]
    held = [value for layer in layers for value in [layer.W_q, *layer.meta.values()] if isinstance(value, torch.Tensor)]
    if not layers:
        raise RuntimeError("no layer was quantized")
    size = tensor_bytes([*made.parameters(), *made.buffers(), *held])
    for layer in layers:  # what is stored stays in 16 bits; the arithmetic around it is float32 as for all others
        layer.compute_dtype = layer.meta["compute_dtype"] = torch.float32
    return made, size


def torchao(model: str, calibration: str, kind: str) -> Made:
    """torchao through Transformers; integers of fewer than 8 bits are held in bytes unless it packs them."""
    from torchao import quantization as library
    from transformers import TorchAoConfig

    if kind == "int8":
        config = library.Int8WeightOnlyConfig()
    elif kind == "int4":
        config = library.Int4WeightOnlyConfig(group_size=64)
    else:
        config = library.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=library.PerGroup(64))

    def made(dtype: torch.dtype) -> Any:
        options = {"quantization_config": TorchAoConfig(config), "device_map": "cpu"}
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options).eval()

    return made(torch.float32), held_bytes(made(torch.float16))


def llama_cpp(model: str, calibration: str, kind: str) -> Made:
    """llama.cpp: the checkpoint as GGUF in 16 bits, then quantized by the library; the bytes are the file's."""
    import llama_cpp as library

    folder = Path(tempfile.mkdtemp(prefix="gguf"))
    plain, small = folder / "plain.gguf", folder / "small.gguf"
    write_gguf(model, plain)
    params = library.llama_model_quantize_default_params()
    params.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if library.llama_model_quantize(str(plain).encode(), str(small).encode(), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize refused the file")
    size = small.stat().st_size
    return GgufModel(small, json.loads((Path(model) / "config.json").read_text())["vocab_size"]), size


class GgufModel:
    """A GGUF file behind the call that ``hf_lowbit.measure`` makes: token ids ``[b, n]`` to ``.logits`` ``[b, n, v]``."""

    device = torch.device("cpu")

    def __init__(self, file: Path, vocabulary: int) -> None:
        import llama_cpp as library

        self.llama = library.Llama(str(file), n_ctx=512, n_batch=512, logits_all=True, verbose=False)
        self.config = argparse.Namespace(vocab_size=vocabulary)

    def __call__(self, input_ids: torch.Tensor) -> argparse.Namespace:
        """Logits of every position; each row starts afresh."""
        rows = []
        for row in input_ids.tolist():
            self.llama.reset()
            self.llama.eval(row)
            rows.append(torch.tensor(self.llama.scores[: len(row)]))
        return argparse.Namespace(logits=torch.stack(rows))


def write_gguf(model: str, file: Path) -> None:
    """A Llama checkpoint as a 16-bit GGUF with token ids for a vocabulary: enough to run it on ids."""
    import gguf
    from safetensors.torch import load_file

    config = AutoModelForCausalLM.from_pretrained(model).config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in LLAMA_NAMES.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in load_file(Path(model) / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if (count := heads.get(stem.rpartition(".")[2])) is not None:  # llama.cpp turns neighbours, Transformers halves
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        array = tensor.float().numpy()
        writer.add_tensor(f"{names[stem]}.weight", array if array.ndim == 1 else array.astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def auto_round(model: str, calibration: str, bits: int) -> Made:
    """AutoRound, groups of 128, on windows of the calibration text, with its defaults but for 64 samples of 512 tokens."""
    from auto_round import AutoRound

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(Path(calibration).read_text(encoding="utf-8")[:1_000_000], add_special_tokens=False).input_ids
    texts = [tokenizer.decode(ids[start : start + 600]) for start in range(0, len(ids) - 600, len(ids) // 64)]
    made = dense(model).float()
    solver = AutoRound(made, tokenizer, bits=bits, group_size=128, dataset=texts, seqlen=512, nsamples=64, device_map="cpu")
    with tempfile.TemporaryDirectory() as folder:
        solver.quantize_and_save(folder, format="auto_round")
        files = [file for file in Path(folder).rglob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        return AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32).eval(), size


def gptqmodel(model: str, calibration: str, bits: int) -> Made:
    """GPTQModel, groups of 128, on 128 windows of the calibration text."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(Path(calibration).read_text(encoding="utf-8")[:1_000_000]).input_ids)
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    windows = windows[:: max(1, len(windows) // 128)][:128]
    solver = GPTQModel.load(model, QuantizeConfig(bits=bits, group_size=128), device="cpu")
    solver.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * 512} for row in windows], backend=BACKEND.TORCH)
    with tempfile.TemporaryDirectory() as folder:
        solver.save(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH).model.float().eval(), size


def original(model: str, calibration: str) -> Made:
    """The 16-bit checkpoint itself."""
    return dense(model).float(), sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


OURS = {
    f"hf-lowbit {method} {bits} bits": partial(hf_lowbit, method=method, bits=bits)
    for method in ("codebook", "gptq")
    for bits in (4, 3, 2)
}
KEPT = {
    f"hf-lowbit codebook {bits} bits, embeddings kept": partial(
        hf_lowbit, method="codebook", bits=bits, quantize_embeddings=False
    )
    for bits in (4, 3, 2)
}
PEERS: dict[str, dict[str, Callable[[str, str], Made]]] = {
    "hf-lowbit": {"original, 16 bits": original} | OURS | KEPT,
    "optimum-quanto": {f"quanto {kind}": partial(quanto, kind=kind) for kind in ("qint4", "qint2")},
    "bitsandbytes": {
        "bitsandbytes NF4": partial(bitsandbytes, kind="nf4", double=False),
        "bitsandbytes NF4, double": partial(bitsandbytes, kind="nf4", double=True),
        "bitsandbytes FP4": partial(bitsandbytes, kind="fp4", double=False),
    },
    "hqq": {f"HQQ {bits} bits": partial(hqq, bits=bits) for bits in (4, 3, 2)},
    "torchao": {f"torchao {kind}": partial(torchao, kind=kind) for kind in ("int8", "int4", "intx int4")},
    "llama-cpp-python": {
        f"llama.cpp {kind}": partial(llama_cpp, kind=kind) for kind in ("Q4_0", "IQ4_NL", "Q4_K_M", "Q3_K_M", "Q2_K")
    },
    "auto-round": {f"AutoRound {bits} bits": partial(auto_round, bits=bits) for bits in (4, 2)},
    "gptqmodel": {"GPTQModel 4 bits": partial(gptqmodel, bits=4)},
}


def in_float32(model: Any) -> Any:
    """The model with float32 arithmetic around its quantized weights, where its library has not chosen that already."""
    return model if getattr(model, "is_quantized", False) else model.float()


def row(make: Callable[[str, str], Made], args: argparse.Namespace, ids: torch.Tensor, reference: Any) -> dict[str, Any]:
    """Sizes and measures of one way to quantize; or why there are none."""
    try:
        made, size = make(args.model, args.calibration)
        if isinstance(made, torch.nn.Module):
            made = in_float32(made)
        found = divergence(made, reference, ids)
    except Exception as error:  # whatever a foreign library trips over is its row
        return {"fails": f"does not load or run: {type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    weights = sum(value.numel() for value in reference.parameters())
    return {
        "bytes": size,
        "bits_per_weight_model": round(8 * size / weights, 4),
        "perplexity": round(found.perplexity, 4),
        "kl": round(found.kl, 6),
        "top1_agreement": round(found.top1_agreement, 5),
    }


def main() -> None:
    """Measure rows, a line of JSON each, so that one on which a library crashes takes none before it along."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = {label: make for rows in PEERS.values() for label, make in rows.items()}
    parser.add_argument("labels", choices=known, metavar="ROW", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--characters", type=int, default=130_000)
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")[: args.characters]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    reference = dense(args.model).float()
    for label in args.labels:
        print(f"\n{ROW}{json.dumps(row(known[label], args, ids, reference))}", flush=True)


if __name__ == "__main__":
    main()
