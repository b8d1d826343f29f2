"""The Triton kernels on this GPU: built, checked and timed, in one table.

    python eval/gpu.py [--tune] [--seconds 0.2] [--layers 32]

Prints for widths of 2, 3, 4 and 8 bits (groups of 64, 16-bit scales) and batches of 1, 16 and 512 on a 4096x14336 matrix:
time, GB/s of stored bytes and their share of a copy measured in between, speed against ``F.linear`` in bfloat16 and against
what else is installed (bitsandbytes NF4, torchao int4, gemlite, FLUTE, Marlin); the matrices of a 1 B and an 8 B Llama, one
after another in one CUDA graph; whole models of these sizes: memory while they are loaded, and tokens per second of
``generate`` with a static cache beside bfloat16 and bitsandbytes; one token's attention over the packed cache beside the
host's. Times are medians; copies of a matrix take turns, so that no cache holds them.
Every product is first held to the float64 product of the decoded matrix: at most 1e-2 of the largest output. ``--tune``
tries other block sizes and writes the best into ``hf_lowbit/kernels/triton_configs.json``. Writes ``eval/results/gpu.json``.
Exit code 2 where there is no CUDA device, 1 where a product is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import gpu_models
import torch
from gpu_peers import PEERS, why_not
from results_file import write
from torch import Tensor

from hf_lowbit.format import Layout, Levels, LowBitTensor, Stage
from hf_lowbit.format.ledger import ledger
from hf_lowbit.kernels import triton_backend, triton_configs, triton_tune
from hf_lowbit.kernels.triton_tune import captured, in_turn, median_seconds

SHAPE = (4096, 14336)
WIDTHS, BATCHES = (4, 3, 2, 8), (1, 16, 512)
ALLOWED_ERROR = 1e-2
# More bytes of turns than a last-level cache holds, and a copy far beyond it.
TURNS_BYTES, COPY_BYTES = 256 << 20, 1 << 30


def record(shape: tuple[int, int], bits: int, device: torch.device) -> LowBitTensor:
    """A matrix of random codes under a fitted table."""
    layout = Layout(shape, (Stage(Levels("fitted", bits), 64),))
    tensors = {}
    for name, (dtype, size) in layout.fields.items():
        if dtype == torch.int16:
            tensors[name] = (torch.randn(size, device=device) * 0.05).half().view(torch.int16)
        else:
            tensors[name] = torch.randint(0, 256, size, device=device, dtype=torch.uint8)
    return LowBitTensor(layout, tensors)


def error(tensor: LowBitTensor, x: Tensor, y: Tensor) -> float:
    """Largest difference from the float64 product of the decoded matrix, as a share of its largest output."""
    worst, largest = 0.0, 0.0
    step = max(1, (1 << 24) // tensor.layout.in_features)
    for first in range(0, tensor.layout.rows, step):
        ids = torch.arange(first, min(first + step, tensor.layout.rows), device=x.device)
        expected = x.double() @ tensor.rows(ids).dequantize().double().T
        worst = max(worst, float((y[:, ids].double() - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return worst / largest


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes read per second while copying, reads and writes counted: what a kernel that only reads is held to."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_seconds(lambda: target.copy_(source), seconds)


def copies(shape: tuple[int, int], bits: int, device: torch.device) -> list[LowBitTensor]:
    """Matrices of random codes, so many that no cache holds them all."""
    count = max(2, TURNS_BYTES // ledger(record(shape, bits, torch.device("meta")).layout).bytes)
    return [record(shape, bits, device) for _ in range(count)]


def ours(shape: tuple[int, int], bits: int, batch: int, x: Tensor) -> tuple[list[Callable[[], Tensor]], float]:
    """Products by copies of a matrix that take turns, and the error of the first."""
    backend, tensors = triton_backend.Triton(), copies(shape, bits, x.device)
    prepared = [backend.prepare(tensor) for tensor in tensors]
    wrong = error(tensors[0], x, backend.linear(x, prepared[0]))
    return [lambda one=one: backend.linear(x, one) for one in prepared], wrong


def dense(shape: tuple[int, int], x: Tensor) -> list[Callable[[], Tensor]]:
    """``F.linear`` in the dtype of ``x`` by matrices that take turns."""
    count = max(2, TURNS_BYTES // (2 * shape[0] * shape[1]))
    weights = [torch.randn(shape, dtype=x.dtype, device=x.device) for _ in range(count)]
    return [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]


def others(name: str, shape: tuple[int, int], x: Tensor) -> list[Callable[[], Tensor]]:
    """Layers of a peer that take turns."""
    layers = []
    for _ in range(max(2, 2 * TURNS_BYTES // (shape[0] * shape[1]))):
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=x.dtype, device=x.device)
        layers.append(PEERS[name](linear, x.shape[0]))
    return [lambda layer=layer: layer(x) for layer in layers]


def peers(shape: tuple[int, int], x: Tensor, seconds: float) -> dict[str, Any]:
    """Seconds of every peer that is installed, and why the others are not there."""
    found: dict[str, Any] = {}
    for name in PEERS:
        try:
            found[name] = in_turn(others(name, shape, x), seconds)
        except Exception as reason:  # whatever a peer of some version does: the table says so and goes on
            found[name] = why_not(reason)
    return found


def kernel_rows(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """One row for each width and batch."""
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, SHAPE[1], dtype=torch.bfloat16, device=device)
        bf16, found = in_turn(dense(SHAPE, x), seconds), peers(SHAPE, x, seconds)
        for bits in WIDTHS:
            jobs, wrong = ours(SHAPE, bits, batch, x)
            took, copied = in_turn(jobs, seconds), copy_bandwidth(device, seconds)
            stored = ledger(record(SHAPE, bits, torch.device("meta")).layout).bytes
            row = {
                "bits": bits, "batch": batch, "us": took * 1e6, "error": wrong, "gb_s": stored / took / 1e9,
                "share_of_copy": stored / took / copied, "times_bf16": bf16 / took,
            }  # fmt: skip
            row |= {f"times {name}": value / took if isinstance(value, float) else value for name, value in found.items()}
            rows.append(row)
            print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


def model_rows(device: torch.device, seconds: float, layers: int) -> list[dict[str, Any]]:
    """Tokens per second of all matrices of a model, each its own, in one graph: what attention and norms come on top of."""
    rows = []
    for name in gpu_models.MODELS:
        config = gpu_models.config_of(name, layers)
        every = gpu_models.matrices(config)
        row: dict[str, Any] = {"model": name, "layers": config.num_hidden_layers}
        try:
            took, bf16 = model_seconds(every, device, seconds)
            row |= {"tokens_per_s": 1 / took, "times_bf16": bf16 / took}
        except torch.cuda.OutOfMemoryError:
            row["not measured"] = "out of memory; --layers takes fewer"
        rows.append(row)
        print_row(row)
    return rows


def model_seconds(every: list[tuple[int, int]], device: torch.device, seconds: float) -> tuple[float, float]:
    """Seconds of one row of activations through matrices of these shapes: ours at 4 bits, and dense in bfloat16."""
    inputs = {n: torch.randn(1, n, dtype=torch.bfloat16, device=device) for _, n in every}
    backend, jobs = triton_backend.Triton(), []
    for shape in every:
        prepared = backend.prepare(record(shape, 4, device))
        jobs.append(lambda one=prepared, x=inputs[shape[1]]: backend.linear(x, one))
    took = in_turn(jobs, seconds) * len(every)
    del jobs, prepared
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in every]
    plain = [lambda w=w, x=inputs[w.shape[1]]: torch.nn.functional.linear(x, w) for w in weights]
    return took, in_turn(plain, seconds) * len(every)


def tune(device: torch.device, seconds: float) -> None:
    """Try block sizes on the shapes of the models and keep the best of each in the package."""
    backend = triton_backend.Triton()
    shapes = sorted({shape for model in gpu_models.MODELS for shape in gpu_models.matrices(gpu_models.config_of(model, 1))})
    for shape, bits in itertools.product(shapes, WIDTHS):
        prepared = [backend.prepare(tensor) for tensor in copies(shape, bits, device)]
        triton_tune.tune(prepared, BATCHES, torch.bfloat16, seconds, triton_configs.FILE, print)


def main() -> int:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tune", action="store_true", help="try block sizes first and keep the best (takes longer)")
    parser.add_argument("--seconds", type=float, default=0.2, help="per measurement")
    parser.add_argument("--layers", type=int, default=32, help="of the models, at most")
    args = parser.parse_args()
    device = torch.device("cuda")
    reason = triton_backend.trouble(device)
    if reason is not None:
        print(
            f"eval/gpu.py needs a GPU that runs the Triton kernels: {reason}. eval/gpu_static.py needs none.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if args.tune:
        tune(device, args.seconds / 4)
    print(torch.cuda.get_device_name(device), f"copy {copy_bandwidth(device, args.seconds) / 1e9:.0f} GB/s")
    result = {
        "device": torch.cuda.get_device_name(device),
        "copy_gb_s": copy_bandwidth(device, args.seconds) / 1e9,
        "kernels": kernel_rows(device, args.seconds),
        "matrices": model_rows(device, args.seconds, args.layers),
    }
    result["cache"] = gpu_models.cache_rows(device, lambda job: median_seconds(captured(job), args.seconds))
    result["models"] = gpu_models.decode_rows(device, args.layers)
    for row in [*result["cache"], *result["models"]]:
        print_row(row)
    print("written to", write("gpu", result))
    wrong = [row for row in result["kernels"] if not row["error"] <= ALLOWED_ERROR]
    for row in wrong:
        print(f"WRONG: {row['bits']} bits, batch {row['batch']}: error {row['error']:.3g}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
