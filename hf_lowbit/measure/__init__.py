"""Measures of a loaded model; they see logits only."""

from hf_lowbit.measure.divergence import Divergence, divergence
from hf_lowbit.measure.perplexity import Perplexity, perplexity, windows

__all__ = ["Divergence", "Perplexity", "divergence", "perplexity", "windows"]
