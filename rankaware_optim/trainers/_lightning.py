"""Lightning's trainer with a module and data: its run, the module's optimizer, and a trial.

Importing this module does not import Lightning. Its functions do.
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
from ._transformers import refuse_without_rate

_PACKAGES = ("lightning", "pytorch_lightning")
_RATES = ("lr", "learning_rate")  # of a module, as Lightning's finder looks for them
_SAMPLERS = (RandomSampler, SequentialSampler)
_LOADER = ("batch_size", "num_workers", "collate_fn", "worker_init_fn", "generator")


class LightningTrainer(Trainer):
    """The tuple `(trainer, module, *data)`. The data are the arguments of `fit`. Trials run on
    copies of the trainer.
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
        """Return the steps of the run. Lightning counts them where it builds the optimizer, so a
        run is begun on a copy and ended there.
        """
        trainer = self._copy()
        module: External = self.model
        steps = math.inf

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
                "The number of steps of the run is unknown: the trainer has no max_steps, and the"
                " data have no length.",
                "Set max_steps, or pass steps= and target_steps=.",
            )
        return int(steps)

    def known_steps(self) -> int | None:
        """Return the steps of the run by its limits and the length of its data, without Lightning,
        which would begin a run to count them.
        """
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        epochs = trainer.max_epochs
        with suppress(TypeError, IndexError):  # a stream, or a datamodule
            batches = len(self.data[0])
            limit = trainer.limit_train_batches
            if isinstance(limit, int):
                batches = min(batches, limit)
            else:
                batches = int(batches * (limit or 1.0))
            each = math.ceil(batches / trainer.accumulate_grad_batches)
            if epochs is not None and epochs > 0:
                limits.append(each * epochs)
        return min(limits, default=None)

    def own_rate(self) -> OwnRate | None:
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
            refuse_without_rate()
        module: External = self.model
        if "recipe" in settings:
            settings = {**settings["recipe"].settings, **settings}

        def build() -> RankAwareOptimizer:
            return RankAwareOptimizer(module, optimizer or "adamw", **settings)

        opt = build()
        if _has_own(module, "configure_optimizers"):
            _set_rate(self.trainer, module, float(opt.defaults["lr"]))
        else:
            module.configure_optimizers = build
        return opt.report()

    # --- a trial ----------------------------------------------------------------------------------

    def touched(self) -> Touched:
        processes = self.trainer.world_size
        if processes > 1 and not (dist.is_available() and dist.is_initialized()):
            raise CalibrationError(
                f"Lightning would start {processes} processes in the first trial, and each of them"
                " would run a search of its own.",
                "Start the script by torchrun, and call torch.distributed.init_process_group"
                " first.",
            )
        return Touched([self.model], [self.trainer.strategy], [*self.data, self.data])

    def for_trial(self, steps: int, whole: int) -> Trainer:
        return LightningTrainer((self._copy(), self.model, *self.data))

    def _copy(self) -> External:
        shared = (*self.trainer.callbacks, *self.trainer.loggers, self.model)
        return copy.deepcopy(self.trainer, {id(each): each for each in shared})

    def train(self, run: TrialRun) -> object:
        """Run a trial by `trainer.fit`. Only our callback sees it."""
        trainer, module = self.trainer, self.model
        _leave_out(trainer, module)
        _configure(trainer, module, run)
        loop = trainer.fit_loop
        loop.epoch_loop.max_steps = run.trial.steps
        loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None
        reports = _reports(trainer, run)
        trainer.callbacks.append(reports)
        trained, part = self.data, None
        if run.score is None:
            trained, part = _hold_out(module, self.data)

        def held_out_loss() -> object:
            """Return the mean of the losses that the validation's steps returned, else the only
            loss that they logged.
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

        with _quiet(trainer), _interrupts_come_out():
            trainer.fit(module, *trained)
            return run.result(trainer, held_out_loss)


class _Planned(Exception):
    """Ends a run of Lightning before its first step, and has its number of steps."""


def _has_own(value: object, method: str) -> bool:
    """Return whether a module or a datamodule defines a method itself, and not by Lightning."""
    defined = getattr(type(value), method, None)
    if defined is None:
        return False
    return defined.__module__.partition(".")[0] not in _PACKAGES


def _part_of(trainer: External, name: str) -> External:
    """Return a module of the package that a trainer belongs to: lightning.pytorch or
    pytorch_lightning.
    """
    package = type(trainer.fit_loop).__module__.partition(".loops")[0]
    return import_module(f"{package}.{name}" if name else package)


# --- a trial's values and score -------------------------------------------------------------------


def _reports(trainer: External, run: TrialRun) -> External:
    """Return the callback that reports the loss of every step to the trial, and stops the trainer
    when the trial ends.
    """
    callbacks = _part_of(trainer, "callbacks")

    class Reports(callbacks.Callback):  # type: ignore[name-defined]
        loss: torch.Tensor | float = 0.0  # of the batches of a step
        losses: ClassVar[list[torch.Tensor]] = []  # that a validation's steps returned

        def on_train_start(self, trainer: External, module: External) -> None:
            # A trial validates nothing, so a schedule that waits for a plateau would raise an
            # error.
            configs = trainer.strategy.lr_scheduler_configs
            configs[:] = [c for c in configs if not c.reduce_on_plateau]

        def on_train_batch_end(
            self, trainer: External, module: External, outputs: External, *_: object
        ) -> None:
            loss = _loss_in(outputs)
            if loss is None:
                raise CalibrationError(
                    "The module's training_step returned no loss.",
                    "Return the loss, also if the module optimizes manually.",
                )
            self.loss = self.loss + loss.detach()
            # with accumulation several batches make a step
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
    """Remove a trainer's loggers and validation, and its callbacks, except those that accumulate
    gradients: they belong to the step.
    """
    accumulates = _part_of(trainer, "callbacks").GradientAccumulationScheduler
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, accumulates)]
    module.configure_callbacks = list
    silent = _part_of(trainer, "loggers.logger").DummyLogger()
    trainer.loggers = [silent] if trainer.loggers else []
    trainer.limit_val_batches, trainer.val_check_interval = 0, 1.0


def _loss_in(outputs: External) -> torch.Tensor | None:
    """Return the loss in what a step returned, None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, torch.Tensor) else None


def _hold_out(
    module: External, data: Sequence[External]
) -> tuple[Sequence[External], External]:
    """Return the arguments of `fit` and the data for the score: the validation data, else a part
    of the training data, which is taken out of them. The data for the score may be None.
    """
    if _has_own(module, "validation_step"):
        if len(data) > 1:
            return data, data[1]
        if data and _has_own(data[0], "val_dataloader"):
            return data, data[0]
    if data and module.automatic_optimization:
        part, rest = _divided(data[0])
        if part is not None:
            module.validation_step = module.training_step
        return [rest, *data[1:]], part
    return data, None


def _divided(loader: External) -> tuple[External, External]:
    """Return a loader for the score and one for training. If a loader has too few rows, or is not a
    plain one that can be built again, return None and the loader itself.
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
    """Let a module's `configure_optimizers` return the trial's optimizer, or the module's own one
    at the trial's learning rate.
    """
    configure = module.configure_optimizers
    if not _has_own(module, "configure_optimizers"):
        module.configure_optimizers = lambda: run.trial.optimizer(
            module, **run.settings
        )
    elif run.settings:
        raise CalibrationError(
            f"settings= was passed, but {type(module).__name__} configures its optimizer itself.",
            "Set them there, and remove settings=.",
        )
    elif run.existing:
        module.configure_optimizers = lambda: _at_trials_rate(
            trainer, module, configure, run
        )


def _set_rate(trainer: External, module: External, lr: float) -> None:
    """Set the learning rate from which a module configures its optimizer. As for Lightning's own
    finder it is an attribute of the module, of its `hparams` or of its data.

    Raises:
        OptimizerError: there is no such attribute.
    """
    parsing = _part_of(trainer, "utilities.parsing")
    for name in _RATES:
        if parsing.lightning_hasattr(module, name):
            parsing.lightning_setattr(module, name, lr)
            return
    raise OptimizerError(
        f"{type(module).__name__} configures its optimizer at a learning rate that cannot be"
        " set.",
        "Let configure_optimizers use self.lr, or remove that method.",
    )


def _at_trials_rate(
    trainer: External,
    module: External,
    configure: Callable[[], External],
    run: TrialRun,
) -> External:
    """Return what a module configures at the trial's learning rate."""

    def configured_at(lr: float) -> tuple[External, External]:
        _set_rate(trainer, module, lr)
        configured = configure()
        return configured, _only_optimizer(trainer, module, configured, run.native)

    # Two rates tell which parameters follow self.lr, and by which factor.
    at_one, at_two = (configured_at(lr)[1] for lr in (1.0, 2.0))
    own = _own_rates(module, _peaks(module, at_one), _peaks(module, at_two))
    defaults = {**at_one.defaults, "lr": None}
    settings: dict[str, object] = {**constructor_settings(defaults, run.native)}
    if own:
        settings["rates"] = own
    like = run.trial.optimizer(module, **settings)
    configured, opt = configured_at(run.trial.lr or 0.0)
    if _multipliers(opt) != _multipliers(like):
        raise OptimizerError(
            f"{type(module).__name__} configures a RankAwareOptimizer that does not train at the"
            " trial's learning rates.",
            "Remove tuned_at= and recipe= there: ra.RankAwareOptimizer(self, ..., lr=self.lr).",
        )
    run.follow(opt, like)
    return configured


def _own_rates(
    module: External, at_one: Mapping[str, float], at_two: Mapping[str, float]
) -> dict[str, float]:
    """Return the learning rates of parameters that do not follow the module's rate.

    Args:
        module: the module.
        at_one: the learning rate of each parameter if the module's rate is 1.
        at_two: the same if it is 2.

    Raises:
        OptimizerError: a parameter trains at a multiple of the module's rate.
    """
    own = {}
    for name, lr in at_one.items():
        if at_two[name] == lr:
            own[name] = lr
        elif (lr, at_two[name]) != (1.0, 2.0):
            raise OptimizerError(
                f"{type(module).__name__} configures {name} at {lr:g} times its learning rate. A"
                " recipe could not tell, because it has one base learning rate.",
                "Configure each group at self.lr, or at a number that does not depend on it. Or"
                " remove configure_optimizers and pass settings=.",
            )
    return own


def _peaks(module: External, opt: External) -> dict[str, float]:
    """Return the highest learning rate of each parameter that trains, by name. A scheduler may
    begin below it, and notes it in the group.
    """
    names = {id(param): name for name, param in module.named_parameters()}
    peaks = {}
    for group in opt.param_groups:
        start = group.get("initial_lr", group["lr"])
        lr = float(group.get("max_lr", start))
        for param in group["params"]:
            if param.requires_grad and id(param) in names:
                peaks[names[id(param)]] = lr
    if isinstance(opt, RankAwareOptimizer):
        for part in opt.rates.groups:
            if part.given is not None:
                peaks |= dict.fromkeys(part.names, float(part.given))
    return peaks


def _only_optimizer(
    trainer: External, module: External, configured: External, native: type[Optimizer]
) -> External:
    """Return the only optimizer that a module has configured.

    Raises:
        OptimizerError: there are several, or it is of another class than `native`.
    """
    read = _part_of(trainer, "core.optimizer")._configure_optimizers
    optimizers, *_ = read(configured)
    if [isinstance(opt, native) for opt in optimizers] != [True]:
        kinds = [type(opt).__name__ for opt in optimizers]
        raise OptimizerError(
            f"{type(module).__name__} configures {kinds} and not one {native.__name__}.",
            f"Let configure_optimizers build one {native.__name__}, or pass the class that it"
            " builds to calibrate.",
        )
    return optimizers[0]


def _multipliers(opt: External) -> set[float]:
    """Return by what an optimizer multiplies learning rates: nothing if it is a plain one."""
    groups = opt.rates.groups if isinstance(opt, RankAwareOptimizer) else []
    return {group.multiplier for group in groups if group.given is None} - {1.0}


# --- messages and signals of Lightning ------------------------------------------------------------


@contextmanager
def _quiet(trainer: External) -> Iterator[None]:
    """Silence the messages of Lightning below warnings."""
    logger = logging.getLogger(_part_of(trainer, "").__name__)
    level = logger.level
    logger.setLevel(max(logging.WARNING, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _interrupts_come_out() -> Iterator[None]:
    """Raise Ctrl-C as KeyboardInterrupt. Lightning would exit the process, and ignore the next
    ones.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from end
