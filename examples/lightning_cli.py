"""
LightningCLI
============

Run this example with ``python examples/lightning_cli.py fit --config examples/lightning_cli.yaml``.
"""

from collections.abc import Callable

import lightning
import peft
import tiny
import torch
from lightning.pytorch.cli import LightningCLI


class Finetune(lightning.LightningModule):
    """A causal language model with adapters. `optimizer` builds the optimizer from the model."""

    def __init__(
        self,
        optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
        rank: int = 16,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"]
        )
        self.model = peft.get_peft_model(tiny.model(), config)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        rows = tiny.tokenizer()(tiny.TEXTS, return_tensors="pt")["input_ids"]
        return torch.utils.data.DataLoader(rows, batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.model)


if __name__ == "__main__":
    cli = LightningCLI(
        Finetune, save_config_callback=None, auto_configure_optimizers=False
    )
    print(cli.trainer.optimizers[0].report())
