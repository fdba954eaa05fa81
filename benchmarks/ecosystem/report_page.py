"""Take screenshots in headless Chromium: of `rankaware report`'s page, and of README's first screen in light and dark.

    python benchmarks/ecosystem/report_page.py

It needs playwright and Chromium, which python tests/environments/browser/chromium.py installs. README is rendered by
markdown-it with GitHub's colours, widths and type sizes, as read off GitHub by eye: its fonts and page are not GitHub's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from rankaware_optim import Recipe
from rankaware_optim.reports import write_report

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "efficientnet-lite0-digits.toml"
RESULTS = ROOT / "benchmarks" / "results"
STYLE = """
:root { color-scheme: light dark; }
body { margin: 32px; font: 16px/1.5 "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif;
  color: light-dark(#1f2328, #f0f6fc); background: light-dark(#ffffff, #0d1117); }
a { color: light-dark(#0969da, #4493f8); }
h1, h2 { border-bottom: 1px solid light-dark(#d1d9e0, #3d444d); padding-bottom: .3em; line-height: 1.25; }
h1 { font-size: 2em; margin: 0 0 16px; } h2 { font-size: 1.5em; margin: 24px 0 16px; }
p, pre { margin: 0 0 16px; }
code { font: 85% Consolas, "Liberation Mono", monospace; padding: .2em .4em; border-radius: 6px;
  background: light-dark(#818b981f, #656c7633); }
pre { padding: 16px; border-radius: 6px; overflow: auto; line-height: 1.45; background: light-dark(#f6f8fa, #151b23); }
pre code { padding: 0; background: none; }
img { max-width: 100%; }
.gi { color: light-dark(#116329, #aff5b4); background: light-dark(#dafbe1, #033a16); }
.gd { color: light-dark(#82071e, #ffdcd7); background: light-dark(#ffebe9, #67060c); }
.k, .kn, .o { color: light-dark(#cf222e, #ff7b72); }
.s, .s2 { color: light-dark(#0a3069, #a5d6ff); }
.mf, .mi { color: light-dark(#0550ae, #79c0ff); }
.c1 { color: light-dark(#59636e, #9198a1); }
"""


def main() -> None:
    """Take all three."""
    options = {
        "executable_path": shutil.which("chromium"),
        "args": ["--no-sandbox"] if os.geteuid() == 0 else [],
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        print(report_page(browser, Path(folder) / "report.html"))
        for scheme in ("light", "dark"):
            print(readme(browser, Path(folder) / "readme.html", scheme))


def report_page(browser: Any, path: Path) -> Path:
    """The recipe's page at rank 32 and alpha 16, as wide as a laptop's window."""
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.goto(write_report(Recipe.load(RECIPE), path).as_uri())
    page.get_by_label("Rank", exact=True).fill("32")
    page.get_by_label("Alpha", exact=True).fill("16")
    page.screenshot(path=RESULTS / "report.png", full_page=True)
    return RESULTS / "report.png"


def readme(browser: Any, path: Path, scheme: str) -> Path:
    """README's first screen, as wide as GitHub's column is in a window of 1280 pixels."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = MarkdownIt("gfm-like", {"highlight": coloured}).disable("linkify")
    head = f'<meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{STYLE}</style>'
    path.write_text(f"<!doctype html>{head}{body.render(text)}", encoding="utf-8")
    size = {"width": 894, "height": 1000}
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(path.as_uri())
    page.screenshot(path=RESULTS / f"readme-{scheme}.png")
    return RESULTS / f"readme-{scheme}.png"


def coloured(code: str, language: str, _: str) -> str:
    """Code with the classes of pygments."""
    lexer = get_lexer_by_name(language or "text")
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))


if __name__ == "__main__":
    main()
