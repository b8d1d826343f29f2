"""Fingerprints tell one checkpoint from another without reading all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.pipeline.workspace import fingerprint_of_files


def checkpoint(folder: Path, **changes: torch.Tensor) -> Path:
    folder.mkdir()
    tensors = {name: torch.zeros(300, 400) for name in ("a", "b", "c")} | changes
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(folder.name)
    return folder


def test_fingerprints_tell_checkpoints_apart(tmp_path):
    first = fingerprint_of_files(checkpoint(tmp_path / "one"))
    assert first == fingerprint_of_files(str(checkpoint(tmp_path / "same")))
    assert first == json.loads(json.dumps(first)) and str(tmp_path) not in json.dumps(first)
    assert first == fingerprint_of_files([tmp_path / "one" / "config.json", tmp_path / "one" / "model.safetensors"])
    assert first["files"]["model.safetensors"]["bytes"] > 1_440_000
    tuned = fingerprint_of_files(checkpoint(tmp_path / "tuned", b=torch.ones(300, 400)))
    assert tuned["files"] != first["files"] and tuned["config"] == first["config"]
    renamed = fingerprint_of_files(checkpoint(tmp_path / "renamed", d=torch.zeros(1)))
    assert renamed["files"] != first["files"]
    (tmp_path / "same" / "config.json").write_text('{"a": 1}')
    other = fingerprint_of_files(tmp_path / "same")
    assert other["config"] != first["config"] and other["files"] == first["files"]
    (tmp_path / "same" / "config.json").unlink()
    assert fingerprint_of_files(tmp_path / "same")["config"] is None


def test_files_without_a_fingerprint(tmp_path):
    with pytest.raises(BadRequest, match=r"holds no safetensors file. Give the directory of a checkpoint"):
        fingerprint_of_files(tmp_path)
    with pytest.raises(BadRequest, match=r"cannot read .*nowhere.safetensors: No such file"):
        fingerprint_of_files([tmp_path / "nowhere.safetensors"])
    for content in (b"", b"abcdefghijkl", b"\5\0\0\0\0\0\0\0{}", b"\4\0\0\0\0\0\0\0[{}]"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(FormatError, match=r"model.safetensors is not a complete safetensors file"):
            fingerprint_of_files(tmp_path)
