"""The web page: paste a text or drop a file, see the verdict with its error rate, and what it rests on.

It is served to this machine only, and nothing on it is loaded from elsewhere: no fonts, no scripts, no telemetry.
"""

from __future__ import annotations

import html
import sys
from pathlib import Path
from typing import Any

from hf_lowbit.detect import report
from hf_lowbit.detect.detector import Detector
from hf_lowbit.detect.inputs import Input
from hf_lowbit.errors import BadRequest, LowBitError

TITLE = "Who wrote this text?"
INTRODUCTION = (
    "A language model reads the text and notes how well it could have guessed every token. Machines choose likely tokens "
    "more evenly than people do. The verdict compares that with people's texts, or abstains."
)
WAITING = '<div class="lb-detect lb-empty" role="status">The result appears here.</div>'
STYLE = (
    report.STYLE
    + """
.lb-empty { padding: 3em 1em; text-align: center; opacity: .7; border: 1px dashed #8886; border-radius: .3em; }
.lb-error { border-left: .5em solid #b91c1c; padding: .7em 1em; background: #b91c1c22; border-radius: .3em;
  font: 16px/1.5 system-ui, sans-serif; }
#switch { align-self: flex-start; margin-top: .8em; }
.gradio-container { max-width: 80em !important; margin: 0 auto; }
"""
)
# Follows the system's light or dark until the button is used.
SWITCH = "() => { document.body.classList.toggle('dark'); }"


def build(detector: Detector, examples: list[tuple[str, str]]) -> Any:
    """The page as ``gradio.Blocks``.

    Args:
        detector: answers.
        examples: label and text of each text to try.

    Raises:
        BadRequest: Gradio is not installed.
    """
    gr = _gradio()
    choices = [(score.title, score.name) for score in detector.scores]
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        with gr.Row():
            gr.Markdown(f"# {TITLE}\n{INTRODUCTION}")
            switch = gr.Button("Dark or light", size="sm", scale=0, min_width=130, elem_id="switch")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Text", lines=14, max_lines=22, placeholder="Paste a text here.", elem_id="text")
                file = gr.File(label="or a text file (UTF-8)", file_count="single", height=140, elem_id="file")
                score = gr.Dropdown(
                    choices, value=detector.score, label="Score the verdict rests on", elem_id="score", interactive=True
                )
                with gr.Row():
                    clear = gr.Button("Clear", elem_id="clear")
                    button = gr.Button("Detect", variant="primary", elem_id="detect")
                if examples:
                    gr.Examples(
                        [[example] for _, example in examples],
                        [text],
                        label="To try",
                        example_labels=[e for e, _ in examples],
                    )
            with gr.Column():
                result = gr.HTML(WAITING, elem_id="result")
        with gr.Accordion("The detector and its calibration", open=False):
            gr.HTML(f'<div class="lb-detect">{_about(detector)}</div>')
        button.click(lambda t, s: answer(detector, t, s), [text, score], result)
        text.submit(lambda t, s: answer(detector, t, s), [text, score], result)
        file.upload(lambda f, s: uploaded(detector, f, s), [file, score], [text, result])
        clear.click(lambda: ("", None, WAITING), None, [text, file, result])
        switch.click(None, None, None, js=SWITCH)
    return page


def run(detector: Detector, port: int, examples: list[tuple[str, str]]) -> None:
    """Serve the page on this machine until interrupted.

    Raises:
        BadRequest: Gradio is not installed, or the port is taken.
    """
    page = build(detector, examples)
    try:
        _, url, _ = launch(page, port, inbrowser=sys.stdout.isatty())
    except OSError as error:
        raise BadRequest(f"port {port} cannot be used ({error}). Choose another with --port.") from error
    print(f"{url}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


def launch(page: Any, port: int | None, inbrowser: bool = False) -> tuple[Any, str, str]:
    """Start serving in the background; returns the application, its address, and nothing shared."""
    gr = _gradio()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=inbrowser,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(**fonts),
        css=STYLE,
    )


def answer(detector: Detector, text: str | None, score: str) -> str:
    """HTML of the result, or of the error, for a text."""
    if not text:
        return _error("There is no text yet. Paste one or choose a file.")
    try:
        (found,) = detector.detect(text, score)
    except LowBitError as error:
        return _error(str(error))
    return report.fragment(found)


def uploaded(detector: Detector, file: str | None, score: str) -> tuple[str, str]:
    """Text of a file, and HTML of its result or of the error."""
    if file is None:
        return "", WAITING
    one = Input(Path(file).name, Path(file))
    text, why = one.read()
    return ("", _error(f"{one.name}: {why}.")) if text is None else (text, answer(detector, text, score))


def _error(message: str) -> str:
    return f'<div class="lb-error" role="alert">{html.escape(message)}</div>'


def _about(detector: Detector) -> str:
    identity, calibration = detector.identity, detector.calibration
    kind = identity.get("quantization") or "high precision"
    out = f"<p>Detector: {html.escape(str(identity.get('name')))} ({html.escape(str(kind))}).</p>"
    if calibration is None:
        return f"{out}<p>It has no calibration, so there are scores and no verdicts.</p>"
    rows = ""
    for found in calibration.bins:
        bound, people = found.thresholds[detector.score], found.human[detector.score]
        end = f"{found.high - 1}" if found.high else "more"
        rows += (
            f"<tr><td>{found.low} to {end} tokens</td><td>{len(people)}</td>"
            f"<td>{bound.value:.3g} ({bound.low:.3g} to {bound.high:.3g})</td></tr>"
        )
    return (
        f"{out}<p>Calibrated on {html.escape(calibration.source)} ({html.escape(calibration.language)}), for "
        f"{100 * calibration.fpr:g} % false positives: of a thousand such texts by people about "
        f"{1000 * calibration.fpr:g} are called a machine's. Texts of other kinds are not covered.</p>"
        '<table class="lb-bins"><thead><tr><th>length</th><th>people\'s texts</th><th>threshold (95 % interval)</th></tr>'
        f"</thead><tbody>{rows}</tbody></table>"
    )


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise BadRequest(f"the web page needs Gradio ({error}): pip install 'hf-lowbit[serve]'.") from error
    return gradio
