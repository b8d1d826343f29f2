"""A picture of what a cache holds important: a row a layer, a column a position.

Brightness is the share of a layer's heads that keep the token among the important or the newest ones.
"""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.page import page

if TYPE_CHECKING:
    from hf_lowbit.kv.cache import LowBitCache

MOST_COLUMNS = 1024
ROW_PIXELS = 12
# Dark blue to yellow.
COLOURS = torch.tensor([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]])


def shares(cache: LowBitCache, sequence: int) -> dict[int, Tensor]:
    """By layer: the share of heads ``[length]`` that hold each position as important or newest, 0 to 1."""
    out = {}
    for number, layer in cache.low_bit_layers().items():
        batch, heads, length, _ = layer.shape
        if not length:
            continue
        if not 0 <= sequence < batch:
            raise BadRequest(f"sequence {sequence} was asked for, the cache holds {batch} (0 to {batch - 1}).")
        total = torch.zeros(length)
        if layer.held.kept.length:
            where = layer.held.kept.tensors["position"][sequence, :, : layer.held.kept.length].long().cpu().flatten()
            total.scatter_add_(0, where, torch.ones(where.shape[0]))
        total[layer.held.older :] = heads
        out[number] = total / heads
    return out


def draw(cache: LowBitCache, path: Path, sequence: int) -> Path:
    """Write the picture; the ending of the name says which kind.

    Raises:
        BadRequest: another ending than .png or .html, a sequence that is not there, or an empty cache.
    """
    if path.suffix not in (".png", ".html"):
        raise BadRequest(f"a heat map is written as .png or .html, got {path.name!r}.")
    rows = shares(cache, sequence)
    if not rows:
        raise BadRequest("the cache is empty or holds no layer of full attention: there is nothing to draw.")
    picture = _png(torch.stack([_columns(row) for row in rows.values()]))
    if path.suffix == ".png":
        path.write_bytes(picture)
        return path
    length = max(len(row) for row in rows.values())
    source = base64.b64encode(picture).decode()
    lines = "".join(f"<tr><td>{n}</td><td>{row.mean():.1%}</td></tr>" for n, row in rows.items())
    body = (
        f"<h1>What the cache holds important</h1><p>{length} tokens from left to right, layers {min(rows)} to {max(rows)} "
        "from top to bottom; bright is kept at high precision by all heads, dark by none.</p>"
        f'<img alt="importance by layer and position" src="data:image/png;base64,{source}">'
        f"<table><tr><th>layer</th><th>important</th></tr>{lines}</table>"
    )
    style = "img { image-rendering: pixelated; width: 100%; } td { padding: 0 1em; }"
    path.write_text(page("KV cache importance", body, style, images=True), encoding="utf-8")
    return path


def _columns(row: Tensor) -> Tensor:
    if len(row) <= MOST_COLUMNS:
        return row
    return torch.nn.functional.adaptive_max_pool1d(row[None, None], MOST_COLUMNS)[0, 0]


def _png(shares: Tensor) -> bytes:
    """Shares ``[rows, columns]`` as a PNG file."""
    place = shares.clamp(0, 1) * (len(COLOURS) - 1)
    low = place.floor().long().clamp_max(len(COLOURS) - 2)
    colours = COLOURS.float()
    pixels = (colours[low] + (colours[low + 1] - colours[low]) * (place - low)[..., None]).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(ROW_PIXELS, 0)
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + bytes(line.flatten().tolist()) for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
