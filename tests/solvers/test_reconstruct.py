"""Block reconstruction: what holds for every method that learns codes, on a toy block of two matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.format import Spec
from hf_lowbit.format.serialize import load_tensors, save_tensors
from hf_lowbit.solvers import SOLVERS, Matrix, Statistics, get_solver, reconstruct, solve
from hf_lowbit.solvers.relaxation import RELAXATIONS

WIDTH, HIDDEN, SEQUENCES = 32, 48, 16
METHODS = sorted(RELAXATIONS)
pytestmark = pytest.mark.usefixtures("one_thread")


def run(hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The toy block: ``h + down(relu(up(h)))``."""
    return hidden + (hidden @ weights["up"].T).relu() @ weights["down"].T


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    up = torch.randn(HIDDEN, WIDTH, generator=draw) * torch.linspace(0.5, 2, HIDDEN)[:, None]
    return {"up": up, "down": torch.randn(WIDTH, HIDDEN, generator=draw)}


@pytest.fixture(scope="module")
def originals() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(SEQUENCES, 24, WIDTH, generator=draw) @ torch.randn(WIDTH, WIDTH, generator=draw)


@pytest.fixture(scope="module")
def learn(weights, originals):
    """``learn(spec, **options)``: the matrices as they started, what became of them, and the report."""
    draw = torch.Generator().manual_seed(2)
    inputs = originals + 0.1 * torch.randn(originals.shape, generator=draw)

    solved: dict[str, dict] = {}

    def starts(spec: Spec) -> dict[str, Matrix]:
        # Solved as for white inputs, which these are not: there is something left to learn.
        white = {n: Statistics(9, torch.eye(n), torch.zeros(n), torch.ones(n)) for n in (WIDTH, HIDDEN)}
        key = repr(replace(spec, options={}))
        if key not in solved:
            solved[key] = {name: solve(w, spec, statistics=[white[w.shape[1]]]) for name, w in weights.items()}
        return {name: Matrix(weight, spec, solved[key][name]) for name, weight in weights.items()}

    def learned(spec: Spec, **options):
        spec = replace(spec, options={"steps": 40, "code_rate": 0.02, **options})
        matrices = starts(spec)
        first = {name: replace(matrix) for name, matrix in matrices.items()}
        settings = {**SOLVERS[spec.method].options, **spec.options}
        targets = run(originals, weights)
        return first, matrices, reconstruct(matrices, run, inputs, originals, targets, settings, spec.seed)

    return learned


def same(one: dict[str, Matrix], other: dict[str, Matrix]) -> bool:
    return all(
        one[name].tensor.layout == other[name].tensor.layout
        and all(torch.equal(tensor, other[name].tensor.tensors[key]) for key, tensor in one[name].tensor.tensors.items())
        for name in one
    )


@pytest.mark.parametrize("scale_bits", [16, 6])
@pytest.mark.parametrize("method", METHODS)
def test_learning_lowers_the_loss_of_the_stored_record(method, scale_bits, learn, weights, originals, tmp_path):
    first, matrices, report = learn(Spec(method, 2, 16, scale_bits=scale_bits), mixing=0.0)
    assert report["loss_after"] < 0.99 * report["loss_before"]
    assert not same(first, matrices)
    # Read back from a file, the records still have the loss that was reported.
    save_tensors(tmp_path / "block.safetensors", {name: matrix.tensor for name, matrix in matrices.items()})
    stored = {name: tensor.dequantize() for name, tensor in load_tensors(tmp_path / "block.safetensors").items()}
    assert all(torch.equal(stored[name], matrix.tensor.dequantize()) for name, matrix in matrices.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_record(method, learn):
    spec = Spec(method, 2, 16, seed=5)
    _, one, first = learn(spec, steps=12)
    _, two, second = learn(spec, steps=12)
    assert same(one, two)
    assert first["loss_after"] == second["loss_after"]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_never_ends_above_its_start(method, learn):
    # Steps so large that nothing learned is of use.
    first, matrices, report = learn(Spec(method, 2, 16), steps=8, code_rate=3.0, scale_rate=1.0, table_rate=1.0)
    assert report["loss_after"] <= report["loss_before"]
    assert report["kept_step"] or same(first, matrices)


def test_no_steps_change_nothing(learn):
    first, matrices, report = learn(Spec("signround", 3, 16), steps=0)
    assert same(first, matrices)
    assert report["loss_after"] == report["loss_before"]
    assert report["steps"] == report["kept_step"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_asked_for_is_learned(method, learn):
    first, codes_only, _ = learn(Spec(method, 2, 16, scale_bits=16), learn="codes", mixing=0.0)
    _, without_tables, _ = learn(Spec(method, 2, 16, scale_bits=16), learn="codes_scales", mixing=0.0)
    for name in first:
        start, kept = first[name].tensor, codes_only[name].tensor
        assert torch.equal(kept.scales(), start.scales())
        assert torch.equal(kept.table(), start.table())
        assert torch.equal(without_tables[name].tensor.table(), start.table())
    assert any(not torch.equal(without_tables[name].tensor.scales(), first[name].tensor.scales()) for name in first)


def test_outliers_and_further_terms_stay(learn):
    first, matrices, report = learn(Spec("signround", 2, 16, outliers=0.02, residual_terms=2), mixing=0.0)
    assert report["loss_after"] < report["loss_before"]
    for name in first:
        start, kept = first[name].tensor.tensors, matrices[name].tensor.tensors
        assert torch.equal(start["outlier_values"], kept["outlier_values"])
        assert torch.equal(start["codes_1"], kept["codes_1"])


def test_matrices_of_other_methods_are_left_alone(learn, weights, originals):
    first, _, _ = learn(Spec("signround", 2, 16), steps=0)
    fixed = solve(weights["up"], Spec("rtn", 4, 16))
    block = {"up": Matrix(weights["up"], Spec("rtn", 4, 16), fixed), "down": first["down"]}
    reconstruct(block, run, originals, originals, run(originals, weights), {"steps": 5}, 0)
    assert block["up"].tensor is fixed


@pytest.mark.parametrize("method", METHODS)
def test_stacks_are_learned(method):
    draw = torch.Generator().manual_seed(3)
    weight, hidden = torch.randn(3, 8, 32, generator=draw), torch.randn(8, 12, 32, generator=draw)
    hidden = hidden @ torch.randn(32, 32, generator=draw)

    def experts(hidden: Tensor, dense: dict[str, Tensor]) -> Tensor:
        return torch.einsum("eoi,bti->bteo", dense["experts"], hidden).flatten(2)

    found = Statistics(96, torch.eye(32), torch.zeros(32), torch.ones(32))
    spec = Spec(method, 2, 16, options={"code_rate": 0.02})
    block = {"experts": Matrix(weight, spec, solve(weight, spec, statistics=[found] * 3))}
    targets = experts(hidden, {"experts": weight})
    report = reconstruct(block, experts, hidden, hidden, targets, {"steps": 40, "mixing": 0.0}, 0)
    assert report["loss_after"] < report["loss_before"]
    assert block["experts"].tensor.shape == weight.shape


@pytest.mark.parametrize("option", [{"loss": "weighted"}, {"loss": "cosine"}, {"optimizer": "lion"}, {"optimizer": "sign"}])
def test_every_axis_is_a_setting(option, learn):
    rates = {"code_rate": 0.01, "scale_rate": 0.001}
    assert (
        learn(Spec("nupes", 2, 16), **rates, **option)[2]["loss_after"]
        < learn(Spec("nupes", 2, 16), steps=0, **option)[2]["loss_before"]
    )


def test_an_unknown_word_is_refused():
    with pytest.raises(BadRequest, match="optimizer"):
        get_solver(Spec("signround", options={"optimizer": "adamm"}))
