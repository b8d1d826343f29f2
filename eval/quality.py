"""Quality of every method on one small model: bits per weight, perplexity, KL and top-1 agreement.

    python eval/quality.py [--recipes data-free|calibrated|ablation] [--model DIR] [--text FILE] [--characters 130000]
                           [--calibration FILE] [--only WORDS] [--name NAME]

Protocol: exact fp32 arithmetic, non-overlapping windows of 512 tokens; only the matrices inside blocks are quantized,
embedding and head stay as they are; bits per weight are stored bytes of those matrices, all metadata counted. Calibrated
methods see 128 windows of the calibration file. Without arguments it runs on the model and texts embedded in the package.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from results_file import RESULTS, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig, explain, quantize
from hf_lowbit.demo import calibration_text, embedded_model, held_out_text
from hf_lowbit.kernels import cpu
from hf_lowbit.measure import divergence, perplexity
from hf_lowbit.solvers import SOLVERS

CLASSIC = {"group_size": 64, "scale_bits": 16}
DATA_FREE: list[tuple[str, dict]] = [
    *[(f"rtn {b} bits, g64, 16-bit scales", {"method": "rtn", "bits": b} | CLASSIC) for b in (4, 3, 2)],
    *[(f"halfquad {b} bits, g64, 16-bit scales", {"method": "halfquad", "bits": b} | CLASSIC) for b in (4, 3, 2)],
    *[(f"{m} {b} bits", {"method": m, "bits": b}) for b in (4, 3, 2) for m in ("rtn", "search", "nf", "powerquant")],
    ("float 4 bits", {"method": "float", "bits": 4}),
    ("ternary 2 bits", {"method": "ternary", "bits": 2}),
    *[(f"codebook {b} bits (default)", {"bits": b}) for b in (8, 6, 5, 4, 3, 2)],
    *[(f"codebook {b} bits, g16", {"bits": b, "group_size": 16}) for b in (4, 3, 2)],
    ("codebook 3 bits, 0.5 % outliers", {"bits": 3, "outliers": 0.005}),
]
PLAIN_GPTQ = {"method": "gptq", "levels": "affine", "options": {"target": "own", "sweeps": 0}} | CLASSIC
CALIBRATED: list[tuple[str, dict]] = [
    *[(f"plain GPTQ {b} bits, asymmetric, g64", {"bits": b} | PLAIN_GPTQ) for b in (4, 3, 2)],
    *[(f"gptq {b} bits", {"method": "gptq", "bits": b}) for b in (4, 3, 2)],
    *[(f"gptq {b} bits, power_zero_free", {"method": "gptq", "bits": b, "levels": "power_zero_free"}) for b in (4, 3, 2)],
    *[(f"squeezellm {b} bits, g32", {"method": "squeezellm", "bits": b}) for b in (4, 3, 2)],
    ("squeezellm 3 bits, table per row", {"method": "squeezellm", "bits": 3, "group_size": -1}),
    ("squeezellm 3 bits, g32, 0.45 % outliers", {"method": "squeezellm", "bits": 3, "outliers": 0.0045}),
    *[(f"nupes {b} bits", {"method": "nupes", "bits": b, "levels": "power_zero_free"}) for b in (4, 3, 2)],
    *[(f"jlcm {b} bits", {"method": "jlcm", "bits": b}) for b in (4, 3, 2)],
    *[(f"signround {b} bits", {"method": "signround", "bits": b}) for b in (3, 2)],
    *[(f"gumbel {b} bits", {"method": "gumbel", "bits": b}) for b in (4, 3, 2)],
]


def _changed(method: str, more: dict | None = None, **options: object) -> dict:
    return {"method": method, "bits": 2, "sequences": 32, "options": options} | (more or {})


# At 2 bits, where every switch shows most, on 32 windows. The switches of learned methods: eval/learning.py.
ABLATION: list[tuple[str, dict]] = [
    ("gptq, 2 bits, 32 windows", _changed("gptq")),
    *[
        (f"gptq, {name}={value}", _changed("gptq", **{name: value}))
        for name, value in (
            *(("target", "own"), ("sweeps", 0), ("sweeps", 1), ("sweeps", 8)),
            *(("order", "given"), ("damping", 0.001), ("damping", 0.1)),
        )
    ],
    *[
        (f"gptq, {label}", _changed("gptq", more))
        for label, more in (
            *(("uniform levels", {"levels": "uniform_zero_free"}), ("power levels", {"levels": "power_zero_free"})),
            *(("16-bit scales, g64", CLASSIC), ("another seed of windows", {"seed": 1})),
            *(("8 windows", {"sequences": 8}), ("128 windows", {"sequences": 128})),
            ("32 windows of random tokens", {"random_tokens": True}),
        )
    ],
]
RECIPES = {"data-free": DATA_FREE, "calibrated": CALIBRATED, "ablation": ABLATION}
# What the input table and tied head cost alone, everything else in high precision.
TABLES: list[tuple[str, int]] = [(f"embedding and head alone, {b} bits", b) for b in (4, 5, 6, 8)]


def measure(model_dir: str, settings: dict, reference, ids: torch.Tensor, calibration: str) -> dict:
    """One row of the table."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    settings = dict(settings)
    sequences, random_tokens = settings.pop("sequences", 128), settings.pop("random_tokens", False)
    if SOLVERS[settings.get("method", "codebook")].evidence != "none":
        settings["calibration"] = {"source": calibration, "sequences": sequences}
    if random_tokens:
        vocabulary, draw = model.config.vocab_size, torch.Generator().manual_seed(0)
        settings["calibration"] = torch.randint(vocabulary, (sequences, 512), generator=draw)
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
    parser.add_argument("--recipes", choices=RECIPES, default="data-free")
    parser.add_argument("--calibration", default=str(calibration_text()))
    parser.add_argument("--only", default="", help="labels that begin so, with semicolons between; adds to the result")
    parser.add_argument("--name", default="quality")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")[: args.characters]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    cpu.set_arithmetic("exact")
    plain = perplexity(reference, ids)
    rows = {"original": {"perplexity": round(plain.perplexity, 4), "tokens": plain.tokens}}
    print(f"{'original':40} {'':>7} ppl {plain.perplexity:9.3f}  over {plain.tokens} tokens", flush=True)
    jobs = [(label, settings | {"quantize_embeddings": False}) for label, settings in RECIPES[args.recipes]]
    blocks = ["self_attn", "mlp"]
    jobs += [
        (label, {"bits": b, "overrides": {"embed_tokens": {"bits": b}}, "modules_to_not_convert": blocks})
        for label, b in (TABLES if args.recipes == "data-free" else [])
    ]
    sources = {"model": Path(args.model).name, "text": Path(args.text).name, "calibration": Path(args.calibration).name}
    if args.only and (RESULTS / f"{args.name}.json").exists():
        rows = json.loads((RESULTS / f"{args.name}.json").read_text(encoding="utf-8"))["result"] | rows
    order = [label for label, _ in jobs]
    for label, settings in jobs:
        if not label.startswith(tuple(args.only.split(";"))):
            continue
        row = rows[label] = measure(args.model, settings, reference, ids, args.calibration)
        print(
            f"{label:40} {row['bits_per_weight']:7.3f} ppl {row['perplexity']:9.3f}  KL {row['kl']:.5f}  "
            f"top-1 {row['top1_agreement']:.4f}  {row['quantize_seconds']:.1f} s",
            flush=True,
        )
        # After each row, since all of them take hours.
        rows = dict(sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else -1))
        print("written to", write(args.name, rows, sources))


if __name__ == "__main__":
    main()
