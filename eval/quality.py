"""Quality of every data-free method on one small model: bits per weight, perplexity, KL and top-1 agreement.

    python eval/quality.py [--model DIR] [--text FILE] [--characters 130000] [--name quality]

Protocol: fp32, non-overlapping windows of 512 tokens; only the matrices inside blocks are quantized, embedding and head
stay as they are; bits per weight are stored bytes of those matrices, all metadata counted. Without arguments it runs on
the model and text embedded in the package.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from results_file import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig, explain, quantize
from hf_lowbit.demo import embedded_model, held_out_text
from hf_lowbit.measure import divergence, perplexity

CLASSIC = {"group_size": 64, "scale_bits": 16}
RECIPES: list[tuple[str, dict]] = [
    *[(f"rtn {b} bits, g64, 16-bit scales", {"method": "rtn", "bits": b} | CLASSIC) for b in (4, 3, 2)],
    *[(f"halfquad {b} bits, g64, 16-bit scales", {"method": "halfquad", "bits": b} | CLASSIC) for b in (4, 3, 2)],
    *[(f"{m} {b} bits", {"method": m, "bits": b}) for b in (4, 3, 2) for m in ("rtn", "search", "nf", "powerquant")],
    ("float 4 bits", {"method": "float", "bits": 4}),
    ("ternary 2 bits", {"method": "ternary", "bits": 2}),
    *[(f"codebook {b} bits (default)", {"bits": b}) for b in (8, 6, 5, 4, 3, 2)],
    *[(f"codebook {b} bits, g16", {"bits": b, "group_size": 16}) for b in (4, 3, 2)],
    ("codebook 3 bits, 0.5 % outliers", {"bits": 3, "outliers": 0.005}),
]
# What the input table and tied head cost alone, everything else in high precision.
TABLES: list[tuple[str, int]] = [(f"embedding and head alone, {b} bits", b) for b in (4, 5, 6, 8)]


def measure(model_dir: str, settings: dict, reference, ids: torch.Tensor) -> dict:
    """One row of the table."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    begun = time.perf_counter()
    quantize(model, LowBitConfig(**settings))
    seconds = time.perf_counter() - begun
    report, found = explain(model), divergence(model, reference, ids)
    return {
        "bits_per_weight": round(report.bits_per_weight_linears, 4),
        "perplexity": round(found.perplexity, 4),
        "kl": round(found.kl, 6),
        "top1_agreement": round(found.top1_agreement, 5),
        "quantize_seconds": round(seconds, 2),
    }


def main() -> None:
    """Measure all recipes, print the table, write ``eval/results``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--text", default=str(held_out_text()))
    parser.add_argument("--characters", type=int, default=130_000)
    parser.add_argument("--name", default="quality")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")[: args.characters]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    plain = perplexity(reference, ids)
    rows = {"original": {"perplexity": round(plain.perplexity, 4), "tokens": plain.tokens}}
    print(f"{'original':40} {'':>7} ppl {plain.perplexity:9.3f}  over {plain.tokens} tokens", flush=True)
    jobs = [(label, settings | {"quantize_embeddings": False}) for label, settings in RECIPES]
    blocks = ["self_attn", "mlp"]
    jobs += [
        (label, {"bits": b, "overrides": {"embed_tokens": {"bits": b}}, "modules_to_not_convert": blocks})
        for label, b in TABLES
    ]
    for label, settings in jobs:
        row = rows[label] = measure(args.model, settings, reference, ids)
        print(
            f"{label:40} {row['bits_per_weight']:7.3f} ppl {row['perplexity']:9.3f}  KL {row['kl']:.5f}  "
            f"top-1 {row['top1_agreement']:.4f}  {row['quantize_seconds']:.1f} s",
            flush=True,
        )
    print("written to", write(args.name, rows, {"model": Path(args.model).name, "text": Path(args.text).name}))


if __name__ == "__main__":
    main()
