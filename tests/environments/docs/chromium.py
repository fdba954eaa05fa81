"""A headless Chromium: playwright's own where it was downloaded, else the system's.

Run as a script, it installs one where there is none: playwright's, or, where that download is blocked, apt's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

DOWNLOAD_S = 300


def found(playwright: Any) -> str | None:
    """The path of a Chromium on this machine, or None."""
    own = playwright.chromium.executable_path
    names = ("chromium", "chromium-browser", "google-chrome")
    if Path(own).exists():
        return own
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; Chromium's sandbox refuses root."""
    with sync_playwright() as playwright:
        path = found(playwright)
        if path is None:
            raise FileNotFoundError(
                f"There is no Chromium. Run python {__file__}, or install one."
            )
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


def install() -> None:
    """playwright's download, or else Debian's package; root may do without sudo."""
    try:
        download = [sys.executable, "-m", "playwright", "install", "chromium"]
        if subprocess.run(download, timeout=DOWNLOAD_S).returncode == 0:
            return
    except subprocess.TimeoutExpired:
        print("playwright's download did not come; trying apt.", file=sys.stderr)
    apt = ["apt-get"] if os.geteuid() == 0 else ["sudo", "apt-get"]
    subprocess.run([*apt, "update", "-q"], check=True)
    options = ["-q", "-y", "--no-install-recommends"]
    subprocess.run([*apt, "install", *options, "chromium"], check=True)


if __name__ == "__main__":
    with sync_playwright() as api:
        missing = found(api) is None
    if missing:
        install()
