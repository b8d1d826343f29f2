"""Reading calibration text: one reader for each kind of source.

A reader is told how many bytes are wanted. It answers with texts, each a list of documents to be joined, that are to be
cut into windows each on its own, and with whether that is all the source has. Asked for more, it starts over or goes on.
"""

from __future__ import annotations

import codecs
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.pipeline.sources import Request

Reader = Callable[[int], tuple[list[list[str]], bool]]
_TEXT_COLUMNS = ("text", "messages")


def open_reader(request: Request, tokenizer: Any) -> Reader:
    """The reader of any kind of source but ``tokens``.

    Raises:
        BadRequest: a data set that cannot be loaded. The reader raises it for whatever else cannot be read.
    """
    if request.kind == "dataset":
        return _dataset_reader(request, tokenizer)
    if request.kind == "texts":
        return lambda size: _some_texts(request, size)
    return lambda size: _file_texts(request, tokenizer, size)


def _some_texts(request: Request, size: int) -> tuple[list[list[str]], bool]:
    if sum(map(len, request.source)) <= size:
        return [list(request.source)], True
    chosen: list[int] = []
    for index in torch.randperm(len(request.source), generator=request.generator()).tolist():
        chosen.append(index)
        size -= len(request.source[index])
        if size <= 0:
            break
    return [[request.source[index] for index in sorted(chosen)]], len(chosen) == len(request.source)


def _file_texts(request: Request, tokenizer: Any, size: int) -> tuple[list[list[str]], bool]:
    with _opened(request) as file:
        end = file.seek(0, 2)
        slices = _slices(end, request, size)
        if request.kind == "jsonl":
            rows = [row for start, stop in slices for row in _rows(file, start, stop, request, tokenizer)]
            return [rows], end <= size
        return [[_slice(file, start, stop, end, request)] for start, stop in slices], end <= size


@contextmanager
def _opened(request: Request) -> Iterator[BinaryIO]:
    try:
        with Path(request.source).open("rb") as file:
            yield file
    except (OSError, ValueError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(
            f"cannot read {str(request.source)[:200]!r}: {getattr(error, 'strerror', None) or error}. "
            "Give a text file, rows (.jsonl), the name of a data set, or a list of texts."
        ) from error


def _slices(end: int, request: Request, size: int) -> list[tuple[int, int]]:
    """The whole file, or ``size`` bytes of it in one slice from each of ``sequences`` equal parts."""
    count = request.sequences
    if end <= size:
        return [(0, end)]
    places = torch.rand(count, generator=request.generator(), dtype=torch.float64).tolist()
    starts = [end * number // count + int(place * ((end - size) // count)) for number, place in enumerate(places)]
    return [(start, start + size // count) for start in starts]


def _slice(file: BinaryIO, start: int, stop: int, end: int, request: Request) -> str:
    """Text of some bytes, less the parts of characters cut at either side."""
    file.seek(start)
    data = file.read(stop - start)
    cut = next((n for n, byte in enumerate(data[:3]) if byte & 0xC0 != 0x80), 3) if start else 0
    return _decode(data[cut:], start + cut, stop >= end, request).replace("\r\n", "\n")


def _decode(data: bytes, start: int, final: bool, request: Request) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final)
        reason, place = "a zero byte", text.find("\0")
    except UnicodeDecodeError as error:
        text, reason, place = "", error.reason, error.start
    if place >= 0:
        raise BadRequest(f"{str(request.source)!r} is not UTF-8 text ({reason} at byte {start + place}). Convert it first.")
    return text.removeprefix("\ufeff")


def _rows(file: BinaryIO, start: int, stop: int, request: Request, tokenizer: Any) -> Iterator[str]:
    """Documents of the lines that begin between two places of a file."""
    if start:
        file.seek(start - 1)
        file.readline()
    else:
        file.seek(0)
    while (place := file.tell()) < stop and (line := file.readline()):
        text = _decode(line, place, True, request)
        if not text.strip():
            continue
        where = f"{str(request.source)!r}, the row at byte {place},"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{where} is not JSON ({error}). Give one JSON object a line.") from error
        yield _document(row, where, request, tokenizer)


def _document(row: Any, where: str, request: Request, tokenizer: Any) -> str:
    """The text of one row, which may be empty."""
    names = list(row) if isinstance(row, Mapping) else []
    column = request.column or next((name for name in _TEXT_COLUMNS if name in names), None)
    if column not in names:
        asked = f"column {request.column!r}" if request.column else "column 'text' or 'messages'"
        found = ", ".join(map(str, names)) or "no columns"
        raise BadRequest(f"{where} has no {asked}, but {found}. Name the column of the text: column=...")
    value = row[column]
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        value = _chat(value, where, tokenizer)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{where} has neither text nor messages in column {column!r}: {value!r:.60}.")
    return value or ""


def _chat(messages: list[Any], where: str, tokenizer: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise BadRequest(
            f"{where} holds messages, and the tokenizer has no chat template to make a text of them. "
            "Use rows with a text column, or the tokenizer of a chat model."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever the template trips over
        raise BadRequest(f"{where} does not fit the tokenizer's chat template ({error}).") from error


def _dataset_reader(request: Request, tokenizer: Any) -> Reader:
    rows = enumerate(_dataset_rows(request))
    documents: list[str] = []

    def read(size: int) -> tuple[list[list[str]], bool]:
        have = sum(map(len, documents))
        for number, row in rows:
            documents.append(_document(row, f"data set {request.source!r}, row {number},", request, tokenizer))
            have += len(documents[-1])
            if have >= size:
                return [documents], False
        return [documents], True

    return read


def _dataset_rows(request: Request) -> Iterator[Any]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise BadRequest(
            f"{request.source!r} is no file here, and reading it as a data set needs the datasets package: "
            'pip install "hf-lowbit[eval]"'
        ) from error
    asked = {"path": request.source, "name": request.config, "split": request.split or "train"}
    try:
        try:
            rows = datasets.load_dataset(**asked, streaming=True)
        except ConnectionError:
            rows = datasets.load_dataset(**asked)  # a copy in the cache needs no network, but cannot stream
        yield from rows
    except Exception as error:  # whatever its files or the network did
        raise BadRequest(
            f"{request.source!r} is no file here, and as a data set (config {request.config!r}, split {asked['split']!r}) "
            f"it cannot be loaded: {' '.join(str(error).split())[:300]} Check name, config and split, or give a file."
        ) from error
