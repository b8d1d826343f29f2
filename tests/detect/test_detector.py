"""Verdicts of the embedded model with the calibration that ships, and of detectors made in other ways."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import hf_lowbit
from hf_lowbit import LowBitConfig, SpotDetector, demo
from hf_lowbit.detect import SCORES, Calibration, Detection
from hf_lowbit.detect.calibration import FILE_NAME
from hf_lowbit.errors import BadRequest

SOURCE = demo.embedded_model()


def test_what_the_model_wrote_is_found(spot, written):
    for found in spot.detect(written):
        assert found.verdict == "machine"
        assert found.p_value <= 0.01 == found.fpr
        assert found.score > found.threshold
        assert found.interval[0] <= found.score <= found.interval[1]
        assert "at most 1 % get this verdict" in found.reason


def test_people_are_not_accused_and_not_acquitted(spot, books):
    results = spot.detect(books)
    assert [found.verdict for found in results] == ["abstain"] * len(books)  # 25 texts at a rate of 1 %
    covered = [found for found in results if found.p_value is not None]
    assert len(covered) >= 0.9 * len(books)
    assert all("no sign of a machine" in found.reason and "no proof of a person" in found.reason for found in covered)
    assert 0.3 < np.mean([found.p_value for found in covered]) < 0.7


def test_every_score_is_there_and_any_may_decide(spot, written):
    for name in ("spot", "log_rank", "lrr", "likelihood"):
        (found,) = spot.detect(written[0], score=name)
        assert found.score_name == name and found.score == found.scores[name]
        assert found.verdict == "machine"
        assert (found.score > found.threshold) == (SCORES[name].sign > 0)
    assert set(found.scores) == {name for name, score in SCORES.items() if not score.pair}


def test_its_own_first_choices_score_zero(spot, written):
    (found,) = spot.detect(written[0], keep=10)
    # Decoding and encoding again may cut a word in two where the prompt ended; nothing else can differ.
    assert found.scores["spot"] < 0.05


def test_places_refer_to_the_text(spot, books):
    (found,) = spot.detect(books[0])
    assert "".join(found.text[a:b] for a, b in found.first.spans.tolist()) == found.text
    assert len(found.first.spans) == found.tokens
    paragraphs = found.text.split("\n\n")
    assert {found.text[s.start : s.end] for s in found.spans} <= set(paragraphs)
    assert sum(span.tokens for span in found.spans) == pytest.approx(found.scored, abs=2 * len(paragraphs))


def test_json_has_the_promised_fields_and_numbers_only(spot, written, books):
    for found in spot.detect([written[0], books[0], "short", ""]):
        out = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert {"verdict", "score", "p_value", "tokens", "reason"} <= set(out)
        assert out["verdict"] in ("machine", "human", "abstain")
        assert out["reason"] and "text" not in out


def test_order_is_kept_and_a_string_is_one_text(spot, written, books):
    mixed = ["", books[1], "a\0b", written[0], books[2]]
    together = spot.detect(mixed)
    alone = [spot.detect(text)[0] for text in mixed]
    for one, other in zip(together, alone, strict=True):
        assert (one.verdict, one.reason, one.tokens) == (other.verdict, other.reason, other.tokens)
        assert one.score == (None if other.score is None else pytest.approx(other.score, abs=1e-5))


def test_shorter_than_the_calibration_abstains(spot, written):
    lengths = {}
    for characters in (60, 120, 200, 300, 400):
        (found,) = spot.detect(written[1][:characters])
        lengths[found.tokens] = found
    short = [found for tokens, found in lengths.items() if tokens < spot.calibration.shortest]
    long = [found for tokens, found in lengths.items() if tokens >= spot.calibration.shortest]
    assert short and long
    assert all(found.verdict == "abstain" and "the calibration starts at 60" in found.reason for found in short)
    assert all(found.verdict == "machine" for found in long)
    assert [found.interval for found in short if found.scored < 40] and long[-1].interval
    assert all(found.interval is None for found in short if found.scored < 40)  # too few blocks to resample


def test_without_a_calibration_there_are_scores_only(spot, written):
    other = SpotDetector.from_pretrained(SOURCE, window=256)  # not how it was calibrated
    assert other.calibration is None
    (found,) = other.detect(written[0])
    assert (found.verdict, found.p_value) == ("abstain", None)
    assert found.score is not None and "no calibration" in found.reason
    with pytest.raises(BadRequest, match=r"another detector \(embedded\): window was 512, is 256"):
        SpotDetector.from_pretrained(SOURCE, window=256, calibration=SOURCE / FILE_NAME)


def test_a_low_bit_detector_is_another_detector(spot, tmp_path, written):
    low = SpotDetector.from_pretrained(SOURCE, quantization_config=LowBitConfig(method="rtn", bits=4))
    assert low.identity["quantization"] == "rtn, 4 bits, groups of 32"
    assert low.calibration is None
    with pytest.raises(BadRequest, match=r"another detector.*quantization was null, is .rtn, 4 bits"):
        low.use(spot.calibration)
    low.scorer.model.save_pretrained(tmp_path)
    low.scorer.tokenizer.save_pretrained(tmp_path)
    again = SpotDetector.from_pretrained(tmp_path)
    assert {**again.identity, "name": ""} == {**low.identity, "name": ""}
    assert again.detect(written[1])[0].score == pytest.approx(low.detect(written[1])[0].score, abs=1e-5)


def test_weights_that_differ_in_one_number_are_another_detector(spot):
    other = SpotDetector.from_pretrained(SOURCE)
    other.scorer.model.model.norm.weight.data[3] += 0.01
    made = SpotDetector.from_pretrained(other.scorer.model, tokenizer=other.scorer.tokenizer)
    assert made.identity["weights"] != spot.identity["weights"]
    same = SpotDetector.from_pretrained(SpotDetector.from_pretrained(SOURCE).scorer.model, tokenizer=spot.scorer.tokenizer)
    assert same.identity["weights"] == spot.identity["weights"]


def test_binoculars_takes_the_models_own_low_bit_version(written, books):
    pair = SpotDetector.from_pretrained(SOURCE, observer=LowBitConfig(method="rtn", bits=3), score="binoculars")
    found = pair.detect([*written, *books[:5]])
    scores = [one.scores["binoculars"] for one in found]
    assert max(scores[:2]) < min(scores[2:])  # smaller means a machine
    assert pair.identity["observer"]["quantization"] == "rtn, 3 bits, groups of 32"
    assert pair.calibration is None  # the shipped one has no observer


def test_an_observer_with_the_detectors_own_logits_gives_surprise_over_entropy(spot, books):
    same = SpotDetector.from_pretrained(SOURCE, observer=SOURCE)
    (found,) = same.detect(books[0])
    expected = -found.scores["likelihood"] / found.scores["entropy"]
    assert found.scores["binoculars"] == pytest.approx(expected, rel=1e-5)


def test_a_human_verdict_needs_machines_to_compare_with(spot, books, written):
    made = SpotDetector.from_pretrained(SOURCE)
    machine = [written[0][k : k + 600] for k in range(25)]
    made.calibrate([text[k : k + 300] for text in books for k in (0, 230, 460, 690)], fpr=0.01, machine_texts=machine)
    found = made.detect([text[:270] for text in books[:6]])
    human = [one for one in found if one.verdict == "human"]
    assert len(human) >= 3, found
    assert "machines other than those are not covered" in human[0].reason
    assert made.detect(written[0][:280])[0].verdict == "machine"


def test_the_class_is_public():
    assert hf_lowbit.SpotDetector is SpotDetector


def test_the_shipped_calibration_holds_and_says_what_it_is_of(spot):
    found = Calibration.load(SOURCE / FILE_NAME)
    assert spot.calibration == found
    assert (found.fpr, found.language, found.shortest) == (0.01, "en", 60)
    assert "public-domain books" in found.source
    assert all(len(scores) >= 99 for b in found.bins for scores in b.human.values())
    assert found.bins[-1].high is None
    assert all(math.isfinite(x) for b in found.bins for scores in b.human.values() for x in scores)


def test_requests_that_cannot_be_served(spot, tmp_path):
    with pytest.raises(BadRequest, match="without its tokenizer"):
        SpotDetector.from_pretrained(spot.scorer.model)
    with pytest.raises(BadRequest, match=r"unknown score 'spott'. Did you mean 'spot'"):
        SpotDetector.from_pretrained(SOURCE, score="spott")
    with pytest.raises(BadRequest, match="'binoculars' compares two models; give the detector an observer"):
        spot.detect("x", score="binoculars")
    with pytest.raises(BadRequest, match="neither a directory here nor a Hub id"):
        SpotDetector.from_pretrained(str(tmp_path / "nowhere"))
    for texts, kind in (([b"x"], "bytes"), (["x", None], "NoneType"), ([Path("x")], "PosixPath")):
        with pytest.raises(BadRequest, match=f"is a {kind}, not a string"):
            spot.detect(texts)
    assert spot.detect([]) == []
    assert isinstance(spot.detect("")[0], Detection)
