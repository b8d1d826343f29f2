"""Checkpoints on disk: quantize one into another, load one, say what is in one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_lowbit.errors import BadRequest, FormatError, LowBitError
from hf_lowbit.format.serialize import Record, read_record, sort_header
from hf_lowbit.plugin.config import QUANT_METHOD, LowBitConfig
from hf_lowbit.plugin.explain import Explanation, explain


def show_progress(on: bool) -> None:
    """Turn the host's progress bars (loading, and with it quantizing) on or off."""
    from transformers.utils import logging

    (logging.enable_progress_bar if on else logging.disable_progress_bar)()


def load_model(source: str, dtype: str = "auto", device: str = "cpu", config: LowBitConfig | None = None) -> nn.Module:
    """A causal LM in eval mode from a directory or Hub id, quantized on the way if ``config`` is given.

    Raises:
        BadRequest: nothing there, or a device that is not.
        FormatError: a damaged or newer checkpoint.
    """
    from transformers import AutoModelForCausalLM

    if device != "cpu" and device.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise BadRequest(f"device {device!r} was asked for, but torch finds no CUDA device here. Use --device cpu.")
    _check_source(source)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if device != "cpu":
        options["device_map"] = device
    if config is not None:
        options["quantization_config"] = config
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options).eval()
    except LowBitError:
        raise
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FormatError(f"{source}: a file is damaged or incomplete ({error}). Fetch it again.") from error
    except (OSError, ValueError) as error:
        raise BadRequest(f"cannot load {source!r}: {_first_lines(error)}") from error


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        BadRequest: there is none.
    """
    from transformers import AutoTokenizer

    _check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise BadRequest(f"cannot load a tokenizer from {source!r}: {_first_lines(error)}") from error


def quantize_checkpoint(source: str, destination: str | Path, config: LowBitConfig, device: str = "cpu") -> Explanation:
    """Quantize a checkpoint into a new directory, which appears whole or not at all.

    Raises:
        BadRequest: the destination exists and is not empty, or cannot be written.
        LowBitError: loading or quantizing failed, or the disk is full; nothing is left behind.
    """
    with new_directory(Path(destination)) as folder:
        model = load_model(source, device=device, config=config)
        report = explain(model)
        model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            sort_header(file)
        try:
            tokenizer = load_tokenizer(source)
        except BadRequest:
            return report  # weights without a tokenizer are a checkpoint all the same
        tokenizer.save_pretrained(folder)
    return report


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A temporary directory beside ``destination`` that takes its name on success and vanishes on any error.

    Raises:
        BadRequest: ``destination`` exists and is not an empty directory, or its parent cannot be written.
        LowBitError: writing failed (a full disk, say).
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise BadRequest(f"{destination} exists and is not an empty directory. Choose another name or remove it.")
    partial = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise BadRequest(f"{destination} cannot be written: {error.strerror or error}.") from error
    try:
        yield partial
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except (OSError, SafetensorError) as error:
        raise LowBitError(f"writing {destination} failed ({error}); nothing was left behind.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Contents:
    """What the files of a quantized checkpoint hold; ``headers + tensors == file_bytes``."""

    config: LowBitConfig
    record: Record
    file_bytes: int
    header_bytes: int
    weights: int
    dense: dict[str, int]  # name -> bytes of tensors in high precision

    @property
    def bits_per_weight_model(self) -> float:
        """All file bits, headers included, per logical weight."""
        return 8 * self.file_bytes / self.weights


def read_contents(directory: str | Path) -> Contents:
    """Read headers, check every checksum, and count every byte of a quantized checkpoint.

    Raises:
        BadRequest: not a directory, or not one of ours.
        FormatError: damaged, incomplete, inconsistent or too new.
    """
    folder = Path(directory)
    _check_source(str(folder))
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{folder}/config.json is missing or damaged ({error}).") from error
    if settings.get("quant_method") != QUANT_METHOD:
        raise BadRequest(f"{folder} is not an hf-lowbit checkpoint: its config names {settings.get('quant_method')!r}.")
    config = LowBitConfig.from_dict(settings)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder} holds no safetensors file.")
    record = read_record(files)
    packed = {f"{name}_{stored}" for name, layout in record.layouts.items() for stored in layout.fields}
    dense: dict[str, int] = {}
    weights, total, headers = sum(layout.numel for layout in record.layouts.values()), 0, 0
    for file in files:
        total += file.stat().st_size
        headers += 8 + int.from_bytes(file.open("rb").read(8), "little")
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():
                if name not in packed:
                    tensor = handle.get_tensor(name)
                    dense[name] = tensor.numel() * tensor.element_size()
                    weights += tensor.numel()
    return Contents(config, record, total, headers, weights, dense)


def _check_source(source: str) -> None:
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith(".") or source.count("/") != 1
    if not path.exists() and looks_local:
        raise BadRequest(f"{source!r} is neither a directory here nor a Hub id (user/name).")
    if path.exists() and not (path / "config.json").is_file():
        raise BadRequest(f"{source!r} holds no config.json, so it is not a model checkpoint.")


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())


def is_low_bit(source: str) -> bool:
    """Whether a local directory's config names our quantization method."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids ``[n]`` of a text of any length, without special tokens and without the length warning."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
