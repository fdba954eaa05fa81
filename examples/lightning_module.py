"""
Lightning
=========

The module builds a ``RankAwareOptimizer`` in ``configure_optimizers``. A callback sends the learning rate of every
group to the logger.
"""

import lightning
import peft
import tiny
import torch
from lightning.pytorch.loggers import CSVLogger

import rankaware_optim as ra


class Finetune(lightning.LightningModule):
    """A causal language model with adapters of rank 64."""

    def __init__(self) -> None:
        super().__init__()
        config = peft.LoraConfig(
            r=64, lora_alpha=64, target_modules=["q_proj", "v_proj"]
        )
        self.model = peft.get_peft_model(tiny.model(), config)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ra.RankAwareOptimizer(
            self.model,
            torch.optim.AdamW,
            lr=2e-4,
            tuned_at="r=16,alpha=32",
            init="A",
        )


rows = tiny.tokenizer()(tiny.TEXTS, return_tensors="pt")["input_ids"]
loader = torch.utils.data.DataLoader(rows, batch_size=8)
trainer = lightning.Trainer(
    max_epochs=1,
    accelerator="cpu",
    logger=CSVLogger("lightning-out"),
    log_every_n_steps=1,
    callbacks=[ra.trainers.lightning_rates()],
)
trainer.fit(Finetune(), loader)
print(trainer.optimizers[0].report())
