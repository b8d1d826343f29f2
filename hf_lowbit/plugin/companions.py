"""What lies beside the weights of a checkpoint: settings and the model they describe, tokenizer, generation defaults."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_lowbit.errors import BadRequest, FormatError

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# They describe the weights as they were, or this very file replaces them.
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", "quantization_report.json", "quant_log.json")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        FormatError: it is damaged.
    """
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is damaged ({error}). Fetch it again.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file} is damaged: it holds no settings by name. Fetch it again.")
    return found


def write_companions(source: Path, folder: Path, config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> None:
    """Write a copied ``config.json`` with other quantization settings, and copy what belongs to the tokenizer."""
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    if quantization is not None:
        values["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for file in sorted(source.iterdir()):
        index = file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in _NOT_COPIED and not index:
            shutil.copyfile(file, folder / file.name)


def described_model(folder: Path) -> Any:
    """The dense model a checkpoint's config describes, on the meta device.

    Raises:
        BadRequest: it describes none.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        described = AutoConfig.from_pretrained(folder)
        described = copy.deepcopy(described)
        if hasattr(described, "quantization_config"):
            del described.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError) as error:
        raise BadRequest(f"cannot build the model of {str(folder)!r}: {error}") from error
