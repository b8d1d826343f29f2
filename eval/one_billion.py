"""What the measurements at real size share: a random Llama of 1.04 B weights, fresh processes, and their peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def dense_model(folder: Path, layers: int) -> Path:
    """The bf16 checkpoint in ``folder``, made in a process of its own if it is not there (2 GB at 16 layers)."""
    dense = folder / f"llama-{layers}-layers"
    if not dense.exists():
        run(f"import one_billion, pathlib; one_billion.make_model(pathlib.Path({str(dense)!r}), {layers})")
    return dense


def make_model(folder: Path, layers: int) -> None:
    """A random bf16 Llama: 2,048 wide, MLP 8,192, 32 heads over 8, vocabulary 32,000."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run(code: str, *arguments: str, python: str = sys.executable, **settings: str) -> str:
    """Standard output of ``code`` in a fresh process; fails if it fails.

    The modules of this folder and the checkout can be imported there; ``settings`` are added to its environment.
    """
    here = Path(__file__).parent
    places = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), **settings}
    return subprocess.run(
        [python, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout


def anonymous() -> float:
    """Anonymous resident memory of this process in MB: what is not a page of a file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


class Peak:
    """Samples :func:`anonymous` every 20 ms while it is open.

    Attributes:
        before: MB when it was opened.
        added: MB by which the largest sample exceeds that.
        seconds: time it was open.
    """

    def __enter__(self) -> Peak:
        self.before = self._largest = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._begun = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._done.set()
        self._thread.join()
        self.added = self._largest - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._largest = max(self._largest, anonymous())
