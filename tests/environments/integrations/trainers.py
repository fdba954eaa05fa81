"""Helpers for tests of trainers: quiet libraries, a tiny Llama, its data, and ways to build an optimizer."""

from __future__ import annotations

import os
import random
import signal
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from rankaware_optim import RankAwareOptimizer, Reference, attach

from ...helpers.llama import llama_config
from ...helpers.optimizers import multiplier

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    lightning = pytest.importorskip("lightning")
    accelerate = pytest.importorskip("accelerate")
    trl = pytest.importorskip("trl")

# warnings that one of these libraries causes in another
QUIET = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]
LR = 1e-2
STEPS = 6
AT_16 = Reference(rank=16, alpha=16)
AdamW = torch.optim.AdamW


def llama(config: dict[str, Any] | None = None, **lora: Any) -> Any:
    """Return a language model of two layers, by default with adapters of ranks 4 and 8."""
    torch.manual_seed(0)
    made = llama_config(num_hidden_layers=2, **config or {})
    ranks = {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 8}}
    usual = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **ranks}
    model = transformers.LlamaForCausalLM(made)
    return peft.get_peft_model(model, peft.LoraConfig(**{**usual, **lora}))


def tokens(count: int = 24) -> Any:
    source = torch.Generator().manual_seed(1)
    return as_dataset(torch.randint(32, (count, 8), generator=source).tolist())


def as_dataset(rows: list[list[int]]) -> Any:
    columns = {"input_ids": rows, "labels": rows}
    mask = [[1] * len(row) for row in rows]
    return datasets.Dataset.from_dict({**columns, "attention_mask": mask})


def tokenizer() -> Any:
    """Return a tokenizer of 32 words separated by spaces, built in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 32)}}
    made = Tokenizer(models.WordLevel(words, "w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **ends)


def arguments(folder: Any, kind: Any = transformers.TrainingArguments, **own: Any):
    settings = {
        "max_steps": STEPS,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        "weight_decay": 0.0,
    }
    return kind(output_dir=str(folder), **{**settings, **own})


def plain(model: Any, folder: Any, *, route: Any = None, **own: Any) -> Any:
    """Return transformers' Trainer for a model.

    `own` has its arguments, and `route` says how it gets an optimizer.
    """
    args, data = arguments(folder, **own), tokens()
    return transformers.Trainer(model, args, train_dataset=data, **route or {})


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


# --- ways to an optimizer -------------------------------------------------------------------------------------------


def by_class(model: Any) -> dict[str, Any]:
    """Return the arguments with which Trainer builds our optimizer itself, on its own groups."""
    settings = {"model": model, "optimizer": AdamW, "lr": LR, "tuned_at": AT_16}
    kind = (RankAwareOptimizer, {**settings, "weight_decay": 0.0})
    return {"optimizer_cls_and_kwargs": kind}


def by_instance(model: Any) -> dict[str, Any]:
    own = {"lr": LR, "tuned_at": AT_16, "weight_decay": 0.0}
    return {"optimizers": (RankAwareOptimizer(model, AdamW, **own), None)}


def by_hand(model: Any, kind: Any = AdamW) -> dict[str, Any]:
    """Return the arguments for a native optimizer with the four groups written by hand."""
    groups: dict[Any, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            rank = 4 if "q_proj" in name else 8
            group = {"params": [], "lr": LR * multiplier(rank)}
            groups.setdefault((rank, "lora_A" in name), group)["params"].append(param)
    return {"optimizers": (kind([*groups.values()], lr=LR, weight_decay=0.0), None)}


def attached(trainer: Any, optimizer: Any = AdamW, **settings: Any) -> Any:
    """Attach an optimizer to a trainer, by default at the usual learning rate, and return the trainer."""
    attach(trainer, optimizer, **{"lr": LR, "tuned_at": AT_16, **settings})
    return trainer


# --- data and models of calibrations ---------------------------------------------------------------------------------


def sayings(count: int = 64) -> Any:
    """Return rows that a model can learn. Each repeats one number, which is 7 in three of four rows."""
    return as_dataset([[7 if i % 4 else i % 32] * 8 for i in range(count)])


def prompts() -> Any:
    rows = [f"w{i + 2} w3" for i in range(16)]
    return datasets.Dataset.from_dict({"prompt": rows})


def different_words(completions: list[str], **_: Any) -> list[float]:
    """Return the number of different words of each completion, as rewards."""
    return [float(len(set(text.split()))) for text in completions]


def loss_of(net: Any, x: torch.Tensor) -> torch.Tensor:
    return (net(x) - x[:, :3].sin()).square().mean()


def random_states() -> tuple[Any, ...]:
    numpys = np.random.get_state()[1].tolist()
    return torch.get_rng_state().tolist(), random.getstate(), numpys


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
