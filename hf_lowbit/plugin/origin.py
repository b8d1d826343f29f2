"""Where a low-bit model comes from: its original, that one's licence, and the release that made it, kept in config.json."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Key of config.json, which the host carries along and other releases ignore.
MADE_FROM = "hf_lowbit_made_from"
LICENCE = ("license", "license_name", "license_link")


def note_origin(model: PreTrainedModel) -> None:
    """Write into a model's config what it was made from: ``hub_id`` and ``revision``, or the name of a ``directory``."""
    source = model.name_or_path
    found: dict[str, Any] = {"made_by": f"hf-lowbit {__version__}{_commit()}"}
    if source and Path(source).is_dir():
        # Paths of a machine say nothing to others.
        found |= {"directory": Path(source).resolve().name} | _licence_in(Path(source) / "README.md")
    elif source.count("/") == 1:
        found |= {"hub_id": source, "revision": getattr(model.config, "_commit_hash", None)}
    setattr(model.config, MADE_FROM, found)


def licence_of(card: Any) -> dict[str, str]:
    """The licence keys of a card's front matter."""
    values = {key: getattr(card, key, None) for key in LICENCE}
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _licence_in(file: Path) -> dict[str, str]:
    from huggingface_hub import ModelCard

    with suppress(Exception):  # a source's README may be anything; without front matter that reads it has no licence
        return licence_of(ModelCard.load(file).data) if file.is_file() else {}
    return {}


def _commit() -> str:
    """The commit a package was installed from, where pip noted one."""
    try:
        noted = json.loads(distribution("hf-lowbit").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return ""
    commit = noted.get("vcs_info", {}).get("commit_id")
    return f" ({commit[:12]})" if commit else ""
