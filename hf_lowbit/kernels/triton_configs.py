"""Block sizes of the Triton kernels: measured ones where a card was tuned, else a rule that is right for any shape.

Measured choices live in ``triton_configs.json``, which ``eval/gpu.py --tune`` writes: device name -> ``KIND ROWSxCOLUMNS
BITS BATCH`` -> the fields of :class:`Config`. No choice changes a result beyond the order of float32 sums, and all of them
add in a fixed order: there are no atomics, so the same call gives the same bytes.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

from hf_lowbit.kernels.triton_plan import StagePlan, unit_of

FILE = "triton_configs.json"
# Rows of activations from which the matrix is decoded once and multiplied by the vendor's library: decoding a weight for
# each tile of 128 rows then costs more than writing it once.
DENSE_FROM = 1024
# Programs wanted per multiprocessor, so that some load while others compute.
RESIDENT = 2


class Config(NamedTuple):
    """How a product is cut.

    Attributes:
        block_m, block_n, block_k: activations' rows, matrix rows and columns of a step.
        warps, stages: as Triton has them.
        split: parts of the columns, summed by a second launch.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int


def choose(stage: StagePlan, columns: int, batch: int, device: str, multiprocessors: int) -> Config:
    """The configuration of a product by ``batch`` rows on a device."""
    kind = "gemv" if batch == 1 else "gemm"
    found = _measured().get(device, {}).get(key(kind, stage.rows, columns, stage.bits, batch))
    if found is not None:
        return Config(*found)
    rule = gemv_rule if kind == "gemv" else gemm_rule
    return rule(stage, columns, batch, multiprocessors)


def key(kind: str, rows: int, columns: int, bits: int, batch: int) -> str:
    """Key of a measured choice; batches count up to the next power of two."""
    return f"{kind} {rows}x{columns} {bits} {power_of_two(batch)}"


def gemv_rule(stage: StagePlan, columns: int, batch: int, multiprocessors: int) -> Config:
    """As many rows a program as leave every multiprocessor two; four rows a warp share the inputs that a thread holds."""
    block_n = next((n for n in (16, 8) if stage.rows >= n * RESIDENT * multiprocessors), 4)
    few = -(-stage.rows // block_n) < multiprocessors and columns >= 8192
    block_k = min(max(1024, 32 * unit_of(stage.bits)), power_of_two(columns))
    return Config(1, block_n, block_k, block_n // 4, 1, 4 if few else 1)


def gemm_rule(stage: StagePlan, columns: int, batch: int, multiprocessors: int) -> Config:
    """Tiles of 16 to 128 rows; small batches split the columns until the card is full."""
    block_m = min(128, max(16, power_of_two(batch)))
    block_n, warps = (64, 4) if block_m <= 32 else (128, 8)
    block_k = max(64, unit_of(stage.bits)) if block_m > 32 else 128
    programs = -(-stage.rows // block_n) * -(-batch // block_m)
    split = 1
    while block_m <= 64 and split < 8 and programs * split < RESIDENT * multiprocessors and columns >= 8 * split * block_k:
        split *= 2
    permuted = stage.bits in (2, 3, 4)
    # Tables in memory must not be fetched ahead into shared memory like tiles.
    return Config(block_m, block_n, block_k, warps, 3 if permuted else 1, split)


def power_of_two(number: int) -> int:
    """The least one that is not below ``number``."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=1)
def _measured() -> dict[str, dict[str, list[int]]]:
    return json.loads(files("hf_lowbit.kernels").joinpath(FILE).read_text(encoding="utf-8"))
