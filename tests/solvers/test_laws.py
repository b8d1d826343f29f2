"""Laws every solver obeys, over every row of the solver table."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.format import LowBitTensor, Spec, ledger
from hf_lowbit.solvers import SOLVERS, solve


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(weight: torch.Tensor, found: LowBitTensor | torch.Tensor, norm: float = 2.0, importance=1.0) -> float:
    """Mean of ``importance * |w - w_hat| ** norm``; the largest error where the norm is infinite."""
    decoded = found.dequantize() if isinstance(found, LowBitTensor) else found
    error = (weight.double() - decoded.double()).abs()
    if norm == float("inf"):
        return float(error.max())
    return float((error**norm * importance).mean())


def assert_same_bytes(one: LowBitTensor, other: LowBitTensor) -> None:
    assert one.layout == other.layout
    for name, stored in one.tensors.items():
        assert stored.numpy().tobytes() == other.tensors[name].numpy().tobytes(), name


def test_every_solver_has_a_row(solver_table):
    assert {row.method for row in solver_table.ROWS} == set(SOLVERS)


def test_every_row_states_the_widths_its_solver_takes(solver_table):
    for method, solver in SOLVERS.items():
        bits = {width for row in solver_table.ROWS if row.method == method for width in row.widths}
        assert (min(bits), max(bits)) == solver.bits


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_never_worse_than_rounding_to_nearest(case, scale_bits):
    # Under the objective of the row, against rtn of the same width, groups and scales. On normal weights: powerquant and
    # codebook at other levels than the rival's may lose on weights that happen to fit the rival's grid.
    row, bits = case
    weight = gauss(24, 256)
    rival = solve(weight, Spec(bits=bits, method="rtn", group_size=64, scale_bits=scale_bits, **row.rival))
    found = row.solve(weight, row.spec(bits, group_size=64, scale_bits=scale_bits))
    assert loss(weight, found, row.norm) <= loss(weight, rival, row.norm)
    if scale_bits == 16 and found.layout.stages == rival.layout.stages and row.norm < float("inf"):
        # With the same levels it holds group by group; the slack is for rounding scale and offset to fp16.
        one, other = ((x.dequantize() - weight).abs().view(-1, 64).pow(row.norm).sum(1) for x in (found, rival))
        assert (one <= 1.01 * other).all()


def test_more_bits_never_hurt(row):
    weight = gauss(24, 128)
    losses = [loss(weight, row.solve(weight, row.spec(bits))) for bits in row.widths]
    assert losses == sorted(losses, reverse=True)


def test_smaller_groups_never_hurt(row):
    weight = gauss(24, 256)
    losses = [loss(weight, row.solve(weight, row.spec(group_size=size)), row.norm) for size in (-1, 128, 64, 32, 16)]
    # Only solvers that minimise the loss per group can promise it; a closed rule may lose a little by chance.
    assert all(finer <= 1.02 * coarser for coarser, finer in pairwise(losses))


@pytest.mark.parametrize("power", [-60, -3, 1, 40])
def test_scaling_by_a_power_of_two_changes_the_shift_alone(row, power):
    weight = gauss(6, 75)
    spec = row.spec(scale_bits=6, outliers=0.01, residual_terms=2)
    plain, scaled = (row.solve(x, spec, white=False) for x in (weight, weight * 2.0**power))
    assert scaled.layout.shift == plain.layout.shift + power
    for name, stored in plain.tensors.items():
        assert torch.equal(stored.view(torch.uint8), scaled.tensors[name].view(torch.uint8)), name
    assert torch.equal(scaled.dequantize(), plain.dequantize() * 2.0**power)


def test_same_bytes_every_time_whatever_the_threads(row, monkeypatch):
    # Small blocks, so that there is something to spread over the threads. One thread and one block come first.
    weight = gauss(24, 80)
    spec = row.spec(scale_bits=6, outliers=0.01, residual_terms=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = row.solve(weight, spec, white=False)
        monkeypatch.setattr("hf_lowbit.solvers.rows.BLOCK_WEIGHTS", 160)
        for count in (1,) if row.factorizes else (1, 2, 2):
            torch.set_num_threads(count)
            assert_same_bytes(row.solve(weight, spec, white=False), first)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_the_weight_is_left_alone(row):
    weight = gauss(4, 64)
    before = weight.clone()
    row.solve(weight, row.spec(outliers=0.05, residual_terms=2), white=False)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scale_bits", [16, 6])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 50)])
def test_zeros_stay_exact_zeros(case, shape, scale_bits):
    row, bits = case
    zeros = torch.zeros(shape)
    assert torch.equal(row.solve(zeros, row.spec(bits, scale_bits=scale_bits, outliers=0.02)).dequantize(), zeros)


@pytest.mark.parametrize("scale_bits", [16, 6])
def test_zero_groups_stay_exact_zeros(case, scale_bits):
    row, bits = case
    weight = gauss(6, 128)
    weight[:, 32:64] = 0
    weight[2] = 0
    decoded = row.solve(weight, row.spec(bits, scale_bits=scale_bits)).dequantize()
    assert not decoded[:, 32:64].any() and not decoded[2].any()
    assert decoded[:, :32].any()


def test_weights_outside_a_sample_of_zeros_are_kept(row):
    # Solvers that fit to a sample of the rows see nothing but zeros here.
    weight = torch.zeros(520, 1024)
    weight[1] = gauss(1024)
    record = row.solve(weight, row.spec(outliers=0.0, group_size=64))
    assert loss(weight[1], record.rows(torch.tensor([1]))) < 0.5


def test_constant_groups_are_kept(case):
    row, bits = case
    weight = gauss(8, 4).repeat_interleave(32, dim=1)
    decoded = row.solve(weight, row.spec(bits)).dequantize()
    # fp16 scales and offsets keep 11 bits; fitted tables are fp16 too.
    assert ((decoded - weight).abs() <= (row.flat_error + 2e-3) * weight.abs()).all()


def test_a_huge_outlier_spoils_its_own_group_alone(row):
    weight = gauss(8, 96)
    spoiled = weight.clone()
    spoiled[3, 40] = 3000.0
    decoded = row.solve(spoiled, row.spec()).dequantize()
    assert torch.isfinite(decoded).all()
    others = torch.ones(8, 96, dtype=torch.bool)
    others[3, 32:64] = False
    before = loss(weight[others], row.solve(weight, row.spec()).dequantize()[others])
    assert loss(weight[others], decoded[others]) <= row.bends * before


def test_an_outlier_kept_apart_spoils_nothing(row):
    weight = gauss(8, 96)
    spoiled = weight.clone()
    spoiled[3, 40], spoiled[5, 7] = 3000.0, -500.0
    record = row.solve(spoiled, row.spec(outliers=2 / weight.numel()))
    assert record.layout.outliers == 2
    # fp16 keeps 11 bits of the two; all others are as well off as without them.
    error = record.dequantize() - spoiled
    assert abs(error[3, 40]) <= 3000 * 2**-11 and abs(error[5, 7]) <= 500 * 2**-11
    error[3, 40] = error[5, 7] = 0
    assert error.square().mean() <= 1.1 * loss(weight, row.solve(weight, row.spec()))


@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((5, 172), 64), ((5, 100), 32), ((3, 37), 128), ((40, 9), 8), ((1, 96), 32), ((6, 50), -1), ((2, 3, 172), 64)],
)
def test_rows_that_no_group_size_divides(row, shape, group_size):
    weight = gauss(*shape)
    record = row.solve(weight, row.spec(group_size=group_size, scale_bits=6))
    assert record.shape == shape
    stage = record.layout.stages[0]
    assert stage.group_size == (shape[-1] if group_size == -1 else min(group_size, shape[-1]))
    # The same weights with stored zeros up to whole groups are as hard: padding may cost no more than those would.
    padded = torch.nn.functional.pad(weight, (0, -shape[-1] % stage.group_size))
    whole = row.solve(padded, row.spec(group_size=stage.group_size, scale_bits=6)).dequantize()[..., : shape[-1]]
    assert loss(weight, record, row.norm) <= 1.1 * loss(weight, whole, row.norm)


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_and_grouping_gives_a_whole_record(solver_table, data):
    row = data.draw(st.sampled_from(solver_table.ROWS))
    shape = data.draw(
        st.tuples(st.integers(1, 9), st.integers(1, 90)) | st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 40))
    )
    spec = row.spec(
        data.draw(st.sampled_from(row.widths)),
        group_size=data.draw(st.sampled_from([-1, 8, 20, 64, 300])),
        scale_bits=data.draw(st.sampled_from([16, 8, 6])),
        outliers=data.draw(st.sampled_from([0.0, 0.001, 0.1])),
        residual_terms=data.draw(st.integers(1, 2)),
    )
    weight = gauss(*shape, seed=data.draw(st.integers(0, 9)))
    record = row.solve(weight, spec)
    assert record.layout.method == row.method and record.shape == shape
    # No weight may end further from home than the largest one is from zero; the margin is for coded scales.
    assert (record.dequantize() - weight).abs().max() <= 1.1 * weight.abs().max()
    assert ledger(record.layout).bytes == sum(stored.nbytes for stored in record.tensors.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_float_dtype_is_read_as_its_values(row, dtype):
    weight = gauss(4, 75).to(dtype)
    spec = row.spec(outliers=0.02, residual_terms=2)
    assert_same_bytes(row.solve(weight, spec, white=False), row.solve(weight.float(), spec, white=False))


def test_a_strided_weight_is_read_as_its_values(row):
    weight = gauss(75, 4)
    spec = row.spec(outliers=0.02)
    assert_same_bytes(row.solve(weight.T, spec, white=False), row.solve(weight.T.contiguous(), spec, white=False))


def test_a_stack_is_solved_like_its_matrices(row):
    weight = gauss(3, 8, 96)
    weight[1] *= 0.25
    stack = row.solve(weight, row.spec())
    # One exponent or float format serves the whole stack, which costs the quieter matrices a little.
    assert stack.shape == (3, 8, 96)
    for number in range(3):
        alone = loss(weight[number], row.solve(weight[number], row.spec()), row.norm)
        assert loss(weight[number], stack.expert(number), row.norm) <= 1.2 * alone


def test_outliers_lower_the_error(case):
    row, bits = case
    weight = gauss(16, 96)
    weight[torch.rand(16, 96, generator=torch.Generator().manual_seed(1)) < 0.01] *= 8
    none, some = (loss(weight, row.solve(weight, row.spec(bits, outliers=share))) for share in (0.0, 0.05))
    assert some < 0.96 * none


def test_outliers_are_exact_to_fp16(row):
    weight = gauss(16, 96)
    record = row.solve(weight, row.spec(outliers=0.05))
    rows = torch.repeat_interleave(torch.arange(16), record.tensors["outlier_starts"].long().diff())
    kept = rows * 96 + record.tensors["outlier_columns"].long()
    assert record.layout.outliers == len(kept) == round(0.05 * weight.numel())
    largest = weight.abs().flatten().topk(len(kept)).indices.sort().values
    assert torch.equal(kept, largest) or not row.largest_apart
    # What is stored is what the codes leave, so the number rounded to 11 bits may be larger than the weight by one level.
    error = (record.dequantize() - weight).abs().flatten()
    assert (error[kept] <= 2**-10 * weight.abs().flatten()[kept]).all()


def test_residual_terms_lower_the_error(case):
    row, bits = case
    if row.method == "rtn" and bits == 1 and row.settings.get("levels") != "integer":
        pytest.skip("one bit rounds to the ends of the range, and the rest is rounded to the ends of a wider one")
    weight = gauss(8, 96)
    losses = [loss(weight, row.solve(weight, row.spec(bits, residual_terms=terms))) for terms in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2]


def test_importance_lowers_the_weighted_error(case):
    # Solvers with a closed rule for the scale ignore it, which is equality.
    row, bits = case
    weight = gauss(16, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(2)).square() * 10
    without = loss(weight, row.solve(weight, row.spec(bits)), importance=importance)
    assert loss(weight, row.solve(weight, row.spec(bits), importance), importance=importance) <= without


def test_importance_reaches_every_searching_solver(row):
    weight = gauss(8, 64)
    importance = torch.ones(64)
    importance[::2] = 100
    plain, weighed = (row.solve(weight, row.spec(), each).dequantize() for each in (None, importance))
    assert row.weighs != torch.equal(plain, weighed)
