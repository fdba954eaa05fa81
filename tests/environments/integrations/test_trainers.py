"""Tests of short runs with transformers' Trainer and all trainers of TRL: attach, two other routes, and logs."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import optuna
import pytest
import torch
from click.testing import CliRunner
from torch.optim.optimizer import register_optimizer_step_post_hook

import rankaware_optim as ra
from rankaware_optim import OptimizerError, RankAwareOptimizer, RankAwareWarning, attach
from rankaware_optim.cli import main
from rankaware_optim.optimizer._wrapper import _LIVE
from rankaware_optim.trainers import group_rates

from ...helpers.deepspeed import on_cpu
from ...helpers.examples import readme_blocks
from ...helpers.llama import llama_config
from ...helpers.models import mlp, same, trained
from ...helpers.optimizers import multiplier
from ...helpers.recipes import RECIPE
from .trainers import (
    AT_16,
    LR,
    QUIET,
    STEPS,
    AdamW,
    accelerate,
    arguments,
    attached,
    by_class,
    by_hand,
    by_instance,
    datasets,
    llama,
    plain,
    tokenizer,
    tokens,
    transformers,
    trl,
    weights,
)

pytestmark = QUIET


# --- every route, every trainer -------------------------------------------------------------------------------------


def run(folder, route=None, resume=None, **own):
    """Train and return a trainer, with attach or with another route to the optimizer."""
    model = llama()
    trainer = plain(model, folder, route=route and route(model), **own)
    if route is None:
        attached(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CLIPPED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01}


@pytest.mark.parametrize(
    ("route", "own"),
    [(by_class, {}), (by_instance, {}), (None, {}), (None, CLIPPED)],
)
def test_trainer_trains_and_resumes_as_with_groups_by_hand(tmp_path, route, own):
    """With every route, weights are exactly those of a native optimizer with groups by hand, also
    in a resumed run.
    """
    whole = run(tmp_path / "ours", route, **own)
    hand = run(tmp_path / "hand", by_hand, **own)
    assert isinstance(whole.optimizer.optimizer, RankAwareOptimizer)
    assert same(weights(whole), weights(hand))
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    middle = tmp_path / "ours" / "checkpoint-3"
    resumed = run(tmp_path / "ours", route, str(middle), **own)
    hook.remove()
    assert len(steps) == STEPS - 3
    assert same(weights(whole), weights(resumed))


def test_trainer_runs_schedulefree(tmp_path):
    """Trainer switches the modes of a schedule-free optimizer as it does natively, and a warning
    says that it saves in train mode.
    """
    kind = pytest.importorskip("schedulefree").AdamWScheduleFree
    own = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    ours = attached(plain(llama(), tmp_path, **own), kind)
    with pytest.warns(RankAwareWarning, match="in train mode"):
        ours.train()
    hand = run(tmp_path, lambda model: by_hand(model, kind), **own)
    assert same(weights(ours), weights(hand))


def texts(**columns):
    """Return 16 rows of short texts, each of which ends in the number of its row as a word."""
    return datasets.Dataset.from_dict(
        {n: [f"{text} w{i % 30 + 2}" for i in range(16)] for n, text in columns.items()}
    )


def rated():
    rows = texts(prompt="w2", completion="w3 w4")
    return rows.add_column("label", [True, False] * 8)


def score(completions, **_):
    return [float(len(set(text))) for text in completions]


ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0}
TRL = {
    # the data, and the arguments of this trainer
    "SFT": (tokens, {"max_length": None}),
    "DPO": (
        lambda: texts(prompt="w2", chosen="w3 w4", rejected="w5"),
        {"max_length": None},
    ),
    "KTO": (rated, {"max_length": None}),
    "GRPO": (lambda: texts(prompt="w2 w3"), ONLINE),
    "RLOO": (lambda: texts(prompt="w2 w3"), ONLINE),
}


def of_trl(kind, model, folder, route=None):
    """Return TRL's trainer of this kind."""
    data, own = TRL[kind]
    args = arguments(folder, getattr(trl, f"{kind}Config"), max_steps=2, **own)
    rewards = {"reward_funcs": [score]} if own is ONLINE else {}
    more = {"train_dataset": data(), "processing_class": tokenizer(), **rewards}
    return getattr(trl, f"{kind}Trainer")(model, args=args, **more, **route or {})


@pytest.mark.parametrize("kind", TRL)
def test_every_trainer_of_trl_trains_as_with_groups_by_hand(tmp_path, kind):
    """With attach, every trainer of TRL gets exactly the weights of groups by hand, and logs all
    learning rates.
    """
    ours = attached(of_trl(kind, llama(), tmp_path / "ours"), weight_decay=0.0)
    start = weights(ours)
    ours.train()
    assert not same(start, weights(ours))
    assert "lr/r4" in ours.state.log_history[1]
    assert isinstance(ours.optimizer.optimizer, RankAwareOptimizer)
    assert str(ours.optimizer.report()) == str(ours.optimizer.optimizer.report())
    assert ours.optimizer.rates == ours.optimizer.optimizer.rates
    model = llama()
    hand = of_trl(kind, model, tmp_path / "hand", by_hand(model))
    hand.train()
    assert same(weights(ours), weights(hand))


def test_trls_pasted_lines_train_the_layers_that_they_name(tmp_path):
    """The lines that `convert --as trl` prints run unchanged, and train all linear layers at the
    converted learning rate.
    """
    asked = ["convert", "2e-4", "--from", "r=16,alpha=16", "--to", "r=64,alpha=64"]
    done = CliRunner().invoke(main, [*asked, "--as", "trl"])
    before, after = done.output.split("# after trainer = ")
    names = {}
    exec(before, names)
    args = arguments(tmp_path, trl.SFTConfig, max_steps=1, max_length=None)
    names["trainer"] = trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM(llama_config()),
        args=args,
        train_dataset=tokens(),
        processing_class=tokenizer(),
        peft_config=names["peft_config"],
    )
    trainer.args.learning_rate = 2e-4
    exec(after.partition("\n")[2], names)
    trainer.train()
    rows = trainer.optimizer.report().rows
    assert {row.rank for row in rows} == {64}
    adapted = {
        n.split(".")[-4] for n, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert len(adapted) == 7


def test_the_readmes_line_moves_a_trainers_rates(tmp_path):
    """The README's code trains a Trainer at ranks 4 and 8 with learning rates converted from rank 16."""
    trainer = plain(llama(), tmp_path, max_steps=2, learning_rate=2e-4)
    exec(readme_blocks()[1], {"ra": ra, "torch": torch, "trainer": trainer})
    assert trainer.state.global_step == 2
    rows = trainer.optimizer.report().rows
    assert {row.rank for row in rows if row.multiplier != 1.0} == {4, 8}


# --- the trainer's arguments -----------------------------------------------------------------------------------------


ONE_RANK = {"target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {}}


def with_norms_and_biases():
    """Return a model of one rank with trainable norms and biases beside the adapters."""
    others = {"bias": "lora_only", "modules_to_save": ["input_layernorm"]}
    return llama({"attention_bias": True}, **ONE_RANK, **others)


SET = {"weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-3}


@pytest.mark.parametrize(
    ("given", "optim"),
    [
        ({"optimizer": AdamW}, "adamw_torch"),
        ({}, "adamw_torch_fused"),
        ({"lr": LR}, "adafactor"),
    ],
)
def test_the_arguments_reach_the_optimizer(tmp_path, given, optim):
    """attach takes weight decay, betas and epsilon from the trainer's arguments, as Trainer's own
    optimizer does.
    """
    ours, own = (
        plain(with_norms_and_biases(), tmp_path, optim=optim, **SET) for _ in range(2)
    )
    attach(ours, **given)
    ours.train()
    own.train()
    assert same(weights(ours), weights(own))
    parts = ours.optimizer.optimizer.rates.groups
    of_norms = {p.user_group for p in parts if any("norm" in n for n in p.names)}
    decays = [group["weight_decay"] for group in ours.optimizer.param_groups]
    assert (decays, of_norms) == ([0.5, 0.0], {1})


def test_what_is_given_holds_over_the_arguments(tmp_path):
    """Settings passed to attach override the trainer's arguments.

    Arguments left at their defaults change nothing.
    """
    trainer = plain(llama(), tmp_path, **SET)
    attached(trainer, betas=(0.1, 0.2), weight_decay=0.25)
    defaults = trainer.create_optimizer().defaults
    assert (defaults["betas"], defaults["weight_decay"]) == ((0.1, 0.2), 0.25)
    trainer = attached(plain(llama(), tmp_path), "torch_optimizer:Yogi")
    assert trainer.create_optimizer().defaults["eps"] == 1e-3


OWN_CLASS = {"optimizer_cls_and_kwargs": (AdamW, {"lr": 3e-3, "eps": 1e-4})}
OF_RECIPE = {  # of a model of this width
    "recipe": replace(RECIPE, reference=replace(RECIPE.reference, fan_in=16)),
    "other_lr": 1e-3,
}
RATES = [
    # learning rate in the arguments, in optimizer_cls_and_kwargs, and passed to attach; the last
    # column is the one that trains, or None for the recipe's
    (5e-4, None, {}, 5e-4),
    (2e-4, None, {"lr": 2e-4}, 2e-4),
    (5e-4, None, OF_RECIPE, None),
    (5e-4, OWN_CLASS, {}, 3e-3),
    (5e-4, OWN_CLASS, {"lr": None}, 3e-3),
    (2e-4, OWN_CLASS, {"lr": 2e-4}, 2e-4),
    (5e-4, OWN_CLASS, OF_RECIPE, None),
]


@pytest.mark.filterwarnings("ignore:Recipe .* extrapolates")
@pytest.mark.parametrize(("argument", "route", "given", "rate"), RATES)
def test_one_rate_is_the_base_rate(tmp_path, argument, route, given, rate):
    """A learning rate passed to attach overrides the trainer's, and the trainer's arguments then show it."""
    trainer = plain(llama(), tmp_path, route=route, learning_rate=argument)
    attach(trainer, **given)
    defaults = trainer.create_optimizer().defaults
    if rate is None:
        rate = RankAwareOptimizer(llama(), AdamW, **OF_RECIPE).defaults["lr"]
    assert defaults["lr"] == trainer.args.learning_rate == rate
    assert route is None or defaults["eps"] == 1e-4


def at_its_default(folder):
    return plain(llama(), folder, learning_rate=5e-5)


def at_a_rate(folder):
    return plain(llama(), folder)


def with_an_optimizer(folder):
    trainer = at_a_rate(folder)
    trainer.create_optimizer()
    return trainer


def attached_twice(trainer, optimizer=AdamW):
    attach(trainer, optimizer)
    attach(trainer, optimizer)


REFUSED = [
    (lambda folder: object(), attached, "not a supported trainer"),
    (at_its_default, attach, r"attach\(\) was called without a learning rate"),
    (at_its_default, lambda t: attach(t, tuned_at=AT_16), "without a learning rate"),
    (at_a_rate, attached_twice, "already has an optimizer.*Build a new trainer"),
    (at_a_rate, lambda t: attached_twice(t, None), "already has an optimizer"),
    (
        with_an_optimizer,
        attach,
        r"already has an optimizer, because train\(\) .* built with optimizers=",
    ),
    (
        lambda folder: plain(llama(), folder, route=OWN_CLASS),
        lambda t: attach(t, AdamW),
        "built with optimizer_cls_and_kwargs=",
    ),
    (at_a_rate, lambda t: attach(t, "adamwx"), "Unknown optimizer"),
    (
        at_a_rate,
        lambda t: attach(t, "paged_adamw_8bit"),
        r"call attach\(\) without an optimizer",
    ),
    (at_a_rate, lambda t: attached(t, optimizer="prodigyopt:Prodigy"), "one rate for"),
]


def test_what_the_wrapper_refuses_attach_refuses(tmp_path):
    """attach refuses every argument that RankAwareOptimizer refuses, and leaves the trainer unchanged."""
    trainer = at_its_default(tmp_path)
    rate, callbacks = trainer.args.learning_rate, [*trainer.callback_handler.callbacks]
    with pytest.raises(ra.InvalidReferenceError, match="rank"):
        attached(trainer, tuned_at="r=0,alpha=16")
    assert trainer.args.learning_rate == rate
    assert trainer.callback_handler.callbacks == callbacks
    assert trainer.optimizer_cls_and_kwargs is None


def test_attach_returns_the_report(tmp_path, capsys):
    """attach returns the report without printing it, and does not keep a second optimizer alive."""
    trainer = plain(llama(), tmp_path, max_steps=1, lr_scheduler_type="constant")
    before = {*_LIVE}
    report = attach(trainer, AdamW, tuned_at=AT_16)
    assert {*_LIVE} <= before
    trainer.train()
    assert "RankAwareOptimizer" not in capsys.readouterr().out
    assert trainer.optimizer.report().rows == report.rows


def in_bfloat16(folder, lr):
    """Return a trainer for full finetuning of a bfloat16 model under autocast, which leaves the
    weights in bfloat16.
    """
    model = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=2))
    own = {"max_steps": 2, "bf16": True, "learning_rate": lr}
    return plain(model.bfloat16(), folder, **own)


def test_attach_says_when_nothing_moves(tmp_path):
    """If steps are too small for bfloat16 weights, the report says so, and training warns once."""
    trainer = in_bfloat16(tmp_path, 1e-5)
    report = attach(trainer, AdamW, method="full")
    (line,) = report.unmoved
    assert "too small for bfloat16" in line
    with pytest.warns(RankAwareWarning, match="too small for bfloat16") as caught:
        trainer.train()
    said = [str(w.message) for w in caught if w.category is RankAwareWarning]
    assert said == [line]
    moving = in_bfloat16(tmp_path, 1e-3)
    assert attach(moving, AdamW, method="full").unmoved == ()
    moving.train()


@pytest.mark.parametrize("sharding", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_attach_is_silent_where_float32_copies_will_train(tmp_path, sharding):
    """Under DeepSpeed and FSDP the report has no bfloat16 line, because float32 copies may train there."""
    trainer = in_bfloat16(tmp_path, 1e-5)
    setattr(trainer, sharding, True)
    assert attach(trainer, AdamW, method="full").unmoved == ()


@pytest.mark.parametrize(("make", "act", "sentence"), REFUSED)
def test_a_trainer_that_cannot_be_attached_to_is_refused(tmp_path, make, act, sentence):
    """attach raises an error for unknown objects, default learning rates, second optimizers and
    unknown classes.
    """
    trainer = make(tmp_path)
    with pytest.raises(OptimizerError, match=sentence):
        act(trainer)


@pytest.mark.parametrize("given", [{}, {"lr": 3e-4}], ids=["arguments", "attach"])
def test_a_search_trains_each_trial_at_its_own_rate(tmp_path, given):
    """Each trial of hyperparameter_search trains at its own learning rate, even if attach was
    called with lr=.
    """
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((args.learning_rate, kwargs["optimizer"].param_groups[0]["lr"]))

    own = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = transformers.Trainer(
        model_init=lambda: llama(),
        args=arguments(tmp_path, **own),
        callbacks=[Look()],
        train_dataset=tokens(),
        eval_dataset=tokens(),
    )
    attach(trainer, AdamW, **given)
    rates = {"learning_rate": [2e-5, 5e-5, 1e-4]}
    trainer.hyperparameter_search(
        lambda trial: {
            n: trial.suggest_categorical(n, all_) for n, all_ in rates.items()
        },
        backend="optuna",
        n_trials=3,
        sampler=optuna.samplers.GridSampler(rates),
    )
    assert sorted(seen) == [(rate, rate) for rate in rates["learning_rate"]]


def test_a_rate_written_after_attach_is_refused_beside_a_recipe(tmp_path):
    """After attach with a recipe, a learning rate written into the trainer's arguments is an error."""
    trainer = transformers.Trainer(llama(), arguments(tmp_path), train_dataset=tokens())
    attach(trainer, AdamW, **OF_RECIPE)
    trainer.args.learning_rate = 1e-3
    with pytest.raises(
        OptimizerError, match=r"learning_rate=0\.001 was set in the trainer's arguments"
    ):
        trainer.train()


def test_a_rate_beside_a_recipe_is_an_error(tmp_path):
    """attach refuses lr=, tuned_at= and law= together with a recipe, and leaves the trainer unchanged."""
    trainer = at_a_rate(tmp_path)
    for name, value in {"lr": 1e-4, "tuned_at": AT_16, "law": "mua"}.items():
        with pytest.raises(
            OptimizerError, match=rf"{name}=.*together with recipe=.*Remove {name}="
        ):
            attach(trainer, **OF_RECIPE, **{name: value})
    assert trainer.optimizer_cls_and_kwargs is None


@pytest.mark.filterwarnings("ignore:Recipe .* extrapolates")
def test_another_batch_than_the_recipes_is_said(tmp_path):
    """If the recipe's batch size differs from the trainer's, a warning names both and says to pass batch=."""
    recipe = OF_RECIPE["recipe"]
    of_8 = replace(recipe, reference=replace(recipe.reference, batch=8))
    own = {"other_lr": 1e-3}
    with pytest.warns(
        RankAwareWarning, match=r"batch size 8, .* batch size 2,.*batch=2"
    ):
        report = attach(at_a_rate(tmp_path), recipe=of_8, **own)
    assert "batch=2" in report.notes[-1]
    of_2 = replace(recipe, reference=replace(recipe.reference, batch=2))
    assert "batch=" not in str(attach(at_a_rate(tmp_path), recipe=of_2, **own).notes)


def test_attach_shows_its_arguments(tmp_path):
    """The signature of attach lists the arguments of RankAwareOptimizer, and a misspelled one is
    named in the error.
    """
    ours = {*inspect.signature(RankAwareOptimizer.__new__).parameters}
    ours -= {"cls", "params", "model"}
    assert ours <= {*inspect.signature(attach).parameters} | {"settings"}
    with pytest.raises(TypeError, match=r"argument tuned=.*Use tuned_at="):
        attach(at_a_rate(tmp_path), AdamW, lr=LR, tuned="r=16,alpha=16")


class Axolotl(transformers.Trainer):
    """A trainer that calls the optimizer's factory as axolotl does, with the model, its arguments
    and settings.
    """

    def create_optimizer(self, model=None):
        kind, settings = self.optimizer_cls_and_kwargs
        trained = self.model if model is None else model
        self.optimizer = kind()(trained, self.args, **settings)
        return self.optimizer


def test_axolotls_call_of_a_factory_trains(tmp_path):
    """An optimizer built by axolotl's call gives exactly the same weights as one built by Trainer's call."""
    ours = Axolotl(llama(), arguments(tmp_path / "ours"), train_dataset=tokens())
    attached(ours).train()
    plainly = attached(plain(llama(), tmp_path / "plain"))
    plainly.train()
    assert same(weights(ours), weights(plainly))


# --- a run without attach -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_a_plain_runs_checkpoint_is_resumed(tmp_path, schedule):
    """A checkpoint from before attach is resumed with its scheduler, at its learning rates times
    our multipliers.
    """

    def made():
        own = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 3}
        data = {"train_dataset": tokens(), "eval_dataset": tokens()}
        return transformers.Trainer(llama(), arguments(tmp_path, **own), **data)

    def rates(trainer):
        logs = trainer.state.log_history
        return [entry["learning_rate"] for entry in logs if "learning_rate" in entry]

    plainly = made()
    plainly.train()
    trainer = attached(made())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == STEPS
    assert rates(trainer) == rates(plainly)
    assert len(trainer.lr_scheduler.get_last_lr()) == 2
    logs = [entry for entry in trainer.state.log_history if "lr/r4" in entry]
    assert len(logs) == STEPS - 3
    for entry in logs:
        assert entry["lr/r4"] == pytest.approx(entry["learning_rate"] * multiplier(4))


# --- what trainers do with an attached optimizer ---------------------------------------------------------------------------------------


def test_an_attached_trainer_can_be_sent_to_another_process(tmp_path):
    """An attached trainer copied by cloudpickle, as Ray does it, trains its own model as the original does."""
    cloudpickle = pytest.importorskip("cloudpickle")
    accelerate.state.GradientState._reset_state()  # after another training in this process it holds weak references
    trainer = attached(plain(llama(), tmp_path))
    copied = cloudpickle.loads(cloudpickle.dumps(trainer))
    assert copied.optimizer_cls_and_kwargs[0].trainer is copied
    copied.train()
    trainer.train()
    assert same(weights(copied), weights(trainer))


ZERO = """
import torch, transformers, peft, warnings
import rankaware_optim as ra
from rankaware_optim import attach
config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2)
lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"])
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
zero = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 1}, "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
args = transformers.TrainingArguments("out", max_steps=1, report_to="none", save_strategy="no", deepspeed=zero)
rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(8)]
trainer = transformers.Trainer(model, args, train_dataset=rows)
attach(trainer, torch.optim.AdamW, lr=1e-3, tuned_at="r=64,alpha=64")
warnings.simplefilter("ignore")
warnings.simplefilter("error", ra.RankAwareWarning)
trainer.train()
print("AT THE END", sorted({row.role for row in trainer.optimizer.report().rows}))
"""


def test_deepspeeds_wrapper_is_looked_into(tmp_path):
    """Under ZeRO, attach finds its optimizer inside DeepSpeed's wrapper, and the wrapper gets its report."""
    pytest.importorskip("deepspeed")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29763"}
    done = subprocess.run(
        [sys.executable, "-c", ZERO],
        cwd=tmp_path,
        env={**os.environ, **alone, **address, **on_cpu()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "AT THE END ['A', 'B']" in done.stdout, done.stderr[-2000:]


class OfItsOwn(transformers.Trainer):
    """A trainer that builds its optimizer itself, as Unsloth's does on a GPU if embeddings have
    their own learning rate.
    """

    def create_optimizer(self, model=None):
        self.optimizer = AdamW(self.model.parameters())
        return self.optimizer


@pytest.mark.parametrize("embeddings", [None, 1e-5])
def test_a_trainer_that_makes_another_optimizer_is_refused(tmp_path, embeddings):
    """If the trainer builds another optimizer after attach, train raises an error before any weight changes."""
    args = arguments(tmp_path, max_steps=1)
    trainer = attached(OfItsOwn(llama(), args, train_dataset=tokens()))
    start = weights(trainer)
    cure = "Remove create_optimizer"
    if embeddings is not None:  # an argument of Unsloth
        trainer.args.embedding_learning_rate = embeddings
        cure = "Remove embedding_learning_rate.* rates="
    with pytest.raises(
        OptimizerError, match=f"built another optimizer, AdamW, .*{cure}"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same(start, weights(trainer))


def test_groups_that_a_trainer_hands_over_keep_their_own_rates(tmp_path):
    """A group passed to the factory keeps its learning rate, unless it is the trainer's base.

    Then attach's replaces it.
    """
    model = llama()
    trainer = attached(plain(model, tmp_path, learning_rate=5e-3))
    first, *rest = (p for p in model.parameters() if p.requires_grad)
    base = {"params": rest, "lr": trainer.args.learning_rate}
    groups = [{"params": [first], "lr": 1e-4}, base]
    opt = trainer.optimizer_cls_and_kwargs[0](groups)
    assert [group["lr"] for group in opt.param_groups] == [1e-4, LR]
    assert {(g.user_group, g.base_lr) for g in opt.rates.groups} == {(0, 1e-4), (1, LR)}


def test_an_eight_bit_optimizer_keeps_embeddings_in_32_bits(tmp_path):
    """bitsandbytes' AdamW8bit keeps the moments of embeddings in float32, and those of large LoRA matrices in 8 bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 256, "vocab_size": 64}
    model = llama(wide, **ONE_RANK, r=32, modules_to_save=["embed_tokens"])
    trainer = attached(plain(model, tmp_path), bitsandbytes.optim.AdamW8bit)
    opt = trainer.create_optimizer()
    rows = torch.arange(64).reshape(4, 16)
    model(input_ids=rows, labels=rows).loss.backward()
    opt.step()
    kinds = {
        n.split(".")[-3]: opt.state[p]["state1"].dtype
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert kinds["modules_to_save"] == torch.float32
    assert kinds["lora_A"] == torch.uint8


# --- logs -----------------------------------------------------------------------------------------------------------


def test_the_trained_rates_are_logged(tmp_path, monkeypatch):
    """Trainer's logs and a tracker of report_to= have the learning rate of each rank."""
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, *_, logs, **__):
            seen.append("lr/r4" in logs)

    trackers = transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(trackers, "tracker", Reporter)
    trainer = attached(plain(llama(), tmp_path, report_to="tracker"))
    trainer.train()
    assert seen == [True] * STEPS + [False]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        base = entry["learning_rate"]
        rates = {name: rate for name, rate in entry.items() if "/" in name}
        moved = {f"lr/r{rank}": base * multiplier(rank) for rank in (4, 8)}
        assert rates == pytest.approx(moved)  # Trainer's second group is empty


def by_rate(*rates):
    """Return our optimizer with one group for each learning rate, each with a layer of rank 4."""
    model = mlp((4,) * len(rates), head=False)
    layers = [layer for layer in model if trained(layer)]
    groups = []
    for layer, rate in zip(layers, rates, strict=True):
        groups.append({"params": trained(layer), "lr": rate})
    return RankAwareOptimizer(groups, AdamW, model=model, lr=LR)


def of_one_rank(**options):
    return RankAwareOptimizer(mlp((4,), head=False), AdamW, lr=LR, **options)


def of_two_scalings():
    model = mlp((4, 4), scalings=(1.0, 2.0), head=False)
    return RankAwareOptimizer(model, AdamW, lr=LR)


def with_a_resting_layer():
    model = mlp((4, 8))
    model.layer1.requires_grad_(False)
    return RankAwareOptimizer(model, AdamW, lr=LR)


NAMED_RATES = [
    (of_one_rank, {"lr/r4": LR}),
    (partial(of_one_rank, rates={"*lora_A": 1.0}), {"lr/A/r4": 1.0, "lr/B/r4": LR}),
    (partial(by_rate, LR, LR), {"lr/r4": LR}),
    (
        partial(by_rate, 1e-3, 5e-4, 2.5e-4),
        {"lr/group0/r4": 1e-3, "lr/group1/r4": 5e-4, "lr/group2/r4": 2.5e-4},
    ),
    (with_a_resting_layer, {"lr/r4": LR, "lr/other": LR}),
]


@pytest.mark.parametrize(("build", "rates"), NAMED_RATES)
@pytest.mark.parametrize("warming_up", [False, True])
def test_every_learning_rate_has_a_name(build, rates, warming_up):
    """Every learning rate has a name of its own in the logs, which a warm-up from zero does not change."""
    opt = build()
    if warming_up:
        for group in opt.param_groups:
            group |= {"initial_lr": group["lr"], "lr": 0.0}
        rates = dict.fromkeys(rates, 0.0)
    assert group_rates(opt) == rates


def test_rates_that_differ_by_scaling_or_name_have_names():
    """Learning rates of equal ranks are told apart in the logs by scaling, or by the name of a parameter."""
    assert group_rates(of_two_scalings()).keys() == {"lr/r4/s1", "lr/r4/s2"}
    model = mlp((4, 4), head=False)
    own = {"layer0.lora_A": 1.0, "layer1.lora_A": 2.0}
    rates = group_rates(RankAwareOptimizer(model, AdamW, lr=LR, rates=own))
    assert rates == {
        "lr/group0/layer0.lora_A": 1.0,
        "lr/group0/layer1.lora_A": 2.0,
        "lr/B/r4": LR,
    }
