"""The page in a real browser: nothing is fetched, nothing runs off a telephone's screen, labels do not touch."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll('.chart .label')].map(label => label.getBoundingClientRect());
  return boxes.flatMap((a, n) => boxes.slice(n + 1).filter(b =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)).length; }"""
# Cells of the memory map whose words are drawn and do not fit.
CUT = """() => [...document.querySelectorAll('.map div')].filter(cell => {
  const words = cell.querySelector('span');
  return getComputedStyle(words).display != 'none'
    && (words.offsetWidth > cell.clientWidth + 1 || words.offsetHeight > cell.clientHeight + 1); }).length"""


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None or CHROMIUM is None:
        pytest.skip("no chromium or playwright here: apt-get install chromium, pip install -e '.[dev]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_opens(browser, reported, width, theme):
    asked: list[str] = []
    trouble: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    address = reported[0].as_uri()
    page.goto(address)
    assert asked == [address]
    assert trouble == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for heading in ("Size against quality", "Bits and error by block", "Levels and weights", "Memory map",
                    "Generation side by side", "Would a detector notice?"):  # fmt: skip
        assert page.get_by_role("heading", name=heading).is_visible()
    assert page.evaluate(OVERLAPS) == 0
    assert page.evaluate(CUT) == 0
    ground, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (sum(map(int, ground[4:-1].split(","))) > sum(map(int, ink[4:-1].split(",")))) == (theme == "light")
    if width == 1280 and theme == "light":
        page.get_by_text("Every tensor").click()
        assert page.get_by_role("rowheader", name="model.layers.0.mlp.up_proj.weight").is_visible()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report-{width}-{theme}.png", full_page=True)
    context.close()
