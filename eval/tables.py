"""Print the result files of ``eval/results`` as the Markdown tables of the READMEs.

python eval/tables.py quality_books4m memory import_time
"""

from __future__ import annotations

import json
import sys
from typing import Any

from results_file import RESULTS

COLUMNS = {
    "bits_per_weight": ("bits/weight", "{:.3f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "kl": ("KL (nats/token)", "{:.5f}"),
    "top1_agreement": ("top-1", "{:.4f}"),
    "quantize_seconds": ("seconds", "{:.1f}"),
    "seconds": ("seconds", "{:.1f}"),
    "peak_mb": ("peak anonymous MB", "{}"),
    "after_mb": ("anonymous MB after", "{}"),
    "tensors_mb": ("tensors MB", "{}"),
    "median_s": ("median s", "{:.3f}"),
    "min_s": ("least s", "{:.3f}"),
    "gap_closed": ("gap closed", "{:.1%}"),
    "error": ("relative error of the merge", "{:.1e}"),
}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """One line per row; a value a row lacks stays empty."""
    present = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = ["| | " + " | ".join(COLUMNS[key][0] for key in present) + " |", "|---|" + "---:|" * len(present)]
    for label, row in rows.items():
        cells = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in present]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print every result file named on the command line."""
    for name in sys.argv[1:]:
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        print(f"`{content['command']}` on {content['machine']}; {content['versions']}\n\n{markdown(content['result'])}\n")


if __name__ == "__main__":
    main()
