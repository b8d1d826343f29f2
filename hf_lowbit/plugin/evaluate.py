"""Scores of a checkpoint beside its reference's, with a manifest of everything that changes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lowbit.errors import LowBitError
from hf_lowbit.measure.paired import RESAMPLES
from hf_lowbit.measure.tasks import TaskRun, Tasks, rows_of
from hf_lowbit.plugin.checkpoint import load_model, load_tokenizer
from hf_lowbit.plugin.identity import checkpoint_identity, circumstances, weights_fingerprint
from hf_lowbit.plugin.quantizer import LowBitQuantizer, record_of


@dataclass(frozen=True)
class Setting:
    """How models are scored.

    Attributes:
        limit: documents of each task, from its first on; None takes all.
        batch: requests a forward pass takes.
        dtype, device: of the arithmetic.
        drawn: whether progress is drawn on stderr.
    """

    limit: int | None = None
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    drawn: bool = False


def evaluate_tasks(
    source: str, names: Sequence[str], folder: str | None = None, reference: str | None = None, how: Setting | None = None
) -> dict[str, Any]:
    """Score a checkpoint on lm-eval tasks, and its reference on the same documents; one of them in memory at a time.

    Args:
        source, reference: directories or Hub ids.
        names, folder: see :class:`~hf_lowbit.measure.tasks.Tasks`.
        how: limits, batches and arithmetic.

    Returns:
        ``tasks``, a row for each metric, and ``manifest``.

    Raises:
        BadRequest: an unknown task, data that cannot be had, or nothing to load.
        LowBitError: a task failed, or a score is not finite.
    """
    tasks = Tasks(names, folder)
    ours, manifest = run_model(tasks, source, how or Setting())
    theirs = None
    if reference is not None:
        theirs, other = run_model(tasks, reference, how or Setting())
        manifest["reference"] = other["model"] | {"tokenizer": other["tokenizer"]}
    return {"tasks": checked(rows_of(ours, theirs)), "manifest": manifest}


def run_model(tasks: Tasks, source: str, how: Setting) -> tuple[TaskRun, dict[str, Any]]:
    """Score one checkpoint; returns the run and its manifest."""
    tokenizer = load_tokenizer(source)
    model = load_model(source, how.dtype, how.device)
    run = tasks.run(model, tokenizer, how.limit, how.batch, how.drawn)
    return run, manifest_of(source, model, tokenizer) | {"resamples": RESAMPLES} | run.conditions


def checked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, if all their scores are numbers.

    Raises:
        LowBitError: naming the first that is not.
    """
    for row in rows:
        if not all(math.isfinite(row.get(key, 0.0)) for key in ("score", "reference")):
            raise LowBitError(f"{row['task']}: {row['metric']} is not finite: the logits are broken. Check the weights.")
    return rows


def manifest_of(source: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Which model was measured, and under what."""
    return {"model": _model(source, model), **circumstances(model, tokenizer)}


def text_manifest(source: str, file: str, text: str, window: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The manifest of a measurement on a text: also which text, and how it was cut."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    about = {"file": Path(file).name, "sha256": digest, "characters": len(text), "window": window}
    return manifest_of(source, model, tokenizer) | {"text": about}


def _model(source: str, model: Any) -> dict[str, Any]:
    found = {"name": named(source), "revision": getattr(model.config, "_commit_hash", None)}
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, LowBitQuantizer):
        return found | {"sampled_weights": weights_fingerprint(model)}
    config = quantizer.quantization_config
    made = {"method": config.method, "bits": config.bits, "group_size": config.group_size, "kv_cache": config.kv_cache}
    return found | made | checkpoint_identity(record_of(model, {}, quantizer.steps))


def named(source: str) -> str:
    """A Hub id as it is, of a directory only its name: paths of a machine say nothing to others."""
    return Path(source).resolve().name if Path(source).exists() else source


COLUMNS = ("task", "metric", "documents", "score", "reference", "recovery", "difference", "95 % interval", "McNemar p")


def table(rows: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and cells; without a reference, the score's own interval."""
    if "reference" not in rows[0]:
        cells = [[*_named(row), _number(row["score"]), _interval(row["score_interval"])] for row in rows]
        return (*COLUMNS[:4], COLUMNS[7]), cells
    return COLUMNS, [
        [
            *_named(row),
            _number(row["score"]),
            _number(row["reference"]),
            "" if row["recovery"] is None else f"{row['recovery']:.1f} %",
            _number(row["difference"], sign=True),
            _interval(row["interval"], sign=True),
            "" if row["p_value"] is None else f"{row['p_value']:.3g}",
        ]
        for row in rows
    ]


def _named(row: dict[str, Any]) -> list[str]:
    name = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
    return [row["task"], name, str(row["documents"])]


def _number(value: float, sign: bool = False) -> str:
    digits = 4 if abs(value) < 10 else 1
    return f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"


def _interval(pair: tuple[float, float] | None, sign: bool = False) -> str:
    return "" if pair is None else f"{_number(pair[0], sign)} to {_number(pair[1], sign)}"
