"""This module attaches an optimizer to a Lightning trainer, and runs the trials of a
calibration with such a trainer.

Importing this module does not import Lightning.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import ClassVar

import torch
from torch import distributed as dist
from torch.optim import Optimizer
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from ..errors import CalibrationError, OptimizerError
from ..optimizer import RankAwareOptimizer, Report
from ..recipe import constructor_settings
from ._data import held_out
from ._trainer import (
    BATCHES,
    External,
    OwnRate,
    Settings,
    Touched,
    Trainer,
    TrialRun,
)

_PACKAGES = ("lightning", "pytorch_lightning")
# The attributes in which Lightning's learning-rate finder looks for the learning rate.
_RATES = ("lr", "learning_rate")
# A loader with another sampler is not split, because the sampler's numbers of rows would
# not fit the parts.
_SAMPLERS = (RandomSampler, SequentialSampler)
# The arguments with which a DataLoader is built again for each part of its data set.
_LOADER = ("batch_size", "num_workers", "collate_fn", "worker_init_fn", "generator")


class LightningTrainer(Trainer):
    """A Lightning trainer together with the Lightning module and the data that it
    trains.

    The user passes a tuple `(trainer, module, *data)`, where `data` are the data
    arguments of `trainer.fit`. Trials of a calibration run on copies of the trainer.
    """

    def __init__(self, trainer: External) -> None:
        self.trainer, self.model, *self.data = trainer
        kind: External = type(self.model)
        self.source = kind.training_step
        rows = getattr(self.data[0], "batch_size", None) if self.data else None
        if isinstance(rows, int):
            batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
            self.batch = rows * batches

    @staticmethod
    def is_one(value: object) -> bool:
        if not isinstance(value, tuple) or len(value) < 2:
            return False
        return hasattr(value[0], "fit_loop")

    def steps(self) -> int:
        """Return the number of optimizer steps of the run.

        Lightning can only count the steps of a run inside `fit`. Therefore this method
        calls `fit` on a copy of the trainer, and stops the copy before the first step.
        """
        trainer = self._copy()
        module: External = self.model
        steps = math.inf

        # Lightning calls configure_optimizers once the data is set up. The exception is the
        # only way to leave `fit` at this moment, and it also carries the result.
        def plan() -> None:
            raise _Planned(module.trainer.estimated_stepping_batches)

        _leave_out(trainer, module)
        module.configure_optimizers = plan
        try:
            with _quiet(trainer):
                trainer.fit(module, *self.data)
        except _Planned as planned:
            (steps,) = planned.args
        if not 0 < steps < math.inf:
            raise CalibrationError(
                "The number of training steps is unknown, because the trainer has no max_steps and"
                " the data has no length.",
                "Set Trainer(max_steps=...), or pass steps= and target_steps= to calibrate().",
            )
        return int(steps)

    def known_steps(self) -> int | None:
        """Return the number of optimizer steps of the trainer's run without starting
        the run.

        The method computes the number of steps from the trainer's limits on steps and
        epochs, and from the length of the data. The result is None if the trainer has
        no limit on its steps and the length of the data is unknown.
        """
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        epochs = trainer.max_epochs
        with suppress(TypeError, IndexError):  # a stream, or a datamodule
            batches = len(self.data[0])
            limit = trainer.limit_train_batches
            # an int is a number of batches, a float is a fraction of all batches
            limited = min(batches, limit) if isinstance(limit, int) else batches * limit
            # Lightning also makes a step after the last batch of an epoch
            each = math.ceil(int(limited) / trainer.accumulate_grad_batches)
            if epochs is not None and epochs > 0:
                limits.append(each * epochs)
        return min(limits, default=None)

    def own_rate(self) -> OwnRate | None:
        # Lightning's functions look into the module, its hparams and its datamodule.
        parsing = _part_of(self.trainer, "utilities.parsing")
        for name in _RATES:
            if parsing.lightning_hasattr(self.model, name):
                lr = parsing.lightning_getattr(self.model, name)
                if isinstance(lr, (int, float)) and lr > 0:
                    return OwnRate(name, float(lr))
        return None

    # --- a real run -------------------------------------------------------------------------------

    def attach(
        self, optimizer: type[Optimizer] | str | None, settings: Settings
    ) -> Report:
        if not settings.keys() & {"lr", "recipe"}:
            raise OptimizerError(
                "attach() was called without a learning rate.",
                "Pass lr= together with tuned_at=, or pass recipe=. To get a first learning rate,"
                " call ra.suggest_lr((trainer, module)).",
            )
        module: External = self.model
        if "recipe" in settings:
            settings = {**settings["recipe"].settings, **settings}

        def build() -> RankAwareOptimizer:
            return RankAwareOptimizer(module, optimizer or "adamw", **settings)

        # Build the optimizer once now, so that errors and the report come before training. If the
        # module configures its optimizer itself, only the learning rate of `opt` is used.
        opt = build()
        if _has_own(module, "configure_optimizers"):
            _set_rate(self.trainer, module, float(opt.defaults["lr"]))
        else:
            module.configure_optimizers = build
        return opt.report()

    # --- a trial ----------------------------------------------------------------------------------

    def touched(self) -> Touched:
        # With strategy="ddp", Lightning starts the other processes inside `fit` by running
        # the whole script again, so each process would start another search.
        processes = self.trainer.world_size
        if processes > 1 and not (dist.is_available() and dist.is_initialized()):
            raise CalibrationError(
                f"Lightning would start {processes} processes in the first trial, and each process"
                " would run a separate search.",
                "Start the script with torchrun, and call torch.distributed.init_process_group()"
                " before calibrate().",
            )
        return Touched([self.model], [self.trainer.strategy], [*self.data, self.data])

    def for_trial(self, steps: int, whole: int) -> Trainer:
        return LightningTrainer((self._copy(), self.model, *self.data))

    def _copy(self) -> External:
        # A deep copy, because `fit` changes the trainer's loops and connectors. An object
        # in deepcopy's memo counts as copied already, so the copy shares it: loggers may
        # have open files, and the model must not exist twice.
        shared = (*self.trainer.callbacks, *self.trainer.loggers, self.model)
        return copy.deepcopy(self.trainer, {id(each): each for each in shared})

    def train(self, run: TrialRun) -> object:
        """Run a trial with Lightning's `trainer.fit`, without the user's loggers and
        most callbacks.
        """
        trainer, module = self.trainer, self.model
        _leave_out(trainer, module)
        _configure(trainer, module, run)
        loop = trainer.fit_loop
        # Only the number of steps ends a trial, even if it is longer than max_epochs.
        loop.epoch_loop.max_steps = run.trial.steps
        loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None
        reports = _reports(trainer, run)
        trainer.callbacks.append(reports)
        trained, part = self.data, None
        if run.score is None:
            trained, part = _hold_out(module, self.data)

        def held_out_loss() -> object:
            """Return the mean loss on the held-out batches, or None if this loss is unknown.

            If the module's `validation_step` returns no loss, this function returns the
            loss that the module logged, unless the module logged several losses.
            """
            if part is None:
                return None
            trainer.limit_val_batches = BATCHES
            trainer.validate(module, part, verbose=False)
            if reports.losses:
                return float(torch.stack(reports.losses).mean())
            logged = trainer.callback_metrics
            named = [name for name in logged if "loss" in name.lower()]
            return logged[named[0]] if len(named) == 1 else None

        # The optimizer lives as long as the trainer, so the score is computed here too.
        with _quiet(trainer), _interrupts_come_out():
            trainer.fit(module, *trained)
            return run.result(trainer, held_out_loss)


class _Planned(Exception):
    """This exception stops Lightning before the first training step, and contains the
    number of steps of the run.
    """


def _has_own(value: object, method: str) -> bool:
    """Return whether the user's module or datamodule overrides a method of Lightning."""
    # Lightning's base classes define every method, so hasattr would always be true.
    defined = getattr(type(value), method, None)
    if defined is None:
        return False
    return defined.__module__.partition(".")[0] not in _PACKAGES


def _part_of(trainer: External, name: str) -> External:
    """Import a Python module from the Lightning package in which a trainer's class is
    defined.

    The Lightning package is either `lightning.pytorch` or `pytorch_lightning`. Both
    packages have the same code, but an object of one package is not an instance of the
    classes of the other package.
    """
    package = type(trainer.fit_loop).__module__.partition(".loops")[0]
    return import_module(f"{package}.{name}" if name else package)


# --- a trial's values and score -------------------------------------------------------------------


def _reports(trainer: External, run: TrialRun) -> External:
    """Return a callback that reports the loss of every step to the trial.

    The callback stops the trainer when the trial ends.
    """
    # The base class is only known here, because it depends on the installed package.
    callbacks = _part_of(trainer, "callbacks")

    class Reports(callbacks.Callback):  # type: ignore[name-defined]
        # the sum of the losses of the batches since the last optimizer step
        loss: torch.Tensor | float = 0.0
        # The losses that validation_step returned. Each trial has a new class, so that a
        # class variable is not shared between trials.
        losses: ClassVar[list[torch.Tensor]] = []

        def on_train_start(self, trainer: External, module: External) -> None:
            # A trial runs no validation. ReduceLROnPlateau would miss its monitored metric
            # and raise an error.
            configs = trainer.strategy.lr_scheduler_configs
            configs[:] = [c for c in configs if not c.reduce_on_plateau]

        def on_train_batch_end(
            self, trainer: External, module: External, outputs: External, *_: object
        ) -> None:
            loss = _loss_in(outputs)
            if loss is None:
                raise CalibrationError(
                    f"The training_step of {type(module).__name__} returned no loss.",
                    "Return the loss from training_step, even if the module uses manual"
                    " optimization.",
                )
            self.loss = self.loss + loss.detach()
            # With gradient accumulation, several batches belong to one optimizer step.
            if trainer.global_step > run.steps_taken:
                trainer.should_stop = run.end_step(self.loss)
                self.loss = 0.0

        def on_validation_batch_end(
            self, trainer: External, module: External, outputs: External, *_: object
        ) -> None:
            loss = _loss_in(outputs)
            if loss is not None:
                self.losses.append(loss.detach().float().mean())

    return Reports()


def _leave_out(trainer: External, module: External) -> None:
    """Remove the loggers, the validation and most callbacks from a copy of the user's
    Lightning trainer.

    A callback that changes the gradient accumulation is not removed, because this
    callback determines the number of batches per optimizer step.
    """
    accumulates = _part_of(trainer, "callbacks").GradientAccumulationScheduler
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, accumulates)]
    module.configure_callbacks = list
    # Without any logger, a module that uses self.logger would raise an error.
    silent = _part_of(trainer, "loggers.logger").DummyLogger()
    trainer.loggers = [silent] if trainer.loggers else []
    trainer.limit_val_batches, trainer.val_check_interval = 0, 1.0


def _loss_in(outputs: External) -> torch.Tensor | None:
    """Return the loss from the output of `training_step` or `validation_step`.

    Return None if the output of the method contains no loss.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, torch.Tensor) else None


def _hold_out(
    module: External, data: Sequence[External]
) -> tuple[Sequence[External], External]:
    """Return the data arguments for Lightning's `trainer.fit`, and the held-out data on
    which a trial is scored.

    A trial is scored on the user's validation data. If the user passed no validation
    data, the function holds out a part of the training data. If no training data can be
    held out, the function returns None instead of held-out data.
    """
    if _has_own(module, "validation_step"):
        if len(data) > 1:
            return data, data[1]
        if data and _has_own(data[0], "val_dataloader"):
            return data, data[0]
    # With manual optimization training_step makes optimizer steps itself, so it cannot
    # compute the loss on held-out data.
    if data and module.automatic_optimization:
        part, rest = _divided(data[0])
        if part is not None:
            module.validation_step = module.training_step
        return [rest, *data[1:]], part
    return data, None


def _divided(loader: External) -> tuple[External, External]:
    """Split a data loader into a loader of held-out data, on which a trial is scored,
    and a loader of training data.

    If the data loader cannot be split, return None and the unchanged data loader. A
    data loader cannot be split if its data has too few rows, or if it has a custom
    class, sampler or batch sampler.
    """
    sampler = type(getattr(loader, "sampler", None))
    is_plain = type(loader) is DataLoader and sampler in _SAMPLERS
    if not is_plain or loader.batch_size is None:
        return None, loader
    parts = held_out(loader.dataset, BATCHES * loader.batch_size)
    if parts is None:
        return None, loader
    settings: Settings = {name: getattr(loader, name) for name in _LOADER}
    part = DataLoader(parts[0], **settings)
    settings["drop_last"] = loader.drop_last
    return part, DataLoader(parts[1], shuffle=sampler is RandomSampler, **settings)


# --- the module's optimizer -----------------------------------------------------------------------


def _configure(trainer: External, module: External, run: TrialRun) -> None:
    """Replace the method `configure_optimizers` of a Lightning module, so that the
    module trains with the trial's optimizer.

    If the user's module defines `configure_optimizers`, this method is still called,
    but the module's learning rate is the one of the trial.
    """
    configure = module.configure_optimizers
    module_class = type(module).__name__
    if not _has_own(module, "configure_optimizers"):
        module.configure_optimizers = lambda: run.trial.optimizer(
            module, **run.settings
        )
    elif run.settings:
        raise CalibrationError(
            f"settings={run.settings} cannot be used, because {module_class} builds its optimizer"
            " in configure_optimizers.",
            "Remove settings=, and set these values in configure_optimizers.",
        )
    elif run.existing:
        module.configure_optimizers = lambda: _at_trials_rate(
            trainer, module, configure, run
        )


def _set_rate(trainer: External, module: External, lr: float) -> None:
    """Set the learning rate that the method `configure_optimizers` of a Lightning
    module uses.

    The learning rate is the attribute `lr` or `learning_rate` of the module, of its
    `hparams` or of its datamodule. Lightning's learning-rate finder sets the same
    attribute.

    Raises:
        OptimizerError: the attribute is missing.
    """
    parsing = _part_of(trainer, "utilities.parsing")
    for name in _RATES:
        if parsing.lightning_hasattr(module, name):
            parsing.lightning_setattr(module, name, lr)
            return
    module_class = type(module).__name__
    raise OptimizerError(
        f"{module_class} builds its optimizer in configure_optimizers, but has no attribute lr or"
        " learning_rate with which the learning rate could be set.",
        "Store the learning rate in self.lr, and use self.lr in configure_optimizers. Or remove"
        " configure_optimizers.",
    )


def _at_trials_rate(
    trainer: External,
    module: External,
    configure: Callable[[], External],
    run: TrialRun,
) -> External:
    """Return the optimizers and schedulers that the Lightning module builds when its
    learning rate is the one of the trial.
    """

    def configured_at(lr: float) -> tuple[External, External]:
        _set_rate(trainer, module, lr)
        configured = configure()
        return configured, _only_optimizer(trainer, module, configured, run.native)

    # The module's code is unknown, so its optimizer is built at two learning rates. A
    # parameter follows self.lr if its learning rate changes, and it may not change by
    # another factor. `like` is an optimizer of the trial with the same settings. It does
    # not train, but it must multiply the learning rates in the same way as the optimizer
    # of the module: otherwise the trial would be recorded at a wrong learning rate.
    at_one, at_two = (configured_at(lr)[1] for lr in (1.0, 2.0))
    own = _own_rates(module, _peaks(module, at_one), _peaks(module, at_two))
    defaults = {**at_one.defaults, "lr": None}
    settings: dict[str, object] = {**constructor_settings(defaults, run.native)}
    if own:
        settings["rates"] = own
    like = run.trial.optimizer(module, **settings)
    configured, opt = configured_at(run.trial.lr or 0.0)
    if _multipliers(opt) != _multipliers(like):
        module_class = type(module).__name__
        raise OptimizerError(
            f"The optimizer that {module_class} builds in configure_optimizers does not train at"
            " the learning rates of the trial.",
            "In configure_optimizers, call ra.RankAwareOptimizer(self, ..., lr=self.lr) without"
            " tuned_at= and recipe=.",
        )
    run.follow(opt, like)
    return configured


def _own_rates(
    module: External, at_one: Mapping[str, float], at_two: Mapping[str, float]
) -> dict[str, float]:
    """Return the learning rates of all parameters for which the Lightning module sets a
    fixed learning rate.

    A learning rate is fixed if it does not depend on the attribute `lr` of the
    Lightning module.

    Args:
        module: the module.
        at_one: the learning rate of each parameter if the module's learning rate is 1.
        at_two: the learning rate of each parameter if the module's learning rate is 2.

    Raises:
        OptimizerError: a parameter's learning rate is a multiple of the module's learning
            rate.
    """
    own = {}
    module_class = type(module).__name__
    for name, lr in at_one.items():
        if at_two[name] == lr:
            own[name] = lr
        elif (lr, at_two[name]) != (1.0, 2.0):
            raise OptimizerError(
                f"configure_optimizers of {module_class} trains {name} at {lr:g} times self.lr,"
                " but a recipe cannot store this factor.",
                "Set the learning rate of every parameter group to self.lr, or to a number that"
                " does not depend on self.lr.",
            )
    return own


def _peaks(module: External, opt: External) -> dict[str, float]:
    """Return the peak learning rate of each trained parameter over the whole learning
    rate schedule.

    A scheduler may already have lowered the learning rate of a parameter group, for
    example at the start of a warm-up. Schedulers store the original learning rate in
    the parameter group.
    """
    names = {id(param): name for name, param in module.named_parameters()}
    peaks = {}
    for group in opt.param_groups:
        # every scheduler writes initial_lr, and OneCycleLR writes max_lr too
        start = group.get("initial_lr", group["lr"])
        lr = float(group.get("max_lr", start))
        for param in group["params"]:
            if param.requires_grad and id(param) in names:
                peaks[names[id(param)]] = lr
    # A fixed learning rate that was passed as `rates=` is not in the user's groups.
    if isinstance(opt, RankAwareOptimizer):
        for part in opt.rates.groups:
            if part.given is not None:
                peaks |= dict.fromkeys(part.names, float(part.given))
    return peaks


def _only_optimizer(
    trainer: External, module: External, configured: External, native: type[Optimizer]
) -> External:
    """Return the optimizer that the method `configure_optimizers` of a Lightning module
    has built.

    Raises:
        OptimizerError: the module has built several optimizers, or an optimizer of another
            class than `native`.
    """
    # configure_optimizers may return an optimizer, a list, a tuple or a dict. Lightning's
    # private function reads every form in the same way as `fit`.
    read = _part_of(trainer, "core.optimizer")._configure_optimizers
    optimizers, *_ = read(configured)
    if [isinstance(opt, native) for opt in optimizers] != [True]:
        built = " and ".join(type(opt).__name__ for opt in optimizers) or "no optimizer"
        module_class, expected = type(module).__name__, native.__name__
        raise OptimizerError(
            f"calibrate() expects exactly one {expected}, but configure_optimizers of"
            f" {module_class} builds {built}.",
            f"Build a single {expected} in configure_optimizers. If your module uses another"
            " optimizer, pass its class as optimizer= to calibrate().",
        )
    return optimizers[0]


def _multipliers(opt: External) -> set[float]:
    """Return the factors by which a `RankAwareOptimizer` multiplies its base learning
    rate for different parameters.

    For a torch optimizer, the returned set of factors is empty, because all parameters
    train at the base learning rate.
    """
    groups = opt.rates.groups if isinstance(opt, RankAwareOptimizer) else []
    return {group.multiplier for group in groups if group.given is None} - {1.0}


# --- messages and signals of Lightning ------------------------------------------------------------


@contextmanager
def _quiet(trainer: External) -> Iterator[None]:
    """Hide Lightning's log messages below the level of warnings."""
    # each trial would print the devices and a table of the model again
    logger = logging.getLogger(_part_of(trainer, "").__name__)
    level = logger.level
    logger.setLevel(max(logging.WARNING, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _interrupts_come_out() -> Iterator[None]:
    """Raise KeyboardInterrupt if the user presses Ctrl-C while Lightning trains.

    After Ctrl-C, Lightning itself would exit the process, and would ignore further
    interrupts.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from end
