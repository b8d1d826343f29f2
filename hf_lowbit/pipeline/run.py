"""The run: block after block, each solved on inputs from the already quantized prefix, stored, and let go.

Memory is bounded by two working copies of one block, the statistics of one group of its sites, and the hidden states of
the calibration windows (twice: behind the quantized prefix, and in the original model).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, WeightError
from hf_lowbit.format.ledger import ledger
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.pipeline.blocks import Block, Call, OpenBlock, find_groups
from hf_lowbit.pipeline.fisher import sensitivities
from hf_lowbit.pipeline.forward import Batch, Recorder, check_finite
from hf_lowbit.pipeline.gather import few_tokens, gather
from hf_lowbit.pipeline.learn import learn
from hf_lowbit.pipeline.share import Share, attempt
from hf_lowbit.solvers import SOLVERS, Statistics, solve

Report = list[dict[str, Any]]


class Store(Protocol):
    """Where finished parts go."""

    def finished(self) -> list[str]:
        """Names of the parts that are there."""

    def put(self, name: str, tensors: Mapping[str, LowBitTensor], report: Report) -> None:
        """Keep a part."""

    def get(self, name: str) -> tuple[dict[str, LowBitTensor], Report]:
        """A part that was kept."""


class MemoryStore:
    """Keeps parts in memory, for ``quantize()`` and ``from_pretrained``."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[dict[str, LowBitTensor], Report]] = {}

    def finished(self) -> list[str]:
        """Names of the parts that are there."""
        return list(self._parts)

    def put(self, name: str, tensors: Mapping[str, LowBitTensor], report: Report) -> None:
        """Keep a part."""
        self._parts[name] = (dict(tensors), report)

    def get(self, name: str) -> tuple[dict[str, LowBitTensor], Report]:
        """A part that was kept."""
        return self._parts[name]


@dataclass
class Run:
    """One run over the blocks of a model.

    Attributes:
        blocks: in running order.
        specs: what is asked for each site.
        store: where finished blocks go; those it holds already are not solved again.
        recorder: runs the rest of the model; None for data-free methods.
        windows: int64 ``[n, T]`` calibration windows; None for data-free methods.
        batch: windows per forward pass.
        done: told of each finished block, in order: its tensors and its part of the report.
        share: this process's share of the work.
    """

    blocks: Sequence[Block]
    specs: Mapping[str, Spec]
    store: Store
    recorder: Recorder | None = None
    windows: Tensor | None = None
    batch: int = 4
    done: Callable[[Block, dict[str, LowBitTensor], Report], None] = lambda block, tensors, report: None
    share: Share = field(default_factory=Share)
    finished: set[str] = field(default_factory=set, init=False)
    _calls: dict[int, Sequence[Call]] = field(default_factory=dict, init=False)

    def __call__(self) -> None:
        """Solve all blocks.

        Raises:
            BadRequest: methods that cannot share a run.
            LowBitError: NaN in a block, or a store that cannot be written.
            WeightError: naming the parameter.
        """
        self.finished = set(self.share.same(self.store.finished()))
        kinds = {SOLVERS[self.specs[name].method].evidence for block in self.blocks for name in block.sites}
        if self.recorder is None or self.windows is None or kinds <= {"none"}:
            return self._without_data()
        if "fisher" in kinds and kinds & {"gram", "block"}:
            raise BadRequest(
                "squeezellm works from the last block to the first, gptq and its kin from the first to the last: "
                "they cannot share a run. Use overrides with data-free methods, or one of the two."
            )
        if "fisher" in kinds:
            return self._backward()
        self._forward()

    def _without_data(self) -> None:
        """Blocks in rounds of one for each process."""
        world = self.share.world
        for first in range(0, len(self.blocks), world):
            turn = self.blocks[first : first + world]
            solved: Any = None
            for number, block in enumerate(turn):
                if self.share.mine(number) and block.name not in self.finished:
                    solved = attempt(partial(self._solve_plain, block))
            for number, block in enumerate(turn):
                if block.name not in self.finished:
                    self._keep(block, *self.share.from_owner(solved, number))
                self.done(block, *self._kept(block))

    def _solve_plain(self, block: Block) -> tuple[dict[str, LowBitTensor], Report]:
        """Solve the sites of a block from their weights alone, with no more than one of them in memory."""
        tensors: dict[str, LowBitTensor] = {}
        report: Report = []
        for name in block.sites:
            row: dict[str, Any] = {"name": name}
            tensors[name] = _solve(name, block.weight(name), self.specs[name], (), row)
            report.append(row)
        return tensors, report

    def _backward(self) -> None:
        """Sensitivities come from the last block to the first, and so do the solved blocks."""
        assert self.recorder is not None and self.windows is not None
        for block, opened, found in sensitivities(self.recorder, self.windows, self.share, self.finished):
            if block.name not in self.finished:
                self._keep(block, *self._solve_all(opened, block.sites, found))
        for block in self.blocks:
            self.done(block, *self._kept(block))

    def _forward(self) -> None:
        assert self.recorder is not None and self.windows is not None
        cut = self.windows.split(self.batch)
        if len(cut) < self.share.world:
            raise BadRequest(f"{self.share.world} processes cannot share {len(cut)} batches of calibration text; use fewer.")
        batches = [self.recorder.batch(ids) for number, ids in enumerate(cut) if self.share.mine(number)]
        for block in self.blocks:
            opened, original = block.open(), block.open()
            if block.name in self.finished:
                for name, tensor in self._kept(block)[0].items():
                    _put(opened, name, tensor)
            else:
                self._solve_block(block, opened, original, batches)
            for batch in batches if block is not self.blocks[-1] else []:
                _advance(block, opened, original, batch)
            self.done(block, *self._kept(block))

    def _solve_block(self, block: Block, opened: OpenBlock, original: OpenBlock, batches: Sequence[Batch]) -> None:
        assert self.windows is not None
        tensors: dict[str, LowBitTensor] = {}
        report: Report = []
        first = batches[0]
        for group in self.share.same(find_groups(opened, first.hidden, first.calls[opened.number])):
            kinds = {SOLVERS[self.specs[name].method].evidence for name in group.names}
            found: list[Statistics] = []
            if group.seen and kinds != {"none"}:
                behind = original if any(self._target(name) == "original" for name in group.names) else None
                same = all(batch.hidden is batch.original for batch in batches) and not tensors
                found = gather(opened, None if same else behind, group, batches, self.share)
            solved, rows = self._solve_all(opened, group.names, dict.fromkeys(group.names, found), unseen=not group.seen)
            tensors |= solved
            report += rows
        learned = [name for name in tensors if SOLVERS[self.specs[name].method].evidence == "block"]
        if learned:
            specs = {name: self.specs[name] for name in learned}
            calls, count = partial(self._call, opened.number), -(-len(self.windows) // self.batch)
            report.append(learn(block, opened, original, specs, tensors, batches, calls, count, self.share))
            for name in learned:
                _put(opened, name, tensors[name])
        self._keep(block, {name: tensors[name] for name in block.sites}, report)

    def _call(self, number: int, sequences: int) -> Call:
        """How a block is called for some number of sequences."""
        assert self.recorder is not None and self.windows is not None
        if sequences not in self._calls:
            self._calls[sequences] = self.recorder.batch(self.windows[:sequences]).calls
        return self._calls[sequences][number]

    def _target(self, name: str) -> str:
        entry = SOLVERS[self.specs[name].method]
        return entry.option(self.specs[name], "target") if "target" in entry.options else "own"

    def _solve_all(
        self, opened: OpenBlock, names: Sequence[str], found: Mapping[str, Sequence[Statistics]], unseen: bool = False
    ) -> tuple[dict[str, LowBitTensor], Report]:
        """Solve some sites of a block, each in one process, and put what they decode to in their place."""

        def solve_it(name: str) -> tuple[LowBitTensor, dict[str, Any]]:
            row: dict[str, Any] = {"name": name}
            site = opened.sites[name]
            weight = site.turned(site.parameter.detach())
            return _solve(name, weight, self.specs[name], found.get(name, ()), row, unseen), row

        mine = {k: attempt(partial(solve_it, name)) for k, name in enumerate(names) if self.share.mine(k)}
        tensors: dict[str, LowBitTensor] = {}
        report: Report = []
        for number, name in enumerate(names):
            tensor, row = self.share.from_owner(mine.get(number), number)
            _put(opened, name, tensor)
            tensors[name] = tensor
            report.append(row)
        return tensors, report

    def _keep(self, block: Block, tensors: dict[str, LowBitTensor], report: Report) -> None:
        """Store a finished block; the first process alone writes."""
        self.share.made_by_owner(lambda: self.store.put(block.name, tensors, report), 0)

    def _kept(self, block: Block) -> tuple[dict[str, LowBitTensor], Report]:
        return self.share.made_by_owner(lambda: self.store.get(block.name), 0)


def _solve(
    name: str, weight: Tensor, spec: Spec, statistics: Sequence[Statistics], row: dict[str, Any], unseen: bool = False
) -> LowBitTensor:
    """Solve one weight ``[.., out, in]`` and fill its row of the report."""
    begun = time.perf_counter()
    if unseen and not SOLVERS[spec.method].optional:
        # Never reached by calibration text: the solver's own fit of tables and scales, codes to the nearest level.
        statistics = [_no_inputs(weight.shape[-1])] * (len(weight) if weight.dim() == 3 else 1)
    if statistics:
        row["tokens"] = min(found.count for found in statistics)
        if (short := few_tokens(statistics)) and weight.dim() == 3:
            row["fallback"] = f"{short} of {len(statistics)} experts saw few tokens: statistics of all experts together"
    try:
        tensor = solve(weight, spec, statistics=statistics, notes=row)
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from error
    row |= {"bits_per_weight": ledger(tensor.layout).bits_per_weight, "seconds": time.perf_counter() - begun}
    return tensor


def _no_inputs(in_features: int) -> Statistics:
    zero = torch.zeros(in_features)
    return Statistics(0, torch.zeros(in_features, in_features), zero, zero)


@torch.no_grad()
def _put(opened: OpenBlock, name: str, tensor: LowBitTensor) -> None:
    site = opened.sites[name]
    site.parameter.copy_(site.turned(tensor.dequantize()))


@torch.no_grad()
def _advance(block: Block, opened: OpenBlock, original: OpenBlock, batch: Batch) -> None:
    """Move a batch behind a block, in both streams."""
    call = batch.calls[opened.number]
    batch.original, batch.hidden = original(batch.original, call), opened(batch.hidden, call)
    check_finite(batch.original, f"block {block.name}")
    check_finite(batch.hidden, f"the quantized block {block.name}")
