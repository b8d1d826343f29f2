"""What the two arithmetics of the CPU kernels change: perplexity, and greedy text, against the dequantized model.

    python eval/arithmetic.py [--model DIR --text FILE]... [--characters 130000] [--bits 4 3 2]

``reference`` is the same low-bit model dequantized to plain float32 layers. Greedy text: 128 tokens behind each of eight
prompts of 16 tokens spread over the text; ``first_difference`` is the earliest token that is not the reference's. Without
arguments it runs on the model and text embedded in the package.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from results_file import write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig
from hf_lowbit.demo import embedded_model, held_out_text
from hf_lowbit.kernels import cpu
from hf_lowbit.measure import perplexity

MODES = ("exact", "int8", "auto")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 128


def greedy(model: Any, ids: Tensor) -> list[list[int]]:
    """What the model says behind each prompt."""
    starts = torch.linspace(0, len(ids) - PROMPT_TOKENS, PROMPTS).long().tolist()
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    texts = []
    for start in starts:
        prompt = ids[None, start : start + PROMPT_TOKENS]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        texts.append(out[0, PROMPT_TOKENS:].tolist())
    return texts


def first_difference(ours: list[list[int]], theirs: list[list[int]]) -> int | None:
    """Position of the earliest differing token over all prompts, or None."""
    places = [
        place for one, other in zip(ours, theirs, strict=True) for place in range(NEW_TOKENS) if one[place] != other[place]
    ]
    return min(places) if places else None


def measure(source: str, text: str, bits: int, characters: int) -> dict[str, Any]:
    """One line of the table."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    words = Path(text).read_text(encoding="utf-8")[:characters]
    ids = torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False).input_ids)
    config = LowBitConfig(bits=bits)
    low = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32).eval()
    reference = copy.deepcopy(low).dequantize()
    wanted, plain = greedy(reference, ids), perplexity(reference, ids).perplexity
    row: dict[str, Any] = {"perplexity": round(plain, 4)}
    for mode in MODES:
        with cpu.arithmetic(mode):
            found, said = perplexity(low, ids).perplexity, greedy(low, ids)
        same = sum(one == other for one, other in zip(said, wanted, strict=True))
        row[mode] = {
            "perplexity_change": round(found / plain - 1, 6),
            "same_texts": f"{same} of {PROMPTS}",
            "first_difference": first_difference(said, wanted),
        }
    return row


def main() -> None:
    """Measure, print, write ``eval/results/arithmetic.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--text", action="append")
    parser.add_argument("--characters", type=int, default=130_000)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    args = parser.parse_args()
    models, texts = args.model or [str(embedded_model())], args.text or [str(held_out_text())]
    if len(models) != len(texts):
        parser.error(f"{len(models)} models and {len(texts)} texts; each --model needs its --text")
    rows = {}
    for model, text in zip(models, texts, strict=True):
        for bits in args.bits:
            label = f"{Path(model).name}, {bits} bits"
            row = rows[label] = measure(model, text, bits, args.characters)
            print(label, row, flush=True)
    print("written to", write("arithmetic", rows))


if __name__ == "__main__":
    main()
