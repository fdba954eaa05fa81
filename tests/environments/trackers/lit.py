"""A few steps of Lightning's Trainer with a tracker: `python -m tests.environments.trackers.lit TRACKER`."""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning
import torch
from lightning.pytorch import loggers

from rankaware_optim import RankAwareOptimizer
from rankaware_optim.integrations import lightning_rates

from ...helpers.models import mlp

LOGGERS = {
    "tensorboard": lambda: loggers.TensorBoardLogger("tb"),
    "wandb": lambda: loggers.WandbLogger(offline=True),
    "mlflow": lambda: loggers.MLFlowLogger(
        tracking_uri=os.environ["MLFLOW_TRACKING_URI"]
    ),
}


class Lit(lightning.LightningModule):
    """A small model with a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(width=64, head=False)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return (self.net(batch[0]) - 1.0).square().mean()

    def configure_optimizers(self) -> Any:
        opt = RankAwareOptimizer(self.net, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 3)
        return {
            "optimizer": opt,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main(tracker: str) -> None:
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(6, 64)), batch_size=2
    )
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    made = LOGGERS[tracker]()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=made,
        callbacks=[lightning_rates()],
        log_every_n_steps=1,
        **quiet,
    )
    trainer.fit(Lit(), loader)
    made.finalize("success")
    if tracker == "wandb":
        made.experiment.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
