"""Key-value lines planted in a long prompt: what is evicted cannot be answered, what is kept at few bits can.

    python eval/kv_retrieval.py [--lines 85] [--seconds 600] [--model DIR]

Trains a Llama of two layers on prompts of ``key value`` lines followed by questions, lines growing from few to many as it
answers (minutes on one core; ``--model`` keeps it for the next time), then asks one question about a random line behind each
prompt, with a half or four fifths of the cache evicted, or the same tokens kept at 4, 3 and 2 bits. A third of the tokens,
the values, is all that is ever asked for, and attention tells which: half can be spared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from kv_baselines import evicting, kivi
from results_file import write
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.utils import logging

from hf_lowbit.kv import LowBitCache

KEYS, VALUES = 96, 32
START, NEWLINE, FIRST_KEY = 0, 1, 2
FIRST_VALUE = FIRST_KEY + KEYS
LINE = 3  # tokens: key, value, newline
RECENT = 16
# Of training: tokens a step, most questions behind a prompt, the highest rate, steps of its fall to zero.
TOKENS, QUESTIONS, RATE, LAST = 1500, 16, 3e-3, 40


def prompts(count: int, lines: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids ``[count, 1 + 3 * lines]``, and keys and values ``[count, lines]`` of their lines."""
    keys = torch.rand(count, KEYS, generator=draw).argsort(-1)[:, :lines] + FIRST_KEY
    values = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUES, (count, lines), generator=draw)
    text = torch.stack([keys, values, torch.full_like(keys, NEWLINE)], -1).flatten(1)
    return torch.nn.functional.pad(text, (1, 0), value=START), keys, values


def losses(model: Any, lines: int, draw: torch.Generator) -> tuple[torch.Tensor, float]:
    """The loss of a batch, and the share of its questions that are answered.

    Two more terms show the way that two layers find by themselves only after thousands of steps: behind the first each value
    tells its key, and in the second a question attends to its value.
    """
    asked = min(QUESTIONS, 4 * lines)
    text, keys, values = prompts(max(16, TOKENS // (LINE * (lines + asked))), lines, draw)
    which = torch.randint(0, lines, (len(keys), asked), generator=draw)
    questions, answers = keys.gather(1, which), values.gather(1, which)
    behind = torch.stack([questions, answers, torch.full_like(which, NEWLINE)], -1).flatten(1)
    found = model(torch.cat([text, behind], 1), output_hidden_states=True, output_attentions=True)
    logits = found.logits[:, text.shape[1] :: LINE]
    looks = found.attentions[1][:, :, text.shape[1] :: LINE, 2 : text.shape[1] : LINE].mean(1)  # at values, by questions
    missed = -looks.gather(2, which[..., None]).clamp_min(1e-6).log().mean()
    early = model.lm_head(model.model.norm(found.hidden_states[1][:, 2 : text.shape[1] : LINE]))
    entropy = torch.nn.functional.cross_entropy
    loss = entropy(logits.flatten(0, 1), answers.flatten()) + entropy(early.flatten(0, 1), keys.flatten()) + missed
    return loss, float((logits.argmax(-1) == answers).float().mean())


def train(lines: int, seconds: float) -> Any:
    """A Llama that answers questions about that many lines."""
    config = LlamaConfig(
        vocab_size=FIRST_VALUE + VALUES, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    torch.manual_seed(0)
    model, draw = AutoModelForCausalLM.from_config(config, attn_implementation="eager"), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    begun, now, answered, step, left = time.process_time(), 4, 0.0, 0, LAST
    while left and time.process_time() - begun < seconds:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * left / LAST
        loss, right = losses(model, now, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, answered = step + 1, 0.9 * answered + 0.1 * right
        if now == lines and (answered > 0.95 or left < LAST):
            left -= 1
        elif answered > 0.9 and now < lines:
            now, answered = min(lines, now + max(2, now // 3)), 0.5
        if step % 25 == 0:
            spent = time.process_time() - begun
            print(f"step {step}, {now} lines: loss {loss.item():.3f}, {answered:.1%} answered, {spent:.0f} s", flush=True)
    model.set_attn_implementation("sdpa")
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, make: Any, questions: int, lines: int) -> float:
    """Share of questions answered, one behind each prompt."""
    right, draw = 0, torch.Generator().manual_seed(1)
    for _ in range(questions // 50):
        text, keys, values = prompts(50, lines, draw)
        asked = torch.randint(0, lines, (50, 1), generator=draw)
        cache = make()
        model(text, past_key_values=cache)
        answer = model(keys.gather(1, asked), past_key_values=cache).logits[:, -1].argmax(-1)
        right += int((answer == values.gather(1, asked)[:, 0]).sum())
    return right / (questions // 50 * 50)


def main() -> None:
    """Train, ask, write ``eval/results/kv_retrieval.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=85)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.model and args.model.exists():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    else:
        model = train(args.lines, args.seconds)
        if args.model:
            model.save_pretrained(args.model)
    config = model.config
    caches: dict[str, Any] = {"full cache": lambda: DynamicCache(config=config)}
    for word, share in (("half", 0.5), ("four fifths", 0.2)):
        for name in ("H2O", "SnapKV"):
            caches[f"{name} evicts {word}"] = lambda name=name, share=share: evicting(config, name, share, RECENT)
        for bits in (4, 3, 2):
            kept = {"low_bits": bits, "important": share, "recent": RECENT}
            caches[f"the same {word} at {bits} bits"] = lambda kept=kept: LowBitCache(config, **kept)
    caches["KIVI 2 bits"] = lambda: kivi(config, 2)
    rows = {}
    for name, make in caches.items():
        rows[name] = accuracy(model, make, args.questions, args.lines)
        print(f"{name:34} {rows[name]:.1%}", flush=True)
    print("written to", write("kv_retrieval", {"lines": args.lines, "questions": args.questions, "accuracy": rows}))


if __name__ == "__main__":
    main()
