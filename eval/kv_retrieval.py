"""Key-value lines planted in a long prompt: what is evicted cannot be answered, what is kept at few bits can.

    python eval/kv_retrieval.py [--steps 1500] [--lines 60]

Trains a small Llama on prompts of ``key : value`` lines followed by questions (minutes on a CPU), then asks one question
about a random line behind each prompt, with half of the cache evicted, or kept at 4, 3 and 2 bits.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from kv_baselines import evicting, kivi
from results_file import write
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hf_lowbit.kv import LowBitCache

KEYS, VALUES = 192, 64
COLON, NEWLINE, FIRST_KEY = 0, 1, 2
FIRST_VALUE = FIRST_KEY + KEYS
RECENT = 16


def prompts(count: int, lines: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids ``[count, 4 * lines]``, and keys and values ``[count, lines]`` of their lines."""
    keys = torch.rand(count, KEYS, generator=draw).argsort(-1)[:, :lines] + FIRST_KEY
    values = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUES, (count, lines), generator=draw)
    text = torch.stack([keys, torch.full_like(keys, COLON), values, torch.full_like(keys, NEWLINE)], -1)
    return text.flatten(1), keys, values


def train(args: argparse.Namespace, draw: torch.Generator) -> Any:
    """A Llama that answers; lines grow from few to many."""
    config = LlamaConfig(
        vocab_size=FIRST_VALUE + VALUES, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    begun = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, step / 100, 3 * (1 - step / args.steps))
        lines = min(args.lines, 6 + step * args.lines * 3 // (2 * args.steps))
        text, keys, values = prompts(32, lines, draw)
        order = torch.rand(keys.shape, generator=draw).argsort(-1)
        asked = torch.stack([keys.gather(1, order), torch.full_like(keys, COLON), values.gather(1, order)], -1).flatten(1)
        logits = model(torch.cat([text, asked], 1)).logits[:, text.shape[1] + 1 :: 3]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), values.gather(1, order).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}, {lines} lines: loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, make: Any, questions: int, lines: int, draw: torch.Generator) -> float:
    """Share of questions answered, one behind each prompt."""
    right = 0
    for _ in range(questions // 50):
        text, keys, values = prompts(50, lines, draw)
        asked = torch.randint(0, lines, (50, 1), generator=draw)
        cache = make()
        model(text, past_key_values=cache)
        model(keys.gather(1, asked), past_key_values=cache)
        answer = model(torch.full((50, 1), COLON), past_key_values=cache).logits[:, -1].argmax(-1)
        right += int((answer == values.gather(1, asked)[:, 0]).sum())
    return right / (questions // 50 * 50)


def main() -> None:
    """Train, ask, write ``eval/results/kv_retrieval.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lines", type=int, default=60)
    parser.add_argument("--questions", type=int, default=1000)
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    model = train(args, draw)
    config = model.config
    half = {"important": 0.5, "recent": RECENT}
    caches = {
        "full cache": lambda: DynamicCache(config=config),
        "H2O evicts half": lambda: evicting(config, "H2O", 0.5, RECENT),
        "SnapKV evicts half": lambda: evicting(config, "SnapKV", 0.5, RECENT),
        "the same half at 4 bits": lambda: LowBitCache(config, low_bits=4, **half),
        "the same half at 3 bits": lambda: LowBitCache(config, low_bits=3, **half),
        "the same half at 2 bits": lambda: LowBitCache(config, low_bits=2, **half),
        "20 % at 8 bits, 80 % at 2 bits": lambda: LowBitCache(config, recent=RECENT),
        "KIVI 2 bits": lambda: kivi(config, 2),
    }
    rows = {}
    for name, make in caches.items():
        rows[name] = accuracy(model, make, args.questions, args.lines, torch.Generator().manual_seed(1))
        print(f"{name:34} {rows[name]:.1%}", flush=True)
    print("written to", write("kv_retrieval", {"lines": args.lines, "questions": args.questions, "accuracy": rows}))


if __name__ == "__main__":
    main()
