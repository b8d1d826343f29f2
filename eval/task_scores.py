"""Task scores of one small model at 4, 3 and 2 bits, document by document beside the original.

    python eval/task_scores.py --data DIR [--model DIR] [--tasks A,B] [--limit 100] [--batch 16] [--only LABEL] [--name NAME]
    python eval/task_scores.py --show NAME

``--data`` holds the JSON-lines files that the tasks of ``eval/tasks/`` name (``HF_LOWBIT_TASK_DATA`` does the same). Without
``--model`` it is the model embedded in the package; ``--show`` prints a result as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from results_file import RESULTS, write

from hf_lowbit.demo import embedded_model
from hf_lowbit.measure.tasks import Tasks, rows_of
from hf_lowbit.plugin import LowBitConfig
from hf_lowbit.plugin.checkpoint import quantize_checkpoint, read_contents
from hf_lowbit.plugin.evaluate import Setting, checked, run_model

FOLDER = Path(__file__).with_name("tasks")
RECIPES = [*[(f"codebook {bits} bits", "codebook", bits) for bits in (4, 3, 2)], ("rtn 2 bits", "rtn", 2)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of every recipe, the original's answers given once."""
    if args.data:
        os.environ["HF_LOWBIT_TASK_DATA"] = args.data
    tasks, how = Tasks(args.tasks.split(","), FOLDER), Setting(limit=args.limit, batch=args.batch)
    theirs, manifest = run_model(tasks, args.model, how)
    result: dict[str, Any] = {"original": {"tasks": checked(rows_of(theirs)), "manifest": manifest}}
    if args.only and (RESULTS / f"{args.name}.json").exists():
        result = json.loads((RESULTS / f"{args.name}.json").read_text(encoding="utf-8"))["result"] | result
    for label, method, bits in RECIPES:
        if not label.startswith(args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "model"
            quantize_checkpoint(args.model, made, LowBitConfig(method=method, bits=bits))
            size = read_contents(made).bits_per_weight_model
            ours, manifest = run_model(tasks, str(made), how)
        rows = checked(rows_of(ours, theirs))
        result[label] = {"bits_per_weight_model": round(size, 4), "tasks": rows, "manifest": manifest}
        print(label, "done", flush=True)
    order = ["original", *(label for label, _, _ in RECIPES)]
    return dict(sorted(result.items(), key=lambda item: order.index(item[0])))


def markdown(result: dict[str, Any]) -> str:
    """A line per metric: the original's score, then each recipe's with its difference's 95 % interval and McNemar's p."""
    labels = [label for label in result if label != "original"]
    lines = ["| task, metric (documents) | original | " + " | ".join(labels) + " |", "|---|---:|" + "---:|" * len(labels)]
    for number, row in enumerate(result["original"]["tasks"]):
        cells = [cell(result[label]["tasks"][number]) for label in labels]
        name = f"{row['task'].removeprefix('local_')}, {row['metric']} ({row['documents']})"
        lines.append(f"| {name} | {score(row['score'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """Score, interval of the difference, p-value."""
    low, high = row["interval"]
    p = "" if row["p_value"] is None else f", p {row['p_value']:.2g}"
    return f"{score(row['score'])} ({score(low, '+')} to {score(high, '+')}{p})"


def score(value: float, sign: str = "") -> str:
    """Three decimals for shares, none for perplexities."""
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign},.0f}"


def main() -> None:
    """Measure, write ``eval/results``, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--data")
    parser.add_argument("--tasks", default="local")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", default="", help="one recipe's label; adds to the result")
    parser.add_argument("--name", default="tasks")
    parser.add_argument("--show", metavar="NAME")
    args = parser.parse_args()
    if args.show:
        print(markdown(json.loads((RESULTS / f"{args.show}.json").read_text(encoding="utf-8"))["result"]))
        return
    result = measure(args)
    print("written to", write(args.name, result, {"model": Path(args.model).name}))
    print(markdown(result))


if __name__ == "__main__":
    main()
