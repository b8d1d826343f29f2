"""The working directory of one run: a killed run goes on where it stood, and its result appears whole or not at all.

It is a hidden sibling of the destination, ``.NAME.partial``, which holds ``manifest.json``, one file for each finished part
and a lock. A file is written under another name, synced and renamed, a part before the manifest that lists it: whatever
moment a run is killed at, all that the manifest lists is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hf_lowbit.errors import BadRequest, FormatError, LowBitError
from hf_lowbit.format.serialize import load_tensors, save_tensors
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.pipeline.durable import crc32, delete, replacing, sync
from hf_lowbit.pipeline.fingerprint import fingerprint_of_files
from hf_lowbit.pipeline.manifest import MANIFEST, Manifest, Part, part_file

__all__ = ["Workspace", "fingerprint_of_files"]

LOCK, RESULT = "lock", "result"


class Workspace:
    """Finished parts of a run, and the way to its destination; a context manager that holds the lock.

    On leaving, finished parts stay for the next run with the same fingerprint; with none, nothing is left behind.

    Attributes:
        destination: where the result goes.
        folder: the working directory.
        notes: what :meth:`open` found damaged or missing and dropped, for the caller to report.
    """

    def __init__(self, destination: Path) -> None:
        """Private: see :meth:`open`."""
        self.destination = Path(os.path.abspath(destination))
        self.folder = self.destination.parent / f".{self.destination.name}.partial"
        self.notes: list[str] = []
        self._lock = FileLock(self.folder / LOCK, thread_local=False)
        self._fingerprint: dict[str, Any] = {}
        self._parts: dict[str, Part] = {}
        self._keep = False
        self._made: list[Path] = []

    @classmethod
    def open(cls, destination: str | Path, fingerprint: Mapping[str, Any], restart: bool = False) -> Workspace:
        """The workspace of a destination, new or as the last run left it; every listed part is read and verified.

        Args:
            destination: directory of the result; its parents are made.
            fingerprint: JSON values that decide the parts (model files, settings, data): work goes on only if they match.
            restart: throw finished parts away.

        Raises:
            BadRequest: the destination is taken or cannot be written, another run works on it, or the finished parts
                belong to another fingerprint.
            FormatError: a damaged or newer manifest.
            LowBitError: the workspace cannot be written.
        """
        work = cls(Path(destination))
        work._fingerprint = json.loads(json.dumps(fingerprint))
        work._take_lock()
        try:
            with work._failing(f"preparing {work.folder}"):
                work._resume(restart)
        except BaseException:
            work.close()
            raise
        return work

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; without a finished part, also remove the workspace and the parents made for it."""
        if not self._lock.is_locked:
            return
        if self._keep or self._parts:
            self._lock.release()
            return
        self._remove()
        with suppress(OSError):  # they stay where they hold something by now
            for parent in self._made:
                parent.rmdir()

    def discard(self) -> None:
        """Throw finished parts away and leave nothing behind: for a run that cannot end well as it was asked."""
        self._parts = {}
        self.close()

    def finished(self) -> list[str]:
        """Names of the finished parts, in the order they were finished."""
        return list(self._parts)

    def put(self, name: str, tensors: Mapping[str, LowBitTensor], report: list[dict[str, Any]]) -> None:
        """Keep a part: after this returns, no kill and no full disk loses it.

        Args:
            name: any text; an earlier part of this name is replaced.
            tensors: parameter name -> record.
            report: JSON values that belong to it.

        Raises:
            LowBitError: it cannot be written (a full disk, say); parts finished before are kept.
        """
        entry: Part = {"report": json.loads(json.dumps(report))}
        file = part_file(self.folder, name)
        with self._failing(f"writing part {name!r}"):
            with replacing(file) as temporary:
                save_tensors(temporary, tensors)
                entry |= {"file": file.name, "crc32": crc32(temporary), "bytes": temporary.stat().st_size}
            self._save(self._parts | {name: entry})

    def get(self, name: str) -> tuple[dict[str, LowBitTensor], list[dict[str, Any]]]:
        """A finished part as it was put, with checksums verified.

        Raises:
            LowBitError: there is no such part, or it was damaged since the workspace was opened and is now dropped.
        """
        if name not in self._parts:
            raise LowBitError(f"part {name!r} is not finished. Finished are: {', '.join(self._parts) or 'none'}.")
        try:
            return load_tensors(part_file(self.folder, name)), self._parts[name]["report"]
        except FormatError as error:
            with self._failing(f"dropping the damaged part {name!r}"):
                self._save({key: entry for key, entry in self._parts.items() if key != name})
            raise LowBitError(
                f"part {name!r} was damaged after it was finished ({error}). Run the same command again to make it anew."
            ) from error

    def finish(self, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill a folder, give that folder the destination's name in one step, and remove the workspace.

        Until the result stands, the parts take their space beside it.

        Raises:
            BadRequest: the destination was taken meanwhile.
            LowBitError: writing failed; finished parts are kept.
        """
        result = self.folder / RESULT
        try:
            with self._failing(f"writing {self.destination}"):
                result.mkdir()
                write(result)
                for path in [*result.rglob("*"), result]:
                    sync(path)
                _refuse_taken(self.destination)
                self._save(self._parts, handing_over=True)
                if self.destination.exists():
                    self.destination.rmdir()
                result.rename(self.destination)
                sync(self.destination.parent)
        except BaseException:
            with suppress(OSError):
                delete(result)
            with suppress(OSError):
                self._save(self._parts)
            raise
        self._remove()

    def _take_lock(self) -> None:
        try:
            if not self.folder.exists():
                _refuse_taken(self.destination)
            self._made = [parent for parent in self.destination.parents if not parent.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            self._keep = (self.folder / MANIFEST).exists()
        except Timeout as error:
            raise BadRequest(
                f"another run is working on {self.destination} (it holds {self.folder / LOCK}). "
                "Wait for it, or choose another name."
            ) from error
        except OSError as error:
            raise BadRequest(
                f"{self.destination} cannot be written ({error.strerror or error}). Choose a directory you can write to."
            ) from error

    def _resume(self, restart: bool) -> None:
        found = None if restart else Manifest.read(self.folder)
        try:
            _refuse_taken(self.destination)
        except BadRequest:
            # The run that made what is there may have been killed before it could remove its workspace.
            if found and found.handing_over and not (self.folder / RESULT).exists():
                self._keep = False
            raise
        if found:
            found.check_same(self._fingerprint, self.folder)
            self._parts, self.notes = found.whole_parts(self.folder)
        self._keep = False
        for path in self._leftovers():
            delete(path)
        self._save(self._parts)

    def _leftovers(self) -> list[Path]:
        """What this class wrote into the folder, less lock, manifest and finished parts."""
        parts = {part_file(self.folder, name) for name in self._parts}
        written = [*self.folder.glob("part-*"), *self.folder.glob(f"{MANIFEST}.*"), self.folder / RESULT]
        return [path for path in written if path not in parts]

    def _save(self, parts: dict[str, Part], handing_over: bool = False) -> None:
        Manifest(self._fingerprint, parts, handing_over).write(self.folder)
        self._parts = parts

    def _remove(self) -> None:
        self._parts = {}
        # The manifest goes after the parts: a kill in between leaves what the next run knows how to remove.
        for path in [*self._leftovers(), self.folder / MANIFEST, self.folder / LOCK]:
            with suppress(OSError):
                delete(path)
        self._lock.release()
        with suppress(OSError):
            self.folder.rmdir()

    @contextmanager
    def _failing(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            count = len(self._parts)
            kept = f"{count} finished part{'s' * (count > 1)} kept in {self.folder}" if count else "nothing was left behind"
            raise LowBitError(
                f"{doing} failed ({error}); {kept}. Mend that (a full disk, say) and run the same command again."
            ) from error


def _refuse_taken(destination: Path) -> None:
    if os.path.ismount(destination):
        raise BadRequest(f"{destination} is a mount point, which nothing can be renamed to. Name a directory inside it.")
    if destination.is_symlink() or (destination.exists() and (not destination.is_dir() or any(destination.iterdir()))):
        raise BadRequest(f"{destination} exists and is not an empty directory. Choose another name or remove it.")
