"""Fingerprints of a run's input: equal ones make equal parts, and two that differ can be told apart in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_lowbit.errors import BadRequest, FormatError

SAMPLE = 1 << 12
ENDS = 1 << 16


def fingerprint_of_files(source: str | Path | Iterable[str | Path]) -> dict[str, Any]:
    """What identifies a checkpoint's weights and architecture, without reading all of them.

    Args:
        source: a checkpoint's directory, or its safetensors files and ``config.json``.

    Returns:
        ``files``: file name -> ``bytes`` and ``sha256``, the latter over the header, 64 kB at either end of the data and
        4 kB from the middle of each tensor, since a fine-tuned model may differ in a few tensors only; ``config``: the
        SHA-256 of ``config.json``, or None.

    Raises:
        BadRequest: no safetensors file, or one that cannot be read.
        FormatError: a file that is no safetensors file.
    """
    if isinstance(source, str | Path):
        files = [*sorted(Path(source).glob("*.safetensors")), *Path(source).glob("config.json")]
    else:
        files = sorted(Path(file) for file in source)
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise BadRequest(f"{source} holds no safetensors file. Give the directory of a checkpoint saved as safetensors.")
    try:
        configs = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.name == "config.json"]
        return {
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": _sampled(file)} for file in weights},
            "config": configs[0] if configs else None,
        }
    except OSError as error:
        raise BadRequest(f"cannot read {error.filename}: {error.strerror or error}.") from error


def _sampled(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        start = 8 + int.from_bytes(length, "little")
        try:
            if start > size:
                raise ValueError("its header is longer than the file")
            header = file.read(start - 8)
            entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            middles = sorted(sum(entry["data_offsets"]) // 2 for entry in entries)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} is not a complete safetensors file ({error}). Fetch it again.") from error
        digest.update(length + header + file.read(ENDS))
        for middle in middles:
            file.seek(start + middle)
            digest.update(file.read(SAMPLE))
        file.seek(max(start, size - ENDS))
        digest.update(file.read())
    return digest.hexdigest()


def differences(found: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """For each value in which two fingerprints differ: its dotted key and both values, shortened."""
    for key in sorted(found.keys() | asked.keys()):
        one, other = found.get(key), asked.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, f"{prefix}{key}.")
        elif one != other or (key in found) != (key in asked):
            yield f"{prefix}{key} was {_short(one)}, now {_short(other)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
