"""``hf-lowbit demo``: quantize the embedded model, reload each result in a fresh process, and compare.

Two processes share the work. Those that reload import only Transformers: that its stock
``AutoModelForCausalLM.from_pretrained`` opens the saved directories is part of what the demo shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.errors import LowBitError

if TYPE_CHECKING:
    from hf_lowbit.plugin.config import LowBitConfig

WINDOW = 512
PROMPT = "It was a dark night, and the old house"
METHODS = ("rtn", "halfquad", "powerquant", "codebook")
WIDTHS = (4, 3, 2)
# Each takes many times as long as a data-free one: they are shown at one width, on a sixteenth of the usual windows, with a
# fraction of their steps. eval/quality.py measures them in full.
CALIBRATED = ("squeezellm", "gptq", "nupes", "jlcm")
CALIBRATED_WIDTH = 3
SEQUENCES = 8
SHORT = {"steps": 6, "batch": 2, "sweeps": 1}
PROCESSES = 2

_RELOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
source, text_file, prompt, window, *directories = sys.argv[1:]
load = lambda place: AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval()
tokenizer, reference = AutoTokenizer.from_pretrained(source), load(source)
ids = tokenizer(open(text_file, encoding="utf-8").read(), add_special_tokens=False, return_tensors="pt").input_ids[0]
start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
for directory in directories:
    model = load(directory)
    from hf_lowbit.measure import divergence
    found = divergence(model, reference, ids, int(window))
    tokens = model.generate(**start, max_new_tokens=28, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    row = {"perplexity": found.perplexity, "kl": found.kl, "top1_agreement": found.top1_agreement}
    row["text"] = tokenizer.decode(tokens[0, start.input_ids.shape[1]:])
    print(json.dumps(row), flush=True)
"""


def embedded_model() -> Path:
    """Directory of the small trained model that ships with the package."""
    return Path(str(files("hf_lowbit.embedded")))


def held_out_text() -> Path:
    """A few kilobytes of public-domain books the embedded model has not seen."""
    return embedded_model() / "held_out.txt"


def calibration_text() -> Path:
    """A hundred kilobytes of other public-domain books, to calibrate on."""
    return embedded_model() / "calibration.txt"


def example_texts() -> list[tuple[str, str]]:
    """Label and text of some texts to try a detector on: by a person, and by the embedded model."""
    people = held_out_text().read_text(encoding="utf-8")
    start = people.index("\n\n") + 2
    person = people[start : people.index("\n\n", start + 1200)]
    written = json.loads((embedded_model() / "detector_examples.json").read_text(encoding="utf-8"))
    return [("a person, from a book", person), *written.items(), ("too short", person[:120])]


def recipes() -> Iterator[tuple[str, LowBitConfig]]:
    """Label and config of every row of the demo."""
    from hf_lowbit.plugin.config import LowBitConfig
    from hf_lowbit.solvers import SOLVERS

    for bits in WIDTHS:
        for method in METHODS:
            yield f"{bits} bits, {method}", LowBitConfig(method=method, bits=bits)
        for method in CALIBRATED if bits == CALIBRATED_WIDTH else ():
            short = {key: value for key, value in SHORT.items() if key in SOLVERS[method].options}
            calibration = {"source": str(calibration_text()), "sequences": SEQUENCES}
            config = LowBitConfig(method=method, bits=bits, calibration=calibration, options=short)
            yield f"{bits} bits, {method} (calibrated)", config


def run_demo(progress: Callable[[str], None], keep: str | None = None) -> list[dict[str, Any]]:
    """Quantize, save, reload in a fresh process and measure.

    Args:
        progress: told what happens.
        keep: a directory for the quantized checkpoints; None uses a temporary one.

    Returns:
        One row per model, the original first: label, bits per weight, bytes, perplexity, KL, top-1 agreement, text.

    Raises:
        LowBitError: the fresh process failed, with its message.
    """
    source = embedded_model()
    weights = source / "model.safetensors"
    rows: list[dict[str, Any]] = [
        {"model": "original", "bits_per_weight_linears": 16.0, "bytes": weights.stat().st_size, "directory": str(source)}
    ]
    with tempfile.TemporaryDirectory() as temporary:
        jobs = [(label, str(Path(keep or temporary) / f"{config.method}-{config.bits}")) for label, config in recipes()]
        with ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=_alone) as pool:
            for row in pool.map(_quantize, jobs):
                progress(f"quantized: {row['model']}")
                rows.append(row)
        progress("reloading all of them in fresh processes and measuring")
        parts = [rows[number::PROCESSES] for number in range(PROCESSES)]
        with ThreadPoolExecutor(PROCESSES) as threads:
            for part, measured in zip(parts, threads.map(_reload, parts), strict=True):
                for row, found in zip(part, measured, strict=True):
                    row |= found
    return rows


def _alone() -> None:
    """Matrices of the embedded model are too small for more than one thread."""
    import torch

    from hf_lowbit.plugin.checkpoint import show_progress

    torch.set_num_threads(1)
    show_progress(False)


def _quantize(job: tuple[str, str]) -> dict[str, Any]:
    """Make one row's checkpoint."""
    from hf_lowbit.plugin.checkpoint import quantize_checkpoint

    label, target = job
    report, _ = quantize_checkpoint(str(embedded_model()), target, dict(recipes())[label])
    size = (Path(target) / "model.safetensors").stat().st_size
    return {"model": label, "bits_per_weight_linears": report.bits_per_weight_linears, "bytes": size, "directory": target}


def _reload(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Open and measure the directories of some rows in a process that never saw them being made."""
    directories = [row["directory"] for row in rows]
    arguments = [str(embedded_model()), str(held_out_text()), PROMPT, str(WINDOW), *directories]
    command, alone = [sys.executable, "-c", _RELOAD, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if done.returncode:
        raise LowBitError(f"the fresh process failed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
