"""What the compiler makes of the Triton kernels, without a GPU: instructions a weight, registers, bytes a weight.

    python eval/gpu_static.py [--capability 80 90]

Compiles each kernel as it is launched on a 4096x14336 matrix (groups of 64, 16-bit scales, bfloat16 activations), and those
of the packed KV cache for heads of 128 and one token of 4 heads that share keys, disassembles them with Triton's own tools
and counts the instructions of the longest loop per weight, or number of the cache, that the loop decodes.
Issue slots bound a kernel from above: a multiprocessor issues 128 lane-instructions a clock. ``ceiling GB/s`` is what that
allows at the clocks and multiprocessors of the named card, the ceiling of the arithmetic, not a measured speed. Writes
``eval/results/gpu_static.json``. Run it without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from results_file import write
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_lowbit.format import Layout, Levels, Stage
from hf_lowbit.format.ledger import ledger
from hf_lowbit.kernels.triton_attend import blocks_kernel, rows_kernel
from hf_lowbit.kernels.triton_cache_launch import Shape
from hf_lowbit.kernels.triton_configs import Config, choose
from hf_lowbit.kernels.triton_gemm import gemm_kernel
from hf_lowbit.kernels.triton_gemv import gemv_kernel
from hf_lowbit.kernels.triton_plan import PERMUTED, StagePlan, plan

SHAPE = (4096, 14336)
ISSUED = 128
# Name, multiprocessors and boost clock in GHz from the vendor's data sheets, nominal memory GB/s.
CARDS = {80: ("A100 80GB SXM", 108, 1.41, 2039), 90: ("H100 SXM", 132, 1.98, 3350)}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDTHS = (2, 3, 4, 6, 8)
BATCHES = (1, 16, 512)
# The cache of an 8 B Llama; bits of blocks, and of rows.
CACHE_HEADS, CACHE_GROUP, CACHE_DIM = 8, 4, 128
CACHE_BITS, ROW_BITS = (2, 3, 4), (8, 16)


def layout(bits: int) -> Layout:
    """The matrix that is compiled for."""
    return Layout(SHAPE, (Stage(Levels("fitted", bits), 64),))


def arguments(kernel: Any, stage: StagePlan, config: Config, **switches: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of pointers, and constants of a launch as ``triton_launch`` makes it; ``switches``: EXPERTS, BIAS, PICK."""
    constants = {
        "BITS": stage.bits, "UNIT": stage.unit, "UNIT_WORDS": stage.unit_words, "GROUP": stage.group, "CODED": stage.coded,
        "OFFSET": stage.offset, "PER_ROW": stage.tables > 1, "SUBSET": stage.subset, "EXPERTS": False, "BIAS": False,
        "PICK": True, "PERMUTE": stage.bits in PERMUTED, "ASM": True, "KIND": tl.bfloat16, "WIDE": False,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_U": max(1, config.block_k // stage.unit), "BLOCK": 64,
    } | switches  # fmt: skip
    group_value = "*u8" if stage.coded else "*fp16"
    pointers = {
        "x_ptr": "*bf16", "codes_ptr": "*i32", "scale_ptr": group_value, "offset_ptr": group_value,
        "scale_super_ptr": "*fp16", "offset_super_ptr": "*fp16", "planes_ptr": "*i32", "table_of_row_ptr": "*i32",
        "row_ids_ptr": "*i32", "expert_ptr": "*i32", "bias_ptr": "*bf16", "ids_ptr": "*i64", "values_ptr": "*fp16",
        "columns_ptr": "*u16", "starts_ptr": "*i32", "out_ptr": "*bf16" if config.split == 1 else "*fp32",
    }  # fmt: skip
    return pointers, constants


def compiled(kernel: Any, stage: StagePlan, config: Config, capability: int, **switches: bool) -> Any:
    """A kernel of matrices for a capability."""
    pointers, constants = arguments(kernel, stage, config, **switches)
    return built(kernel, pointers, constants, capability, config.warps, config.stages)


def built(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    """A kernel for a capability; strides, sizes and pointers are multiples of 16, as they are at launch."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = pointers.get(name, "*fp32")
        else:
            types[name] = "fp32" if name in ("factor", "scale") else "i32"
    free = {"batch", "factor", "supers", "per_super", "first", "count", "scale", "tokens", "queries", "heads"}
    free |= {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if types[name] != "constexpr" and name not in free
    }
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=used, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )


def compiled_cache(bits: int, capability: int, **switches: Any) -> Any:
    """A kernel of the packed cache: over blocks of so many bits, or rows of 8 or 16; with the launch's own block sizes."""
    sizes = {name: switches.pop(name) for name in ("queries", "dim") if name in switches}
    shape = Shape(1, CACHE_HEADS, 1, CACHE_GROUP, CACHE_DIM)._replace(**sizes)
    number = {8: "*i8", 16: "*bf16"}.get(bits, "*i32")
    pointers = {name: "*fp16" for name in ("key_scale_ptr", "key_offset_ptr", "value_scale_ptr", "value_offset_ptr")}
    pointers |= {"keys_ptr": number, "values_ptr": number, "positions_ptr": "*i16"}
    pointers["mask_ptr"] = "*fp32" if switches.get("MASK") == 2 else "*i8"
    pointers |= {"key_planes_ptr": "*i32", "value_planes_ptr": "*i32"}
    constants = {
        "KEY_BITS": bits, "VALUE_BITS": bits, "KEYS_BY_CHANNEL": True, "VALUES_BY_CHANNEL": False, "INT8": bits == 8,
        "POSITIONS": True, "MASK": 0, "CAUSAL": False, "RAW": True, "WIDE": False, "ASM": True, "BLOCK_M": shape.block_m,
        "BLOCK_D": shape.block_d,
    } | switches  # fmt: skip
    return built(blocks_kernel if bits in CACHE_BITS else rows_kernel, pointers, constants, capability, shape.warps, 1)


def examine(kernel: Any, stage: StagePlan, config: Config, capability: int) -> dict[str, Any]:
    """What :func:`counted` says of a kernel of matrices, per weight."""
    weights = config.block_n * max(1, config.block_k // stage.unit) * stage.unit
    return counted(compiled(kernel, stage, config, capability), weights / (32 * config.warps))


def counted(kernel: Any, numbers: float) -> dict[str, Any]:
    """Instructions of the longest loop for each of the ``numbers`` a thread decodes in it, by kind, registers and spills."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True).stdout
    loop = longest_loop(code)
    kinds = Counter(line.split()[0].partition(".")[0] for line in loop)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "instructions": round(len(loop) / numbers, 2),
        "by_kind": {kind: round(count / numbers, 2) for kind, count in kinds.most_common(8)},
        "registers": found.get("REG"),
        "spilled_bytes": found.get("STACK", 0) + found.get("LOCAL", 0),
    }


def cache_bytes(bits: int) -> float:
    """Bytes of a number: codes, scales and offsets of a block (keys by channel, values by token), or scales of rows."""
    if bits == 16:
        return 2.0
    if bits == 8:
        return 1 + 2 / CACHE_DIM
    return bits / 8 + (4 / 64 + 4 / CACHE_DIM) / 2


def longest_loop(code: str) -> list[str]:
    """Instructions, predicates removed, of the longest piece of code that branches back to its beginning."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    best: list[str] = []
    for line in code.splitlines():
        if (label := re.match(r"\s*(\.L_x_\d+):", line)) is not None:
            labels[label[1]] = len(lines)
        elif (instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][^;]*?)\s*;", line)) is not None:
            lines.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels and len(lines) - labels[target[1]] > len(best):
                best = lines[labels[target[1]] :]
    return best


def main() -> None:
    """Compile, print a table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, nargs="+", default=sorted(CARDS))
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    results = {}
    print(
        "card            bits batch  bytes/weight  instructions/weight  registers  spilled  ceiling GB/s (share of nominal)"
    )
    for capability in args.capability:
        card, multiprocessors, clock, nominal = CARDS[capability]
        for bits in WIDTHS:
            stage = plan(layout(bits).dumps()).stages[0]
            stored = ledger(layout(bits)).bytes / (SHAPE[0] * SHAPE[1])
            for batch in BATCHES:
                kernel = gemv_kernel if batch == 1 else gemm_kernel
                config = choose(stage, SHAPE[1], batch, card, multiprocessors)
                row = examine(kernel, stage, config, capability)
                row |= {"bytes_a_weight": round(stored, 5), "config": config._asdict()}
                ceiling = ISSUED / row["instructions"] * multiprocessors * clock * stored
                if batch <= 16:
                    row["ceiling_gb_s"] = round(ceiling)
                results[f"{card}, {bits} bits, batch {batch}"] = row
                share = f"{ceiling:8.0f} ({ceiling / nominal:.2f})" if batch <= 16 else ""
                print(
                    f"{card:15} {bits:4} {batch:5}  {stored:12.5f}  {row['instructions']:19.2f}  "
                    f"{row['registers']:9}  {row['spilled_bytes']:7}  {share}",
                    row["by_kind"],
                )
    print("\ncard            cache             bytes/number  instructions/number  registers  spilled  ceiling GB/s (share)")
    for capability in args.capability:
        card, multiprocessors, clock, nominal = CARDS[capability]
        for bits in (*CACHE_BITS, *ROW_BITS):
            # A loop is 64 tokens, keys and values, by 128 threads.
            row = counted(compiled_cache(bits, capability), 2 * 64 * CACHE_DIM / 128)
            stored = cache_bytes(bits)
            ceiling = ISSUED / row["instructions"] * multiprocessors * clock * stored
            what = f"{'blocks' if bits in CACHE_BITS else 'rows'} of {bits} bits"
            results[f"{card}, cache, {what}"] = row | {"bytes_a_number": round(stored, 5), "ceiling_gb_s": round(ceiling)}
            print(
                f"{card:15} {what:17} {stored:9.5f}  {row['instructions']:19.2f}  {row['registers']:9}  "
                f"{row['spilled_bytes']:7}  {ceiling:8.0f} ({ceiling / nominal:.2f})",
                row["by_kind"],
            )
    print("written to", write("gpu_static", results))


if __name__ == "__main__":
    main()
