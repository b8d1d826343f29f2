"""Every kernel against the torch path: each instruction set of this processor, and Triton (its interpreter, or a GPU)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import chain, product
from types import SimpleNamespace

import pytest
import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import cpu_library, packed_cache, triton_cache
from hf_lowbit.kv import kernel, reading
from hf_lowbit.kv.attend import attend

# In Triton's interpreter, or as compiled by an emulator (test_triton_emulated.py).
ON_CPU = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("EMULATE_PTX") == "1"
CPU = torch.device("cpu")
needs_cpu = pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (ON_CPU or torch.cuda.is_available()),
    reason="needs Triton, and its interpreter (TRITON_INTERPRET=1) or a GPU",
)
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


# What multiplying in 16 bits costs, those of the rows or else fp16.
ROUNDED = {torch.float32: 0.002, torch.float16: 0.002, torch.bfloat16: 0.008}
HEADS = [(64, 4, torch.float32), (16, 1, torch.bfloat16), (96, 3, torch.float16)]


def cases():
    """Every kernel, kind of cache and heads; most of what takes Triton's interpreter seconds is slow."""
    marks = {name: needs_cpu for name in cpu_library.instruction_sets()} | {"triton": needs_triton}
    for (name, needed), kwargs, head in product(marks.items(), KINDS, HEADS):
        long = name == "triton" and (head[0] > 16) != (kwargs is KINDS[3])
        yield pytest.param(name, kwargs, *head, marks=[needed, *[pytest.mark.slow] * long], id=f"{name}-{kwargs}-{head[0]}")


@pytest.fixture
def served(request, monkeypatch):
    """Attention by one kernel: the device it runs on, how far it may be off, whether there is time for every mask."""
    if request.param == "triton":
        monkeypatch.setitem(kernel.KERNELS, "cpu", triton_cache)
        monkeypatch.setattr(triton_cache, "trouble", lambda device, dim: packed_cache.unfit(dim, triton_cache.MOST_DIM))
        device = CPU if ON_CPU else torch.device("cuda")
        thorough = not ON_CPU or request.node.get_closest_marker("slow") is not None
        yield SimpleNamespace(device=device, off=ROUNDED, thorough=thorough)
        return
    library = cpu_library.library()
    before = library.lowbit_isa()
    library.lowbit_set_isa(request.param.encode())
    # Queries rounded to int8.
    yield SimpleNamespace(device=CPU, off=dict.fromkeys(ROUNDED, 0.015), thorough=True)
    library.lowbit_set_isa(before)


@pytest.mark.parametrize(("served", "kwargs", "dim", "group", "dtype"), cases(), indirect=["served"])
def test_parity(served, kwargs, dim, group, dtype, filled, module):
    layer, queries, keys, values = filled(module, dim=dim, group=group, dtype=dtype, device=served.device, **kwargs)
    assert kernel.refusal(layer.held) is None
    seen = torch.ones(2, 1, 5, 305, dtype=torch.bool, device=served.device).tril(300)
    seen[1, ..., :9] = False
    added = torch.randn(seen.shape).to(served.device).div(4).masked_fill(~seen, -torch.inf)
    for tokens, mask in ((1, None), (5, None), (5, seen), (5, added))[:: 1 if served.thorough else 3]:
        at = layer.length
        layer.update(keys[:, :, at : at + tokens], values[:, :, at : at + tokens])
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (layer.length - 305, 0), value=True if mask.dtype == torch.bool else 0.0)
        asked = (queries[:, :, at : at + tokens].float() / 8).unflatten(1, (2, -1))
        out, weights = kernel.attend(layer.held, asked, mask, 0.25)
        found = attend(asked, chain(layer.held.rows(), layer.held.packed()), mask, 0.25, layer.held.frame, layer.length)
        out, true = (layer.center.seen(x) for x in (out, found.out.permute(0, 3, 1, 2, 4).flatten(2, 3)))
        assert (out - true).norm() < served.off[dtype] * true.norm()
        if layer.held.tiers:
            rows = reading.row_weights(asked, layer.held.rows(), found.normalizer, mask, 0.25, layer.length)
            assert (weights - rows).abs().max() < served.off[dtype]


@needs_cpu
def test_threads_change_nothing(filled, module):
    layer, queries, *_ = filled(module, dim=64, group=4, tokens=1500)
    asked = queries[:, :, :4].unflatten(1, (2, -1))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(kernel.attend(layer.held, asked, None, 0.25))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@needs_triton
@pytest.mark.parametrize("served", ["triton"], indirect=True)
def test_a_sequence_shared_among_programs(served, filled, module, monkeypatch):
    from hf_lowbit.kernels import triton_cache_launch

    layer, queries, *_ = filled(module, dim=16, tokens=330, batch=1, device=served.device)
    asked = queries[:, :, :1].unflatten(1, (2, -1))
    found = []
    for multiprocessors in (1, 12, 12):
        monkeypatch.setattr(triton_cache_launch, "device_of", lambda index, count=multiprocessors: ("", count, False))
        found.append(kernel.attend(layer.held, asked, None, 0.25))
    # Programs for 24 wanted and 2 there, two pieces worth one.
    assert triton_cache_launch.splits(5, 2, 12) == (2, 3)
    assert (found[0][0] - found[1][0]).norm() < 1e-3 * found[0][0].norm()
    assert torch.equal(found[1][0], found[2][0]) and torch.equal(found[1][1], found[2][1])


@needs_triton
@pytest.mark.parametrize("served", ["triton"], indirect=True)
def test_a_query_that_sees_nothing_gives_zeros(served, filled, module):
    layer, queries, *_ = filled(module, dim=16, device=served.device)
    asked = queries[:, :, :1].unflatten(1, (2, -1))
    mask = torch.ones(2, 1, 1, layer.length, dtype=torch.bool, device=served.device)
    mask[0] = False
    out, weights = kernel.attend(layer.held, asked, mask, 0.25)
    assert not out[0].any() and not weights[0].any() and out[1].any()


@needs_cpu
def test_the_op_traces(filled, module):
    layer, queries, *_ = filled(module)
    asked = queries[:, :, :1].unflatten(1, (2, -1))
    out, weights = kernel.attend(layer.held, asked, None, 0.25)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_out, fake_weights = kernel.attend(layer.held, asked, None, 0.25)
    assert (fake_out.shape, fake_weights.shape) == (out.shape, weights.shape)


def test_refusals_are_said(filled, module):
    layer, *_ = filled(module, hadamard=True)
    assert kernel.refusal(layer.held) == "hadamard=True"
    layer.held.device = torch.device("xpu")
    assert kernel.refusal(layer.held) == "the cache is on xpu"
    layer.held.settings = layer.settings.__class__()
    layer.held.device = torch.device("cuda")
    assert torch.cuda.is_available() or kernel.refusal(layer.held) in (
        "torch finds no CUDA device",
        "Triton is not installed (`pip install triton`)",
    )


@needs_cpu
def test_heads_no_kernel_knows_are_said(filled, module):
    layer, *_ = filled(module, dim=24)
    assert "heads of 24 numbers, not a multiple of 16 up to 1024" in kernel.refusal(layer.held)


def test_parts_that_do_not_fit_are_refused():
    half = torch.zeros(1, 2, 8, 16).half()
    rows = packed_cache.Rows(half, half, None, None, None, 5, 0, False)
    codes, scale = torch.zeros(1, 2, 1, 8 * 16 * 2, dtype=torch.uint8), torch.zeros(1, 2, 1, 16).half()
    both = [codes, scale, scale, codes, scale, scale, torch.zeros(1, 2, 1, 64, dtype=torch.int16), scale, scale]
    blocks = packed_cache.Blocks(*both, 2, 2, True, True)
    queries = torch.zeros(1, 4, 1, 16)
    tensors, layout = packed_cache.flatten(packed_cache.Parts(2, 69, (rows,), (blocks,)))
    found = packed_cache.parse(queries, queries, tensors, layout)
    assert found.asked == 5 and found.rows[0].keys is half and found.blocks[0].key_bits == 2
    misfit = "tensors that do not fit its layout."
    for words, *change in (
        (misfit, queries, tensors[:-1], layout),
        (misfit, queries, [*tensors, half], layout),
        (misfit, queries.half(), tensors, layout),
        (misfit, queries[:, :3], tensors, layout),
        (r"rows \[1, 2, 8, 16\] do not fit 1 sequences of 2 heads of 32", torch.zeros(1, 4, 1, 32), tensors, layout),
        (r"rows \[1, 2, 8, 16\]", queries, tensors, [*layout[:4], 9, *layout[5:]]),
        ("do not fit heads of 16 numbers of 3 bits", queries, tensors, [*layout[:8], 3, *layout[9:]]),
    ):
        with pytest.raises(BadRequest, match=words):
            packed_cache.parse(change[0], *change)
    with pytest.raises(BadRequest, match="the queries are on cpu, a part of the cache on meta"):
        triton_cache._attend(queries, queries, [half.to("meta"), *tensors[1:]], layout, None, 1.0, False)
