"""What solvers refuse, and the words they refuse it with."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.errors import BadRequest, WeightError
from hf_lowbit.format import Spec
from hf_lowbit.solvers import SOLVERS, solve
from hf_lowbit.solvers.registry import solver

WEIGHT = torch.linspace(-1, 1, 64).view(2, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_refused_with_their_place(row, value, dtype):
    weight = torch.ones(6, 40, dtype=dtype)
    weight[4, 17] = value
    weight[5, 3] = value
    with pytest.raises(WeightError) as caught:
        row.solve(weight, row.spec())
    assert "holds NaN or infinity (2 values in rows 0 to 5, first at row 4, column 17)" in str(caught.value)


def test_the_place_is_right_beyond_the_first_block(monkeypatch):
    monkeypatch.setattr("hf_lowbit.solvers.rows.BLOCK_WEIGHTS", 8)
    weight = torch.ones(9, 40)
    weight[7, 2] = float("nan")
    with pytest.raises(WeightError, match="first at row 7, column 2"):
        solve(weight, Spec())


def test_a_float64_beyond_float32_is_refused():
    weight = torch.ones(2, 32, dtype=torch.float64)
    weight[1, 5] = 1e300
    with pytest.raises(WeightError, match="first at row 1, column 5"):
        solve(weight, Spec())


def test_the_largest_float32_is_accepted():
    weight = torch.full((2, 32), torch.finfo(torch.float32).max)
    assert torch.equal(solve(weight, Spec(method="rtn")).dequantize().isfinite(), torch.ones(2, 32, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_integers_are_refused(dtype):
    with pytest.raises(WeightError) as caught:
        solve(torch.ones(2, 32, dtype=dtype), Spec())
    assert str(caught.value) == f"a weight is a float [out, in] or [experts, out, in], got {dtype} [2, 32]."


@pytest.mark.parametrize("shape", [(32,), (), (2, 2, 2, 32), (0, 32), (2, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(WeightError, match=r"a weight is a float \[out, in\] or \[experts, out, in\], got torch.float32"):
        solve(torch.ones(shape), Spec())


def test_importance_of_another_length_is_refused():
    with pytest.raises(BadRequest, match=r"one number per input channel, \[32\] here, got \[2\]"):
        solve(WEIGHT, Spec(), torch.ones(2))


@pytest.mark.parametrize("method", [name for name, entry in SOLVERS.items() if not entry.optional])
def test_solvers_that_need_calibration_say_so(method):
    with pytest.raises(BadRequest, match=f"method '{method}' fits codes to calibration data and was given none"):
        solve(WEIGHT, Spec(method=method))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "codebok"}, "unknown method 'codebok'. Did you mean 'codebook'?"),
        ({"method": "zzz"}, "unknown method 'zzz'. Known: codebook,"),
        ({"method": "ternary", "bits": 3}, "method 'ternary' works at 2 to 2 bits, got bits=3"),
        ({"method": "nf", "bits": 1}, "method 'nf' works at 2 to 8 bits, got bits=1"),
        ({"method": "float", "bits": 2}, "method 'float' works at 3 to 8 bits, got bits=2"),
        ({"method": "nf", "levels": "uniform"}, "method 'nf' takes levels normal_float, got 'uniform'"),
        ({"method": "codebook", "levels": "power"}, "method 'codebook' takes levels fitted, got 'power'"),
        ({"method": "search", "levels": "affine"}, "method 'search' takes levels uniform,"),
        ({"method": "rtn", "levels": "power_of_two", "bits": 5}, "levels 'power_of_two' need 2 to 4 bits, got bits=5"),
        ({"method": "rtn", "levels": "uniform", "bits": 1}, "levels 'uniform' need 2 to 8 bits, got bits=1"),
        ({"method": "rtn", "levels": "unifrom"}, "unknown level family 'unifrom'. Did you mean 'uniform'"),
        ({"method": "float", "levels": "e2m1", "bits": 8}, "levels 'e2m1' are 4 bits wide"),
        ({"method": "float", "levels": "e0m3", "bits": 4}, "a 4-bit float has 0 to 2 mantissa bits, got 3"),
        ({"bits": 0}, "bits must be a whole number from 1 to 8"),
        ({"bits": 9}, "bits must be a whole number from 1 to 8"),
        ({"bits": 4.0}, "bits must be a whole number from 1 to 8"),
        ({"bits": True}, "bits must be a whole number from 1 to 8"),
        ({"group_size": 0}, "group_size must be a whole number from 8 to 65536 (use -1 for one scale per row), got 0"),
        ({"group_size": 4}, "group_size must be a whole number from 8 to 65536"),
        ({"scale_bits": 4}, "scale_bits must be 16, 8 or 6, got 4"),
        ({"outliers": 0.2}, "outliers is the fraction of weights kept in fp16, 0 to 0.1, got 0.2"),
        ({"outliers": float("nan")}, "outliers is the fraction of weights kept in fp16, 0 to 0.1, got nan"),
        ({"outliers": "1%"}, "outliers is the fraction of weights kept in fp16, 0 to 0.1, got '1%'"),
        ({"residual_terms": 0}, "residual_terms must be a whole number from 1 to 4 (1 is no residual), got 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_requests_that_cannot_be_served(settings, message):
    with pytest.raises(BadRequest) as caught:
        solve(WEIGHT, Spec(**settings))
    assert message in str(caught.value)


def test_specs_round_trip_and_refuse_unknown_keys(row):
    spec = row.spec(outliers=0.01, residual_terms=2, seed=3)
    assert Spec.from_json(spec.to_json()) == spec
    with pytest.raises(BadRequest, match=r"unknown setting 'group_sise'\. Did you mean 'group_size'"):
        Spec.from_json({"group_sise": 64})


def test_a_solver_name_is_taken_once():
    with pytest.raises(ValueError, match="solver 'rtn' is registered twice"):
        solver("rtn", summary="again")(lambda rows, spec: None)
