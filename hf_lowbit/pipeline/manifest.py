"""The manifest of a workspace: for whom its parts were made, and which are finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.pipeline.durable import crc32, replacing
from hf_lowbit.pipeline.fingerprint import differences

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
_NAMED_DIFFERENCES = 6

# file, crc32, bytes, report
Part = dict[str, Any]


def part_file(folder: Path, name: str) -> Path:
    """Where a part is kept."""
    return folder / f"part-{quote(name, safe='')}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        fingerprint: JSON values that decide what the parts are.
        parts: name -> its ``file``, ``crc32``, ``bytes`` and ``report``, in the order they were finished.
        handing_over: the result is complete and about to get the destination's name.
    """

    fingerprint: dict[str, Any]
    parts: dict[str, Part]
    handing_over: bool = False

    def write(self, folder: Path) -> None:
        """Replace the manifest of a workspace in one step."""
        content = {"manifest_version": MANIFEST_VERSION, **vars(self)}
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a workspace, or None where there is none.

        Raises:
            FormatError: a damaged one, or one of another version.
        """
        file = folder / MANIFEST
        if not file.exists():
            return None
        remedy = f"Remove {folder} or pass --restart to begin anew."
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            version = found.pop("manifest_version")
            if version == MANIFEST_VERSION:
                complete = all({"crc32", "bytes", "report"} <= part.keys() for part in found["parts"].values())
                if not complete or not isinstance(found["fingerprint"], dict):
                    raise ValueError("an entry is incomplete")
                return cls(**found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{file} is damaged ({error!r}), so it cannot say what is finished. {remedy}") from error
        raise FormatError(f"{file} has version {version!r}, this hf-lowbit works with {MANIFEST_VERSION}. {remedy}")

    def check_same(self, fingerprint: dict[str, Any], folder: Path) -> None:
        """Refuse to go on with parts that were made for something else.

        Raises:
            BadRequest: naming what differs.
        """
        if not (changes := list(differences(self.fingerprint, fingerprint))):
            return
        more = f" and {len(changes) - _NAMED_DIFFERENCES} more" if len(changes) > _NAMED_DIFFERENCES else ""
        raise BadRequest(
            f"{folder} holds the unfinished work of another run: {'; '.join(changes[:_NAMED_DIFFERENCES])}{more}. "
            "Ask for the same again to go on with it, or remove that directory or pass --restart to begin anew."
        )

    def whole_parts(self, folder: Path) -> tuple[dict[str, Part], list[str]]:
        """The parts whose files are as they were written, and a note on each other one; reads every byte."""
        whole, notes = {}, []
        for name, part in self.parts.items():
            file, state = part_file(folder, name), "damaged"
            try:
                if file.stat().st_size == part["bytes"] and crc32(file) == part["crc32"]:
                    whole[name] = part
                    continue
            except OSError as error:
                state = f"lost ({error.strerror})"
            notes.append(f"finished part {name!r} is {state}: it is made again.")
        return whole, notes
