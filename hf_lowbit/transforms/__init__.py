"""Transforms: the same function with weights and activations that are easier to quantize. One file a transform."""

from hf_lowbit.transforms import (
    awq,
    gamma_migration,
    hadamard,
    outlier_suppression_plus,
    qllm,
    resq,
    smoothquant,
    token_wise_clipping,
)
from hf_lowbit.transforms.graph import Graph, Site, find_graph
from hf_lowbit.transforms.registry import TRANSFORMS, Bench, Extremes, RangeBench, SiteInputs, Transform, parse_transforms

__all__ = [
    "TRANSFORMS",
    "Bench",
    "Extremes",
    "Graph",
    "RangeBench",
    "Site",
    "SiteInputs",
    "Transform",
    "awq",
    "find_graph",
    "gamma_migration",
    "hadamard",
    "outlier_suppression_plus",
    "parse_transforms",
    "qllm",
    "resq",
    "smoothquant",
    "token_wise_clipping",
]
