"""Golden files: what every released format stored is read for ever, to the bit."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_lowbit.format import ledger, load_tensors

HERE = Path(__file__).parent
# CRC-32 of the two files of each set. Files in the field cannot be made anew, so neither may these.
SETS = {"v1": (3548765352, 2257027024)}
every = pytest.mark.parametrize("name", SETS)

# Of the first set: layouts as its writer meant them, spelled out.
V1_LAYOUTS = {
    "rtn-1": '{"shape":[12,80],"stages":[{"bits":1,"levels":{"family":"uniform_zero_free"},"group_size":32,"scale_bits":8}],'
    '"shift":-9,"method":"rtn"}',
    "e2m1-4": '{"shape":[12,80],"stages":[{"bits":4,"levels":{"family":"float","mantissa":1},"group_size":32,'
    '"scale_bits":6}],"shift":-9,"method":"float"}',
    "affine-5": '{"shape":[12,80],"stages":[{"bits":5,"levels":{"family":"affine"},"group_size":32,"scale_bits":6,'
    '"offset":true}],"shift":-9,"method":"rtn"}',
    "whole-row-4": '{"shape":[12,80],"stages":[{"bits":4,"levels":{"family":"fitted"},"group_size":80,"scale_bits":6}],'
    '"shift":-9,"method":"codebook"}',
    "stack-3": '{"shape":[3,4,80],"stages":[{"bits":3,"levels":{"family":"fitted"},"group_size":32,"scale_bits":6,'
    '"tables":3},{"bits":3,"levels":{"family":"fitted"},"group_size":32,"scale_bits":6,"tables":3}],'
    '"shift":-9,"method":"codebook","outliers":10}',
}


def paths(name: str) -> tuple[Path, Path]:
    return HERE / f"{name}.safetensors", HERE / f"{name}_values.safetensors"


def test_every_set_is_listed():
    assert {path.stem.removesuffix("_values") for path in HERE.glob("v*.safetensors")} == set(SETS)


@every
def test_the_files_are_those_first_written(name):
    assert tuple(zlib.crc32(path.read_bytes()) for path in paths(name)) == SETS[name]


@every
def test_values_are_the_same_to_the_bit(name):
    stored, values = paths(name)
    records, expected = load_tensors(stored), load_file(values)
    assert records.keys() == expected.keys()
    for tensor, record in records.items():
        assert torch.equal(record.dequantize().view(torch.int32), expected[tensor].view(torch.int32)), tensor


@every
def test_layouts_are_those_of_the_header(name):
    stored, _ = paths(name)
    raw = stored.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    written = json.loads(header["__metadata__"]["hf_lowbit"])
    records = load_tensors(stored)
    assert written["tensors"] == {tensor: record.layout.to_json() for tensor, record in records.items()}
    # What the layouts say is all there is: every byte behind the header belongs to a field.
    data = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__")
    assert ledger([record.layout for record in records.values()]).bytes == data


def test_layouts_of_the_first_set():
    records = load_tensors(HERE / "v1.safetensors")
    assert {tensor: records[tensor].layout.dumps() for tensor in V1_LAYOUTS} == V1_LAYOUTS


def test_the_first_set_covers_the_format():
    layouts = [record.layout for record in load_tensors(HERE / "v1.safetensors").values()]
    stages = [stage for layout in layouts for stage in layout.stages]
    assert {stage.bits for stage in stages} == set(range(1, 9))
    assert {stage.scale_bits for stage in stages} == {16, 8, 6}
    assert any(stage.offset for stage in stages) and any(stage.tables > 1 for stage in stages)
    assert any(layout.outliers for layout in layouts) and any(len(layout.stages) == 3 for layout in layouts)


def test_a_set_is_never_rewritten(golden_make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(golden_make, "specs", lambda: {"only": ((12, 80), golden_make.Spec(method="rtn"))})
    assert golden_make.main([], tmp_path) == 0
    first = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in first} == {"v1.safetensors", "v1_values.safetensors"}
    assert golden_make.main([], tmp_path) == 2
    assert "v1 exists and is never rewritten" in capsys.readouterr().err
    assert golden_make.main(["--new-version"], tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in first} | {
        "v2.safetensors",
        "v2_values.safetensors",
    }
    assert all(path.read_bytes() == content for path, content in first.items())
