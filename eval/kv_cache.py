"""The KV cache measured: memory against its formula, fidelity beside other caches, decoding speed at long context.

    python eval/kv_cache.py --part fidelity --model DIR --text FILE [--windows 4] [--name NAME]
    python eval/kv_cache.py --part memory
    python eval/kv_cache.py --part speed --model DIR [--contexts 4096,16384] [--name NAME]

Fidelity: windows of held-out text as long as the model's context; a prompt of 128 tokens, then 8 at a time, each behind what
the cache kept of all before. KL is KL(DynamicCache || cache) in nats per token behind the prompt. Speed: caches are filled
with random keys and values (a prompt this long would take many minutes), then decoded in turn, one token of each a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from kv_baselines import bits_at, bits_per_element, evicting, kivi, quanto, rounded
from results_file import write
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, QuantizedCache
from transformers.utils import logging

from hf_lowbit.kv import CacheSettings, LowBitCache
from hf_lowbit.kv.report import formula

PROMPT, STEP = 128, 8
TWO, FOUR = ({"low_bits": bits, "important": 0.2} for bits in (2, 4))
MIXES: dict[str, dict[str, Any]] = {
    "5 % int8, 95 % int3 (default)": {},
    "20 % int8, 80 % int2": TWO,
    "20 % int8, 80 % int4": FOUR,
    "20 % int8, 30 % int4, 50 % int2": {"tiers": ((4, 0.3), (2, 0.5))},
}


def rivals(config: Any, recent: int) -> dict[str, Any]:
    """Every cache of the fidelity table by its name."""
    alone = {"important": 0.0, "sinks": 0}
    old = {"center": False, "fit": "search", "decay": 1.0}
    ours = {
        "high 8 / low 8": {"low_bits": 8},
        "high 8 / low 4, 20 %": FOUR,
        "high 8 / low 3, 20 %": {"low_bits": 3, "important": 0.2},
        "high 8 / low 3, 5 % (default)": {},
        "high 8 / low 2, 20 %": TWO,
        "high 8 / keys 3, values 2, 10 %": {"low_bits": (3, 2), "important": 0.1},
        "high 8 / keys 4, values 2, 20 %": {"low_bits": (4, 2), "important": 0.2},
        "no important tokens, low 4": alone | {"low_bits": 4},
        "no important tokens, low 3": alone | {"low_bits": 3},
        "no important tokens, low 2": alone | {"low_bits": 2},
        "low 2, 20 %, not centred": {"low_bits": 2, "important": 0.2, "center": False},
        "low 2, 20 %, all queries alike": {"low_bits": 2, "important": 0.2, "decay": 1.0},
        "low 2, 20 %, values by search": {"low_bits": 2, "important": 0.2, "fit": "search"},
        "low 2, 20 %, none of these": {"low_bits": 2, "important": 0.2} | old,
        "low 2, 20 %, rotated": {"low_bits": 2, "important": 0.2, "hadamard": True},
        "low 2, 20 %, keys by token": {"low_bits": 2, "important": 0.2, "key_format": "token"},
    }
    out = {name: lambda s=s: LowBitCache(config, recent=recent, **s) for name, s in ours.items()}
    out |= {f"uniform {bits} bits by token": lambda bits=bits: rounded(config, bits) for bits in (4, 3, 2)}
    out |= {f"KIVI {bits} bits": lambda bits=bits: kivi(config, bits) for bits in (4, 3, 2)}
    for residual in (recent, 128):
        for bits in (4, 2):
            name = f"QuantizedCache quanto {bits} bits, {residual} newest"
            out[name] = lambda bits=bits, residual=residual: quanto(config, bits, residual)
    out |= {f"{name} evicts 50 %": lambda name=name: evicting(config, name, 0.5, recent) for name in ("H2O", "SnapKV")}
    return out


def held_out(model: str, text: Path, length: int, count: int) -> torch.Tensor:
    """Windows of a text or of the texts of a JSON-lines file, spread over it: ``[count, length]``."""
    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=1 << 30)
    whole = text.read_text(encoding="utf-8")
    if text.suffix == ".jsonl":
        whole = "\n".join(json.loads(line)["text"] for line in whole.splitlines())
    ids = tokenizer(whole[:400_000], add_special_tokens=False, return_tensors="pt").input_ids[0]
    ids = ids[len(ids) % length :].view(-1, length)
    return ids[:: max(1, len(ids) // count)][:count]


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Of every token behind the prompt, ``[windows, tokens, vocabulary]``."""
    model(ids[:, :PROMPT], past_key_values=cache)
    steps = range(PROMPT, ids.shape[1], STEP)
    return torch.cat([model(ids[:, at : at + STEP], past_key_values=cache).logits for at in steps], 1).log_softmax(-1)


def fidelity(args: argparse.Namespace) -> dict[str, Any]:
    """A row for each cache."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    length = args.length or model.config.max_position_embeddings
    ids = held_out(args.model, args.text, length, args.windows)
    true = log_probabilities(model, ids, DynamicCache(config=model.config))
    rows = {}
    for name, make in rivals(model.config, args.recent).items():
        if args.only and not name.startswith(tuple(args.only.split(","))):
            continue
        cache = make()
        found = log_probabilities(model, ids, cache)
        divergence = torch.nn.functional.kl_div(found, true, log_target=True, reduction="none").sum(-1)
        rows[name] = {
            "bits_per_element": round(bits_per_element(cache, length, model.config, len(ids)), 3),
            "bits_at_4096_tokens": round(bits_at(cache, 4096, model.config.head_dim), 3),
            "kl": float(divergence.mean()),
            "kl_of_the_first_half": float(divergence[:, : divergence.shape[1] // 2].mean()),
            "top1_agreement": float((found.argmax(-1) == true.argmax(-1)).float().mean()),
        }
        print(f"{name:40} {rows[name]['bits_per_element']:6.2f} bits ({rows[name]['bits_at_4096_tokens']:.2f} at 4,096)  "
              f"KL {rows[name]['kl']:.2e}  top-1 {rows[name]['top1_agreement']:.4f}", flush=True)  # fmt: skip
    return {"context": length, "windows": len(ids), "prompt": PROMPT, "recent": args.recent, "rows": rows}


def fill(cache: Any, config: Any, tokens: int, dtype: torch.dtype) -> None:
    """Put random keys and values of unequal channels into every layer, the same in all."""
    heads, dim = config.num_key_value_heads, config.head_dim
    draw = torch.Generator().manual_seed(0)
    spread = 1 + 3 * torch.rand(dim, generator=draw)
    keys = (torch.randn(1, heads, tokens, dim, generator=draw) * spread).to(dtype)
    values = torch.randn(1, heads, tokens, dim, generator=draw).to(dtype)
    first = cache.layers[0]
    first.update(keys, values)
    if isinstance(cache, LowBitCache):
        queries = torch.randn(1, config.num_attention_heads, tokens, dim, generator=draw).to(dtype)
        first.attend(queries, None, dim**-0.5, first, lambda k, v: v.transpose(1, 2))
        first._owner = None
    if isinstance(cache, QuantizedCache):  # its tensors cannot be copied
        for layer in cache.layers[1:]:
            layer.update(keys, values)
        return
    cache.layers[1:] = [copy.deepcopy(first) for _ in cache.layers[1:]]


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Measured bits per element against the formula, at 4,096 tokens and 8 heads of keys."""
    rows = {}
    for dim in (64, 128):
        for tokens in (4096, 16384):
            config = LlamaConfig(num_hidden_layers=1, num_key_value_heads=8, num_attention_heads=8, head_dim=dim)
            config.max_position_embeddings = 1 << 20
            for name, kwargs in MIXES.items():
                cache = LowBitCache(config, **kwargs)
                fill(cache, config, tokens, torch.bfloat16)
                cache.layers[0].update(*torch.zeros(2, 1, 8, 1, dim, dtype=torch.bfloat16))
                found, wanted = cache.report().bits, formula(CacheSettings(**kwargs), dim, tokens + 1, 2)
                rows[f"{name}, heads of {dim}, {tokens} tokens"] = {
                    "bits_per_element": found, "formula": wanted, "off": found / wanted - 1, "of_fp16": found / 16,
                }  # fmt: skip
                print(f"{name:34} {dim:4} {tokens:6}  {found:.3f} bits, formula {wanted:.3f} ({found / wanted - 1:+.2%}), "
                      f"{found / 16:.1%} of fp16", flush=True)  # fmt: skip
    return rows


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a token of each cache, all in turn."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    config = model.config
    config.max_position_embeddings = 1 << 20
    rows: dict[str, Any] = {}
    for context in [int(word) for word in args.contexts.split(",")]:
        makers = {
            "DynamicCache float32": lambda: DynamicCache(config=config),
            "high 8 / low 3, 5 % (default)": lambda: LowBitCache(config),
            "high 8 / low 2, 20 %": lambda: LowBitCache(config, **TWO),
            "high 8 / low 4, 20 %": lambda: LowBitCache(config, **FOUR),
            "QuantizedCache quanto 4 bits": lambda: quanto(config, 4),
        }
        if args.only:
            makers = {name: make for name, make in makers.items() if name.startswith(tuple(args.only.split(",")))}
        caches = {name: make() for name, make in makers.items()}
        for cache in caches.values():
            fill(cache, config, context, torch.float32)
        times: dict[str, list[float]] = {name: [] for name in caches}
        token = torch.tensor([[5]])
        with torch.no_grad():
            for _ in range(args.rounds + 1):
                for name, cache in caches.items():
                    begun = time.perf_counter()
                    model(token, past_key_values=cache)
                    times[name].append(time.perf_counter() - begun)
        rivals = {name: statistics.median(times[name][1:]) for name in caches if name.startswith(("Dyn", "Quant"))}
        for name, cache in caches.items():
            middle = statistics.median(times[name][1:])
            bits = bits_per_element(cache, context, config)
            rows[f"{context} tokens, {name}"] = {
                "ms_per_token": 1000 * middle,
                "bits": bits,
                **{f"times {rival}": rival_time / middle for rival, rival_time in rivals.items()},
            }
            ratios = ", ".join(f"{rival_time / middle:.2f} x {rival}" for rival, rival_time in rivals.items())
            print(f"{context:6} {name:32} {1000 * middle:8.1f} ms a token, {ratios}", flush=True)
    return rows


def main() -> None:
    """Measure one part and write ``eval/results/kv_PART....json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=["fidelity", "memory", "speed"], required=True)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, help="tokens of a window, the model's context by default")
    parser.add_argument("--recent", type=int, default=32)
    parser.add_argument("--contexts", default="4096,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="caches whose names start with one of these words")
    parser.add_argument("--name")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    result = {"fidelity": fidelity, "memory": memory, "speed": speed}[args.part](args)
    print("written to", write(args.name or f"kv_{args.part}", result))


if __name__ == "__main__":
    main()
