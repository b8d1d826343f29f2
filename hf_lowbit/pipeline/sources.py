"""What calibration data may come from, and the settings that go with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name

ROW_SUFFIXES = (".jsonl", ".ndjson")
_FILE_SUFFIXES = (*ROW_SUFFIXES, ".txt", ".text", ".raw", ".utf8", ".md", ".json", ".csv", ".parquet", ".gz", ".xz", ".zst")
_DATASET_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


@dataclass(frozen=True)
class Request:
    """What to calibrate on and how much of it; its attributes are the keys a mapping source may have."""

    source: Any
    sequences: int
    length: int
    seed: int
    column: str | None = None
    split: str | None = None
    config: str | None = None

    @property
    def kind(self) -> str:
        """``text``, ``jsonl``, ``dataset``, ``texts`` or ``tokens``.

        Raises:
            BadRequest: none of these.
        """
        if isinstance(self.source, str | Path):
            suffix = Path(self.source).suffix
            if isinstance(self.source, str) and _DATASET_NAME.fullmatch(self.source) and suffix not in _FILE_SUFFIXES:
                return "text" if Path(self.source).exists() else "dataset"
            return "jsonl" if suffix in ROW_SUFFIXES else "text"
        if isinstance(self.source, Tensor):
            return "tokens"
        if isinstance(self.source, list | tuple) and self.source:
            return "texts" if all(isinstance(text, str) for text in self.source) else "tokens"
        found = f"{type(self.source).__name__} {str(self.source)[:60]!r}"
        raise BadRequest(f"a calibration source is a file, a data set's name, texts or windows of token ids, got {found}.")

    @property
    def extras(self) -> dict[str, str]:
        """Those of ``column``, ``split`` and ``config`` that are given."""
        return {key: getattr(self, key) for key in ("column", "split", "config") if getattr(self, key) is not None}

    def generator(self) -> torch.Generator:
        """A fresh generator of this request's seed."""
        return torch.Generator().manual_seed(self.seed)


def parse(source: Any, sequences: int, length: int, seed: int) -> Request:
    """The request a source and the sizes stand for; the keys of a mapping source come first.

    Raises:
        BadRequest: an unknown key, or a value out of range or without meaning for the kind of source.
    """
    given = {"source": source, "sequences": sequences, "length": length, "seed": seed}
    if isinstance(source, Mapping):
        known = [field.name for field in fields(Request)]
        if wrong := [key for key in source if key not in known]:
            raise BadRequest(unknown_name("calibration setting", wrong[0], known))
        if source.get("source") is None:
            raise BadRequest("calibration settings need a 'source': a file, a data set's name, texts or token ids.")
        given |= {key: value for key, value in source.items() if value is not None}
    request = Request(**given)
    for name, least in (("sequences", 1), ("length", 1), ("seed", 0)):
        value = getattr(request, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
            raise BadRequest(f"calibration {name} must be a whole number of {least} or more, got {value!r}.")
    uses = {"jsonl": ("column",), "dataset": ("column", "split", "config")}.get(request.kind, ())
    for name, value in request.extras.items():
        if not isinstance(value, str):
            raise BadRequest(f"calibration {name} must be a name, got {value!r}.")
        if name not in uses:
            raise BadRequest(f"calibration {name}={value!r} has no meaning for {request.kind}; leave it out.")
    return request
