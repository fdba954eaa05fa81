"""Fingerprints of the package's behaviour, which show whether a table is older than what its figures rest on.

    PYTHONPATH=benchmarks python benchmarks/fingerprints.py           # which differ from the file, and by how much
    PYTHONPATH=benchmarks python benchmarks/fingerprints.py --write   # the same, and write the file

A fingerprint is a set of numbers that the code gives on fixed inputs: see `behaviour.py`. They are kept in
fingerprints.json, so its diff shows what a change moved. A script that writes a table names in `RESTS_ON` the
fingerprints that its figures rest on, and the table carries their digests. So what changes no number makes no table
stale. `RESTS_ON = ()` is for tables of times and of outcomes: they carry date, machine and commit, and are made again
at a release.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

Value = float | str | None
Cases = Mapping[str, Sequence[Value]]

FILE = Path(__file__).with_suffix(".json")
RESULTS = Path(__file__).parent / "results"
# digits kept, and the relative difference that another machine's rounding may make
DIGITS, TOLERANCE = (
    10,
    1e-6,
)


def stored() -> dict[str, Cases]:
    """The fingerprints on file."""
    found: dict[str, Cases] = json.loads(FILE.read_text())
    return found


def digest(cases: Cases) -> str:
    """Eight digits that identify a fingerprint on file."""
    return hashlib.sha256(json.dumps(cases, sort_keys=True).encode()).hexdigest()[:8]


def marks(named: Sequence[str], of: Mapping[str, Cases] | None = None) -> list[str]:
    """The fingerprints named, as a table carries them: name@digest. "laws" names every "laws.…".

    Raises:
        KeyError: there is no such fingerprint on file.
    """
    of = stored() if of is None else of
    found = []
    for name in named:
        own = [each for each in of if each == name or each.startswith(f"{name}.")]
        if not own:
            raise KeyError(
                f"RESTS_ON names {name}, which fingerprints.json does not have. It has {', '.join(of)}."
            )
        found += [f"{each}@{digest(of[each])}" for each in own]
    return found


def rests_on() -> str:
    """What the running script's tables rest on, in words."""
    named = getattr(sys.modules["__main__"], "RESTS_ON", None)
    return (
        "unknown"
        if named is None
        else " ".join(marks(named)) or "its machine and versions"
    )


class Change(NamedTuple):
    """How a fingerprint differs from that on file.

    moved: the largest relative change of a number, by case; infinite where a text or the number of values changed.
    came, went: cases that only the code or only the file has.
    """

    moved: Mapping[str, float]
    came: Sequence[str]
    went: Sequence[str]


def change(old: Cases, new: Cases) -> Change:
    """Compare two fingerprints. Differences below `TOLERANCE` are none."""
    moved = {case: largest(old[case], new[case]) for case in old if case in new}
    return Change(
        {case: by for case, by in moved.items() if by > TOLERANCE},
        [case for case in new if case not in old],
        [case for case in old if case not in new],
    )


def largest(old: Sequence[Value], new: Sequence[Value]) -> float:
    """The largest relative change between two lists of values."""
    if len(old) != len(new):
        return math.inf
    return max((relative(a, b) for a, b in zip(old, new, strict=True)), default=0.0)


def relative(a: Value, b: Value) -> float:
    if isinstance(a, float | int) and isinstance(b, float | int):
        size = max(abs(a), abs(b))
        return abs(a - b) / size if size > 1e-12 else 0.0
    return 0.0 if a == b else math.inf


def now(only: Sequence[str] = ()) -> dict[str, Cases]:
    """The fingerprints as the code gives them, all or those named."""
    from behaviour import BEHAVIOUR, taken

    return {name: taken(name) for name in BEHAVIOUR if not only or name in only}


@click.command()
@click.option(
    "--write",
    "writes",
    is_flag=True,
    help="Write the file, and the digests of tables that stay fresh.",
)
def main(writes: bool) -> None:
    """Say which fingerprints differ from those on file. Exit with status 1 if any does and is not written."""
    old, new = stored(), now()
    changes = {
        name: change(old.get(name, {}), new.get(name, {})) for name in {**old, **new}
    }
    for name, each in changes.items():
        print(f"{name}: {in_words(each)}")
    if writes:
        write(old, new, changes)
    elif any(any(each) for each in changes.values()):
        sys.exit(1)


def in_words(of: Change) -> str:
    """A change in words."""
    by = [100 * by for by in of.moved.values() if math.isfinite(by)]
    said = [f"{len(by)} cases moved, at most by {max(by):.3g} %"] if by else []
    said += (
        [f"{len(of.moved) - len(by)} cases have other texts or another length"]
        if len(by) < len(of.moved)
        else []
    )
    said += [
        f"{len(cases)} cases {what}"
        for what, cases in (("came", of.came), ("went", of.went))
        if cases
    ]
    return ", ".join(said) or "unchanged"


def write(
    old: Mapping[str, Cases], new: Mapping[str, Cases], changes: Mapping[str, Change]
) -> None:
    """Write the file, and the new digests of tables whose cases only came or went."""
    kept = {
        name: with_kept_digits(old.get(name, {}), cases, changes[name])
        for name, cases in new.items()
    }
    FILE.write_text(text_of(kept))
    for name, each in changes.items():
        if name in old and not each.moved and (each.came or each.went):
            renew(
                f"{name}@{digest(old[name])}",
                f"{name}@{digest(kept[name])}" if name in kept else "",
            )


def with_kept_digits(old: Cases, new: Cases, changed: Change) -> Cases:
    """The new cases, rounded. Those that did not move are as on file, so that another machine writes the same."""
    fresh = {case: [rounded(value) for value in values] for case, values in new.items()}
    return {
        case: old[case] if case in old and case not in changed.moved else fresh[case]
        for case in new
    }


def renew(mark: str, other: str) -> None:
    """Replace a mark in all tables, or leave it out if there is no other."""
    for path in sorted(RESULTS.rglob("*.*")):
        if path.suffix not in (".md", ".json") or mark not in (
            text := path.read_text()
        ):
            continue
        if not other:
            text = text.replace(f"{mark} ", "").replace(f" {mark}", "")
        path.write_text(text.replace(mark, other))


def rounded(value: Value) -> Value:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def text_of(fingerprints: Mapping[str, Cases]) -> str:
    """JSON with a case a line, so that a diff shows the case."""
    blocks = []
    for name, cases in fingerprints.items():
        lines = ",\n".join(
            f"  {json.dumps(case)}: {json.dumps(values)}"
            for case, values in cases.items()
        )
        blocks.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    main()
