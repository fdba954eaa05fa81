"""Tests that a calibration leaves an existing trainer as new: its run then equals that of a fresh
one exactly.

Each row of the table is a trap: something that trials might leave behind or do differently from the
run.
"""

from __future__ import annotations

import logging
import random
import signal

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import rankaware_optim as ra
from rankaware_optim import CalibrationError, CalibrationInterrupted, OptimizerError
from rankaware_optim.trainers._lightning import _divided
from rankaware_optim.trainers._transformers import _hold_out

from ...helpers.examples import readme_blocks
from ...helpers.models import mlp, same
from .trainers import (
    QUIET,
    AdamW,
    arguments,
    datasets,
    different_words,
    lightning,
    llama,
    loss_of,
    peft,
    press_ctrl_c,
    prompts,
    random_states,
    sayings,
    tokenizer,
    transformers,
    trl,
    weights,
)

pytestmark = QUIET
WHOLE, TRIAL = 24, 6  # steps of the run, and of a trial
SHORT = {"steps": TRIAL, "progress": False}
TWO = {**SHORT, "trials": 2}


def logs_of(trainer) -> list[dict[str, float]]:
    """Return everything that a trainer has logged, without the times."""
    timed = ("runtime", "per_second", "step_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]


class Watch(transformers.TrainerCallback):
    """A tracker of the user, which records the events of a run."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(("begin", args.max_steps, args.output_dir))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(("log", state.global_step))

    def on_evaluate(self, *args, **kwargs):
        self.seen.append("evaluate")


def trainer(folder, *, kind=None, model=None, data=None, callbacks=(), **own):
    """Return a Trainer as a user builds it, with dropout, a warm-up, a cosine and a tracker."""
    made = llama(lora_dropout=0.1) if model is None else model()
    usual = {"max_steps": WHOLE, "save_strategy": "no", "warmup_steps": 8}
    args = arguments(folder, **{**usual, **own})
    train = sayings() if data is None else data()
    more = {"callbacks": [Watch(), *callbacks], "eval_dataset": sayings(8)}
    return (kind or transformers.Trainer)(made, args, train_dataset=train, **more)


# --- traps ----------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """A stream that starts again at every iteration."""

    def __iter__(self):
        yield from sayings().to_list()


class Drawn(torch.utils.data.Dataset):
    """A data set that draws its rows with a generator of its own."""

    def __init__(self):
        self.source, self.rows = torch.Generator().manual_seed(2), sayings().to_list()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[torch.randint(len(self.rows), (), generator=self.source)]


def part_of_drawn():
    parts = [torch.utils.data.Subset(Drawn(), range(n)) for n in (16, 32)]
    return torch.utils.data.ConcatDataset(parts)


class Normed(torch.nn.Module):
    """A classifier with batch norm, whose buffers change while it trains. It has no adapters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 8)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.head(self.norm(input_ids.float()))
        return {"loss": (logits - labels / 32).square().mean()}


def saved_modules():
    more = {"use_dora": True, "modules_to_save": ["lm_head"], "lora_dropout": 0.1}
    return llama(**more)


def early(folder, **own):
    stop = transformers.EarlyStoppingCallback(1)
    best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    saves = {"save_strategy": "steps", "save_steps": 4, **best}
    return trainer(folder, callbacks=[stop], **{**saves, **own})


def sft(folder, packing=False):
    text = datasets.Dataset.from_dict({"text": ["w2 w3 w4 w5", "w6 w7"] * 32})
    args = {"max_length": 8, "packing": packing, "bf16": False, "max_steps": WHOLE}
    return trl.SFTTrainer(
        llama(lora_dropout=0.1),
        arguments(folder, trl.SFTConfig, save_strategy="no", **args),
        train_dataset=text,
        processing_class=tokenizer(),
        callbacks=[Watch()],
    )


def seq2seq(folder):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config)
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q", "v"])
    args = {"max_steps": WHOLE, "save_strategy": "no", "predict_with_generate": True}
    return transformers.Seq2SeqTrainer(
        peft.get_peft_model(model, lora),
        arguments(folder, transformers.Seq2SeqTrainingArguments, **args),
        train_dataset=sayings(),
        eval_dataset=sayings(8),
        callbacks=[Watch()],
    )


def grpo(folder, reward=different_words):
    online = {"num_generations": 2, "max_completion_length": 4, "num_iterations": 2}
    args = {"max_steps": WHOLE, "save_strategy": "no", "bf16": False, "beta": 0.1}
    return trl.GRPOTrainer(
        llama(),
        reward,
        args=arguments(folder, trl.GRPOConfig, **online, **args),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        callbacks=[Watch()],
    )


def of(build=trainer, **own):
    return lambda folder: build(folder, **own)


TRAPS = {
    "dropout, warm-up and cosine": of(),
    "accumulation": of(gradient_accumulation_steps=2, max_grad_norm=0.1),
    "bf16": of(bf16=True),
    "gradient checkpointing": of(gradient_checkpointing=True),
    "epochs": of(max_steps=-1, num_train_epochs=0.75, per_device_train_batch_size=2),
    "a data seed": of(data_seed=7),
    "loader workers": of(dataloader_num_workers=1, data=Drawn),
    "DoRA with modules_to_save": of(model=saved_modules),
    "early stopping and the best model": early,
    "a stream": of(data=Stream),
    "a data set's own generator": of(data=Drawn),
    "a generator deep in the data": of(data=part_of_drawn),
    "batch norm, in full": of(model=Normed),
    "a compiled model": of(torch_compile=True, torch_compile_backend="aot_eager"),
    "NEFTune": of(neftune_noise_alpha=5.0),
    "a schedule with its own steps": of(
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 8},
    ),
    "evaluation at the start": of(eval_strategy="steps", eval_on_start=True),
    "Seq2Seq": seq2seq,
    "SFT": sft,
    "SFT with packing": of(sft, packing=True),
    "GRPO": grpo,
}


@pytest.mark.filterwarnings("ignore:.*num_workers.*")
@pytest.mark.parametrize("build", TRAPS.values(), ids=TRAPS)
def test_the_real_run_is_that_of_a_fresh_trainer(tmp_path, build):
    """A calibrated trainer ends with the same weights and logs as a fresh one, and its tracker sees
    the same run.
    """
    runs = []
    for calibrated in (True, False):
        made = build(tmp_path)
        if calibrated:
            before = random_states()
            recipe = ra.calibrate(made, "adamw", **TWO)
            assert random_states() == before
        report = ra.attach(made, "adamw", recipe=recipe)
        made.train()
        runs.append((made, report))
    (ours, _), (fresh, _) = runs
    assert same(weights(ours), weights(fresh))
    assert logs_of(ours) == logs_of(fresh)
    watches = [watch_of(made).seen for made, _ in runs]
    assert watches[0] == watches[1]
    assert watches[0][0][0] == "begin"
    assert same(dict(ours.model.named_buffers()), dict(fresh.model.named_buffers()))
    assert recipe.steps == ours.state.max_steps


def watch_of(made):
    return next(c for c in made.callback_handler.callbacks if isinstance(c, Watch))


def test_a_warm_up_in_steps_is_scaled_with_the_trial(tmp_path):
    """A warm-up over a third of the run takes a third of every trial, and a trial ends near
    learning rate zero.
    """
    made, rates = trainer(tmp_path), []
    hook = register_optimizer_step_pre_hook(
        lambda opt, *_: rates.append(opt.param_groups[0]["lr"])
    )
    ra.calibrate(made, "adamw", trials=1, **SHORT)
    hook.remove()
    assert [rate / max(rates) for rate in rates[:3]] == pytest.approx([0.0, 0.5, 1.0])
    assert rates[-1] < max(rates) / 2
    assert made.args.warmup_steps == 8


def test_a_decay_in_steps_is_scaled_with_the_trial(tmp_path):
    """A decay over a third of the run, set in lr_scheduler_kwargs, takes a third of every trial."""
    decay = {"lr_scheduler_kwargs": {"num_decay_steps": 8}}
    made = trainer(tmp_path, lr_scheduler_type="warmup_stable_decay", **decay)
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda opt, *_: rates.append(opt.param_groups[0]["lr"])
    )
    ra.calibrate(made, "adamw", trials=1, **SHORT)
    hook.remove()
    assert [rate / max(rates) for rate in rates[1:5]] == pytest.approx([0.5, 1, 1, 1])
    assert rates[5] < max(rates)
    assert made.args.lr_scheduler_kwargs == {"num_decay_steps": 8}


def test_the_price_is_said_before_the_first_trial(tmp_path, capfd):
    """The steps, the evaluation and the copy of the weights are announced first.

    Then every trial prints a line.
    """
    ra.calibrate(trainer(tmp_path), "adamw", steps=TRIAL, trials=2)
    steps, beside, *trials = capfd.readouterr().err.splitlines()[:4]
    assert steps.startswith(
        "calibrate: 2 trials of 6 steps (the run has 24), at most 12 steps in all"
    )
    assert beside.startswith(
        "In addition to these steps: 2 × 16 batches of evaluation; a copy"
    )
    assert [line[:9] for line in trials] == ["trial 1/2", "trial 2/2"]


def test_the_readmes_three_lines_train(tmp_path):
    """The last code block of the README calibrates, attaches and trains, here with short trials."""
    made = trainer(tmp_path)
    block = readme_blocks()[3].replace('"adamw")', f'"adamw", steps={TRIAL})')
    exec(block, names := {"ra": ra, "trainer": made})
    assert made.state.global_step == WHOLE
    assert made.args.learning_rate == names["recipe"].lr


def test_a_quarter_of_the_run_is_tried_four_times(tmp_path):
    """By default, a trial has a quarter of the run's steps."""
    made = trainer(tmp_path, max_steps=400, per_device_train_batch_size=1)
    steps = []
    made.training_step = lambda *_: steps.append(1) or torch.zeros(())
    with pytest.raises(CalibrationError, match="Nothing was trained"):
        ra.calibrate(made, "adamw", progress=False)
    assert len(steps) == 100


def test_short_trials_are_refused(tmp_path):
    """If a quarter of the run is shorter than 100 steps, an error names the steps= to pass, and no
    trial runs.
    """
    cure = r"only 50 of the 200 steps.*Pass steps=100, .* take 400 steps"
    with pytest.raises(CalibrationError, match=cure):
        ra.calibrate(trainer(tmp_path, max_steps=200), "adamw")


# --- a run that is resumed ------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_rate(tmp_path):
    """A script that loads its recipe file if it exists resumes an interrupted run exactly."""
    runs, saves = [], {"save_strategy": "steps", "save_steps": 12}
    path = tmp_path / "recipe.toml"
    for resumed in (None, str(tmp_path / "checkpoint-12")):
        made = trainer(tmp_path, **saves)
        if not path.exists():
            ra.calibrate(made, "adamw", **TWO).save(path)
        ra.attach(made, recipe=path)
        made.train(resume_from_checkpoint=resumed)
        runs.append((weights(made), logs_of(made)[:WHOLE]))
    whole, again = runs
    assert same(whole[0], again[0])
    assert whole[1] == again[1]


def test_a_search_reads_and_writes_no_file(tmp_path):
    """A calibration writes no file to the trainer's output folder, and ignores a recipe file in it."""
    ra.calibrate(trainer(tmp_path), "adamw", **TWO)
    assert not list(tmp_path.iterdir())
    (tmp_path / "recipe.toml").write_text("no recipe")
    ra.calibrate(trainer(tmp_path), "adamw", **TWO)


# --- the score of a trial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [sayings, Drawn, Stream, lambda: sayings().to_iterable_dataset()]
)
def test_held_out_rows_are_no_training_rows(tmp_path, data):
    """Some rows of a data set or a stream are held out, and the other rows train."""
    made = trainer(tmp_path, data=data, per_device_eval_batch_size=1)
    made.eval_dataset = None
    (part,) = _hold_out(made)
    count = len([*part])
    assert count == (6 if hasattr(part, "__len__") else 16)
    if data is not Drawn:
        assert count + len([*made.train_dataset]) == 64


def test_a_data_set_of_a_few_rows_is_not_split(tmp_path):
    """If a tenth of the data set is less than one row, none is held out, and a note says what
    scores the trials.
    """
    made = trainer(tmp_path, data=lambda: sayings(8))
    made.eval_dataset = None
    assert _hold_out(made) == []
    assert len(made.train_dataset) == 8
    recipe = ra.calibrate(made, "adamw", trials=1, **SHORT)
    assert any("training losses" in note for note in recipe.notes)


def test_an_evaluation_of_several_parts_is_the_score(tmp_path):
    """If the evaluation data are a dict of data sets, these share the 16 batches that score a trial."""
    made = trainer(tmp_path, per_device_eval_batch_size=1)
    made.eval_dataset = {"one": sayings(), "two": sayings()}
    assert sum(map(len, _hold_out(made))) == 16
    recipe = ra.calibrate(made, "adamw", trials=1, **SHORT)
    assert not any("training losses" in note for note in recipe.notes)


def test_an_evaluation_of_streams_is_the_score(tmp_path):
    """If the evaluation data are a dict of streams, the first rows of each stream score a trial."""
    made = trainer(tmp_path, per_device_eval_batch_size=1)
    made.eval_dataset = {"one": Stream(), "two": sayings().to_iterable_dataset()}
    assert [len([*part]) for part in _hold_out(made)] == [8, 8]
    recipe = ra.calibrate(made, "adamw", trials=1, **SHORT)
    assert not any("training losses" in note for note in recipe.notes)


def test_rewards_that_say_nothing_give_the_suggestion(tmp_path):
    """If all learning rates earn the same reward in GRPO, the recipe has the suggested one, and a
    note says so.
    """
    made = grpo(tmp_path, lambda completions, **_: [1.0] * len(completions))
    recipe = ra.calibrate(made, "adamw", **SHORT)
    suggested = ra.suggest_lr(made)
    assert suggested == ra.suggest_lr(made.model, task="rl", steps=WHOLE)
    assert recipe.lr == pytest.approx(suggested.lr)
    assert any("no larger than chance" in note for note in recipe.notes)
    assert "minus the reward" in recipe.notes[-1]
    assert recipe.score == "reward"


# --- interrupted calibrations ------------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def fail():
    raise Boom


@pytest.mark.parametrize(
    ("end", "error"), [(fail, Boom), (press_ctrl_c, CalibrationInterrupted)]
)
def test_an_error_and_ctrl_c_put_the_trainer_back(tmp_path, end, error):
    """After an error or Ctrl-C, the trainer, its arguments and its model are as before."""
    made = trainer(tmp_path, bf16=True)
    before, attributes = weights(made), dict(vars(made))
    inner, steps = made.compute_loss, []

    def compute_loss(*args, **kwargs):
        steps.append(1)
        if len(steps) == 10:
            end()
        return inner(*args, **kwargs)

    made.compute_loss = compute_loss
    with pytest.raises(error):
        ra.calibrate(made, "adamw", **SHORT)
    del made.compute_loss
    assert same(weights(made), before)
    assert vars(made) == attributes
    assert not list(tmp_path.iterdir())


# --- Lightning ------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """A module that configures no optimizer."""

    def __init__(self):
        super().__init__()
        self.net = mlp((4, 4), seed=0)
        self.drop = torch.nn.Dropout(0.1)
        self.stages, self.losses = [], []

    def training_step(self, batch, index):
        loss = loss_of(self.net, self.drop(batch[0]))
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", loss_of(self.net, batch[0]))

    def on_train_start(self):
        self.stages.append(self.trainer.estimated_stepping_batches)


class Scheduled(Module):
    """A module that configures its optimizer at self.lr, with a cosine over the run."""

    def __init__(self, lr=None):
        super().__init__()
        self.lr = lr

    def configure_optimizers(self):
        opt = AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        by_step = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": opt, "lr_scheduler": by_step}


class Manual(Scheduled):
    """A module that calls its optimizer's step itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        opt = self.optimizers()
        loss = super().training_step(batch, index)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.lr_schedulers().step()
        return loss


class Silent(Manual):
    """A module that calls its optimizer's step itself, and returns no loss."""

    def training_step(self, batch, index):
        super().training_step(batch, index)


class Hyper(Scheduled):
    """A module whose learning rate is one of its hyperparameters."""

    def __init__(self, learning_rate=1e-2):
        super(Scheduled, self).__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        return ra.RankAwareOptimizer(self, AdamW, lr=self.hparams.learning_rate)


class Plateau(Scheduled):
    """A module whose schedule depends on the validation loss."""

    def configure_optimizers(self):
        opt = AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
        return [opt], [{"scheduler": schedule, "monitor": "val_loss"}]


class Stops(Scheduled):
    """A module that configures early stopping."""

    def configure_callbacks(self):
        stopping = lightning.pytorch.callbacks.EarlyStopping
        return [stopping("val_loss", patience=1, min_delta=10.0)]


def loader(count=8, **own):
    source = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.randn(count * 8, 16, generator=source))
    return torch.utils.data.DataLoader(data, batch_size=8, num_workers=0, **own)


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)

    def val_dataloader(self):
        return loader(2)


def two_loaders():
    shuffled = {"shuffle": True, "generator": torch.Generator().manual_seed(4)}
    return loader(**shuffled), loader(2)


def short_epochs():
    """Return loaders whose epochs are shorter than a trial."""
    return loader(4, shuffle=True), loader(2)


class Flipped:
    """A collator that flips the sign of batches with a generator of its own."""

    def __init__(self):
        self.source = random.Random(7)

    def __call__(self, rows):
        sign = self.source.choice([-1.0, 1.0])
        return [sign * torch.stack([row[0] for row in rows])]


def drawing_loader():
    """Return a loader whose sampler and collator draw from generators of their own, and a validation loader."""
    data, source = loader().dataset, torch.Generator().manual_seed(8)
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 64, 64, generator=source)
    own = {"sampler": sampler, "collate_fn": Flipped()}
    return torch.utils.data.DataLoader(data, batch_size=8, **own), loader(2)


def accumulating():
    scheduler = lightning.pytorch.callbacks.GradientAccumulationScheduler
    return scheduler({0: 2, 2: 1})


def averaging():
    return lightning.pytorch.callbacks.StochasticWeightAveraging(1e-9)


def pair(folder, kind=Module, data=two_loaders, callbacks=list, **own):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    usual = {"accelerator": "cpu", "max_epochs": 3, "log_every_n_steps": 1}
    logger = lightning.pytorch.loggers.CSVLogger(folder)
    made = lightning.Trainer(
        **{**usual, **quiet, "logger": logger, "default_root_dir": folder, **own},
        callbacks=callbacks(),
    )
    torch.manual_seed(0)
    given = data()
    return made, kind(), *(given if isinstance(given, tuple) else (given,))


PAIRS = {
    "a module without an optimizer": (Module, two_loaders, {}),
    "the rate set after the restore (#21068)": (Scheduled, two_loaders, {}),
    "a rate among the hyperparameters": (Hyper, two_loaders, {}),
    "a datamodule": (Scheduled, Data, {}),
    "the schedule of the real run (#14113)": (
        Scheduled,
        two_loaders,
        {"max_steps": WHOLE, "max_epochs": -1},
    ),
    "early stopping (#1685)": (Stops, two_loaders, {}),
    "accumulation": (Scheduled, two_loaders, {"accumulate_grad_batches": 2}),
    "accumulation by a schedule": (Hyper, two_loaders, {"callbacks": accumulating}),
    "averaged weights": (Hyper, two_loaders, {"callbacks": averaging}),
    "a rate that waits for a plateau": (Plateau, short_epochs, {}),
    "a generator deep in the data": (Scheduled, drawing_loader, {}),
    "no validation data": (Scheduled, lambda: loader(shuffle=True), {}),
    "a sampler of the user's own": (Scheduled, lambda: drawing_loader()[0], {}),
    "too few rows to hold some out": (
        Scheduled,
        lambda: loader(1),
        {"max_epochs": WHOLE},
    ),
    "steps that the module makes itself": (Manual, lambda: loader(shuffle=True), {}),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize(("kind", "data", "own"), PAIRS.values(), ids=PAIRS)
def test_the_real_fit_is_that_of_a_fresh_pair(tmp_path, kind, data, own):
    """A calibrated module and trainer end with the same weights, losses and steps as fresh ones."""
    fits = []
    for calibrated in (True, False):
        made = pair(tmp_path, kind, data, **own)
        if calibrated:
            state = random_states()
            recipe = ra.calibrate(made, "adamw", **TWO)
            assert random_states() == state
            assert made[1].stages == made[1].losses == []
            assert recipe.lr > 0  # and not None (#10557)
        report = ra.attach(made, "adamw", recipe=recipe)
        made[0].fit(made[1], *made[2:])
        assert made[0].optimizers[0].param_groups[0]["lr"] <= recipe.lr * 1.0001
        assert "rank" in str(report)
        fits.append(made)
    ours, fresh = (module for _, module, *_ in fits)
    assert same(ours.state_dict(), fresh.state_dict())
    assert ours.losses == fresh.losses
    assert ours.stages == fresh.stages == [recipe.steps]
    assert fits[0][0].global_step == fits[1][0].global_step


def test_the_rest_of_a_loader_keeps_its_settings():
    """If a part of a DataLoader is held out, both parts have the batch size and functions of the whole loader."""
    own = {"drop_last": True, "collate_fn": Flipped(), "shuffle": True}
    whole = loader(**own)
    for each in _divided(whole):
        assert (each.batch_size, each.collate_fn) == (8, whole.collate_fn)
        assert each.num_workers == whole.num_workers
    part, rest = _divided(whole)
    assert (part.drop_last, rest.drop_last) == (False, True)
    assert len(part.dataset) + len(rest.dataset) == len(whole.dataset)


def test_trials_accumulate_as_the_run(tmp_path):
    """A trial's step accumulates as many batches as GradientAccumulationScheduler sets.

    Two more batches validate.
    """
    made = pair(tmp_path, callbacks=accumulating)
    batches = []
    made[1].net.register_forward_hook(lambda *_: batches.append(1))
    ra.calibrate(made, "adamw", trials=1, **SHORT)
    assert len(batches) == 2 * TRIAL + 2


def test_trials_of_lightning_say_and_leave_nothing(tmp_path, caplog):
    """Trials show no message of Lightning (#12817), and write no log, no checkpoint and no other file."""
    made = pair(tmp_path, Scheduled)
    level = logging.getLogger("lightning.pytorch").level
    caplog.clear()
    ra.calibrate(made, "adamw", **SHORT)
    assert not [r for r in caplog.records if r.name.startswith("lightning")]
    assert not list(tmp_path.iterdir())
    assert made[1].lr is None
    assert logging.getLogger("lightning.pytorch").level == level


@pytest.mark.parametrize(
    ("end", "error"), [(fail, Boom), (press_ctrl_c, CalibrationInterrupted)]
)
def test_an_error_and_ctrl_c_put_lightning_back(tmp_path, end, error):
    """After an error or Ctrl-C, the module, its trainer and the handler of Ctrl-C are as before."""
    made = pair(tmp_path, Scheduled)
    module = made[1]
    before, inner = module.state_dict(), module.net.forward
    before = {name: value.clone() for name, value in before.items()}
    calls = []

    def forward(x):
        calls.append(1)
        if len(calls) == 9:
            end()
        return inner(x)

    module.net.forward = forward
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        ra.calibrate(made, "adamw", **SHORT)
    del module.net.forward
    assert same(module.state_dict(), before)
    assert module.lr is None
    assert module._trainer is None
    assert signal.getsignal(signal.SIGINT) is handler


# --- errors ------------------------------------------------------------------------------------------------


class NoRate(Module):
    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-3)


class Two(Scheduled):
    def configure_optimizers(self):
        return [AdamW([p], lr=self.lr) for p in list(self.parameters())[:2]]


class Elsewhere(Scheduled):
    def configure_optimizers(self):
        own = {"lr": self.lr, "tuned_at": "r=64,alpha=64"}
        return ra.RankAwareOptimizer(self, AdamW, **own)


def attached(made):
    ra.attach(made, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
    return made


def with_iterator(folder):
    made = trainer(folder)
    made.train_dataset = iter([])
    return made


def flagged(folder):
    made = trainer(folder)
    made.is_deepspeed_enabled = True
    return made


def pair_of_fsdp(folder):
    made = pair(folder)
    strategy = made[0].strategy
    strategy.__class__ = type("FSDPStrategy", (type(strategy),), {})
    return made


def adalora(folder):
    torch.manual_seed(0)
    base = llama().unload()
    config = peft.AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=WHOLE)
    return trainer(folder, model=lambda: peft.get_peft_model(base, config))


BAD = [
    (lambda f: attached(trainer(f)), {}, "already has an optimizer"),
    (with_iterator, {}, "an iterator that can be read only once"),
    (of(pair, strategy="ddp_spawn", devices=2), {}, "would start 2 processes"),
    (pair_of_fsdp, {}, "FSDP or DeepSpeed shards it"),
    (flagged, {}, "shards it"),
    (adalora, {}, "AdaLoRA"),
    (trainer, {"ranks": (4, 8)}, "ranks= .* cannot be used with an existing model"),
    (trainer, {"steps": 120}, "target_steps=24 is less than steps=120"),
    (trainer, {"steps": 0}, "steps=0 is not"),
    (trainer, {"trials": 0}, "trials=0 is not"),
    (trainer, {"settings": [1]}, r"settings=\[1\].*a dict"),
    (
        trainer,
        {"model": torch.nn.Linear(1, 1)},
        "with a trainer, a Trainer, and with model=",
    ),
    (of(pair, max_epochs=-1), {}, "number of training steps is unknown"),
    (of(pair, kind=NoRate), {}, "has no attribute lr or learning_rate"),
    (of(pair, kind=Two), {}, "exactly one AdamW"),
    (of(pair, kind=Silent), {}, "training_step of Silent returned no loss"),
    (of(pair, kind=Elsewhere), {}, "does not train at the learning rates of the trial"),
    (of(warmup_steps=WHOLE), {}, "warm-up is as long as the trial"),
    (
        of(pair, kind=Scheduled),
        {"settings": {"weight_decay": 1.0}},
        "in configure_optimizers",
    ),
]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(("build", "options", "message"), BAD)
def test_what_cannot_be_calibrated_is_refused(tmp_path, build, options, message):
    """Each case raises an error that names the cause and what to do."""
    given = {**SHORT, **options}
    with pytest.raises((CalibrationError, OptimizerError), match=message):
        ra.calibrate(build(tmp_path), "adamw", **given)
