"""What the pipeline's tests share: a tiny dense checkpoint, calibration for it, and the files of a result."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowbit import demo
from hf_lowbit.cli import main

_spec = importlib.util.spec_from_file_location("commands", Path(__file__).parents[1] / "commands.py")
commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(commands)
refused = commands.refused


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers under the embedded model's tokenizer: read it, never write to it."""
    folder = tmp_path_factory.mktemp("tiny") / "dense"
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=4096, max_position_embeddings=128))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.embedded_model() / name, folder)
    return folder


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """The command line that quantizes one checkpoint into another on the held-out text."""

    def make(source: Path, target: Path, *options: str, method: str = "gptq") -> list[str]:
        data = ["--calibration", str(demo.held_out_text()), "--sequences", "40", "--length", "64"]
        plain = ["quantize", str(source), str(target), "--method", method, "--bits", "3", "--no-quantize-embeddings"]
        return [*plain, *(data if method != "rtn" else []), *options]

    return make


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, bytes]]:
    """All files of a directory and their bytes."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def whole(dense, command, files, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted run of the usual command writes."""
    target = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(dense, target)) == 0
    return files(target)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums of matrix products depend on the number of threads; child processes get one too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
