"""Fine-tune a low-bit model with PEFT and the Trainer; offline on the embedded model unless told otherwise.

    python integrations/with_peft/finetune.py [--model DIR] [--bits 2] [--train FILE] [--text FILE] [--out DIR]
                                              [--init loftq|svfit|none] [--optimizer adamw_torch|adamw_8bit|...]

Everything but ``adapt`` is stock PEFT and Transformers; ``--init none`` does without it.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_lowbit import LowBitConfig
from hf_lowbit.demo import calibration_text, embedded_model, held_out_text
from hf_lowbit.measure import perplexity
from hf_lowbit.plugin.adapters import adapt

BITSANDBYTES = ("8bit", "bnb", "paged")


def tokens(tokenizer: Any, file: str, characters: int | None = None) -> torch.Tensor:
    """Token ids ``[n]`` of a text file."""
    text = Path(file).read_text(encoding="utf-8")[:characters]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def windows(ids: torch.Tensor, length: int) -> list[dict[str, torch.Tensor]]:
    """What the Trainer takes: pieces of ``length`` tokens, half overlapping, each its own label."""
    starts = range(0, max(1, len(ids) - length), length // 2)
    return [{"input_ids": ids[start : start + length], "labels": ids[start : start + length]} for start in starts]


def adapted(model: Any, config: LoraConfig, init: str, source: str) -> Any:
    """The model under its adapter, ready to train."""
    if init == "none":
        return get_peft_model(model, config)
    started = adapt(model, config, init=init, source=source)
    print(f"{init}: relative error of the adapted matrices {started.before:.4f} -> {started.after:.4f}")
    return started.model


def train(model: Any, data: list, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train an adapted model with the Trainer; returns its log."""
    if any(word in args.optimizer for word in BITSANDBYTES) and importlib.util.find_spec("bitsandbytes") is None:
        raise SystemExit(f"--optimizer {args.optimizer} needs bitsandbytes: pip install bitsandbytes, or use adamw_torch.")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=args.rate, seed=args.seed,
            lr_scheduler_type="cosine", warmup_steps=args.steps // 20, weight_decay=0.0, optim=args.optimizer,
            logging_steps=max(1, args.steps // 10), save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=settings, train_dataset=data)
        trainer.train()
    model.eval()
    return trainer.state.log_history


def parser() -> argparse.ArgumentParser:
    """Options of the recipe, with what works on the embedded model."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--model", default=str(embedded_model()), help="the original, dense")
    made.add_argument("--method", default="codebook")
    made.add_argument("--bits", type=int, default=2)
    made.add_argument("--train", default=str(calibration_text()))
    made.add_argument("--text", default=str(held_out_text()), help="held out, for the perplexity")
    made.add_argument("--characters", type=int, help="only so much of the training text")
    made.add_argument("--init", default="loftq", choices=["loftq", "svfit", "none"])
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--length", type=int, default=256, help="tokens of a training window")
    made.add_argument("--rate", type=float, default=1e-3)
    made.add_argument("--optimizer", default="adamw_torch", help="any of TrainingArguments, adamw_8bit of bitsandbytes too")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", help="save the adapter there, and the low-bit model it belongs to as OUT-base")
    return made


def main() -> None:
    """Quantize, adapt, train, say what it brought."""
    args = parser().parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = LowBitConfig(method=args.method, bits=args.bits)
    base = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, dtype=torch.float32)
    if args.out:
        base.save_pretrained(f"{args.out}-base")
        tokenizer.save_pretrained(f"{args.out}-base")
    held_out = tokens(tokenizer, args.text)
    print(f"{args.bits} bits: perplexity {perplexity(base, held_out).perplexity:.2f}")
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = adapted(base, lora, args.init, args.model)
    model.print_trainable_parameters()
    train(model, windows(tokens(tokenizer, args.train, args.characters), args.length), args)
    print(f"trained: perplexity {perplexity(model, held_out).perplexity:.2f}")
    if args.out:
        model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
