"""Damaged, incomplete or mismatched checkpoints are refused by every way in, before any output and by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowbit import LowBitConfig, demo
from hf_lowbit.cli import main
from hf_lowbit.errors import FormatError, LowBitError, WeightError
from hf_lowbit.format.serialize import read_record
from hf_lowbit.plugin.checkpoint import load_model

_spec = importlib.util.spec_from_file_location("commands", Path(__file__).with_name("commands.py"))
commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(commands)
refused = commands.refused

TEXT = ["--text", str(demo.held_out_text()), "--characters", "600"]
MATRIX = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A small dense checkpoint with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=4096)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.embedded_model() / name, folder)
    return folder


@pytest.fixture(scope="module")
def low(dense, tmp_path_factory) -> Path:
    """The same checkpoint, quantized."""
    target = tmp_path_factory.mktemp("low") / "rtn"
    assert main(["quantize", str(dense), str(target), "--method", "rtn"]) == 0
    return target


@pytest.fixture
def change(tmp_path) -> Callable:
    """A copy of a checkpoint with one file passed through a function, or removed."""

    def make(source: Path, file: str, how: Callable[[bytes], bytes] | None) -> Path:
        copy = tmp_path / "changed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        if how is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(how((copy / file).read_bytes()))
        return copy

    return make


def settings(section: str | None = None, **values) -> Callable[[bytes], bytes]:
    """A change of config.json, or of one section of it; None removes a key."""

    def how(data: bytes) -> bytes:
        config = json.loads(data)
        (config if section is None else config[section]).update(values)
        return json.dumps({key: value for key, value in config.items() if value is not None}).encode()

    return how


def rewrite(tensors: Callable[[dict], object], record: Callable[[dict], object] = lambda record: None) -> Callable:
    """What a tool does that opens a weight file and saves it with its header; ``record`` may change ours in it."""

    def how(data: bytes) -> bytes:
        held, header = load(data), json.loads(data[8 : header_end(data)])["__metadata__"]
        tensors(held)
        if "hf_lowbit" in header:
            values = json.loads(header["hf_lowbit"])
            record(values)
            header["hf_lowbit"] = json.dumps(values)
            header["hf_lowbit_crc"] = str(zlib.crc32(header["hf_lowbit"].encode()))
        return save(held, header)

    return how


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(place: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    """One bit of the byte at ``place(data)`` turned over."""

    def how(data: bytes) -> bytes:
        at = place(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return how


def damaged_everywhere(refused, folder: Path, *parts: str, inspect: bool = True) -> None:
    """Every way in refuses: the commands with exit code 1, ``from_pretrained`` with our own error."""
    if inspect:
        refused(1, ["inspect", folder], *parts)
        refused(1, ["inspect", folder, "--json"], *parts)
    refused(1, ["eval", folder, *TEXT, "--json"], *parts)
    with pytest.raises(FormatError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [MATRIX, "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named(name, value, refused, dense, change, tmp_path):
    def spoil(tensors):
        tensors[name][3, 5] = value

    source = change(dense, FILE, rewrite(spoil))
    refused(1, ["quantize", source, tmp_path / "out", "--method", "rtn"], name, "NaN or infinity", "row 3, column 5")
    with pytest.raises(WeightError, match=name):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=LowBitConfig(method="rtn"))
    # The message offers to leave it out, so that must work.
    skip = ["--skip", name.removesuffix(".weight")]
    assert main(["quantize", str(source), str(tmp_path / "out"), "--method", "rtn", *skip]) == 0


def test_a_measure_that_is_not_finite_is_an_error_and_no_json(refused, dense, change):
    source = change(dense, FILE, rewrite(lambda tensors: tensors[NORM].fill_(float("nan"))))
    refused(1, ["eval", source, *TEXT, "--json"], "perplexity is nan", "logits are not finite")


LENGTHS = {
    "nothing": lambda data: 0,
    "half a length": lambda data: 4,
    "a length": lambda data: 8,
    "half a header": lambda data: header_end(data) // 2,
    "a header": header_end,
    "some tensors": lambda data: (header_end(data) + len(data)) // 2,
    "all but a byte": lambda data: len(data) - 1,
}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
def test_a_truncated_file(length, refused, low, dense, change, tmp_path):
    def cut(data):
        return data[: length(data)]

    damaged_everywhere(refused, change(low, FILE, cut), FILE, "not a complete safetensors file", "Fetch it again")
    source = change(dense, FILE, cut)
    refused(1, ["quantize", source, tmp_path / "out"], "a file is damaged or incomplete", "Fetch it again")


FLIPS = {
    "length": (lambda data: 0, "not a complete safetensors file"),
    "header": (lambda data: 8, "not a complete safetensors file"),
    "record": (lambda data: data.index(b"crc32"), "record in the header is damaged"),
    "record's checksum": (lambda data: data.index(b'hf_lowbit_crc":"') + 16, "record in the header is damaged"),
    "name of a low-bit tensor": (lambda data: data.rindex(f"{MATRIX}_codes".encode()), f"{MATRIX}_codes"),
    "name of a dense tensor": (lambda data: data.rindex(f'"{NORM}":'.encode()) + 1, f"lists tensor '{NORM}'"),
    "first byte of the data": (header_end, "damaged (checksum)"),
    "last byte of the data": (lambda data: len(data) - 1, "damaged (checksum)"),
}


@pytest.mark.parametrize(("place", "part"), FLIPS.values(), ids=FLIPS.keys())
def test_a_flipped_bit(place, part, refused, low, change):
    damaged_everywhere(refused, change(low, FILE, flip(place)), part)


def test_no_flipped_bit_in_the_header_goes_unnoticed(low, tmp_path):
    data = (low / FILE).read_bytes()
    file = tmp_path / FILE
    file.write_bytes(data)
    # The host's own entry says nothing about the tensors.
    free = data.index(b'"format":"pt"')
    for at in [at for at in range(0, header_end(data), 13) if not free <= at < free + 13]:
        with file.open("r+b") as handle:
            handle.seek(at)
            handle.write(bytes([data[at] ^ (1 << at % 8)]))
            with pytest.raises(FormatError):
                handle.flush()
                read_record([file])
            handle.seek(at)
            handle.write(data[at : at + 1])
    read_record([file])  # and the undamaged file is fine


def test_the_damaged_tensor_is_named(refused, low, change):
    def spoil(tensors):
        tensors[f"{MATRIX}_codes"][0, 0] ^= 1

    damaged_everywhere(refused, change(low, FILE, rewrite(spoil)), f"{MATRIX}_codes", "damaged (checksum)")


@pytest.mark.parametrize("name", [NORM, f"{MATRIX}_scale"])
def test_a_lost_tensor_is_named(name, refused, low, change):
    source = change(low, FILE, rewrite(lambda tensors: tensors.pop(name)))
    damaged_everywhere(refused, source, f"lists tensor '{name}'", "missing or damaged")


def test_a_file_whose_header_another_tool_dropped(refused, low, change):
    damaged_everywhere(refused, change(low, FILE, lambda data: save(load(data))), "no 'hf_lowbit' record", "another tool")


def test_a_missing_shard(refused, low, tmp_path):
    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(low).save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(low / name, folder)
    assert main(["eval", str(folder), *TEXT]) == 0
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(1, ["inspect", folder], "which no file holds", "A shard is missing")
    refused(1, ["eval", folder, *TEXT], "which no file holds", "A shard is missing")
    with pytest.raises(FormatError, match=f"{shards[1].name} does not exist"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"hidden_size": 32}, ("config.json makes", "not of one checkpoint")),
        ({"intermediate_size": 96}, ("config.json makes", "down_proj", "[64, 96]", "[64, 128]")),
        ({"vocab_size": 5000}, ("config.json makes", "[5000, 64]", "[4096, 64]")),
        ({"num_hidden_layers": 1}, ("model.layers.1.", "does not have")),
        ({"tie_word_embeddings": True}, ("config.json ties 'lm_head.weight'", "not of one checkpoint")),
    ],
    ids=str,
)
def test_a_config_of_another_model(values, parts, refused, low, change):
    # inspect reads files only, and those are whole.
    damaged_everywhere(refused, change(low, "config.json", settings(**values)), *parts, inspect=False)


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"quantization_config": None}, "lm_head.weight"),
    ],
    ids=["a layer too many", "no quantization_config"],
)
def test_a_config_that_asks_for_more_than_the_files_hold(values, lost, refused, low, change):
    source = change(low, "config.json", settings(**values))
    refused(1, ["eval", source, *TEXT], "the files lack", lost, "not of one checkpoint")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"hidden_size": 32}, ("config.json makes", "not of one checkpoint")),
        ({"intermediate_size": 96}, ("config.json makes", "[64, 96]", "[64, 128]")),
        ({"num_hidden_layers": 3}, ("the files lack", "model.layers.2.")),
        ({"hidden_size": "wide"}, ("config.json is damaged", "hidden_size")),
    ],
    ids=str,
)
def test_a_source_whose_config_is_of_another_model(values, parts, refused, dense, change, tmp_path):
    source = change(dense, "config.json", settings(**values))
    refused(1, ["quantize", source, tmp_path / "out", "--method", "rtn"], *parts)


@pytest.mark.parametrize("name", [MATRIX, NORM])
def test_a_source_that_lacks_a_tensor(name, refused, dense, change, tmp_path):
    source = change(dense, FILE, rewrite(lambda tensors: tensors.pop(name)))
    refused(1, ["quantize", source, tmp_path / "out", "--method", "rtn"], "the files lack", name)
    with pytest.raises(LowBitError, match=name):
        load_model(str(source))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"quantization_config": "x"}'], ids=repr)
def test_a_config_that_is_none(data, refused, low, change, tmp_path):
    source = change(low, "config.json", lambda _: data)
    for command in (["inspect", source], ["eval", source, *TEXT], ["quantize", source, tmp_path / "out"]):
        refused(1, command, "config.json is damaged", "Fetch it again")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {'], ids=repr)
def test_a_damaged_tokenizer(data, refused, dense, change, tmp_path):
    source = change(dense, "tokenizer.json", lambda _: data)
    refused(1, ["quantize", source, tmp_path / "out", "--method", "rtn"], "the tokenizer is damaged", "Fetch it again")
    refused(1, ["eval", source, *TEXT], "the tokenizer is damaged")


def test_missing_files(refused, low, change):
    refused(1, ["inspect", change(low, FILE, None)], "holds no safetensors file")
    refused(1, ["eval", change(low, FILE, None), *TEXT], "holds no safetensors file")
    refused(2, ["inspect", change(low, "config.json", None)], "no config.json")


def test_a_newer_format(refused, low, change):
    newer = change(low, "config.json", settings("quantization_config", format_version=4))
    damaged_everywhere(refused, newer, "quantization_config has format version 4", "reads up to 3", "pip install --upgrade")
    newer = change(low, FILE, rewrite(lambda tensors: None, lambda record: record.update(format_version=4)))
    damaged_everywhere(refused, newer, "has format version 4", "reads up to 3", "pip install --upgrade hf-lowbit")
    odd = change(low, "config.json", settings("quantization_config", format_version="next"))
    damaged_everywhere(refused, odd, "format version 'next'", "which no release of hf-lowbit wrote")


@pytest.mark.parametrize(
    ("values", "part"),
    [({"method": "zzz"}, "unknown method 'zzz'"), ({"bits": 99}, "got 99"), ({"new": 1}, "unknown setting 'new'")],
    ids=str,
)
def test_a_quantization_config_nobody_wrote(values, part, refused, low, change):
    source = change(low, "config.json", settings("quantization_config", **values))
    refused(1, ["inspect", source], "config.json: ", part)
    with pytest.raises(LowBitError):
        AutoModelForCausalLM.from_pretrained(source)


FULL_DISK = """
import resource, signal, sys
import hf_lowbit.plugin
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit fails as one on a full disk does
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from hf_lowbit.cli import main
sys.exit(main(sys.argv[2:]))
"""


TOKENIZER_SIZE = (demo.embedded_model() / "tokenizer.json").stat().st_size


# Enough for nothing, for a part of the weights, and for the weights but not for the tokenizer after them.
@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize(
    ("room", "kept"),
    [(0, "nothing was left behind"), (100_000, "2 finished parts kept"), (TOKENIZER_SIZE - 1, "3 finished parts kept")],
    ids=["none", "little", "no tokenizer"],
)
def test_a_full_disk_loses_nothing_finished(room, kept, dense, tmp_path):
    target = tmp_path / "new" / "parents" / "out"
    small_tables = ["--method", "rtn", "--override", "embed_tokens:bits=2", "--override", "lm_head:bits=2"]
    arguments = ["quantize", str(dense), str(target), *small_tables]
    command = [sys.executable, "-c", FULL_DISK, str(room), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "File too large" in line and kept in line and "run the same command again" in line
    assert not target.exists()
    assert (list(tmp_path.iterdir()) == []) == (room == 0)
    assert main(arguments) == 0
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert main(["inspect", str(target)]) == 0
