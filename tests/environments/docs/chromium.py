"""A headless Chromium for the tests of the site.

Playwright's own Chromium is used if it was downloaded, otherwise that of the system. Run as a
script, this file installs Chromium if the machine has none. It downloads playwright's, or installs
Debian's package if the download fails.
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
    """Return the path of a Chromium on this machine, or None."""
    own = playwright.chromium.executable_path
    names = ("chromium", "chromium-browser", "google-chrome")
    if Path(own).exists():
        return own
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def launched() -> Iterator[Any]:
    """Yield a running browser. For root it starts without Chromium's sandbox, which root may not use."""
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
    """Download playwright's Chromium.

    If this fails, install Debian's package, with sudo unless the user is root.
    """
    try:
        download = [sys.executable, "-m", "playwright", "install", "chromium"]
        if subprocess.run(download, timeout=DOWNLOAD_S).returncode == 0:
            return
    except subprocess.TimeoutExpired:
        print("The download of Chromium timed out. Trying apt.", file=sys.stderr)
    apt = ["apt-get"] if os.geteuid() == 0 else ["sudo", "apt-get"]
    subprocess.run([*apt, "update", "-q"], check=True)
    options = ["-q", "-y", "--no-install-recommends"]
    subprocess.run([*apt, "install", *options, "chromium"], check=True)


if __name__ == "__main__":
    with sync_playwright() as api:
        missing = found(api) is None
    if missing:
        install()
