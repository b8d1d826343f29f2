"""Block sizes measured on this card: what ``hf-lowbit bench --tune`` and ``eval/gpu.py --tune`` do.

Every candidate multiplies the same activations by all matrices of a layout one after another in a CUDA graph, so that no
cache holds what comes next. One that gives another product than the rule, or does not compile, is passed over; the fastest
is written down at once, so that a run that is broken off has not been for nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.kernels import triton_configs
from hf_lowbit.kernels.triton_backend import Prepared, Triton
from hf_lowbit.kernels.triton_configs import Config
from hf_lowbit.kernels.triton_plan import plan

# Share of the largest output by which sums in another order may differ in 16 bits.
SAME = 2e-2
Job = Callable[[], Any]
Clock = Callable[[Sequence[Job], float], float]


class Tuned(NamedTuple):
    """What was found for a product: its key, the best choice, seconds by it and by the rule, and candidates passed over."""

    key: str
    config: Config
    seconds: float
    rule_seconds: float
    failed: int


def captured(job: Job) -> Job:
    """The job as a CUDA graph, after two runs that compile what it needs."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            job()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def median_seconds(job: Job, seconds: float) -> float:
    """Median time of the job by the device's clock."""
    job()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        job()
        done.record()
        done.synchronize()
        times.append(begun.elapsed_time(done) / 1e3)
    return statistics.median(times)


def in_turn(jobs: Sequence[Job], seconds: float) -> float:
    """Median seconds of one of the jobs, run one after another in one CUDA graph."""
    return median_seconds(captured(lambda: [job() for job in jobs]), seconds) / len(jobs)


def candidates(batch: int) -> list[Config]:
    """Block sizes worth a try."""
    if batch == 1:
        cut = itertools.product((4, 8, 16, 32), (512, 1024, 2048), (1, 2, 4, 8))
        return [Config(1, n, k, warps, 1, 1) for n, k, warps in cut if 1 <= n // warps <= 8]
    rows, splits = ((16,), (1, 4)) if batch <= 16 else ((128, 256), (1,))
    cuts = itertools.product(rows, (32, 64, 128), (64, 128, 256), (2, 4, 8), (2, 3), splits)
    return [Config(*cut) for cut in cuts]


def tune(
    matrices: Sequence[Prepared],
    batches: Sequence[int],
    dtype: torch.dtype,
    seconds: float,
    file: Path,
    tell: Callable[[str], None] = lambda text: None,
    clock: Clock = in_turn,
) -> list[Tuned]:
    """Find block sizes for matrices of one term, all on one device, and keep them in a file under the card's name.

    Args:
        batches: rows of activations.
        seconds: of a measurement.
        tell: told what was found.
        clock: seconds of one of several jobs.
    """
    out = []
    device = matrices[0].tensors[0].device
    name, multiprocessors = triton_configs.card(device)
    layouts = [text for text in dict.fromkeys(one.layout for one in matrices) if plan(text).simple]
    for text, batch in itertools.product(layouts, batches):
        stage, columns = plan(text).stages[0], plan(text).columns
        x = torch.randn(batch, columns, dtype=dtype, device=device)
        key, rule = triton_configs.key(stage, columns, batch), triton_configs.rule(stage, columns, batch, multiprocessors)
        found = _best(key, x, [one for one in matrices if one.layout == text], rule, seconds, clock)
        _keep(file, name, found)
        out.append(found)
        faster = found.rule_seconds / found.seconds
        tell(
            f"{found.key}: {found.config}, {found.seconds * 1e6:.1f} us, {faster:.2f}x the rule; {found.failed} did not run"
        )
    triton_configs.measured.cache_clear()
    return out


def _best(key: str, x: Tensor, matrices: list[Prepared], rule: Config, seconds: float, clock: Clock) -> Tuned:
    backend = Triton()
    jobs: list[Job] = [lambda one=one: backend.linear(x, one) for one in matrices]  # type: ignore[misc]
    with triton_configs.forced(rule):
        expected, least = jobs[0](), clock(jobs, seconds)
    best, rule_seconds, failed = rule, least, 0
    for config in candidates(x.shape[0]):
        with triton_configs.forced(config):
            try:
                off = (jobs[0]() - expected).abs().max()
                took = clock(jobs, seconds) if off <= SAME * expected.abs().max() else float("inf")
            except Exception:  # too much shared memory, mostly; a compiler's errors are of any class
                took = float("inf")
        failed += took == float("inf")
        best, least = (config, took) if took < least else (best, least)
    return Tuned(key, best, least, rule_seconds, failed)


def _keep(file: Path, name: str, found: Tuned) -> None:
    """Add a choice to a file, which is whole at any moment."""
    table = triton_configs.read(file)
    table.setdefault(name, {})[found.key] = list(found.config)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)
