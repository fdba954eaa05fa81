"""Real runs of a few steps: transformers and Lightning."""

from __future__ import annotations

import csv
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankaware_optim import (
    Power,
    RankAwareOptimizer,
    RankAwareWarning,
    Recipe,
    Reference,
)
from rankaware_optim.integrations import (
    attach,
    group_rates,
    lightning_rates,
)

from ...helpers.llama import llama_config
from ...helpers.models import batches, mlp, same, snapshot
from .by_hand import multiplier

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    lightning = pytest.importorskip("lightning")
    accelerate = pytest.importorskip("accelerate")
    trl = pytest.importorskip("trl")

pytestmark = [
    # peft, trl
    pytest.mark.filterwarnings(
        "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"
    ),
    # lightning
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # lightning
    pytest.mark.filterwarnings(
        "ignore:Checkpoint directory .* exists and is not empty"
    ),
]

LR = 1e-2
STEPS = 6
AT_16 = Reference(rank=16, alpha=16)
ADAMW = {"weight_decay": 0.0}


# --- transformers and TRL -------------------------------------------------------------------------------------------


def llama():
    """A two-layer language model from a configuration, with adapters of ranks 4 and 8."""
    torch.manual_seed(0)
    config = llama_config(num_hidden_layers=2)
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 8},
        alpha_pattern={"v_proj": 8},
    )
    return peft.get_peft_model(model, lora)


def tokens(count=24):
    source = torch.Generator().manual_seed(1)
    rows = torch.randint(32, (count, 8), generator=source).tolist()
    return datasets.Dataset.from_dict(
        {"input_ids": rows, "labels": rows, "attention_mask": [[1] * 8] * count}
    )


def arguments(folder, kind=transformers.TrainingArguments, **own):
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


def adapters(model):
    return [p for p in model.parameters() if p.requires_grad]


def by_class(model):
    """Trainer's own groups, the model taken out of the settings."""
    settings = {
        "model": model,
        "optimizer": torch.optim.AdamW,
        "lr": LR,
        "tuned_at": AT_16,
        **ADAMW,
    }
    return {"optimizer_cls_and_kwargs": (RankAwareOptimizer, settings)}


def by_instance(model):
    return {
        "optimizers": (
            RankAwareOptimizer(
                model, torch.optim.AdamW, lr=LR, tuned_at=AT_16, **ADAMW
            ),
            None,
        )
    }


def by_hand(model, kind=torch.optim.AdamW):
    """The native class with the four groups written out."""
    groups = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            rank = 4 if "q_proj" in name else 8
            groups.setdefault(
                (rank, "lora_A" in name), {"params": [], "lr": LR * multiplier(rank)}
            )["params"].append(param)
    return {"optimizers": (kind(list(groups.values()), lr=LR, **ADAMW), None)}


def trained(folder, route=None, resume=None, attached=None, **own):
    """A trainer after its run, and the adapters it left. Without a route, by attach."""
    model = llama()
    trainer = transformers.Trainer(
        model,
        arguments(folder, **own),
        train_dataset=tokens(),
        **(route(model) if route else {}),
    )
    if route is None:
        usual = {"optimizer": torch.optim.AdamW, "lr": LR, "tuned_at": AT_16}
        attach(trainer, **(attached or usual))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def tokenizer():
    """A tokenizer of 32 words, made in memory."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 32)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w2")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


@contextmanager
def counted():
    """A list that grows by one with every optimizer step."""
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    yield steps
    hook.remove()


each_route = pytest.mark.parametrize("route", [by_class, None, by_instance])


@each_route
def test_trainer_trains_as_with_groups_by_hand(tmp_path, route):
    """By every route Trainer leaves the weights of torch's own class with groups written out, bit for bit."""
    trainer, ours = trained(tmp_path / "ours", route)
    _, hand = trained(tmp_path / "hand", by_hand)
    assert isinstance(trainer.optimizer.optimizer, RankAwareOptimizer)
    assert same(ours, hand)


@each_route
def test_trainer_resumes(tmp_path, route):
    """A run resumed from its middle checkpoint takes the other half and ends at the same weights, bit for bit."""
    _, whole = trained(tmp_path, route)
    with counted() as steps:
        _, resumed = trained(tmp_path, route, str(tmp_path / "checkpoint-3"))
    assert len(steps) == STEPS - 3
    assert same(whole, resumed)


def test_the_rates_matter_in_these_runs(tmp_path):
    """Trainer's weights at the rates of each rank differ from those at one rate, so the tests above can fail."""
    _, ours = trained(tmp_path)
    _, plain = trained(
        tmp_path,
        lambda model: {"optimizers": (torch.optim.AdamW(adapters(model), lr=LR), None)},
    )
    assert not same(ours, plain)


def test_trainer_clips_and_accumulates(tmp_path):
    """Gradient clipping, accumulation and weight decay give the weights of groups written out."""
    own = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01}
    _, ours = trained(tmp_path, **own)
    _, hand = trained(tmp_path, by_hand, **own)
    assert same(ours, hand)


def test_trainer_runs_schedulefree(tmp_path):
    """Trainer switches a schedule-free optimizer made by the factory to training and back as it does the native one."""
    kind = pytest.importorskip("schedulefree").AdamWScheduleFree
    own = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    settings = {"optimizer": kind, "lr": LR, "tuned_at": AT_16}
    _, ours = trained(tmp_path, attached=settings, **own)
    _, hand = trained(tmp_path, lambda model: by_hand(model, kind), **own)
    assert same(ours, hand)


def test_attach_with_a_recipe(tmp_path):
    """With a recipe in place of a rate, Trainer's optimizer has the rates that the recipe gives."""
    reference = Reference(rank=4, alpha=4, init="A", fan_in=16)
    recipe = Recipe(
        "tiny",
        LR,
        reference=reference,
        law=Power(exponent=0.1),
        covariance=np.eye(3) / 100,
        ranks=(4, 8),
    )
    trainer, _ = trained(
        tmp_path, attached={"optimizer": "adamw", "recipe": recipe}, max_steps=1
    )
    direct = RankAwareOptimizer(llama(), torch.optim.AdamW, recipe=recipe)
    assert [g["initial_lr"] for g in trainer.optimizer.param_groups] == [
        g["lr"] for g in direct.param_groups
    ]


def test_the_callback_logs_every_groups_rate(tmp_path):
    """Trainer's logs hold the rate that each role and rank was stepped with, in the law's ratio."""
    trainer, _ = trained(tmp_path)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    assert [entry["learning_rate"] for entry in logs] == [
        entry["base_lr/A/r4"] for entry in logs
    ]
    for entry in logs:
        assert entry["lr/A/r4"] == pytest.approx(
            entry["base_lr/A/r4"] * entry["rank_multiplier/A/r4"]
        )
        rates = {name: rate for name, rate in entry.items() if name.startswith("lr/")}
        assert rates.keys() == {"lr/A/r4", "lr/B/r4", "lr/A/r8", "lr/B/r8"}
        assert rates["lr/A/r4"] * multiplier(8) == pytest.approx(
            rates["lr/B/r8"] * multiplier(4)
        )


def test_reporters_get_the_rates(tmp_path):
    """A reporter that the trainer was built with sees the rates in what it logs."""
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, *_, logs, **__):
            seen.append("lr/A/r4" in logs)

    trainer = transformers.Trainer(
        llama(), arguments(tmp_path), train_dataset=tokens(), callbacks=[Reporter()]
    )
    attach(trainer, torch.optim.AdamW, tuned_at=AT_16)
    trainer.train()
    assert seen == [True] * STEPS + [False]


def test_rates_that_share_a_name_are_numbered():
    """Groups that share a name are numbered, others are not; any optimizer can be asked."""
    model = mlp((4,), head=False)
    factors = [{"params": [p]} for p in model.parameters() if p.requires_grad]
    opt = RankAwareOptimizer(
        [*factors], torch.optim.SGD, model=model, lr=LR, rates={"*lora_A": 1.0}
    )
    found = group_rates(opt)
    assert {name: rate for name, rate in found.items() if name.startswith("lr/")} == {
        "lr/A/r4": 1.0,
        "lr/B/r4": LR,
    }
    assert (found["base_lr/A/r4"], found["rank_multiplier/A/r4"]) == (
        pytest.approx(LR),
        pytest.approx(1.0 / LR),
    )
    plain = torch.optim.SGD(
        [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 2.0}], lr=1.0
    )
    assert [group_rates(plain)[f"lr/other/{number}"] for number in (0, 1)] == [1.0, 2.0]


# --- Lightning ------------------------------------------------------------------------------------------------------


class Lit(lightning.LightningModule):
    """A mixed-rank model with a schedule, stepped by Lightning or by hand."""

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
        return {
            "optimizer": opt,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def rank_aware(model):
    """Lightning loads weights before it asks for the optimizer, so the adapters' init is named."""
    return RankAwareOptimizer(model, torch.optim.AdamW, lr=LR, tuned_at=AT_16, init="A")


def of_unknown_init(model):
    return RankAwareOptimizer(model, torch.optim.AdamW, lr=LR, tuned_at=AT_16)


def handmade(model):
    """torch's own AdamW with the groups of `mlp((4, 8))` written out, in the order in which norms are added."""
    layers = [
        (model.layer0.lora_A, 4),
        (model.layer0.lora_B, 4),
        (model.layer1.lora_A, 8),
        (model.layer1.lora_B, 8),
    ]
    groups = [{"params": [p], "lr": LR * multiplier(rank)} for p, rank in layers]
    return torch.optim.AdamW(
        [*groups, {"params": list(model.head.parameters())}], lr=LR
    )


def loader():
    data = torch.utils.data.TensorDataset(torch.cat(list(batches(STEPS))))
    return torch.utils.data.DataLoader(data, batch_size=8, num_workers=0)


def fit(folder, make, *, manual=False, resume=None, epochs=1, **options):
    """The module after its epochs, and the trainer."""
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(folder),
        **{**quiet, **options},
    )
    module = Lit(make, manual=manual)
    trainer.fit(module, loader(), ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"manual": True}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.01}],
    ids=str,
)
def test_lightning_trains_as_with_groups_by_hand(tmp_path, options):
    """Automatic and manual optimization, bf16 and clipping leave the weights of groups written out, bit for bit."""
    ours, trainer = fit(tmp_path, rank_aware, **options)
    hand, _ = fit(tmp_path, handmade, **options)
    assert isinstance(trainer.optimizers[0], RankAwareOptimizer)
    assert same(snapshot(ours.net), snapshot(hand.net))


@pytest.mark.parametrize("manual", [False, True])
def test_lightning_resumes(tmp_path, manual):
    """A run resumed after its first epoch ends at the weights of the uninterrupted one, bit for bit."""
    whole, _ = fit(tmp_path, rank_aware, manual=manual, epochs=2)
    _, trainer = fit(tmp_path, rank_aware, manual=manual)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    with counted() as steps:
        resumed, _ = fit(
            tmp_path,
            rank_aware,
            manual=manual,
            epochs=2,
            resume=tmp_path / "middle.ckpt",
        )
    assert len(steps) == STEPS
    assert same(snapshot(whole.net), snapshot(resumed.net))


@pytest.mark.filterwarnings("default::rankaware_optim.RankAwareWarning")
def test_lightning_resumes_adapters_of_unknown_init(tmp_path):
    """Where loaded weights no longer show the adapters' init, a warning says so and the checkpoint restores it."""
    whole, _ = fit(tmp_path, of_unknown_init, epochs=2)
    _, trainer = fit(tmp_path, of_unknown_init)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    with pytest.warns(RankAwareWarning, match="undeclared init"):
        resumed, _ = fit(
            tmp_path, of_unknown_init, epochs=2, resume=tmp_path / "middle.ckpt"
        )
    assert same(snapshot(whole.net), snapshot(resumed.net))


def test_lightnings_monitor_logs_every_group(tmp_path):
    """LearningRateMonitor logs every group's base rate, and our callback what it trains at, in the law's ratios."""
    monitor = lightning.pytorch.callbacks.LearningRateMonitor(logging_interval="step")
    logger = lightning.pytorch.loggers.CSVLogger(str(tmp_path))
    fit(
        tmp_path,
        rank_aware,
        callbacks=[monitor, lightning_rates()],
        logger=logger,
        log_every_n_steps=1,
    )
    rates = {name: values[0] for name, values in monitor.lrs.items() if values}
    assert list(rates) == [f"lr-AdamW/pg{i}" for i in range(1, 6)]
    assert list(rates.values()) == pytest.approx([LR] * 5)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        logged = next(row for row in csv.DictReader(file) if row["lr/A/r4"])
    for rank in (4, 8):
        assert float(logged[f"lr/A/r{rank}"]) == pytest.approx(LR * multiplier(rank))


class Two(Lit):
    """Two optimizers, one for each layer, stepped by hand, both on every batch or in turns."""

    def training_step(self, batch, number):
        for opt in (
            self.optimizers()[number % 2 :: 2] if self.alternate else self.optimizers()
        ):
            opt.zero_grad()
            self.manual_backward(self.net(batch[0]).square().mean())
            opt.step()

    def configure_optimizers(self):
        return [
            self.make(self.net, layer) for layer in (self.net.layer0, self.net.layer1)
        ]


@pytest.mark.parametrize(("every", "rows"), [(2, STEPS // 2), (1, STEPS), (0, 0)])
@pytest.mark.parametrize("alternate", [False, True])
def test_two_optimizers_rates_are_logged_by_number_and_interval(
    tmp_path, every, rows, alternate
):
    """Two optimizers' rates have names of their own, as often as Lightning logs, whichever of them steps."""

    def make(net, layer):
        params = [p for p in layer.parameters() if p.requires_grad]
        return RankAwareOptimizer(
            params, torch.optim.AdamW, model=net, lr=LR, tuned_at=AT_16, init="A"
        )

    logger = lightning.pytorch.loggers.CSVLogger(str(tmp_path))
    options = {
        "callbacks": [lightning_rates()],
        "logger": logger,
        "log_every_n_steps": every,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=str(tmp_path),
        **quiet,
        **options,
    )
    module = Two(make, manual=True)
    module.alternate = alternate
    trainer.fit(module, loader())
    logger.save()
    if not rows:
        assert not logger.experiment.metrics
        return
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    for number, rank in enumerate((4, 8)):
        values = [
            float(row[f"{number}/lr/A/r{rank}"])
            for row in logged
            if row[f"{number}/lr/A/r{rank}"]
        ]
        assert values == pytest.approx([LR * multiplier(rank)] * rows)


@pytest.mark.parametrize("package", ["lightning", "fabric"])
def test_a_group_added_through_lightning_is_scaled(package):
    """add_param_group of the optimizer that Lightning or Fabric puts around ours gives the group its own rate."""
    model = mlp((4, 8))
    late = [model.layer1.lora_A, model.layer1.lora_B]
    for param in late:
        param.requires_grad_(False)
    opt = rank_aware(model)
    if package == "fabric":
        outer = lightning.Fabric(accelerator="cpu", devices=1).setup(model, opt)[1]
    else:
        outer = lightning.pytorch.core.optimizer.LightningOptimizer(opt)
    for param in late:
        param.requires_grad_(True)
    outer.add_param_group({"params": late})
    added = [group for group in opt.param_groups if group["lora_rank"] == 8]
    assert [p for group in added for p in group["params"]] == late
    assert [group["rank_multiplier"] for group in added] == pytest.approx(
        [multiplier(8)] * 2
    )
