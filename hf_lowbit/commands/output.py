"""What commands print, and the files they are given."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lowbit.errors import BadRequest


def read_text(file: str, characters: int | None) -> str:
    """The first characters of a UTF-8 file, or a refusal that says what is wrong with it."""
    try:
        return Path(file).read_text(encoding="utf-8")[:characters]
    except OSError as error:
        raise BadRequest(f"cannot read {file!r}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"{file!r} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def check_page(file: str) -> None:
    """Refuse a place no page can be written to, before any work."""
    if Path(file).exists() and not Path(file).is_file():
        raise BadRequest(f"cannot write {file!r}: it is not a file.")
    if not Path(file).absolute().parent.is_dir():
        raise BadRequest(f"cannot write {file!r}: there is no directory {str(Path(file).parent)!r}.")


def write_text(file: str, text: str) -> None:
    """Write a file, or refuse."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"cannot write {file!r}: {error.strerror or error}.") from error


def sizes_of(directory: str) -> dict[str, Any]:
    """Method, file bytes and bits per weight of a checkpoint on disk; None for what a Hub id or dense model lacks."""
    from hf_lowbit.plugin import checkpoint

    if not checkpoint.is_low_bit(directory):
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) or None
        return {"method": None, "bytes": size, "bits_per_weight_linears": None, "bits_per_weight_model": None}
    found = contents_json(directory)
    return {key: found[key] for key in ("method", "bytes", "bits_per_weight_linears", "bits_per_weight_model")}


def contents_json(directory: str) -> dict[str, Any]:
    """What a checkpoint on disk holds, as `inspect --json` prints it."""
    from hf_lowbit.format import ledger
    from hf_lowbit.plugin import checkpoint

    contents = checkpoint.read_contents(directory)
    return {
        "method": contents.config.method,
        "bytes": contents.file_bytes,
        "header_bytes": contents.header_bytes,
        "bits_per_weight_linears": ledger(contents.record.block_layouts).bits_per_weight,
        "bits_per_weight_model": contents.bits_per_weight_model,
        "bytes_by_kind": ledger(contents.record.layouts.values()).bytes_by_kind,
        "tensors": {
            name: layout.to_json() | {"bits_per_weight": ledger(layout).bits_per_weight}
            for name, layout in contents.record.layouts.items()
        },
        "high_precision": {
            name: {"bytes": size, "reason": contents.record.kept.get(name)} for name, size in contents.dense.items()
        },
        "config": contents.config.to_dict(),
    }


def progress_bar(label: str, on: bool) -> Any:
    """A context that gives ``progress(done, total)``, drawn on stderr if ``on``."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not on, transient=True) as drawn:
            task = drawn.add_task(label, total=None)
            yield lambda done, total, name="": drawn.update(task, completed=done, total=total, description=f"{label} {name}")

    return bar()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a title."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def print_json(value: Any) -> None:
    """One JSON object."""
    print(json.dumps(value, indent=1))
