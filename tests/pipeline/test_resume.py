"""A run that was stopped goes on where it stood, and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_lowbit import LowBitConfig, demo
from hf_lowbit.cli import main
from hf_lowbit.pipeline.workspace import Workspace
from hf_lowbit.plugin.checkpoint import quantize_checkpoint

BLOCKS = ["model.layers.0", "model.layers.1"]


def config(**changes: object) -> LowBitConfig:
    """What the usual command line asks for."""
    data = {"source": str(demo.held_out_text()), "sequences": 40, "length": 64}
    values = {"method": "gptq", "bits": 3, "quantize_embeddings": False, "calibration": data}
    return LowBitConfig(**(values | changes))


def stop_after(blocks: int):
    """A progress that interrupts the run."""

    def progress(done: int, total: int, name: str) -> None:
        if done == blocks:
            raise KeyboardInterrupt

    return progress


def finished(target: Path) -> list[str]:
    return list(json.loads((target.parent / f".{target.name}.partial" / "manifest.json").read_text())["parts"])


@pytest.fixture
def begun(dense, tmp_path) -> Path:
    """A destination whose run was stopped after the first block."""
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(dense), tmp_path / "out", config(), progress=stop_after(1))
    assert finished(tmp_path / "out") == BLOCKS[:1] and not (tmp_path / "out").exists()
    return tmp_path / "out"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_at_ten_random_moments(dense, command, tmp_path):
    arguments = command(dense, tmp_path)
    del arguments[2]
    script = str(Path(__file__).with_name("interrupted.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    place = [sys.executable, script, str(tmp_path)]
    done = subprocess.run([*place, *arguments], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == 10 and found["kept"] >= 1 and found["left"] == ["out", "whole"]


@pytest.mark.parametrize("method", ["rtn", "squeezellm", "nupes"])
def test_any_method_goes_on_where_it_stood(method, dense, command, files, tmp_path):
    options = ["--option", "steps=4"] if method == "nupes" else []
    whole, target = tmp_path / "whole", tmp_path / "out"
    assert main(command(dense, whole, *options, method=method)) == 0
    settings = {"method": method, "options": {"steps": 4} if options else {}}
    settings |= {"calibration": None} if method == "rtn" else {}
    first = 1 if method != "squeezellm" else 2  # its blocks are reported when all are solved
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(dense), target, config(**settings), progress=stop_after(first))
    assert finished(target)
    assert main(command(dense, target, *options, method=method)) == 0
    assert files(target) == files(whole)


def test_finished_blocks_are_not_solved_again(begun, dense, command, files, whole, monkeypatch):
    from hf_lowbit.pipeline import run

    solved, plain = [], run._solve
    monkeypatch.setattr(run, "_solve", lambda name, *rest: solved.append(name) or plain(name, *rest))
    assert main(command(dense, begun)) == 0
    assert len(solved) == 7 and all(name.startswith(BLOCKS[1]) for name in solved)
    assert files(begun) == whole


def test_another_request_does_not_go_on_with_it(begun, dense, command, files, tmp_path, refused):
    parts = ("finished", "--restart")
    refused(2, command(dense, begun, "--bits", "4"), *parts)
    refused(2, command(dense, begun, "--override", "down_proj:bits=5"), *parts)
    refused(2, command(dense, begun, "--sequences", "39"), *parts)
    refused(2, command(dense, begun, "--option", "damping=0.02"), *parts)
    refused(2, command(dense, begun, method="rtn"), *parts)
    other = tmp_path / "other"
    main(command(dense, other, "--bits", "4"))
    assert main(command(dense, begun, "--bits", "4", "--restart")) == 0
    assert files(begun) == files(other)


def test_another_model_does_not_go_on_with_it(begun, dense, command, tmp_path, refused):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in dense.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    refused(2, command(changed, begun), "finished", "--restart")


def test_the_second_of_two_runs_at_once_is_refused(dense, command, tmp_path, refused):
    with Workspace.open(tmp_path / "out", {}):
        refused(2, command(dense, tmp_path / "out"), "another run is working on", "out")
        refused(2, command(dense, tmp_path / "out", "--restart"), "another run is working on", "out")


def test_a_full_disk_in_the_middle_loses_nothing(begun, dense, command, files, whole, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        assert main(command(dense, begun)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err.splitlines()[-1]
    assert "model.layers.1" in message and "1 finished part kept" in message and "run the same command again" in message
    assert finished(begun) == BLOCKS[:1]
    assert main(command(dense, begun)) == 0
    assert files(begun) == whole


def test_a_weight_that_is_not_finite_leaves_nothing_behind(dense, command, tmp_path, refused):
    source = tmp_path / "spoiled"
    source.mkdir()
    for path in dense.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    name = "model.layers.1.mlp.up_proj.weight"
    refused(1, command(source, tmp_path / "out"), name, "NaN or infinity", "row 3, column 5")
    refused(1, command(source, tmp_path / "out", method="rtn"), name, "NaN or infinity", "row 3, column 5")


def test_the_number_of_windows_in_a_pass_does_not_belong_to_the_result(dense, command, files, whole, tmp_path, monkeypatch):
    from hf_lowbit.plugin import compress

    monkeypatch.setattr(compress, "TOKENS_PER_PASS", 640)
    assert main(command(dense, tmp_path / "out")) == 0
    report, other = (json.loads(found["quantization_report.json"]) for found in (files(tmp_path / "out"), whole))
    for one, two in zip(report, other, strict=True):
        assert one["error"] == pytest.approx(two["error"], rel=0.05)
