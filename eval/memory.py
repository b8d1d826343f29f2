"""Time and peak anonymous memory of quantizing on the fly and of loading, on a random Llama of 1.04 B weights.

    python eval/memory.py [--folder DIR] [--layers 16] [--methods rtn,powerquant,codebook]

Makes the bf16 checkpoint (2 GB) if it is not there, then runs each step in a process of its own that samples its
anonymous resident memory every 20 ms. Memory-mapped file pages are not counted: the system takes them back at will.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from results_file import write

WORKER = """
import json, sys, threading, time
import torch, transformers
from transformers import AutoModelForCausalLM
import hf_lowbit.plugin
from hf_lowbit import LowBitConfig, explain
from transformers import LlamaForCausalLM  # code is not data: import it before memory is counted
transformers.utils.logging.disable_progress_bar()
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))
source, target, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
start = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.02)
thread = threading.Thread(target=watch)
thread.start()
begun = time.perf_counter()
options = {"quantization_config": LowBitConfig(**settings)} if settings else {}
model = AutoModelForCausalLM.from_pretrained(source, **options)
seconds = time.perf_counter() - begun
done = True
thread.join()
after = anonymous()
out = {"seconds": round(seconds, 1), "peak_mb": round(peak - start), "after_mb": round(after - start)}
out["tensors_mb"] = round(explain(model).bytes / 2**20)
if target:
    model.save_pretrained(target)
print(json.dumps(out))
"""


def make_model(folder: Path, layers: int) -> None:
    """A random bf16 Llama: 2,048 wide, MLP 8,192, 32 heads over 8, vocabulary 32,000."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def step(source: Path, target: Path | None, settings: dict) -> dict:
    """One load in a fresh process."""
    arguments = [str(source), str(target or ""), json.dumps(settings)]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run all steps, print them, write ``eval/results/memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--methods", default="rtn,powerquant,codebook")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        dense = folder / f"llama-{args.layers}-layers"
        if not dense.exists():
            maker = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import memory, pathlib; "
            maker += f"memory.make_model(pathlib.Path({str(dense)!r}), {args.layers})"
            subprocess.run([sys.executable, "-c", maker], check=True)
        for method in args.methods.split(","):
            low = Path(temporary) / method
            rows[f"quantize on the fly, {method}, 4 bits"] = step(dense, low, {"method": method, "bits": 4})
            rows[f"load the result, {method}"] = step(low, None, {})
        for label, row in rows.items():
            print(
                f"{label:40} {row['seconds']:7.1f} s, anonymous: peak {row['peak_mb']:5} MB, after {row['after_mb']:5} MB "
                f"(tensors {row['tensors_mb']} MB)"
            )
    print("written to", write("memory", rows))


if __name__ == "__main__":
    main()
