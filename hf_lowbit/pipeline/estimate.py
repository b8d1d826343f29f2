"""What a run will need, from shapes alone: bytes of the result, peak memory, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch

from hf_lowbit.format.layout import Layout
from hf_lowbit.format.ledger import ledger
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers import SOLVERS, Statistics, solve

# Seconds per weight of the data-free fit of tables and scales, two cores (eval/results/memory.json: 81 and 133 s for 1 B
# weights); methods that are not listed take what `rtn` takes.
FIT_SECONDS = {"powerquant": 8e-8, "nupes": 8e-8, "rtn": 2.7e-8, "squeezellm": 1.1e-6}
FITTED_SECONDS = 1.3e-7
# Seconds per column step of error feedback or descent that are not arithmetic: a dozen small torch calls.
STEP_SECONDS = 2.5e-4
# Rows solved to learn the form of a layout: more than any method shares its tables among.
ROWS = 16


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        bytes: of the checkpoint without headers, taking what stays dense as 16 bits.
        low_bit_bytes: of the quantized matrices; exact.
        bits_per_weight: of the matrices inside blocks.
        peak_bytes: anonymous memory, without the result where it is written to files as it is made.
        seconds: on this machine, from its speed in matrix products just measured; good to a factor of two.
        parts: what the time goes to.
    """

    bytes: int
    low_bit_bytes: int
    bits_per_weight: float
    peak_bytes: int
    seconds: float
    parts: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class BlockShape:
    """One block: shapes of its sites and what else it holds.

    Attributes:
        sites: name -> shape ``[out, in]`` or ``[experts, out, in]``.
        weights: all parameters of the block.
        width: of the hidden states.
    """

    sites: Mapping[str, tuple[int, ...]]
    weights: int
    width: int


def layout_of(shape: tuple[int, ...], spec: Spec) -> Layout:
    """The layout a solve of a ``shape`` weight will have; a few random rows of each matrix are solved to learn its form."""
    entry, in_features = SOLVERS[spec.method], shape[-1]
    few = (*shape[:-2], min(ROWS, shape[-2]), in_features)
    weight = torch.randn(few, generator=torch.Generator().manual_seed(0))
    statistics: list[Statistics] = []
    if not entry.optional:
        one, gram = torch.ones(in_features), torch.eye(in_features) * (entry.evidence == "fisher")
        sensitivity = torch.ones(few[-2:])
        statistics = [Statistics(0, gram, one, one, sensitivity=sensitivity)] * (shape[0] if len(shape) == 3 else 1)
    layout = solve(weight, spec, statistics=statistics).layout
    stages = []
    for stage in layout.stages:
        by_row = stage.tables == prod(few[:-1]) and stage.tables > 1
        stages.append(replace(stage, tables=prod(shape[:-1]) if by_row else stage.tables))
    outliers = max(1, round(spec.outliers * prod(shape))) if spec.outliers else 0
    return replace(layout, shape=shape, stages=tuple(stages), outliers=outliers)


def estimate(
    blocks: Sequence[BlockShape],
    specs: Mapping[str, Spec],
    outside: Mapping[str, tuple[int, ...]],
    dense: int,
    windows: int,
    length: int,
) -> Estimate:
    """Estimate a run.

    Args:
        specs: of all sites, those outside of blocks included.
        outside: shapes of what lies outside the blocks.
        dense: weights that stay in high precision.
        windows, length: calibration windows and their tokens; 0 windows for none.
    """
    known: dict[tuple[tuple[int, ...], str], Layout] = {}

    def layout(name: str, shape: tuple[int, ...]) -> Layout:
        key = (shape, str(specs[name].to_json()))
        if key not in known:
            known[key] = layout_of(shape, specs[name])
        return known[key]

    inside = [layout(name, shape) for block in blocks for name, shape in block.sites.items()]
    rest = [layout(name, shape) for name, shape in outside.items()]
    rate = matmul_rate()
    parts: dict[str, float] = {"fitting": 0.0, "statistics": 0.0, "coding": 0.0, "learning": 0.0}
    for name, shape in [(n, s) for block in blocks for n, s in block.sites.items()] + list(outside.items()):
        parts["fitting"] += _fit_seconds(specs[name]) * prod(shape)
    tokens = windows * length
    for block in blocks if windows else []:
        _add_calibrated(parts, block, specs, tokens, rate)
    peak = max(_peak(block, specs, windows, length) for block in blocks)
    total = ledger([*inside, *rest]).bytes
    return Estimate(total + 2 * dense, total, ledger(inside).bits_per_weight, peak, sum(parts.values()), parts)


def _fit_seconds(spec: Spec) -> float:
    fitted = (spec.levels or "fitted") == "fitted"
    return FIT_SECONDS.get(spec.method, FITTED_SECONDS if fitted else FIT_SECONDS["rtn"]) * spec.residual_terms


def _add_calibrated(parts: dict[str, float], block: BlockShape, specs: Mapping[str, Spec], tokens: int, rate: float) -> None:
    evidence = {SOLVERS[specs[name].method].evidence for name in block.sites}
    if evidence == {"none"}:
        return
    forward = 2 * block.weights * tokens / rate
    if evidence == {"fisher"}:
        parts["statistics"] += 4 * forward
        return
    # Both streams through the block once, and up to each group of sites once more.
    parts["statistics"] += 5 * forward
    seen = set()
    for name, shape in block.sites.items():
        entry, spec = SOLVERS[specs[name].method], specs[name]
        if entry.evidence not in ("gram", "block"):
            continue
        in_features, rows, stack = shape[-1], prod(shape[:-1]), shape[0] if len(shape) == 3 else 1
        sweeps = entry.option(spec, "sweeps")
        if (in_features, stack) not in seen:
            parts["statistics"] += 4 * tokens * in_features**2 / rate
        seen.add((in_features, stack))
        arithmetic = 6 * stack * in_features**3 + (6 + 6 * sweeps) * rows * in_features**2
        steps = stack * in_features * max(1, rows // stack // 512) * (1 + sweeps)
        parts["coding"] += arithmetic / rate + steps * STEP_SECONDS
    if "block" in evidence:
        learned = next(SOLVERS[specs[n].method] for n in block.sites if SOLVERS[specs[n].method].evidence == "block")
        spec = next(specs[n] for n in block.sites if SOLVERS[specs[n].method].evidence == "block")
        per_step = learned.option(spec, "batch") * 512 * 6 * block.weights / rate + block.weights * 4e-8
        parts["learning"] += learned.option(spec, "steps") * per_step


def _peak(block: BlockShape, specs: Mapping[str, Spec], windows: int, length: int) -> int:
    largest = max((prod(shape) for shape in block.sites.values()), default=0)
    working = 6 * 4 * largest
    evidence = {SOLVERS[specs[name].method].evidence for name in block.sites}
    if not windows or evidence == {"none"}:
        return working
    copies = 2 * 4 * block.weights
    states = 2 * 4 * windows * length * block.width
    if evidence == {"fisher"}:
        return 2 * copies + states
    widest = max(shape[-1] for shape in block.sites.values())
    statistics = 44 * widest**2
    learning = 4 * 16 * block.weights if "block" in evidence else 0
    return copies + states + max(statistics, learning) + working


def matmul_rate() -> float:
    """Multiply-adds times two per second of this machine's float32 matrix products, measured in about 0.1 s."""
    a, b = torch.randn(512, 2048), torch.randn(2048, 2048)
    _ = a @ b
    best = 0.0
    for _ in range(4):
        begun = time.perf_counter()
        _ = a @ b
        best = max(best, 2 * 512 * 2048 * 2048 / (time.perf_counter() - begun))
    return best
