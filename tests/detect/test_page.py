"""The web page: what it answers, and in a real browser everything a visitor does, without any network."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
from pathlib import Path

import pytest

from hf_lowbit import demo
from hf_lowbit.detect import serve
from hf_lowbit.errors import BadRequest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
EXAMPLES = dict(demo.example_texts())
ATTACK = "<script>window.hit=1</script><img src=x onerror='window.hit=1'> ${window.hit=1} {{window.hit=1}} "


def test_answers_are_markup_and_texts_are_not(spot):
    page = serve.answer(spot, ATTACK * 20, "fast_detectgpt")
    assert "No verdict" in page and "<script" not in page and "<img" not in page
    assert "There is no text yet" in serve.answer(spot, "", "spot")
    assert "There is no text yet" in serve.answer(spot, None, "spot")
    assert "unknown score &#x27;x&lt;&#x27;" in serve.answer(spot, "text", "x<")


def test_files_that_are_no_texts_are_errors(spot, tmp_path):
    (tmp_path / "b<i>.bin").write_bytes(b"\0\1\2")
    text, page = serve.uploaded(spot, str(tmp_path / "b<i>.bin"), "spot")
    assert (text, 'role="alert"' in page, "b&lt;i&gt;.bin" in page, "NUL bytes" in page) == ("", True, True, True)
    assert "cannot be read: No such file" in serve.uploaded(spot, str(tmp_path / "gone"), "spot")[1]
    assert serve.uploaded(spot, None, "spot") == ("", serve.WAITING)


def test_without_gradio_it_says_what_to_install(spot, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(BadRequest, match=r"needs Gradio .*: pip install 'hf-lowbit\[serve\]'"):
        serve.run(spot, 7860, [])


@pytest.mark.skipif("gradio" in MISSING, reason="needs gradio, as pip install -e '.[serve]' brings")
def test_a_port_that_is_taken(spot):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BadRequest, match=rf"port {port} cannot be used .* Choose another with --port"):
            serve.run(spot, port, [])


@pytest.fixture(scope="module")
def address(spot):
    if MISSING:
        pytest.skip(f"{' and '.join(MISSING)} not installed: pip install -e '.[dev]'")
    page = serve.build(spot, demo.example_texts())
    _, url, _ = serve.launch(page, None)
    yield url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    if MISSING or CHROMIUM is None:
        pytest.skip(f"no {' and '.join(MISSING) or 'chromium'} here: apt-get install chromium, pip install -e '.[dev]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_a_visit(browser, address, tmp_path):
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, color_scheme="light")
    # Everything that is not this machine is cut off, and noted.
    context.route(lambda url: not url.startswith((address, "data:", "blob:")), lambda route: route.abort())
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(address)
    text, verdict = page.locator("#text textarea"), page.locator("#result .lb-verdict h2")

    text.fill(EXAMPLES["a model, temperature 0.7"])  # paste and detect, with the keyboard alone
    text.press("Tab")
    page.locator("#detect").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Reads like a machine's").wait_for()
    assert "at most 1 % get this verdict" in page.locator("#result .lb-verdict").inner_text()
    heat = page.locator("#result .lb-heat")
    assert heat.is_visible() and heat.locator("span[title^=rank]").count() > 100
    assert page.locator("#result .lb-strip span").count() >= 2
    assert "It is not the probability" in page.locator("#result").inner_text()
    heat.focus()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Token heat map"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "detect-light.png", full_page=True)
    page.get_by_role("button", name="Dark or light").click()
    assert "dark" in page.evaluate("document.body.className")
    page.screenshot(path=SCREENSHOTS / "detect-dark.png", full_page=True)

    page.locator("#score input").click()  # another score decides
    page.get_by_role("option", name="SPOT originality").click()
    page.locator("#detect").click()
    page.get_by_text("SPOT originality (decides)").wait_for()

    page.get_by_role("button", name="too short").click()  # an example that must not get a verdict
    page.wait_for_function("wanted => document.querySelector('#text textarea').value == wanted", arg=EXAMPLES["too short"])
    page.locator("#detect").click()
    page.get_by_text("the calibration starts at 60").wait_for()
    assert verdict.inner_text() == "No verdict"

    text.fill(ATTACK * 20)  # text is data
    page.locator("#detect").click()
    page.get_by_text("Outside the calibration").wait_for()
    assert page.evaluate("window.hit") is None

    page.locator("#clear").click()
    page.get_by_text("The result appears here.").wait_for()
    page.locator("#detect").click()
    page.get_by_text("There is no text yet").wait_for()

    (tmp_path / "person.txt").write_text(EXAMPLES["a person, from a book"], encoding="utf-8")
    page.locator("#file input[type=file]").set_input_files(tmp_path / "person.txt")
    page.get_by_text("No sign of a machine").wait_for()
    assert text.input_value() == EXAMPLES["a person, from a book"]
    page.locator("#clear").click()
    page.get_by_text("The result appears here.").wait_for()
    (tmp_path / "picture.png").write_bytes(bytes(range(256)) * 9)
    page.locator("#file input[type=file]").set_input_files(tmp_path / "picture.png")
    page.locator("#result [role=alert]").wait_for()
    assert "NUL bytes" in page.locator("#result [role=alert]").inner_text()

    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    context.close()
