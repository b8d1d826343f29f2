"""Matrices as other tools store them: read into records without rounding, and written from records that fit."""

from hf_lowbit.exchange import awq_gemm, bit_stream, gptq, nf4_blocks, pack_quantized
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.reading import READERS, Reader, open_reader

__all__ = ["READERS", "Misfit", "Reader", "awq_gemm", "bit_stream", "gptq", "nf4_blocks", "open_reader", "pack_quantized"]
