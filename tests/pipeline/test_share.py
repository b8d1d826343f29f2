"""Processes that share a run write what one process writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_lowbit.cli import main
from hf_lowbit.pipeline.share import Share, attempt

METHODS = {"rtn": [], "gptq": [], "nupes": ["--option", "steps=4"], "squeezellm": []}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of torchrun, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def exit_codes(done: subprocess.CompletedProcess[str]) -> list[list[int]]:
    lines = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    assert len(lines) == 2, done.stderr[-3000:]
    return [json.loads(line.partition(": ")[2]) for line in sorted(lines)]


@pytest.fixture(scope="module")
def spoiled(dense, tmp_path_factory) -> Path:
    """A NaN in the second layer, which falls to the second process."""
    folder = tmp_path_factory.mktemp("spoiled") / "dense"
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def place(dense, spoiled, command, tmp_path_factory):
    """The directory two processes wrote to, one result a method, and how they ended."""
    place = tmp_path_factory.mktemp("shared")
    (place / "full").mkdir()
    (place / "full" / "mine").touch()
    commands = [command(dense, place / method, *options, method=method) for method, options in METHODS.items()]
    commands.append(command(dense, place / "ends", method="rtn"))
    commands[-1].remove("--no-quantize-embeddings")
    commands.append([*command(dense, place / "json", method="rtn"), "--json"])
    commands.append(command(spoiled, place / "spoiled", method="rtn"))
    commands.append(command(spoiled, place / "spoiled"))
    commands.append(command(dense, place / "few", "--sequences", "8"))
    commands.append(command(dense, place / "full"))  # which the first process alone refuses, and ends
    return place, launch(str(Path(__file__).with_name("shared.py")), *map(json.dumps, commands))


def test_both_processes_end_alike_and_with_a_word(place):
    place, done = place
    codes = exit_codes(done)
    wanted = [0] * (len(METHODS) + 2)
    assert codes == [[*wanted, 1, 1, 2, 2], [*wanted, 1, 1, 2, 1]]
    assert "Traceback" not in done.stderr
    assert "another process of this run ended" in done.stderr
    for part in ("k_proj.weight: the weight holds NaN", "full exists and is not", "2 processes cannot share 1 batches"):
        assert part in done.stderr
    assert sorted(path.name for path in place.iterdir()) == sorted([*METHODS, "ends", "full", "json"])


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_write_the_bytes_of_one(method, place, dense, command, files, tmp_path):
    assert main(command(dense, tmp_path / "one", *METHODS[method], method=method)) == 0
    assert files(place[0] / method) == files(tmp_path / "one")


def test_what_lies_outside_the_blocks_is_shared_too(place, dense, command, files, tmp_path):
    arguments = command(dense, tmp_path / "one", method="rtn")
    arguments.remove("--no-quantize-embeddings")
    assert main(arguments) == 0
    assert files(place[0] / "ends") == files(tmp_path / "one")


def test_one_process_does_all_of_the_work():
    with Share() as share:
        assert (share.rank, share.world) == (0, 1)
        assert all(share.mine(number) for number in range(5))
        assert share.same(3) == share.from_owner(3, 4) == share.made_by_owner(lambda: 3, 1) == share.count(3) == 3
        share.wait()


def test_an_error_takes_the_place_of_a_value():
    from hf_lowbit.errors import WeightError

    def fails() -> None:
        raise WeightError("w holds NaN")

    assert isinstance(attempt(fails), WeightError)
    with pytest.raises(WeightError, match="w holds NaN"):
        Share().made_by_owner(fails, 0)
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 // 0)
