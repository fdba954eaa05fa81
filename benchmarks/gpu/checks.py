"""The wrapper's tests that need a CUDA device (tests/environments/cuda), and the outcome of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
from gpu.setup import Setup
from recording import RESULTS, block, made_with

ROOT = RESULTS.parents[1]
TESTS, STORE = ROOT / "tests" / "environments" / "cuda", "tests.json"


def run(setup: Setup) -> None:
    """Run all tests, and replace the outcomes on file. This takes a minute."""
    if setup.over:
        return
    click.echo("the wrapper's tests")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            str(TESTS),
        ]
        environment = {**os.environ, "RANKAWARE_DEVICE": setup.device}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if not report.exists():
            raise click.ClickException(
                f"The tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        rows = [row_of(case) for case in ElementTree.parse(report).iter("testcase")]
    document = {"machine": setup.machine(), "rows": rows}
    setup.folder.mkdir(parents=True, exist_ok=True)
    (setup.folder / STORE).write_text(json.dumps(document, indent=1) + "\n")


def row_of(case: ElementTree.Element) -> dict[str, str]:
    """A test's name, its outcome (passed, skipped or failed), and the reason if it did not pass."""
    other = next(
        (child for child in case if child.tag in ("skipped", "failure", "error")), None
    )
    outcome = (
        "passed" if other is None else {"skipped": "skipped"}.get(other.tag, "failed")
    )
    why = "" if other is None else (other.get("message") or "").splitlines()[0]
    return {"test": case.get("name", ""), "outcome": outcome, "why": why}


def blocks(setup: Setup) -> Iterator[str]:
    """Table of the tests by name: how many cases passed, were skipped or failed, and why."""
    store = setup.folder / STORE
    if not store.exists():
        return
    document = json.loads(store.read_text())
    by_test: dict[str, list[dict[str, str]]] = {}
    for row in document["rows"]:
        by_test.setdefault(row["test"].partition("[")[0], []).append(row)
    outcomes = ("passed", "skipped", "failed")
    cells = []
    for name, rows in by_test.items():
        count = Counter(row["outcome"] for row in rows)
        why = "; ".join(dict.fromkeys(row["why"] for row in rows if row["why"]))
        cells.append(
            [
                name,
                *(str(count[outcome]) for outcome in outcomes),
                why.replace("|", "\\|") or "–",
            ]
        )
    yield block("The wrapper's tests", ["test", *outcomes, "why"], cells)
    yield made_with([document["machine"]])
