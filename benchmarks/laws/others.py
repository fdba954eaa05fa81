"""Sweeps of large models that others published: their files, their set-ups, and the scores in them.

The files are not in the repository. A script is given them, and takes those of the hash that was read. Of `sft_sweep.md`,
`tinker.py` knows the models.

**Other sweeps.** On 2026-11-26 and 2026-11-30, we searched a stored index of public repositories and pages
for sweeps of several ranks, with several learning rates at each rank, a held-out score and a licence. We
found these sources but did not use them:

* huggingface/peft, method_comparison (Apache-2.0), contains LoRA runs at several ranks, but only with one or
  two learning rates each.
* nikhil-ghosh-berkeley/loraplus (MIT) contains learning rates of A against learning rates of B, and scripts
  without results.
* nayyirahsan/LoRA-Rank-Threshold-Study (no licence file) contains ranks 4 and 64 at three learning rates.
* silversuncn/lora-rank-scaling (no licence file) contains six ranks at one learning rate.
* agme2019/lora-lr-rank-sensitivity (MIT) contains ranks 2 to 32 at 16 learning rates on a synthetic task. The
  accuracies are only 1.6 to 7 %, so a best learning rate is known to within an octave at best. On this task,
  the default law is 0.28 octaves off in the median, and an unchanged learning rate is 0.58 octaves off. With
  bowl-shaped fits, the default law is 0.61 octaves off, and an unchanged learning rate is 0.31 octaves off
  (`published.md` at 58e6aeca).
* Four repositories called LoRA without regret, by waynehacking8, olokevin, kyleliang919 and Brokttv, contain
  one learning rate per rank, pictures, or only scripts.
* The paper of µA (arXiv 2602.06204, CC BY 4.0) shows its sweeps in the stored copy only as figures, without
  the numbers.
* On the Scaling of PEFT (arXiv 2606.02437) and a report of its authors examine ranks and learning rates under
  three rules for alpha (DistilBERT at eight ranks, Qwen3-4B at four ranks). The index only contains the
  abstract of the paper and the text of the report. The sweeps of the report are pictures at another address,
  and no stored repository of the authors contains files with the names of these pictures. The text of the
  report agrees with us: with a fixed alpha / rank, the best learning rate falls with the rank, and with a
  fixed alpha, it hardly changes. The report also says that Qwen3-4B-Instruct on MATH is best near 7e-7, the
  lowest learning rate tried. This learning rate is far below every 90 % interval of `suggest_lr`.
* The Hidden Power of Scaling Factor in LoRA Optimization (arXiv 2606.12883, CC BY 4.0) is a paper of which
  the index contains only the beginning, without the sweeps over alpha and learning rate.
"""

from __future__ import annotations

import csv
import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import click
import numpy as np
from laws import tinker
from study.grids import FULL

from rankaware_optim import Reference

Curve = Mapping[float, float]  # a score by log2 of the rate, lower is better
Reading = Literal["tried", "vertex"]
READINGS: tuple[Reading, ...] = ("tried", "vertex")
FLAT = 2.0  # points of accuracy that count as none


class Source(NamedTuple):
    """A file: its hash, and what it holds and where it comes from, in words."""

    sha256: str
    words: str


_PERSONA = "github.com/lawrencefeng17/persona-system, commit 20c619d"
_REGRET = "github.com/kenkuuu/lora-without-regret, commit 99eca11"
SOURCES = {
    "qwen2.5-7b.csv": Source(
        "5dd3023ad295baebdecd9cbcaeb951e3bad783ef7f60553efcc8f18b02bbd302",
        "Held-out loss of Qwen2.5-7B-Instruct, alpha = rank, PEFT's init, all linear layers. AdamW, linear decay after 5 "
        "steps, batch 66, 784 steps, loss on completions only. LoRA's factors are float32, full finetuning is pure "
        f"bfloat16. Mostly one seed. {_PERSONA}, `figures/memorization_posthoc.json`; three rates of full finetuning are "
        "means of several runs, from `figures/sft_subliminal_results.md`.",
    ),
    "qwen3-4b.csv": Source(
        "1a284f12983ac38f0ad12b501346e61c69320a3ab0d131a5b029efba0ccaa8ec",
        "Best rates and test losses of Qwen3-4B on no_robots, alpha 32, ranks 1, 16 and 256 and full finetuning (bfloat16). "
        "200 steps of 32 at a constant rate. Each is the lowest of 12 to 20 rates on one seed; the others are not "
        f"recorded. {_REGRET}, README.",
    ),
    "qwen3-1.7b-grpo.csv": Source(
        "e91a2ec03751fe3f7d23e2805be726926b6d5e5cd363dd592506934ad1ccc831",
        "Accuracy on MATH of Qwen3-1.7B after 50 steps of GRPO (32 prompts × 8), alpha 32, ranks 1, 16 and 256 and full "
        f"finetuning (bfloat16), constant rate, one seed. {_REGRET}, `results/wandb_rl_export.db`.",
    ),
    "olmo2-1b-dpo.csv": Source(
        "5e2c635e1e84fa1668ca7e5e3dabc2328672c01e1d830bb46f0152d15207f386",
        "DPO of OLMo-2-1B, alpha = 2 rank, ranks 1 to 256 at five rates, 582 steps: the share of answers with a trained "
        "trait (mean of three to six seeds; not a loss) and of nine stories that stay coherent. "
        f"{_PERSONA}, `figures/expB_dpo_lr_sweep_summary.csv`, `figures/dpo_rank_lr_coherence.md`.",
    ),
    "sft_sweep.md": Source(tinker.SHA256, tinker.SET_UP),
}


# A page keeps its section on this file where the file is not given.
OPTIONAL = ("sft_sweep.md",)


def files_by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """The files by the names that this module knows them by, whatever they are called.

    Raises:
        click.ClickException: a file is another one, or one is missing.
    """
    names = {source.sha256: name for name, source in SOURCES.items()}
    given: dict[str, Path] = {}
    for path in paths:
        name = names.get(hashlib.sha256(path.read_bytes()).hexdigest())
        if name is None:
            raise click.ClickException(
                f"{path} is none of the files that were read. large_models.md names their sources and hashes."
            )
        given[name] = path
    missing = [name for name in SOURCES if name not in given and name not in OPTIONAL]
    if missing:
        raise click.ClickException(f"Missing: {', '.join(missing)}. Give all files.")
    return given


# --- a model's sweep ------------------------------------------------------------------------------------------------


class Widths(NamedTuple):
    """The sizes of a Llama-like block: hidden, of all queries, of all keys, and of the feed-forward layer."""

    hidden: int
    queries: int
    keys: int
    inner: int

    @property
    def mean(self) -> float:
        """Mean fan-in of its seven linear layers, weighted by the size of their weights, as `Survey.width`."""
        hidden, queries, keys, inner = self
        shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
        total = sum(fan_in * fan_out for fan_in, fan_out in shapes)
        return sum(fan_in * fan_in * fan_out for fan_in, fan_out in shapes) / total


@dataclass(frozen=True)
class Sweep:
    """A model's scores by rank and rate, full finetuning at rank `FULL`.

    Args:
        model: the model's name.
        widths: its sizes.
        alpha: alpha of a rank.
        unit: what a rate loses: "%" of the lowest loss, or "points" of accuracy.
        curves: the scores, {rank: {log2 rate: score}}. Of points the score is minus the accuracy in %.
        best: {reading: {rank: log2 of the best rate}}, of ranks whose best rate does not lie at an end of the grid.
    """

    model: str
    widths: Widths
    alpha: Callable[[int], float]
    unit: Literal["%", "points", "octaves"]
    curves: Mapping[int, Curve]
    best: Mapping[Reading, Mapping[int, float]]

    @property
    def ranks(self) -> list[int]:
        """The ranks from low to high, full finetuning last."""
        every = {*self.curves, *self.best["tried"]}
        return sorted(every, key=lambda rank: (rank == FULL, rank))

    def at(self, rank: int) -> Reference:
        """A rank as a law sees it, or full finetuning."""
        if rank == FULL:
            return Reference(method="full", fan_in=self.widths.inner)
        return Reference(rank, self.alpha(rank), fan_in=self.widths.mean)

    def asked(self, rank: int) -> Reference:
        """The same as `suggest_lr` sees it: by the most common fan-in."""
        if rank == FULL:
            return self.at(rank)
        return Reference(rank, self.alpha(rank), fan_in=self.widths.hidden)

    def lost(self, rank: int, x: float) -> float:
        """What log2 rate x loses, by straight lines between the rates tried, flat beyond them."""
        curve = self.curves[rank]
        xs = sorted(curve)
        score = float(np.interp(x, xs, [curve[at] for at in xs]))
        least = min(curve.values())
        return 100 * (score / least - 1) if self.unit == "%" else score - least

    def is_tried(self, rank: int, x: float) -> bool:
        """Whether log2 rate x lies between rates that were tried."""
        return min(self.curves[rank]) <= x <= max(self.curves[rank])


def lowest_tried(curve: Curve) -> float | None:
    """log2 of the rate with the lowest score; None at an end of the grid."""
    best = min(curve, key=curve.__getitem__)
    return None if best in (min(curve), max(curve)) else best


def vertex_of_three(curve: Curve) -> float | None:
    """The minimum of the parabola through the three lowest scores; None if it does not lie between their rates."""
    x0, x1, x2 = sorted(sorted(curve, key=curve.__getitem__)[:3])
    left = (curve[x1] - curve[x0]) / (x1 - x0)
    right = (curve[x2] - curve[x1]) / (x2 - x1)
    if right <= left:
        return None
    vertex = (x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)
    return vertex if x0 <= vertex <= x2 else None


def middle_of_flat(curve: Curve) -> float | None:
    """The middle of the rates around the best one that lose at most `FLAT`; None if they reach an end of the grid."""
    xs = sorted(curve)
    best = min(xs, key=curve.__getitem__)
    most = curve[best] + FLAT
    low = high = xs.index(best)
    while low > 0 and curve[xs[low - 1]] <= most:
        low -= 1
    while high < len(xs) - 1 and curve[xs[high + 1]] <= most:
        high += 1
    if low == 0 or high == len(xs) - 1:
        return None
    return (xs[low] + xs[high]) / 2


def _known(found: Mapping[int, float | None]) -> dict[int, float]:
    return {rank: x for rank, x in found.items() if x is not None}


# --- the files ------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curves_of(rows: Sequence[Mapping[str, str]], column: str) -> dict[int, Curve]:
    """The mean of a column by log2 rate, by rank. Cells without a value are left out."""
    values: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row[column]:
            rank = int(row["rank"] or FULL)
            values[rank][math.log2(float(row["lr"]))].append(float(row[column]))
    return {
        rank: {x: statistics.fmean(each) for x, each in sorted(of_rank.items())}
        for rank, of_rank in values.items()
    }


def alpha_32(rank: int) -> float:
    return 32.0


def qwen_7b(path: Path) -> Sweep:
    curves = curves_of(rows_of(path), "loss")
    best: dict[Reading, dict[int, float]] = {
        "tried": _known({rank: lowest_tried(each) for rank, each in curves.items()}),
        "vertex": _known(
            {rank: vertex_of_three(each) for rank, each in curves.items()}
        ),
    }
    widths = Widths(3584, 3584, 512, 18944)
    return Sweep("Qwen2.5-7B", widths, float, "%", curves, best)


def qwen_4b(path: Path) -> Sweep:
    """Best rates only, of runs that adapt all layers."""
    best = {
        int(row["rank"] or FULL): math.log2(float(row["best_lr"]))
        for row in rows_of(path)
        if row["layers"] == "all"
    }
    widths = Widths(2560, 4096, 1024, 9728)
    return Sweep(
        "Qwen3-4B", widths, alpha_32, "octaves", {}, {"tried": best, "vertex": {}}
    )


def qwen_grpo(path: Path, column: str = "accuracy_final") -> Sweep:
    """Accuracy as a score: minus percent. The second reading of a best rate is the middle of where it is flat."""
    accuracy = curves_of(rows_of(path), column)
    curves = {
        rank: {x: -100 * value for x, value in each.items()}
        for rank, each in accuracy.items()
    }
    best: dict[Reading, dict[int, float]] = {
        "tried": _known({rank: lowest_tried(each) for rank, each in curves.items()}),
        "vertex": _known({rank: middle_of_flat(each) for rank, each in curves.items()}),
    }
    widths = Widths(2048, 2048, 1024, 6144)
    return Sweep("Qwen3-1.7B", widths, alpha_32, "points", curves, best)


class Broken(NamedTuple):
    """DPO of OLMo-2-1B: the model, and the shares of coherent stories and of the trait, %, by log2 rate, by rank."""

    model: Sweep
    coherent: Mapping[int, Curve]
    trait: Mapping[int, Curve]

    def highest_whole(self, rank: int) -> float:
        """log2 of the highest rate up to which all stories are coherent."""
        whole = -math.inf
        for x, share in self.coherent[rank].items():
            if share < 100:
                break
            whole = x
        return whole


def olmo_dpo(path: Path) -> Broken:
    rows = rows_of(path)
    widths = Widths(2048, 2048, 2048, 8192)
    no_rates: dict[Reading, dict[int, float]] = {"tried": {}, "vertex": {}}
    model = Sweep("OLMo-2-1B", widths, lambda rank: 2.0 * rank, "%", {}, no_rates)
    coherent = curves_of(rows, "coherent_percent")
    return Broken(model, coherent, curves_of(rows, "trait_percent"))
