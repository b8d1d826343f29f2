"""Error feedback: GPTQ over any level table, and its ladder of dampings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.format import LowBitTensor, Spec
from hf_lowbit.solvers import Statistics, feedback, solve, without_data
from hf_lowbit.solvers.coding import Nearest
from hf_lowbit.solvers.feedback import factor, feed_back

PLAIN = {"target": "own", "sweeps": 0}


def statistics(x: Tensor) -> Statistics:
    return Statistics(len(x), x.T @ x / len(x), x.mean(0), x.abs().amax(0))


def output_error(weight: Tensor, found: LowBitTensor, x: Tensor) -> float:
    return float(((weight - found.dequantize()).double() @ x.double().T).square().sum())


def nearest_levels(coding, target: Tensor) -> Tensor:
    """The nearest level of each weight by comparing it with all of them."""
    scale, offset = coding.spread(coding.scale), 0.0 if coding.offset is None else coding.spread(coding.offset)
    tables = coding.tables if coding.ids is None else coding.tables[coding.ids]
    values = scale[..., None] * tables[:, None] + (offset if isinstance(offset, float) else offset[..., None])
    return coding.levels_of((values - target[..., None]).abs().argmin(-1))


def naive(coding, target: Tensor, gram: Tensor, damping: float, order: list[int]) -> Tensor:
    """Optimal brain quantization in O(I^3): the inverse shrinks by a column at a time; ``held`` receives free weights."""
    damped = gram.double() + damping * float(gram.diagonal().mean()) * torch.eye(len(gram))
    inverse, work = torch.linalg.inv(damped), target.double().clone()
    codes, nearest = torch.empty_like(coding.codes), Nearest(coding)
    scale = coding.spread(coding.scale)
    offset = torch.zeros_like(scale) if coding.offset is None else coding.spread(coding.offset)
    for column in order:
        codes[:, column] = nearest(((work[:, column] - offset[:, column]) / scale[:, column]).float())
        level = coding.levels_of(codes[:, column : column + 1])[:, 0] * scale[:, column] + offset[:, column]
        if coding.free is not None:
            free = coding.free[:, column]
            coding.held[free, column] = work[free, column].float()
            level = torch.where(free, work[:, column], level)
        line = inverse[column] / inverse[column, column]
        work -= (work[:, column] - level)[:, None] * line
        inverse -= inverse[:, column, None] * line
    return codes


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_an_identity_gram_gives_the_nearest_codes(bits, codings):
    for kind in codings.kinds(bits):
        case = codings.make(bits=bits, kind=kind)
        feed_back(case.coding, case.weight, factor(torch.eye(64), 0.01, "activation"))
        assert torch.equal(case.coding.levels(), nearest_levels(case.coding, case.weight)), kind


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("order", ["activation", "given"])
def test_same_codes_as_naive_optimal_brain_quantization(order, tables, codings):
    for kind in codings.KINDS if tables == 1 else ["fitted"]:
        case = codings.make(32, 32, kind=kind, tables=tables)
        gram = codings.gram_of(codings.inputs(100, 32))
        found = factor(gram, 0.01, order)
        expected = naive(case.coding, case.weight, gram, 0.01, found.order.tolist())
        feed_back(case.coding, case.weight, found)
        assert torch.equal(case.coding.codes, expected), kind


@pytest.mark.parametrize(("columns", "rows"), [(1, 512), (7, 5), (64, 1), (500, 24)])
def test_blocks_of_columns_and_rows_do_not_change_the_codes(columns, rows, monkeypatch, codings):
    found = factor(codings.gram_of(codings.inputs(100, 64)), 0.01, "activation")
    one, other = codings.make(tables=2), codings.make(tables=2)
    feed_back(one.coding, one.weight, found)
    monkeypatch.setattr(feedback, "COLUMNS", columns)
    monkeypatch.setattr(feedback, "ROWS", rows)
    feed_back(other.coding, other.weight, found)
    assert torch.equal(one.coding.codes, other.coding.codes)


def test_columns_visited_in_another_order_are_put_back(codings):
    # Act-order sorts the columns, so with one scale per row it makes no difference how they are stored.
    x, mixed = codings.inputs(100, 64), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    one, other = codings.make(group=64), codings.make(group=64)
    feed_back(one.coding, one.weight, factor(codings.gram_of(x), 0.01, "activation"))
    feed_back(other.coding, other.weight[:, mixed], factor(codings.gram_of(x[:, mixed]), 0.01, "activation"))
    assert torch.equal(one.coding.codes[:, mixed], other.coding.codes)


def test_the_order_goes_down_the_diagonal(codings):
    gram = codings.gram_of(codings.inputs(100, 64))
    assert (gram.diagonal()[factor(gram, 0.01, "activation").order].diff() <= 0).all()
    assert torch.equal(factor(gram, 0.01, "given").order, torch.arange(64))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("tokens", [500, 20])
def test_the_error_on_calibration_inputs_is_never_above_nearest_rounding(tokens, bits, codings):
    weight, x = codings.gauss(24, 64, seed=5), codings.inputs(tokens, 64)
    for kind, settings in codings.kinds(bits).items():
        for options in (PLAIN, {"target": "own", "order": "given"}):
            spec = Spec(method="gptq", bits=bits, group_size=16, options=options, **settings)
            found = solve(weight, spec, statistics=[statistics(x)])
            plain = solve(weight, without_data(spec))
            assert output_error(weight, found, x) < output_error(weight, plain, x), (kind, options)


def test_free_weights_make_up_for_the_columns_before_them_and_pass_nothing_on(codings):
    one, other = codings.make(), codings.make()
    gram = codings.gram_of(codings.inputs(100, 64))
    found = factor(gram, 0.01, "activation")
    for case in (one, other):
        case.coding.free, case.coding.held = codings.gauss(24, 64, seed=3) > 1, torch.zeros(24, 64)
    feed_back(one.coding, one.weight, found)
    codes, free = naive(other.coding, other.weight, gram, 0.01, found.order.tolist()), one.coding.free
    assert torch.equal(one.coding.codes[~free], codes[~free])
    torch.testing.assert_close(one.coding.held[free], other.coding.held[free], rtol=1e-3, atol=1e-4)


def with_least_eigenvalue(least: float, size: int = 32) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.ones(size, dtype=torch.float64)
    values[0] = least
    return (basis * values @ basis.T).float()


@pytest.mark.parametrize(("least", "damping"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0), (-30.9, None)])
def test_damping_rises_tenfold_until_the_gram_matrix_factorizes(least, damping):
    gram = with_least_eigenvalue(least)
    notes: dict = {}
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    made = Statistics(100, gram, torch.zeros(32), torch.ones(32))
    solve(weight, Spec(method="gptq", options=PLAIN), statistics=[made], notes=notes)
    if damping is None:
        assert "cannot be factorized" in notes["fallback"] and "damping" not in notes
    else:
        assert notes["damping"] == pytest.approx(damping) and notes["precision"] == "float32" and "fallback" not in notes


def test_the_last_step_is_float64(monkeypatch, codings):
    plain, tried = torch.linalg.cholesky_ex, []

    def stubborn(matrix: Tensor, **options: bool):
        tried.append(matrix.diagonal().mean().item())
        lower, failed = plain(matrix, **options)
        return lower, failed if matrix.dtype == torch.float64 else torch.tensor(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", stubborn)
    gram = codings.gram_of(codings.inputs(100, 16))
    found = factor(gram, 0.01, "activation")
    level = gram.diagonal().mean().item()
    assert tried[:6] == pytest.approx([level * (1 + share) for share in (0.01, 0.1, 1, 10, 100, 100)])
    assert found.precision == "float64" and found.damping == pytest.approx(100) and found.upper.dtype == torch.float32
    assert torch.allclose(found.divide(found.gram), torch.eye(16), atol=1e-5)


def test_inputs_that_were_all_zero_leave_the_nearest_codes_and_a_note(codings):
    weight, notes = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), {}
    zero = Statistics(100, torch.zeros(64, 64), torch.zeros(64), torch.zeros(64))
    for settings in codings.KINDS.values():
        spec = Spec(method="gptq", group_size=16, **settings)
        found = solve(weight, spec, statistics=[zero], notes=notes)
        assert notes["fallback"].startswith("nearest rounding") and "error" not in notes
        assert torch.equal(found.dequantize(), solve(weight, without_data(spec)).dequantize())


@pytest.mark.parametrize("level", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_not_factorized(level):
    gram = torch.eye(8)
    gram[3, 3] = level
    assert factor(gram, 0.01, "activation") is None


def test_dead_columns_keep_their_nearest_codes(codings):
    x, dead = codings.inputs(100, 64), [0, 17, 63]
    x[:, dead] = 0
    for kind in codings.KINDS:
        case = codings.make(kind=kind)
        feed_back(case.coding, case.weight, factor(codings.gram_of(x), 0.01, "activation"))
        assert torch.equal(case.coding.levels()[:, dead], nearest_levels(case.coding, case.weight)[:, dead]), kind


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_inputs_that_are_all_the_same(damping, codings):
    weight, x = codings.gauss(16, 64), codings.gauss(1, 64).expand(50, 64)
    spec, notes = Spec(method="gptq", bits=3, group_size=16, options={"damping": damping}), {}
    found = solve(weight, spec, statistics=[statistics(x)], notes=notes)
    assert output_error(weight, found, x) < 0.01 * output_error(weight, solve(weight, without_data(spec)), x)
    assert "fallback" not in notes and notes["damping"] >= damping


def test_a_stack_is_solved_matrix_by_matrix(codings):
    weight, xs = codings.gauss(3, 16, 64), [codings.inputs(100, 64, seed=seed) for seed in range(3)]
    spec = Spec(method="gptq", levels="integer", options=PLAIN)
    stack = solve(weight, spec, statistics=[statistics(x) for x in xs]).dequantize()
    for found, matrix, x in zip(stack, weight, xs, strict=True):
        plain = solve(matrix, without_data(spec))
        error = ((matrix - found) @ x.T).square().sum()
        assert error < 0.9 * output_error(matrix, plain, x)
