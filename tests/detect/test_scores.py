"""Token statistics and scores against slow forms, and the laws they keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.detect import token_statistics as module
from hf_lowbit.detect.scores import SCORES, Means, get_score
from hf_lowbit.detect.token_statistics import STATISTICS, token_statistics
from hf_lowbit.errors import BadRequest, LowBitError


def draw(seed: int, n: int = 40, v: int = 97, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, v, generator=generator), torch.randint(v, (n,), generator=generator)


def probabilities(logits: torch.Tensor) -> np.ndarray:
    return logits.double().softmax(-1).numpy()


def column(values: torch.Tensor, name: str) -> torch.Tensor:
    return values[:, STATISTICS.index(name)]


@pytest.fixture(scope="module")
def table(load_test_module):
    return {row.name: row for row in load_test_module("detect/score_table.py").ROWS}


def test_every_score_has_a_row(table):
    assert set(table) == set(SCORES)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("rounded", [False, True])
def test_a_score_is_what_its_paper_says(name, rounded, table):
    logits, targets = draw(1)
    if rounded:
        logits = logits.round()  # ties by the dozen
    observer = draw(2)[0]
    means = Means(token_statistics(logits, targets, observer).double().mean(0).numpy())
    slow = table[name].slow(probabilities(logits), probabilities(observer), targets.numpy())
    assert float(SCORES[name].compute(means)) == pytest.approx(slow, rel=1e-4, abs=1e-6)


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 5), shift=st.floats(-50, 50))
def test_ranks_survive_any_rising_change_of_the_logits(seed, scale, shift):
    logits, targets = draw(seed, n=5, v=31)
    logits = logits.round()
    before, after = token_statistics(logits, targets), token_statistics(torch.exp(logits * 0.1) * scale + shift, targets)
    assert torch.equal(column(before, "log_rank"), column(after, "log_rank"))


def test_even_logits_put_every_token_in_the_middle():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = token_statistics(torch.full((3, 101), 7.0, dtype=dtype), torch.tensor([0, 50, 100]))
        assert column(found, "originality").tolist() == pytest.approx([50 / 101] * 3)
        assert column(found, "variance").tolist() == pytest.approx([0] * 3, abs=1e-5)
        assert column(found, "entropy").tolist() == pytest.approx([np.log(101)] * 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_ranks_at_random_and_not_one_way(dtype):
    logits, targets = draw(3, n=400, v=8000)
    exact, half = token_statistics(logits, targets), token_statistics(logits.to(dtype), targets)
    difference = (column(half, "originality") - column(exact, "originality")) * 8000
    # Counting only strictly larger logits would put every rank low, by about half of the tokens that tie.
    strict = (logits.to(dtype) > logits.to(dtype).gather(1, targets[:, None])).sum(1) - column(exact, "originality") * 8000
    assert strict.mean() < -3 * difference.mean().abs()
    assert abs(difference.mean()) < 4 * difference.std() / 20 + 0.05


def test_the_first_choice_of_every_step_scores_zero():
    logits, _ = draw(4)
    found = token_statistics(logits, logits.argmax(-1))
    assert column(found, "originality").abs().max() == 0
    assert column(found, "log_rank").abs().max() == 0
    assert float(SCORES["spot"].compute(Means(found.double().mean(0).numpy()))) == 0


def test_fast_detectgpt_agrees_with_sampling():
    logits, _ = draw(5)
    p = torch.from_numpy(probabilities(logits))
    samples = torch.multinomial(p, 20_001, replacement=True, generator=torch.Generator().manual_seed(0))
    targets, samples = samples[:, 0], samples[:, 1:]
    logs = p.log().gather(1, samples)
    mean, variance = logs.mean(1).sum(), logs.var(1).sum()
    sampled = (p.log().gather(1, targets[:, None]).sum() - mean) / variance.sqrt() / len(targets) ** 0.5
    means = Means(token_statistics(logits, targets).double().mean(0).numpy())
    error = 3 * (variance / 20_000).sqrt() / variance.sqrt() / len(targets) ** 0.5
    assert abs(float(SCORES["fast_detectgpt"].compute(means)) - float(sampled)) < float(error) + 1e-3


def test_binoculars_of_a_model_with_itself_is_surprise_over_entropy():
    logits, targets = draw(6)
    means = Means(token_statistics(logits, targets, logits).double().mean(0).numpy())
    assert float(means.cross_entropy) == pytest.approx(float(means.entropy), rel=1e-5)
    ratio = -float(means.log_probability) / float(means.entropy)
    assert float(SCORES["binoculars"].compute(means)) == pytest.approx(ratio, rel=1e-5)


def test_vocabularies_padded_to_other_sizes_share_their_tokens():
    logits, targets = draw(7)
    padded = torch.nn.functional.pad(logits, (0, 7), value=-40.0)
    same = token_statistics(logits, targets, logits)
    assert torch.allclose(token_statistics(logits, targets, padded), same, rtol=1e-4, atol=1e-5)


def test_chunks_do_not_show(monkeypatch):
    logits, targets = draw(8)
    whole = token_statistics(logits, targets, logits)
    monkeypatch.setattr(module, "CHUNK", 3 * 97)
    assert torch.allclose(token_statistics(logits, targets, logits), whole, atol=1e-6)


def test_tokens_ruled_out_with_minus_infinity_do_no_harm():
    logits, targets = draw(9)
    targets = targets % 50
    logits[:, 60:] = float("-inf")
    found = token_statistics(logits, targets)[:, :5]
    short = token_statistics(logits[:, :60], targets)[:, :5]
    assert found[:, 1:].numpy() == pytest.approx(short[:, 1:].numpy(), rel=1e-4, abs=1e-5)
    assert found[:, 0].numpy() == pytest.approx(short[:, 0].numpy() * 60 / 97, rel=1e-5)


def test_logits_that_are_no_numbers_are_an_error():
    logits, targets = draw(10)
    for bad in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[7, 7] = bad
        with pytest.raises(LowBitError, match="logits are not finite"):
            token_statistics(broken, targets)


def test_no_positions_give_no_rows():
    assert token_statistics(torch.empty(0, 9), torch.empty(0, dtype=torch.int64)).shape == (0, len(STATISTICS))


def test_an_unknown_score_is_refused_with_the_nearest():
    with pytest.raises(BadRequest, match=r"unknown score 'fast_detectgtp'. Did you mean 'fast_detectgpt'\?"):
        get_score("fast_detectgtp")
