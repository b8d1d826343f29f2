"""A checkpoint's safetensors files: read tensor by tensor, written from a stream with one file's worth of it in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_lowbit.errors import FormatError
from hf_lowbit.format.serialize import sort_header

# A file is complete in memory before it is written.
SHARD_BYTES = 1 << 29
INDEX = "model.safetensors.index.json"


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None, limit: int = SHARD_BYTES
) -> int:
    """Write tensors under the host's names: one ``model.safetensors``, or numbered files and their index.

    Args:
        tensors: names and contents in the order they are to be stored.
        metadata: header entries of every file.
        limit: bytes of a file, unless a single tensor is larger.

    Returns:
        Bytes of all tensors.
    """
    header = {"format": "pt", **(metadata or {})}
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for group in _grouped(tensors, limit):
        file = folder / f"part-{len(written)}.safetensors"
        save_file(group, str(file), metadata=header)
        sort_header(file)
        total += sum(tensor.nbytes for tensor in group.values())
        written.append((file, list(group)))
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(written, 1):
        count = len(written)
        final = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        file.rename(folder / final)
        places |= dict.fromkeys(names, final)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _grouped(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += tensor.nbytes
    if group:
        yield group


class StoredTensors:
    """The tensors of a checkpoint's files by name; each is read by itself and its file's mapping closed after it.

    Args:
        files: safetensors files.

    Raises:
        FormatError: a file that is not complete.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.places: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as handle:
                    self.places |= dict.fromkeys(handle.keys(), file)
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{file} is not a complete safetensors file ({error}). Fetch it again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        with safe_open(str(self.places[name]), framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(str(self.places[name]), framework="pt") as handle:
            return handle.get_tensor(name)
