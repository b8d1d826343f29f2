"""What is to be judged: a file, a directory of files, or standard input. What is in it never stops the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hf_lowbit.detect.detector import Detector
from hf_lowbit.detect.result import ABSTAIN, Detection
from hf_lowbit.errors import BadRequest

# Bytes read of one file: beyond this the token limit of a detector has long been reached.
LARGEST = 64 << 20


def read_inputs(place: str) -> Iterator[tuple[str, str | None, str]]:
    """Name, text, and why there is none, of each file; hidden files are left out.

    Raises:
        BadRequest: nothing there, or a directory without files.
    """
    if place == "-":
        yield ("standard input", *_decoded(sys.stdin.buffer.read(LARGEST)))
        return
    path = Path(place)
    if not path.exists():
        raise BadRequest(f"cannot read {place!r}: No such file or directory. Give a text file, a directory, or - for stdin.")
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        if not files:
            raise BadRequest(f"{place!r} holds no files to judge.")
    else:
        files = [path]
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        try:
            with file.open("rb") as handle:
                data = handle.read(LARGEST)
        except OSError as error:
            if len(files) == 1:
                raise BadRequest(f"cannot read {place!r}: {error.strerror or error}.") from error
            yield name, None, f"cannot be read: {error.strerror or error}"
            continue
        yield (name, *_decoded(data))


def judge(
    detector: Detector, texts: Sequence[tuple[str, str | None, str]], progress: Callable[[int, int], None]
) -> Iterator[Detection]:
    """A detection for each of :func:`read_inputs`, in order; what is no text gets an abstention."""
    found = detector.stream(text for _, text, _ in texts if text is not None)
    for number, (name, text, why) in enumerate(texts, 1):
        one = Detection(ABSTAIN, why, detector.score) if text is None else next(found)
        yield replace(one, source=name)
        progress(number, len(texts))


def _decoded(data: bytes) -> tuple[str | None, str]:
    if b"\0" in data:
        return None, "not a text: it holds NUL bytes, as binary files do"
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        if len(data) == LARGEST and error.start > len(data) - 4:  # a character cut by the limit
            return data[: error.start].decode("utf-8-sig"), ""
        return None, f"not UTF-8 text ({error.reason} at byte {error.start}). Convert it: iconv -t UTF-8"
