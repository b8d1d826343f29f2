"""Every way of generating with the low-bit cache at 8 bits, token by token beside the host's DynamicCache.

    python eval/kv_generation.py --model DIR --text FILE [--prompts 4] [--tokens 32] [--name NAME]

Each mode continues the same prompts of held-out text twice. Counted are the prompts whose tokens are all the same, and
the tokens before the first difference.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from kv_cache import held_out
from results_file import write
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from hf_lowbit.kv import LowBitCache

PROMPT, PADDING, TURN = 160, 24, 16
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam search": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "assisted": {},
    "left padding": {},
    "continued": {},
}


def assistant_of(model: Any) -> Any:
    """The model with some noise on its weights: most of its drafts are right."""
    draw = torch.Generator().manual_seed(0)
    out = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=draw)
    return out


def generated(model: Any, prompt: torch.Tensor, mode: str, cache: Any, tokens: int, assistant: Any) -> torch.Tensor:
    """What a mode says behind a prompt ``[1, n]``."""
    kwargs = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": tokens} | MODES[mode]
    torch.manual_seed(6)
    if mode == "assisted":
        kwargs["assistant_model"] = assistant
    if mode == "left padding":
        prompt = torch.nn.functional.pad(prompt, (PADDING, 0)).repeat(2, 1)
        prompt[1, :PADDING] = prompt[1, -PADDING:]
        mask = torch.ones_like(prompt)
        mask[0, :PADDING] = 0
        return model.generate(prompt, attention_mask=mask, past_key_values=cache, **kwargs)
    if mode == "continued":
        half = prompt.shape[1] // 2
        said = model.generate(prompt[:, :half], past_key_values=cache, **kwargs | {"max_new_tokens": TURN})
        prompt = torch.cat([said, prompt[:, half:]], 1)
    return model.generate(prompt, past_key_values=cache, **kwargs)


def main() -> None:
    """Generate, compare, write ``eval/results/kv_generation....json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--name", default="kv_generation")
    args = parser.parse_args()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    assistant = assistant_of(model)
    ids = held_out(args.model, args.text, PROMPT, args.prompts)
    rows = {}
    for mode in MODES:
        same, before, total = 0, 0, 0
        for prompt in ids[:, None]:
            caches = DynamicCache(config=model.config), LowBitCache(model.config, low_bits=8, recent=32)
            true, ours = (generated(model, prompt, mode, cache, args.tokens, assistant) for cache in caches)
            width = min(true.shape[1], ours.shape[1])
            equal = (true[:, :width] == ours[:, :width]).cumprod(1).sum(1) - (true.shape[1] - args.tokens)
            same += int(true.shape == ours.shape and torch.equal(true, ours))
            before += int(equal.clamp_min(0).sum())
            total += true.shape[0] * args.tokens
        rows[mode] = {"prompts": len(ids), "all_tokens_equal": same, "tokens_before_a_difference": before / total}
        print(f"{mode:18} {same} of {len(ids)} the same, {before / total:.1%} of the tokens before a difference", flush=True)
    print("written to", write(args.name, {"prompt": PROMPT, "tokens": args.tokens, "modes": rows}))


if __name__ == "__main__":
    main()
