"""Runs the PTX of a compiled kernel on the CPU, one block of threads at a time: what the compiler made, number by number.

It knows the instructions of the kernels here: arithmetic, shuffles, shared memory and its asynchronous copies, and tensor
core products of 16 by 8 by 16. Threads of a block run in step, so a branch must be taken by all of them or none. Sums of
``mma`` and approximate functions are exact before they are rounded, which hardware does not promise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

# Registers are uint64 [threads] of raw bits, predicates bool.
Register = np.ndarray
SHARED_BYTES, FIRST_ADDRESS = 1 << 17, 256


class Memory:
    """A flat address space with copies of tensors' storages."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        self._starts: dict[int, int] = {}
        at = FIRST_ADDRESS
        for key, storage in self._storages.items():
            self._starts[key] = at
            at += (storage.nbytes() // 256 + 2) * 256
        self.data = np.zeros(at, np.uint8)
        for key, storage in self._storages.items():
            self.data[self._starts[key] :][: storage.nbytes()] = _bytes_of(storage).numpy()

    def address(self, tensor: torch.Tensor) -> int:
        """Where a tensor begins; empty ones begin nowhere."""
        if not tensor.numel():
            return 0
        return self._starts[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.element_size()

    def give_back(self) -> None:
        """Copy everything back into the tensors."""
        for key, storage in self._storages.items():
            _bytes_of(storage).copy_(torch.from_numpy(self.data[self._starts[key] :][: storage.nbytes()].copy()))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))


class Code:
    """The statements ``(guard, instruction, operands)`` of a kernel, its labels and parameters."""

    def __init__(self, text: str) -> None:
        entry = re.sub(r"//[^\n]*", "", text)
        entry = entry[entry.index(".entry") :]
        self.parameters = list(dict.fromkeys(re.findall(r"\w+_param_\d+", entry[: entry.index("{")])))
        body = re.sub(r"\.(loc|file|pragma|section)[^\n]*", "", entry[entry.index("{") :])
        self.statements: list[tuple[str, str, list[str]]] = []
        self.labels: dict[str, int] = {}
        for statement in body.split(";"):
            rest = statement.lstrip("{} \n\t")
            while label := re.match(r"(\$?[\w$]+):\s*", rest):
                self.labels[label[1]] = len(self.statements)
                rest = rest[label.end() :].lstrip("{} \n\t")
            if found := re.match(r"(@\S+\s+)?([a-z]\S*)\s*(.*)", rest, re.DOTALL):
                # Commas within brackets do not part operands.
                operands = [one.strip() for one in re.split(r",(?![^{\[]*[}\]])", found[3])] if found[3].strip() else []
                self.statements.append(((found[1] or "").strip(), found[2], operands))


class Block:
    """One block of threads of a grid."""

    def __init__(
        self, code: Code, threads: int, memory: Memory, parameters: dict[str, int], place: Sequence[int], grid: Sequence[int]
    ) -> None:
        self.code, self.threads, self.memory, self.parameters = code, threads, memory, parameters
        number = np.arange(threads, dtype=np.uint64)
        self.registers: dict[str, Register] = {"%tid.x": number, "%laneid": number % 32, "global_smem": number * 0}
        for axis, index, size in zip("xyz", place, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(threads, index, np.uint64)
            self.registers[f"%nctaid.{axis}"] = np.full(threads, size, np.uint64)
        self.shared = np.zeros(SHARED_BYTES, np.uint8)

    def run(self) -> None:
        """All statements, from the first to ``ret``."""
        at = 0
        while True:
            guard, instruction, operands = self.code.statements[at]
            mask = np.ones(self.threads, bool)
            if guard:
                mask = self.value(guard.lstrip("@!")).astype(bool) ^ guard.startswith("@!")
            at += 1
            if instruction == "ret":
                return
            if instruction.startswith("bra"):
                assert mask.all() or not mask.any(), "a branch that threads take differently"
                at = self.code.labels[operands[0]] if mask.all() else at
            else:
                self.step(instruction.split("."), operands, mask)

    def value(self, name: str) -> Register:
        """A register, or a number in each thread; registers that nobody wrote hold zeros."""
        if name in self.registers:
            return self.registers[name]
        if name.startswith("0f"):
            return np.full(self.threads, int(name[2:], 16), np.uint64)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", name):
            return np.full(self.threads, int(name.rstrip("U"), 0) & (2**64 - 1), np.uint64)
        assert name.startswith("%"), name
        return np.zeros(self.threads, np.uint64)

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        """Set a register where ``mask`` is true."""
        if name != "_":
            self.registers[name] = value if mask.all() else np.where(mask, value, self.registers.get(name, value * 0))

    def step(self, parts: list[str], operands: list[str], mask: np.ndarray) -> None:
        """One instruction."""
        name, kind = parts[0], parts[-1]
        special: dict[str, Callable] = {
            "ld": self._load, "st": self._store, "cp": self._copy, "ldmatrix": self._load_matrices, "mma": self._multiply,
            "mov": self._move,
        }  # fmt: skip
        if name == "bar":
            return
        if name in special:
            special[name](parts, operands, mask)
            return
        inputs = [self.value(one) for one in operands[1:]]
        if name == "cvt":
            out = convert(parts, inputs)
        elif name == "shfl":
            lanes, other = np.arange(self.threads), inputs[1].astype(np.int64)
            out = inputs[0][lanes // 32 * 32 + {"bfly": lanes % 32 ^ other, "idx": other & 31}[parts[2]]]
        elif name == "setp":
            out = compare(parts[1], kind, *inputs)
        elif name == "selp":
            out = np.where(inputs[2].astype(bool), inputs[0], inputs[1])
        elif kind == "pred":
            out = LOGIC[name](*(one.astype(bool) for one in inputs))
        elif name == "prmt":
            out = permute(*inputs)
        elif kind in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
            out = floats(name, kind, inputs)
        else:
            out = integers(name, parts, kind, inputs)
        self.write(operands[0], out, mask)

    def _address(self, operand: str) -> np.ndarray:
        name, _, offset = operand[1:-1].partition("+")
        return self.value(name.strip()).astype(np.int64) + int(offset or 0)

    def _load(self, parts: list[str], operands: list[str], mask: np.ndarray) -> None:
        if parts[1] == "param":
            value = self.parameters[operands[1][1:-1]] & (2**64 - 1)
            return self.write(operands[0], np.full(self.threads, value, np.uint64), mask)
        space = self.memory.data if "global" in parts else self.shared
        size, at = width(parts[-1]) // 8, self._address(operands[1])[mask]
        for number, name in enumerate(names(operands[0])):
            raw = np.zeros((len(at), 8), np.uint8)
            raw[:, :size] = space[at[:, None] + number * size + np.arange(size)]
            out = np.zeros(self.threads, np.uint64)
            out[mask] = raw.view(np.uint64)[:, 0]
            self.write(name, extended(out, 8 * size) if parts[-1][0] == "s" else out, mask)
        return None

    def _store(self, parts: list[str], operands: list[str], mask: np.ndarray) -> None:
        space = self.memory.data if "global" in parts else self.shared
        size, at = width(parts[-1]) // 8, self._address(operands[0])[mask]
        for number, name in enumerate(names(operands[1])):
            raw = self.value(name)[mask].astype(np.uint64)[:, None].view(np.uint8).reshape(-1, 8)
            space[at[:, None] + number * size + np.arange(size)] = raw[:, :size]

    def _copy(self, parts: list[str], operands: list[str], mask: np.ndarray) -> None:
        """``cp.async``, done at once; what exceeds the size of the source becomes zero."""
        if parts[2] in ("commit_group", "wait_group", "wait_all"):
            return
        goal, source, size = self._address(operands[0]), self._address(operands[1]), int(operands[2], 0)
        real = self.value(operands[3]) if len(operands) > 3 else np.full(self.threads, size)
        for thread in np.flatnonzero(mask):
            count = int(real[thread])
            self.shared[goal[thread] :][:size] = 0
            self.shared[goal[thread] :][:count] = self.memory.data[source[thread] :][:count]

    def _move(self, parts: list[str], operands: list[str], mask: np.ndarray) -> None:
        """``mov``, which also joins registers to a wider one and parts it."""
        whole, parted = width(parts[-1]) or 64, names(operands[1])
        if operands[0].startswith("{"):
            value, goals = self.value(operands[1]), names(operands[0])
            each = whole // len(goals)
            for number, name in enumerate(goals):
                self.write(name, low(value >> np.uint64(number * each), each), mask)
        elif operands[1].startswith("{"):
            each = whole // len(parted)
            shifted = [low(self.value(name), each) << np.uint64(number * each) for number, name in enumerate(parted)]
            self.write(operands[0], np.bitwise_or.reduce(shifted), mask)
        else:
            self.write(operands[0], self.value(operands[1]), mask)

    def _load_matrices(self, parts: list[str], operands: list[str], mask: np.ndarray) -> None:
        """``ldmatrix``: eight rows of eight 16-bit numbers each, two neighbours to a thread."""
        lane = np.arange(32)
        at = self._address(operands[1])
        for number, name in enumerate(names(operands[0])):
            out = np.zeros(self.threads, np.uint64)
            for warp in range(0, self.threads, 32):
                rows = at[warp + 8 * number : warp + 8 * number + 8]
                matrix = self.shared[rows[:, None] + np.arange(16)].view(np.uint16).astype(np.uint64)
                matrix = matrix.T if "trans" in parts else matrix
                row, column = lane // 4, lane % 4 * 2
                out[warp : warp + 32] = matrix[row, column] | matrix[row, column + 1] << np.uint64(16)
            self.write(name, out, mask)

    def _multiply(self, parts: list[str], operands: list[str], mask: np.ndarray) -> None:
        """``mma.sync.m16n8k16``: 16-bit floats, sums in float32."""
        assert "m16n8k16" in parts and parts[-1] == parts[-4] == "f32", parts
        kind, lane = parts[-2], np.arange(32)
        row, pair = lane // 4, lane % 4 * 2
        goals, *sources = map(names, operands)
        a, b, c = ([self.value(name) for name in source] for source in sources)
        outs = [np.zeros(self.threads, np.uint64) for _ in goals]
        for warp in range(0, self.threads, 32):
            here = slice(warp, warp + 32)
            left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
            for half in range(2):
                for n in range(4):
                    left[row + 8 * (n % 2), pair + 8 * (n // 2) + half] = half_float(
                        a[n][here] >> np.uint64(16 * half), kind
                    )
                for n in range(2):
                    right[pair + 8 * n + half, row] = half_float(b[n][here] >> np.uint64(16 * half), kind)
                    total[row + 8 * n, pair + half] = single(c[2 * n + half][here])
            product = left @ right + total
            for n, out in enumerate(outs):
                out[here] = raw_single(product[row + 8 * (n // 2), pair + n % 2])
        for name, out in zip(goals, outs, strict=True):
            self.write(name, out, mask)


def names(operand: str) -> list[str]:
    """Registers of an operand, one or several in braces."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def width(kind: str) -> int:
    """Bits of a type such as ``b32``; 0 of a predicate."""
    return int(re.sub(r"\D", "", kind) or 0)


def low(x: Register, bits: int) -> Register:
    """The low bits alone."""
    return x & np.uint64(2**bits - 1)


def extended(x: Register, bits: int) -> Register:
    """The low bits, with their sign in all bits above."""
    top = np.int64(1) << np.int64(bits - 1)
    return ((low(x, bits).view(np.int64) ^ top) - top).view(np.uint64) if bits < 64 else x


def signed(x: Register, bits: int) -> np.ndarray:
    """Int64 of the low bits."""
    return extended(x, bits).view(np.int64)


def single(x: Register) -> np.ndarray:
    """Float32 as float64."""
    return x.astype(np.uint32).view(np.float32).astype(np.float64)


def raw_single(x: np.ndarray) -> Register:
    """Float64 rounded to float32."""
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(np.float32).view(np.uint32).astype(np.uint64)


def half_float(x: Register, kind: str) -> np.ndarray:
    """``f16`` or ``bf16`` in the low bits as float64."""
    bits = low(x, 16).astype(np.uint16)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def raw_half(x: np.ndarray, kind: str) -> Register:
    """Float64 rounded to ``f16`` or ``bf16``."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    return torch.from_numpy(np.array(x, np.float64)).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint64)


LOGIC: dict[str, Callable] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
FLOATS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": lambda a, b, c: a * b + c, "max": np.fmax, "min": np.fmin,
    "neg": np.negative, "abs": np.abs, "div": np.divide, "ex2": np.exp2,
}  # fmt: skip


def floats(name: str, kind: str, inputs: Sequence[Register]) -> Register:
    """Arithmetic of numbers, or of pairs of 16-bit ones, rounded once."""
    with np.errstate(all="ignore"):
        if kind == "f32":
            return raw_single(FLOATS[name](*map(single, inputs)))
        pair, kind = kind.endswith("x2"), kind.removesuffix("x2")
        out = raw_half(FLOATS[name](*(half_float(x, kind) for x in inputs)), kind)
        if pair:
            above = raw_half(FLOATS[name](*(half_float(x >> np.uint64(16), kind) for x in inputs)), kind)
            out = out | above << np.uint64(16)
        return out


def integers(name: str, parts: list[str], kind: str, inputs: Sequence[Register]) -> Register:
    """Arithmetic of whole numbers and bits."""
    bits, minus = width(kind), kind[0] == "s"
    narrow = [low(x, bits) for x in inputs]
    numbers = [signed(x, bits) if minus else x.view(np.int64) for x in narrow]
    if name in ("mul", "mad"):
        product = numbers[0] * numbers[1]
        goal = 2 * bits if "wide" in parts else bits
        return low((product + (inputs[2].view(np.int64) if name == "mad" else 0)).view(np.uint64), goal)
    if name == "shl":
        return low(narrow[0] << np.minimum(low(inputs[1], 32), np.uint64(63)), bits)
    if name == "shr":
        return low((numbers[0] >> np.minimum(low(inputs[1], 32), np.uint64(63)).astype(np.int64)).view(np.uint64), bits)
    if name == "bfe":
        field = narrow[0] >> inputs[1] & (np.uint64(1) << inputs[2]) - np.uint64(1)
        top = np.int64(1) << (inputs[2].astype(np.int64) - 1)
        return low(((field.view(np.int64) ^ top) - top).view(np.uint64), bits) if minus else field
    if name in ("div", "rem"):
        quotient = np.trunc(numbers[0] / numbers[1]).astype(np.int64)
        return low((quotient if name == "div" else numbers[0] - quotient * numbers[1]).view(np.uint64), bits)
    plain: dict[str, Callable] = {
        "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "not": np.invert, "neg": np.negative, "min": np.minimum, "max": np.maximum,
    }  # fmt: skip
    return low(plain[name](*numbers).view(np.uint64), bits)


def convert(parts: list[str], inputs: Sequence[Register]) -> Register:
    """``cvt``."""
    goal, source = [part for part in parts if re.fullmatch(r"b?f16x2|b?f16|f32|[us]\d+", part)][:2]
    if goal.endswith("x2"):
        kind = goal.removesuffix("x2")
        return raw_half(single(inputs[1]), kind) | raw_half(single(inputs[0]), kind) << np.uint64(16)
    x: np.ndarray = inputs[0]
    if source in ("f16", "bf16"):
        x = half_float(x, source)
    elif source == "f32":
        x = single(x)
    else:
        x = signed(x, width(source)) if source[0] == "s" else low(x, width(source)).view(np.int64)
    if goal in ("f16", "bf16"):
        return raw_half(x, goal)
    if goal == "f32":
        return raw_single(x)
    if x.dtype == np.float64:
        x = next(WHOLE[part] for part in parts if part in WHOLE)(x).astype(np.int64)
    # Cut off, then extended to the width of the register.
    return extended(x.view(np.uint64), width(goal)) if goal[0] == "s" else low(x.view(np.uint64), width(goal))


WHOLE: dict[str, Callable] = {
    "rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil
}  # fmt: skip


def compare(how: str, kind: str, a: Register, b: Register) -> np.ndarray:
    """``setp``."""
    if kind[0] == "f":
        x, y = single(a), single(b)
    elif kind[0] == "s":
        x, y = signed(a, width(kind)), signed(b, width(kind))
    else:
        x, y = low(a, width(kind)), low(b, width(kind))
    operations = {
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "eq": np.equal,
        "ne": np.not_equal,
    }
    return operations[how](x, y)


def permute(a: Register, b: Register, selector: Register) -> Register:
    """``prmt``: bytes of the pair by the nibbles of the selector, whose top bit asks for the sign instead."""
    raw = np.concatenate([x.astype(np.uint32)[:, None].view(np.uint8).reshape(-1, 4) for x in (a, b)], 1)
    out = np.zeros(len(a), np.uint64)
    for place in range(4):
        nibble = (selector >> np.uint64(4 * place) & np.uint64(15)).astype(np.int64)
        byte = raw[np.arange(len(a)), nibble & 7]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        out |= byte.astype(np.uint64) << np.uint64(8 * place)
    return out
