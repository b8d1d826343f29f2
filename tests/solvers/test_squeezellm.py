"""``squeezellm``: tables per row under the Fisher diagonal, and its dense-and-sparse split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.format import LowBitTensor, Spec, ledger
from hf_lowbit.format.packing import unpack
from hf_lowbit.format.scales import from_f16_bits
from hf_lowbit.solvers import Statistics, solve, squeezellm
from hf_lowbit.solvers.kmeans import weighted_kmeans


def drawn(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and sensitivities that span decades."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random), torch.randn(shape, generator=random).square() ** 2 * 1e-9


def statistics_of(fisher: torch.Tensor) -> list[Statistics]:
    """One entry per matrix, of white inputs."""
    size = fisher.shape[-1]
    plain = Statistics(100, torch.eye(size), torch.zeros(size), torch.ones(size))
    return [replace(plain, sensitivity=each) for each in fisher.view(-1, *fisher.shape[-2:])]


def squeezed(weight: torch.Tensor, fisher: torch.Tensor, **settings: object) -> LowBitTensor:
    spec = Spec(**({"method": "squeezellm", "bits": 3, "group_size": -1} | settings))
    return solve(weight, spec, statistics=statistics_of(fisher))


def loss(weight: torch.Tensor, record: LowBitTensor, fisher: torch.Tensor) -> float:
    return float((fisher.double() * (weight - record.dequantize()).double().square()).mean())


def kept(record: LowBitTensor) -> torch.Tensor:
    """Flat indices of the outliers."""
    starts = record.tensors["outlier_starts"].long()
    rows = torch.repeat_interleave(torch.arange(record.layout.rows), starts.diff())
    return rows * record.layout.in_features + record.tensors["outlier_columns"].long()


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_tables_are_the_clusters_of_the_rows(bits):
    weight, fisher = drawn(12, 160)
    fisher[:, :] = fisher.clamp_max(1e-9)  # the cap of the solver finds nothing to cut
    record = squeezed(weight, fisher, bits=bits)
    levels = from_f16_bits(record.tensors["levels"]) * from_f16_bits(record.tensors["scale"]) * 2.0**record.layout.shift
    assert torch.allclose(levels, weighted_kmeans(weight, fisher, 2**bits), atol=4e-3)
    nearest = (weight[..., None] - levels[:, None]).abs().amin(-1)
    assert torch.allclose((record.dequantize() - weight).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_never_worse_than_grids_and_unweighted_clusters(bits):
    weight, fisher = drawn(16, 256)
    fisher = fisher.clamp_max(float(fisher.quantile(0.99)))
    found = loss(weight, squeezed(weight, fisher, bits=bits), fisher)
    assert found < loss(weight, squeezed(weight, torch.ones_like(fisher), bits=bits), fisher)
    for method, levels in (("rtn", "affine"), ("rtn", "uniform"), ("search", "integer"), ("codebook", "fitted")):
        spec = Spec(method=method, levels=levels, bits=bits, group_size=-1, scale_bits=16)
        assert found < loss(weight, solve(weight, spec), fisher)


def test_equal_sensitivities_are_plain_clusters():
    weight, _ = drawn(6, 96)
    first, second = (squeezed(weight, torch.full_like(weight, value)) for value in (1.0, 2.0**-40))
    assert all(torch.equal(stored, second.tensors[name]) for name, stored in first.tensors.items())


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("factor", [2.0**-60, 3e-7, 1e12])
def test_codes_do_not_depend_on_the_unit_of_the_loss(group_size, factor):
    weight, fisher = drawn(6, 96)
    plain, scaled = (squeezed(weight, f, group_size=group_size, outliers=0.02) for f in (fisher, fisher * factor))
    assert torch.equal(plain.tensors["codes"], scaled.tensors["codes"]) and torch.equal(kept(plain), kept(scaled))


def test_as_many_levels_as_values_are_exact():
    weight = torch.tensor([-2.0, -0.75, -0.5, 0.0, 0.125, 0.25, 1.0, 1.5])[torch.arange(4 * 64).view(4, 64) * 5 % 8]
    assert torch.equal(squeezed(weight, drawn(4, 64)[1]).dequantize(), weight)


def test_a_single_sensitive_weight_captures_no_level():
    # The weights of a row lie close together but for one, which holds nearly all of the sensitivity.
    weight, _ = drawn(1, 4000)
    fisher = torch.ones_like(weight)
    spiked = fisher.clone()
    spiked[0, 17] = 1e9
    plain, found = (loss(weight, squeezed(weight, f, bits=4), fisher) for f in (fisher, spiked))
    assert found <= 1.01 * plain


def test_a_row_of_no_sensitivity_falls_back_to_ones():
    weight, fisher = drawn(3, 96)
    fisher[1] = 0
    plain = squeezed(weight, torch.ones_like(fisher)).dequantize()
    found = squeezed(weight, fisher).dequantize()
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("share", [0.0005, 0.0045, 0.05])
def test_the_share_of_outliers_is_the_one_asked_for(share):
    weight, fisher = drawn(40, 200)
    record = squeezed(weight, fisher, outliers=share, options={"sensitive": 0.002})
    count, sensitive = round(share * 8000), min(round(share * 8000), 16)
    found = kept(record)
    assert record.layout.outliers == len(found) == count
    top = fisher.flatten().topk(sensitive).indices
    rest = weight.abs().flatten().index_fill(0, top, -1.0).topk(count - sensitive).indices
    assert torch.equal(found, torch.cat([top, rest]).sort().values)


@pytest.mark.parametrize("sensitivity", [1.0, 0.0])
def test_outliers_do_not_count_in_the_clusters(sensitivity):
    weight, fisher = drawn(4, 100)
    fisher = fisher.clamp_max(1e-9)
    fisher[2] *= sensitivity
    weight[2, 5] = 30.0
    moved = weight.clone()
    moved[2, 5] = -25.0
    one, other = (squeezed(x, fisher, outliers=1 / 400, options={"sensitive": 0}) for x in (weight, moved))
    for name in ("levels", "scale"):
        assert torch.equal(one.tensors[name], other.tensors[name])
    levels = from_f16_bits(one.tensors["levels"]) * from_f16_bits(one.tensors["scale"]) * 2.0**one.layout.shift
    others = torch.arange(100) != 5
    assert torch.allclose(levels[2:3], weighted_kmeans(weight[2:3, others], fisher[2:3, others], 8), atol=4e-3)
    for record, value in ((one, 30.0), (other, -25.0)):
        assert abs(record.dequantize()[2, 5] - value) <= 30 * 2**-11


@pytest.mark.parametrize("group_size", [-1, 32])
def test_dense_and_sparse_add_up(group_size):
    weight, fisher = drawn(8, 100)
    weight[torch.rand(8, 100, generator=torch.Generator().manual_seed(3)) < 0.02] *= 9
    record = squeezed(weight, fisher, outliers=0.03, group_size=group_size, scale_bits=16)
    stored = record.tensors
    codes = unpack(stored["codes"], 3, 100).long()
    scale = from_f16_bits(stored["scale"]).repeat_interleave(100 if group_size == -1 else 32, 1)[:, :100]
    dense = from_f16_bits(stored["levels"]).gather(1, codes) * scale
    sparse = torch.zeros(800).index_put((kept(record),), from_f16_bits(stored["outlier_values"])).view(8, 100)
    assert torch.allclose(record.dequantize(), (dense + sparse) * 2.0**record.layout.shift, rtol=1e-6)
    assert ((record.dequantize() - weight).abs().flatten()[kept(record)] <= 2e-3 * weight.abs().max()).all()
    assert loss(weight, record, fisher) < loss(weight, squeezed(weight, fisher, group_size=group_size), fisher)


def test_a_whole_row_stores_its_table_and_one_scale():
    # bits + 16 K / in + 16 / in, whatever the scale width: coding a single scale would cost more than it saves.
    for scale_bits in (16, 6):
        record = squeezed(*drawn(8, 512), scale_bits=scale_bits)
        assert ledger(record.layout).bytes * 8 / record.layout.numel == 3 + 16 * 8 / 512 + 16 / 512


@pytest.mark.parametrize("scale_bits", [16, 6])
def test_group_scales_pay_on_uneven_groups(scale_bits):
    weight, fisher = drawn(8, 256)
    weight *= torch.linspace(0.1, 2, 8).repeat_interleave(32)
    record = squeezed(weight, fisher, group_size=32, scale_bits=scale_bits)
    assert record.layout.stages[0].scale_bits == scale_bits and record.layout.stages[0].group_size == 32
    assert loss(weight, record, fisher) < 0.7 * loss(weight, squeezed(weight, fisher), fisher)
    spec = Spec(method="codebook", bits=3, group_size=32, scale_bits=scale_bits)
    assert loss(weight, record, fisher) < loss(weight, solve(weight, spec), fisher)


def test_clusters_of_groups_are_those_of_the_scaled_weights(monkeypatch):
    monkeypatch.setattr(squeezellm, "ROUNDS", 0)
    weight, fisher = drawn(6, 128)
    fisher = fisher.clamp_max(1e-9)
    weight *= torch.linspace(0.1, 2, 4).repeat_interleave(32)
    scale = weight.view(6, 4, 32).abs().amax(-1).repeat_interleave(32, 1)
    record = squeezed(weight, fisher, group_size=32, scale_bits=16)
    levels = weighted_kmeans(weight / scale, fisher * scale.square(), 8)
    assert torch.allclose(from_f16_bits(record.tensors["levels"]), levels, atol=2e-3)


def test_rounds_of_scales_and_clusters_lower_the_loss(monkeypatch):
    weight, fisher = drawn(8, 256)
    losses = []
    for rounds in (0, 1, 2):
        monkeypatch.setattr(squeezellm, "ROUNDS", rounds)
        losses.append(loss(weight, squeezed(weight, fisher.clamp_max(1e-9), group_size=32), fisher.clamp_max(1e-9)))
    assert losses[1] < 0.95 * losses[0] and losses[2] < losses[1]


def test_a_stack_has_the_sensitivities_of_each_matrix():
    weight, fisher = drawn(3, 8, 96)
    stack = squeezed(weight, fisher, outliers=0.01, options={"sensitive": 0.005})
    assert stack.layout.outliers == round(0.01 * weight.numel())
    for number in range(3):
        alone = loss(weight[number], squeezed(weight[number], fisher[number], outliers=0.01), fisher[number])
        assert loss(weight[number], stack.expert(number), fisher[number]) <= 1.2 * alone


def test_statistics_that_do_not_serve_are_refused():
    weight, fisher = drawn(4, 64)
    spec = Spec(method="squeezellm", bits=3)
    with pytest.raises(BadRequest, match="'squeezellm' fits codes to calibration data and was given none"):
        solve(weight, spec)
    blind = [replace(statistics_of(fisher)[0], sensitivity=None)]
    for outliers in (0.0, 0.01):
        with pytest.raises(BadRequest, match=r"hold none \(Statistics.sensitivity is None\)"):
            solve(weight, replace(spec, outliers=outliers), statistics=blind)
    wrong = [replace(statistics_of(fisher)[0], sensitivity=fisher[:3])]
    with pytest.raises(BadRequest, match=r"the weight is \[4, 64\], its sensitivities are \[3, 64\]"):
        solve(weight, spec, statistics=wrong)
    with pytest.raises(BadRequest, match="the sensitivities hold NaN or infinity"):
        squeezed(weight, fisher.index_fill(0, torch.tensor([1]), float("nan")))
    with pytest.raises(BadRequest, match="takes levels fitted, got 'uniform'"):
        squeezed(weight, fisher, levels="uniform")
