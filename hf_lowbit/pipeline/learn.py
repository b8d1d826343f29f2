"""Block reconstruction inside a run: all learned sites of a block together, against the original block's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from hf_lowbit.errors import LowBitError
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.pipeline.blocks import Block, Call, OpenBlock
from hf_lowbit.pipeline.forward import Batch
from hf_lowbit.pipeline.share import Share
from hf_lowbit.solvers import SOLVERS, Matrix, reconstruct


def learn(
    block: Block,
    opened: OpenBlock,
    original: OpenBlock,
    specs: Mapping[str, Spec],
    tensors: dict[str, LowBitTensor],
    batches: Sequence[Batch],
    calls: Callable[[int], Call],
    count: int,
    share: Share,
) -> dict[str, Any]:
    """Replace the records of the sites in ``specs`` by learned ones; returns the row of the report.

    Args:
        opened: the working copy with all sites quantized; sites that are not learned stay so.
        batches: those of this process, of ``count`` in all.
        calls: how the block is called for some number of sequences.

    Raises:
        LowBitError: the block's arguments depend on the text.
    """
    if any(batch.calls[opened.number] is not calls(len(batch.ids)) for batch in batches):
        raise LowBitError(
            f"the arguments of {block.name} depend on the text, so its windows cannot be shuffled for learning. Use gptq."
        )
    hidden = _gathered([batch.hidden for batch in batches], count, share)
    originals = _gathered([batch.original for batch in batches], count, share)

    def solved() -> tuple[dict[str, LowBitTensor], dict[str, Any]]:
        with torch.no_grad():
            targets = torch.cat([original(part, calls(len(part))) for part in originals.split(len(batches[0].ids))])
        return _learn(block, opened, original, specs, tensors, (hidden, originals, targets), calls)

    learned, row = share.made_by_owner(solved, 0)
    tensors |= learned
    return row


def _learn(
    block: Block,
    opened: OpenBlock,
    original: OpenBlock,
    specs: Mapping[str, Spec],
    tensors: Mapping[str, LowBitTensor],
    states: tuple[Tensor, Tensor, Tensor],
    calls: Callable[[int], Call],
) -> tuple[dict[str, LowBitTensor], dict[str, Any]]:
    first = next(iter(specs.values()))
    entry = SOLVERS[first.method]
    if any((spec.method, spec.options) != (first.method, first.options) for spec in specs.values()):
        raise LowBitError(f"{block.name}: all learned matrices of a block need the same method and options.")
    options = {name: entry.option(first, name) for name in entry.options}
    matrices = {}
    for name, spec in specs.items():
        site = original.sites[name]
        matrices[name] = Matrix(site.turned(site.parameter.detach()).contiguous(), spec, tensors[name])

    def run(hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        placed = {opened.sites[name].local: opened.sites[name].turned(dense) for name, dense in weights.items()}
        module = partial(functional_call, opened.module, placed)
        return calls(len(hidden)).run(lambda *args, **kwargs: module(args, kwargs), hidden)

    row = reconstruct(matrices, run, *states, options, first.seed)
    row = {"name": block.name, "method": first.method, **row}
    return {name: matrix.tensor for name, matrix in matrices.items()}, row


def _gathered(mine: Sequence[Tensor], count: int, share: Share) -> Tensor:
    """Hidden states of all batches ``[N, T, D]``, in the order of the text, in every process."""
    own = iter(mine)
    return torch.cat([share.from_owner(next(own) if share.mine(number) else None, number) for number in range(count)])
