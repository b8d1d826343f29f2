"""How much of what two bits cost an adapter wins back, and what each way to merge it costs.

    python eval/finetune.py [the options of integrations/with_peft/finetune.py] [--name NAME]

Runs that recipe, then merges the trained adapter in all three ways and measures each result as it comes from disk. The gap
is between the perplexities of the original and of the low-bit model on held-out text of the same kind; more than all of it
closed means that the text trained on was worth more than the bits. Several ``--init`` add to one result file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig
from results_file import RESULTS, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig, explain
from hf_lowbit.measure import perplexity
from hf_lowbit.plugin.adapters import merge_checkpoint
from hf_lowbit.plugin.adapters.merge import WAYS

RECIPE = Path(__file__).parents[1] / "integrations" / "with_peft" / "finetune.py"


def recipe() -> ModuleType:
    """The recipe that is measured."""
    spec = importlib.util.spec_from_file_location("with_peft_finetune", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(place: str, **settings: Any) -> Any:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **settings).eval()


def measured(model: Any, held_out: torch.Tensor, **more: Any) -> dict[str, Any]:
    """One row, printed."""
    row = {"perplexity": round(perplexity(model, held_out).perplexity, 3), **more}
    print(row, flush=True)
    return row


def run(tune: ModuleType, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Quantize, adapt, train, merge: name -> row."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held_out = tune.tokens(tokenizer, args.text)
    rows: dict[str, Any] = {"original": measured(load(args.model), held_out)}
    base = load(args.model, quantization_config=LowBitConfig(method=args.method, bits=args.bits))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    low = f"{args.bits} bits"
    rows[low] = measured(base, held_out, bits_per_weight=round(explain(base).bits_per_weight_linears, 3))
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tune.adapted(base, lora, args.init, args.model)
    counts = model.get_nb_trainable_parameters()[0]
    rows[f"{args.init}, before training"] = measured(model, held_out, trained=counts)
    begun = time.perf_counter()
    log = tune.train(model, tune.windows(tune.tokens(tokenizer, args.train, args.characters), args.length), args)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    rows[f"{args.init}, trained"] = measured(
        model, held_out, losses=losses, steps=args.steps, seconds=round(time.perf_counter() - begun)
    )
    model.save_pretrained(folder / "adapter")
    for how in WAYS:
        target = folder / how
        report = merge_checkpoint(str(folder / "base"), str(folder / "adapter"), target, how)
        merged = load(str(target))
        bits = 16.0 if how == "dense" else round(explain(merged).bits_per_weight_linears, 3)
        rows[f"{args.init}, merged, {how}"] = measured(
            merged, held_out, bits_per_weight=bits, error=report.error, update=report.update
        )
    gap = rows[low]["perplexity"] - rows["original"]["perplexity"]
    for row in rows.values():
        row["gap_closed"] = round((rows[low]["perplexity"] - row["perplexity"]) / gap, 3)
    return rows


def main() -> None:
    """Measure, print, write ``eval/results``."""
    tune = recipe()
    parser = tune.parser()
    parser.add_argument("--name", default="finetune_embedded")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    known = RESULTS / f"{args.name}.json"
    result = json.loads(known.read_text(encoding="utf-8"))["result"] if known.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        rows = run(tune, args, Path(folder))
    sources = {"model": Path(args.model).name, "train": Path(args.train).name, "text": Path(args.text).name}
    write(args.name, result | rows, sources)
    print(json.dumps({label: row["gap_closed"] for label, row in rows.items()}, indent=1))


if __name__ == "__main__":
    main()
