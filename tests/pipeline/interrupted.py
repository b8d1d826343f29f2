"""Commands that are killed: ``python interrupted.py PLACE ARGUMENT...`` runs ``hf-lowbit ARGUMENT...`` in forked children.

The command first runs here, so that children need not import again, and then in a child, which is timed. The children that
follow are killed at random moments, and each goes on where the one before it was stopped. Prints what a test is to check.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from hf_lowbit.cli import main

PLACE, ARGUMENTS = Path(sys.argv[1]), sys.argv[2:]
MOMENTS = 10


def command(target: Path) -> int:
    return main([*ARGUMENTS[:2], str(target), *ARGUMENTS[2:]])


def run(target: Path, seconds: float = 600) -> bool:
    """Whether a child ended well before it was killed."""
    pid, begun = os.fork(), time.monotonic()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(command(target))
    while time.monotonic() - begun < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, os.waitstatus_to_exitcode(status)
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def finished(target: Path) -> set[str]:
    manifest = target.parent / f".{target.name}.partial" / "manifest.json"
    return set(json.loads(manifest.read_text())["parts"]) if manifest.exists() else set()


def same(target: Path, expected: Path) -> bool:
    names = sorted(path.name for path in expected.iterdir())
    alike = names == sorted(path.name for path in target.iterdir())
    return alike and all((target / name).read_bytes() == (expected / name).read_bytes() for name in names)


def interrupt() -> dict:
    whole, target, chosen = PLACE / "whole", PLACE / "out", random.Random(0)
    assert command(whole) == 0
    begun = time.monotonic()
    assert run(target)
    duration = time.monotonic() - begun
    assert same(target, whole), "two runs differ"
    shutil.rmtree(target)
    killed, kept = 0, 0
    while killed < MOMENTS:
        before = finished(target)
        if run(target, chosen.uniform(0, duration)):
            assert same(target, whole), "not the bytes of an uninterrupted run"
            shutil.rmtree(target)
            continue
        killed += 1
        if not target.exists():
            assert before <= finished(target), "a finished block was lost"
            kept = max(kept, len(finished(target)))
        else:
            shutil.rmtree(target)
    assert run(target)
    assert same(target, whole), "not the bytes of an uninterrupted run"
    left = sorted(path.name for path in PLACE.iterdir())
    return {"killed": killed, "kept": kept, "left": left}


if __name__ == "__main__":
    found = interrupt()
    print(json.dumps(found))
