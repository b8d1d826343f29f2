"""The page: whole and well-formed, every text escaped, nothing loaded, and what is missing is named."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest

from hf_lowbit import page as shell
from hf_lowbit.report.document import document
from hf_lowbit.report.facts import BINS, Continuation, Facts, Matrix, Measured, Point, Verdict

ATTACK = "<script>window.hit=1</script><img src=x onerror='hit()'>\"&{}"
VOID = {"meta", "br", "wbr", "line", "circle", "path", "polyline"}


class Reader(HTMLParser):
    """Elements in their order; fails on a tag that does not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def facts(word: str = "name", **changes) -> Facts:
    """Facts with every section in them, and ``word`` wherever a text may stand."""
    flat = tuple([1 / BINS] * BINS)
    one = Matrix("m.layers.0.mlp.up_proj.weight", (8, 8), False, "uniform", 2, 8, 900, 3.1, ((-1.0, 0.0, 0.5, 1.0),),
                 (0.1, 0.4, 0.4, 0.1), flat, flat, 0.12)  # fmt: skip
    two = dataclasses.replace(one, name=f"m.layers.1.{word}.weight", bytes=300, error=0.2)
    end = dataclasses.replace(one, name="m.embed.weight", end=True)
    values = {
        "name": word, "method": word, "settings": {"bits": 2, "levels": word}, "transforms": (word,), "file_bytes": 3000,
        "bits_per_weight_linears": 3.1, "bits_per_weight_model": 3.5, "bytes_by_kind": {"codes": 1800, "headers": 900},
        "high_precision": {word: (300, word)}, "matrices": (end, one, two), "reference": word, "reference_bytes": 12000,
        "measured": Measured(word, 100, 50, 9.0, 8.0, 0.1, 0.9),
        "points": (Point(word, 3000, 0.1, 9.0, "now", own=True), Point(word + "2", 4000, 0.05, 8.5, word)),
        "prompt": word, "continuations": (Continuation(word, (1, 2, 3), (word, " b", " c")),
                                          Continuation("other", (1, 4, 3), (word, " x", " c"))),
        "detector": word, "verdicts": (Verdict(word, word, word, 0.1, 3),), "left_out": {word: word},
        "versions": {"torch": word},
    }  # fmt: skip
    return Facts(**(values | changes))


def test_every_section_is_there_in_order():
    reader = read(document(facts()))
    headings = [attributes["id"] for tag, attributes in reader.found if tag == "h2"]
    assert headings == ["quality", "layers", "levels", "memory", "generation", "detector", "making", "missing"]
    sections = [attributes["aria-labelledby"] for tag, attributes in reader.found if tag == "section"]
    assert sections == headings
    assert [tag for tag, _ in reader.found].count("h1") == 1


def test_texts_are_data():
    page = document(facts(ATTACK))
    reader = read(page)
    assert {tag for tag, _ in reader.found}.isdisjoint({"script", "img", "iframe", "link", "object"})
    assert not [name for _, attributes in reader.found for name in attributes if name.startswith("on")]
    assert reader.text.count(ATTACK) >= 12
    assert page.count("window.hit") == page.count("&lt;script&gt;window.hit=1&lt;/script&gt;")


def test_nothing_is_loaded():
    page = document(facts())
    reader = read(page)
    assert [attributes for _, attributes in reader.found if {"src", "href"} & attributes.keys()] == []
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    policy = next(attributes["content"] for _, attributes in reader.found if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_shell_allows_pictures_only_where_there_are_some():
    assert "img-src" not in shell.page("a<b", "")
    assert "img-src data:" in shell.page("a<b", "", images=True)
    assert "<title>a&lt;b</title>" in shell.page("a<b", "")


def test_drawings_say_what_they_show():
    reader = read(document(facts()))
    drawn = [attributes for tag, attributes in reader.found if tag == "svg" or attributes.get("role") == "img"]
    assert len(drawn) >= 5
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 10 for attributes in drawn)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"measured": None, "points": ()}, "quality"),
        ({"continuations": ()}, "generation"),
        ({"verdicts": ()}, "detector"),
        ({"left_out": {}}, "missing"),
    ],
)
def test_what_is_not_known_is_not_there(changes, gone):
    headings = [attributes["id"] for tag, attributes in read(document(facts(**changes))).found if tag == "h2"]
    assert gone not in headings and "layers" in headings


def test_without_an_original_there_is_no_error_and_perplexity_decides():
    matrices = tuple(dataclasses.replace(m, error=None, reference_histogram=None) for m in facts().matrices)
    points = (Point("us", 3000, None, 9.0, own=True), Point("them", 4000, 0.2, 8.5))
    measured = Measured("text", 100, 50, 9.0)
    reader = read(document(facts(matrices=matrices, points=points, measured=measured, reference=None, reference_bytes=None)))
    assert "Relative error" not in reader.text and "times smaller" not in reader.text
    assert "them: 0.00 MB, perplexity 8.5" in reader.text


def test_differing_tokens_are_marked_and_others_are_not():
    page = document(facts())
    assert "<mark> b</mark>" in page and "<mark> x</mark>" in page and "<mark> c" not in page
    assert "The first 1 of 3 tokens are the same" in page


def test_models_without_blocks_have_a_page():
    ends = tuple(m for m in facts().matrices if m.end)
    assert "Memory map" in read(document(facts(matrices=ends))).text
