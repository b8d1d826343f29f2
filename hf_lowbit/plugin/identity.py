"""What a measured number depends on: which weights, which tokenizer, which versions, which arithmetic."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hf_lowbit.format.serialize import Record, field_name
from hf_lowbit.kernels import cpu, cpu_library

SAMPLE = 1 << 12
PACKAGES = ("hf-lowbit", "transformers", "torch", "tokenizers", "safetensors", "lm_eval", "datasets")


def weights_fingerprint(model: Any) -> str:
    """SHA-256 over names, shapes, types and three samples of each stored tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        middle = max(0, len(flat) // 2 - SAMPLE // 2)
        for start in sorted({0, middle, max(0, len(flat) - SAMPLE)}):
            piece = flat[start : start + SAMPLE].cpu().contiguous()
            digest.update(piece.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over all a tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_identity(record: Record) -> dict[str, Any]:
    """What tells one low-bit checkpoint from another, however it is cut into files.

    Returns:
        ``format_version``; ``plan``, a SHA-256 over what was done to each matrix; ``weights``, one over the checksums of all
        low-bit tensors, which are the same in a file and in a model of any dtype.
    """
    packed = [field_name(name, stored) for name, layout in record.layouts.items() for stored in layout.fields]
    plan = {name: layout.to_json() for name, layout in record.layouts.items()}
    plan |= {f"{name} inputs": layout.to_json() for name, layout in record.activations.items()}
    return {
        "format_version": record.format_version,
        "plan": _digest([plan, list(record.transforms)]),
        "weights": _digest({name: record.checksums.get(name) for name in packed}),
    }


def circumstances(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Versions, tokenizer and arithmetic of a run, as JSON values."""
    return {
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "arithmetic": next(name for name, number in cpu.MODES.items() if number == cpu.mode()),
        "instruction_set": cpu_library.instruction_set(),
        "threads": torch.get_num_threads(),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
