"""The yardstick for laws: make our own sweep, then score laws on it and on a published sweep.

    python benchmarks/laws/bench_law.py sweep                 # makes missing runs of the package's sweep
    python benchmarks/laws/bench_law.py score my_sweep.csv --law mua --law my_pkg:MyLaw     # prints a table

The sweep trains the demo's network (EfficientNet-lite0 on scikit-learn's digits) with alpha = rank and with alpha = 16.
The package contains it as `rankaware_optim/sweeps/demo_sweep.csv`.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import torch
from laws.scoring import COMPARED, Best, bench_law, score_table
from study.digits_loop import SEEDS, build, evaluate, fit, untrained
from study.domains._efficientnet import HEAD_RATE

from rankaware_optim import RankAwareOptimizer
from rankaware_optim.errors import RankAwareError
from rankaware_optim.sweeps import DEMO_SWEEP

FOLLOWS, KEPT = "efficientnet-lite0, alpha = rank", "efficientnet-lite0, alpha 16"
MORE_SEEDS = (2, 3)
RANKS, ALPHA = (1, 4, 16, 64, 256), 16
WIDTH = 567  # mean fan-in of the adapted layers: Survey.width
# log2 rates by model: a wide range with SEEDS, and a range near the best rates with MORE_SEEDS.
WIDE = {FOLLOWS: range(-11, -1), KEPT: range(-11, -1)}
NEAR = {FOLLOWS: range(-13, -5), KEPT: range(-11, -6)}
LOWEST = range(-15, -11)  # where rank 256's best rate lies with alpha = rank


@click.group()
def main() -> None:
    """Make the sweep, or score laws."""


@main.command()
def sweep() -> None:
    """Append every missing run to the package's sweep."""
    torch.set_num_threads(1)
    with DEMO_SWEEP.open(newline="") as file:
        done = {
            (row["model"], row["rank"], float(row["lr"]), row["seed"])
            for row in csv.DictReader(file)
        }
    for model, rank, alpha, lr, seed in _runs():
        if (model, str(rank), lr, str(seed)) not in done:
            append(model, rank, alpha, WIDTH, lr, seed, _trained(rank, alpha, lr, seed))


def append(
    model: str,
    rank: int | str,
    alpha: float | None,
    width: int,
    lr: float,
    seed: int,
    loss: str,
) -> None:
    """Append a run to the package's sweep."""
    with DEMO_SWEEP.open("a", newline="") as file:
        row = [
            model,
            rank,
            alpha,
            width,
            repr(lr),
            seed,
            f"{untrained(seed):.4f}",
            loss,
        ]
        csv.writer(file, lineterminator="\n").writerow(row)


def _runs() -> Iterator[tuple[str, int, int, float, int]]:
    for seeds, exponents in ((SEEDS, WIDE), (MORE_SEEDS, NEAR)):
        for rank, model, seed in itertools.product(RANKS, (FOLLOWS, KEPT), seeds):
            alpha = ALPHA if model == KEPT else rank
            low = LOWEST if (rank, model, seeds) == (256, FOLLOWS, SEEDS) else ()
            yield from (
                (model, rank, alpha, 2.0**exponent, seed)
                for exponent in (*low, *exponents[model])
            )


@cache
def _trained(rank: int, alpha: float, lr: float, seed: int) -> str:
    """Held-out loss after the demo's run at this alpha, as text: "diverged" where it is not finite."""
    torch.manual_seed(seed)
    model = build(rank)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = alpha / rank
    rates = {"*classifier*": HEAD_RATE}
    opt = RankAwareOptimizer(
        model, torch.optim.AdamW, lr=lr, law="constant", weight_decay=0.01, rates=rates
    )
    for _ in fit(model, opt, seed):
        pass
    after = evaluate(model)
    return f"{after:.4f}" if math.isfinite(after) else "diverged"


@main.command()
@click.argument(
    "sweep", type=click.Path(exists=True, path_type=Path), default=DEMO_SWEEP
)
@click.option(
    "--law",
    "laws",
    multiple=True,
    help="A law by its name, as for get_law. Repeatable.",
)
@click.option(
    "--best",
    type=click.Choice(["parabola", "bowl"]),
    default="parabola",
    show_default=True,
)
def score(sweep: Path, laws: tuple[str, ...], best: Best) -> None:
    """Score laws by how well they move the best rates of SWEEP from rank to rank.

    SWEEP is a file as for `rankaware fit`, by default the package's own. Each law moves each rank's best rate to every
    other rank, and the moved rate is compared with the best rate there.
    """
    try:
        click.echo(score_table(bench_law(sweep, laws or COMPARED, best=best)))
    except RankAwareError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
