"""What a rate loses on published language models: that of `suggest_lr`, one constant, and what a shipped recipe would
give there if it did not refuse.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from internals import ANOTHER_TASK_SD, PUBLISHED
from recording import block, number
from study.loss_curves import between, vertex_of

from rankaware_optim import Rate, Recipe, RecipeError, Reference
from rankaware_optim.laws import checked_batch_multiplier
from rankaware_optim.recipe import configuration, rate
from rankaware_optim.transfer import suggest_lr

RECIPES = Path(__file__).parents[2] / "recipes"
CONSTANT = 3e-4
STEPS, BATCH = 780, 128  # of the published runs
Curves = Mapping[tuple[str, int], Mapping[float, float]]
Asked = Callable[[Reference], Rate]


class Target(NamedTuple):
    """A model at a rank whose best rate lies inside the grid: mean loss by log2 rate, and log2 of the best rate."""

    at: Reference
    curve: Mapping[float, float]
    best: float
    model: str = ""


class Score(NamedTuple):
    """Over all targets: the loss above the lowest, %; octaves above the best rate; share of best rates in the band."""

    lost: float
    octaves: float
    held: float


def targets_in(curves: Curves, width: Callable[[str], float]) -> list[Target]:
    found = []
    for (model, rank), curve in curves.items():
        best = vertex_of(curve) if len(curve) > 1 else None
        if best is not None:
            at = Reference(rank, PUBLISHED.alpha, fan_in=width(model))
            found.append(Target(at, curve, best, model))
    return found


def score(targets: Sequence[Target], asked: Asked) -> Score:
    """The means over the targets."""
    return score_of(targets, [asked(target.at) for target in targets])


def score_of(targets: Sequence[Target], rates: Sequence[Rate]) -> Score:
    """The means over the targets, of a rate for each. Beyond the grid the loss is that of its end."""
    lost, octaves, held = [], [], 0
    for target, given in zip(targets, rates, strict=True):
        x, least = math.log2(given.lr), min(target.curve.values())
        lost.append(100 * (between(target.curve, x) - least) / least)
        octaves.append(x - target.best)
        held += given.low <= 2.0**target.best <= given.high
    return Score(statistics.fmean(lost), statistics.fmean(octaves), held / len(targets))


def shipped(init: str | None = None) -> list[Recipe]:
    """The shipped recipes, of one init or of all."""
    loaded = [Recipe.load(path) for path in sorted(RECIPES.glob("*.toml"))]
    return [each for each in loaded if init in (None, each.reference.init)]


def unchecked(recipe: Recipe, horizon: Mapping[str, int]) -> Asked:
    """The recipe's rate at a configuration, without the refusal."""

    def asked(at: Reference) -> Rate:
        here = configuration(recipe, at.rank, at.alpha, init="A", fan_in=at.fan_in)
        return rate(recipe, here, **horizon)

    return asked


def by_the_whole_batch(recipe: Recipe, horizon: Mapping[str, int]) -> Asked:
    """The same as it was before: the rate moves with the root of any batch."""
    more = 1.0
    if "batch" in horizon and recipe.batch is not None:
        ratio = horizon["batch"] / recipe.batch
        more = math.sqrt(ratio) / checked_batch_multiplier(recipe.law, ratio)
    inside = unchecked(recipe, horizon)

    def asked(at: Reference) -> Rate:
        was = inside(at)
        return replace(was, lr=was.lr * more, low=was.low * more, high=was.high * more)

    return asked


def less_certain(recipe: Recipe, horizon: Mapping[str, int]) -> Asked:
    """The same with the spread between tasks in the band, and the batch as far as that was tried."""
    variance = ANOTHER_TASK_SD[recipe.reference.init] ** 2
    wider = recipe.covariance + np.diag([variance, 0.0, 0.0])
    return unchecked(replace(recipe, covariance=wider), horizon)


def refused(targets: Sequence[Target], recipes: Iterable[Recipe]) -> str:
    """How many of all questions the recipes refuse, given the alpha and width, and the steps and batch or not."""
    count, asked = 0, 0
    for recipe in recipes:
        for target in targets:
            at = {"rank": target.at.rank, "alpha": target.at.alpha, "init": "A"}
            for horizon in ({}, {"steps": STEPS, "batch": BATCH}):
                asked += 1
                try:
                    recipe.at(**at, fan_in=target.at.fan_in, **horizon)
                except RecipeError:
                    count += 1
    return f"{count:,} of {asked:,} refused"


def table(curves: Curves, width: Callable[[str], float]) -> str:
    """The rows, before and after."""
    targets, recipes = targets_in(curves, width), shipped("A")
    suggested = score(targets, lambda at: suggest_lr(at, task="other"))
    constant = score(targets, lambda at: Rate(CONSTANT))
    rows = [
        row("`suggest_lr`", [suggested]),
        [*row(f"constant {CONSTANT:g}", [constant])[:-1], "–"],
    ]
    horizons = {"`fan_in`": {}, "steps and batch too": {"steps": STEPS, "batch": BATCH}}
    kinds = {
        "a shipped recipe before": by_the_whole_batch,
        "with the spread between tasks": less_certain,
    }
    for kind, asked in kinds.items():
        for given, horizon in horizons.items():
            scores = [score(targets, asked(recipe, horizon)) for recipe in recipes]
            rows.append(row(f"{kind}, {given} given", scores))
    rows.append(
        ["any shipped recipe now", "", "", refused(targets, shipped())],
    )
    heads = ["rate", "loss lost, %", "octaves above the best", "90 % band holds"]
    words = (
        f"{len(targets)} best rates inside the grid, alpha {PUBLISHED.alpha:g}. Of recipes: the mean, the least and the most "
        f"of the {len(recipes)} at Init[A], given the model's width as `fan_in`, or {STEPS} steps and batch {BATCH} too. `suggest_lr` "
        "is fitted to this sweep; recipes and the spread between tasks are not. With "
        "that spread the bands still miss: what parts these models from the study's tasks, wider and with more steps, the "
        "study does not hold. So a recipe refuses a width that differs by more than a factor of 2."
    )
    return f"{block('What a recipe would give a published language model', heads, rows)}\n\n{words}"


def row(name: str, scores: Sequence[Score]) -> list[str]:
    held = [100 * each.held for each in scores]
    return [
        name,
        ends([each.lost for each in scores], 2),
        ends([each.octaves for each in scores], 1, sign=True),
        f"{ends(held, 0)} %",
    ]


def ends(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """The mean, with the least and the most of several."""
    mean = number(statistics.fmean(values), digits, sign)
    low, high = (number(end, digits, sign) for end in (min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"
