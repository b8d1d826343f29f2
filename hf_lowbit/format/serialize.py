"""Low-bit tensors in safetensors files: names, the header record, version and checksums.

A parameter ``layers.0.q_proj.weight`` becomes the tensors ``layers.0.q_proj.weight_codes``, ``..._scale`` and so on. The
header of every file carries one entry, ``hf_lowbit``: a JSON object with the format version, the layout of each
parameter and a CRC-32 of each tensor the writer knew, plus ``hf_lowbit_crc``, the CRC-32 of that JSON text.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_lowbit.errors import FormatError
from hf_lowbit.format.activations import ActivationLayout
from hf_lowbit.format.layout import Layout
from hf_lowbit.format.scales import WIDE
from hf_lowbit.format.tensor import LowBitTensor

FORMAT_VERSION = 3
# What files state that hold less, so that older releases read them: no zero points, scales of 32 bits or levels ``qlora``;
# and no rewritten or rounded activations either.
REWRITTEN_VERSION = 2
PLAIN_VERSION = 1
RECORD_KEY = "hf_lowbit"
RECORD_CRC_KEY = "hf_lowbit_crc"
# Tensors of an activation layout are named MODULE.activation.FIELD.
ACTIVATION = "activation"


@dataclass(frozen=True)
class Record:
    """What a checkpoint's header says.

    Attributes:
        layouts: parameter name -> layout.
        checksums: tensor name -> CRC-32 of its bytes.
        kept: parameter name -> why it was left in high precision.
        ends: low-bit parameters that are the input embedding or the output head, which reports count apart.
        activations: module name -> what is done to its inputs; from format version 2 on.
        transforms: what was done to the model before, step by step: JSON objects with ``transform``, ``kind``, ``site`` and
            ``digest``.
    """

    layouts: dict[str, Layout]
    checksums: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    activations: dict[str, ActivationLayout] = field(default_factory=dict)
    transforms: tuple[dict[str, str], ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """The two header entries."""
        rewritten: dict[str, object] = {}
        if self.activations:
            rewritten["activations"] = {name: layout.to_json() for name, layout in sorted(self.activations.items())}
        if self.transforms:
            rewritten["transforms"] = list(self.transforms)
        text = json.dumps(
            {
                "format_version": self.format_version,
                "tensors": {name: layout.to_json() for name, layout in sorted(self.layouts.items())},
                "crc32": dict(sorted(self.checksums.items())),
                "kept": dict(sorted(self.kept.items())),
                "ends": list(self.ends),
                **rewritten,
            },
            separators=(",", ":"),
        )
        return {RECORD_KEY: text, RECORD_CRC_KEY: str(zlib.crc32(text.encode()))}

    @property
    def format_version(self) -> int:
        """The oldest format version that can state this."""
        stages = [stage for layout in self.layouts.values() for stage in layout.stages]
        if any(stage.zero or stage.scale_bits == WIDE or stage.levels.family == "qlora" for stage in stages):
            return FORMAT_VERSION
        return REWRITTEN_VERSION if self.activations else PLAIN_VERSION

    @property
    def block_layouts(self) -> list[Layout]:
        """Layouts of the matrices inside blocks: all but the ends (or all, where there is nothing else)."""
        return [v for k, v in self.layouts.items() if k not in self.ends] or list(self.layouts.values())

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, where: str) -> Record:
        """Inverse of :meth:`to_metadata`; ``where`` names the file in messages.

        Raises:
            FormatError: no record, a damaged one, or one of a newer format version.
        """
        text = (metadata or {}).get(RECORD_KEY)
        if text is None:
            raise FormatError(
                f"{where} holds no {RECORD_KEY!r} record in its safetensors header, so it is not an hf-lowbit file or "
                "another tool rewrote it without the header. Use the file as hf-lowbit saved it."
            )
        if str(zlib.crc32(text.encode())) != (metadata or {}).get(RECORD_CRC_KEY):
            raise FormatError(f"{where}: the {RECORD_KEY!r} record in the header is damaged (checksum). Fetch it again.")
        values = json.loads(text)
        check_version(values.get("format_version") if isinstance(values, dict) else None, where)
        try:
            layouts = {name: Layout.from_json(entry) for name, entry in values["tensors"].items()}
            activations = {n: ActivationLayout.from_json(entry) for n, entry in values.get("activations", {}).items()}
            steps = tuple(values.get("transforms", ()))
            return cls(layouts, values["crc32"], values["kept"], tuple(values["ends"]), activations, steps)
        except (AttributeError, KeyError, TypeError, FormatError) as error:
            raise FormatError(f"{where}: the {RECORD_KEY!r} record is malformed ({error!r}).") from error


def check_version(version: object, where: str) -> None:
    """Refuse a format this release does not know.

    Raises:
        FormatError: naming both versions and the remedy.
    """
    if not isinstance(version, int) or version < 1:
        raise FormatError(f"{where} states format version {version!r}, which no release of hf-lowbit wrote.")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where} has format version {version}, this hf-lowbit reads up to {FORMAT_VERSION}. "
            "Upgrade it: pip install --upgrade hf-lowbit"
        )


def field_name(parameter: str, stored: str) -> str:
    """Name of one stored tensor of a parameter."""
    return f"{parameter}_{stored}"


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def read_record(files: Iterable[str | Path], verify: bool = True) -> Record:
    """The record of a checkpoint's safetensors files, after checking the stored tensors against it.

    Args:
        files: all files of the checkpoint.
        verify: compare checksums, which reads every byte once (3 GB/s here; memory-mapped, nothing is kept).

    Raises:
        FormatError: an unreadable or truncated file, no record, or tensors that disagree with it or are damaged.
    """
    record: Record | None = None
    present: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with _open(file) as handle:
            record = record or Record.from_metadata(handle.metadata(), str(file))
            for name in handle.keys():  # noqa: SIM118 - a file handle, not a dict
                piece = handle.get_slice(name)
                present[name] = (piece.get_dtype(), piece.get_shape())
                if verify and name in record.checksums and checksum(handle.get_tensor(name)) != record.checksums[name]:
                    raise FormatError(f"{file}: the bytes of tensor {name!r} are damaged (checksum). Fetch it again.")
    if record is None:
        raise FormatError("no safetensors file to read a low-bit record from.")
    if lacking := record.checksums.keys() - present.keys():
        raise FormatError(
            f"the header lists tensor {min(lacking)!r}, which no file holds ({len(lacking)} such in all). "
            "A shard is missing or damaged; fetch it again."
        )
    fields = {field_name(p, stored): f for p, layout in record.layouts.items() for stored, f in layout.fields.items()}
    fields |= {f"{m}.{ACTIVATION}.{s}": f for m, layout in record.activations.items() for s, f in layout.fields.items()}
    for name, expected in fields.items():
        wanted = (_DTYPE_NAMES[expected.dtype], list(expected.shape))
        if present.get(name) != wanted:
            found = "nothing" if name not in present else f"{present[name][0]} {present[name][1]}"
            raise FormatError(f"tensor {name!r} should be {wanted[0]} {wanted[1]}, found {found}.")
    return record


def save_tensors(path: str | Path, tensors: Mapping[str, LowBitTensor]) -> None:
    """Write low-bit tensors to one safetensors file that :func:`load_tensors` and any reader of the format opens."""
    flat = {
        field_name(name, stored): value.contiguous()
        for name, tensor in tensors.items()
        for stored, value in tensor.tensors.items()
    }
    record = Record({n: t.layout for n, t in tensors.items()}, {n: checksum(value) for n, value in flat.items()})
    save_file(flat, str(path), metadata=record.to_metadata())
    sort_header(path)


def sort_header(path: str | Path) -> None:
    """Put the entries of a file's header in a fixed order, in place, so that the same tensors are the same bytes.

    The safetensors writer orders its metadata by a hash seeded per process.
    """
    with Path(path).open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def sort_headers(folder: str | Path) -> None:
    """:func:`sort_header` of every safetensors file in a folder."""
    for file in Path(folder).glob("*.safetensors"):
        sort_header(file)


def load_tensors(path: str | Path) -> dict[str, LowBitTensor]:
    """Read every low-bit tensor of a safetensors file, with checksums verified.

    Raises:
        FormatError: see :func:`read_record`.
    """
    record = read_record([path])
    out = {}
    with _open(path) as handle:
        for parameter, layout in record.layouts.items():
            fields = {stored: handle.get_tensor(field_name(parameter, stored)) for stored in layout.fields}
            out[parameter] = LowBitTensor(layout, fields)
    return out


_DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16", torch.int32: "I32"}


def _open(file: str | Path) -> safe_open:
    if not Path(file).is_file():
        raise FormatError(f"{file} does not exist.")
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is not a complete safetensors file ({error}). Fetch it again.") from error
