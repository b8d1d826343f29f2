"""Thresholds keep their rate, files keep their content, and a calibration serves one detector."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hf_lowbit.detect import Detector
from hf_lowbit.detect.calibrate import EDGES
from hf_lowbit.detect.calibration import Bin, Calibration, Threshold, check_detector, needed, threshold
from hf_lowbit.errors import BadRequest, FormatError

WORDS = ("the", "of", "and", "to", "a", "in", "that", "he", "was", "it", "his", "with", "as", "had", "for", "her", "at")


def prose(seed: int, length: int = 150) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length))[:length]  # a byte is a token


@pytest.fixture
def people() -> list[str]:
    return [prose(seed) for seed in range(130)]


@pytest.fixture
def calibrated(toy, people) -> Detector:
    return toy.calibrate(people, fpr=0.01)


@pytest.mark.parametrize(("fpr", "texts"), [(0.5, 1), (0.05, 19), (0.01, 99), (0.001, 999), (0.0001, 9999)])
def test_a_rate_takes_so_many_texts(fpr, texts):
    assert needed(fpr) == texts
    # With one text less the order statistic asked for is not there; with that many it is the largest.
    assert np.ceil((texts + 1) * (1 - fpr) - 1e-9) == texts
    assert np.ceil(texts * (1 - fpr) - 1e-9) > texts - 1


@pytest.mark.parametrize(("fpr", "texts"), [(0.01, 99), (0.05, 150), (0.1, 40)])
def test_the_false_positive_rate_is_kept_over_many_calibrations(fpr, texts):
    draw = np.random.default_rng(0)
    flagged = np.empty(1000)
    for repeat in range(1000):
        scores, new = draw.standard_t(3, texts), draw.standard_t(3, 200)
        bound = threshold(scores, range(texts), fpr).value if repeat < 3 else None
        k = int(np.ceil((texts + 1) * (1 - fpr) - 1e-9))
        exact = np.sort(scores)[k - 1]
        assert bound is None or bound == exact
        flagged[repeat] = (new > exact).mean()
    # Exchangeable, so the mean is known: 1 - k / (n + 1), at most the rate asked for.
    assert flagged.mean() == pytest.approx(1 - k / (texts + 1), rel=0.15)
    assert flagged.mean() < fpr * 1.1


def test_p_value_and_threshold_say_the_same():
    draw = np.random.default_rng(1)
    for texts in (99, 100, 150, 250):
        scores = sorted(draw.normal(size=texts).round(1).tolist())  # with ties
        found = Bin(50, None, {"x": scores}, {}, {"x": threshold(scores, range(texts), 0.01)}, {})
        for value in [*scores, *(score + 0.05 for score in scores)]:
            p_value = found.p_value("x", value)
            assert p_value == pytest.approx((1 + sum(score >= value for score in scores)) / (texts + 1))
            assert (p_value <= 0.01) == (value > found.thresholds["x"].value)


def test_the_bootstrap_draws_whole_groups():
    draw = np.random.default_rng(2)
    means = draw.normal(size=10).repeat(20)
    scores = means + 0.01 * draw.normal(size=200)
    by_group = threshold(scores, np.arange(10).repeat(20), 0.05)
    alone = threshold(scores, range(200), 0.05)
    assert by_group.value == alone.value
    assert by_group.low <= by_group.value <= by_group.high
    assert by_group.high - by_group.low > 3 * (alone.high - alone.low)


def test_few_texts_for_the_rate_are_refused(toy, people):
    with pytest.raises(BadRequest, match=r"fpr=0.0001 takes at least 9,999 human texts of 60 tokens or more; 5 were given"):
        toy.calibrate(people[:5], fpr=0.0001)
    with pytest.raises(BadRequest, match=r"at least 99 human texts .* 130 were given, 98 of them long enough"):
        toy.calibrate(people[:98] + ["Too short."] * 32)
    with pytest.raises(BadRequest, match="0 were given"):
        toy.calibrate([])
    assert toy.calibration is None


@pytest.mark.parametrize("fpr", [0, -1, 0.7, 1, float("nan")])
def test_rates_that_are_none_are_refused(toy, people, fpr):
    with pytest.raises(BadRequest, match=r"a false-positive rate lies above 0 and is 0\.5 at most"):
        toy.calibrate(people, fpr=fpr)
    with pytest.raises(BadRequest, match="called a person's lies above 0"):
        toy.calibrate(people, fnr=fpr)


def test_groups_and_texts_of_the_wrong_kind_are_refused(toy, people):
    with pytest.raises(BadRequest, match="groups has 3 values for 130 human texts"):
        toy.calibrate(people, groups=[1, 2, 3])
    with pytest.raises(BadRequest, match="text 1 is a bytes, not a string"):
        toy.calibrate([people[0], b"bytes"])


def test_lengths_without_enough_texts_get_no_bin(toy, people):
    long = [prose(seed, 350) for seed in range(98)]
    toy.calibrate([*people, *long])
    assert [(b.low, b.high) for b in toy.calibration.bins] == [(60, 100), (100, 200)]
    assert toy.calibration.bin_for(59) is None
    assert toy.calibration.bin_for(199).low == 100
    assert toy.calibration.bin_for(200) is None
    toy.calibrate([prose(seed, 420) for seed in range(99)])
    assert [b.low for b in toy.calibration.bins] == list(EDGES)
    assert toy.calibration.bin_for(10**6).low == EDGES[-1]


def test_it_is_the_same_after_saving(calibrated, tmp_path):
    made = calibrated.calibration
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == made
    calibrated.use(Calibration.load(tmp_path / "c.json"))
    assert all(len(line) < 5000 for line in (tmp_path / "c.json").read_text().splitlines())
    strange = Calibration(made.detector, 0.01, 0.05, "en", 'a "[1,\n 2]" source', made.common, made.bins)
    strange.save(tmp_path / "d.json")
    assert Calibration.load(tmp_path / "d.json") == strange


def test_the_same_texts_give_the_same_calibration(toy, people):
    first = toy.calibrate(people).calibration
    assert toy.calibrate(people).calibration == first


def test_another_detector_is_refused(calibrated, scorer):
    other = Detector(scorer, {"name": "toy", "weights": "b", "quantization": "rtn, 4 bits, groups of 32"})
    with pytest.raises(BadRequest) as refused:
        other.use(calibrated.calibration)
    for part in (
        "another detector (toy)",
        "quantization was null, is",
        "rtn, 4 bits",
        'weights was "a", is "b"',
        "calibrate",
    ):
        assert part in str(refused.value)
    assert other.calibration is None
    check_detector({"name": "here", "weights": "a"}, {"name": "moved", "weights": "a"})


DAMAGE = {
    "{": "damaged: not JSON",
    "[]": "is no calibration of a detector",
    '{"format": "hf-lowbit detector calibration", "version": 2}': "has version 2, this hf-lowbit reads 1",
    '{"format": "hf-lowbit detector calibration", "version": 1}': "damaged .KeyError",
}


@pytest.mark.parametrize(("content", "message"), DAMAGE.items(), ids=DAMAGE.values())
def test_a_damaged_file_is_an_error(content, message, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        Calibration.load(tmp_path / "c.json")


@pytest.mark.parametrize("key", ["detector", "fpr", "common", "bins"])
@pytest.mark.parametrize("value", [None, "text", [], {"a": 1}])
def test_a_field_of_another_kind_is_an_error(calibrated, tmp_path, key, value):
    calibrated.calibration.save(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    if (key, value) in (("common", []), ("common", {"a": 1}), ("common", "text"), ("detector", {"a": 1}), ("detector", [])):
        return  # these are lists of words and mappings
    content[key] = value
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="damaged"):
        Calibration.load(tmp_path / "c.json")


def test_a_place_that_cannot_be_read_or_written(calibrated, tmp_path):
    with pytest.raises(BadRequest, match=r"cannot read .*No such file"):
        Calibration.load(tmp_path / "nowhere")
    with pytest.raises(BadRequest, match=r"cannot write .*Is a directory"):
        calibrated.calibration.save(Path(tmp_path))


def test_a_verdict_of_human_needs_scores_that_speak_for_it():
    people = sorted(np.linspace(0, 1, 100).tolist())

    def bound(machine: list[float]) -> float | None:
        return Bin(50, None, {"x": people}, {"x": sorted(machine)}, {"x": Threshold(1, 1, 1)}, {}).human_threshold("x", 0.05)

    apart = np.linspace(0.9, 2, 100)
    assert bound(apart.tolist()) == apart[4]  # the fifth of 100: below it are 4, of 100 at most 5 %
    assert bound(people) is None  # machines that score as people do
    assert bound(apart[:10].tolist()) is None  # ten texts cannot hold a rate of 5 %
    assert bound([]) is None
