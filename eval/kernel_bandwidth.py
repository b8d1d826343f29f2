"""Speed of the CPU kernels against what the machine can read, on the matrices of a 1 B Llama.

    python eval/kernel_bandwidth.py [--threads N] [--isa avx2] [--seconds 2]

For each instruction set, width and batch: time per product of a matrix that is in no cache (several copies take turns),
GB/s of prepared weight bytes, and their share of a read probe, a sum over memory by torch, that runs between the products.
``all matrices`` is one token's 112 products of the whole model. Prefill of 128 tokens and the exact mode are compared with
``torch.nn.functional.linear`` in float32 on the same shape. Times are the least of many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from results_file import write

from hf_lowbit.format import Layout, Levels, LowBitTensor, Stage
from hf_lowbit.kernels import cpu, cpu_library

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
# One decoder layer of it: q, k, v, o, gate, up, down.
LAYER = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))
LAYERS = 16
WIDTHS = (4, 3, 2)
# Copies of a matrix that take turns: more bytes than a last-level cache holds.
TURNS_BYTES = 200_000_000
PROBE_BYTES = 1 << 28
# torch's threads look for more work this long after each operation, on the cores that the next job wants.
REST = 0.008


def record(shape: tuple[int, int], bits: int, group: int, scale_bits: int) -> LowBitTensor:
    """A matrix of random codes under a fitted table."""
    layout = Layout(shape, (Stage(Levels("fitted", bits), group, scale_bits),))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (dtype, size) in layout.fields.items():
        if dtype == torch.int16:
            tensors[name] = (torch.randn(size, generator=generator) * 0.05).half().view(torch.int16)
        else:
            tensors[name] = torch.randint(0, 256, size, generator=generator).to(dtype)
    return LowBitTensor(layout, tensors)


def fastest(jobs: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Least time of each job; they take turns, so that what disturbs the machine disturbs all."""
    best, end = [float("inf")] * len(jobs), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for number, job in enumerate(jobs):
            time.sleep(REST)
            start = time.perf_counter()
            job()
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def decode_row(
    bits: int, group: int, scale_bits: int, shape: tuple[int, int], batch: int, mode: str, seconds: float
) -> dict:
    """One line of the decode table, with the read probe and float32 beside it."""
    backend = cpu.Cpu()
    one = backend.prepare(record(shape, bits, group, scale_bits))
    copies = [one._replace(matrix=one.matrix.clone()) for _ in range(max(1, TURNS_BYTES // one.matrix.numel()))]
    dense = [torch.randn(shape) for _ in range(max(1, TURNS_BYTES // (4 * shape[0] * shape[1])))]
    probe, x = torch.ones(PROBE_BYTES // 4), torch.randn(batch, shape[1])
    with cpu.arithmetic(mode):
        ours, read, float32 = fastest(
            [
                lambda: [backend.linear(x, copy) for copy in copies],
                probe.sum,
                lambda: [torch.nn.functional.linear(x, weight) for weight in dense],
            ],
            seconds,
        )
    ours, float32 = ours / len(copies), float32 / len(dense)
    bandwidth, limit = one.matrix.numel() / ours / 1e9, PROBE_BYTES / read / 1e9
    return {
        "us": round(ours * 1e6, 1),
        "gb_s": round(bandwidth, 2),
        "probe_gb_s": round(limit, 2),
        "share": round(bandwidth / limit, 3),
        "times_float32": round(float32 / ours, 2),
        "gweights_s": round(shape[0] * shape[1] * batch / ours / 1e9, 2),
    }


def model_row(bits: int, seconds: float) -> dict:
    """The matrices of one token, each in its own memory, one product behind the other."""
    backend, probe = cpu.Cpu(), torch.ones(PROBE_BYTES // 4)
    made = {shape: backend.prepare(record(shape, bits, 64, 16)) for shape in set(LAYER)}
    matrices = [made[shape]._replace(matrix=made[shape].matrix.clone()) for _ in range(LAYERS) for shape in LAYER]
    inputs = {columns: torch.randn(1, columns) for _, columns in LAYER}
    with cpu.arithmetic("int8"):
        ours, read = fastest([lambda: [backend.linear(inputs[one.columns], one) for one in matrices], probe.sum], seconds)
    stored = sum(one.matrix.numel() for one in matrices)
    bandwidth, limit = stored / ours / 1e9, PROBE_BYTES / read / 1e9
    found = {"us": ours * 1e6, "gb_s": bandwidth, "probe_gb_s": limit, "share": bandwidth / limit}
    return {name: round(value, 3) for name, value in found.items()}


def prefill_row(bits: int, group: int, scale_bits: int, shape: tuple[int, int], batch: int, seconds: float) -> dict:
    """One line of the prefill table."""
    backend, x = cpu.Cpu(), torch.randn(batch, shape[1])
    prepared, dense = backend.prepare(record(shape, bits, group, scale_bits)), torch.randn(shape)
    with cpu.arithmetic("int8"):
        ours, float32 = fastest([lambda: backend.linear(x, prepared), lambda: torch.nn.functional.linear(x, dense)], seconds)
    work = 2e-9 * batch * shape[0] * shape[1]
    return {
        "gflop_s": round(work / ours, 1),
        "float32_gflop_s": round(work / float32, 1),
        "times_float32": round(float32 / ours, 2),
    }


def measure(seconds: float) -> dict[str, dict]:
    """All lines for the instruction set in use."""
    rows = {f"{bits} bits, group 64, 16-bit scales, all matrices, batch 1": model_row(bits, 3 * seconds) for bits in WIDTHS}
    for shape in SHAPES:
        name = f"{shape[0]}x{shape[1]}"
        for bits in WIDTHS:
            for group, scale_bits in ((64, 16), (32, 6)) if shape == SHAPES[1] else ((64, 16),):
                kind = f"{bits} bits, group {group}, {scale_bits}-bit scales, {name}"
                rows[f"{kind}, batch 1"] = decode_row(bits, group, scale_bits, shape, 1, "int8", seconds)
                rows[f"{kind}, batch 8"] = decode_row(bits, group, scale_bits, shape, 8, "int8", seconds)
            kind = f"{bits} bits, group 64, 16-bit scales, {name}"
            rows[f"{kind}, batch 1, exact"] = decode_row(bits, 64, 16, shape, 1, "exact", seconds)
            rows[f"{kind}, prefill 128"] = prefill_row(bits, 64, 16, shape, 128, seconds)
    return rows


def main() -> None:
    """Measure, print, write ``eval/results/kernel_bandwidth.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", action="append", help="an instruction set; may be given again (all that are here)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    library = cpu_library.library()
    if library is None:
        parser.error(str(cpu_library.trouble()))
    results = {}
    for isa in args.isa or [name for name in cpu_library.instruction_sets() if name != "portable"]:
        if not library.lowbit_set_isa(isa.encode()):
            parser.error(f"{isa} is not to be had here, only {', '.join(cpu_library.instruction_sets())}")
        results[isa] = measure(args.seconds)
        for label, row in results[isa].items():
            print(f"{isa:8} {label:58}", "  ".join(f"{key} {value}" for key, value in row.items()))
    print("written to", write("kernel_bandwidth", results))


if __name__ == "__main__":
    main()
