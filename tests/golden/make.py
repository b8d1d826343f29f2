"""Write a set of golden files: small low-bit tensors of every solver, and the values they must decode to for ever.

    python tests/golden/make.py                  the first set, v1; refused where it exists
    python tests/golden/make.py --new-version    the next set, beside those that exist

A set is never rewritten: files in the field do not change either. A format that gains something gets a further set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_lowbit.format import LowBitTensor, Spec, save_tensors
from hf_lowbit.solvers import SOLVERS, solve

HERE = Path(__file__).parent


def weights(*shape: int) -> torch.Tensor:
    """Bell-shaped weights by integer arithmetic alone, the same on every machine and with every release of torch."""
    count = torch.tensor(shape).prod().item()
    number = torch.arange(count, dtype=torch.int64)
    mixed = (number * 7919 + number * number * 31 + number // 80 * 104729) % 2003 - 1001
    return ((mixed * mixed * mixed) // 1000).to(torch.float32).view(shape) / 2**20


def specs() -> dict[str, tuple[tuple[int, ...], Spec]]:
    """Name -> shape and spec of every tensor in the set."""
    out = {}
    for method, solver in sorted(SOLVERS.items()):
        # Every width once, for the packer; elsewhere the usual ones. The three forms of scales take turns.
        for bits in range(1, 9) if method == "rtn" else (2, 3, 4):
            if solver.bits[0] <= bits <= solver.bits[1]:
                scale_bits = (16, 8, 6)[bits % 3]
                out[f"{method}-{bits}"] = (12, 80), Spec(method=method, bits=bits, scale_bits=scale_bits)
    out["affine-5"] = (12, 80), Spec(method="rtn", bits=5, levels="affine", scale_bits=6)
    out["e2m1-4"] = (12, 80), Spec(method="float", bits=4, levels="e2m1")
    out["power_of_two-3"] = (12, 80), Spec(method="search", bits=3, levels="power_of_two")
    out["whole-row-4"] = (12, 80), Spec(bits=4, group_size=-1)
    out["outliers-4"] = (12, 80), Spec(bits=4, outliers=0.02)
    out["residual-2"] = (12, 80), Spec(bits=2, residual_terms=3)
    out["stack-3"] = (3, 4, 80), Spec(bits=3, outliers=0.01, residual_terms=2)
    return out


def make() -> dict[str, LowBitTensor]:
    """The records of a set, solved anew."""
    return {name: solve(weights(*shape), spec) for name, (shape, spec) in specs().items()}


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    """Command line; 0 when files were written, 2 when they exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-version", action="store_true", help="write the next set beside those that exist")
    options = parser.parse_args(arguments)
    made = [int(path.stem[1:]) for path in folder.glob("v*.safetensors") if path.stem[1:].isdigit()]
    if made and not options.new_version:
        print(f"v{max(made)} exists and is never rewritten; --new-version writes v{max(made) + 1}", file=sys.stderr)
        return 2
    version = max(made, default=0) + 1
    records = make()
    save_tensors(folder / f"v{version}.safetensors", records)
    values = {name: record.dequantize() for name, record in records.items()}
    save_file(values, folder / f"v{version}_values.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
