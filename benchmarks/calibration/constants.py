"""Which constants of the search and the fit decide something? Each at half, at twice and at 0, in simulated calibrations.

    python benchmarks/calibration/constants.py run      # resumable: results/constants.jsonl, about an hour
    python benchmarks/calibration/constants.py table    # results/constants.md

A constant is a number of `_constants.py` in fitting, recipe or calibration that the golden files hardly see. It is changed in a copy of the package, and
the studies of `simulated.py` are made on that copy: three plans on all 21 surfaces, the same draws for every change. 0
switches off what a constant measures, where it can be.

*LoRA* and *full* are mean regret, in points of the attainable gain, minus that of the package as it is; *held* is the
same for the share of real best rates inside the 90 % band. Brackets hold 95 %, by resampling the domains.

**Rule**, set before the runs. A constant decides nothing if at half, at twice and at 0 all intervals hold zero and no
difference is larger than .1 points of regret or 2 of what is held. Then it goes: what it measures is left out, or it
becomes one with another constant. One that the simulation cannot see, since it has no curves, no second process and no
pruning, is not judged.
"""

from __future__ import annotations

import ast
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
from recording import RESULTS, block, machine, made_on, number, write_explained

RESTS_ON = ("search.adam", "calibration.adam", "scores")
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rankaware_optim"
STORE = RESULTS / "constants.jsonl"
ROOMS = ("fitting", "recipe", "calibration")
FACTORS = (0.5, 2.0, 0.0)
DRAWS = 4  # studies of each surface and plan
SAME_REGRET, SAME_HELD = 0.1, 2.0  # points
RESAMPLED = 2000
# The golden files move by more than .01 octaves in the median where one of these is doubled or halved.
CLEAR = {
    "REACH", "STEEPNESS", "SHAPE", "GRID", "DRIFT", "FULL_SD", "WIDTH_SD", "INIT_SD", "MOST_MARGIN", "PER_SEED",
    "BRACKET", "USUAL_LR", "STRIDE", "OFFSETS",
}  # fmt: skip
# What these constants measure is not simulated: curves, pruning, processes, other steps, widths and batches.
UNSEEN = {
    "TAIL", "EARLY", "CLEAR", "ROSE", "DIVERGED", "SLOPE_SD", "SLOPE_LENGTH", "BATCH_SD", "SAME", "TRIALS_PER_RANK",
    "MOST_OCTAVES", "TOGETHER", "REPORTS", "JUDGED", "WORSE", "NEAR", "STANDARD_ERRORS", "FEW", "APART", "BEAT_S",
    "MISSED", "JOIN_S", "POLL_S", "SLOW_POLL_S", "LOCK_S", "ATTEMPTS", "GIT_S", "Z90", "BASE_SD", "CERTAIN", "ANY_WIDTH",
    "USUAL_PIVOT",
}  # fmt: skip


# --- constants ------------------------------------------------------------------------------------------------------


def constants() -> Iterator[tuple[str, str]]:
    """The file and the name of every constant that is simulated."""
    for room in ROOMS:
        path = PACKAGE / room / "_constants.py"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name not in CLEAR | UNSEEN and any(numbers_of(node)):
                    yield room, name


def numbers_of(node: ast.Assign) -> Iterator[ast.Constant]:
    """The numbers of an assignment, outside calls and attributes other than an array's."""
    if isinstance(node.value, ast.Call) and "array" not in ast.unparse(node.value):
        return
    for each in ast.walk(node.value):
        if isinstance(each, ast.Constant) and type(each.value) in (int, float):
            yield each


def changed(text: str, name: str, factor: float) -> str:
    """The file's text with a constant multiplied."""
    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            for each in numbers_of(node):
                each.value = type(each.value)(each.value * factor)
    return ast.unparse(tree)


# --- studies --------------------------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Simulate changed constants, or write the table."""


@main.command()
def studies() -> None:
    """Print the regret and what bands hold of every study, with the package that is imported."""
    from calibration import simulated as sim

    warnings.simplefilter("ignore")
    for index, on in enumerate(sim.SURFACES["study"]()):
        for plan in sim.PLANS[:3]:
            for draw in range(DRAWS):
                recipe = sim.calibrated(on, plan, (index, draw))
                for rank in (*on.ranks, sim.FULL):
                    at = sim.rate_of(recipe, on, rank)
                    key = ("study", on.domain, on.config, plan, draw, rank)
                    of = sim.Outcome(*key, *at, recipe.steepness)
                    part = "full" if rank == sim.FULL else "LoRA"
                    if part == "full" and not plan.full:
                        continue
                    row = [on.domain, part, sim.regret(of, of.rate), sim.is_held(of)]
                    print(json.dumps(row))


def outcome(room: str, name: str, factor: float) -> dict[str, Any]:
    """What the studies of a copy of the package give in which a constant is multiplied."""
    with tempfile.TemporaryDirectory(prefix="constants-") as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / room / "_constants.py"
        if name:
            path.write_text(changed(path.read_text(), name, factor))
        paths = os.pathsep.join([folder, str(ROOT / "benchmarks")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-P", __file__, "studies"],
            env=environment,
            capture_output=True,
            text=True,
        )
    key = {"room": room, "name": name, "factor": factor}
    if done.returncode:
        return {**key, "error": done.stderr.strip().splitlines()[-1]}
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {**key, "rows": rows}


@main.command()
@click.option("--workers", default=1, show_default=True)
def run(workers: int) -> None:
    """Simulate every change that is not on file."""
    have = {(row["room"], row["name"], row["factor"]) for row in on_file()}
    wanted = [("", "", 1.0)]
    wanted += [(*each, factor) for each in constants() for factor in FACTORS]
    missing = [each for each in wanted if each not in have]
    with ThreadPoolExecutor(workers) as pool:
        for row in pool.map(lambda each: outcome(*each), missing):
            with STORE.open("a") as file:
                file.write(json.dumps(row) + "\n")
            click.echo(f"{row['name']} × {row['factor']:g}: {row.get('error', 'done')}")


def on_file() -> list[dict[str, Any]]:
    lines = STORE.read_text().splitlines() if STORE.exists() else []
    return [json.loads(line) for line in lines]


# --- the page -------------------------------------------------------------------------------------------------------


def differences(rows: list[Any], base: list[Any], part: str, column: int) -> Any:
    """Mean difference and its 95 % interval over domains, in points."""
    by_domain = defaultdict(list)
    for row, old in zip(rows, base, strict=True):
        if row[1] != part and part != "both":
            continue
        if row[column] is not None:
            low = 0.0 if column == 2 else -math.inf
            pair = [max(low, float(each[column])) for each in (row, old)]
            by_domain[row[0]].append(100 * (pair[0] - pair[1]))
    means = np.array([fmean(each) for each in by_domain.values()])
    rng = np.random.default_rng(0)
    drawn = rng.choice(means, (RESAMPLED, len(means))).mean(axis=1)
    return means.mean(), *np.quantile(drawn, [0.025, 0.975])


def decides(found: list[Any]) -> bool:
    """Whether a change moves something, by the rule."""
    limits = (SAME_REGRET, SAME_REGRET, SAME_HELD)
    return any(
        abs(mean) > limit or low > 0 or high < 0
        for (mean, low, high), limit in zip(found, limits, strict=True)
    )


@main.command()
def table() -> None:
    """Write results/constants.md."""
    stored = on_file()
    [base] = [row["rows"] for row in stored if not row["name"]]
    rows, deciding = [], defaultdict(list)
    for row in stored:
        if not row["name"]:
            continue
        key, label = f"{row['room']}.{row['name']}", f"× {row['factor']:g}"
        if "error" in row:
            rows.append([key, label, row["error"].replace("|", "/")[:60], "", "", ""])
            deciding[key].append(True)
            continue
        found = [
            differences(row["rows"], base, part, column)
            for part, column in (("LoRA", 2), ("full", 2), ("both", 3))
        ]
        deciding[key].append(decides(found))
        cells = [
            f"{number(mean, sign=True)} [{number(low)}, {number(high)}]"
            for mean, low, high in found
        ]
        rows.append([key, label, *cells, "yes" if deciding[key][-1] else "no"])
    nothing = [key for key, each in deciding.items() if not any(each)]
    said = f"Of {len(deciding)} constants, {len(nothing)} decide nothing: {', '.join(nothing) or 'none'}."
    heads = ("constant", "change", "LoRA", "full", "held", "decides")
    on = machine(threads=1)
    write_explained(
        "constants",
        "Which constants decide something?",
        __doc__,
        said,
        block("Changes", heads, rows),
        made_on(on),
    )


if __name__ == "__main__":
    main()
