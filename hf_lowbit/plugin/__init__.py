"""The Transformers side: registers ``hf_lowbit`` as a quantization method when imported."""

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from hf_lowbit.plugin.config import QUANT_METHOD, LowBitConfig
from hf_lowbit.plugin.explain import Explanation, explain
from hf_lowbit.plugin.modules import LowBitEmbedding, LowBitLinear, LowBitTiedHead
from hf_lowbit.plugin.quantize import quantize
from hf_lowbit.plugin.quantizer import LowBitQuantizer

if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(LowBitConfig)
    register_quantizer(QUANT_METHOD)(LowBitQuantizer)

__all__ = ["Explanation", "LowBitConfig", "LowBitEmbedding", "LowBitLinear", "LowBitTiedHead", "explain", "quantize"]
