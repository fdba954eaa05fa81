"""Tests of Unsloth's trainer on its CPU backend, with and without a learning rate for embeddings."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

import rankaware_optim as ra

from ...helpers.examples import EXAMPLES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    unsloth = pytest.importorskip("unsloth")
    from peft import LoraConfig, get_peft_model
    from unsloth import UnslothTrainer, UnslothTrainingArguments

LR, EMBEDDINGS = 2e-4, 1e-5


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tiny

    yield tiny
    del sys.modules["tiny"]


@pytest.mark.parametrize("rate", [None, EMBEDDINGS])
def test_unsloths_trainer_trains_at_moved_rates(tmp_path, tiny, rate):
    """attach converts the learning rates of A and B, and leaves embedding_learning_rate unchanged."""
    from datasets import Dataset

    lora = LoraConfig(
        r=64,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["embed_tokens"],
    )
    own = {
        "max_steps": 2,
        "max_length": 32,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    trainer = UnslothTrainer(
        get_peft_model(tiny.model(), lora),
        args=UnslothTrainingArguments(
            embedding_learning_rate=rate, output_dir=str(tmp_path), **own
        ),
        train_dataset=Dataset.from_dict({"text": tiny.TEXTS}),
        processing_class=tiny.tokenizer(),
    )
    report = ra.attach(
        trainer, torch.optim.AdamW, lr=LR, tuned_at=ra.Reference(rank=16, alpha=32)
    )
    trainer.train()
    assert {row.role for row in report.rows} == {"A", "B", "other"}
    opt = trainer.optimizer.optimizer
    groups = {group.role: group for group in opt.rates.groups}
    initial = {
        role: opt.param_groups[group.user_group]["initial_lr"]
        for role, group in groups.items()
    }
    assert initial["A"] == initial["B"] == LR
    assert groups["A"].multiplier != 1.0
    assert initial["other"] == (LR if rate is None else rate)
