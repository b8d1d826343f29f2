"""Runs that die: children of one process put parts and are killed, and after each death the workspace must be sound.

``python killed.py PLACE``: first a death at each step that reaches the disk, then deaths at random moments. A child writes
down each part that :meth:`Workspace.put` told it is kept; those the next run must find. Prints the number of deaths of
either kind.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.format import Spec
from hf_lowbit.pipeline import workspace
from hf_lowbit.pipeline.workspace import Workspace
from hf_lowbit.solvers import solve

PLACE = Path(sys.argv[1])
FOLDER = PLACE.parent / ".out.partial"
SAID = PLACE.parent / "said"
PART = {"w": solve(torch.randn(16, 64), Spec(method="rtn"))}


def work(total: int) -> None:
    with Workspace.open(PLACE, {"bits": 4}) as space:
        for name in map(str, range(total)):
            if name not in space.finished():
                space.put(name, PART, [{"name": name}])
                with SAID.open("a") as file:
                    file.write(f"{name}\n")
        space.finish(lambda folder: [(folder / name).write_text("whole") for name in ("a", "b")])


def die_at(step: int) -> None:
    """Have this process killed before its ``step``-th call of anything that changes what is on the disk."""
    count = 0

    def counted(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    workspace.save_tensors = counted(workspace.save_tensors)


def run(total: int, step: int = 0, seconds: float = 0) -> int:
    """A child's exit code: it dies at a step, or after some seconds."""
    pid = os.fork()
    if not pid:
        try:
            if step:
                die_at(step)
            work(total)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if not step:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check() -> None:
    """The result stands whole, or the workspace opens with all that was said to be finished."""
    if PLACE.exists():
        assert sorted(os.listdir(PLACE)) == ["a", "b"]
        try:
            Workspace.open(PLACE, {"bits": 4})
        except BadRequest:
            assert not FOLDER.exists()
        return
    said = SAID.read_text().split() if SAID.exists() else []
    with Workspace.open(PLACE, {"bits": 4}) as space:
        assert set(said) <= set(space.finished()), (said, space.finished())
        assert not space.notes, space.notes
        for name in space.finished():
            tensors, report = space.get(name)
            assert torch.equal(tensors["w"].tensors["codes"], PART["w"].tensors["codes"])
            assert report == [{"name": name}]


def clear() -> None:
    for path in (PLACE, FOLDER):
        shutil.rmtree(path, ignore_errors=True)
    SAID.unlink(missing_ok=True)


def main() -> None:
    step, code = 0, -signal.SIGKILL
    while code:
        clear()
        step += 1
        code = run(total=2, step=step)
        assert code in (0, -signal.SIGKILL), code
        check()
    clear()
    chosen = random.Random(0)
    moments = 10
    for _ in range(moments):
        code = run(total=30, seconds=chosen.uniform(0, 0.1))
        assert code in (0, -signal.SIGKILL), code
        check()
        if PLACE.exists():
            clear()
    print(step - 1, moments)


if __name__ == "__main__":
    main()
