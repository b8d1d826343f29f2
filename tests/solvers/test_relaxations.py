"""How each method makes a code differentiable: its gradients, and what they find."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.format import Spec
from hf_lowbit.solvers import SOLVERS, Statistics, solve
from hf_lowbit.solvers.coding import Coding
from hf_lowbit.solvers.jlcm import Mapped, cluster_rows, proximity
from hf_lowbit.solvers.nupes import EXPONENTS, PowerCodes, power_table
from hf_lowbit.solvers.relaxation import RELAXATIONS
from hf_lowbit.solvers.rows import Rows

SHAPE = (16, 64)
pytestmark = pytest.mark.usefixtures("one_thread")


def statistics_of(weight: torch.Tensor) -> list[Statistics]:
    size = weight.shape[-1]
    return [Statistics(100, torch.eye(size), torch.zeros(size), torch.ones(size))]


def learner(method: str, bits: int = 3, **settings):
    """The relaxation of a random matrix that holds exact zeros, and the coding it starts at."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[:, ::5] = 0
    spec = Spec(method, bits, 16, **settings)
    tensor = solve(weight, spec, statistics=statistics_of(weight))
    coding = Coding.read(tensor.layout.stages[0], tensor.stage_tensors(0), SHAPE[1], 0, SHAPE[0])
    weight = torch.ldexp(weight, torch.tensor(-tensor.layout.shift))
    return RELAXATIONS[method](coding, weight, SOLVERS[method].options, 0), coding


@pytest.mark.parametrize("method", sorted(RELAXATIONS))
def test_a_relaxation_starts_at_the_coding_it_was_given(method):
    relaxed, coding = learner(method)
    hard = relaxed.harden()
    assert torch.equal(hard.codes, coding.codes)
    assert torch.equal(hard.scale, coding.scale)
    assert torch.allclose(hard.tables, coding.tables, atol=1e-3)
    # In the end what is mixed is what is stored.
    assert torch.allclose(relaxed.weight(1.0), coding.dequantize(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["power", "power_zero_free"])
def test_gradient_of_the_exponent_is_that_of_finite_differences(family):
    relaxed, coding = learner("nupes", levels=family)
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    exponent = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    grid = relaxed.grid.double()

    def loss(a: torch.Tensor) -> torch.Tensor:
        return (power_table(grid, a)[coding.codes] * grad).sum()

    (found,) = torch.autograd.grad(loss(exponent), exponent)
    step = 1e-5
    expected = (loss(exponent + step) - loss(exponent - step)) / (2 * step)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    # The whole road, through the staircase: finite for weights that are exactly zero too.
    (relaxed.weight(0.0) * grad).sum().backward()
    assert torch.isfinite(relaxed.theta.grad)
    assert torch.isfinite(relaxed.position.grad).all()


def test_gradient_of_the_exponent_is_zero_at_code_zero():
    exponent = torch.tensor(0.7, requires_grad=True)
    (found,) = torch.autograd.grad(power_table(torch.tensor([0.0]), exponent).sum(), exponent)
    assert float(found) == 0.0


def test_the_exponent_stays_in_its_bounds():
    relaxed, _ = learner("nupes")
    for theta in (-1e6, 1e6):
        relaxed.theta.data.fill_(theta)
        assert EXPONENTS[0] <= relaxed.harden().stage.levels.exponent <= EXPONENTS[1]
    assert isinstance(relaxed, PowerCodes)


def test_nupes_without_calibration_is_powerquant():
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    plain, learned = (solve(weight, Spec(method, 3, 16)) for method in ("powerquant", "nupes"))
    assert torch.equal(plain.dequantize(), learned.dequantize())


@pytest.mark.parametrize(("method", "reached"), [("nupes", True), ("signround", False)])
def test_a_better_code_two_cells_away(method, reached):
    """One weight should be two levels higher; an offset of half a code cannot get there, a code over the range can."""
    relaxed, coding = learner(method, 3, levels="power_zero_free")
    wanted = coding.codes.clone()
    wanted[0, 0] += 2 if wanted[0, 0] < 4 else -2
    target = torch.zeros(SHAPE)
    target[0, 0] = coding.tables[0][wanted[0, 0]] - coding.tables[0][coding.codes[0, 0]]
    spread = coding.scale.repeat_interleave(16, 1)
    goal = coding.dequantize() + target * spread
    for _ in range(150):
        (grad,) = torch.autograd.grad((relaxed.weight(0.0) - goal).square().sum(), relaxed.position)
        with torch.no_grad():
            relaxed.position -= 0.02 * grad.sign()
        relaxed.project()
    assert (relaxed.codes()[0, 0] == wanted[0, 0]) == reached


def test_proximal_weights_fall_with_distance():
    distance = torch.linspace(0, 3, 50)
    assert (proximity(distance, torch.tensor(0.3)).diff() < 0).all()


def test_the_nearest_level_is_preferred():
    """With equal shares the pull is strongest on the neighbours, towards the side the loss falls; none on the code's own."""
    tables = torch.tensor([[-1.0, -0.4, 0.1, 0.5, 1.0]])
    logits = torch.zeros(1, 1, 5)
    logits[..., 1] = 1e-6
    logits.requires_grad_()
    Mapped.apply(tables, logits, torch.zeros(1, 1, dtype=torch.int64), None).backward(torch.ones(1, 1))
    low, own, *higher = logits.grad[0, 0].tolist()
    assert low < 0 == own
    assert higher == sorted(higher, reverse=True)
    assert min(higher) > 0


def test_tables_get_the_exact_gradient():
    relaxed, coding = learner("jlcm")
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    (relaxed.weight(1.0) * grad).sum().backward()  # where each weight is its code's level alone
    through = grad * coding.scale.repeat_interleave(16, 1)
    picked = (coding.codes == 2) & (coding.ids == 1)[:, None]
    assert float(relaxed.table_step.grad[1, 2] / relaxed.gap[1]) == pytest.approx(float(through[picked].sum()), rel=1e-4)


def test_further_tables_cost_their_levels_and_a_byte_per_row():
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))

    def size(tables: int) -> int:
        spec = Spec("jlcm", 3, 16, options={"tables": tables})
        tensor = solve(weight, spec, statistics=statistics_of(weight))
        return sum(stored.numel() * stored.element_size() for stored in tensor.tensors.values())

    assert size(8) - size(1) == 7 * 8 * 2 + 256


def test_rows_of_like_distribution_share_a_table():
    draw = torch.Generator().manual_seed(0)
    flat, peaked = torch.rand(40, 256, generator=draw) - 0.5, torch.randn(40, 256, generator=draw) ** 3
    ids = cluster_rows(Rows(torch.cat([flat, peaked]), 32, 0), 2)
    assert len(ids[:40].unique()) == len(ids[40:].unique()) == 1
    assert ids[0] != ids[40]
