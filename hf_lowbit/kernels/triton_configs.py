"""Block sizes of the Triton kernels: measured ones where a card was tuned, else a rule that is right for any shape.

Measured choices lie in ``triton_configs.json`` beside this file and in the user's own (:func:`user_file`), which
``hf-lowbit bench --tune`` writes and which goes first: device name -> ``KIND ROWSxCOLUMNS BITS BATCH`` -> the fields of
:class:`Config`. No choice changes a result beyond the order of sums, and all of them add in a fixed order: there are no
atomics, so the same call gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from hf_lowbit.kernels.triton_plan import StagePlan, unit_of

NAME = "triton_configs.json"
FILE = Path(__file__).with_name(NAME)
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


_forced: Config | None = None


def choose(stage: StagePlan, columns: int, batch: int, device: str, multiprocessors: int) -> Config:
    """The configuration of a product by ``batch`` rows on a device."""
    if _forced is not None:
        return _forced
    found = measured().get(device, {}).get(key(stage, columns, batch))
    return Config(*found) if found is not None else rule(stage, columns, batch, multiprocessors)


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Cut every product inside the block in one way, for tuning."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


def key(stage: StagePlan, columns: int, batch: int) -> str:
    """Key of a measured choice; batches count up to the next power of two."""
    return f"{'gemv' if batch == 1 else 'gemm'} {stage.rows}x{columns} {stage.bits} {power_of_two(batch)}"


def card(device: torch.device) -> tuple[str, int]:
    """Name and multiprocessors of a device; an interpreted kernel's is the processor."""
    if device.type != "cuda":
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def rule(stage: StagePlan, columns: int, batch: int, multiprocessors: int) -> Config:
    """The choice without a measurement."""
    return (gemv_rule if batch == 1 else gemm_rule)(stage, columns, batch, multiprocessors)


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


def user_file() -> Path:
    """Where this user's measured choices lie; the file need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hf-lowbit", NAME)


def read(file: Path) -> dict[str, dict[str, list[int]]]:
    """Choices of a file; none where it is missing, or damaged, which is said."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if not all(len(Config(*config)) and min(config) > 0 for known in table.values() for config in known.values()):
            raise ValueError("a block size below one")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logging.getLogger("hf_lowbit").warning(
            f"{file} holds no block sizes of GPU kernels ({error}); the usual ones are used. "
            "`hf-lowbit bench DIR --device cuda --tune` writes it anew."
        )
        return {}
    return table


@lru_cache(maxsize=1)
def measured() -> dict[str, dict[str, list[int]]]:
    """All measured choices by device."""
    shipped, own = read(FILE), read(user_file())
    return {name: shipped.get(name, {}) | own.get(name, {}) for name in (*shipped, *own)}
