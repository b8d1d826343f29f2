"""What is to be judged: a file, a directory of files, or standard input. What is in it never stops the rest."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_lowbit.detect.detector import Detector
from hf_lowbit.detect.result import ABSTAIN, Detection
from hf_lowbit.errors import BadRequest

# Bytes read of one file: beyond this the token limit of a detector has long been reached.
LARGEST = 64 << 20


@dataclass(frozen=True)
class Input:
    """A file to judge, or standard input where ``path`` is None."""

    name: str
    path: Path | None

    def read(self) -> tuple[str | None, str]:
        """Its text, or None and why there is none."""
        if self.path is None:
            return _decoded(sys.stdin.buffer.read(LARGEST))
        try:
            with self.path.open("rb") as handle:
                return _decoded(handle.read(LARGEST))
        except OSError as error:
            return None, f"cannot be read: {error.strerror or error}"


def find_inputs(place: str) -> list[Input]:
    """The files a place stands for; hidden ones in a directory are left out.

    Raises:
        BadRequest: nothing there, or a directory without files.
    """
    if place == "-":
        return [Input("standard input", None)]
    path = Path(place)
    if not path.exists():
        raise BadRequest(f"cannot read {place!r}: No such file or directory. Give a text file, a directory, or - for stdin.")
    if not path.is_dir():
        return [Input(path.name, path)]
    files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    if not files:
        raise BadRequest(f"{place!r} holds no files to judge.")
    return [Input(str(file.relative_to(path)), file) for file in files]


def read_texts(place: str) -> list[str]:
    """All texts of a place: the ``text`` of each line of a ``.jsonl`` file, else each file as one.

    Raises:
        BadRequest: nothing there, a file that is no text, or a line without one.
    """
    found = []
    for one in find_inputs(place):
        text, why = one.read()
        if text is None:
            raise BadRequest(f"{one.name!r} is {why}" if why.startswith("not ") else f"{one.name!r} {why}.")
        lines = one.path is not None and one.path.suffix == ".jsonl"
        found += (
            [_text_of(line, f"{one.name}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
            if lines
            else [text]
        )
    return found


def _text_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRequest(f"{place} is not JSON ({error.msg}). Each line holds an object with a text.") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise BadRequest(f'{place} has no text. Each line holds an object such as {{"text": "..."}}.')
    return row["text"]


def judge(
    detector: Detector, inputs: Sequence[Input], progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Detection]:
    """A detection for each input, in order; what is no text gets an abstention. Files are read as they are needed."""
    read: deque[tuple[str, str | None]] = deque()  # name, and why it is no text

    def texts() -> Iterator[str]:
        for one in inputs:
            text, why = one.read()
            read.append((one.name, why if text is None else None))
            if text is not None:
                yield text

    def answers() -> Iterator[Detection]:
        for found in detector.stream(texts()):
            yield from _no_texts(read, detector.score)
            yield replace(found, source=read.popleft()[0])
        yield from _no_texts(read, detector.score)

    for number, found in enumerate(answers(), 1):
        yield found
        progress(number, len(inputs))


def _no_texts(read: deque[tuple[str, str | None]], score: str) -> Iterator[Detection]:
    while read and read[0][1] is not None:
        name, why = read.popleft()
        yield Detection(ABSTAIN, why or "", score, source=name)


def _decoded(data: bytes) -> tuple[str | None, str]:
    if b"\0" in data:
        return None, "not a text: it holds NUL bytes, as binary files do"
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        if len(data) == LARGEST and error.start > len(data) - 4:  # a character cut by the limit
            return data[: error.start].decode("utf-8-sig"), ""
        return None, f"not UTF-8 text ({error.reason} at byte {error.start}). Convert it: iconv -t UTF-8"
