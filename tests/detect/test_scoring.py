"""Windows, batches and sums: what a token scores depends on the tokens before it and on nothing else."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.detect import scoring
from hf_lowbit.detect.scoring import Scorer, TextSums
from hf_lowbit.detect.windows import Window, batches, windows
from hf_lowbit.errors import BadRequest


def prose(seed: int, length: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice("abcdefgh ") for _ in range(length))


def total(sums: TextSums) -> np.ndarray:
    return sums.sums.sum(0)[:5]


@given(
    length=st.integers(0, 700),
    window=st.integers(32, 130),
    skip=st.integers(1, 15),
    cuts=st.lists(st.integers(0, 700), max_size=5),
)
def test_each_token_is_scored_once_behind_the_overlap(length, window, skip, cuts):
    ids = torch.arange(length)
    places = [0, *sorted(min(cut, length) for cut in cuts), length]
    pieces = (ids[a:b] for a, b in pairwise(places))
    seen = []
    for one in windows(7, pieces, window, skip):
        assert one.text == 7 and len(one.ids) <= window
        assert torch.equal(one.ids, ids[one.start : one.start + len(one.ids)])
        assert one.first >= (skip if one.start == 0 else max(skip, window // 32))
        seen += one.ids[one.first :].tolist()
    assert seen == list(range(skip, length))


@given(lengths=st.lists(st.integers(2, 64), max_size=40), together=st.integers(1, 9))
def test_a_batch_holds_no_more_than_a_window_and_loses_nothing(lengths, together):
    given_ = [Window(k, 0, torch.zeros(n, dtype=torch.int64), 1) for k, n in enumerate(lengths)]
    made = list(batches(given_, 64, together))
    assert sorted(one.text for batch in made for one in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(len(one.ids) for one in batch) <= 64 for batch in made)


def test_scores_do_not_depend_on_company(scorer):
    texts = [prose(seed, length) for seed, length in enumerate([5, 300, 17, 64, 65, 40, 1000, 0, 128])]
    alone = [next(iter(scorer.score([text]))) for text in texts]
    for order in (texts, texts[::-1]):
        together = dict(zip(order, scorer.score(order), strict=True))
        for text, one in zip(texts, alone, strict=True):
            assert (one.tokens, one.scored) == (together[text].tokens, together[text].scored)
            assert total(together[text]) == pytest.approx(total(one), rel=1e-5, abs=1e-5)


def test_no_pass_is_larger_than_one_window(scorer, letters):
    list(scorer.score([prose(seed, 7 * seed) for seed in range(60)]))
    assert max(rows * length for rows, length in letters.shapes) <= scorer.window
    assert max(rows for rows, _ in letters.shapes) > 1  # short texts do share a pass


def test_what_comes_later_changes_nothing(scorer):
    text = prose(1, 900)
    (whole,) = scorer.score([text], keep=900)
    for length in (30, 64, 65, 96, 97, 333):
        (part,) = scorer.score([text[:length]], keep=900)
        assert np.allclose(part.first.values, whole.first.values[:length], atol=1e-6, equal_nan=True)
        assert total(part) == pytest.approx(np.nansum(whole.first.values[:length, :5].astype(float), 0), rel=1e-5)


def test_one_window_over_all_equals_many(letters, scorer):
    # These logits see two tokens back, so windows make no difference to them.
    text = prose(2, 600)
    (streamed,) = scorer.score([text])
    (whole,) = Scorer(letters, scorer.tokenizer, window=1024, skip=4).score([text])
    assert total(streamed) == pytest.approx(total(whole), rel=1e-5)


def test_a_text_in_pieces_equals_the_text(scorer, monkeypatch):
    text = prose(3, 5000)
    (whole,) = scorer.score([text], keep=5000)
    monkeypatch.setattr(scoring, "PIECE", 100)
    monkeypatch.setattr(scoring, "SLACK", 20)
    (cut,) = scorer.score([text], keep=5000)
    assert np.array_equal(cut.first.spans, whole.first.spans)
    assert total(cut) == pytest.approx(total(whole), rel=1e-6)


def test_pieces_of_a_real_tokenizer_join(spot, books, monkeypatch):
    text = " ".join(books[:3])
    (whole,) = spot.scorer.score([text])
    monkeypatch.setattr(scoring, "PIECE", 300)
    (cut,) = spot.scorer.score([text])
    assert cut.tokens == whole.tokens
    assert total(cut) == pytest.approx(total(whole), rel=1e-4)


def test_tokens_are_kept_as_far_as_asked(scorer):
    (found,) = scorer.score([prose(4, 500)], keep=70)
    assert found.tokens == 500 and len(found.first.spans) == len(found.first.values) == 70
    assert np.isnan(found.first.values[: scorer.skip]).all()
    assert np.isfinite(found.first.values[scorer.skip :, :5]).all()


@pytest.mark.parametrize("length", [999, 1000, 1001, 5000])
def test_the_limit_is_kept_and_said(letters, scorer, length):
    limited = Scorer(letters, scorer.tokenizer, window=64, skip=4, limit=1000)
    (found,) = limited.score([prose(5, length)])
    assert (found.tokens, found.cut) == (min(length, 1000), length > 1000)
    assert found.scored == found.tokens - 4


def test_memory_does_not_grow_with_the_text(letters, scorer, monkeypatch):
    monkeypatch.setattr(scoring, "PIECE", 1000)
    monkeypatch.setattr(scoring, "BLOCKS", 32)

    def peak(length: int) -> int:
        text = prose(6, 1000) * (length // 1000)
        tracemalloc.start()
        (found,) = scorer.score([text])
        _, used = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        letters.shapes.clear()
        assert found.tokens == length and len(found.sums) < 2 * scoring.BLOCKS
        return used

    assert peak(24_000) < 1.1 * peak(12_000)


def test_settings_no_window_can_serve(letters, scorer):
    for window, skip in ((16, 4), (64, 0), (64, 32)):
        with pytest.raises(BadRequest, match=f"window={window}, skip={skip}"):
            Scorer(letters, scorer.tokenizer, window=window, skip=skip)
    with pytest.raises(BadRequest, match="window=16, skip=4: a window needs 32 tokens or more, which the model must take"):
        Scorer(type(letters)(places=16), scorer.tokenizer, window=64, skip=4)
    assert Scorer(type(letters)(places=48), scorer.tokenizer, window=64, skip=4).window == 48


@settings(max_examples=20)
@given(values=st.integers(1, 5000))
def test_blocks_keep_sums(values):
    rows = np.random.default_rng(values).random((values, 6)).astype(np.float32)
    sums = TextSums()
    for start in range(0, values, 250):
        sums.add(rows[start : start + 250])
    assert sums.scored == values
    assert sums.sums.sum(0) == pytest.approx(rows.sum(0, dtype=np.float64))
