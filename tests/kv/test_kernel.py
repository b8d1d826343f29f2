"""The compiled kernel against the torch path, for every instruction set this processor has."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from hf_lowbit.kernels import cpu_library
from hf_lowbit.kv import kernel, reading
from hf_lowbit.kv.attend import attend

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))
KINDS = [
    {},
    {"low_bits": 3},
    {"low_bits": 4, "levels": "nf", "value_format": "channel"},
    {"low_bits": (3, 2), "recent_bits": 8},
    {"high_bits": 16, "low_bits": 8},
    {"key_format": "token", "value_format": "channel", "low_bits": 3},
    {"tiers": ((4, 0.3), (2, 0.4))},
    {"important": 1.0},
]


@pytest.fixture(params=cpu_library.instruction_sets())
def isa(request):
    library = cpu_library.library()
    before = library.lowbit_isa()
    library.lowbit_set_isa(request.param.encode())
    yield request.param
    library.lowbit_set_isa(before)


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
@pytest.mark.parametrize(
    ("dim", "group", "dtype"), [(64, 4, torch.float32), (16, 1, torch.bfloat16), (96, 3, torch.float16)]
)
def test_parity(isa, kwargs, dim, group, dtype, filled, module):
    layer, queries, keys, values = filled(module, dim=dim, group=group, dtype=dtype, **kwargs)
    assert kernel.refusal(layer.held) is None
    seen = torch.ones(2, 1, 5, 305, dtype=torch.bool).tril(300)
    seen[1, ..., :9] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) + torch.randn(5, 305) / 4
    for tokens, mask in ((1, None), (5, None), (5, seen), (5, added)):
        at = layer.length
        layer.update(keys[:, :, at : at + tokens], values[:, :, at : at + tokens])
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (layer.length - 305, 0), value=True if mask.dtype == torch.bool else 0.0)
        # Small queries: what rounding them does is bounded apart.
        asked = (queries[:, :, at : at + tokens].float() / 8).unflatten(1, (2, -1))
        out, weights = kernel.attend(layer.held, asked, mask, 0.25)
        found = attend(asked, chain(layer.held.rows(), layer.held.packed()), mask, 0.25, layer.held.frame, layer.length)
        out, true = (layer.center.seen(x) for x in (out, found.out.permute(0, 3, 1, 2, 4).flatten(2, 3)))
        assert (out - true).norm() < 0.015 * true.norm()
        if layer.held.tiers:
            rows = reading.row_weights(asked, layer.held.rows(), found.normalizer, mask, 0.25, layer.length)
            assert (weights - rows).abs().max() < 0.01


def test_threads_change_nothing(filled, module):
    layer, queries, *_ = filled(module, dim=64, group=4, tokens=1500)
    asked = queries[:, :, :4].unflatten(1, (2, -1))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(kernel.attend(layer.held, asked, None, 0.25))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_the_op_traces(filled, module):
    layer, queries, *_ = filled(module)
    asked = queries[:, :, :1].unflatten(1, (2, -1))
    out, weights = kernel.attend(layer.held, asked, None, 0.25)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_out, fake_weights = kernel.attend(layer.held, asked, None, 0.25)
    assert (fake_out.shape, fake_weights.shape) == (out.shape, weights.shape)


def test_refusals_are_said(filled, module):
    layer, *_ = filled(module, dim=24)
    assert "heads of 24 numbers, not a multiple of 16" in kernel.refusal(layer.held)
    layer, *_ = filled(module, hadamard=True)
    assert kernel.refusal(layer.held) == "hadamard=True"
