"""`attach` on every trainer of TRL and on transformers' own: real runs of a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import optuna
import pytest
import torch
from accelerate.state import GradientState

import rankaware_optim as ra
from rankaware_optim import OptimizerError, RankAwareOptimizer
from rankaware_optim.integrations import attach

from ...helpers.deepspeed import on_cpu
from ...helpers.examples import readme_blocks
from ...helpers.llama import llama_config
from ...helpers.models import same
from ...helpers.recipes import RECIPE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from .test_trainers import (
        ADAMW,
        AT_16,
        LR,
        STEPS,
        arguments,
        by_hand,
        datasets,
        llama,
        peft,
        tokenizer,
        tokens,
        transformers,
        trl,
    )

pytestmark = [
    # peft, trl
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
]

AdamW = torch.optim.AdamW


# --- every trainer --------------------------------------------------------------------------------------------------


def words():
    """The tokenizer of 32 words, parting texts at spaces."""
    from tokenizers import pre_tokenizers

    made = tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def texts(**columns):
    """Sixteen rows of short texts; a column's text is followed by the row's number as a word."""
    return datasets.Dataset.from_dict(
        {n: [f"{text} w{i % 30 + 2}" for i in range(16)] for n, text in columns.items()}
    )


def sft(model, folder, **route):
    config = arguments(folder, trl.SFTConfig, max_length=None, max_steps=2)
    return trl.SFTTrainer(
        model, config, train_dataset=tokens(), processing_class=words(), **route
    )


def reward(model, folder, **route):
    kept = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=4,
        target_modules=["q_proj"],
        modules_to_save=["score"],
    )
    torch.manual_seed(0)
    config = llama_config(pad_token_id=0, num_labels=1)
    adapted = peft.get_peft_model(
        transformers.LlamaForSequenceClassification(config), kept
    )
    data = texts(chosen="w2 w3", rejected="w4 w5")
    own = arguments(folder, trl.RewardConfig, max_length=None, max_steps=2)
    return trl.RewardTrainer(
        adapted, own, train_dataset=data, processing_class=words(), **route
    )


def dpo(model, folder, **route):
    data = texts(prompt="w2", chosen="w3 w4", rejected="w5")
    own = arguments(folder, trl.DPOConfig, max_length=None, max_steps=2)
    return trl.DPOTrainer(
        model, args=own, train_dataset=data, processing_class=words(), **route
    )


def kto(model, folder, **route):
    data = texts(prompt="w2", completion="w3 w4").add_column("label", [True, False] * 8)
    own = arguments(folder, trl.KTOConfig, max_length=None, max_steps=2)
    return trl.KTOTrainer(
        model, args=own, train_dataset=data, processing_class=words(), **route
    )


def online(trainer, config):
    def made(model, folder, **route):
        own = {
            "num_generations": 2,
            "max_completion_length": 4,
            "beta": 0.0,
            "max_steps": 2,
        }
        args = arguments(folder, config, **own)
        rewards = [
            lambda completions, **_: [float(len(set(text))) for text in completions]
        ]
        data = texts(prompt="w2 w3")
        return trainer(
            model,
            rewards,
            args=args,
            train_dataset=data,
            processing_class=words(),
            **route,
        )

    return made


def plain(model, folder, **route):
    return transformers.Trainer(
        model, arguments(folder, max_steps=2), train_dataset=tokens(), **route
    )


MAKERS = {
    "Trainer": plain,
    "SFT": sft,
    "Reward": reward,
    "DPO": dpo,
    "KTO": kto,
    "GRPO": online(trl.GRPOTrainer, trl.GRPOConfig),
    "RLOO": online(trl.RLOOTrainer, trl.RLOOConfig),
}


def weights(trainer):
    return {
        name: p.detach().clone()
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("kind", MAKERS)
def test_every_trainer_trains_as_with_groups_by_hand(tmp_path, capsys, kind):
    """One line after any trainer: the weights of groups written out, bit for bit, the rates logged, one report."""
    ours = MAKERS[kind](llama(), tmp_path / "ours")
    attach(ours, AdamW, lr=LR, tuned_at=AT_16, **ADAMW)
    start = weights(ours)
    ours.train()
    assert not same(start, weights(ours))
    assert capsys.readouterr().out.count("RankAwareOptimizer(AdamW)") == 1
    assert "rank_multiplier/A/r4" in ours.state.log_history[0]
    assert isinstance(ours.optimizer.optimizer, RankAwareOptimizer)
    assert str(ours.optimizer.report()) == str(ours.optimizer.optimizer.report())
    if kind == "Reward":
        rows = {row.role: row.multiplier for row in ours.optimizer.report().rows}
        assert rows["A"] == rows["B"] != rows["other"] == 1.0
        return
    model = llama()
    hand = MAKERS[kind](model, tmp_path / "hand", **by_hand(model))
    hand.train()
    assert same(weights(ours), weights(hand))


def test_the_readmes_line_moves_a_trainers_rates(tmp_path, capsys):
    """The README's block trains a Trainer at ranks 4 and 8 with rates moved from rank 16."""
    trainer = plain(llama(), tmp_path)
    exec(readme_blocks()[1], {"ra": ra, "torch": torch, "trainer": trainer})
    assert trainer.state.global_step == 2
    assert {
        row.rank for row in trainer.optimizer.report().rows if row.multiplier != 1.0
    } == {4, 8}


# --- the number of convert ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "is_enough"),
    [
        ({}, True),
        ({"rank_pattern": {"v_proj": 8}}, False),
        ({"alpha_pattern": {"v_proj": 8}}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
    ids=["one rank", "two ranks", "two alphas", "a head"],
)
def test_the_number_of_convert_is_enough_at_one_rank(tmp_path, more, is_enough):
    """A plain run at the number of convert ends at the weights of attach where all adapters are of one rank and alpha
    and nothing else trains, and at others elsewhere."""
    config, layers = llama_config(), ["q_proj", "v_proj"]
    to = ra.Reference(rank=4, alpha=4, fan_in=config.hidden_size)
    number = ra.convert_lr(LR, from_=AT_16, to=to).lr
    ends = []
    for lr in (LR, number):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers, **more)
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
        args = arguments(tmp_path, learning_rate=lr, weight_decay=0.5)
        trainer = transformers.Trainer(model, args, train_dataset=tokens())
        if lr == LR:
            attach(trainer, AdamW, tuned_at=AT_16)
        trainer.train()
        ends.append(weights(trainer))
    close = [torch.allclose(ends[0][name], ends[1][name]) for name in ends[0]]
    assert all(close) is is_enough


# --- the arguments reach it -----------------------------------------------------------------------------------------


def with_norms_and_biases(kept=("input_layernorm",)):
    """One rank throughout, and beside the pairs trainable norms and biases."""
    torch.manual_seed(0)
    config = llama_config(attention_bias=True)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q_proj"],
        bias="lora_only",
        modules_to_save=list(kept),
    )
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


SET = {"weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-3}


def run_with(folder, prepare=None, optim="adamw_torch", **own):
    args = arguments(folder, optim=optim, **{**SET, **own})
    model = with_norms_and_biases()
    trainer = transformers.Trainer(model, args, train_dataset=tokens())
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("prepare", "optim"),
    [
        (lambda trainer: attach(trainer, AdamW), "adamw_torch"),
        (lambda trainer: attach(trainer), "adamw_torch_fused"),
        (lambda trainer: attach(trainer, lr=LR), "adafactor"),
    ],
    ids=["class", "own-choice-fused", "own-choice-adafactor"],
)
def test_the_arguments_reach_the_optimizer(tmp_path, prepare, optim):
    """A uniform model trains as under Trainer's own optimizer, bit for bit: decay, who is spared it, betas, epsilon."""
    ours, own = run_with(tmp_path, prepare, optim), run_with(tmp_path, optim=optim)
    assert same(weights(ours), weights(own))
    decays = {
        (g["weight_decay"], any("norm" in n for n in g["param_names"]))
        for g in ours.optimizer.param_groups
    }
    assert decays == {(0.5, False), (0.0, True)}


def test_what_is_given_holds_over_the_arguments(tmp_path):
    """A rate, decay and betas given to attach hold; what is left unset in the arguments leaves the class its own."""
    trainer = run_with(
        tmp_path,
        lambda trainer: attach(
            trainer, AdamW, lr=1e-3, betas=(0.1, 0.2), weight_decay=0.25
        ),
    )
    defaults = trainer.optimizer.optimizer.defaults
    assert (defaults["lr"], defaults["betas"], defaults["weight_decay"]) == (
        1e-3,
        (0.1, 0.2),
        0.25,
    )
    unset = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    trainer = run_with(
        tmp_path, lambda trainer: attach(trainer, "torch_optimizer:Yogi"), **unset
    )
    assert trainer.optimizer.optimizer.defaults["eps"] == 1e-3


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (
            lambda trainer: attach(object(), AdamW, lr=LR),
            "not a Trainer of transformers",
        ),
        (
            lambda trainer: attach(trainer, AdamW),
            "attach was given no rate.*than its default, 5e-05",
        ),
        (
            lambda trainer: attach(trainer, AdamW, lr=LR, model=trainer.model),
            "given model=, but uses that of",
        ),
        (
            lambda trainer: [attach(trainer, AdamW, lr=LR) for _ in range(2)],
            "already has an optimizer",
        ),
        (
            lambda trainer: [trainer.create_optimizer(), attach(trainer, AdamW, lr=LR)],
            "already has an optimizer",
        ),
        (lambda trainer: attach(trainer, "adamwx", lr=LR), "Unknown optimizer"),
    ],
)
def test_a_trainer_that_cannot_be_attached_to_is_refused(tmp_path, prepare, sentence):
    """No trainer, no rate that anyone set, an optimizer that is there, an unknown class: a sentence each."""
    trainer = transformers.Trainer(
        llama(), transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    )
    with pytest.raises(OptimizerError, match=sentence):
        prepare(trainer)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [("SFT", 2e-5), ("DPO", 1e-6), ("KTO", 1e-6), ("GRPO", 1e-6), ("RLOO", 1e-6)],
)
def test_trls_default_rate_is_not_taken_for_a_tuned_one(tmp_path, kind, rate):
    """The rate at which a trainer of TRL trains if nobody sets one, for LoRA too, is refused with its value."""
    trainer = MAKERS[kind](llama(), tmp_path)
    defaults = type(trainer.args)(str(tmp_path), use_cpu=True)
    assert defaults.learning_rate == rate
    trainer.args.learning_rate = rate
    with pytest.raises(OptimizerError, match=f"value than its default, {rate:g}, or"):
        attach(trainer, AdamW)


@pytest.mark.filterwarnings("ignore:Recipe .* extrapolates")
@pytest.mark.parametrize("lr", [2e-4, RECIPE], ids=["lr", "recipe"])
def test_the_base_rate_is_written_into_the_arguments(tmp_path, lr):
    """The arguments, which are saved with the run, hold the rate that trained, of lr= or of a recipe."""
    given = {"lr": lr} if isinstance(lr, float) else {"recipe": lr, "other_lr": 1e-3}
    trainer = run_with(
        tmp_path, lambda trainer: attach(trainer, AdamW, **given), learning_rate=5e-4
    )
    assert trainer.args.learning_rate == trainer.optimizer.optimizer.defaults["lr"]
    assert trainer.args.learning_rate != 5e-4


def test_a_default_rate_counts_as_given_with_tuned_at(tmp_path):
    """A learning_rate equal to the trainer's default is taken where tuned_at= says what it was tuned at."""
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = transformers.Trainer(llama(), args)
    attach(trainer, AdamW, tuned_at="r=16,alpha=32")
    assert trainer.create_optimizer().defaults["lr"] == args.learning_rate == 5e-5


def test_a_search_trains_each_trial_at_its_own_rate(tmp_path):
    """Where the rate came from the arguments, a search's trial at their default trains at it too."""
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((args.learning_rate, kwargs["optimizer"].param_groups[0]["lr"]))

    data = {"train_dataset": tokens(), "eval_dataset": tokens()}
    args = arguments(
        tmp_path, learning_rate=1e-4, lr_scheduler_type="constant", max_steps=1
    )
    trainer = transformers.Trainer(
        model_init=llama, args=args, callbacks=[Look()], **data
    )
    attach(trainer, AdamW)
    rates = [2e-5, 5e-5, 1e-4]
    trainer.hyperparameter_search(
        lambda trial: {
            "learning_rate": trial.suggest_categorical("learning_rate", rates)
        },
        backend="optuna",
        n_trials=3,
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}),
    )
    assert sorted(seen) == [(rate, rate) for rate in rates]


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_a_plain_runs_scheduler_of_other_groups_is_refused(tmp_path, schedule):
    """A plain run's checkpoint is not resumed where its scheduler has rates for fewer groups than the optimizer."""
    own = {
        "lr_scheduler_type": schedule,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "max_steps": STEPS,
    }
    data = {"train_dataset": tokens(), "eval_dataset": tokens()}
    transformers.Trainer(llama(), arguments(tmp_path, **own), **data).train()
    trainer = transformers.Trainer(llama(), arguments(tmp_path, **own), **data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ra.RankAwareWarning)
        attach(trainer, tuned_at=AT_16)
        with pytest.raises(
            ra.CheckpointError,
            match="scheduler has rates for 2 groups, and this optimizer has 4",
        ):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_plain_runs_checkpoint_is_resumed(tmp_path):
    """What Trainer saved before attach is loaded by it after, biases and no decay included."""
    first = transformers.Trainer(
        with_norms_and_biases(()), saving(tmp_path), train_dataset=tokens()
    )
    first.train()
    again = transformers.Trainer(
        with_norms_and_biases(()), saving(tmp_path), train_dataset=tokens()
    )
    attach(again, AdamW, lr=LR)
    opt = again.create_optimizer()
    state = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    with pytest.warns(ra.RankAwareWarning, match="opt.expand"):
        opt.load_state_dict(state)
    old = {
        n: first.optimizer.state[p]["exp_avg"]
        for n, p in first.model.named_parameters()
        if p.requires_grad
    }
    new = {
        n: opt.state[p]["exp_avg"]
        for n, p in again.model.named_parameters()
        if p.requires_grad
    }
    assert same(old, new)


def saving(folder):
    return arguments(
        folder, max_steps=1, save_strategy="steps", save_steps=1, weight_decay=0.0
    )


def test_an_attached_trainer_can_be_sent_to_another_process(tmp_path):
    """Ray's search sends the trainer by cloudpickle: the copy trains as the original, on its own model."""
    cloudpickle = pytest.importorskip("cloudpickle")
    GradientState._reset_state()  # after another training in this process it holds weak references
    trainer = plain(llama(), tmp_path)
    attach(trainer, AdamW, lr=LR, tuned_at=AT_16)
    copied = cloudpickle.loads(cloudpickle.dumps(trainer))
    assert copied.optimizer_cls_and_kwargs[0]._trainer() is copied
    copied.train()
    trainer.train()
    assert same(weights(copied), weights(trainer))


ZERO = """
import torch, transformers, peft, warnings
import rankaware_optim as ra
from rankaware_optim.integrations import attach
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
    """Under ZeRO the attached optimizer is found inside DeepSpeed's: no warning, and the wrapper has its report."""
    pytest.importorskip("deepspeed")
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29763",
    }
    environment = {**os.environ, **alone, **on_cpu()}
    done = subprocess.run(
        [sys.executable, "-c", ZERO],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "AT THE END ['A', 'B']" in done.stdout, done.stderr[-2000:]


class OfItsOwn(transformers.Trainer):
    """A trainer that makes its optimizer by itself, as Unsloth's does on a GPU where embeddings have a rate."""

    def create_optimizer(self, model=None):
        self.optimizer = AdamW(self.model.parameters())
        return self.optimizer


@pytest.mark.parametrize(
    ("rate", "cure"),
    [(None, "create_optimizer of a subclass"), (1e-5, r"'\*modules_to_save\*': 1e-05")],
)
def test_a_trainer_that_makes_another_optimizer_is_refused(tmp_path, rate, cure):
    """Where the trainer leaves what was attached aside, training raises before any weight has moved, with the cure."""
    args = arguments(tmp_path, max_steps=1)
    args.embedding_learning_rate = rate
    trainer = OfItsOwn(llama(), args, train_dataset=tokens())
    attach(trainer, AdamW, lr=LR)
    start = weights(trainer)
    with pytest.raises(OptimizerError, match=f"has made its own AdamW .*{cure}"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same(start, weights(trainer))


@pytest.mark.filterwarnings("ignore:Recipe .* extrapolates")
@pytest.mark.parametrize(
    ("given", "is_used"),
    [
        ({}, True),
        ({"tuned_at": AT_16}, True),
        ({"lr": None}, True),
        ({"lr": LR}, False),
        ({"recipe": RECIPE, "other_lr": 1e-3}, False),
    ],
    ids=["nothing", "tuned_at", "None", "lr", "recipe"],
)
def test_the_rate_of_optimizer_cls_and_kwargs_is_used(tmp_path, given, is_used):
    """Without lr= and recipe=, a rate in optimizer_cls_and_kwargs= is the one that is moved, as Trainer trains at it."""
    trainer = plain(
        llama(), tmp_path, optimizer_cls_and_kwargs=(AdamW, {"lr": 3e-3, "eps": 1e-4})
    )
    assert trainer.args.learning_rate != 3e-3
    attach(trainer, **given)
    defaults = trainer.create_optimizer().defaults
    assert defaults["eps"] == 1e-4
    assert (defaults["lr"] == 3e-3) is is_used


def test_groups_that_a_trainer_hands_over_keep_their_own_rates(tmp_path):
    """A factory called with groups splits them; a rate of a group's own is kept, the trainer's base rate is ours."""
    model = llama()
    trainer = transformers.Trainer(
        model, arguments(tmp_path, learning_rate=5e-3), train_dataset=tokens()
    )
    attach(trainer, AdamW, lr=LR, tuned_at=AT_16)
    first, *rest = (p for p in model.parameters() if p.requires_grad)
    opt = trainer.optimizer_cls_and_kwargs[0](
        [{"params": [first], "lr": 1e-4}, {"params": rest, "lr": 5e-3}]
    )
    assert {(group["user_group"], group["lr"]) for group in opt.param_groups} == {
        (0, 1e-4),
        (1, LR),
    }


def test_an_eight_bit_optimizer_keeps_embeddings_in_32_bits(tmp_path):
    """bitsandbytes' AdamW8bit holds an embedding's moments in float32, a large factor's in 8 bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = transformers.LlamaForCausalLM(llama_config(hidden_size=256, vocab_size=64))
    lora = peft.LoraConfig(
        r=32, lora_alpha=32, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    model = peft.get_peft_model(model, lora)
    trainer = transformers.Trainer(model, arguments(tmp_path))
    attach(trainer, bitsandbytes.optim.AdamW8bit, lr=LR, tuned_at=AT_16)
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
