"""Write the code, outputs and tables that pages show between their markers.

    python docs/shown.py    # rewrites the pages; a test of `core` compares them

A marker names the text below it, up to `<!-- end -->`:

    <!-- shown: rankaware convert 2e-4 --from r=16,alpha=16 --to r=64,alpha=64 | head -1 -->
    <!-- shown: examples/peft_loop.py from "import" before "# %%" -->
    <!-- shown: recipes/SCHEMA.md before "## NAME.toml" -->
    <!-- shown: table of moves -->

Below a marker that begins with `names of` stands a list of those names, with signatures. The marker holds the
directive that the site shows in its place. A page is read on GitHub too, where no directive of a site works.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import rankaware_optim as ra
from rankaware_optim.calibration._constants import TRIALS_PER_RANK
from rankaware_optim.cli import main as rankaware

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BLOCK = re.compile(r"(<!-- shown: (.+?)\s-->\n).*?(<!-- end -->)", re.S)
PART = re.compile(r'(\S+)(?: from "(.+?)")?(?: before "(.+?)")?')
PROPERTIES = (property, cached_property)
MOST_FIELDS = 10
CUT = re.compile(r"(.+) \| (head|tail) -(\d+)")

# mean and largest fan-in of an 8B Llama's linear layers
WIDTH, LARGEST = 6853.0, 14336.0
A16, B16 = (ra.Reference(16, 16, init=init, fan_in=WIDTH) for init in ("A", "B"))
FULL = ra.Reference(method="full", fan_in=LARGEST)
MOVES = (  # what changes, from, to, how sure
    (
        "rank 16 → 128, alpha = rank",
        A16,
        replace(A16, rank=128, alpha=128),
        "theory, measured",
    ),
    ("rank 16 → 128, alpha fixed", A16, replace(A16, rank=128), "theory, measured"),
    (
        "rank 16 → 128 with rsLoRA, alpha fixed",
        replace(A16, rslora=True),
        replace(A16, rank=128, rslora=True),
        "theory; one seed measured",
    ),
    (
        "rank 16 → 128 at init B, alpha = rank",
        B16,
        replace(B16, rank=128, alpha=128),
        "measured, against theory",
    ),
    (
        "alpha × 2 at one rank, one learning rate for A, one for B",
        None,
        None,
        "exact (Adam, no clipping)",
    ),
    ("alpha × 2 at one rank, one learning rate", A16, replace(A16, alpha=32), "theory"),
    (
        "width × 4",
        A16,
        replace(A16, fan_in=4 * WIDTH),
        "theory; on published models an unchanged learning rate does as well",
    ),
    ("LoRA at rank 16 → full finetuning", A16, FULL, "rule of thumb: calibrate"),
    (
        "LoRA at rank 16, init B → full finetuning",
        B16,
        replace(FULL, fan_in=WIDTH),
        "rule of thumb: calibrate",
    ),
    ("batch × 4", replace(A16, batch=16), replace(A16, batch=64), "rule of thumb"),
)


def pages() -> list[Path]:
    """The pages that people write, which may have markers."""
    made = ("_build/", "generated/", "examples/", "benchmarks/")
    every = sorted(DOCS.rglob("*.md"))
    return [p for p in every if not p.relative_to(DOCS).as_posix().startswith(made)]


def written(page: str) -> str:
    """Return a page's text with every block written again."""
    return BLOCK.sub(lambda block: f"{block[1]}{shown(block[2])}\n{block[3]}", page)


def shown(what: str) -> str:
    """Return the block that a marker asks for."""
    if what.startswith("rankaware "):
        return output_of(what)
    if what.startswith("names of"):
        return "\n".join(listed(re.findall(r"^   ([A-Za-z_.]+)$", what, re.M)))
    if what in TABLES:
        return "\n".join(TABLES[what]())
    return part_of(what)


def output_of(command: str) -> str:
    """Return a shell command with its output."""
    cut = CUT.fullmatch(command)
    lines = printed(cut[1] if cut else command)
    if cut:
        count = int(cut[3])
        lines = lines[:count] if cut[2] == "head" else lines[-count:]
    return "\n".join(["```text", f"$ {command}", *lines, "```"])


def printed(command: str) -> list[str]:
    """Run a command in the repository's root and return the lines that it prints."""
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        runner = CliRunner(env={"COLUMNS": "80"})
        words = shlex.split(command)[1:]
        ran = runner.invoke(rankaware, words, prog_name="rankaware")
    finally:
        os.chdir(here)
    if ran.exit_code:
        raise SystemExit(f"{command}\n{ran.output}")
    return ran.output.rstrip().splitlines()


def part_of(what: str) -> str:
    """Return a part of a file: code in a block of its language, Markdown as it is."""
    named = PART.fullmatch(what)
    if named is None:
        raise SystemExit(f"{what!r} names no command, no table and no part of a file.")
    name, start, end = named.groups()
    suffix = name.rpartition(".")[2]
    text = between((ROOT / name).read_text(encoding="utf-8"), start, end)
    if suffix == "md":
        return f"\n{text}\n"
    language = {"py": "python", "yml": "yaml"}.get(suffix, suffix)
    return f"```{language}\n{text}\n```"


def between(text: str, start: str | None, end: str | None) -> str:
    """Return the lines from the first that contains `start` to the next that contains `end`, without their indent."""
    lines = text.splitlines()
    if start is not None:
        lines = lines[line_of(lines, start) :]
    if end is not None:
        lines = lines[: line_of(lines[1:], end) + 1]
    return textwrap.dedent("\n".join(lines)).strip("\n")


def line_of(lines: list[str], words: str) -> int:
    for number, line in enumerate(lines):
        if words in line:
            return number
    raise SystemExit(f"No line holds {words!r}.")


def listed(names: list[str]) -> Iterator[str]:
    """Public names with their signatures and the first sentence of their docstrings."""
    for name in names:
        found = pkgutil.resolve_name(f"rankaware_optim.{name}")
        yield f"* {described(name, found)}"
        if inspect.isclass(found) and not issubclass(
            found, ra.RankAwareError | Warning
        ):
            yield from (f"  * {each}" for each in members(found))


def members(owner: type) -> Iterator[str]:
    """A class's own public methods and properties that have a docstring."""
    for name, found in vars(owner).items():
        found = getattr(found, "__func__", found)
        known = inspect.isfunction(found) or isinstance(found, PROPERTIES)
        if known and not name.startswith("_") and inspect.getdoc(found):
            yield described(name, found)


def described(name: str, found: Any) -> str:
    """A name, how it is called, and the first sentence of its docstring."""
    first = (inspect.getdoc(found) or "").partition("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s", " ".join(first.split()))[0].rstrip(":.")
    return f"`{name}{arguments(found)}`: {sentence}."


def arguments(found: Any) -> str:
    """A signature without types: a reader wants the names, the order and the defaults.

    A record that this package fills in, such as `Recipe`, has too many fields to be called.
    """
    errors = inspect.isclass(found) and issubclass(found, Exception)
    record = is_dataclass(found) and len(fields(found)) > MOST_FIELDS
    if errors or record or not callable(found):
        return ""
    parameters = [
        each.replace(annotation=each.empty)
        for each in inspect.signature(found).parameters.values()
        if each.name not in ("self", "cls")
    ]
    # a default that is a function has an address, which differs in each run
    return re.sub("<.+?>", "...", str(inspect.Signature(parameters)))


def moves() -> Iterator[str]:
    """By how much the default law changes a learning rate of AdamW, one row per change."""
    yield "| you change | the learning rate changes by | how sure |"
    yield "|---|---|---|"
    for what, origin, target, sure in MOVES:
        moved = "A's × 1, B's × 0.5"
        if origin is not None:
            moved = f"× {ra.convert_lr(1.0, from_=origin, to=target).lr:.2g}"
        yield f"| {what} | {moved} | {sure} |"


def hours() -> Iterator[str]:
    """Yield a table of GPU hours for a calibration with the default number of runs at two ranks."""
    runs, steps = 2 * TRIALS_PER_RANK, (100, 250, 500, 1000)
    yield f"| seconds a step | {' | '.join(f'{each:,} steps' for each in steps)} |"
    yield "|---" * (len(steps) + 1) + "|"
    for seconds in (1, 2, 5, 10):
        cells = [f"{runs * each * seconds / 3600:.2g}" for each in steps]
        yield f"| {seconds} | {' | '.join(cells)} |"


def commands() -> Iterator[str]:
    """Yield the help of every command."""
    for name in sorted(rankaware.commands):
        command = f"rankaware {name}"
        yield f"\n## {command}\n\n```text"
        yield from printed(f"{command} --help")
        yield "```"
    yield ""


TABLES = {
    "table of moves": moves,
    "table of GPU hours": hours,
    "help of every command": commands,
}


if __name__ == "__main__":
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))
