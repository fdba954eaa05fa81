"""Full finetuning in bfloat16: does the best rate rise with the share of weights that a step leaves where they are?

    python benchmarks/study/rounded.py --domain audio                    # resumable: results/rounded.jsonl
    python benchmarks/study/rounded.py FILE...          # results/rounded.md, of the runs on file

On two large models the law's rate of full finetuning is an octave too low. They were trained in pure bfloat16, where a
step of such a rate leaves most weights where they are. Is it that, and not the width that the law counts?

**Arms.** Weights in float32; in bfloat16; in bfloat16 with Kahan summation (torch-optimi) or stochastic rounding
(torchao); and rounded to 5, 4, 3 and 2 bits of the mantissa after each step (bfloat16 has 7). Networks compute in
float32 everywhere. In the bfloat16 arms the optimizer holds bfloat16 weights, and so bfloat16 moments, and the network
computes with their values. In the rounded ones the moments are float32. Heads stay in float32. AdamW, schedule, clipping and evaluation are
the study's, whose sweep is image generation's float32 arm; the others' are made again. Rates are an octave apart, at least
three, and more where the best is at an edge; two seeds. SmolLM2 has float32 and bfloat16 only, and one seed. Vision
classification and SmolLM2 were run later, by the same rule: it, and what is scored, stood before their runs.

**Share.** Of the trained weights, those that a step of float32's best rate leaves where they are, measured in float32's
run on its own steps, in the mean over them. **Shift.** log2 of an arm's best rate above float32's; a best rate is the
parabola's vertex. **Curve.** shift = .4 · log2(1 / (1 − share)), suggested by a byte transformer that is not among these
tasks. *Amended after a look at the runs of audio and of half of image generation*: before, the share was that of a
whole step of the rate, by arithmetic. Adam's steps are smaller, so it said .01 where the best rate had risen by .4.
Of the large models no other share is known.

**The rule, written before the runs.**

1. *One curve*: in every task and for bfloat16 and 5, 4, 3 and 2 bits the shift is within .4 octaves of the curve.
2. *The large models*: every best rate of LoRA, moved to full finetuning by the default law and then by the curve, at the
   share of normal weights of standard deviation .02 that a whole step leaves, lies within .5 octaves of the best one in the mean of ranks, on both
   models, by each reading of a best rate.
3. *Cures*: Kahan summation and stochastic rounding are within .25 octaves of float32 in every task.

4. *Widths*, if 1 or 2 does not hold: full finetuning's rate by the law from Init[A] at the largest fan-in, the mean one,
   and mean^(1 − p) · largest^p, p fitted on all other networks, over the study's nine tasks and the two large models.
   The one with the least rms of octaves off, by at least a tenth, is adopted.

If 1 and 2 hold, a report and `convert --dtype` give the rate for these weights beside that for float32 ones. If one does
not, they do not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from frontier.adaptive import parted, with_heads
from laws import others
from laws.large_models import DEFAULT, WAYS, moved
from laws.others import READINGS, Sweep
from recording import RESULTS, block, machine, number, write_explained
from study.best_rates import best_rate
from study.configurations import (
    ADAMW,
    CLIP,
    START,
    built,
    reference_at,
    run_at,
    start_of,
    starts,
)
from study.domains import HELD_OUT, STUDY, get_domain
from study.grids import FULL, Job, Line, Listed, Losses, Together, curve
from study.longer import AT_A
from study.loss_curves import between
from study.runs_on_file import complete, made_by, read
from study.suite import STORES, provenance, study_rates
from study.training import train
from torch import Tensor
from torch.optim import AdamW, Optimizer

from rankaware_optim import Falling, Reference
from rankaware_optim.calibration import seeded
from rankaware_optim.laws import checked_multiplier

RESTS_ON = ("laws",)
STORE = RESULTS / "rounded.jsonl"
SMOLLM2 = "language_smollm2"
TASKS = ("audio", "image_generation", "vision_classification", SMOLLM2)
FLOAT32, BFLOAT16, KAHAN, STOCHASTIC = (
    "float32",
    "bfloat16",
    "bfloat16, Kahan summation",
    "bfloat16, stochastic rounding",
)
BITS = {f"{bits} bits": bits for bits in (5, 4, 3, 2)}
ROUNDED = (BFLOAT16, *BITS)
ARMS = (FLOAT32, BFLOAT16, KAHAN, STOCHASTIC, *BITS)
AGAIN = ("audio", "vision_classification", SMOLLM2)  # not the study's sweep
LEFT = "share left, "
SLOPE, TOLERANCE, OF_LARGE, OF_CURES = 0.4, 0.4, 0.5, 0.25


# --- the arms ---------------------------------------------------------------------------------------------------------


def kahan(weights: Sequence[Tensor], lr: float) -> Optimizer:
    import optimi

    return optimi.AdamW(weights, lr=lr, eps=1e-8, kahan_sum=True, **ADAMW)


def stochastic(weights: Sequence[Tensor], lr: float) -> Optimizer:
    from torchao.optim import _AdamW

    torch.compiler.set_stance("force_eager")
    return _AdamW(weights, lr=lr, bf16_stochastic_round=True, **ADAMW)


def plain(weights: Sequence[Tensor], lr: float) -> Optimizer:
    return AdamW(weights, lr=lr, **ADAMW)


IN_BFLOAT16 = {BFLOAT16: plain, KAHAN: kahan, STOCHASTIC: stochastic}


def optimizer(arm: str, weights: Sequence[Tensor], lr: float) -> Optimizer:
    """The optimizer of an arm. After each of its steps the network has the arm's weights."""
    if arm in IN_BFLOAT16:
        return holding_bfloat16(IN_BFLOAT16[arm], weights, lr)
    opt = plain(weights, lr)
    if arm in BITS:
        rounding = partial(round_all, weights, BITS[arm])
        rounding()
        opt.register_step_post_hook(rounding)
    return opt


def holding_bfloat16(
    kind: Callable[[Sequence[Tensor], float], Optimizer],
    weights: Sequence[Tensor],
    lr: float,
) -> Optimizer:
    copies = [weight.detach().bfloat16().requires_grad_() for weight in weights]
    opt = kind(copies, lr)

    def before(*_: Any) -> None:
        for weight, copy in zip(weights, copies, strict=True):
            copy.grad = weight.grad.bfloat16()

    @torch.no_grad()
    def after(*_: Any) -> None:
        for weight, copy in zip(weights, copies, strict=True):
            weight.copy_(copy)
            weight.grad = None

    after()
    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(after)
    return opt


@torch.no_grad()
def round_all(weights: Sequence[Tensor], bits: int, *_: Any) -> None:
    for weight in weights:
        weight.copy_(rounded(weight, bits))


def rounded(values: Tensor, bits: int) -> Tensor:
    """Values with so many bits of the mantissa beside the leading one, ties to even."""
    mantissa, exponent = torch.frexp(values)
    places = 2.0 ** (bits + 1)
    return torch.ldexp((mantissa * places).round() / places, exponent)


@cache
def shares_left(task: str, x: float) -> dict[str, float]:
    """The share of the weights that a step of float32's run leaves where they are in each arm, in the mean of steps."""
    domain = get_domain(task)
    model = built(domain, "full", FULL, 0)
    weights, heads = parted(model, domain)
    opt, before = plain(weights, 2.0**x), torch.empty(0)
    left: dict[str, list[float]] = {arm: [] for arm in rounded_arms(task)}

    def flat() -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in weights])

    def note(*_: Any) -> None:
        nonlocal before
        before = flat()

    def count(*_: Any) -> None:
        step = flat() - before
        for arm, each in left.items():
            each.append(share_left(before, step, BITS.get(arm, 7)))

    opt.register_step_pre_hook(note)
    opt.register_step_post_hook(count)
    if heads:
        with_heads(opt, heads, domain.steps)
    train(domain, model, opt, 0, CLIP)
    return {arm: statistics.fmean(each) for arm, each in left.items()}


def run_one(job: Job) -> float | None:
    """The held-out loss of a run; None where it diverged. Of a scheme of `LEFT` the share of the weights."""
    if job.scheme == START:
        return run_at(job)
    if job.scheme.startswith(LEFT):
        return shares_left(job.domain, job.x)[job.scheme.removeprefix(LEFT)]
    domain = get_domain(job.domain)
    model = built(domain, "full", FULL, job.seed)
    weights, heads = parted(model, domain)
    opt = optimizer(job.scheme, weights, 2.0**job.x)
    if heads:
        with_heads(opt, heads, domain.steps)
    with seeded(job.seed):
        return train(domain, model, opt, job.seed, CLIP)


# --- what they show ---------------------------------------------------------------------------------------------------


def arms_of(task: str) -> tuple[str, ...]:
    return (FLOAT32, BFLOAT16) if task == SMOLLM2 else ARMS


def rounded_arms(task: str) -> list[str]:
    return [arm for arm in arms_of(task) if arm in ROUNDED]


def arms_run(task: str) -> tuple[str, ...]:
    return arms_of(task) if task in AGAIN else ARMS[1:]


def seeds_of(task: str) -> int:
    return 1 if task == SMOLLM2 else 2


def on_file() -> dict[Job, float | None]:
    """The runs on file, and of the study's sweeps the float32 ones."""
    done = read(STORE)
    for task in set(TASKS) - set(AGAIN):
        for job, loss in read(STORES / f"{task}.jsonl").items():
            if job.scheme in ("full", START):
                arm = FLOAT32 if job.scheme == "full" else START
                done[job._replace(scheme=arm)] = loss
    return done


def share_of_normal(lr: float) -> float:
    """Of bfloat16 weights of standard deviation .02, those that a whole step of `lr` leaves where they are."""
    places = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return share_left(0.02 * torch.special.ndtri(places).float(), lr, 7)


def share_left(values: Tensor, step: Tensor | float, bits: int) -> float:
    """The share of rounded values that a step leaves where they are."""
    values = rounded(values, bits)
    return float((rounded(values + step, bits) == values).float().mean())


def on_curve(share: float) -> float:
    return SLOPE * math.log2(1 / (1 - share))


def of_share(task: str, arm: str, x: float) -> Job:
    return Job(task, f"{LEFT}{arm}", FULL, round(x, 2), 0)


def best_of(done: Losses, task: str, arm: str) -> tuple[float | None, float]:
    """log2 of an arm's best rate, and its loss there."""
    means = curve(done, (task, arm, FULL), seeds_of(task))
    best = best_rate(means, start_of(task, done)) if means else None
    return best, math.nan if best is None else between(means, best)


def rows_of(
    done: Losses, task: str
) -> Iterator[tuple[str, float | None, float | None, float]]:
    """(arm, share, shift, loss above float32's) of a task."""
    at, least = best_of(done, task, FLOAT32)
    if at is None:
        return
    for arm in arms_of(task)[1:]:
        x, loss = best_of(done, task, arm)
        share = done.get(of_share(task, arm, at))
        yield arm, share, None if x is None else x - at, loss - least


def of_tasks(done: Losses) -> tuple[str, str]:
    """The table of all arms, and what the first and the third part of the rule say."""
    rows, off, cures, slopes = [], {}, {}, {}
    for task in TASKS:
        for arm, share, shift, worse in rows_of(done, task):
            curved = None if share is None else on_curve(share)
            words = "–" if share is None else f"{100 * share:.0f} %"
            row = [task, arm, words, number(shift, sign=True)]
            rows.append([*row, number(curved, sign=True), number(worse, 4, sign=True)])
            if shift is not None and curved is not None:
                off[task, arm] = shift - curved
                slopes[task, arm] = SLOPE * shift / curved if curved > 0.05 else None
            elif shift is not None and arm not in ROUNDED:
                cures[task, arm] = shift
    heads = ["task", "weights", "share left", "shift", "curve", "loss above float32's"]
    beyond = {each: x for each, x in off.items() if abs(x) > TOLERANCE}
    known = [slope for slope in slopes.values() if slope is not None]
    lines = [
        f"*One curve*: {len(off) - len(beyond)} of {len(off)} shifts within {TOLERANCE} octaves"
        f"{in_words(beyond)}; rms {math.hypot(*off.values()) / math.sqrt(len(off)):.2f}. "
        f"Slopes where more than a tenth stands still: {min(known):.2f} to {max(known):.2f}, "
        f"median {statistics.median(known):.2f}, for .4.",
        f"*Cures*: {sum(abs(x) <= OF_CURES for x in cures.values())} of {len(cures)} within "
        f"{OF_CURES} octaves of float32; at most {max(map(abs, cures.values())):.2f}.",
    ]
    return block("The tasks", heads, rows), "\n\n".join(lines)


def in_words(off: dict[tuple[str, str], float]) -> str:
    return "".join(f"; {task}, {arm}: {x:+.2f}" for (task, arm), x in off.items())


def of_large(sweeps: Sequence[Sweep]) -> str:
    """How far LoRA's best rates, moved to full finetuning, are above the best one there, with the curve and without."""
    rows = []
    for sweep in sweeps:
        for reading in READINGS:
            ranks = [r for r in sweep.best[reading] if r != FULL]
            moves = [moved(sweep, WAYS[DEFAULT], reading, r, FULL) for r in ranks]
            known = [m for m in moves if m is not None and m.octaves is not None]
            if not known:
                continue
            shares = [share_of_normal(2.0**move.x) for move in known]
            by_law = [move.octaves or 0.0 for move in known]
            curved = [x + on_curve(s) for x, s in zip(by_law, shares, strict=True)]
            mean = statistics.fmean(curved)
            row = [sweep.model, reading, ", ".join(map(str, ranks))]
            row += [spread(by_law), spread([100 * s for s in shares], 0)]
            rows.append(
                [*row, spread(curved), "yes" if abs(mean) <= OF_LARGE else "no"]
            )
    heads = ["model", "best rate", "from ranks", "by the law, octaves above the best"]
    heads += ["share left, %", "with the curve", f"within {OF_LARGE}"]
    return block("The large models", heads, rows)


# --- widths -----------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A network's best rates: its mean and largest fan-in, log2 by LoRA's configuration, and in full finetuning."""

    name: str
    widths: tuple[float, float]
    lora: Sequence[tuple[Reference, float]]
    full: float

    def off(self, power: float) -> float:
        """Octaves of the law's rate above the best one, in the mean of ranks, at mean^(1 − p) · largest^p."""
        mean, largest = self.widths
        at = Reference(method="full", fan_in=mean ** (1 - power) * largest**power)
        law = Falling().bind(AdamW, {})
        moves = [
            x + math.log2(checked_multiplier(law, at.as_factor(), origin)) - self.full
            for origin, x in self.lora
        ]
        return statistics.fmean(moves)


def networks(sweeps: Sequence[Sweep]) -> Iterator[Network]:
    for task in (*STUDY, *HELD_OUT):
        widths, [full] = get_domain(task).widths, study_rates(task, "full").values()
        lora = [
            (replace(reference_at(AT_A, rank), fan_in=widths[0]), x)
            for rank, x in study_rates(task, AT_A).items()
        ]
        yield Network(task, widths, lora, full)
    for sweep in sweeps:
        best = sweep.best["vertex"] or sweep.best["tried"]
        lora = [(sweep.at(rank), x) for rank, x in best.items() if rank != FULL]
        widths = sweep.widths.mean, float(sweep.widths.inner)
        yield Network(sweep.model, widths, lora, best[FULL])


def fitted_power(among: Sequence[Network]) -> float:
    powers = [step / 20 for step in range(-20, 61)]
    return min(powers, key=lambda p: sum(each.off(p) ** 2 for each in among))


def of_widths(sweeps: Sequence[Sweep]) -> str:
    every = list(networks(sweeps))
    rows, squares = [], []
    for each in every:
        power = fitted_power([other for other in every if other is not each])
        off = [each.off(1.0), each.off(0.0), each.off(power)]
        rows.append([each.name, *(number(x, sign=True) for x in off), number(power)])
        squares.append([x * x for x in off])
    means = [math.sqrt(statistics.fmean(each)) for each in zip(*squares, strict=True)]
    rows.append(["**rms**", *map(number, means), number(fitted_power(every))])
    heads = ["network", "largest", "mean", "fitted on the others", "power"]
    return block("By which width, octaves above the best", heads, rows)


def spread(values: Sequence[float], digits: int = 2) -> str:
    ends = [number(x, digits, digits > 0) for x in (min(values), max(values))]
    return (
        f"{number(statistics.fmean(values), digits, digits > 0)} ({' to '.join(ends)})"
    )


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--domain", "task", type=click.Choice(TASKS))
def main(paths: Sequence[Path], task: str | None) -> None:
    """Run what is missing of a task, or write the page from the files of others."""
    torch.set_num_threads(1)
    if task:
        centre, seeds = round(study_rates(task, "full")[FULL]), seeds_of(task)
        lines = [Line((task, arm, FULL), centre, seeds) for arm in arms_run(task)]
        grid = Together([starts(task, range(seeds * (task in AGAIN))), *lines])
        complete(grid, run_one, STORE, 1, click.echo, provenance(task))
        at, _ = best_of(on_file(), task, FLOAT32)
        if at is not None:
            shares = Listed([of_share(task, arm, at) for arm in rounded_arms(task)])
            complete(shares, run_one, STORE, 1, click.echo)
        return
    of = others.files_by_name(paths)
    large = [others.qwen_7b(of["qwen2.5-7b.csv"]), others.qwen_4b(of["qwen3-4b.csv"])]
    table, verdict = of_tasks(on_file())
    on = made_by(machine(1), STORE)
    title = "Full finetuning in bfloat16: is it the dtype?"
    parts = table, verdict, of_large(large), of_widths(large)
    write_explained("rounded", title, __doc__, *parts, on)


if __name__ == "__main__":
    main()
