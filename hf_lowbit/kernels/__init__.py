"""Backends: how a low-bit matrix is multiplied. The reference one defines correctness."""

from hf_lowbit.kernels import cpu, integer, ops, reference, triton_backend
from hf_lowbit.kernels.select import Backend, Choice, Verdict, backends, register_backend, select

__all__ = [
    "Backend", "Choice", "Verdict", "backends", "cpu", "integer", "ops", "reference", "register_backend", "select",
    "triton_backend",
]  # fmt: skip
