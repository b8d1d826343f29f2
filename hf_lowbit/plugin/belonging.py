"""Whether the files of a checkpoint and the model that config.json makes belong together: names, completeness, shapes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from hf_lowbit.errors import FormatError
from hf_lowbit.format.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def safetensors_of(files: Any) -> list[str]:
    """The safetensors files of a checkpoint.

    Raises:
        FormatError: there is none.
    """
    found = [str(file) for file in files or [] if str(file).endswith(".safetensors")]
    if not found:
        raise FormatError("there is no safetensors file to load; hf-lowbit reads no other kind.")
    return found


def by_model_name(model: PreTrainedModel, layouts: dict[str, Layout]) -> dict[str, Layout]:
    """Layouts under this model's names: a base model loads its head's checkpoint without the prefix, and vice versa."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    out = {}
    for full, layout in layouts.items():
        candidates = [full, full.removeprefix(prefix), prefix + full]
        found = next((name for name in candidates if has_parameter(model, name)), None)
        if found is not None:
            out[found] = layout
        elif not re.search(r"(head|score|classifier)\b", full):
            raise FormatError(f"the checkpoint holds low-bit {full!r}, which {type(model).__name__} does not have.")
    return out


def has_parameter(model: PreTrainedModel, full: str) -> bool:
    """Whether a dense parameter has this name."""
    try:
        model.get_parameter(full)
    except AttributeError:
        return False
    return True


def is_whole(model: PreTrainedModel) -> bool:
    """Whether the checkpoint is one of this very class, so that nothing of the model may be new."""
    return type(model).__name__ in (model.config.architectures or [])


def check_complete(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse files that lack what config.json asks for: the host would go on with random numbers and a warning."""
    if not is_whole(model):
        return
    held: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as handle:
            held |= set(handle.keys())
    free = [*(model._keys_to_ignore_on_load_missing or [])]
    ties = model.all_tied_weights_keys
    lacking = [n for n in model.state_dict() if n not in held and n not in ties and not any(re.search(p, n) for p in free)]
    if lacking:
        raise FormatError(
            f"the files lack {lacking[0]!r} ({len(lacking)} missing in all), which config.json asks for. "
            "Config and weights are not of one checkpoint, or a file is missing."
        )


def check_shapes(model: PreTrainedModel, layouts: dict[str, Layout]) -> None:
    """:func:`check_shape` of every low-bit matrix, in the file's order of axes."""
    for full, layout in layouts.items():
        module = model.get_submodule(full.rpartition(".")[0])
        shape = list(model.get_parameter(full).shape)
        if isinstance(module, Conv1D) or getattr(module, "is_transposed", False):
            shape[-2:] = shape[:-3:-1]
        check_shape(full, shape, list(layout.shape))


def check_shape(full: str, wanted: list[int], found: list[int]) -> None:
    """Refuse a stored matrix of another shape than the model built from config.json has.

    Raises:
        FormatError: naming both.
    """
    if wanted != found:
        raise FormatError(
            f"config.json makes {full!r} {wanted}, the file holds {found}. Config and weights are not of one checkpoint."
        )
