"""Checkpoints that other tools quantized, taken over matrix by matrix: the same numbers in our format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_lowbit._version import __version__
from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.exchange import Misfit, Reader, open_reader
from hf_lowbit.format.ledger import ledger
from hf_lowbit.format.serialize import Record, checksum, field_name
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.pipeline.fingerprint import fingerprint_of_files
from hf_lowbit.pipeline.run import Report
from hf_lowbit.pipeline.shard_files import StoredTensors, write_shards
from hf_lowbit.pipeline.workspace import Workspace
from hf_lowbit.plugin.checkpoint import is_low_bit, weight_files
from hf_lowbit.plugin.companions import described_model, read_config, write_companions
from hf_lowbit.plugin.compress import Progress
from hf_lowbit.plugin.config import IMPORTED, LowBitConfig
from hf_lowbit.plugin.targets import ends_of

# What stands before the number of a layer in a name.
_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class _Source:
    """A foreign checkpoint, checked: every tensor of it has its place in the model, and the model gets all it needs."""

    folder: Path
    files: list[Path]
    config: dict[str, Any]
    reader: Reader
    stored: StoredTensors
    sites: dict[str, dict[str, str]]  # module -> field -> tensor
    dense: list[str]
    ends: list[str]

    def record(self, module: str) -> LowBitTensor:
        """One matrix."""
        try:
            return self.reader.record({field: self.stored[name] for field, name in self.sites[module].items()})
        except Misfit as misfit:
            raise misfit.at(f"{module}.weight") from misfit


def import_checkpoint(
    source: str, destination: str | Path, restart: bool = False, progress: Progress | None = None
) -> Report:
    """Write a checkpoint of another tool in our format; each matrix decodes to the numbers it had.

    The source is read only. A killed import goes on where it stood.

    Args:
        source: directory or Hub id of a checkpoint of GPTQ, AWQ (gemm), bitsandbytes (NF4) or compressed-tensors
            (pack-quantized).
        destination: directory to write; must not hold anything yet.
        restart: throw away what a killed run finished.
        progress: called after each layer.

    Returns:
        A row for each matrix: ``name`` and ``bits_per_weight``.

    Raises:
        BadRequest: the destination is taken, or the source is not quantized or by a method nobody reads here.
        Misfit: naming the field that our format cannot hold.
        FormatError: a damaged source.
    """
    found = _open_source(source)
    _read_one_of_each(found)
    layers: dict[str, list[str]] = {}
    for module in found.sites:
        match = _LAYER.match(f"{module}.")
        layers.setdefault(match[1] if match else "ends", []).append(module)
    identity = {"import": found.reader.source, "model": fingerprint_of_files(found.files), "version": __version__}
    rows: Report = []
    with Workspace.open(destination, identity, restart) as work:
        for number, (layer, modules) in enumerate(layers.items(), 1):
            if layer not in work.finished():
                try:
                    records = {f"{module}.weight": found.record(module) for module in modules}
                except Misfit:
                    work.discard()  # asked for the same again, it would fail the same
                    raise
                report = [{"name": n, "bits_per_weight": ledger(r.layout).bits_per_weight} for n, r in records.items()]
                work.put(layer, records, report)
            rows += work.get(layer)[1]
            if progress is not None:
                progress(number, len(layers), layer)
        work.finish(partial(_write, found, work, list(layers)))
    return rows


def _open_source(source: str) -> _Source:
    if is_low_bit(source):
        raise BadRequest(f"{source!r} is an hf-lowbit checkpoint already.")
    folder = Path(source)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source))
    config = read_config(folder)
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        raise BadRequest(
            f"{source!r} is not quantized: its config.json has no quantization_config. Leave --from-quantized out."
        )
    reader = open_reader(settings)
    files = weight_files(str(folder))
    stored = StoredTensors(files)
    sites = reader.sites(stored.places)
    if not sites:
        raise FormatError(f"{folder}: no tensor is named *.{reader.marker}, which {reader.source} calls its codes.")
    model = described_model(folder)
    ends = [name for name, module in model.named_modules() if module in ends_of(model) and name in sites]
    return _Source(folder, files, config, reader, stored, sites, _dense_names(model, stored, sites), ends)


def _dense_names(model: Any, stored: StoredTensors, sites: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Tensors to take over as they are; every other one of the files belongs to a site or says nothing."""
    for module in sites:
        try:
            found = model.get_submodule(module)
        except AttributeError:
            found = None
        if type(found) is not nn.Linear:
            what = "no module" if found is None else f"a {type(found).__name__}"
            raise Misfit(
                "the module", what, f"only linear layers of {type(model).__name__} can be imported.", f"{module}.weight"
            )
    wanted = set(model.state_dict()) - {f"{module}.weight" for module in sites}
    taken = {name for fields in sites.values() for name in fields.values()}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]
    for name in sorted(stored.places.keys() - wanted - taken):
        empty = name.endswith(".bias") and name.removesuffix(".bias") in sites and not bool(stored[name].any())
        if not empty and name not in ties and not any(re.search(pattern, name) for pattern in ignored):
            raise FormatError(f"the files hold {name!r}, which {type(model).__name__} does not have. Nothing was written.")
    if missing := sorted(wanted - stored.places.keys() - ties.keys()):
        raise FormatError(f"the files lack {missing[0]!r} ({len(missing)} missing in all), which config.json asks for.")
    return [name for name in stored.places if name in wanted]


def _read_one_of_each(found: _Source) -> None:
    """Refuse what shows in headers and small tensors before anything is written: each field, in one matrix of each shape."""
    seen = set()
    for module, fields in found.sites.items():
        shapes = tuple((field, found.stored.shape(name)) for field, name in fields.items())
        if shapes not in seen:
            seen.add(shapes)
            found.record(module)


def _write(found: _Source, work: Workspace, layers: list[str], folder: Path) -> None:
    def records() -> Iterator[tuple[str, LowBitTensor]]:
        for layer in layers:
            yield from work.get(layer)[0].items()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in found.dense:
            yield name, found.stored[name]
        for full, record in records():
            for stored, value in record.tensors.items():
                yield field_name(full, stored), value

    record = Record(
        layouts={full: one.layout for full, one in records()},
        checksums={name: checksum(value) for name, value in tensors()},
        kept={
            name: f"left in high precision by {found.reader.source}"
            for name in found.dense
            if len(found.stored.shape(name)) > 1
        },
        ends=tuple(f"{name}.weight" for name in found.ends),
    )
    write_shards(folder, tensors(), record.to_metadata())
    reader = found.reader
    config = LowBitConfig(
        method=IMPORTED,
        bits=reader.bits,
        group_size=reader.group_size,
        scale_bits=16,
        options={"source": reader.source},
        quantize_embeddings=bool(found.ends),
        format_version=record.format_version,
    )
    write_companions(found.folder, folder, found.config, config.to_dict())
