"""Laws of the layer: nothing lost, any order, crop without trace, exact column sums, errors that fall with the share."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.kernels.packed_cache import BLOCK
from hf_lowbit.kv import blocks, importance
from hf_lowbit.kv.attend import Segment, attend
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.settings import CacheSettings
from hf_lowbit.kv.tiers import Frame

SETTINGS = [
    {},
    {"low_bits": 3, "key_format": "token", "value_format": "channel"},
    {"high_bits": 16, "low_bits": 8},
    {"tiers": ((4, 0.3), (2, 0.4))},
    {"important": 1.0},
    {"recent_bits": 8, "hadamard": True, "center": True},
    {"low_bits": (3, 2), "levels": "nf", "key_format": "token", "group": 16},
]


def step(layer, module, queries, keys, values, tokens, mask=None):
    at = layer.length
    layer.update(keys[:, :, at : at + tokens], values[:, :, at : at + tokens])
    return layer.attend(queries[:, :, at : at + tokens], mask, 0.25, module, None)


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_every_token_is_there_once_and_in_its_place(filled, module, kwargs):
    layer, queries, keys, values = filled(module, **kwargs)
    for _ in range(40):
        step(layer, module, queries, keys, values, 1)
    assert layer.length == 340 == layer.held.older + layer.held.recent.length
    where = torch.cat([layer.held.positions(part) for part in (layer.held.kept, layer.held.recent) if part.length]
                      + [p for tier in layer.held.tiers for *_, p in tier.slabs(1024)], 2)  # fmt: skip
    assert torch.equal(where.sort(2).values, torch.arange(340).expand_as(where))
    found = layer.dense()
    for ours, true in zip(found, (keys, values), strict=True):
        error = (ours - true[:, :, :340]).norm() / true.norm()
        assert error < (0.01 if layer.settings.high_bits == 8 and not layer.held.tiers else 0.5)
        assert torch.allclose(ours[:, :, -16:], true[:, :, 324:340], rtol=0.01, atol=0.1)


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_what_is_packed_is_never_packed_again(filled, module, kwargs):
    layer, queries, keys, values = filled(module, **kwargs)
    before = [{name: tensor.clone() for name, tensor in tier.tensors.items()} for tier in layer.held.tiers if tier.length]
    counts = [tier.length for tier in layer.held.tiers]
    for _ in range(64):
        step(layer, module, queries, keys, values, 1)
    assert all(tier.length >= count for tier, count in zip(layer.held.tiers, counts, strict=True))
    for tier, tensors in zip(layer.held.tiers, before, strict=False):
        for name, tensor in tensors.items():
            assert torch.equal(tier.tensors[name][:, :, : tensor.shape[2]], tensor) or hasattr(tier, "store")


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 8), st.integers(0, 7), st.booleans())
def test_crop_and_regrow_leave_no_trace(filled, module, drafted, kept, plain):
    kept = min(kept, drafted - 1)
    ours, queries, keys, values = filled(module)
    other, *_ = filled(module)
    other_keys = keys.flip(1) if plain else keys * 2
    at = ours.length
    ours.update(torch.cat([keys[:, :, at : at + kept], other_keys[:, :, at + kept : at + drafted]], 2),
                values[:, :, at : at + drafted])  # fmt: skip
    ours.attend(queries[:, :, at : at + drafted], None, 0.25, module, None)
    ours.crop(kept - drafted)
    if kept:
        step(other, module, queries, keys, values, kept)
    for tokens in (1, 3, 8, 1):
        a, b = (step(layer, module, queries, keys, values, tokens) for layer in (ours, other))
        assert torch.allclose(a, b, atol=1e-5)
    positions, scores = (
        [layer.held.kept.tensors[name][:, :, : layer.held.kept.length] for layer in (ours, other)]
        for name in ("position", "score")
    )
    assert torch.equal(*positions)
    assert torch.allclose(*scores, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_slots_is_of_no_account(seed):
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, 2, 2, 3, 8, generator=draw)
    keys, values = (torch.randn(1, 2, 50, 8, generator=draw) for _ in range(2))
    mask = torch.rand(1, 1, 3, 50, generator=draw) < 0.7
    places = torch.arange(50).expand(1, 2, 50)
    order = torch.randperm(50, generator=draw)
    whole = attend(queries, [Segment(keys, values, places)], mask, 0.3, Frame(), 50)
    parts = [Segment(keys[:, :, part], values[:, :, part], places[:, :, part]) for part in order.split(13)]
    mixed = attend(queries, parts, mask, 0.3, Frame(), 50)
    assert torch.allclose(whole.out, mixed.out, atol=1e-5)
    plain = torch.nn.functional.scaled_dot_product_attention(
        queries.flatten(1, 2), keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), mask, scale=0.3
    )
    assert torch.allclose(whole.out.flatten(1, 2), plain, atol=1e-5)


def test_column_sums_are_those_of_eager_attention():
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 2, 3, 70, 8, generator=draw), torch.randn(2, 2, 70, 8, generator=draw)
    causal = torch.ones(70, 70, dtype=torch.bool).tril()
    padded = causal.repeat(2, 1, 1, 1)
    padded[1, :, :, :9] = False
    for mask, seen in ((None, causal), (padded, padded[:, :, None])):
        scores = (queries @ keys[:, :, None].transpose(-1, -2)) * 0.3
        eager = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
        whole = importance.column_sums(queries, keys, mask, 0.3, range(70))
        assert torch.allclose(whole, eager.mean(2).sum(2), atol=1e-5)
        faded = importance.column_sums(queries, keys, mask, 0.3, range(70), 0.9)
        fade = 0.9 ** torch.arange(69.0, -1, -1)[:, None]
        assert torch.allclose(faded, (eager.mean(2) * fade).sum(2), atol=1e-5)
        strided = importance.column_sums(queries, keys, mask, 0.3, range(1, 70, 4))
        assert torch.allclose(strided, eager.mean(2)[:, :, 1::4].sum(2), atol=1e-5)


def test_how_many_queries_saw_a_position():
    ranges = [range(3, 100, 7), range(100, 130), range(140, 141)]
    seen = [sum(query >= place for found in ranges for query in found) for place in range(150)]
    assert importance.counts(torch.arange(150), ranges).tolist() == seen
    faded = [sum(0.9 ** (140 - query) for found in ranges for query in found if query >= place) for place in range(150)]
    assert torch.allclose(importance.counts(torch.arange(150), ranges, 0.9), torch.tensor(faded), rtol=1e-4, atol=1e-5)


def test_no_share_at_all_is_plain_rounding(filled, module):
    layer, _, _, values = filled(module, tokens=320, important=0.0, sinks=0, recent=0)
    (tier,) = layer.held.tiers
    assert tier.length == 256 and layer.held.kept.length == 64
    left = values[:, :, :320] - layer.center.values
    coded = blocks.encode(left.unflatten(2, (-1, BLOCK)), 2, "affine", False, 32, "range")
    plain = blocks.decode(coded, 2, "affine", False).flatten(2, 3) + layer.center.values
    where = tier.tensors["position"].flatten(2).long()[..., None].expand(-1, -1, -1, 32)
    assert torch.allclose(layer.dense()[1].gather(2, where), plain.gather(2, where), atol=1e-5)


def test_what_all_tokens_have_in_common_costs_nothing(module):
    draw = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, 2, 151, 32, generator=draw) for _ in range(3))
    outs = []
    for move in (torch.zeros(32), torch.linspace(-50, 50, 32)):
        layer = LowBitLayer(CacheSettings(low_bits=2, important=0.2, recent=16))
        for part in (slice(0, 150), slice(150, 151)):
            layer.update(keys[:, :, part] + move, values[:, :, part] - move)
            out = layer.attend(queries[:, :, part], None, 0.25, module, lambda k, v: torch.zeros(1))
        outs.append(out + move)
        assert layer.held.tiers[0].length and torch.allclose(
            layer.dense()[1][:, :, -8:] + move, values[:, :, -8:], atol=0.01
        )
    assert torch.allclose(*outs, atol=0.02)


def test_older_queries_count_less(filled, module):
    layer, queries, keys, values = filled(module, decay=0.5)
    before = layer.held.kept.tensors["score"][:, :, : layer.held.kept.length].clone()
    step(layer, module, queries, keys, values, 2)
    given = layer.held.pending[..., : layer.held.kept.length]
    layer.store_pending()
    after = layer.held.kept.tensors["score"][:, :, : layer.held.kept.length]
    assert torch.allclose(after, before / 4 + given[:, :, 0] / 2 + given[:, :, 1], atol=1e-6)


def test_queries_that_are_counted():
    assert importance.observed(100, CacheSettings()) == range(100)
    sample = importance.observed(4000, CacheSettings())
    assert 200 < len(sample) <= 256 and sample[-1] == 3999
    assert importance.observed(20000, CacheSettings()) == range(19936, 20000)
    assert not importance.observed(100, CacheSettings(importance="keys"))


def test_error_falls_as_the_share_of_important_tokens_grows(filled, module):
    errors = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        layer, queries, keys, values = filled(module, important=share, sinks=0, tokens=400)
        out = step(layer, module, queries, keys, values, 1)
        true = torch.nn.functional.scaled_dot_product_attention(
            queries[:, :, 400:401], *(x[:, :, :401].repeat_interleave(2, 1) for x in (keys, values)), scale=0.25
        )
        errors.append(float((out.transpose(1, 2) - true).norm() / true.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 < errors[0]


def test_the_most_attended_tokens_are_kept(filled, module):
    layer, queries, keys, _ = filled(module, batch=1, tokens=400, sinks=0)
    scores = importance.column_sums(queries[:, :, :400].unflatten(1, (2, -1)), keys[:, :, :400], None, 0.25, range(400))
    mean = scores / torch.arange(400, 0, -1)
    kept = layer.held.kept.tensors["position"][:, :, : layer.held.kept.length].long()
    low = layer.held.tiers[0].tensors["position"].flatten(2).long()
    heavy = kept[..., :-16]  # without the pinned ones
    assert mean.gather(2, heavy).mean() > 2 * mean.gather(2, low).mean()


def test_padding_goes_first_and_counts_for_nothing(filled, module):
    mask = torch.ones(2, 1, 300, 300, dtype=torch.bool).tril()
    mask[1, :, :, :40] = False
    layer, queries, keys, values = filled(module, mask=mask)
    low = layer.held.tiers[0].tensors["position"].flatten(2)
    assert all(set(range(40)) <= set(low[1, head].tolist()) for head in range(2))
    assert {40, 41, 42, 43} <= set(layer.held.kept.tensors["position"][1, 0].tolist())
    wide = torch.ones(2, 1, 1, 301, dtype=torch.bool)
    wide[1, ..., :40] = False
    out = step(layer, module, queries, keys, values, 1, wide)
    layer.held.tiers[0].tensors["value_offset"][1, :, :, :] = 0  # the padding's values may be anything
    held = layer.held
    segments = chain(held.rows(), held.packed())
    seen = attend(queries[:, :, 300:301].unflatten(1, (2, -1)), segments, wide, 0.25, held.frame, 301)
    assert torch.isfinite(out).all() and torch.isfinite(seen.out).all()


def test_beams_are_caches_of_their_own(filled, module):
    layer, queries, keys, values = filled(module)
    step(layer, module, queries, keys, values, 1)
    order = torch.tensor([1, 1, 0])
    alone, *_ = filled(module)
    step(alone, module, queries, keys, values, 1)
    layer.reorder_cache(order)
    for tokens in (1, 5, 1):
        at = layer.length
        a = step(layer, module, *(x[order] for x in (queries, keys, values)), tokens)
        b = step(alone, module, queries, keys, values, tokens)
        assert torch.allclose(a, b[order], atol=1e-6), at
    layer.batch_select_indices(torch.tensor([2]))
    layer.batch_repeat_interleave(2)
    assert layer.shape[0] == 2
    a = step(layer, module, *(x[[0, 0]] for x in (queries, keys, values)), 1)
    assert torch.allclose(a, step(alone, module, queries, keys, values, 1)[[0, 0]], atol=1e-6)
