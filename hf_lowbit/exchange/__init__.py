"""Matrices as other tools store them: read into records without rounding, and written from records that fit."""

from hf_lowbit.exchange import awq_gemm, gguf_blocks, gptq, nf4_blocks, pack_quantized
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.reading import READERS, Reader, open_reader
from hf_lowbit.exchange.writing import TARGETS, Scheme, Target, target_of

__all__ = ["READERS", "TARGETS", "Misfit", "Reader", "Scheme", "Target", "awq_gemm", "gguf_blocks", "gptq", "nf4_blocks"]
__all__ += ["open_reader", "pack_quantized", "target_of"]
