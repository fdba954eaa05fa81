"""How the best rate depends on rank and width: each family's formula against the coordinate check, on the same grid.

    python benchmarks/laws/exponents.py run     # measures missing cells, results/exponents.json; resumable, ~10 min
    python benchmarks/laws/exponents.py table     # results/exponents.md

At every rank and width, a cell solves for the rate at which four steps of the real optimizer class change the output of
an adapter on a square layer by an rms of 1. The inputs and output gradients of `tokens` independent tokens stay fixed.
Exponents are the least-squares slopes of log2 rate on log2 rank and log2 width over the whole grid. They are fitted to
the check's rates and, for the column beside it, to the formula's. Rates are means over 6, 2 and 1 draws at 4, 64 and
512 tokens. Families whose law does not move rates with the rank are left out.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from functools import lru_cache
from typing import Any

import click
import numpy as np
import torch
from fingerprints import marks
from recording import RESULTS, machine, page

from rankaware_optim import LawError, MuA
from rankaware_optim._optimizers import get_optimizer_class
from rankaware_optim.transfer._simulate import (
    Batch,
    Stepper,
    change_of,
    draw_pair,
    rates_for,
    step_pair,
    synthetic,
)

RESTS_ON = ("laws.adam", "laws.lamb")
RANKS = (4, 8, 16, 32, 64)
WIDTHS = (256, 512, 1024, 2048)
TOKENS = (4, 64, 512)
# draws to average, by tokens: with few tokens, draws differ more
SEEDS = {
    4: 6,
    64: 2,
    512: 1,
}
GAMMAS = (0.0, 0.5, 1.0)
PLAIN_ADAFACTOR = {
    "scale_parameter": False,
    "relative_step": False,
    "warmup_init": False,
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adamw", {}),
    "RMSprop": ("rmsprop", {}),
    "transformers' Adafactor, unscaled": (
        "transformers.optimization:Adafactor",
        PLAIN_ADAFACTOR,
    ),
    "torch_optimizer's Lamb": (
        "torch_optimizer:Lamb",
        {"debias": True, "clamp_value": 1e9},
    ),
}
BARS = {"sign-like": 0.1}
STEPS = 4
STORE = RESULTS / "exponents.json"


@click.group()
def main() -> None:
    """Measure the missing cells, or make the table."""


@main.command()
@click.option(
    "--only", default=None, help="The optimizers to run, by a part of their name."
)
@click.option("--widest", default=max(WIDTHS), help="Leave out wider layers.")
def run(only: str | None, widest: int) -> None:
    """Solve for every missing rate and store it."""
    torch.set_num_threads(1)
    store = load()
    rates = store["log2_rates"]
    for label in OPTIMIZERS:
        if only is not None and only not in label:
            continue
        for tokens, width in itertools.product(
            TOKENS, [w for w in WIDTHS if w <= widest]
        ):
            points = [
                (label, tokens, width, *rest)
                for rest in itertools.product("AB", GAMMAS, RANKS)
            ]
            missing = [key for key in points if _key(*key) not in rates]
            for key in missing:
                rate = _solve(*key)
                rates[_key(*key)] = None if rate is None else round(rate, 3)
            if missing:
                store["machine"] = measured_on()
                STORE.write_text(json.dumps(store, indent=0) + "\n")
                click.echo(
                    f"{label}, {tokens} tokens, width {width}: {len(missing)} rates"
                )


@main.command()
def table() -> None:
    """Write results/exponents.md."""
    store = load()
    rows = [row for label in OPTIMIZERS for row in rows_of(label, store["log2_rates"])]
    heads = list(rows[0])
    cells = [
        [value if isinstance(value, str) else f"{value:g}" for value in row.values()]
        for row in rows
    ]
    notes = [
        summary(rows, label)
        for label in OPTIMIZERS
        if any(row["optimizer"] == label for row in rows)
    ]
    notes = [__doc__.split("\n\n")[-1].replace("\n", " ").strip(), "\n".join(notes)]
    text = page(
        "Exponents of the best rate: formula and check", heads, cells, made_on(), notes
    )
    (RESULTS / "exponents.md").write_text(text)
    click.echo("\n\n".join(notes))


def load() -> dict[str, Any]:
    return (
        json.loads(STORE.read_text())
        if STORE.exists()
        else {"machine": measured_on(), "log2_rates": {}}
    )


def measured_on() -> dict[str, Any]:
    """How rates are measured: by an optimizer, so that they rest on no law."""
    on = machine(1) | {"command": "python benchmarks/laws/exponents.py run"}
    del on["rests on"]
    return on


def made_on() -> dict[str, Any]:
    """The machine of the rates on file, and the laws that the formulas beside them rest on."""
    return {**load()["machine"], "rests on": " ".join(marks(RESTS_ON))}


def _key(*parts: object) -> str:
    return "|".join(map(str, parts))


def _law(label: str, tokens: int) -> MuA:
    name, settings = OPTIMIZERS[label]
    bound = MuA(tokens=tokens).bind(get_optimizer_class(name), settings)
    assert isinstance(bound, MuA)
    return bound


def _solve(
    label: str, tokens: int, width: int, init: str, gamma: float, rank: int
) -> float | None:
    """log2 of the rate that changes the output by an rms of 1, as a mean over seeds; None where no rate does."""
    name, settings = OPTIMIZERS[label]
    stepper, scaling = Stepper(get_optimizer_class(name), settings, STEPS), rank**-gamma
    guess = _law(label, tokens).sigma(init, rank, scaling, width) / stepper.steps

    def log2_rate(seed: int) -> float:
        batch, start = (
            _batch(width, tokens, seed),
            draw_pair(width, width, rank, scaling, init, seed),
        )
        return math.log2(
            rates_for(
                lambda lr: change_of(batch, step_pair(batch, start, stepper, lr, lr)),
                start=guess,
            )
        )

    try:
        return statistics.fmean(map(log2_rate, range(SEEDS[tokens])))
    except LawError:
        return None


@lru_cache(maxsize=6)
def _batch(width: int, tokens: int, seed: int) -> Batch:
    return synthetic(width, width, tokens, seed)


def rows_of(label: str, rates: dict[str, float | None]) -> list[dict[str, Any]]:
    rows = []
    for init, gamma, tokens in itertools.product("AB", GAMMAS, TOKENS):
        widths = [
            w for w in WIDTHS if _key(label, tokens, w, init, gamma, RANKS[-1]) in rates
        ]
        grid = list(itertools.product(widths, RANKS))
        check = [rates[_key(label, tokens, w, init, gamma, r)] for w, r in grid]
        if not check:
            continue
        law = _law(label, tokens)
        formula = [
            math.log2(law.sigma(init, r, float(r) ** -gamma, w)) for w, r in grid
        ]
        start = {
            "optimizer": label,
            "family": law.family,
            "init": init,
            "gamma": gamma,
            "tokens": tokens,
        }
        rows.append(
            {
                **start,
                "widths": f"{widths[0]}–{widths[-1]}",
                **_compared(grid, formula, check),
            }
        )
    return rows


def _compared(
    grid: list[tuple[int, int]], formula: list[float], check: list[float | None]
) -> dict[str, str]:
    solved = [i for i, value in enumerate(check) if value is not None]
    if len(solved) < len(grid):
        return dict.fromkeys(
            ("r: formula", "r: check", "r: off", "n: formula", "n: check", "n: off"),
            "not reached",
        )
    ours, theirs = _exponents(grid, formula), _exponents(grid, check)
    pairs = zip("rn", ours, theirs, strict=True)
    return {
        f"{x}: {k}": f"{v:+.2f}"
        for x, f, c in pairs
        for k, v in (("formula", f), ("check", c), ("off", f - c))
    }


def _exponents(
    grid: list[tuple[int, int]], log2_rates: list[Any]
) -> tuple[float, float]:
    """Exponents in rank and in width, fitted together to log2 rates on a grid of (rank, width)."""
    design = np.array([(1.0, math.log2(r), math.log2(w)) for w, r in grid])
    fitted = np.linalg.lstsq(design, np.array(log2_rates, dtype=float), rcond=None)[0]
    return float(fitted[1]), float(fitted[2])


def summary(rows: list[dict[str, Any]], label: str) -> str:
    mine = [row for row in rows if row["optimizer"] == label]
    reached = [row for row in mine if row["r: off"] != "not reached"]
    missed = (
        f"; not reached in {len(mine) - len(reached)} of {len(mine)}"
        if len(reached) < len(mine)
        else ""
    )
    if not reached:
        return f"* {label} ({mine[0]['family']}): no rate moves the output by 1 in all of a cell's grid."
    worst = {x: max(abs(float(row[f"{x}: off"])) for row in reached) for x in "rn"}
    bar = BARS.get(mine[0]["family"])
    verdict = (
        ""
        if bar is None
        else f", bar {bar}: {'met' if max(worst.values()) <= bar else 'MISSED'}"
    )
    return f"* {label} ({mine[0]['family']}): worst {worst['r']:.2f} in rank, {worst['n']:.2f} in width{verdict}{missed}."


if __name__ == "__main__":
    main()
