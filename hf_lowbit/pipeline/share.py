"""Several processes sharing one run: batches of calibration text, and the matrices to solve.

Start them with ``torchrun`` or ``accelerate launch``. Sums are exact (``hf_lowbit.solvers.statistics.ExactSum``), so the
result has the same bytes whatever the number of processes, if each has the same number of threads: ``torchrun`` sets
OMP_NUM_THREADS to 1 where it is not set, and matrix products and factorizations round differently with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowbit.errors import LowBitError
from hf_lowbit.solvers.statistics import ExactSum

Result = TypeVar("Result")


class Share:
    """The part of the work this process does; a context manager.

    Attributes:
        rank, world: number of this process, and how many there are.
    """

    def __init__(self) -> None:
        self._started = False
        if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo")
            self._started = True
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the process group, if this object joined it."""
        if self._started:
            dist.destroy_process_group()

    def mine(self, number: int) -> bool:
        """Whether piece ``number`` of the work falls to this process."""
        return number % self.world == self.rank

    def same(self, value: Any) -> Any:
        """The first process's ``value`` (anything picklable), in all of them."""
        return self.from_owner(value, 0)

    def from_owner(self, value: Any, number: int) -> Any:
        """What the process that piece ``number`` falls to holds, in all of them; an error of ours is raised in all."""
        box = [value]
        if self.world > 1:
            with _together():
                dist.broadcast_object_list(box, src=number % self.world)
        if isinstance(box[0], LowBitError):
            raise box[0]
        return box[0]

    def made_by_owner(self, make: Callable[[], Result], number: int) -> Result:
        """``make()`` of the process that piece ``number`` falls to, in all of them."""
        return self.from_owner(attempt(make) if self.mine(number) else None, number)

    def add_up(self, total: ExactSum, shape: tuple[int, ...]) -> None:
        """Complete a sum over all processes, in place; ``shape`` serves a process that had nothing to add."""
        if self.world == 1:
            return
        if total.total is None:
            total.total = torch.zeros(shape, dtype=torch.int64)
        with _together():
            dist.all_reduce(total.total)

    def count(self, number: int) -> int:
        """Sum of a whole number over all processes."""
        if self.world == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64)
        with _together():
            dist.all_reduce(box)
        return int(box)

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all processes."""
        if self.world > 1:
            with _together():
                dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.world > 1:
            with _together():
                dist.barrier()


def attempt(make: Callable[[], Result]) -> Result | LowBitError:
    """``make()``, or the error it raises, for :meth:`Share.from_owner`."""
    try:
        return make()
    except LowBitError as error:
        return error


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LowBitError("another process of this run ended; its own message says why.") from error
