"""Tests of calibrations in place with diffusers' models and real trainers, which must end unchanged.

Whatever a trial would change for good is put back, or is an error before the first trial.
"""

from __future__ import annotations

import json

import pytest
import torch

import rankaware_optim as ra
from rankaware_optim import CalibrationError

from ...helpers.models import mlp
from .trainers import QUIET, AdamW, lightning, loss_of, peft

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
]
SIZES = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**SIZES)
    model.requires_grad_(False)
    lora = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]}
    model.add_adapter(peft.LoraConfig(**lora))
    return model


def denoising(model, opt, steps):
    for _ in range(steps):
        noise = torch.randn(2, 4, 8, 8)
        found = model(noise, torch.tensor([3, 7]), torch.randn(2, 5, 8)).sample
        loss = (found - noise).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.detach()


def saved_configuration(model, folder) -> dict[str, object]:
    model.save_config(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("alone", [True, False], ids=["a model", "a list of models"])
def test_a_diffusers_model_keeps_its_configuration(tmp_path, alone):
    """A calibration in place leaves the configuration of a diffusers model as it was, although a
    FrozenDict cannot be refilled.
    """
    model = unet()
    before = saved_configuration(model, tmp_path)
    given = model if alone else [model, mlp((), head=True)]

    def train(trial):
        return denoising(model, trial.optimizer(given), trial.steps)

    if not alone:
        given[1].requires_grad_(False)
    own = {"steps": 4, "trials": 2, "progress": False}
    ra.calibrate(train, "adamw", model=given, **own)
    assert saved_configuration(model, tmp_path) == before
    assert before["block_out_channels"] == [8, 16]


class WithUNet(lightning.LightningModule):
    """A Lightning module that contains a model of diffusers."""

    def __init__(self, lr=None):
        super().__init__()
        self.lr, self.unet = lr, unet()

    def training_step(self, batch, index):
        noise = batch[0]
        found = self.unet(noise, torch.zeros(len(noise)), torch.zeros(len(noise), 5, 8))
        return (found.sample - noise).square().mean()

    def configure_optimizers(self):
        params = [p for p in self.parameters() if p.requires_grad]
        return AdamW(params, lr=self.lr)


def lit(module, folder, rows):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    usual = {"accelerator": "cpu", "max_epochs": 3, "logger": False, **quiet}
    trainer = lightning.Trainer(default_root_dir=folder, **usual)
    data = torch.utils.data.TensorDataset(rows)
    return trainer, module, torch.utils.data.DataLoader(data, batch_size=8)


def in_lightning(module, folder, rows=None, **own):
    rows = torch.randn(64, 16) if rows is None else rows
    options = {"steps": 6, "trials": 2, "progress": False, **own}
    return ra.calibrate(lit(module, folder, rows), "adamw", **options)


def test_a_diffusers_model_in_a_module_keeps_its_configuration(tmp_path):
    """A diffusers model inside a Lightning module keeps its configuration too."""
    module = WithUNet()
    before = saved_configuration(module.unet, tmp_path)
    in_lightning(module, tmp_path, torch.randn(32, 4, 8, 8))
    assert saved_configuration(module.unet, tmp_path) == before


# --- what Lightning's module configures -----------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self, lr=None):
        super().__init__()
        self.lr, self.net = lr, mlp((4, 4), seed=0)

    def training_step(self, batch, index):
        return loss_of(self.net, batch[0])

    def factors(self):
        return [
            p for n, p in self.named_parameters() if p.requires_grad and "lora" in n
        ]

    def head(self):
        return [*self.net.head.parameters()]


class ATenth(Module):
    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=0.1 * self.lr)


class FastHead(Module):
    def configure_optimizers(self):
        head = {"params": self.head(), "lr": 10 * self.lr}
        return AdamW([{"params": self.factors()}, head], lr=self.lr)


class GivenHead(Module):
    def configure_optimizers(self):
        own = {"lr": self.lr, "rates": {"*head*": 3e-3}}
        return ra.RankAwareOptimizer(self, AdamW, **own)


class OneCycle(Module):
    """A module whose schedule begins far below self.lr, and reaches self.lr at its highest point."""

    def configure_optimizers(self):
        opt = AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        cycle = torch.optim.lr_scheduler.OneCycleLR(opt, self.lr, total_steps=6)
        return [opt], [{"scheduler": cycle, "interval": "step"}]


class FixedHead(Module):
    def configure_optimizers(self):
        head = {"params": self.head(), "lr": 3e-3}
        return AdamW([{"params": self.factors()}, head], lr=self.lr)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(ATenth, "at 0.1 times self.lr"), (FastHead, r"head\S* at 10 times")],
)
def test_a_multiple_of_the_modules_rate_is_an_error(tmp_path, kind, message):
    """A module that trains at a multiple of self.lr is an error before the first trial."""
    with pytest.raises(ra.OptimizerError, match=message):
        in_lightning(kind(), tmp_path)


@pytest.mark.parametrize("kind", ["FixedHead", "GivenHead"])
def test_a_rate_of_its_own_in_a_module_is_recorded(tmp_path, kind):
    """If a module trains its head at a learning rate of its own, the recipe records it."""
    recipe = in_lightning(globals()[kind](), tmp_path)
    heads = {name: lr for name, lr in recipe.other_rates.items() if "head" in name}
    assert heads
    assert {*heads.values()} == {3e-3}
    assert recipe.reference.batch == 8


def test_a_schedule_that_begins_below_the_rate_is_no_multiple_of_it(tmp_path):
    """A module with OneCycleLR can be calibrated, although its schedule begins below self.lr."""
    assert in_lightning(OneCycle(), tmp_path, steps=5).lr > 0


# --- data -----------------------------------------------------------------------------------------------------------


class Lines(torch.utils.data.IterableDataset):
    """A stream around a generator, which can be read only once."""

    def __init__(self):
        self.rows = (torch.randn(16) for _ in range(1000))

    def __iter__(self):
        for row in self.rows:
            yield (row,)


def test_a_stream_around_a_generator_is_an_error(tmp_path):
    """A stream that can be read only once is an error before the first trial, and no row of it is read."""
    trainer, module, _ = lit(Module(), tmp_path, torch.zeros(8, 16))
    data = Lines()
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    with pytest.raises(CalibrationError, match="can be read only once"):
        ra.calibrate((trainer, module, loader), "adamw", steps=4, target_steps=8)
    assert len([*data]) == 1000
