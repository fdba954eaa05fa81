"""A few steps of transformers' Trainer with a tracker: `python -m tests.environments.on_demand.trainer TRACKER`."""

from __future__ import annotations

import sys

import peft
import torch
import transformers

from rankaware_optim.integrations import attach

from ...helpers.llama import llama_config


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = llama_config(hidden_size=64)
    return transformers.LlamaForCausalLM(config)


def main(tracker: str) -> None:
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    args = transformers.TrainingArguments(
        "out",
        max_steps=3,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=2,
        lr_scheduler_type="linear",
        report_to=tracker,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    attach(trainer, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
