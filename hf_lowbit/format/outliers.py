"""Outliers: fp16 corrections added to single weights, stored by row (CSR).

A correction is the difference between the weight and what the codes give, so the dense part needs no hole where an
outlier sits and dropping the outliers degrades instead of breaking.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_lowbit.format.scales import from_f16_bits, to_f16_bits


def store_outliers(rows: Tensor, columns: Tensor, values: Tensor, n_rows: int, in_features: int) -> dict[str, Tensor]:
    """CSR fields of corrections ``values`` (float32 ``[n]``) at ``rows, columns`` (int64 ``[n]``, sorted by row)."""
    counts = torch.bincount(rows, minlength=n_rows)
    starts = torch.zeros(n_rows + 1, dtype=torch.int64)
    starts[1:] = counts.cumsum(0)
    narrow = in_features <= 65536
    return {
        "outlier_values": to_f16_bits(values),
        "outlier_columns": columns.to(torch.int32).to(torch.uint16 if narrow else torch.int32),
        "outlier_starts": starts.to(torch.int32),
    }


def add_outliers(block: Tensor, fields: Mapping[str, Tensor], start: int, stop: int) -> None:
    """Add the corrections of rows ``start .. stop`` to ``block`` (float32 ``[stop - start, in]``) in place."""
    bounds = fields["outlier_starts"].long()
    first, last = int(bounds[start]), int(bounds[stop])
    if first == last:
        return
    rows = torch.repeat_interleave(torch.arange(stop - start, device=block.device), bounds[start : stop + 1].diff())
    columns = fields["outlier_columns"][first:last].to(torch.int64)
    block.index_put_((rows, columns), from_f16_bits(fields["outlier_values"][first:last]), accumulate=True)


def select_outlier_rows(fields: Mapping[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR values, columns and starts of the rows ``ids`` (int64 ``[n]``), in that order."""
    bounds = fields["outlier_starts"].long()
    counts = bounds[ids + 1] - bounds[ids]
    starts = torch.zeros(ids.numel() + 1, dtype=torch.int64, device=ids.device)
    starts[1:] = counts.cumsum(0)
    within = torch.arange(int(starts[-1]), device=ids.device) - torch.repeat_interleave(starts[:-1], counts)
    pick = torch.repeat_interleave(bounds[ids], counts) + within
    columns = fields["outlier_columns"]
    picked = columns.view(torch.int16)[pick].view(torch.uint16) if columns.dtype == torch.uint16 else columns[pick]
    return fields["outlier_values"][pick], picked, starts.to(torch.int32)
