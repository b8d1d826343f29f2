"""Where the documents of these tasks come from: JSON-lines files of one directory, no network.

The directory is named by the environment variable ``HF_LOWBIT_TASK_DATA``.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets

VARIABLE = "HF_LOWBIT_TASK_DATA"


def load(file: str, spread: str | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The split ``test`` of one file.

    Args:
        file: its name.
        spread: field to sort by, so that the first documents are of every kind.

    Raises:
        FileNotFoundError: the variable is not set, or the file is not there.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise FileNotFoundError(f"set {VARIABLE} to the directory that holds {file}")
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {VARIABLE} must name the directory that holds {file}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if spread is not None:
        rows.sort(key=lambda row: row[spread])
    return {"test": datasets.Dataset.from_list(rows)}


def activities(rows: datasets.Dataset) -> datasets.Dataset:
    """HellaSwag as its task asks it: activity and context before four endings, without WikiHow's marks."""

    def cleaned(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    def question(row: dict[str, Any]) -> dict[str, Any]:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {"query": cleaned(query), "choices": [cleaned(e) for e in row["endings"]], "gold": int(row["label"])}

    return rows.map(question)
