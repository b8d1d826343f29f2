"""Solvers: a weight matrix and a spec in, a ``LowBitTensor`` out. One file a method; importing it registers it."""

from hf_lowbit.solvers import codebook, fixed_table, halfquad, powerquant, rtn, ternary
from hf_lowbit.solvers.registry import CALIBRATED, SOLVERS, Solver, get_solver
from hf_lowbit.solvers.solve import solve

__all__ = [
    "CALIBRATED",
    "SOLVERS",
    "Solver",
    "codebook",
    "fixed_table",
    "get_solver",
    "halfquad",
    "powerquant",
    "rtn",
    "solve",
    "ternary",
]
