"""A few steps of transformers' Trainer with a tracker: `python -m tests.environments.trackers.trainer TRACKER KIND`."""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch
import transformers

from rankaware_optim.integrations import log_rates, trainer_factory

from ...helpers.llama import llama_config
from ...helpers.recipes import RECIPE


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = llama_config(hidden_size=64)
    return transformers.LlamaForCausalLM(config)


def main(tracker: str, kind: str) -> None:
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    args = transformers.TrainingArguments(
        "out",
        max_steps=3,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        lr_scheduler_type="linear",
        report_to=tracker,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rate = (
        {"recipe": RECIPE}
        if kind == "recipe"
        else {"lr": 1e-3, "tuned_at": "r=16,alpha=16"}
    )
    factory = trainer_factory("adamw", **rate)
    trainer = transformers.Trainer(
        model, args, train_dataset=rows, optimizer_cls_and_kwargs=factory
    )
    log_rates(trainer)
    trainer.train()
    for path in Path("out").glob("checkpoint-*"):
        peft.PeftModel.from_pretrained(llama(), path)
        (path / "loaded").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
