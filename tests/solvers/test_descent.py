"""Descent and the calibrated road: no step raises the objective, and what is written is what was weighed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.format import Spec
from hf_lowbit.format.scales import round_f16
from hf_lowbit.solvers import SOLVERS, Statistics, descent, solve
from hf_lowbit.solvers.calibrated import Calibrated
from hf_lowbit.solvers.coding import on_grid
from hf_lowbit.solvers.descent import descend, objective
from hf_lowbit.solvers.feedback import factor

KIND = st.sampled_from(["fitted", "fitted-6", "power", "zero-free", "affine", "affine-8", "integer-6"])


def spoil(case, share: float, seed: int) -> None:
    """Random codes for a share of the weights, so that there is far to go."""
    random = torch.Generator().manual_seed(seed)
    changed = torch.rand(case.weight.shape, generator=random) < share
    codes = torch.randint(2**case.stage.bits, case.weight.shape, generator=random)
    case.coding.codes.copy_(torch.where(changed, codes, case.coding.codes))


@settings(max_examples=40)
@given(
    kind=KIND,
    bits=st.integers(1, 5),
    rows=st.integers(1, 20),
    size=st.integers(8, 80),
    group=st.sampled_from([8, 16, 32]),
    tables=st.integers(1, 4),
    free=st.sampled_from([0.0, 0.05, 0.9]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    tokens=st.integers(1, 200),
    sweeps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_descent_never_raises_the_objective(
    codings, kind, bits, rows, size, group, tables, free, share, tokens, sweeps, seed
):
    bits = bits if kind in codings.kinds(bits) else 2
    case = codings.make(rows, size, bits, kind, tables if "fitted" in kind else 1, seed, min(group, size))
    gram = factor(codings.gram_of(codings.inputs(tokens, size, seed)), 0.01, "given").gram
    spoil(case, share, seed)
    coding = case.coding
    if free:
        coding.free, coding.held = codings.gauss(*case.weight.shape, seed=seed) > 1.6, case.weight.clone()
    one = objective(coding, case.weight, gram)
    last = one
    for _ in range(sweeps):
        before, after = descend(coding, case.weight, gram, 1)
        assert before == last
        assert after <= before * (1 + 1e-5) + 1e-6
        assert after == pytest.approx(objective(coding, case.weight, gram), rel=1e-9)
        last = after
    assert (coding.tables.diff() >= 0).all()
    written = case.decoded()
    if coding.free is not None:
        written = torch.where(coding.free, coding.held, written)
    assert torch.equal(written, coding.dequantize())


@pytest.mark.parametrize("kind", ["fitted", "affine", "integer-6"])
def test_each_kind_of_step_lowers_the_objective(kind, codings):
    case = codings.make(kind=kind)
    gram = codings.gram_of(codings.inputs(100, 64))
    spoil(case, 0.3, 0)
    coding = case.coding
    codes, scale, tables = coding.codes.clone(), coding.scale.clone(), coding.tables.clone()
    before, after = descend(coding, case.weight, gram, 2)
    assert after < 0.3 * before
    assert not torch.equal(codes, coding.codes) and not torch.equal(scale, coding.scale)
    assert torch.equal(tables, coding.tables) == (kind != "fitted")


def test_no_single_code_or_scale_could_be_better_at_the_end(codings):
    case = codings.make(4, 16, 2, "integer-6", group=8)
    gram = codings.gram_of(codings.inputs(100, 16)) + 0.01 * torch.eye(16)
    _, least = descend(case.coding, case.weight, gram, 50)
    for row in range(4):
        for column in range(16):
            kept = int(case.coding.codes[row, column])
            for code in range(4):
                case.coding.codes[row, column] = code
                assert objective(case.coding, case.weight, gram) >= least * (1 - 1e-5)
            case.coding.codes[row, column] = kept
        for group in range(2):
            kept_scale = float(case.coding.scale[row, group])
            step = float(case.coding.step[row, group])
            for other in (kept_scale - step, kept_scale + step):
                if abs(other) > 31.5 * step:
                    continue
                case.coding.scale[row, group] = other
                assert objective(case.coding, case.weight, gram) >= least * (1 - 1e-5)
            case.coding.scale[row, group] = kept_scale


@pytest.mark.parametrize("kind", ["fitted", "affine-8"])
def test_blocks_of_columns_and_rows_do_not_change_the_outcome(kind, monkeypatch, codings):
    gram = codings.gram_of(codings.inputs(100, 64))
    one, other = codings.make(kind=kind), codings.make(kind=kind)
    descend(one.coding, one.weight, gram, 1)
    monkeypatch.setattr(descent, "COLUMNS", 16)
    monkeypatch.setattr(descent, "ROWS", 5)
    descend(other.coding, other.weight, gram, 1)
    assert torch.equal(one.coding.codes, other.coding.codes)


def test_tables_are_kept_only_if_they_serve_all_rows(monkeypatch, codings):
    case, gram = codings.make(), codings.gram_of(codings.inputs(100, 64))
    tables = case.coding.tables.clone()
    monkeypatch.setattr(descent, "_solve_table", lambda coding, target, gram, rows, old: old * 1.5)
    _, after = descend(case.coding, case.weight, gram, 1)
    assert torch.equal(case.coding.tables, tables)
    assert after == objective(case.coding, case.weight, gram)


def test_a_table_may_be_fitted_to_some_of_the_rows(monkeypatch, codings):
    gram, seen = codings.gram_of(codings.inputs(100, 64)), []
    plain = descent._solve_table
    monkeypatch.setattr(descent, "TABLE_WORK", 0)
    monkeypatch.setattr(descent, "_solve_table", lambda c, t, g, rows, old: seen.append(rows) or plain(c, t, g, rows, old))
    case = codings.make(64)
    before, after = descend(case.coding, case.weight, gram, 1)
    assert after < before and len(seen[0]) == 16 and seen[0][-1] == 63


@pytest.mark.parametrize("kind", ["affine", "affine-8", "integer-6", "fitted"])
def test_moves_of_scales_and_offsets_never_raise_the_objective(kind, monkeypatch, codings):
    monkeypatch.setattr(descent, "_move_codes", lambda coding, nearest, start, group, pull, block: 0 * pull)
    monkeypatch.setattr(descent, "_refit_tables", lambda coding, target, gram: None)
    for seed in range(8):
        case = codings.make(1, 64, kind=kind, group=64, seed=seed)
        gram = codings.gram_of(codings.inputs(100, 64, seed) + 2)
        spoil(case, 0.5, seed)
        before, after = descend(case.coding, case.weight, gram, 1)
        best = descend(case.coding, case.weight, gram, 20)[1]
        assert best <= after < before


def test_storable_values_are_the_nearest_ones():
    values, step = torch.linspace(-3, 3, 101), torch.tensor(0.04)
    stored = on_grid(values, step, 6)
    assert torch.allclose(stored, (values / step).round().clamp(-31, 31) * step)
    assert torch.equal(on_grid(values, torch.tensor(0.0), 6), torch.zeros(101))
    assert torch.equal(on_grid(values, None, 16), round_f16(values))


def test_the_target_minimises_the_error_on_the_original_outputs(codings):
    weight, x = codings.gauss(8, 16), codings.inputs(300, 16)
    original = x + 0.3 * codings.gauss(300, 16, seed=7)
    spec = Spec(method="gptq", options={"damping": 0.0})
    found = Statistics(300, codings.gram_of(x), x.mean(0), x.abs().amax(0), original.T @ x / 300)
    target = Calibrated(SOLVERS["gptq"], spec, [found]).targets(weight)
    wanted = (original @ weight.T).double()
    best = torch.linalg.lstsq(x.double(), wanted).solution.T

    def error(values: torch.Tensor) -> float:
        return float((wanted - x.double() @ values.double().T).square().sum())

    assert error(target) == pytest.approx(error(best), rel=1e-6)
    assert error(weight) > 1.01 * error(best)
    torch.testing.assert_close(target.double(), best, rtol=1e-2, atol=1e-3)


def test_the_target_is_the_weight_where_the_prefix_changes_nothing(codings):
    weight, x = codings.gauss(8, 16), codings.inputs(300, 16)
    gram = codings.gram_of(x)
    found = Statistics(300, gram, x.mean(0), x.abs().amax(0), gram)
    target = Calibrated(SOLVERS["gptq"], Spec(method="gptq"), [found]).targets(weight)
    # What solving in float32 may lose of weights near one; 2e-5 is.
    lost = float(torch.linalg.cond(gram)) * torch.finfo(torch.float32).eps
    assert lost < 1e-3
    assert torch.allclose(target, weight, atol=lost)
    own = Spec(method="gptq", options={"target": "own"})
    moved = Statistics(300, gram, x.mean(0), x.abs().amax(0), 2 * gram)
    assert torch.equal(Calibrated(SOLVERS["gptq"], own, [moved]).targets(weight), weight)


@pytest.mark.parametrize("change", [{}, {"outliers": 0.02}, {"residual_terms": 2}, {"bits": 2, "scale_bits": 6}])
def test_the_corrected_target_lowers_the_error_on_the_original_outputs(change, codings):
    weight, x = codings.gauss(32, 64), codings.inputs(300, 64)
    original = x + 0.3 * codings.gauss(300, 64, seed=7)
    found = Statistics(300, codings.gram_of(x), x.mean(0), x.abs().amax(0), original.T @ x / 300)

    def error(target: str) -> float:
        spec = Spec(method="gptq", options={"target": target}, **change)
        got = solve(weight, spec, statistics=[found]).dequantize()
        return float((original @ weight.T - x @ got.T).square().sum())

    assert error("original") < error("own")


def test_the_reported_error_is_that_of_the_stored_record(codings):
    weight, x = codings.gauss(32, 64), codings.inputs(300, 64)
    gram, notes = codings.gram_of(x), {}
    made = Statistics(300, gram, x.mean(0), x.abs().amax(0))
    got = solve(weight, Spec(method="gptq", options={"damping": 1e-6}), statistics=[made], notes=notes)
    error = weight - got.dequantize()
    share = ((error @ gram) * error).sum() / ((weight @ gram) * weight).sum()
    assert notes["error"] == pytest.approx(float(share), rel=1e-3)


def test_outliers_are_exact_under_their_stored_precision_and_help(codings):
    weight, x = codings.gauss(32, 64), codings.inputs(300, 64)
    weight[3, 5], weight[20, 60] = 40.0, -30.0
    made = Statistics(300, codings.gram_of(x), x.mean(0), x.abs().amax(0))
    errors = []
    for outliers in (0.0, 0.002, 0.02):
        got = solve(weight, Spec(method="gptq", bits=3, outliers=outliers), statistics=[made]).dequantize()
        errors.append(float(((weight - got) @ x.T).square().sum()))
    assert errors == sorted(errors, reverse=True)
