"""Take a screenshot of `rankaware report`'s page, with a rank and an alpha entered, in headless Chromium.

    python benchmarks/ecosystem/report_page.py

It needs playwright and Chromium, which python tests/environments/browser/chromium.py installs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from rankaware_optim import Recipe
from rankaware_optim.reports import write_report

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "efficientnet-lite0-digits.toml"
RESULT = ROOT / "benchmarks" / "results" / "report.png"


def main() -> None:
    """Take it at rank 32 and alpha 16, as wide as a laptop's window."""
    options = {
        "executable_path": shutil.which("chromium"),
        "args": ["--no-sandbox"] if os.geteuid() == 0 else [],
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = playwright.chromium.launch(**options).new_page(
            viewport={"width": 1100, "height": 800}
        )
        page.goto(
            write_report(Recipe.load(RECIPE), Path(folder) / "report.html").as_uri()
        )
        page.get_by_label("Rank", exact=True).fill("32")
        page.get_by_label("Alpha", exact=True).fill("16")
        page.screenshot(path=RESULT, full_page=True)
    print(RESULT)


if __name__ == "__main__":
    main()
