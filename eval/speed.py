"""Decoding and prompt speed of a random Llama of 1.04 B weights: hf-lowbit and what else is installed, in turn.

    python eval/speed.py [--folder DIR] [--rounds 3] [--threads 2] [--only WORDS] [--peers PYTHON]

Every engine runs in a process of its own, all of them once a round, so that a machine that slows down slows all; of each
the fastest round counts. hf-lowbit and Transformers decode inside ``generate``. ``--peers`` is an interpreter of an
environment with ``optimum-quanto`` and ``llama-cpp-python`` (and ``gguf``); what it lacks is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from one_billion import dense_model, run
from results_file import write

QUANTIZE = """
import json, sys
from hf_lowbit.plugin import LowBitConfig
from hf_lowbit.plugin.checkpoint import quantize_checkpoint, show_progress
show_progress(False)
quantize_checkpoint(sys.argv[1], sys.argv[2], LowBitConfig(**json.loads(sys.argv[3])))
"""
TRANSFORMERS = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from hf_lowbit.measure.speed import decode_rate, prefill_rate, read_bandwidth
from one_billion import anonymous
logging.disable_progress_bar()
source, options, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
if "quanto" in options:
    from transformers import QuantoConfig
    options = {"quantization_config": QuantoConfig(weights=options.pop("quanto")), **options}
options["dtype"] = getattr(torch, options["dtype"])
begun = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(source, **options).eval()
seconds = time.perf_counter() - begun
used = int(anonymous())
prefill = prefill_rate(model, 128)
out = {"decode": decode_rate(model, 1), "prefill": prefill, "load_seconds": seconds, "anonymous_mb": used}
out["read_gb_s"] = read_bandwidth() / 1e9
print(json.dumps(out))
"""
LLAMA_CPP = """
import json, random, statistics, sys, time
import llama_cpp
threads = int(sys.argv[3])
random.seed(0)
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
prompt = [random.randrange(300, 30000) for _ in range(128)]
best = float("inf")
for _ in range(3):
    model.reset()
    begun = time.perf_counter()
    model.eval(prompt)
    best = min(best, time.perf_counter() - begun)
model.reset()
model.eval(prompt[:16])
steps = []
for _ in range(32):
    begun = time.perf_counter()
    model.eval([random.randrange(300, 30000)])
    steps.append(time.perf_counter() - begun)
print(json.dumps({"decode": 1 / statistics.median(steps), "prefill": 128 / best}))
"""
# Names of a layer's tensors in a GGUF file. Rows of q and k are not permuted to its order: right for timing, not for text.
GGUF = """
import json, sys
import ctypes, gguf, llama_cpp, numpy, torch
from pathlib import Path
from safetensors import safe_open
source, target, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = json.loads((source / "config.json").read_text())
names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
renamed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
for number in range(config["num_hidden_layers"]):
    renamed |= {f"model.layers.{number}.{ours}.weight": f"blk.{number}.{theirs}.weight" for ours, theirs in names.items()}
writer = gguf.GGUFWriter(target + ".f16", "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_dimension_count(config["head_dim"])
writer.add_rope_freq_base(10000.0)
writer.add_vocab_size(config["vocab_size"])
writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
writer.add_tokenizer_model("llama")
words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
words += [f"word{number}" for number in range(config["vocab_size"] - len(words))]
writer.add_token_list(words)
writer.add_token_scores([0.0] * len(words))
writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(words) - 259))
for file in sorted(source.glob("*.safetensors")):
    with safe_open(file, "pt") as opened:
        for key in opened.keys():
            array = opened.get_tensor(key).float().numpy()
            writer.add_tensor(renamed[key], array if array.ndim == 1 else array.astype(numpy.float16))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
assert llama_cpp.llama_model_quantize((target + ".f16").encode(), target.encode(), ctypes.byref(options)) == 0
Path(target + ".f16").unlink()
"""


class Engine(NamedTuple):
    """One line of the table: what to load with which options, by which worker, and settings of its environment."""

    worker: str
    model: str
    options: dict
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed
    peer: str = ""


LOW = {bits: {"method": "nf", "bits": bits, "group_size": 64, "scale_bits": 16} for bits in (4, 3, 2)}
FLOAT = {"dtype": "float32"}
ENGINES = {
    "hf-lowbit 4 bits": Engine(TRANSFORMERS, "4", FLOAT),
    "llama.cpp Q4_0": Engine(LLAMA_CPP, "Q4_0", {}, peer="llama_cpp"),
    "hf-lowbit 3 bits": Engine(TRANSFORMERS, "3", FLOAT),
    "hf-lowbit 2 bits": Engine(TRANSFORMERS, "2", FLOAT),
    "hf-lowbit 4 bits, exact": Engine(TRANSFORMERS, "4", FLOAT, {"HF_LOWBIT_CPU_ARITHMETIC": "exact"}),
    "hf-lowbit 4 bits, layers not fused": Engine(TRANSFORMERS, "4", FLOAT, {"HF_LOWBIT_FUSED": "0"}),
    "Transformers float32": Engine(TRANSFORMERS, "dense", FLOAT),
    "quanto int4": Engine(TRANSFORMERS, "dense", {"dtype": "bfloat16", "quanto": "int4"}, peer="optimum.quanto"),
}


def has(python: str, module: str) -> bool:
    """Whether an interpreter can import a module."""
    return not subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode


def prepared(engine: Engine, folder: Path, dense: Path, peers: str) -> Path:
    """The model an engine loads, made in ``folder`` if it is not there."""
    if engine.model == "dense":
        return dense
    target = folder / f"{dense.name}-{engine.model}"
    if not target.exists() and engine.model in map(str, LOW):
        run(QUANTIZE, str(dense), str(target), json.dumps(LOW[int(engine.model)]))
    elif not target.exists():
        subprocess.run([peers, "-c", GGUF, str(dense), str(target), engine.model], check=True, capture_output=True)
    return target


def main() -> None:
    """Run all rounds, print the table, write ``eval/results/speed.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", default="", help="engines that start with one of these words")
    parser.add_argument("--peers", default=sys.executable)
    args = parser.parse_args()
    best: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        dense = dense_model(folder, args.layers)
        present = {name: engine for name, engine in ENGINES.items() if name.startswith(tuple(args.only.split(",")))}
        present = {name: engine for name, engine in present.items() if not engine.peer or has(args.peers, engine.peer)}
        models = {name: prepared(engine, folder, dense, args.peers) for name, engine in present.items()}
        for number in range(args.rounds):
            for name, engine in present.items():
                arguments = [str(models[name]), json.dumps(engine.options), str(args.threads)]
                python = args.peers if engine.peer else sys.executable
                row = json.loads(run(engine.worker, *arguments, python=python, **engine.environment).splitlines()[-1])
                print(f"round {number + 1}  {name:36} {row['decode']:7.2f} {row['prefill']:8.1f} tokens/s", flush=True)
                known = best.setdefault(name, row)
                best[name] = row | {key: max(known[key], row[key]) for key in ("decode", "prefill")}
    first = next(iter(best.values()))
    for name, row in best.items():
        row |= {f"{key}_ratio": round(first[key] / row[key], 3) for key in ("decode", "prefill")}
        print(
            f"{name:36} decode {row['decode']:7.2f} tokens/s ({row['decode_ratio']:.2f} times slower than the first), "
            f"prefill {row['prefill']:7.1f} ({row['prefill_ratio']:.2f})"
        )
    print("written to", write("speed", best))


if __name__ == "__main__":
    main()
