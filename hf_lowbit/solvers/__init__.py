"""Solvers: a weight matrix and a spec in, a ``LowBitTensor`` out. One file a method; importing it registers it."""

from hf_lowbit.solvers import (
    codebook,
    fixed_table,
    gptq,
    gumbel,
    halfquad,
    jlcm,
    nupes,
    powerquant,
    rtn,
    signround,
    squeezellm,
    ternary,
)
from hf_lowbit.solvers.reconstruct import LEARN_OPTIONS, Matrix, reconstruct
from hf_lowbit.solvers.registry import SOLVERS, Solver, get_solver, without_data
from hf_lowbit.solvers.solve import solve
from hf_lowbit.solvers.statistics import Statistics

__all__ = [
    "LEARN_OPTIONS",
    "SOLVERS",
    "Matrix",
    "Solver",
    "Statistics",
    "codebook",
    "fixed_table",
    "get_solver",
    "gptq",
    "gumbel",
    "halfquad",
    "jlcm",
    "nupes",
    "powerquant",
    "reconstruct",
    "rtn",
    "signround",
    "solve",
    "squeezellm",
    "ternary",
    "without_data",
]
