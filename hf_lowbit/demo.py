"""``hf-lowbit demo``: quantize the embedded model, reload each result in a fresh process, and compare.

The fresh process imports only Transformers: that its stock ``AutoModelForCausalLM.from_pretrained`` opens the saved
directories is part of what the demo shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.resources import files
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
for directory in [source, *directories]:
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
    from hf_lowbit.plugin.checkpoint import quantize_checkpoint

    source = embedded_model()
    weights = source / "model.safetensors"
    rows: list[dict[str, Any]] = [
        {"model": "original", "bits_per_weight_linears": 16.0, "bytes": weights.stat().st_size, "directory": str(source)}
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep or temporary)
        for label, config in recipes():
            progress(f"quantizing: {label}")
            target = folder / f"{config.method}-{config.bits}"
            report, _ = quantize_checkpoint(str(source), target, config)
            size = (target / "model.safetensors").stat().st_size
            row = {"model": label, "bits_per_weight_linears": report.bits_per_weight_linears}
            rows.append(row | {"bytes": size, "directory": str(target)})
        progress("reloading all of them in a fresh process and measuring")
        for row, measured in zip(rows, _reload([row["directory"] for row in rows[1:]]), strict=True):
            row |= measured
    return rows


def _reload(directories: list[str]) -> list[dict[str, Any]]:
    arguments = [str(embedded_model()), str(held_out_text()), PROMPT, str(WINDOW), *directories]
    done = subprocess.run([sys.executable, "-c", _RELOAD, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LowBitError(f"the fresh process failed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
