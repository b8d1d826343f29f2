"""Perplexity of transforms at several widths of weights and activations, with and without planted outliers.

    python eval/transforms.py --model DIR --planted DIR --text FILE --calibration FILE [--characters 60000] [--name NAME]

Matrices inside blocks are rounded to nearest with one scale per row (method rtn), activations as the row says; embedding and
head stay as they are. Every transform sees the same 32 windows of 256 tokens. ``--planted`` is what ``planted_outliers.py``
made of the model. Rows that are in the result file already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from results_file import RESULTS, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig, quantize
from hf_lowbit.demo import calibration_text, embedded_model, held_out_text
from hf_lowbit.measure import perplexity

STATIC = {"bits": 8, "per": "tensor", "static": True}
WIDTHS: dict[str, dict[str, Any]] = {
    "W8A8 static per tensor": {"bits": 8, "activation_bits": STATIC},
    "W4A8 per token": {"bits": 4, "activation_bits": 8},
    "W4A4 per token": {"bits": 4, "activation_bits": 4},
}
METHODS: dict[str, list[Any]] = {
    "none": [],
    "gamma_migration": ["gamma_migration"],
    "smoothquant": ["smoothquant"],
    "awq": ["awq"],
    "outlier_suppression_plus": ["outlier_suppression_plus"],
    "qllm, no correction": [{"name": "qllm", "rank": 0}],
    "qllm": ["qllm"],
    "hadamard": ["hadamard"],
    "resq": ["resq"],
    "token_wise_clipping": ["token_wise_clipping"],
    "gamma_migration + token_wise_clipping": ["gamma_migration", "token_wise_clipping"],
}
COMMON = {"method": "rtn", "group_size": -1, "scale_bits": 16, "quantize_embeddings": False}


def measure(source: str, settings: dict[str, Any], ids: torch.Tensor) -> dict[str, float]:
    """One cell of the table."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    begun = time.perf_counter()
    model = quantize(model, LowBitConfig(**COMMON, **settings))
    seconds = time.perf_counter() - begun
    return {"perplexity": round(perplexity(model, ids).perplexity, 4), "quantize_seconds": round(seconds, 1)}


def main() -> None:
    """Measure all cells that are missing, and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--planted", required=True)
    parser.add_argument("--text", default=str(held_out_text()))
    parser.add_argument("--calibration", default=str(calibration_text()))
    parser.add_argument("--characters", type=int, default=60_000)
    parser.add_argument("--only", default="", help="only rows whose label holds this")
    parser.add_argument("--name", default="transforms")
    args = parser.parse_args()
    logging.getLogger("hf_lowbit").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")[: args.characters]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    file = RESULTS / f"{args.name}.json"
    rows: dict[str, Any] = json.loads(file.read_text())["result"] if file.exists() else {}
    sources = {name: Path(getattr(args, name)).name for name in ("model", "planted", "text", "calibration")}
    data = {"source": args.calibration, "sequences": 32, "length": 256}
    models = {"clean": args.model, "planted": args.planted}
    for kind, source in models.items():
        if f"{kind}: float32" not in rows:
            dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
            rows[f"{kind}: float32"] = {"perplexity": round(perplexity(dense, ids).perplexity, 4)}
    for width, settings in WIDTHS.items():
        for method, transforms in METHODS.items():
            static = isinstance(settings["activation_bits"], dict)
            if "token_wise_clipping" in transforms and not static:
                continue
            for kind, source in models.items():
                label = f"{kind}: {width}, {method}"
                if label in rows or args.only not in label:
                    continue
                needs = (
                    static
                    or any(t not in ("gamma_migration", "hadamard") for t in transforms)
                    or transforms[:1] == ["gamma_migration"]
                )
                more = {"calibration": data} if needs else {}
                rows[label] = measure(source, settings | more | {"transforms": transforms}, ids)
                print(f"{label:70} {rows[label]['perplexity']:10.3f}  {rows[label]['quantize_seconds']:.0f} s", flush=True)
                order = [f"{k}: {w}, {m}" for w in WIDTHS for m in METHODS for k in models]
                rows = dict(sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else -1))
                write(args.name, rows, sources)


if __name__ == "__main__":
    main()
