"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file that takes the name of ``file``, synced, in one step."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file or directory on the disk itself before going on."""
    if os.name == "nt":  # which syncs neither directories nor what is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # network file systems answer so for directories
            raise
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Remove a file or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
