"""Launches Triton kernels on no GPU at all: compiled for a real card, their PTX run by ``ptx.py``.

``install()`` puts it in the place of the kernels; the launch code around them is the real one. It needs Triton's compiler,
so a process whose kernels are not interpreted: ``EMULATE_PTX=1`` in the environment of the tests turns all this on.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

CAPABILITY = 80
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.uint16: "u16", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
_CODES: dict[str, Any] = {}


def _ptx() -> Any:
    if "tests_ptx" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tests_ptx", Path(__file__).with_name("ptx.py"))
        sys.modules["tests_ptx"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tests_ptx"])
    return sys.modules["tests_ptx"]


class Emulated:
    """A kernel that is called like a Triton one."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **settings: self.launch((*grid, 1, 1)[:3], args, settings)

    def launch(self, grid: tuple[int, int, int], args: tuple, settings: dict[str, Any]) -> None:
        """Run every block of the grid."""
        ptx = _ptx()
        warps, stages = settings.pop("num_warps", 4), settings.pop("num_stages", 1)
        bound = dict(zip(self.kernel.arg_names, args, strict=False)) | settings
        types, constants, aligned = self._specialized(bound)
        key = repr((self.kernel.__name__, types, sorted(constants.items(), key=str), aligned, warps, stages))
        if key not in _CODES:
            _CODES[key] = ptx.Code(self._compiled(types, constants, aligned, warps, stages))
        code = _CODES[key]
        memory = ptx.Memory([value for value in bound.values() if isinstance(value, torch.Tensor)])
        values = [self._raw(bound[name], memory) for name, kind in types.items() if kind != "constexpr"]
        values += [0] * (len(code.parameters) - len(values))  # scratch that nobody uses
        for z, y, x in itertools.product(*map(range, reversed(grid))):
            ptx.Block(code, 32 * warps, memory, dict(zip(code.parameters, values, strict=True)), (x, y, z), grid).run()
        memory.give_back()

    def _specialized(self, bound: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
        """Types, constants and multiples of 16, as Triton tells them apart at a launch."""
        types, constants, aligned = {}, {}, {}
        for number, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, bound[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
                if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
                    aligned[(number,)] = [["tt.divisibility", 16]]
        return types, constants, aligned

    def _compiled(self, types: Any, constants: Any, aligned: Any, warps: int, stages: int) -> str:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(fn=self.kernel, signature=types, constexprs=constants, attrs=aligned)
        options = {"num_warps": warps, "num_stages": stages}
        return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options).asm["ptx"]

    @staticmethod
    def _raw(value: Any, memory: Any) -> int:
        if isinstance(value, torch.Tensor):
            return memory.address(value)
        return int(torch.tensor(value).view(torch.int32)) if isinstance(value, float) else int(value)


def install() -> None:
    """Let the launches run on this."""
    from hf_lowbit.kernels import triton_cache_launch, triton_launch

    for module in (triton_launch, triton_cache_launch):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, Emulated(kernel))
        module.interpreted = lambda: False
        module.device_of = lambda index: ("emulated", 1, True)
