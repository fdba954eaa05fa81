"""Does it hold on large models? Sweeps that others published, of 0.6 to 1,000 billion parameters.

    python benchmarks/laws/large_models.py FILE...   # results/large_models.md, its picture, and README's table

Pass the files that `laws/others.py` reads, in any order. Other people ran and published all of these sweeps,
and none of the files is in the repository. The page on [full finetuning](full_finetuning.md) covers the
conversion to full finetuning.

## How to read it

We convert the best learning rate of one rank, or of full finetuning, to every other rank and to full
finetuning. We do this in several ways: with the default law as the package applies it, with µA with 8 tokens
(the law of `suggest_lr`), with the paper's law, with the factor √(16 / rank), and not at all. Between LoRA
and full finetuning, the package uses a ratio that was measured in bfloat16, on three of these models among
others. The tables also show the law without this ratio, and a tenth of LoRA's learning rate for full
finetuning. For LoRA, the law uses the mean fan-in of the adapted layers, and for full finetuning the largest
fan-in. `suggest_lr` uses the hidden size, which is usually the most common fan-in. Three learning rates need
no run at all: 2e-4, 1e-4, and the formula of Tinker's cookbook, `get_lr`. These learning rates are the same
at every rank.

* In the tables, a *rate* is a learning rate, and a *band* is a 90 % interval. A *kept* rate is a learning
  rate that is used unchanged at another rank.
* We read the best learning rate of a sweep in two ways: as the best learning rate that was *tried*, and as
  the *vertex* of the parabola through the three lowest losses. If the best learning rate tried is the highest
  or the lowest of the sweep, the true best learning rate is unknown. In this case, nothing is converted from
  it, and the excess losses at that rank are too low.
* Between two learning rates that were tried, the loss is interpolated linearly. If the vertex lies between
  two learning rates that were tried, it therefore has an excess loss itself, for example 0.7 % at rank 16 of
  the 7B model. Outside the sweep, the loss at the end of the sweep is used and marked with ≥.
* Excess losses are in % of the lowest loss tried. For reinforcement learning, they are percentage points of
  accuracy. If a source publishes only best learning rates, the error is given in octaves (an octave is a
  factor of 2).
* Nearly all results come from a single seed, so a difference of a few tenths of a percent means nothing.
* The lowest loss does not always mean the best model. On a public 8B model, LoRA's loss was lowest at a
  learning rate of 1e-3, but there the model's knowledge of its field had fallen from 27 % to between 0 and 4
  %. All losses on this page are losses on the finetuning data.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from internals import get_optimizer_class
from laws import learning_rate_matters, others, tinker
from laws.large_figure import draw_moved
from laws.others import READINGS, Broken, Curve, Reading, Sweep
from laws.scoring import bench_law
from recording import RESULTS, block, draw, machine, made_on, number, table_of
from study.grids import FULL
from study.suite import README, publish

from rankaware_optim import (
    Constant,
    Falling,
    Law,
    MuA,
    Power,
    Rate,
    Reference,
    suggest_lr,
)
from rankaware_optim.laws import checked_multiplier, to_full

RESTS_ON = ("laws", "transfer", "fitting")
SCRIPT = "benchmarks/laws/large_models.py"
PAGE, PICTURE = RESULTS / "large_models.md", RESULTS / "large_models.png"
TUNED = 16  # rank at which most people have a rate
DEFAULT, KEPT = "the default law", "kept"
ROOT = "× √(16 / rank)"
# Octaves from a rank to another one, None where the way has no answer.
Way = Callable[[Sweep, int, int], float | None]


def by_law(law: Law) -> Way:
    bound = law.bind(get_optimizer_class("AdamW"), {})

    def way(sweep: Sweep, a: int, b: int) -> float:
        here, there = (
            checked_multiplier(bound, sweep.at(rank).as_factor(), sweep.at(TUNED))
            for rank in (a, b)
        )
        return math.log2(there / here)

    return way


def by_root(sweep: Sweep, a: int, b: int) -> float | None:
    return None if FULL in (a, b) else math.log2(a / b) / 2


def by_conversion(sweep: Sweep, a: int, b: int) -> float:
    """As the package converts: by the default law, and between LoRA and full finetuning by the measured ratio."""
    if FULL not in (a, b) or a == b:
        return by_law(Falling())(sweep, a, b)
    lora = sweep.at(a if b == FULL else b)
    bound = Falling().bind(get_optimizer_class("AdamW"), {})
    there = to_full(bound, sweep.at(FULL).as_factor(), lora, "bfloat16")
    return math.log2(there) if b == FULL else -math.log2(there)


def by_a_tenth(sweep: Sweep, a: int, b: int) -> float | None:
    """Full finetuning at a tenth of LoRA's rate, as people use it."""
    if (a == FULL) == (b == FULL):
        return 0.0
    return -math.log2(10) if b == FULL else math.log2(10)


TENTH, ALONE = "kept, a tenth in full finetuning", "the default law alone"
WAYS: dict[str, Way] = {
    DEFAULT: by_conversion,
    ALONE: by_law(Falling()),
    "µA of 8 tokens": by_law(MuA(tokens=8.0)),
    "the paper's law": by_law(MuA(tokens=None)),
    ROOT: by_root,
    KEPT: lambda sweep, a, b: 0.0,
    TENTH: by_a_tenth,
}
CONSTANTS = (2e-4, 1e-4)
FORMULA = "Tinker's formula"
FORMULA_CONVERTED = "Tinker's formula × √(32 / rank)"
CONVERTED = "2e-4 of rank 16 and alpha 32, converted,"


@click.command()
@click.argument(
    "paths", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def main(paths: Sequence[Path]) -> None:
    """Write results/large_models.md, its picture and README's table."""
    of = others.files_by_name(paths)
    seven = others.qwen_7b(of["qwen2.5-7b.csv"])
    four = others.qwen_4b(of["qwen3-4b.csv"])
    at_end = others.qwen_grpo(of["qwen3-1.7b-grpo.csv"])
    at_best = others.qwen_grpo(of["qwen3-1.7b-grpo.csv"], "accuracy_best")
    broken = others.olmo_dpo(of["olmo2-1b-dpo.csv"])
    names = [path.name for path in paths]
    command, reading = (__doc__ or "").partition("\n\n")[2].split("\n## ")
    looked = (others.__doc__ or "").partition("**Other sweeps.**")
    parts = [
        "# Does it hold on large models?",
        summary(seven, four, at_end, broken),
        "![Loss of a 7B model against learning rate, one curve per LoRA rank, before and after conversion]"
        f"({PICTURE.name})",
        "How far the final loss of the 7B model is above the lowest one, in %:",
        readme_table(seven),
        command.strip("\n"),
        "## " + reading.strip("\n"),
        of_7b(seven),
        of_4b(four),
        of_grpo(at_end, at_best),
        of_dpo(broken),
        of_published(of["sft_sweep.md"]) if "sft_sweep.md" in of else kept_section(),
        of_gemma(),
        sources(),
        looked[1] + looked[2].rstrip(),
        made_on(machine(1) | {"command": f"python {SCRIPT} {' '.join(names)}"}),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n")
    draw(draw_moved(seven, WAYS[DEFAULT]), PICTURE, dpi=125)
    publish(README, "tables", readme_table(seven))


KEPT_SECTION = "## 35 language models"


def kept_section() -> str:
    """The page's own section on 35 models, made when their file was given. No number in it depends on full finetuning."""
    text = PAGE.read_text()
    begin = text.index(KEPT_SECTION)
    return text[begin : text.index("\n## ", begin)].rstrip("\n")


# --- moves ------------------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """A best rate moved to a rank: log2 of it, octaves above the best rate there (None if unknown), and what it loses."""

    x: float
    octaves: float | None
    lost: float


def moved(sweep: Sweep, way: Way, reading: Reading, a: int, b: int) -> Move | None:
    """The best rate of rank a at rank b; None where it is not known, or the way has no answer."""
    best = sweep.best[reading]
    octaves = way(sweep, a, b)
    if a not in best or octaves is None:
        return None
    x = best[a] + octaves
    off = x - best[b] if b in best else None
    return Move(x, off, sweep.lost(b, x) if b in sweep.curves else math.nan)


def moves(sweep: Sweep, way: Way, reading: Reading, to_full: bool) -> list[Move]:
    """All moves between ranks whose best rates are known, or those to full finetuning."""
    known = sweep.best[reading]
    ranks = [rank for rank in sweep.ranks if rank in known and rank != FULL]
    pairs = [(rank, FULL) for rank in ranks]
    if not to_full:
        pairs = list(itertools.permutations(ranks, 2))
    every = (moved(sweep, way, reading, a, b) for a, b in pairs)
    return [each for each in every if each is not None]


def all_moves(sweep: Sweep) -> str:
    """Every way over all pairs of ranks, and to full finetuning, by both readings of a best rate."""
    rows = []
    for reading, (name, way) in itertools.product(READINGS, WAYS.items()):
        row = [name, NAMES[sweep.unit][reading]]
        for into_full in (False, True):
            found = moves(sweep, way, reading, into_full)
            off = [each.octaves for each in found if each.octaves is not None]
            lost = [each.lost for each in found]
            squares = [value * value for value in off]
            row.append(number(math.sqrt(statistics.fmean(squares))) if off else "–")
            if sweep.curves:
                row += [number(statistics.fmean(lost), 1) if lost else "–"]
                row += [number(max(lost), 1) if lost else "–"]
        if row[2] != "–":
            rows.append(row)
    lost_heads = [f"lost, mean, {sweep.unit}", "worst"] if sweep.curves else []
    heads = ["way", "best rate", "between ranks: octaves off, rms", *lost_heads]
    heads += ["to full finetuning: octaves off, rms", *lost_heads]
    return table_of(heads, rows)


# what the two readings are called
NAMES = {
    "%": {"tried": "tried", "vertex": "vertex"},
    "points": {"tried": "tried", "vertex": "middle of the flat part"},
    "octaves": {"tried": "tried", "vertex": "–"},
}


def named(rank: int) -> str:
    return "full" if rank == FULL else f"rank {rank}"


def from_rank(sweep: Sweep, reading: Reading, a: int) -> str:
    """What every way loses at every rank, from one rank's best rate."""
    rows = [
        [name, *(cell(sweep, moved(sweep, way, reading, a, b), b) for b in sweep.ranks)]
        for name, way in WAYS.items()
    ]
    return table_of([f"from rank {a}", *map(named, sweep.ranks)], rows)


def by_default_law(sweep: Sweep, reading: Reading) -> str:
    """What the default law loses from every rank to every other one."""
    rows = []
    for a in sweep.ranks:
        if a in sweep.best[reading]:
            every = [moved(sweep, WAYS[DEFAULT], reading, a, b) for b in sweep.ranks]
            cells = [
                cell(sweep, each, b) for each, b in zip(every, sweep.ranks, strict=True)
            ]
            rows.append([named(a), *cells])
    return table_of(["from / to", *map(named, sweep.ranks)], rows)


def cell(sweep: Sweep, move: Move | None, rank: int) -> str:
    """What a move loses, or its octaves where only best rates are known."""
    if move is None:
        return "–"
    if not sweep.curves:
        return number(move.octaves, sign=True)
    return lost_in_words(sweep, rank, move.x)


def lost_in_words(sweep: Sweep, rank: int, x: float) -> str:
    beyond = "" if sweep.is_tried(rank, x) else "≥ "
    return beyond + number(sweep.lost(rank, x), 1)


# --- rates without a run ----------------------------------------------------------------------------------------------


def suggestion_of(sweep: Sweep, rank: int) -> Rate:
    task = "rl" if sweep.unit == "points" else "other"
    return suggest_lr(sweep.asked(rank), method=sweep.at(rank).method, task=task)


def constants(sweep: Sweep, rank: int) -> dict[str, float]:
    """The rates of those who do not look at the rank."""
    found = {f"{rate:g}": rate for rate in CONSTANTS}
    formula = tinker.get_lr(sweep.model, sweep.widths.hidden, rank != FULL)
    if formula is not None:
        found[FORMULA] = formula
    if sweep.alpha(TUNED) == tinker.ALPHA:
        return found
    if formula is not None:
        root = 1.0 if rank == FULL else math.sqrt(tinker.ALPHA / rank)
        found[FORMULA_CONVERTED] = formula * root
    at = Reference(TUNED, tinker.ALPHA, fan_in=sweep.widths.mean)
    law = Falling().bind(get_optimizer_class("AdamW"), {})
    there = sweep.at(rank)
    if rank == FULL:
        found[CONVERTED] = 2e-4 * to_full(law, there.as_factor(), at, "bfloat16")
    else:
        found[CONVERTED] = 2e-4 * checked_multiplier(law, there.as_factor(), at)
    return found


def best_in_words(sweep: Sweep, rank: int) -> Iterator[str]:
    """The best rate by both readings. One at an end of the grid has the sign of what lies beyond."""
    curve = sweep.curves.get(rank)
    for reading in READINGS if curve else ("tried",):
        x = sweep.best[reading].get(rank)
        if x is not None or curve is None:
            yield "–" if x is None else f"{2.0**x:.2g}"
        elif reading == "tried":
            end = min(curve, key=curve.__getitem__)
            yield f"{'≥' if end == max(curve) else '≤'} {2.0**end:.2g}"
        else:
            yield "at an end"


def without_a_run(sweep: Sweep) -> str:
    """The suggestion and its band at every rank, and what it and other rates lose there."""
    rows = []
    for rank in sweep.ranks:
        given = suggestion_of(sweep, rank)
        best = sweep.best["vertex"].get(rank, sweep.best["tried"].get(rank))
        held = "–" if best is None else inside(given, best)
        row = [named(rank), *best_in_words(sweep, rank)]
        row += [f"{given.lr:.2g}", f"{given.low:.1g} to {given.high:.1g}", held]
        for rate in (given.lr, *constants(sweep, rank).values()):
            x = math.log2(rate)
            if sweep.curves:
                row.append(lost_in_words(sweep, rank, x))
            else:
                row.append("–" if best is None else number(x - best, sign=True))
        rows.append(row)
    readings = READINGS if sweep.curves else READINGS[:1]
    heads = ["", *(f"best: {NAMES[sweep.unit][each]}" for each in readings)]
    heads += ["suggested", "90 % band", "holds it", "it loses"]
    heads += [f"{name} loses" for name in constants(sweep, TUNED)]
    if not sweep.curves:
        heads = [head.replace("loses", "is off, octaves") for head in heads]
    return table_of(heads, rows)


def inside(given: Rate, x: float) -> str:
    return "yes" if given.low <= 2.0**x <= given.high else "no"


# --- the sections -----------------------------------------------------------------------------------------------------


def spacing(curves: Sequence[Curve]) -> str:
    """The steps between neighbouring rates of grids, in octaves."""
    steps = [b - a for each in curves for a, b in itertools.pairwise(sorted(each))]
    return f"{min(steps):.1f} to {max(steps):.1f} octaves"


def summary(seven: Sweep, four: Sweep, at_end: Sweep, broken: Broken) -> str:
    """What the page says, in sentences."""
    without = [seven.lost(rank, suggested(seven, rank)) for rank in JUDGED]
    law, kept = (
        statistics.fmean(seven.lost(rank, at_rank(seven, way, rank)) for rank in HIGHER)
        for way in (DEFAULT, KEPT)
    )
    best = seven.best["vertex"]
    to_full, alone, tenth = (
        [
            above(sweep, way, reading)
            for sweep, reading in (
                (seven, "vertex"),
                (four, "tried"),
                (at_end, "vertex"),
            )
        ]
        for way in (DEFAULT, ALONE, TENTH)
    )
    formula, converted, given = (
        [seven.lost(rank, math.log2(constants(seven, rank)[name])) for rank in JUDGED]
        for name in (FORMULA, FORMULA_CONVERTED, CONVERTED)
    )
    lines = [
        "**What to conclude.** If alpha grows with the rank, convert the learning rate, or use the suggestion of "
        "`suggest_lr`. The converted and the suggested learning rate both come close to the best one. If alpha is "
        "fixed, use the same learning rate at every rank. The conversion between LoRA and full finetuning is less "
        "certain, so measure the best learning rate there if you can.",
        "",
        "* **alpha = rank (7B model).** `suggest_lr`, which needs no run, has an excess loss of "
        f"{statistics.fmean(without):.1f} % on average over the ranks 8 to 256, and of {max(without):.1f} % at worst. "
        f"If the best learning rate of rank 16 is converted by the default law, the excess loss is {law:.1f} % on "
        "average over the ranks 32 to 256. If the best learning rate of rank 16 is used unchanged, the excess loss is "
        f"{kept:.0f} %. From rank 16 to 256 the best learning rate falls by a factor of "
        f"{2 ** (best[TUNED] - best[256]):.1f}. Multiplying the learning rate by √(16 / rank) is as good as the law.",
        "* **alpha fixed (4B model, 35 models).** The best learning rate rises a little with the rank. A law that "
        "follows this rise is only hundredths of a percent better than one learning rate for all ranks. With a fixed "
        "alpha, multiplying by √(16 / rank) is wrong.",
        "* **Full finetuning.** If the package converts the learning rate from rank 16, the result is "
        f"{', '.join(f'{2**each:.1f}' for each in to_full)} times the best learning rate of full finetuning (7B, 4B "
        f"and GRPO, all in bfloat16). The law alone gives {', '.join(f'{2**each:.1f}' for each in alone)} times the "
        "best learning rate, and a tenth of LoRA's learning rate gives "
        f"{', '.join(f'{2**each:.1f}' for each in tenth)} times the best learning rate. These three sources are "
        "among the five sources to which the package's ratio was fitted, so the figures show the quality of a fit and "
        "not of a prediction. For a source that was left out of the fit, the error is 0.86 octaves (rms; see [full "
        "finetuning](full_finetuning.md)).",
        "* **Fixed learning rates on the 7B model.** Tinker's formula assumes alpha = 32. If the formula is used "
        f"unchanged, the excess loss is up to {max(formula):.0f} %. If its learning rate is converted to alpha = rank "
        f"with the factor √(32 / rank), as users of the formula would do, the excess loss is {min(converted):.0f} to "
        f"{max(converted):.0f} %. If 2e-4 is treated as tuned at rank 16 and alpha 32 and is converted by the law, the "
        f"excess loss is {min(given):.1f} to {max(given):.1f} %.",
        "* **Reinforcement learning (GRPO).** The suggestion for other tasks is so high that GRPO runs collapse. The "
        'suggestion with `task="rl"` is in the range where GRPO runs learn. But we chose the value for `task="rl"` on '
        "this run, so the run is not an independent test of it.",
        "* **The highest usable learning rate (DPO).** From rank 8 to 128, the highest learning rate at which the "
        f"model still writes intact stories falls as rank^{slope_of(broken, 8, 128):.1f}, while the law predicts that "
        f"best learning rates fall as rank^{law_slope(broken, 8, 128):.1f}. From rank 1 to 256, the highest usable "
        f"learning rate falls as rank^{slope_of(broken, 1, 256):.1f}, measured with nine stories for each rank and "
        "learning rate. The highest usable learning rate therefore need not change with the rank as the best learning "
        "rate does.",
    ]
    return "\n".join(lines)


def above(sweep: Sweep, way: str, reading: Reading) -> float:
    """Octaves by which a way's rate of full finetuning is above the best one, from rank 16."""
    move = moved(sweep, WAYS[way], reading, TUNED, FULL)
    if move is None or move.octaves is None:
        raise ValueError(f"{sweep.model} has no best rate of full finetuning.")
    return move.octaves


JUDGED = (8, 16, 32, 64, 128, 256)  # ranks of the 7B whose best rate is known
HIGHER = (32, 64, 128, 256)  # than rank 16


def of_7b(sweep: Sweep) -> str:
    grids = spacing([each for rank, each in sweep.curves.items() if rank != FULL])
    return "\n\n".join(
        [
            "## Qwen2.5-7B-Instruct, alpha = rank",
            f"Neighbouring learning rates of the sweep are {grids} apart. At ranks 2 and 4, the highest learning rate "
            "tried is the best one. At rank 8, the highest learning rate tried is also the best one, but the vertex "
            "of the parabola is lower. Full finetuning was run in pure bfloat16, where the steps of a small learning "
            "rate are rounded away, and its lowest loss is far above the lowest loss of LoRA. For full finetuning, "
            "learning rates below 1e-5 were not tried.",
            "The next table shows what learning rates that need no run lose, in % of the loss. Tinker's formula "
            "assumes alpha 32. The table shows the formula unchanged, and converted to alpha = rank with the factor "
            "√(32 / rank). It also shows 2e-4 if it is treated as tuned at rank 16 and alpha 32, and converted by the "
            "law:",
            without_a_run(sweep),
            "What the best learning rate of rank 16 (vertex) loses at other ranks, in %:",
            from_rank(sweep, "vertex", TUNED),
            "What the best learning rate of each rank (vertex) loses after a conversion by the default law, in %:",
            by_default_law(sweep, "vertex"),
            "All conversions between ranks whose best learning rate is known, and all conversions from these ranks to "
            "full finetuning:",
            all_moves(sweep),
        ]
    )


def of_4b(sweep: Sweep) -> str:
    law = [
        [name, *(cell(sweep, moved(sweep, way, "tried", a, b), b) for a, b in PAIRS)]
        for name, way in WAYS.items()
    ]
    heads = ["octaves above the best", *(f"{named(a)} → {named(b)}" for a, b in PAIRS)]
    return "\n\n".join(
        [
            "## Qwen3-4B, alpha 32",
            "This source contains only the best learning rates, from grids of 12 to 20 learning rates on one seed. "
            "The losses at the best learning rates differ by 0.003 from rank 1 to full finetuning, so "
            "little is lost with any of them.",
            without_a_run(sweep),
            table_of(heads, law),
            all_moves(sweep),
        ]
    )


PAIRS = ((1, 16), (1, 256), (16, 256), (16, 1), (1, FULL), (16, FULL), (256, FULL))


def of_grpo(at_end: Sweep, at_best: Sweep) -> str:
    grids = spacing([each for rank, each in at_end.curves.items() if rank != FULL])
    flat = at_end.best["vertex"]
    ratios = [2.0 ** (x - flat[FULL]) for rank, x in flat.items() if rank != FULL]
    rows = []
    for rank in at_end.ranks:
        asked = at_end.asked(rank)
        plain = suggest_lr(asked, method=asked.method)
        for name, given in (
            ("other", plain),
            ("rl", suggestion_of(at_end, rank)),
        ):
            x = math.log2(given.lr)
            accuracy = [
                number(100 * share, 0)
                for share in (accuracy_at(each, rank, x) for each in (at_best, at_end))
            ]
            rows.append([named(rank), name, f"{given.lr:.2g}", *accuracy])
    heads = ["", "task", "suggested", "accuracy over the run, %", "at its end, %"]
    return "\n\n".join(
        [
            "## GRPO of Qwen3-1.7B on MATH, alpha 32",
            f"Neighbouring learning rates are {grids} apart, and each was run with one seed. We compare the accuracy "
            "at the end of a run, because it shows whether the run collapsed. Between a learning rate at which runs "
            "learn and one at which they collapse, a linear interpolation means little. We chose the value for "
            '`task="rl"` on this file and on the study\'s reinforcement learning task (`suggestion.md`), so nothing '
            "here is an independent test of it. For full finetuning, the suggestion is the lowest best learning rate "
            "of five sources (`full_finetuning.md`), at which this model learns too slowly.",
            table_of(heads, rows),
            "What learning rates that need no run lose, in percentage points of accuracy at the end:",
            without_a_run(at_end),
            "What the best learning rate of each rank (the middle of its flat part) loses after a conversion by the "
            "default law, in percentage points:",
            by_default_law(at_end, "vertex"),
            "All conversions between ranks, and all conversions from LoRA to full finetuning. Here LoRA's best "
            f"learning rates are {min(ratios):.1f} to {max(ratios):.1f} times those of full finetuning, which is less "
            "than the law predicts:",
            all_moves(at_end),
        ]
    )


def accuracy_at(sweep: Sweep, rank: int, x: float) -> float:
    return abs(min(sweep.curves[rank].values()) + sweep.lost(rank, x)) / 100


def of_dpo(broken: Broken) -> str:
    start = broken.highest_whole(8)
    rows = []
    for rank, shares in broken.coherent.items():
        trait = broken.trait[rank]
        x = suggested(broken.model, rank)
        whole = float(np.interp(x, list(shares), list(shares.values())))
        rates = [
            broken.highest_whole(rank),
            start + law_of(broken, 8, rank),
            start + math.log2(8 / rank),
            max(trait, key=trait.__getitem__),
            x,
        ]
        rows.append([f"{rank}", *(f"{2.0**x:.2g}" for x in rates), f"{whole:.0f} %"])
    heads = ["rank", "highest rate with all stories whole", "from rank 8 by the law"]
    heads += ["by 1 / rank", "rate with most of the trait", "suggested"]
    heads += ["stories whole there"]
    slopes = "; ".join(
        f"from rank {low} to {high} {slope_of(broken, low, high):.2f}, by the law {law_slope(broken, low, high):.2f}"
        for low, high in ((8, 128), (1, 256))
    )
    return "\n\n".join(
        [
            "## DPO of OLMo-2-1B, alpha = 2 rank",
            f"Neighbouring learning rates are {spacing([*broken.coherent.values()])} apart. Nine stories for each rank "
            "and learning rate are few: at 4e-4, some stories of rank 4 break, but none of rank 8. The share of "
            "answers with the trained trait is not a loss.",
            table_of(heads, rows),
            "By least squares, the highest learning rate with intact stories falls with these powers of the rank: "
            f"{slopes}. From rank 8 on, if the highest usable learning rate of one rank is converted to a higher rank "
            "by the law, the result is too high. The suggestion is also too high, because it is made for supervised "
            "finetuning.",
        ]
    )


def law_of(broken: Broken, a: int, b: int) -> float:
    """Octaves by which the default law moves a rate."""
    return WAYS[DEFAULT](broken.model, a, b) or 0.0


def slope_of(broken: Broken, low: int, high: int) -> float:
    """The power of the rank by which the highest whole rate falls, by least squares."""
    ranks = [rank for rank in broken.coherent if low <= rank <= high]
    return power([(rank, broken.highest_whole(rank)) for rank in ranks])


def law_slope(broken: Broken, low: int, high: int) -> float:
    """The same of the default law."""
    ranks = [rank for rank in broken.coherent if low <= rank <= high]
    return power([(rank, law_of(broken, TUNED, rank)) for rank in ranks])


def power(points: Sequence[tuple[int, float]]) -> float:
    """The slope of log2 rates over log2 of the rank, by least squares."""
    return float(
        np.polyfit([math.log2(rank) for rank, _ in points], [x for _, x in points], 1)[
            0
        ]
    )


# --- 35 published models ----------------------------------------------------------------------------------------------

LAWS = ("mua", MuA(tokens=8.0), "constant", Power(-0.5, law=Constant()))
LAW_NAMES = (DEFAULT, "µA of 8 tokens", "kept (as by the paper's law)", ROOT)


def of_published(path: Path) -> str:
    rows = []
    for count, models in (("35", tinker.HIDDEN), ("17 added", tinker.ADDED)):
        runs = tinker.of_models(path, models)
        for best in ("parabola", "bowl"):
            scores = bench_law(runs, LAWS, best=best)
            for name, score in zip(LAW_NAMES, scores, strict=True):
                mean = statistics.fmean(score.lost)
                rows.append(
                    [
                        *(count, best, name),
                        *(number(score.median), number(score.worst)),
                        *(number(100 * mean), number(100 * max(score.lost))),
                        f"{len(score.moves)}",
                        f"{score.off_grid}",
                    ]
                )
    heads = ["models", "best rate by", "law", "median, octaves", "worst"]
    heads += ["lost, mean, %", "worst", "moves", "off the grid"]
    return "\n\n".join(
        [
            "## 35 language models, alpha 32",
            "The table contains conversions for the models whose best learning rate is inside the grid at two ranks "
            "or more. In this section, losses between the learning rates of a grid are interpolated with the study's "
            "spline. A best learning rate is either the vertex of the parabola through the lowest loss and its "
            "neighbours, or the vertex of a bowl that all ranks of a model share. Neighbouring learning rates are 1 "
            "to 2 octaves apart. There are no runs of full finetuning. We chose the default law after we had seen 18 "
            "of the models, and `suggest_lr` is fitted to all models.",
            table_of(heads, rows),
            from_16(tinker.of_models(path)),
            published_without_a_run(path),
        ]
    )


def from_16(runs: Sequence[dict[str, Any]]) -> str:
    """What is lost from rank 16 on, by the first reading of a best rate."""
    higher = [run for run in runs if run["rank"] >= TUNED]
    law, _, unchanged, _ = bench_law(higher, LAWS, best="parabola")
    lost = [100 * statistics.fmean(score.lost) for score in (unchanged, law)]
    return f"From rank 16 on, the models lose {lost[0]:.3f} % with an unchanged learning rate and {lost[1]:.3f} % by the default law."


def published_without_a_run(path: Path) -> str:
    """What rates lose that need no run, at all best rates inside the grids."""
    targets = tinker.targets(path)
    families = [each for each in targets if tinker.power_of(each.model) is not None]
    suggested = "`suggest_lr`"
    of_families = ", Llama and Qwen"
    rates = {
        suggested: [suggest_lr(each.at) for each in targets],
        "2e-4": [Rate(2e-4)] * len(targets),
        "1e-4": [Rate(1e-4)] * len(targets),
        suggested + of_families: [suggest_lr(each.at) for each in families],
        FORMULA + of_families: [
            Rate(tinker.get_lr(each.model, tinker.HIDDEN[each.model]) or math.nan)
            for each in families
        ],
    }
    rows = []
    for name, given in rates.items():
        score = tinker.score_of(families if of_families in name else targets, given)
        held = f"{100 * score.held:.0f} %" if suggested in name else "–"
        octaves = number(score.octaves, 1, sign=True)
        rows.append([name, number(score.lost), octaves, held, f"{len(given)}"])
    heads = ["rate", "lost, mean, %", "octaves above the best", "90 % band holds"]
    return table_of([*heads, "best rates"], rows)


def of_gemma() -> str:
    explained = (learning_rate_matters.__doc__ or "").strip()
    tables = learning_rate_matters.tables().replace("## ", "### ")
    return f"## Gemma-3-1B and Qwen3-0.6B, alpha = rank\n\n{explained}\n\n{tables}"


def sources() -> str:
    rows = [
        [f"`{name}`", source.words, f"`{source.sha256}`"]
        for name, source in others.SOURCES.items()
    ]
    return block("The files", ["file", "what it holds, and its source", "sha256"], rows)


# --- README -----------------------------------------------------------------------------------------------------------


def readme_table(seven: Sweep) -> str:
    """What ways lose at every rank of the 7B whose best rate is known, %."""
    rates: dict[str, Callable[[int], float]] = {
        "**`suggest_lr`**, no trials": lambda rank: suggested(seven, rank),
        "rank 16's best, **converted by the law**": lambda rank: at_rank(
            seven, DEFAULT, rank
        ),
        f"the same, {ROOT}": lambda rank: at_rank(seven, ROOT, rank),
        "the same, unchanged": lambda rank: at_rank(seven, KEPT, rank),
        "2e-4, tuned at rank 16 and alpha 32, converted by the law": lambda rank: (
            math.log2(constants(seven, rank)[CONVERTED])
        ),
        "2e-4 at every rank": lambda rank: math.log2(2e-4),
    }
    rows = [
        [name, *(number(seven.lost(rank, rate(rank)), 1) for rank in JUDGED)]
        for name, rate in rates.items()
    ]
    return table_of(["rank", *map(str, JUDGED)], rows)


def suggested(sweep: Sweep, rank: int) -> float:
    """log2 of the suggested rate."""
    return math.log2(suggestion_of(sweep, rank).lr)


def at_rank(sweep: Sweep, way: str, rank: int) -> float:
    move = moved(sweep, WAYS[way], "vertex", TUNED, rank)
    if move is None:
        raise ValueError(f"{sweep.model} has no best rate at rank {TUNED}.")
    return move.x


if __name__ == "__main__":
    main()
