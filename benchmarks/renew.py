"""Update everything that a change has made stale, and name what cannot be updated here.

    python benchmarks/renew.py                  # tox run -e renew
    python benchmarks/renew.py --data FOLDER    # FOLDER has other people's files, which two pages need

Golden tables and the numbers in prose are written by their tests. A page rests on the golden tables that its script
names in `RESTS_ON`, and shows their digests. If a case of such a table has changed, the page is made again by the
command that it names. If cases were only added or removed, the page gets the new digest. Nothing is trained, because
the runs of all pages are on file. Examples that now print other numbers are listed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import tomli
from recording import GOLDEN, RESULTS, digest, mark

ROOT = RESULTS.parents[1]
MARK = re.compile(r"\b([a-z]+)@[0-9a-f]{8}\b")
COMMAND = re.compile(r"^Command: `python (.+)`$", re.M)
WRITTEN = ("tests/test_golden.py", "tests/test_defaults.py")
PRINTED = ("tests/test_pages.py", "tests/test_examples.py")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def stale_pages() -> list[Path]:
    """Return the pages whose digest of a golden table is out of date."""
    return [page for page in sorted(RESULTS.glob("*.md")) if stale_marks(page)]


def stale_marks(page: Path) -> list[str]:
    found = MARK.finditer(page.read_text(encoding="utf-8"))
    return [each[0] for each in found if each[0] != mark(each[1])]


def write_numbers() -> None:
    """Write golden tables, the numbers in prose, and what the site's pages show."""
    run = subprocess.run([*PYTEST, *WRITTEN, "--write-golden"], cwd=ROOT, check=False)
    if run.returncode:
        raise click.ClickException(
            "The tests above failed, so golden tables were not written."
        )
    subprocess.run([sys.executable, "docs/shown.py"], cwd=ROOT, check=True)


def same_tables() -> Iterator[tuple[str, str]]:
    """Yield the old and new marks of tables in which cases were only added or removed since the commit."""
    for path in sorted(GOLDEN.glob("*.toml")):
        asked = ["git", "show", f"HEAD:./{path.name}"]
        shown = subprocess.run(asked, cwd=GOLDEN, capture_output=True, check=False)
        before, now = shown.stdout, path.read_bytes()
        if shown.returncode == 0 and before != now and not has_moved(before, now):
            yield f"{path.stem}@{digest(before)}", mark(path.stem)


def has_moved(before: bytes, now: bytes) -> bool:
    """Return whether a case that is in both versions of a table has changed."""
    old, new = tomli.loads(before.decode()), tomli.loads(now.decode())
    return any(
        old[title][case] != new[title][case]
        for title in old.keys() & new.keys()
        for case in old[title].keys() & new[title].keys()
    )


def renew_marks() -> None:
    for old, new in same_tables():
        for page in RESULTS.glob("*.md"):
            text = page.read_text(encoding="utf-8")
            page.write_text(text.replace(old, new), encoding="utf-8")


def make(page: Path, data: Path) -> str | None:
    """Make a page by its own command, and return why this fails, or None."""
    command = COMMAND.search(page.read_text(encoding="utf-8"))
    if command is None:
        return "it names no command"
    words = [place_of(word, data) for word in shlex.split(command[1])]
    missing = [word for word in words if is_file_name(word) and not Path(word).exists()]
    if missing:
        return f"not in the tree: {', '.join(missing)}. Give --data FOLDER"
    click.echo(f"{page.stem}: python {' '.join(words)}")
    paths = f"{RESULTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.returncode:
        return (run.stderr.strip().splitlines() or ["it ended with an error"])[-1]
    return None


def is_file_name(word: str) -> bool:
    return word.endswith((".csv", ".md", ".py"))


def place_of(word: str, data: Path) -> str:
    """Return the path for a word of a command, if it names a file of others or the folder of all of them."""
    if word == "FOLDER":
        return str(data)
    there = data / word
    return str(there) if is_file_name(word) and there.exists() else word


@click.command()
@click.option(
    "--data",
    default=".",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder that has other people's files.",
)
def main(data: Path) -> None:
    """Write golden tables, prose and stale pages. Exit with status 1 if something is still stale."""
    os.chdir(ROOT)
    write_numbers()
    renew_marks()
    reasons = {page: make(page, data) for page in stale_pages()}
    write_numbers()  # prose that quotes a page
    for page, reason in reasons.items():
        click.echo(f"{page.stem}: {'made again' if reason is None else reason}")
    click.echo(f"{len(stale_pages())} pages are stale.")
    printed = subprocess.run([*PYTEST, "--tb=line", *PRINTED], cwd=ROOT, check=False)
    if printed.returncode:
        click.echo("What these examples print is to be written by hand.")
    sys.exit(bool(stale_pages() or printed.returncode))


if __name__ == "__main__":
    main()
