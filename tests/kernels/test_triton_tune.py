"""Tuning block sizes: what is tried, what is kept where, and what a kernel then does. The clock is a pretended one."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import pytest
import torch

from hf_lowbit.format import Layout, Levels, Stage
from hf_lowbit.kernels import triton_configs
from hf_lowbit.kernels.triton_backend import Triton
from hf_lowbit.kernels.triton_configs import Config, choose, key, rule
from hf_lowbit.kernels.triton_plan import plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(find_spec("triton") is None or not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
LAYOUT = Layout((16, 64), (Stage(Levels("fitted", 4), 32),))
STAGE = plan(LAYOUT.dumps()).stages[0]
USUAL = rule(STAGE, 64, 1, 1)
FAST, SHORT = Config(1, 8, 512, 1, 1, 1), Config(1, 4, 512, 1, 1, 1)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user without a cache yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    triton_configs.measured.cache_clear()
    yield triton_configs.user_file()
    triton_configs.measured.cache_clear()


@pytest.fixture
def tuned(own, records, monkeypatch):
    """``tuned(clock)``: what tuning a small matrix for one row finds, with few candidates."""
    from hf_lowbit.kernels import triton_tune

    monkeypatch.setattr(triton_tune, "candidates", lambda batch: [SHORT, FAST])

    def run(clock):
        prepared = [Triton().prepare(records.fill(LAYOUT, seed)) for seed in (0, 1)]
        (found,) = triton_tune.tune(prepared, (1,), torch.float16, 0.0, own, clock=clock)
        return found

    return run


@runs
def test_the_fastest_is_kept_for_the_card_and_used_from_then_on(tuned, own):
    asked = []

    def clock(jobs, seconds):
        asked.append((triton_configs._forced, len(jobs)))
        return {SHORT: 3e-6, FAST: 1e-6}.get(triton_configs._forced, 2e-6)

    found = tuned(clock)
    assert asked == [(USUAL, 2), (SHORT, 2), (FAST, 2)]  # matrices of a layout take turns
    assert found == (key(STAGE, 64, 1), FAST, 1e-6, 2e-6, 0)
    assert json.loads(own.read_text()) == {"interpreter": {"gemv 16x64 4 1": list(FAST)}}
    assert choose(STAGE, 64, 1, "interpreter", 1) == FAST
    assert choose(STAGE, 64, 1, "another card", 1) == USUAL
    assert not list(own.parent.glob("*.part"))


@runs
def test_what_fails_or_gives_another_product_is_passed_over(tuned, monkeypatch):
    real = Triton.linear

    def linear(self, x, prepared, bias=None):
        return real(self, x, prepared, bias) * (1.1 if triton_configs._forced == SHORT else 1)

    def clock(jobs, seconds):
        if triton_configs._forced == FAST:
            raise RuntimeError("out of shared memory")
        return 1e-6 if triton_configs._forced == SHORT else 2e-6

    monkeypatch.setattr(Triton, "linear", linear)
    found = tuned(clock)
    assert (found.config, found.failed) == (USUAL, 2)
    assert triton_configs._forced is None


def test_a_users_choices_go_before_the_shipped_ones(own, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped.json"
    shipped.write_text(json.dumps({"a card": {"gemv 16x64 4 1": list(SHORT), "gemv 16x64 4 2": list(SHORT)}}))
    own.parent.mkdir()
    own.write_text(json.dumps({"a card": {"gemv 16x64 4 1": list(FAST)}, "another": {}}))
    monkeypatch.setattr(triton_configs, "FILE", shipped)
    assert triton_configs.measured()["a card"] == {"gemv 16x64 4 1": list(FAST), "gemv 16x64 4 2": list(SHORT)}


@pytest.mark.parametrize("text", ['{"a card": {"gemv', "[1]", '{"a card": {"gemv 16x64 4 1": [1, 2]}}',
                                  '{"a card": {"gemv 16x64 4 1": [1, 0, 64, 1, 1, 1]}}'])  # fmt: skip
def test_a_damaged_file_is_said_and_the_rule_goes_on(text, own, caplog):
    own.parent.mkdir()
    own.write_text(text)
    assert choose(STAGE, 64, 1, "a card", 1) == USUAL
    assert f"{own} holds no block sizes of GPU kernels" in caplog.text and "--tune` writes it anew" in caplog.text


@runs
@pytest.mark.parametrize("batch", [1, 16, 512])
def test_every_candidate_is_one_the_kernels_take(batch):
    from hf_lowbit.kernels.triton_tune import candidates

    found = candidates(batch)
    assert len(set(found)) == len(found) > 10
    for config in found:
        assert all(value & (value - 1) == 0 for value in config[:4]) and config.stages >= 1
        assert (config.block_m == 1) == (batch == 1)
