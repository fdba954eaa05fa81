"""On a CUDA device: is a step exact, what does it cost, and does a converted rate train well?

    python benchmarks/on_gpu.py                            # results/cuda.md, planned for half an hour of an H100
    python benchmarks/on_gpu.py --device cpu --smallest    # at its smallest size, in seconds; writes nothing

* *Match*: ten steps of `RankAwareOptimizer` are compared with ten steps of the native class that has a group for every
  learning rate, written by hand. The weights must be exactly equal with every kernel and dtype.
* *Cost*: the time of a step with the 448 tensors of an 8B model's rank-16 adapters is measured by CUDA events. The
  benchmark `costs/step_cost.py` measures the same at smaller widths.
* *Move*: SmolLM2-135M and one layer of width 4096 are trained at learning rates that are an octave apart. The ranks are
  16, 64 and 256 with alpha = rank, and full finetuning. The best learning rate of rank 16 is converted by the default
  law, or used unchanged. Losses are shares of the gain. **Rule**, written before any run: the law holds on a task if
  it loses at most 5 % at every rank, and less than the unchanged learning rate does.

The script needs the extra `peft`, transformers and gguf. The wrapper's tests on a CUDA device are in
`tests/environments/cuda`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import click
import numpy as np
import torch
from costs.step_cost import Step, contestants, measure_pairs, milliseconds
from llama_shapes import LLAMA_8B, LLAMA_8B_EIGHTH, adapters
from recording import RESULTS, block, machine, made_on, number, write_explained
from study.configurations import CONFIGS, START, TUNED, run_in
from study.domains import Domain, get_domain
from study.domains._adapters import adapt
from study.grids import FULL, Job, or_inf
from torch import Tensor, nn
from torch.optim import AdamW

from rankaware_optim import RankAwareOptimizer, Reference
from rankaware_optim.calibration import seeded
from rankaware_optim.laws import DEFAULT_LAW, checked_multiplier, get_law

RESTS_ON = ()
CONFIG = next(iter(CONFIGS))  # alpha = rank, B = 0
KERNELS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "fused, tensor rate": {"fused": True, "lr": torch.tensor(1e-3)},
    "foreach, capturable": {"foreach": True, "capturable": True},
}
MOST_LOST = 0.05
GUESS = -9  # log2 of the first learning rate at rank 16


@dataclass(frozen=True)
class Size:
    """How large the benchmark is.

    Args:
        rounds: timed steps of each optimizer and pair.
        layouts: numbers of groups whose step is timed.
        ranks: ranks whose learning rates are swept, besides full finetuning.
        octaves: learning rates on either side of the guess.
        seeds: number of seeds of each run.
        width: width of the single layer.
        steps: steps of the single layer's run.
    """

    rounds: int
    layouts: tuple[int, ...]
    ranks: tuple[int, ...]
    octaves: int
    seeds: int
    width: int
    steps: int


WHOLE = Size(20, (2, 16, 448), (16, 64, 256), 3, 2, 4096, 100)
SMALLEST = Size(2, (2,), (16, 32), 1, 1, 64, 10)


# --- does a step match? -----------------------------------------------------------------


def match_rows(device: str) -> Iterator[list[str]]:
    """Yield each kernel and dtype with the largest difference between two weights after ten steps."""
    for name, flags in KERNELS.items():
        if device == "cpu" and flags.get("capturable"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            apart = difference(device, dtype, flags)
            yield [name, str(dtype).partition(".")[2], f"{apart:g}"]


def difference(device: str, dtype: torch.dtype, flags: Mapping[str, Any]) -> float:
    """Return the largest difference between weights trained by our optimizer and by native groups."""
    on_device = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in flags.items()
    }
    settings = {"lr": 1e-3, "weight_decay": 0.1, **on_device}
    mine = pairs(device, dtype)
    theirs = copy.deepcopy(mine)
    ours = RankAwareOptimizer(mine, AdamW, tuned_at="r=64,alpha=64", **settings)
    place = {id(param): at for at, param in enumerate(mine.parameters())}
    copied = list(theirs.parameters())
    groups = [
        {
            "params": [copied[place[id(param)]] for param in part.params],
            "lr": settings["lr"] * part.multiplier,
        }
        for part in ours.rates.groups
    ]
    native = AdamW(groups, **settings)
    for step in range(10):
        for model, opt in ((mine, ours), (theirs, native)):
            with_gradients(model, seed=step)
            opt.step()
    both = zip(mine.parameters(), theirs.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in both)


def pairs(device: str, dtype: torch.dtype) -> nn.Module:
    with seeded(0):
        return adapters(1, LLAMA_8B_EIGHTH).to(device, dtype)


def with_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn_like(param)


# --- what does it cost? -----------------------------------------------------------------


def cost_rows(device: str, size: Size) -> Iterator[list[str]]:
    """Yield each kernel and number of groups, with the time of a native step and the ratio of ours to it.

    The last column compares the native step with itself.
    """
    shapes = LLAMA_8B if size is WHOLE else LLAMA_8B_EIGHTH
    model = adapters(32 if size is WHOLE else 1, shapes).to(device)
    with_gradients(model, seed=0)
    timed = by_events if device == "cuda" else milliseconds
    for name in ("for-loop", "foreach", "fused"):
        steps = contestants(model, KERNELS[name], layouts=size.layouts)
        for groups in size.layouts:
            native = f"native {groups}"
            compared = [(f"ours {groups}", native), (native, native)]
            found = measure_pairs(steps, size.rounds, compared, timed)
            figures = (f"{native}, ms", *(f"{a} / {b}" for a, b in compared))
            yield [name, f"{groups}", *(number(found[each], 3) for each in figures)]


def by_events(step: Step) -> float:
    """Return the milliseconds of a step by the device's clock, from an idle device to the end of the step."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# --- does a converted rate train well? ------------------------------------------------------------


def smollm2(device: str) -> Domain:
    """Return the study's SmolLM2-135M on the device."""
    domain = get_domain("language_smollm2")
    build = domain.build
    return replace(domain, build=lambda *args: build(*args).to(device))


def one_layer(device: str, size: Size) -> Domain:
    """Return a task in which a layer learns another layer that differs from it by a matrix of rank 64."""
    width, batch = size.width, 64

    @cache
    def layers() -> tuple[nn.Module, Tensor]:
        with seeded(0):
            start = nn.Sequential(nn.Linear(width, width, bias=False))
            change = torch.randn(width, 64) @ torch.randn(64, width) / (8 * width)
        return start.requires_grad_(False).to(device), change.to(device)

    def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
        return adapt(copy.deepcopy(layers()[0]), rank, alpha, init, seed, "0").to(
            device
        )

    def batches(seed: int, count: int) -> Iterator[Tensor]:
        drawn = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(count, width, generator=drawn).to(device)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        start, change = layers()
        wanted = x @ change.T
        off = model(x) - start(x) - wanted
        return off.square().mean() / wanted.square().mean()

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        return float(loss(model, next(batches(10**6, 256))))

    return Domain(
        "one_layer",
        size.steps,
        size.ranks,
        build,
        batches,
        loss,
        evaluate,
        batch,
        (float(width), float(width)),
    )


Curve = dict[int, float]  # mean loss by log2 of the rate


def sweep(domain: Domain, size: Size) -> dict[int, Curve]:
    """Return the mean losses at every rank and in full finetuning, on whole octaves.

    If the best learning rate is at an end, the sweep goes further there.
    """
    curves = {}
    for rank in (*size.ranks, FULL):
        guess = round(GUESS + octaves(domain, rank))
        low, high = guess - size.octaves, guess + size.octaves
        curve: Curve = {}
        while True:
            for x in range(low, high + 1):
                if x not in curve:
                    curve[x] = mean_loss(domain, rank, x, size.seeds)
            best = min(curve, key=curve.__getitem__)
            if low < best < high or high - low > 4 * size.octaves:
                break
            low, high = low - (best == low), high + (best == high)
        curves[rank] = dict(sorted(curve.items()))
        click.echo(f"{domain.name}, rank {rank or 'full'}: best 2^{best}")
    return curves


def mean_loss(domain: Domain, rank: int, x: int, seeds: int) -> float:
    config = "full" if rank == FULL else CONFIG
    jobs = [Job(domain.name, config, rank, float(x), seed) for seed in range(seeds)]
    return float(np.mean([or_inf(run_in(domain, job)) for job in jobs]))


def octaves(domain: Domain, rank: int) -> float:
    """Return log2 of the default law's multiplier for a learning rate that was tuned at rank 16."""
    mean, largest = domain.widths
    lora, full = partial(Reference, fan_in=mean), partial(Reference, fan_in=largest)
    at = full(method="full") if rank == FULL else lora(rank, rank)
    law = get_law(DEFAULT_LAW).bind(AdamW, {})
    return math.log2(checked_multiplier(law, at.as_factor(), lora(TUNED, TUNED)))


def move_rows(domain: Domain, size: Size) -> Iterator[list[str]]:
    """Yield each rank with its best learning rate, and what rank 16's best one loses there, in %.

    Rank 16's learning rate is converted by the law, or used unchanged.
    """
    start = or_inf(run_in(domain, Job(domain.name, START, FULL, 0.0, 0)))
    curves = sweep(domain, size)
    best = {rank: min(curve, key=curve.__getitem__) for rank, curve in curves.items()}
    moved_by: dict[str, Callable[[int], float]] = {
        "law": partial(octaves, domain),
        "kept": lambda rank: 0.0,
    }
    holds = True
    for rank, curve in curves.items():
        lowest = curve[best[rank]]
        lost = {
            way: (at(curve, best[TUNED] + by(rank)) - lowest) / (start - lowest)
            for way, by in moved_by.items()
        }
        holds &= rank == TUNED or lost["law"] <= min(MOST_LOST, lost["kept"])
        shown = [number(100 * each, 1) for each in lost.values()]
        yield [domain.name, str(rank or "full"), f"2^{best[rank]}", *shown]
    yield [domain.name, "the law holds", "yes" if holds else "NO", "", ""]


def at(curve: Curve, x: float) -> float:
    """Return the loss at a learning rate, interpolated linearly between those tried."""
    return float(np.interp(x, list(curve), list(curve.values())))


# --- the page ---------------------------------------------------------------------------


@click.command()
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda")
@click.option("--smallest", is_flag=True, help="Use shapes that a CPU runs in seconds.")
def main(device: str, smallest: bool) -> None:
    """Run all parts, and write results/cuda.md."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "There is no CUDA device here. To try the script, pass --device cpu --smallest."
        )
    size = SMALLEST if smallest else WHOLE
    tasks = [one_layer(device, size)]
    tasks += [] if smallest else [smollm2(device)]
    moves = [row for task in tasks for row in move_rows(task, size)]
    parts = [
        block(
            "Does a step match?",
            ["kernel", "dtype", "largest difference"],
            list(match_rows(device)),
        ),
        block(
            "What does it cost?",
            ["kernel", "groups", "native, ms", "ours / native", "native / itself"],
            list(cost_rows(device, size)),
        ),
        block(
            "Does a converted learning rate train well?",
            ["task", "rank", "best rate", "lost, % (converted)", "lost, % (unchanged)"],
            moves,
        ),
    ]
    if device == "cpu" or smallest:
        click.echo("\n\n".join(parts))
        return
    card = {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    made = made_on({**machine(1), **card})
    write_explained("cuda", f"On {card['card']}", __doc__, *parts, made)
    click.echo(f"{RESULTS / 'cuda.md'} is written.")


if __name__ == "__main__":
    main()
