"""lm-eval's tasks on a loaded model: a score a metric, and the value of each document behind it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lowbit.errors import BadRequest, LowBitError
from hf_lowbit.measure.paired import SEED, Aggregate, compare, interval_of

# lm-eval's own defaults, stated because a score depends on them.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        task, name, filter: as lm-eval calls them.
        values: a value per document, in the order of the documents.
        documents: what each document was: hashes of document, prompt and target.
        aggregate: values -> score.
        higher_is_better: which way the score points.
        score: lm-eval's.
    """

    task: str
    name: str
    filter: str
    values: list[Any]
    documents: list[tuple[str, ...]]
    aggregate: Aggregate
    higher_is_better: bool
    score: float


@dataclass(frozen=True)
class TaskRun:
    """What a model scored: ``metrics`` by task, and ``conditions`` that the scores depend on, as JSON values."""

    metrics: list[Metric]
    conditions: dict[str, Any]


class Tasks:
    """Tasks by name, found and their data read before any model is loaded.

    Args:
        names: of tasks, groups or tags.
        folder: where YAML files of further tasks are; names not there are looked up among lm-eval's own.

    Raises:
        BadRequest: lm-eval is not installed, an unknown name, or data that cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: str | Path | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise BadRequest(f"--tasks needs lm-eval ({error}): pip install 'hf-lowbit[eval]'.") from error
        if folder is not None and not list(Path(folder).glob("**/*.yaml")):
            raise BadRequest(f"{str(folder)!r} holds no task: a directory with lm-eval's YAML files was asked for.")
        self.names = list(names)
        places = {"include_path": str(folder)} if folder is not None else {}
        with _quiet():
            # Reading all of lm-eval's YAML files takes seconds, so only where the folder does not do.
            self.manager = TaskManager(include_defaults=False, **places)
            if not set(names) <= set(self.manager.all_tasks):
                self.manager = TaskManager(**places)
        for name in names:
            self._check_known(name)
        self._tasks = self._load()

    def _check_known(self, name: str) -> None:
        known = self.manager.all_tasks
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5))
            hint = f"Did you mean {near}?" if near else "`lm_eval ls tasks` lists lm-eval's, --tasks-dir DIR adds others."
            raise BadRequest(f"unknown task {name!r} among {len(known)}. {hint}")

    def _load(self) -> dict[str, Any]:
        try:
            with _quiet():
                return dict(self.manager.load(self.names)["tasks"])
        except LowBitError:
            raise
        except Exception as error:  # a task's own code, a data set's, or the network's
            raise BadRequest(f"the data of {', '.join(self.names)} cannot be had ({_said(error)}).") from error

    def run(self, model: Any, tokenizer: Any, limit: int | None = None, batch: int = 1, drawn: bool = False) -> TaskRun:
        """Score a causal LM in memory.

        Args:
            model, tokenizer: the host library's.
            limit: documents of each task, from its first on; None takes all.
            batch: requests a forward pass takes.
            drawn: whether lm-eval draws its progress on stderr.

        Raises:
            LowBitError: lm-eval failed on a task.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet(drawn):
            # Not simple_evaluate, which also asks pip and git about this machine, at length and on stderr.
            loaded = self.manager.load(self.names)
            _seed(loaded["tasks"].values())
            runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            try:
                found = evaluate(runner, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
            except LowBitError:
                raise
            except Exception as error:  # whatever a task's own code raises
                raise LowBitError(f"lm-eval failed ({_said(error)}).") from error
        metrics = [metric for name in self._tasks for metric in self._metrics(name, found)]
        return TaskRun(metrics, self._conditions(found, runner, limit, batch))

    def _metrics(self, name: str, found: dict[str, Any]) -> Iterator[Metric]:
        samples, task = found["samples"][name], self._tasks[name]
        for key, score in found["results"][name].items():
            metric, _, chosen = key.partition(",")
            rows = [row for row in samples if row["filter"] == chosen and metric in row]
            if not rows or metric not in task.aggregation():
                continue  # names, counts and standard errors
            rows.sort(key=lambda row: row["doc_id"])
            documents = [tuple(row[f"{part}_hash"] for part in ("doc", "prompt", "target")) for row in rows]
            values = [row[metric].item() if hasattr(row[metric], "item") else row[metric] for row in rows]  # numpy's, some
            better = bool(found["higher_is_better"][name].get(metric, True))
            yield Metric(name, metric, chosen, values, documents, task.aggregation()[metric], better, float(score))

    def _conditions(self, found: dict[str, Any], runner: Any, limit: int | None, batch: int) -> dict[str, Any]:
        tasks = {}
        for name in self._tasks:
            documents = [row["doc_hash"] for row in found["samples"][name]]
            tasks[name] = {
                "version": found["versions"][name],
                "num_fewshot": found["n-shot"][name],
                "documents": len(set(documents)),
                "documents_sha256": _digest(documents),
                "config_sha256": _digest(found["configs"][name]),
            }
        tokenizer = runner.tokenizer
        template = getattr(tokenizer, "chat_template", None)
        start = tokenizer("a").input_ids[:1]
        return {
            "tasks": tasks,
            "limit": limit,
            "batch_size": batch,
            "max_length": runner.max_length,
            "chat_template": {"applied": False, "sha256": _digest(template) if template else None},
            "add_bos": bool(start) and start[0] == tokenizer.bos_token_id,
            "prefix_token": runner.prefix_token_id,
            "seeds": {**SEEDS, "bootstrap_seed": SEED},
        }


def rows_of(ours: TaskRun, theirs: TaskRun | None = None) -> list[dict[str, Any]]:
    """A JSON row for each metric; with a reference's run, paired with it document by document.

    Raises:
        LowBitError: the two runs saw other documents or prompts.
    """
    others = {(metric.task, metric.name, metric.filter): metric for metric in theirs.metrics} if theirs else {}
    rows = []
    for metric in ours.metrics:
        row: dict[str, Any] = {"task": metric.task, "metric": metric.name, "filter": metric.filter}
        row |= {"documents": len(metric.values), "higher_is_better": metric.higher_is_better, "score": metric.score}
        row["score_interval"] = interval_of(metric.values, metric.aggregate)
        if theirs is not None:
            other = others.get((metric.task, metric.name, metric.filter))
            if other is None or other.documents != metric.documents:
                raise LowBitError(
                    f"{metric.task}: model and reference were not asked the same (documents, prompts or targets differ), so "
                    "their answers cannot be paired."
                )
            row |= compare(metric.values, other.values, metric.aggregate, metric.higher_is_better).to_json()
        rows.append(row)
    return rows


def _seed(tasks: Iterable[Any]) -> None:
    import numpy as np
    import torch

    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_random_seed"])
    torch.manual_seed(SEEDS["torch_random_seed"])
    for task in tasks:
        task.set_fewshot_seed(seed=SEEDS["fewshot_random_seed"])


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _quiet(drawn: bool = False) -> Iterator[None]:
    """Keep lm-eval's log and whatever tasks print off standard output, and its progress bars away unless ``drawn``."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            if not drawn:
                sink = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(sink))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield
    finally:
        log.setLevel(level)
