"""Conventions: what inspection reads from each library's adapters, and whether they compute and train as read.

    PYTHONPATH=benchmarks:. python benchmarks/ecosystem/conventions.py

Run it once in each of tox's environments integrations, torchtune and litgpt. It runs every builder of
tests/helpers/real_adapters.py whose library can be imported, and the replicas of tests/helpers/replicas.py. It updates
their rows of results/conventions.json and .md, and leaves the rows of other libraries as they are.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import click
import torch
from recording import RESULTS, machine, record

from rankaware_optim import RankAwareError
from rankaware_optim.testing import check_convention
from tests.helpers.oracle import oracle, output_of
from tests.helpers.real_adapters import CASES, Case, read
from tests.helpers.replicas import REPLICAS

RESTS_ON = ("inspection",)
RANK, ALPHA = 4, 8.0
ROW_ONLY = "row only: a replica"
NOTES = (
    f"Read of a layer built at rank {RANK} and alpha {ALPHA:g}; NO where that is not what the library was given.",
    "Ones-probe: with every entry of inputs, A and B at 1, how far B·A moves the output from scaling × rank × inner × "
    "fan-in, relative. A dash where other parameters train too, or several layers are adapted.",
    "Oracle: two trainings of 5 AdamW steps at alphas 3 and 8, factors, rates, eps and decays rescaled (as "
    "tests/helpers/oracle.py does): the largest difference relative to the largest output, in float64, over ranks 2 and 4. "
    "Where the library computes a norm in float32, a difference below its rounding shows as 0.",
    "torchtune and litgpt were run in separate environments, which pin other versions of their dependencies. "
    "The machine is that of the last run.",
    "Init «other»: neither Init[A] nor Init[B], so the law leaves the base rate. A row only is held against a replica "
    "in plain torch, written from the library's documented attributes; it is not the library.",
)


@click.command()
def main() -> None:
    """Update results/conventions.json and .md with the adapters that can be built here."""
    warnings.simplefilter("ignore")
    rows = stored()
    for case in (*CASES, *REPLICAS):
        if case in REPLICAS or find_spec(case.package.removesuffix("-lora")):
            rows[case.name] = measured(case)
    order = [case.name for case in (*CASES, *REPLICAS)]
    shown = [rows[name] for name in order if name in rows]
    (RESULTS / "conventions.json").write_text(json.dumps(shown, indent=1) + "\n")
    record(
        "conventions",
        "Adapter conventions",
        shown,
        machine(torch.get_num_threads()),
        NOTES,
    )


def stored() -> dict[str, dict[str, Any]]:
    """Rows of earlier runs, by adapter."""
    file = RESULTS / "conventions.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return {row["adapter"]: row for row in rows}


def measured(case: Case) -> dict[str, Any]:
    """An adapter's row of the table."""
    library = (
        ROW_ONLY if case in REPLICAS else f"{case.package} {version(case.package)}"
    )
    row = {"adapter": case.name, "convention": case.convention, "library": library}
    try:
        torch.manual_seed(0)
        ones = check_convention(case.make, *case.inputs(), run=output_of)
        error = oracle(case.make, *case.inputs())
        probe = None if ones is None else f"{ones:.0e}"
        return row | _read(case) | {"ones-probe": probe, "oracle error": f"{error:.0e}"}
    except RankAwareError as error:
        return (
            row
            | dict.fromkeys(COLUMNS, None)
            | {"found": False, "oracle error": error.cause}
        )


COLUMNS = ("found", "rank", "fan-in", "scaling", "init", "ones-probe", "oracle error")


def _read(case: Case) -> dict[str, Any]:
    found, expected = read(case.make(RANK, ALPHA)), case.expected(RANK, ALPHA)
    columns = {
        name: (found[name], expected[name]) for name in ("rank", "scaling", "init")
    }
    fans = (fan_in for fan_in, _ in found["fans"]), (n for n, _ in expected["fans"])
    columns["fan-in"] = list(fans[0]), list(fans[1])
    cells = {}
    for name, (values, wanted) in columns.items():
        text = ", ".join(
            f"{value:g}" if isinstance(value, (int, float)) else str(value)
            for value in values
        )
        cells[name] = text if values == wanted else f"NO: {text}"
    return {"found": found == expected} | {name: cells[name] for name in COLUMNS[1:5]}


if __name__ == "__main__":
    main()
