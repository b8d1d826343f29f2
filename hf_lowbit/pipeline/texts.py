"""Calibration data: windows of tokens from a file, rows, a data set, texts in memory, or ready token ids.

A text file is one running text. Rows, texts and data sets are documents, joined by the tokenizer's end-of-text token.
Text is cut into non-overlapping windows of ``length`` tokens, of which a seeded permutation picks ``sequences``, kept in
the order of the text. No more is read than about twice the tokens asked for: a larger file gives one slice from each
of ``sequences`` equal parts, at a seeded place, a longer list a seeded choice, a data set its first rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.pipeline.readers import open_reader
from hf_lowbit.pipeline.sources import Request, parse

# English takes 4 to 5 bytes a token, so this reads two to three windows of English for each one asked for.
BYTES_PER_TOKEN = 12

Progress = Callable[[int, int], None]
_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Calibration:
    """Token windows and where they came from.

    Attributes:
        windows: int64 ``[sequences, length]``.
        provenance: JSON values: ``source`` (a file or data set name, None for what was in memory), ``kind`` (text, jsonl,
            dataset, texts or tokens), ``sha256`` of the windows as little-endian int64, ``sequences``, ``length``,
            ``asked`` (the number of sequences asked for, which a short text may not fill), ``seed``, and ``column``,
            ``split`` and ``config`` where given.
    """

    windows: Tensor
    provenance: dict[str, Any]


def read_calibration(
    source: Any,
    tokenizer: Any,
    *,
    sequences: int = 128,
    length: int = 512,
    seed: int = 0,
    vocabulary: int | None = None,
    places: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Token windows to calibrate on: the same source, tokenizer, sizes and seed give the same windows.

    A text that fills fewer than ``sequences`` windows gives all it has; one that does not fill a single window is
    refused. A text that repeats itself is allowed: a singular Gram matrix is the solver's to damp.

    Args:
        source: a UTF-8 text file; a JSON-lines file whose rows have ``text``, or ``messages`` for the chat template; the
            name of a data set; a list of texts; token ids int64 ``[n, length]``, used as they are; or a mapping with one
            of these as ``source`` and any of ``column``, ``split``, ``config``, ``sequences``, ``length``, ``seed``.
        tokenizer: of the model; not used for token ids.
        sequences: windows wanted.
        length: tokens a window.
        seed: of the choice of slices and windows.
        vocabulary: tokens the model knows; no larger id may occur.
        places: tokens the model takes at once.
        progress: called with the tokens read and the tokens asked for.

    Raises:
        BadRequest: a source that cannot be read, is too short, or does not fit tokenizer or model.
    """
    request = parse(source, sequences, length, seed)
    kind = request.kind
    if kind == "tokens":
        windows = _as_windows(request.source)
        _check_length(windows.shape[1], places)
    else:
        _check_length(request.length, places)
        windows = _choose(_read(request, tokenizer, progress), request)
    _check_vocabulary(windows, vocabulary, "the windows hold" if kind == "tokens" else "the tokenizer makes")
    provenance = {
        "source": _name(request),
        "kind": kind,
        "sha256": hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest(),
        "sequences": len(windows),
        "length": windows.shape[1],
        "asked": len(windows) if kind == "tokens" else request.sequences,
        "seed": request.seed,
    }
    return Calibration(windows, provenance | request.extras)


def _name(request: Request) -> str | None:
    if request.kind in ("texts", "tokens"):
        return None
    # A checkpoint may carry this: never the folders of the machine it was made on.
    return str(request.source) if request.kind == "dataset" else Path(request.source).name


def _check_length(length: int, places: int | None) -> None:
    if places is not None and 0 < places < length:
        raise BadRequest(f"a window of {length} tokens was asked for, the model takes {places}. Use a length of {places}.")


def _check_vocabulary(windows: Tensor, vocabulary: int | None, who: str) -> None:
    smallest, largest = int(windows.min()), int(windows.max())
    if smallest < 0:
        raise BadRequest(f"{who} token {smallest}; token ids are 0 or more. Leave padding and ignored places out.")
    if vocabulary is not None and largest >= vocabulary:
        raise BadRequest(
            f"{who} token {largest}, the model knows {vocabulary} tokens. Tokenizer and model are not of one checkpoint."
        )


def _as_windows(source: Any) -> Tensor:
    try:
        windows = source if isinstance(source, Tensor) else torch.stack([torch.as_tensor(row) for row in source])
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(
            f"a calibration list holds only texts, or only windows of token ids of one length ({error})."
        ) from error
    if windows.dim() != 2 or not windows.numel() or windows.dtype not in _WHOLE_NUMBERS:
        raise BadRequest(f"calibration windows are token ids [n, length], got {windows.dtype} {list(windows.shape)}.")
    return windows.detach().cpu().to(torch.int64).contiguous()


def _read(request: Request, tokenizer: Any, progress: Progress | None) -> Tensor:
    """Windows ``[n, length]``, n at least 1: ``sequences`` or more, or all there are."""
    if tokenizer is None:
        raise BadRequest("calibration text needs the model's tokenizer, and none was given. Pass it, or token ids.")
    read = open_reader(request, tokenizer)
    size = BYTES_PER_TOKEN * request.sequences * request.length
    while True:
        texts, complete = read(size)
        found, tokens = _cut(texts, tokenizer, request, progress)
        if complete or len(found) >= request.sequences:
            break
        size *= 2
    if not len(found):
        name = "the list of texts" if request.kind == "texts" else repr(str(request.source))
        raise BadRequest(
            f"{name} has {tokens} tokens, one calibration window needs {request.length}. "
            "Give more text or ask for a shorter length."
        )
    return found


def _cut(texts: list[list[str]], tokenizer: Any, request: Request, progress: Progress | None) -> tuple[Tensor, int]:
    """All full windows ``[n, length]`` of texts, none across two of them, and the number of tokens."""
    end, length, aim = getattr(tokenizer, "eos_token_id", None), request.length, request.sequences * request.length
    pieces, tokens = [], 0
    for documents in texts:
        ids: list[int] = []
        for document in filter(str.strip, documents):
            if ids and end is not None:
                ids.append(end)
            # JSON can carry lone surrogates, which no tokenizer takes.
            document = document.encode(errors="ignore").decode()
            ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
            if progress is not None:
                progress(min(tokens + len(ids), aim), aim)
        pieces.append(torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length))
        tokens += len(ids)
    return torch.cat(pieces), tokens


def _choose(found: Tensor, request: Request) -> Tensor:
    order = torch.randperm(len(found), generator=request.generator())
    return found[order[: request.sequences].sort().values]
