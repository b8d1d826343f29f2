"""Time and peak anonymous memory of quantizing on the fly and of loading, on a random Llama of 1.04 B weights.

    python eval/memory.py [--folder DIR] [--layers 16] [--methods rtn,powerquant,codebook]

Makes the bf16 checkpoint (2 GB) if it is not there, then runs each step in a process of its own that samples its
anonymous resident memory every 20 ms. Memory-mapped file pages are not counted: the system takes them back at will.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from one_billion import dense_model, run
from results_file import write

WORKER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM
import hf_lowbit.plugin
from hf_lowbit import LowBitConfig, explain
from one_billion import Peak, anonymous
from transformers import LlamaForCausalLM  # code is not data: import it before memory is counted
transformers.utils.logging.disable_progress_bar()
source, target, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
options = {"quantization_config": LowBitConfig(**settings)} if settings else {}
with Peak() as peak:
    model = AutoModelForCausalLM.from_pretrained(source, **options)
out = {"seconds": round(peak.seconds, 1), "peak_mb": round(peak.added), "after_mb": round(anonymous() - peak.before)}
out["tensors_mb"] = round(explain(model).bytes / 2**20)
if target:
    model.save_pretrained(target)
print(json.dumps(out))
"""


def step(source: Path, target: Path | None, settings: dict) -> dict:
    """One load in a fresh process."""
    return json.loads(run(WORKER, str(source), str(target or ""), json.dumps(settings)).splitlines()[-1])


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
        dense = dense_model(folder, args.layers)
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
