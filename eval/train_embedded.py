"""Train the small Llama-architecture model that ships in ``hf_lowbit/embedded``.

    python eval/train_embedded.py TRAIN.txt[.xz] VALIDATION.txt OUT --tokenizer DIR [--init DIR] [--tokens 40000000]

Reads plain text, trains with Muon on the matrices and AdamW on the rest, and writes OUT as a stock checkpoint in fp16
together with its held-out bits per byte (the training text must not hold the validation text). Without ``--init`` the
weights start random in the shape of the shipped model: 4 layers, width 256, MLP 768, 4 heads of 64 over 2 key-value
heads, tied head. Everything is seeded; a run continues from ``OUT/training.pt`` if it was interrupted.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WINDOW = 512
SAVE_EVERY = 250


def read_text(path: str) -> str:
    """A text file, decompressed if its name ends in .xz."""
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()


def encode(tokenizer, text: str, cache: Path) -> torch.Tensor:
    """Token ids of a text as int32, kept in ``cache`` since encoding 100 MB takes minutes."""
    if not cache.exists():
        pieces = [text[start : start + 200_000] for start in range(0, len(text), 200_000)]
        ids = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
        np.save(cache, np.concatenate([np.array(part, dtype=np.int32) for part in ids]))
    return torch.from_numpy(np.load(cache))


def new_model(tokenizer) -> LlamaForCausalLM:
    """The shipped architecture with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimizers(model, matrix_rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=matrix_rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.97), weight_decay=0.0)]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then linear decay to zero over the rest."""
    warm = max(1, steps // 50)
    return min(1.0, (step + 1) / warm) * (1 - step / steps)


@torch.no_grad()
def bits_per_byte(model, ids: torch.Tensor, n_bytes: int) -> float:
    """Held-out bits per UTF-8 byte over non-overlapping windows; each window's first token is not predicted."""
    model.eval()
    windows = ids[: len(ids) // WINDOW * WINDOW].long().view(-1, WINDOW)
    total = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=part).logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
        for part in windows.split(8)
    )
    model.train()
    per_token = total / (windows.numel() - len(windows))
    return per_token * len(ids) / n_bytes / math.log(2)


def main() -> None:
    """Train, report held-out bits per byte, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train")
    parser.add_argument("validation")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--init")
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--matrix-rate", type=float, default=4e-3)
    parser.add_argument("--other-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    text = read_text(args.validation)
    held_out = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    ids = encode(tokenizer, read_text(args.train), args.out / "train_ids.npy")
    model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else new_model(tokenizer)
    model.train()
    optims = optimizers(model, args.matrix_rate, args.other_rate)
    bases = [optim.param_groups[0]["lr"] for optim in optims]
    steps = args.tokens // (args.batch * WINDOW)
    order = torch.randperm(len(ids) // WINDOW, generator=torch.Generator().manual_seed(args.seed))
    resume, first = args.out / "training.pt", 0
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
    print(f"start {bits_per_byte(model, held_out, len(text.encode())):.4f} bits per byte, {steps} steps", flush=True)
    begun = time.time()
    for step in range(first, steps):
        picked = order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        batch = torch.stack([ids[i * WINDOW : (i + 1) * WINDOW] for i in picked.tolist()]).long()
        factor = rate_factor(step, steps)
        for optim, base in zip(optims, bases, strict=True):
            optim.param_groups[0]["lr"] = base * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        if step % 25 == 0:
            speed = (step - first + 1) * args.batch * WINDOW / (time.time() - begun)
            print(f"step {step} loss {loss.item():.4f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"step": step + 1, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optims]}
            torch.save(state, resume)
            model.eval()
            print(f"step {step + 1} held-out {bits_per_byte(model, held_out, len(text.encode())):.4f}", flush=True)
            model.train()
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
