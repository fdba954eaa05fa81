"""How many tokens has the default law? What was looked at when 2 were chosen.

    python benchmarks/laws/default_law.py FILE...    # no training: results/default_law.md; files as for large_models.py

**A decision, not a test.** The default law has 2 tokens, and uses a moved rate as it is. This was decided after a look
at all that this page shows, so nothing here judges it. The default before had 1 token, and multiplied a moved rate by
.9. A rule had named both on the seven tasks of the study, on straight lines between rates (frozen at ad167a4a). By the
spline, the estimator of all pages, the same rule named 2 tokens, and kept the .9.

**What it rests on.** On small tasks with short runs 1 to 4 tokens lose alike, with .9 or without. In longer runs, and
with language models that others trained, more tokens are better. × .9 gains nothing in longer runs. With these models it
is worse than none, and from rank 4 on worse than keeping the rate. That is nearer to what most people train. 8 to 16
tokens would serve it best, and lose 1.2 to 1.9 % for .7 on the small tasks, most of it with alpha kept. What × .9 was
good for is full finetuning on the nine tasks, 3.4 % for 4.1. In longer runs it was worse there too.

**What came later.** 17 language models were added to the published sweep. On them 2 tokens lose .07 % of the loss, a kept
rate .13, 8 tokens .05: the order is that of the 18 before. Then five large models (`large_models.md`). With alpha = rank
2 tokens or fewer lose least on a 7B, and 8 fit a 1B best. With alpha kept more tokens fit better, and gain hundredths of a
percent. So the default keeps its 2.

**Figures.** Each rate that is best in the mean over seeds is moved to every other rank of its configuration, and to full
finetuning. Regret is the study's: the share of the attainable gain that is lost. A task's figure is a mean over its
moves, and all tasks weigh the same. Tokens are those of `Falling(law=MuA(tokens=...))`. Differences are in points, with
the 95 % interval of 10,000 bootstraps of the tasks, or of the models; below 0 two tokens lose less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, permutations
from pathlib import Path

import click
import torch
from internals import read_sweep
from laws import large_models, learning_rate_matters, others, tinker
from laws.scoring import LossCurve, all_curves
from recording import block, machine, made_on, number, write_explained
from study import longer
from study.configurations import CONFIGS, RSLORA
from study.domains import HELD_OUT, STUDY
from study.grids import FULL
from study.moving import Way
from study.optima import ranks_in
from study.regret import in_points, regrets_between
from study.runs_on_file import read
from study.suite import STORES, finished

from rankaware_optim import Constant, Falling, MuA
from rankaware_optim.laws import bound_law, checked_multiplier

RESTS_ON = ("laws.adam", "scores")
KEEPING, TODAY = "keeping it", "2 tokens"


def of_tokens(tokens: float, added: float = 0.0) -> Way:
    return Way(Falling(law=MuA(tokens=tokens)), added)


WAYS = {
    KEEPING: Way(None),
    "the paper's law": Way(MuA(tokens=None)),
    "1 token": of_tokens(1.0),
    TODAY: of_tokens(2.0),
    "4 tokens": of_tokens(4.0),
    "8 tokens": of_tokens(8.0),
    "16 tokens": of_tokens(16.0),
}
Lost = Mapping[str, Sequence[float]]  # shares, by task or model
LESS = f"{TODAY} less this one"


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(paths: Sequence[Path]) -> None:
    """Write results/default_law.md."""
    of = others.files_by_name(paths)
    path = of["sft_sweep.md"]
    write_explained(
        "default_law",
        "The default law",
        __doc__,
        block("Nine tasks, %", TASK_HEADS, list(task_rows())),
        ON_TASKS,
        block("Longer runs, %", LONG_HEADS, list(long_rows())),
        ON_LENGTHS,
        block(
            "18 language models, % of the loss", LM_HEADS, list(lm_rows(path, FIRST))
        ),
        block("17 added since, % of the loss", LM_HEADS, list(lm_rows(path, ADDED))),
        on_models(path),
        block("Large models", LARGE_HEADS, list(large_rows(of))),
        ON_LARGE,
        made_on(machine(1)),
    )


def mean_of(lost: Lost, digits: int = 2) -> str:
    """The mean, in percent."""
    return number(100 * statistics.fmean(chain(*lost.values())), digits)


def less(today: Lost, other: Lost, digits: int = 2) -> str:
    """How much less is lost today, with its interval over tasks or models."""
    if today == other:
        return "–"
    apart = [
        [mine - theirs for mine, theirs in zip(today[each], other[each], strict=True)]
        for each in today
    ]
    return in_points(apart, digits)


# --- nine tasks -----------------------------------------------------------------------------------------------------------

TASKS = (*STUDY, *HELD_OUT)
SETTINGS = ("alpha = rank", "alpha kept", "Init[B]", "rsLoRA")
COUNTED = ("alpha = rank", "alpha kept", "rsLoRA")  # between ranks, at Init[A]
TO_FULL = "to full finetuning"
TASK_HEADS = (
    *("way", *COUNTED, "their mean", LESS),
    *("the seven", "the two later", TO_FULL, "Init[B]"),
)
ON_TASKS = (
    "From rank to rank at Init[A]; the last columns: to full finetuning from Init[A], and from rank to rank at Init[B]. "
    "`the seven` and `the two later`: the mean of the first three columns over the tasks of the study, and over those of "
    "`held_out.md`."
)


@cache
def on_tasks(way: Way) -> Mapping[str, Lost]:
    """{setting: {task: mean regret of its moves}}."""
    found: dict[str, dict[str, Sequence[float]]] = {}
    for task in TASKS:
        done = finished(read(STORES / f"{task}.jsonl"), "full")
        regrets: dict[str, list[float]] = {}
        for config, setting in zip((*CONFIGS, *RSLORA), SETTINGS, strict=True):
            cells = {r: (task, config, r) for r in ranks_in(done, task, config)}
            if setting in ("alpha = rank", "alpha kept"):
                cells[FULL] = (task, "full", FULL)
            moved = regrets_between(done, cells, way.shift(task, config))
            for (_, target), regret in moved.items():
                where = TO_FULL if target == FULL else setting
                regrets.setdefault(where, []).append(regret)
        for setting, each in regrets.items():
            found.setdefault(setting, {})[task] = [statistics.fmean(each)]
    return found


def counted(way: Way, tasks: Sequence[str] = TASKS) -> Lost:
    """The mean over the settings that count, by task."""
    of = on_tasks(way)
    means = {task: [of[setting][task][0] for setting in COUNTED] for task in tasks}
    return {task: [statistics.fmean(each)] for task, each in means.items()}


def task_rows() -> Iterator[list[str]]:
    today = counted(WAYS[TODAY])
    for name, way in WAYS.items():
        of, mine = on_tasks(way), counted(way)
        by_setting = [mean_of(of[setting]) for setting in COUNTED]
        by_tasks = [mean_of(counted(way, tasks)) for tasks in (STUDY, HELD_OUT)]
        others = [mean_of(of[setting]) for setting in (TO_FULL, "Init[B]")]
        overall = [mean_of(mine), less(today, mine)]
        yield [name, *by_setting, *overall, *by_tasks, *others]


# --- longer runs ----------------------------------------------------------------------------------------------------------

SHORT, LONGER = (25, 50, 100), (200, 400, 800)
LONG_HEADS = (
    *("way", "16 ↔ 128, 25 to 100 steps", "16 ↔ 128, 200 to 800 steps", LESS),
    "to full finetuning, 200 to 800 steps",
)
ON_LENGTHS = (
    "Six tasks (`study/longer.py`) at Init[A], alpha = rank. The rates of ranks 16 and 128 are moved to the other rank, "
    "and to full finetuning, at each length. Grids are narrow: a rate beyond one counts as the last rate tried, so keeping "
    "it loses more than is shown."
)


@cache
def on_length(way: Way, steps: int) -> tuple[Lost, Lost]:
    """{task: regrets of its moves}, to the other rank and to full finetuning."""
    lora, full = {}, {}
    for task, done in longer.on_file().items():
        cells = {rank: longer.cell_at_a(task, rank, steps) for rank in (16, 128, FULL)}
        regrets = regrets_between(done, cells, way.shift(task, longer.AT_A))
        lora[task] = [regrets[16, 128], regrets[128, 16]]
        full[task] = [regrets[16, FULL], regrets[128, FULL]]
    return lora, full


def over(way: Way, lengths: Sequence[int], to_full: bool = False) -> Lost:
    """The same over several lengths."""
    each = [on_length(way, steps)[to_full] for steps in lengths]
    return {task: list(chain(*(lost[task] for lost in each))) for task in each[0]}


def long_rows() -> Iterator[list[str]]:
    today = over(WAYS[TODAY], LONGER)
    for name, way in WAYS.items():
        short, mine = over(way, SHORT), over(way, LONGER)
        full = mean_of(over(way, LONGER, to_full=True))
        yield [name, mean_of(short), mean_of(mine), less(today, mine), full]


# --- published language models --------------------------------------------------------------------------------------------

LOWEST = 4  # rank from which on most people train
LM_HEADS = ("way", "all ranks", LESS, "ranks 4 to 128", LESS)
FIRST, ADDED, EVERY = tuple(tinker.FIRST), tuple(tinker.ADDED), tuple(tinker.HIDDEN)


@cache
def lost_by_models(
    path: Path, way: Way, lowest: int, models: tuple[str, ...] = EVERY
) -> Lost:
    """{model: what moved rates lose between ranks from `lowest` on, as shares of the lowest loss}."""
    curves = all_curves(read_sweep(tinker.of_models(path, models)).runs)
    known_ranks = [curve for curve in curves if (curve.at.rank or 0) >= lowest]
    found: dict[str, list[float]] = {}
    for source, target in permutations(known_ranks, 2):
        whole = math.isfinite(source.best) and len(target.losses) >= 3
        if whole and source.compares_with(target):
            x = source.best + octaves(way, source, target)
            inside = min(max(x, min(target.losses)), max(target.losses))
            found.setdefault(source.model, []).append(target.lost_at(inside) or 0.0)
    return found


def octaves(way: Way, source: LossCurve, target: LossCurve) -> float:
    """By how much a way moves a rate between two ranks of a model."""
    if way.law is None:
        return 0.0
    law = bound_law(way.law, torch.optim.AdamW, {})
    moved = checked_multiplier(law, target.at.as_factor(), source.at)
    return math.log2(moved) + way.added


def lm_rows(path: Path, models: tuple[str, ...]) -> Iterator[list[str]]:
    for name, way in WAYS.items():
        row = [name]
        for lowest in (1, LOWEST):
            mine = lost_by_models(path, way, lowest, models)
            today = lost_by_models(path, WAYS[TODAY], lowest, models)
            row += [mean_of(mine, 3), less(today, mine, 3)]
        yield row


def on_models(path: Path) -> str:
    """What the rows of language models are of."""
    counts = []
    for models in (FIRST, ADDED):
        for lowest in (1, LOWEST):
            lost = lost_by_models(path, WAYS[TODAY], lowest, models)
            counts.append(f"{len([*chain(*lost.values())])} of {len(lost)} models")
    return (
        "`sft_sweep.md` (`large_models.md` names its source): AdamW, alpha 32 at every rank, so the paper's law keeps a rate. "
        "A best rate inside its grid is moved to every other rank of its model that has three rates or more. Where the best "
        "rate there lies at an end of its grid, more is lost than is shown. All moves weigh the same: "
        f"{counts[0]}, from rank {LOWEST} on {counts[1]}; of those added since {counts[2]} and {counts[3]}. These were not "
        "looked at when the law was chosen. README's figures are of all models from that rank on."
    )


# --- large models -----------------------------------------------------------------------------------------------------

LARGE_HEADS = (
    *("way", "7B, alpha = rank: lost, mean, %", "worst", "octaves, rms"),
    *("Gemma-3-1B, alpha = rank: octaves, rms", "4B, alpha 32: octaves, rms"),
    *("GRPO, alpha 32: points lost, mean", "7B to full finetuning: octaves, rms"),
    *("4B", "GRPO"),
)
ON_LARGE = (
    "All moves between ranks whose best rate is known, and from them to full finetuning. On the 7B a best rate is the vertex "
    "of a parabola, in GRPO the middle of the rates around the best one that lose less than two points. One seed."
)


def large_rows(of: Mapping[str, Path]) -> Iterator[list[str]]:
    seven = others.qwen_7b(of["qwen2.5-7b.csv"])
    four = others.qwen_4b(of["qwen3-4b.csv"])
    grpo = others.qwen_grpo(of["qwen3-1.7b-grpo.csv"])
    for name, of_way in WAYS.items():
        law = of_way.law or Constant()
        way = large_models.by_law(law)
        on_seven = large_models.moves(seven, way, "vertex", to_full=False)
        on_four = large_models.moves(four, way, "tried", to_full=False)
        on_grpo = large_models.moves(grpo, way, "vertex", to_full=False)
        yield [
            name,
            number(statistics.fmean(each.lost for each in on_seven)),
            number(max(each.lost for each in on_seven)),
            off(on_seven),
            number(large_models.root_mean_square(learning_rate_matters.errors_of(law))),
            off(on_four),
            number(statistics.fmean(each.lost for each in on_grpo)),
            off(large_models.moves(seven, way, "vertex", to_full=True)),
            off(large_models.moves(four, way, "tried", to_full=True)),
            off(large_models.moves(grpo, way, "vertex", to_full=True)),
        ]


def off(moves: Sequence[large_models.Move]) -> str:
    return number(
        large_models.root_mean_square([each.octaves or 0.0 for each in moves])
    )


if __name__ == "__main__":
    main()
