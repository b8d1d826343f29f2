"""The shell of every HTML page the package writes: one file, no script, nothing loaded, light or dark as the system is.

What goes into a page is data of models and texts: everything but the markup made here passes through :func:`escape`.
"""

from __future__ import annotations

import html

escape = html.escape

# Ink on ground has a contrast of 12 and more, muted text of 5 and more, in both themes.
STYLE = """
:root { color-scheme: light dark; --ground: #f6f6f3; --card: #ffffff; --line: #dedcd5; --ink: #1b1d21; --muted: #5a6068;
  --accent: #0b5cad; --warm: #b64a04; --soft: #e8eff8; --softwarm: #fbe6d3; }
@media (prefers-color-scheme: dark) { :root { --ground: #101215; --card: #181b1f; --line: #30353b; --ink: #e9ebee;
  --muted: #a3abb4; --accent: #78b6f5; --warm: #f5a868; --soft: #1d2b3a; --softwarm: #3d2a1a; } }
@media print { :root { color-scheme: light; --ground: #ffffff; --card: #ffffff; --line: #cfcfcf; --ink: #000000;
  --muted: #444444; --accent: #0b5cad; --warm: #b64a04; --soft: #e8eff8; --softwarm: #fbe6d3; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: var(--width, 56em); margin: 0 auto; padding: 2em 1.1em 4em; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
a { color: var(--accent); }
table { border-collapse: collapse; }
img { max-width: 100%; }
"""


def page(title: str, body: str, style: str = "", images: bool = False) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: markup.
        style: CSS beside the shell's own.
        images: whether the body holds pictures as ``data:`` addresses; nothing else may be loaded either way.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'" + ("; img-src data:" if images else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>{body}</main></body></html>\n"
    )
