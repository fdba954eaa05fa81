"""Tests of short runs in Lightning: automatic and manual optimization, checkpoints and logs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankaware_optim import RankAwareOptimizer, RankAwareWarning
from rankaware_optim.trainers import lightning_rates

from ...helpers.models import batches, mlp, same, snapshot
from ...helpers.optimizers import groups_by_hand, multiplier
from .trainers import AT_16, LR, QUIET, STEPS, AdamW, lightning

pytestmark = QUIET


class Lit(lightning.LightningModule):
    """A model of two ranks with a schedule, with automatic or manual optimization."""

    def __init__(self, make, *, manual=False):
        super().__init__()
        self.net, self.make = mlp((4, 8), seed=3), make
        self.automatic_optimization = not manual

    def training_step(self, batch, _):
        x = batch[0]
        loss = (self.net(x) - x[:, :3].sin()).square().mean()
        if not self.automatic_optimization:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        opt = self.make(self.net)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 2 * STEPS)
        by_step = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": opt, "lr_scheduler": by_step}


def ours(net, params=None, **own):
    """Return our optimizer with a declared init, because Lightning loads weights before it builds
    the optimizer.
    """
    own = {"lr": LR, "tuned_at": AT_16, "init": "A", **own}
    return RankAwareOptimizer(params or net, AdamW, model=net, **own)


def by_hand(net):
    return AdamW(groups_by_hand(net, LR), lr=LR)


def fit(folder, module, *, resume=None, epochs=1, **options):
    """Train a module for some epochs, and return it with its trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    usual = {"accelerator": "cpu", "logger": False, "default_root_dir": str(folder)}
    trainer = lightning.Trainer(max_epochs=epochs, **{**quiet, **usual, **options})
    data = torch.utils.data.TensorDataset(torch.cat(list(batches(STEPS))))
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=0)
    trainer.fit(module, loader, ckpt_path=resume)
    return module, trainer


RUNS = [
    (False, {}),
    (True, {}),
    (False, {"precision": "bf16-mixed"}),
    (False, {"gradient_clip_val": 0.01}),
]


@pytest.mark.parametrize(("manual", "options"), RUNS)
def test_lightning_trains_as_with_groups_by_hand(tmp_path, manual, options):
    """With automatic and manual optimization, bf16 and clipping, the weights are exactly those of
    groups by hand.
    """
    left, trainer = fit(tmp_path, Lit(ours, manual=manual), **options)
    hand, _ = fit(tmp_path, Lit(by_hand, manual=manual), **options)
    assert isinstance(trainer.optimizers[0], RankAwareOptimizer)
    assert same(snapshot(left.net), snapshot(hand.net))


@pytest.mark.parametrize("manual", [False, True])
def test_lightning_resumes(tmp_path, manual):
    """A run that is resumed after its first epoch ends with exactly the weights of the uninterrupted run."""
    whole, _ = fit(tmp_path, Lit(ours, manual=manual), epochs=2)
    _, trainer = fit(tmp_path, Lit(ours, manual=manual))
    middle = tmp_path / "middle.ckpt"
    trainer.save_checkpoint(middle)
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    again, _ = fit(tmp_path, Lit(ours, manual=manual), epochs=2, resume=middle)
    hook.remove()
    assert len(steps) == STEPS
    assert same(snapshot(whole.net), snapshot(again.net))


def test_a_resume_whose_weights_no_longer_show_their_init_is_said(tmp_path):
    """If a run is resumed without a declared init, a warning says which init= to pass."""

    def of_unknown_init(net):
        return ours(net, init=None)

    _, trainer = fit(tmp_path, Lit(of_unknown_init))
    middle = tmp_path / "middle.ckpt"
    trainer.save_checkpoint(middle)
    with pytest.warns(RankAwareWarning, match="unknown init.*init='A'"):
        fit(tmp_path, Lit(of_unknown_init), epochs=2, resume=middle)


# --- logs -----------------------------------------------------------------------------------------------------------


def logged(logger):
    """Return the rows that a CSVLogger wrote, or an empty list."""
    logger.save()
    path = Path(logger.log_dir, "metrics.csv")
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_lightnings_monitor_logs_the_base_rate(tmp_path):
    """LearningRateMonitor logs the base learning rate, and our callback logs the learning rate of each rank."""
    monitor = lightning.pytorch.callbacks.LearningRateMonitor(logging_interval="step")
    logger = lightning.pytorch.loggers.CSVLogger(str(tmp_path))
    own = {"callbacks": [monitor, lightning_rates()], "log_every_n_steps": 1}
    fit(tmp_path, Lit(ours), logger=logger, **own)
    rates = {name: values[0] for name, values in monitor.lrs.items() if values}
    assert rates == {"lr-AdamW": pytest.approx(LR)}
    first = next(row for row in logged(logger) if row["lr/r4"])
    for rank in (4, 8):
        assert float(first[f"lr/r{rank}"]) == pytest.approx(LR * multiplier(rank))


class Two(Lit):
    """A module with manual optimization and one optimizer for each layer, both used on every batch
    or in turns.
    """

    def training_step(self, batch, number):
        both = self.optimizers()
        for opt in both[number % 2 :: 2] if self.in_turns else both:
            opt.zero_grad()
            self.manual_backward(self.net(batch[0]).square().mean())
            opt.step()

    def configure_optimizers(self):
        layers = (self.net.layer0, self.net.layer1)
        factors = [
            [p for p in layer.parameters() if p.requires_grad] for layer in layers
        ]
        return [self.make(self.net, params) for params in factors]


@pytest.mark.parametrize(("every", "rows"), [(2, STEPS // 2), (1, STEPS), (0, 0)])
@pytest.mark.parametrize("in_turns", [False, True])
def test_two_optimizers_rates_are_logged_by_number_and_interval(
    tmp_path, every, rows, in_turns
):
    """With two optimizers, the names in the logs start with a number, and Lightning's interval holds."""
    logger = lightning.pytorch.loggers.CSVLogger(str(tmp_path))
    module = Two(ours, manual=True)
    module.in_turns = in_turns
    own = {"callbacks": [lightning_rates()], "log_every_n_steps": every}
    fit(tmp_path, module, logger=logger, **own)
    found = logged(logger)
    for number, rank in enumerate((4, 8)):
        values = [row[f"{number}/lr/r{rank}"] for row in found]
        rates = [float(value) for value in values if value]
        assert rates == pytest.approx([LR * multiplier(rank)] * rows)
