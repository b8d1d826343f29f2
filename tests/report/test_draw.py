"""What drawings promise: labels that do not cover each other, areas that add up, colours that can be read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.report import charts, palette
from hf_lowbit.report.draw import element, linear_ticks, log_ticks, place_labels, squarify, width_of, words
from hf_lowbit.report.facts import Point
from hf_lowbit.report.points import frontier
from hf_lowbit.report.sections import differing

SIZES = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=60)


def test_attributes_and_words_are_escaped():
    assert words(1, 2.5, "<b>&\"'") == '<text x="1" y="2.5">&lt;b&gt;&amp;&quot;&#x27;</text>'
    assert element("g", class_='a"><script>') == '<g class="a&quot;&gt;&lt;script&gt;"/>'


@given(SIZES, st.floats(10, 500), st.floats(10, 500))
def test_a_treemap_fills_its_plane_with_the_given_areas(sizes, width, height):
    sizes = sorted(sizes, reverse=True)
    boxes = squarify(sizes, width, height)
    assert len(boxes) == len(sizes)
    for size, (x, y, w, h) in zip(sizes, boxes, strict=True):
        assert w * h == pytest.approx(size / sum(sizes) * width * height, rel=1e-6)
        slack = 1e-6 * (width + height)
        assert -slack <= x and -slack <= y and x + w <= width + slack and y + h <= height + slack


def test_a_treemap_of_like_parts_is_nearly_square():
    for _, _, w, h in squarify([1.0] * 36, 160, 100):
        assert 0.4 < w / h < 2.5


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(60, 400), st.floats(20, 290), st.text("ab", min_size=1, max_size=24)), max_size=25))
def test_labels_cover_neither_points_nor_one_another(anchors):
    bounds, size, radius = (52.0, 14.0, 416.0, 294.0), 11, 4.5
    spots = place_labels(anchors, size, bounds, radius)
    boxes = [(x, y - 0.8 * size, x + width_of(a[2], size), y + 0.2 * size) for a, s in zip(anchors, spots, strict=True)
             if s is not None for x, y in [s]]  # fmt: skip
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert bounds[0] <= left and right <= bounds[2] and bounds[1] <= top and bottom <= bounds[3]
        for other in boxes[number + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
        for x, y, _ in anchors:
            assert x + radius <= left or right <= x - radius or y + radius <= top or bottom <= y - radius


def test_the_only_label_is_drawn():
    assert place_labels([(200, 100, "alone")], 11, (50, 10, 400, 300), 4)[0] is not None


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_round_and_inside(low, span):
    ticks = linear_ticks(low, low + span)
    assert 1 <= len(ticks) <= 12
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)


def test_log_ticks():
    assert log_ticks(0.004, 2) == pytest.approx([0.01, 0.1, 1])
    assert log_ticks(0.09, 0.6) == pytest.approx([0.1, 0.2, 0.5])


@pytest.mark.parametrize("theme", [0, 1])
def test_every_cell_can_be_read(theme):
    grounds = [colours[theme] for colours in palette.FILLS.values()]
    for ends in palette.SCALES.values():
        steps = [palette.mix(*ends[theme], step / (palette.STEPS - 1)) for step in range(palette.STEPS)]
        grounds += steps
        lightness = [palette.contrast(step, "#000000") for step in steps]
        assert lightness == sorted(lightness) or lightness == sorted(lightness, reverse=True)  # told apart without hue
    for ground in grounds:
        assert palette.contrast(palette.ink_on(ground), ground) >= 4.5, ground


def test_contrast_is_that_of_wcag():
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_equal_numbers_have_one_colour_and_a_wide_range_has_all():
    assert charts._range([3.25, 3.251]) == pytest.approx((2.9255, 3.5755), abs=1e-3)
    low, high = charts._range([3.25, 3.251])
    assert palette.step_of(3.25, low, high) == palette.step_of(3.251, low, high)
    low, high = charts._range([2.0, 8.0])
    assert [palette.step_of(v, low, high) for v in (2.0, 8.0)] == [0, palette.STEPS - 1]


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.001, 10)), min_size=1, max_size=30))
def test_the_frontier_holds_what_nothing_beats(pairs):
    points = [Point(str(number), size, kl) for number, (size, kl) in enumerate(pairs)]
    best = frontier(points, "kl")
    for point in points:
        beaten = any(
            p.bytes <= point.bytes and p.kl <= point.kl and (p.bytes, p.kl) != (point.bytes, point.kl) for p in points
        )
        same = any((p.bytes, p.kl) == (point.bytes, point.kl) for p in best)
        assert same != beaten


@given(st.lists(st.integers(0, 5), max_size=20), st.lists(st.integers(0, 5), max_size=20))
def test_what_is_not_marked_is_the_same_in_both(ours, theirs):
    left, right = differing(ours, theirs)
    kept = [token for place, token in enumerate(ours) if place not in left]
    assert kept == [token for place, token in enumerate(theirs) if place not in right]
    assert (not left and not right) == (ours == theirs)


def test_bytes_in_words():
    assert [charts.bytes_of(n) for n in (12, 4608, 2_129_136, 3.2e9)] == ["12 bytes", "4.61 kB", "2.13 MB", "3.2 GB"]


def test_names_are_short_unless_they_would_be_alike():
    assert charts.short_names(["self_attn.q_proj", "mlp.down_proj"]) == ["q", "down"]
    assert charts.short_names(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"]) == ["attn.c_proj", "mlp.c_proj", "c_fc"]


def test_the_plane_draws_all_points_on_its_axes():
    points = [Point("a", 1_000_000, 0.2, 9.0), Point("b", 2_000_000, 0.02, 8.0, own=True), Point("c", 2_500_000, 0.05, 8.2)]
    drawn = charts.size_against_quality(points, "kl", "KL")
    assert drawn.count("<circle") == 3
    assert drawn.count('class="point own"') == 1 and drawn.count('class="point other"') == 1  # c is beaten by b
    assert "b: 2.00 MB, kl 0.02" in drawn
    assert not math.isnan(float(drawn.split('cx="')[1].split('"')[0]))
