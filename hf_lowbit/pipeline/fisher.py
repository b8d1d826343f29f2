"""Fisher sensitivities by one streamed backward pass: the diagonal of the Fisher matrix of the model's loss.

``F = mean over windows of (d loss / d w)^2`` (SqueezeLLM, arXiv 2306.07629), the loss being the mean next-token loss of a
window. The forward pass keeps the inputs of every block; the backward pass then opens one block at a time, from the last to
the first, so memory is one block and the kept inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.pipeline.blocks import Block, OpenBlock
from hf_lowbit.pipeline.forward import Batch, Recorder, check_finite
from hf_lowbit.pipeline.share import Share
from hf_lowbit.solvers.statistics import ExactSum, Statistics


def sensitivities(
    recorder: Recorder, windows: Tensor, share: Share, skip: set[str]
) -> Iterator[tuple[Block, OpenBlock, Mapping[str, list[Statistics]]]]:
    """Statistics with ``sensitivity`` for the sites of each block, from the last block to the first.

    Args:
        windows: int64 ``[n, T]``, one window per backward pass.
        skip: names of blocks whose sensitivities are not wanted; gradients still pass through them.
    """
    if len(windows) < share.world:
        raise BadRequest(f"{share.world} processes cannot share {len(windows)} calibration windows; use fewer.")
    batches = [recorder.batch(ids[None]) for number, ids in enumerate(windows) if share.mine(number)]
    kept: list[list[Tensor]] = []
    for block in recorder.blocks:
        opened = block.open()
        kept.append([batch.hidden for batch in batches])
        for batch in batches:
            with torch.no_grad():
                batch.hidden = opened(batch.hidden, batch.calls[opened.number])
            check_finite(batch.hidden, f"block {block.name}")
    slopes = [_slope_of_loss(recorder, batch) for batch in batches]
    for block, inputs in zip(reversed(recorder.blocks), reversed(kept), strict=True):
        opened = block.open()
        sums = {} if block.name in skip else {name: ExactSum() for name in block.sites}
        for number, batch in enumerate(batches):
            slopes[number] = _through(opened, sums, inputs[number], slopes[number], batch, share)
        yield block, opened, {name: _finish(opened, name, found, len(windows), share) for name, found in sums.items()}


@torch.enable_grad()
def _slope_of_loss(recorder: Recorder, batch: Batch) -> Tensor:
    """Gradient of the mean next-token loss by the final hidden states ``[1, T, D]``."""
    hidden = batch.hidden.detach().requires_grad_()
    logits = recorder.tail(batch.ids, hidden).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, batch.ids[0, 1:].to(logits.device))
    check_finite(loss, "what follows the last block")
    (slope,) = torch.autograd.grad(loss, hidden)
    return slope


@torch.enable_grad()
def _through(
    opened: OpenBlock, sums: Mapping[str, ExactSum], hidden: Tensor, slope: Tensor, batch: Batch, share: Share
) -> Tensor:
    """Pass a gradient through a block, adding the squared gradients of its sites on the way."""
    hidden = hidden.detach().requires_grad_()
    weights = [opened.sites[name].parameter.requires_grad_() for name in sums]
    out = opened(hidden, batch.calls[opened.number])
    before, *slopes = torch.autograd.grad(out, [hidden, *weights], slope, allow_unused=True)
    for name, weight, found in zip(sums, weights, slopes, strict=True):
        weight.requires_grad_(False)
        square = torch.zeros_like(weight) if found is None else found.square()
        if sums[name].exponent is None:
            sums[name].fix_grid(share.same(float(square.max())))
        sums[name].add(square)
    return before


def _finish(opened: OpenBlock, name: str, total: ExactSum, windows: int, share: Share) -> list[Statistics]:
    """Statistics of the matrices of a site; what is not a sensitivity stands for inputs of equal size."""
    site = opened.sites[name]
    share.add_up(total, tuple(site.parameter.shape))
    found = site.turned(total.mean(windows))
    in_features = found.shape[-1]
    one = torch.ones(in_features)
    stack = found if site.stacked else found[None]
    return [Statistics(windows, torch.eye(in_features), 0 * one, one, sensitivity=each.contiguous()) for each in stack]
