"""What each switch of the learning loop is worth, on the first block of a model at 2 bits.

    python eval/learning.py [--model DIR] [--text FILE] [--calibration FILE] [--windows 64]
                            [--only WORDS] [--name NAME]

The model is cut behind its first block, which takes seconds where the whole model takes minutes. ``error`` is the squared
difference of its final hidden states from the original's, as a share of their energy, on text that was neither calibrated
on nor held out by the loop. Without arguments it runs on the model and texts embedded in the package.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from results_file import RESULTS, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig, quantize
from hf_lowbit.demo import calibration_text, embedded_model, held_out_text
from hf_lowbit.kernels import cpu

ROWS: list[tuple[str, dict]] = [
    ("gptq", {}),
    ("gumbel", {}),
    *[
        ("gumbel", {name: value})
        for name, value in (
            *(("steps", 50), ("steps", 200), ("learn", "codes"), ("learn", "codes_scales"), ("loss", "weighted")),
            *(("loss", "cosine"), ("optimizer", "lion"), ("optimizer", "sign"), ("mixing", 0.5), ("batch", 2), ("batch", 8)),
            *(("code_rate", 0.02), ("code_rate", 0.005), ("scale_rate", 0.004), ("scale_rate", 0.00025)),
            *(("table_rate", 0.004), ("table_rate", 0.00025), ("noise", 1.0)),
        )
    ],
    ("jlcm", {}),
    *[("jlcm", {"tables": count}) for count in (1, 2, 8)],
    ("nupes", {}),
    *[("nupes", {"learn": what}) for what in ("codes", "codes_scales")],
    ("signround", {}),
    ("signround", {"optimizer": "sign"}),
]


def cut(directory: str) -> torch.nn.Module:
    """The model with its first block alone, float32."""
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers = 1
    return AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32).eval()


@torch.no_grad()
def hidden_states(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states ``[tokens, width]`` of windows ``[n, T]``."""
    return torch.cat([model.base_model(input_ids=part).last_hidden_state.flatten(0, 1) for part in ids.split(8)])


def main() -> None:
    """Measure all rows, print them, write ``eval/results``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--text", default=str(held_out_text()))
    parser.add_argument("--calibration", default=str(calibration_text()))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument(
        "--only", default="", help="only rows that start with one of these, separated by semicolons; adds to the result"
    )
    parser.add_argument("--name", default="learning")
    args = parser.parse_args()
    cpu.set_arithmetic("exact")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")[:130_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    wanted = hidden_states(cut(args.model), windows)
    known = RESULTS / f"{args.name}.json"
    rows = json.loads(known.read_text(encoding="utf-8"))["result"] if args.only and known.exists() else {}
    sources = {"model": Path(args.model).name, "text": Path(args.text).name, "calibration": Path(args.calibration).name}
    for method, options in ROWS:
        label = ", ".join([method, *(f"{name}={value}" for name, value in options.items())])
        if not label.startswith(tuple(args.only.split(";"))):
            continue
        model, begun = cut(args.model), time.perf_counter()
        calibration = {"source": args.calibration, "sequences": args.windows}
        quantize(model, LowBitConfig(method, 2, calibration=calibration, options=options, quantize_embeddings=False))
        error = float((hidden_states(model, windows) - wanted).square().sum() / wanted.square().sum())
        rows[label] = {"error": round(error, 5), "seconds": round(time.perf_counter() - begun, 1)}
        print(f"{label:32} error {error:.5f}  {rows[label]['seconds']:.1f} s", flush=True)
        write(args.name, rows, sources)


if __name__ == "__main__":
    main()
