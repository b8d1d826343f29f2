"""Time and peak memory of calibrated quantization of a random Llama of 1.04 B weights, from checkpoint to checkpoint.

    python eval/calibrated_memory.py [--folder DIR] [--layers 16] [--method gptq] [--bits 4] [--sequences 16]

Makes the bf16 checkpoint (2 GB) if it is not there, then quantizes it in a process of its own on windows of 512 random
tokens. ``peak_mb`` is anonymous resident memory sampled every 20 ms, ``peak_resident_mb`` all resident memory of the
process as the system counts it, file pages included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from one_billion import dense_model, run
from results_file import write

WORKER = """
import json, resource, sys, time
import torch
from hf_lowbit.plugin import LowBitConfig
from hf_lowbit.plugin.checkpoint import quantize_checkpoint, show_progress
from one_billion import Peak
from transformers import LlamaForCausalLM  # code is not data: import it before memory is counted
source, target, settings, sequences = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
windows = torch.randint(0, 32000, (sequences, 512), generator=torch.Generator().manual_seed(0))
show_progress(False)
begun = time.perf_counter()
tell = lambda part, parts, name: print(f"{time.perf_counter() - begun:7.0f} s  {part}/{parts} {name}", file=sys.stderr)
with Peak() as peak:
    explanation, report = quantize_checkpoint(source, target, LowBitConfig(**settings, calibration=windows), progress=tell)
out = {"seconds": round(peak.seconds), "peak_mb": round(peak.added)}
out["peak_resident_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
out["bits_per_weight"] = explanation.bits_per_weight_linears
out["solver_seconds"] = round(sum(row.get("seconds", 0) for row in report))
print(json.dumps(out))
"""


def main() -> None:
    """Quantize, print, write ``eval/results``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        dense = dense_model(args.folder or Path(temporary), args.layers)
        settings = json.dumps({"method": args.method, "bits": args.bits})
        out = run(WORKER, str(dense), str(Path(temporary) / "out"), settings, str(args.sequences))
    row = json.loads(out.splitlines()[-1])
    print(row)
    label = f"{args.method}, {args.bits} bits, {args.sequences} sequences of 512, {args.layers} layers"
    print("written to", write(f"calibrated_memory_{args.method}", {label: row}))


if __name__ == "__main__":
    main()
