"""Puts the tables of ``eval/results/detection_*.json`` into docs/detecting.md and eval/README.md, between their markers.

python eval/detection_tables.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from results_file import RESULTS

ROOT = Path(__file__).parents[1]
SHOWN = ("spot", "log_rank", "lrr", "likelihood", "entropy", "fast_detectgpt", "binoculars")
LENGTHS = (20, 40, 60, 80, 100, 140, 200)


def result(name: str) -> dict[str, Any]:
    """The rows of a result file; empty where there is none."""
    path = RESULTS / f"detection_{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else {}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), *("| " + " | ".join(r) + " |" for r in rows)]
    )


def by_length(name: str) -> str:
    """AUROC and, in brackets, TPR at 1 % FPR of SPOT and the default score, by decoding and length."""
    rows, found = [], result(name)
    for how in ("greedy", "T=0.7", "top-k 50", "top-p 0.9", "T=0.9", "T=1.0"):
        for score in ("spot", "fast_detectgpt"):
            cells = [found[f"{how}, {n} tokens"][score] for n in LENGTHS]
            rows.append([f"{how}, {score}", *(f"{c['auroc'][0]:.3f} ({c['tpr_1'][0]:.2f})" for c in cells)])
    return table(["AUROC (TPR at 1 % FPR)", *(f"{n} tokens" for n in LENGTHS)], rows)


def by_bits(name: str) -> str:
    """AUROC at 200 tokens by the detector's bits."""
    found, rows = result(name), []
    kinds = ("greedy", "T=0.7", "T=0.9", "T=1.0")
    for bits in (32, 8, 4, 3, 2):
        for score in ("spot", "fast_detectgpt"):
            cells = [found[f"{how}, {bits} bits"][score] for how in kinds]
            first = cells[0]
            more = [f"{first['spearman']:.3f}", f"{100 * first['fpr_at_old_threshold']:.1f} %"]
            rows.append([f"{bits} bits, {score}", *(f"{c['auroc'][0]:.3f}" for c in cells), *more])
    for bits in (4, 3, 2):
        cells = [found[f"{how}, pair with {bits} bits"]["binoculars"] for how in kinds]
        rows.append([f"pair with {bits} bits, binoculars", *(f"{c['auroc'][0]:.3f}" for c in cells), "", ""])
    return table(["AUROC, 200 tokens", *kinds, "rank correlation with 32 bits", "FPR at the 32-bit threshold"], rows)


def edits(name: str) -> str:
    """AUROC by edit."""
    rows = []
    for label, row in result(name).items():
        rows.append([label, *(f"{row[s]['auroc'][0]:.3f}" for s in SHOWN if s in row)])
    return table(["AUROC", *(s for s in SHOWN if s != "binoculars")], rows)


def false_positives(name: str) -> str:
    """Realised FPR with its interval, and how many texts got no verdict."""
    rows = []
    for label, row in result(name).items():
        cells = []
        for score in ("spot", "fast_detectgpt"):
            rate, low, high = (100 * value for value in row[score]["fpr"])
            judged = row[score]["judged"]
            cells.append(f"{rate:.2f} % ({low:.2f} to {high:.2f})" if judged else "")
        first = row["fast_detectgpt"]
        rows.append([label, *cells, str(first["judged"]), str(first["outside"])])
    return table(["flagged at 1 %", "spot", "fast_detectgpt", "judged", "abstained"], rows)


def cross(name: str) -> str:
    """AUROC of every row and score."""
    rows = [[label, *(f"{row[s]['auroc'][0]:.3f}" for s in SHOWN)] for label, row in result(name).items()]
    return table(["AUROC", *SHOWN], rows)


def averages(name: str) -> str:
    """AUROC averaged over the rows of each detector and dataset, and over all."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for label, row in result(name).items():
        detector, rest = label.split(": ", 1)
        kind = re.sub(r", .*\(", " (", rest) if "(" in rest else re.sub(r", .*", "", rest)
        groups[f"{detector}: {kind}"].append(row)
        groups["average of all rows"].append(row)
    groups["average of all rows"] = groups.pop("average of all rows")
    rows = []
    for label, found in groups.items():
        means = {s: sum(row[s]["auroc"][0] for row in found) / len(found) for s in SHOWN}
        rows.append([f"{label} ({len(found)})", *(f"{means[s]:.3f}" for s in SHOWN)])
    return table(["mean AUROC (rows)", *SHOWN], rows)


def speed(name: str) -> str:
    """Tokens per second and memory."""
    found = dict(result(name))
    memory = found.pop("memory", {})
    rows = [
        [place, *(f"{row[f'{kind}, tokens/s']:,.0f} ({row[f'{kind}, of plain']:.2f}x)" for kind in KINDS)]
        for place, row in found.items()
    ]
    peaks = "; ".join(f"{label} {value:,.0f}" for label, value in memory.items())
    return table(["tokens/s", *KINDS], rows) + f"\n\nOne text of {peaks}."


KINDS = ("plain", "texts of 120 tokens", "one long text")
TABLES = {
    "by-length": (by_length, "own_embedded"),
    "by-bits": (by_bits, "bits_embedded"),
    "edits": (edits, "edits_embedded"),
    "false-positives": (false_positives, "calibration_embedded"),
    "cross": (cross, "cross_books4m"),
    "averages": (averages, "cross_books4m"),
    "speed": (speed, "speed_embedded"),
}


def main() -> None:
    """Fill every ``<!-- detection NAME -->`` block of the two files whose result is there."""
    for file in (ROOT / "docs" / "detecting.md", ROOT / "eval" / "README.md"):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- detection (\S+) -->", text):
            make, source = TABLES[name]
            if result(source):
                begin, end = f"<!-- detection {name} -->", f"<!-- end {name} -->"
                before, rest = text.split(begin, 1)
                text = f"{before}{begin}\n{make(source)}\n{end}{rest.split(end, 1)[1]}"
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
