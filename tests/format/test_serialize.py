"""Files: bit-exact round trips, and damage of any kind is an error that names the file or the tensor."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lowbit.errors import FormatError
from hf_lowbit.format import (
    FORMAT_VERSION,
    Layout,
    Levels,
    LowBitTensor,
    Record,
    Spec,
    Stage,
    load_tensors,
    read_record,
    save_tensors,
)
from hf_lowbit.format.scales import decode, store_exactly
from hf_lowbit.format.serialize import checksum
from hf_lowbit.solvers import solve

FRESH = """
import sys, zlib
from hf_lowbit.format import load_tensors
for name, record in sorted(load_tensors(sys.argv[1]).items()):
    stored = {field: zlib.crc32(value.numpy().tobytes()) for field, value in record.tensors.items()}
    print(name, record.layout.dumps(), stored, zlib.crc32(record.dequantize().numpy().tobytes()))
"""


def small_records() -> dict[str, LowBitTensor]:
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    return {
        "layers.0.weight": solve(weight, Spec(method="codebook", bits=3, outliers=0.01)),
        "layers.0.größe": solve(weight, Spec(method="rtn", levels="affine", scale_bits=16)),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A file of two small records, never changed by a test."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_tensors(path, small_records())
    return path


def describe(records: dict[str, LowBitTensor]) -> str:
    """What the fresh process prints."""
    lines = []
    for name, record in sorted(records.items()):
        stored = {field: zlib.crc32(value.numpy().tobytes()) for field, value in record.tensors.items()}
        values = zlib.crc32(record.dequantize().numpy().tobytes())
        lines.append(f"{name} {record.layout.dumps()} {stored} {values}")
    return "\n".join(lines)


def assert_same(one: dict[str, LowBitTensor], other: dict[str, LowBitTensor]) -> None:
    assert one.keys() == other.keys()
    for name, record in one.items():
        assert record.layout == other[name].layout
        for field, value in record.tensors.items():
            # As bytes, since NaN patterns must survive too.
            assert value.numpy().tobytes() == other[name].tensors[field].numpy().tobytes(), field


@settings(max_examples=25)
@given(data=st.data())
def test_round_trip_of_any_record(records, tmp_path_factory, data):
    layouts = data.draw(st.lists(records.layouts(), min_size=1, max_size=3))
    written = {f"layer.{number}": records.fill(layout, number) for number, layout in enumerate(layouts)}
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    save_tensors(path, written)
    assert_same(load_tensors(path), written)


def test_a_fresh_process_reads_the_same_bytes(saved):
    done = subprocess.run([sys.executable, "-c", FRESH, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == describe(small_records())


def test_the_same_records_make_the_same_file(saved, tmp_path):
    save_tensors(tmp_path / "again.safetensors", dict(reversed(small_records().items())))
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_a_plain_safetensors_reader_sees_the_stored_tensors(saved):
    expected = {f"{n}_{f}": v for n, record in small_records().items() for f, v in record.tensors.items()}
    found = load_file(saved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)) for name, value in expected.items())


def test_the_file_is_the_counted_bytes_and_a_header(saved):
    size = sum(value.nbytes for record in small_records().values() for value in record.tensors.values())
    header = struct.unpack("<Q", saved.read_bytes()[:8])[0]
    assert saved.stat().st_size == 8 + header + size


def assert_damage_is_found(path: Path, damaged: bytes) -> None:
    """Reading ``damaged`` from ``path`` raises FormatError with the name of the file or of a stored tensor."""
    path.write_bytes(damaged)
    with pytest.raises(FormatError) as caught:
        load_tensors(path)
    assert path.name in str(caught.value) or "layers.0." in str(caught.value)


@pytest.mark.parametrize("part", ["length", "header", "data"])
def test_a_flipped_bit_is_found(saved, tmp_path, part):
    whole = saved.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    places = {"length": range(8), "header": range(8, end), "data": range(end, len(whole))}[part]
    chosen = random.Random(part)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chosen.choice(places)] ^= 1 << chosen.randrange(8)
        assert_damage_is_found(tmp_path / "damaged.safetensors", bytes(damaged))


def test_a_truncated_file_is_found(saved, tmp_path):
    whole = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(whole), 97), len(whole) - 1]:
        assert_damage_is_found(tmp_path / "short.safetensors", whole[:length])


def test_appended_bytes_are_found(saved, tmp_path):
    assert_damage_is_found(tmp_path / "long.safetensors", saved.read_bytes() + b"\0")


def test_swapped_tensors_are_found(saved, tmp_path):
    # Same dtype and shape, so only the checksum can tell.
    tensors, metadata = load_file(saved), metadata_of(saved)
    one, other = "layers.0.größe_scale", "layers.0.größe_offset"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, tmp_path / "swapped.safetensors", metadata)
    with pytest.raises(FormatError, match=r"swapped.safetensors: the bytes of tensor 'layers.0.größe_\w+' are damaged"):
        load_tensors(tmp_path / "swapped.safetensors")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as handle:
        return handle.metadata()


def rewrite(saved: Path, path: Path, change=None, drop: tuple[str, ...] = (), replace=None) -> Path:
    """A copy of ``saved`` with another record (``change`` edits its JSON object; its checksum is right) or other tensors."""
    values = json.loads(metadata_of(saved)["hf_lowbit"])
    values = change(values) or values if change else values
    text = json.dumps(values)
    tensors = {name: value for name, value in load_file(saved).items() if name not in drop} | (replace or {})
    save_file(tensors, path, {"hf_lowbit": text, "hf_lowbit_crc": str(zlib.crc32(text.encode()))})
    return path


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(FormatError) as caught:
        load_tensors(path)
    for word in words:
        assert word in str(caught.value)


def test_rewriting_unchanged_is_accepted(saved, tmp_path):
    # Guards the tests below: their copies are refused for what they change, not for being copies.
    assert_same(load_tensors(rewrite(saved, tmp_path / "copy.safetensors")), small_records())


def test_a_newer_format_is_refused_with_the_remedy(saved, tmp_path):
    path = rewrite(saved, tmp_path / "newer.safetensors", lambda v: v.update(format_version=FORMAT_VERSION + 1))
    versions = f"format version {FORMAT_VERSION + 1}, this hf-lowbit reads up to {FORMAT_VERSION}"
    assert_refused(path, "newer.safetensors", versions, "pip install --upgrade hf-lowbit")


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.5])
def test_a_version_no_release_wrote_is_refused(saved, tmp_path, version):
    path = rewrite(saved, tmp_path / "odd.safetensors", lambda v: v.update(format_version=version))
    assert_refused(path, "odd.safetensors", f"format version {version!r}, which no release of hf-lowbit wrote")


@pytest.mark.parametrize("key", ["tensors", "crc32", "kept", "ends"])
def test_a_record_without_one_of_its_parts_is_refused(saved, tmp_path, key):
    def change(values: dict) -> None:
        del values[key]

    assert_refused(rewrite(saved, tmp_path / "part.safetensors", change), "part.safetensors", "malformed", key)


@pytest.mark.parametrize("record", [[1], "text", 3])
def test_a_record_that_is_no_object_is_refused(saved, tmp_path, record):
    assert_refused(rewrite(saved, tmp_path / "odd.safetensors", lambda _: record), "odd.safetensors")


def test_a_record_with_an_unreadable_layout_is_refused(saved, tmp_path):
    path = rewrite(saved, tmp_path / "odd.safetensors", lambda v: v["tensors"]["layers.0.weight"].update(shape=[6]))
    assert_refused(path, "odd.safetensors", "impossible shape (6,)")


def test_a_file_without_a_record_is_refused(saved, tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file(load_file(saved), tmp_path / "plain.safetensors", metadata)
        assert_refused(tmp_path / "plain.safetensors", "plain.safetensors", "holds no 'hf_lowbit' record")


def test_a_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "absent.safetensors", "absent.safetensors", "does not exist")


def test_a_tensor_the_record_lists_but_the_file_lacks(saved, tmp_path):
    path = rewrite(saved, tmp_path / "less.safetensors", drop=("layers.0.weight_scale_super",))
    assert_refused(path, "'layers.0.weight_scale_super'")


@pytest.mark.parametrize("listed", [True, False])
def test_a_tensor_of_another_shape_or_dtype(saved, tmp_path, listed):
    name = "layers.0.größe_scale"

    def change(values: dict) -> None:
        # A writer that rewrote the tensor may or may not have known its checksum: neither may pass.
        values["crc32"].pop(name)
        values["crc32"] |= {name: checksum(replaced)} if listed else {}

    for replaced, found in ((torch.zeros(6, 4).short(), "I16 [6, 4]"), (torch.zeros(6, 3).half(), "F16 [6, 3]")):
        path = rewrite(saved, tmp_path / "other.safetensors", change, replace={name: replaced})
        assert_refused(path, f"tensor '{name}' should be I16 [6, 3], found {found}")


def test_further_tensors_are_left_alone(saved, tmp_path):
    path = rewrite(saved, tmp_path / "more.safetensors", replace={"norm.weight": torch.ones(3)})
    assert_same(load_tensors(path), small_records())


def test_a_record_spans_the_files_of_a_checkpoint(saved, tmp_path):
    tensors, metadata = load_file(saved), metadata_of(saved)
    shards = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    names = sorted(tensors)
    for path, part in zip(shards, (names[:4], names[4:]), strict=True):
        save_file({name: tensors[name] for name in part}, path, metadata)
    assert read_record(shards).layouts == read_record([saved]).layouts
    with pytest.raises(FormatError, match=r"'layers\.0\."):
        read_record(shards[:1])


def test_no_file_at_all_is_refused():
    with pytest.raises(FormatError, match="no safetensors file"):
        read_record([])


def test_record_metadata_round_trip():
    layouts = {name: record.layout for name, record in small_records().items()}
    record = Record(layouts, {"b": 2, "a": 1}, {"norm": "not a matrix"}, ("layers.0.weight",))
    assert Record.from_metadata(record.to_metadata(), "here") == record
    assert record.block_layouts == [layouts["layers.0.größe"]]
    assert Record(layouts, ends=tuple(layouts)).block_layouts == list(layouts.values())


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1.0, 0.5, -3.25, 0.0], (0, 16)),
        ([2.0**20, 3.0 * 2.0**-2], (6, 16)),  # beyond fp16's largest number, but not its range
        ([1.0 + 2.0**-12], (0, 32)),  # more digits than fp16 has
        ([2.0**30, 2.0**-30], (0, 32)),
        ([0.0], (0, 16)),
    ],
)
def test_floats_are_stored_without_loss(values, wanted):
    shift, width, bits = store_exactly(torch.tensor([values]))
    assert (shift, width) == wanted
    found = decode(bits, None, len(values), 32, width)
    assert torch.ldexp(found, torch.tensor(shift)).tolist() == [values]


@pytest.mark.parametrize(
    ("stage", "version"),
    [
        (Stage(Levels("integer", 4), 32), 1),
        (Stage(Levels("integer", 4), 32, zero=True), 3),
        (Stage(Levels("integer", 4), 32, 32), 3),
        (Stage(Levels("qlora", 4), 32), 3),
    ],
)
def test_files_state_the_oldest_version_that_can_hold_them(stage, version, records, tmp_path):
    layout = Layout((4, 64), (stage,))
    save_tensors(tmp_path / "one.safetensors", {"w": records.fill(layout, 0)})
    with safe_open(tmp_path / "one.safetensors", "pt") as handle:
        assert json.loads(handle.metadata()["hf_lowbit"])["format_version"] == version
    assert load_tensors(tmp_path / "one.safetensors")["w"].layout == layout
