"""One of our checkpoints as a GGUF file: a block type for each matrix, row for row the same numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, FormatError, LowBitError
from hf_lowbit.exchange import Misfit
from hf_lowbit.exchange.gguf_blocks import block_of
from hf_lowbit.exchange.gguf_file import (
    architecture_of,
    describe,
    describe_tokenizer,
    head_size,
    interleaved_rows,
    library,
    names_of,
)
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.pipeline.durable import replacing

if TYPE_CHECKING:
    from hf_lowbit.plugin.export import Stored

_INTERLEAVED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


def write_gguf(
    stored: Stored, file: Path, progress: Callable[[int, int, str], None] | None = None
) -> tuple[dict[str, int], str | None]:
    """Check every matrix, then write the file; it appears whole or not at all.

    Returns:
        Number of matrices by block type, and what is lacking for texts, if anything.

    Raises:
        Misfit: naming matrix and field.
        BadRequest: the file is there already, or the gguf package is not.
        LowBitError: it cannot be written.
    """
    gguf = library()
    if file.exists():
        raise BadRequest(f"{file} exists already. --to gguf writes one file: choose another name or remove it.")
    architecture, interleaved = architecture_of(stored.config)
    rename = names_of(architecture, stored.config["num_hidden_layers"])
    names: dict[str, str] = {}
    for name in [*stored.dense, *stored.record.layouts]:
        if (found := rename(name)) is None:
            raise Misfit("the tensor", "unknown", f"architecture {architecture!r} has no name for it.", name)
        names[name] = found
    head = head_size(stored.config)

    def rows(name: str, count: int) -> Tensor | None:
        return interleaved_rows(count, head) if interleaved and _INTERLEAVED.search(name) else None

    def blocks(full: str) -> tuple[str, Tensor]:
        record = stored.matrix(full)
        try:
            return block_of(_picked(record, rows(full, record.layout.rows)))
        except Misfit as misfit:
            raise misfit.at(full) from misfit

    def dense(name: str) -> tuple[Any, str]:
        value = stored.tensors[name]
        return _dense(value, rows(name, value.shape[0]))

    shapes = {}
    for full in stored.record.layouts:
        kind, encoded = blocks(full)
        shapes[full] = (kind, tuple(encoded.shape))
    forms = Counter(kind for kind, _ in shapes.values())
    vocabulary = stored.config["vocab_size"]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            writer = gguf.GGUFWriter(temporary, architecture)
            describe(writer, stored.config, stored.folder.resolve().name, vocabulary)
            note = describe_tokenizer(writer, stored.folder, vocabulary)
            for name in stored.dense:
                value, kind = dense(name)
                writer.add_tensor_info(names[name], value.shape, value.dtype, value.nbytes, gguf.GGMLQuantizationType[kind])
            for full, (kind, shape) in shapes.items():
                byte, size = np.dtype(np.uint8), shape[0] * shape[1]
                writer.add_tensor_info(names[full], shape, byte, size, gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in stored.dense:
                writer.write_tensor_data(dense(name)[0])
            for number, full in enumerate(shapes, 1):
                writer.write_tensor_data(blocks(full)[1].numpy())
                if progress is not None:
                    progress(number, len(shapes), full)
            writer.close()
    except OSError as error:
        raise LowBitError(f"writing {file} failed ({error}); nothing was left behind.") from error
    if note is not None:
        note = f"the tokenizer was left out, the file takes token numbers only: {note}"
    return dict(forms), note


def _picked(record: LowBitTensor, rows: Tensor | None) -> LowBitTensor:
    return record if rows is None else record.rows(rows)


def _dense(value: Tensor, rows: Tensor | None) -> tuple[Any, str]:
    """A tensor in high precision as the file holds it: vectors in fp32, matrices as they are (bf16 as bytes)."""
    if not value.is_floating_point():
        raise FormatError(f"a dense tensor is {value.dtype}, which no reader of the file expects.")
    value = value if rows is None else value[rows]
    if value.dim() == 1 or value.dtype == torch.float32:
        return value.float().numpy(), "F32"
    if value.dtype == torch.float16:
        return value.numpy(), "F16"
    return value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy(), "BF16"
