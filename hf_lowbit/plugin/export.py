"""Checkpoints of ours in the formats of other tools: checked matrix by matrix, then written, each number as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit._version import __version__
from hf_lowbit.errors import BadRequest
from hf_lowbit.exchange import Misfit, Scheme, Target, target_of
from hf_lowbit.exchange.grid import exactly
from hf_lowbit.format.activations import ActivationLayout
from hf_lowbit.format.serialize import ACTIVATION, Record, field_name
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.pipeline.fingerprint import fingerprint_of_files
from hf_lowbit.pipeline.shard_files import StoredTensors, write_shards
from hf_lowbit.pipeline.workspace import Workspace
from hf_lowbit.plugin.checkpoint import read_contents, weight_files
from hf_lowbit.plugin.companions import described_model, read_config, write_companions
from hf_lowbit.plugin.gguf_export import write_gguf
from hf_lowbit.plugin.modules import ActivationQuantizer, LowBitLinear
from hf_lowbit.plugin.sites import is_flipped
from hf_lowbit.plugin.targets import ends_of

Progress = Callable[[int, int, str], None]
DTYPES = ("bfloat16", "float16", "float32")
DENSE_ENDS = "this format keeps embedding and head dense: --dtype float32, or quantize with --no-quantize-embeddings."


@dataclass
class Exported:
    """What an export wrote: bytes, how many matrices in which form, and what users should know."""

    bytes: int
    forms: dict[str, int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stored:
    """One of our checkpoints, opened and verified."""

    folder: Path
    config: dict[str, Any]
    record: Record
    tensors: StoredTensors
    model: Any
    dtype: torch.dtype

    def matrix(self, full: str) -> LowBitTensor:
        """A low-bit parameter."""
        layout = self.record.layouts[full]
        return LowBitTensor(layout, {stored: self.tensors[field_name(full, stored)] for stored in layout.fields})

    def activation(self, full: str) -> ActivationQuantizer | None:
        """What is done to the inputs of a matrix, if anything."""
        module = full.removesuffix(".weight")
        layout = self.record.activations.get(module)
        if layout is None:
            return None
        return ActivationQuantizer(layout, {n: self.tensors[f"{module}.{ACTIVATION}.{n}"] for n in layout.fields})

    @property
    def dense(self) -> list[str]:
        """Names of the tensors in high precision."""
        packed = {field_name(n, stored) for n, layout in self.record.layouts.items() for stored in layout.fields}
        rest = [name for name in self.tensors.places if name not in packed]
        inputs = tuple(f"{module}.{ACTIVATION}." for module in self.record.activations)
        return [name for name in rest if not name.startswith(inputs)] if inputs else rest

    def is_linear(self, full: str) -> bool:
        """Whether a parameter is a linear layer's inside the blocks."""
        module = self.model.get_submodule(full.rpartition(".")[0])
        return module not in ends_of(self.model) and not isinstance(module, nn.Embedding)


def open_stored(directory: str | Path, dtype: str | None) -> Stored:
    """Open a checkpoint; every checksum is verified.

    Args:
        dtype: of what the export writes dense; None is the checkpoint's own.
    """
    contents, folder = read_contents(directory), Path(directory)
    config = read_config(folder)
    name = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise BadRequest(f"dtype {name!r} cannot be exported in; use --dtype {', '.join(DTYPES)}.")
    stored = StoredTensors(weight_files(str(folder)))
    return Stored(folder, config, contents.record, stored, described_model(folder), getattr(torch, name))


def export_checkpoint(
    directory: str | Path, destination: str | Path, to: str, dtype: str | None = None, progress: Progress | None = None
) -> Exported:
    """Write a checkpoint of ours in another format. The source is read only; the result appears whole or not at all.

    Args:
        directory: of the checkpoint.
        destination: directory to write, or for ``gguf`` the file.
        to: ``compressed-tensors``, ``gptq``, ``gguf`` or ``dense``.
        dtype: of scales and dense weights; None is the checkpoint's own.
        progress: called for each matrix that is written.

    Raises:
        Misfit: what the target cannot express, by matrix and field, before anything is written.
        BadRequest: the destination is taken, or an unknown target.
        FormatError: a damaged checkpoint.
    """
    target = target_of(to)
    stored = open_stored(directory, dtype)
    check_activations(target, stored.record.activations)
    if to == "gguf":
        blocks, note = write_gguf(stored, Path(destination), progress)
        return Exported(Path(destination).stat().st_size, blocks, [note] if note else [])
    schemes = {full.removesuffix(".weight"): scheme for full, scheme in _schemes(stored, target)}
    schemes = dict(target.together(schemes)) if schemes else {}
    files = weight_files(str(stored.folder))
    identity = {"export": to, "dtype": str(stored.dtype), "model": fingerprint_of_files(files), "version": __version__}
    with Workspace.open(destination, identity) as work:
        work.finish(partial(_write, stored, target, schemes, progress))
    size = sum(file.stat().st_size for file in Path(destination).glob("*.safetensors"))
    forms = Counter(f"{scheme.bits} bits, groups of {scheme.group_size or 'a row'}" for scheme in schemes.values())
    if left := len(stored.record.layouts) - len(schemes):
        forms[str(stored.dtype).removeprefix("torch.")] = left
    notes = []
    if stored.config.get("quantization_config", {}).get("kv_cache") is not None:
        notes.append("the setting kv_cache has no place there and was left out")
    return Exported(size, dict(forms), notes)


def check_activations(target: Target, activations: dict[str, ActivationLayout]) -> None:
    """Refuse what is done to inputs at run time, but for what can be multiplied into a dense matrix.

    Raises:
        Misfit: naming the module.
    """
    for module, layout in activations.items():
        if layout.spec is not None:
            raise Misfit("activation_bits", layout.spec.bits, "inputs that are rounded have no place there.", module)
        if target.name != "dense":
            raise Misfit("what a transform does to inputs at run time", "there", "only --to dense multiplies it in.", module)


def _schemes(stored: Stored, target: Target) -> Iterator[tuple[str, Scheme]]:
    if target.scheme is None:
        return
    for full in stored.record.layouts:
        record = stored.matrix(full)
        try:
            if stored.is_linear(full):
                if is_flipped(stored.model.get_submodule(full.rpartition(".")[0])):
                    raise Misfit("the module", "a Conv1D", "only linear layers can be written; --to dense holds it.")
                yield full, target.scheme(record, stored.dtype)
            else:
                exactly(record.dequantize(), stored.dtype, "a value", DENSE_ENDS)
        except Misfit as misfit:
            raise misfit.at(full) from misfit


def _write(stored: Stored, target: Target, schemes: dict[str, Scheme], progress: Progress | None, folder: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in stored.dense:
            value = stored.tensors[name]
            yield name, value.to(stored.dtype) if target.name == "dense" and value.is_floating_point() else value
        for number, full in enumerate(stored.record.layouts, 1):
            module = full.removesuffix(".weight")
            if module in schemes:
                assert target.tensors is not None
                fields = target.tensors(stored.matrix(full), schemes[module], stored.dtype)
                yield from ((f"{module}.{name}", value) for name, value in fields.items())
            else:
                yield full, dense_weight(stored, full)
            if progress is not None:
                progress(number, len(stored.record.layouts), full)

    write_shards(folder, tensors())
    linear = [name for name, module in stored.model.named_modules() if isinstance(module, nn.Linear)]
    settings = target.settings(schemes, [name for name in linear if name not in schemes]) if target.settings else None
    config = stored.config | {"dtype": str(stored.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    write_companions(stored.folder, folder, config, settings)


def dense_weight(stored: Stored, full: str) -> Tensor:
    """A parameter as a stock module holds it, what a transform does to its inputs multiplied in."""
    record, activation = stored.matrix(full), stored.activation(full)
    host: Any = stored.model.get_submodule(full.rpartition(".")[0])
    if len(record.shape) == 2 and not isinstance(host, nn.Embedding):
        linear = LowBitLinear.from_tensor(record)
        linear.activation, linear.transposed = activation, is_flipped(host)
        shape = host.weight.shape
        linear.in_features = shape[0] if linear.transposed else shape[1]
        return linear.dense(stored.dtype)
    weight = record.dequantize(stored.dtype)
    return weight.transpose(-1, -2).contiguous() if is_flipped(host) else weight
