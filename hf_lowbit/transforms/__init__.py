"""Transforms: the same function with weights and activations that are easier to quantize. One file a transform."""
