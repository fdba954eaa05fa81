"""What a pair of Lightning's trainer and a module is: a trial that it runs, the module's optimizer,
and a pair that is built already.

Importing this module does not import Lightning. Its functions do.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
)

from ..errors import CalibrationError, OptimizerError
from ..optimizer import RankAwareOptimizer
from ..recipe import constructor_settings
from ._run import BATCHES, PART, TrainerRuns, divided
from ._snapshot import Snapshot, refuse_sharded

if TYPE_CHECKING:
    from ..calibration import Trial

_BASES = ("LightningModule", "LightningDataModule")
_RATE_NAMES = ("lr", "learning_rate")


def is_pair(value: Any) -> bool:
    """Return whether a value is (Lightning's trainer, a module, and what its `fit` takes)."""
    is_tuple = isinstance(value, tuple) and len(value) >= 2
    return is_tuple and hasattr(value[0], "fit_loop")


def has_own(value: Any, method: str) -> bool:
    """Return whether a module or a datamodule has a method of its own."""
    for kind in type(value).__mro__:
        if kind.__name__ in _BASES:
            return getattr(type(value), method) is not getattr(kind, method)
    return False


def refuse_with_optimizer(module: Any) -> None:
    """Raise an `OptimizerError` if `attach` has given a module its optimizer."""
    if "configure_optimizers" in vars(module):
        raise OptimizerError(
            "The module already has an optimizer: attach was called on it before.",
            "Build it again. Calibrate, attach once, and then train.",
        )


def _part_of(trainer: Any, name: str) -> Any:
    """Return a module of the package that a trainer is of: lightning.pytorch or
    pytorch_lightning.
    """
    package = type(trainer.fit_loop).__module__.partition(".loops")[0]
    return import_module(f"{package}.{name}" if name else package)


# --- a trial --------------------------------------------------------------------------------------


def run_pair(trainer: Any, module: Any, *data: Any, run: TrainerRuns) -> Any:
    """Run the trial by `trainer.fit` and return its score, or None if there is none."""
    callbacks = _part_of(trainer, "callbacks")
    _configure(module, run)
    loop = trainer.fit_loop
    loop.epoch_loop.max_steps = run.trial.steps
    loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None
    losses: list[torch.Tensor] = []
    kept = [c for c in trainer.callbacks if not isinstance(c, callbacks.Checkpoint)]
    trainer.callbacks = [*kept, _reports(callbacks.Callback, run, losses)]
    trained, part = _hold_out(module, data) if run.score is None else (data, None)

    def held_out_loss() -> Any:
        """The mean that the validation's steps returned, else the one loss that it logged."""
        if part is None:
            return None
        trainer.limit_val_batches = BATCHES
        losses.clear()
        trainer.validate(module, part, verbose=False)
        if losses:
            return float(torch.stack(losses).mean())
        logged = trainer.callback_metrics
        named = [name for name in logged if "loss" in name.lower()]
        return logged[named[0]] if len(named) == 1 else None

    with _quiet(trainer), _interrupts_come_out():
        trainer.fit(module, *trained)
        return run.result(trainer, held_out_loss)


def _reports(base: Any, run: TrainerRuns, losses: list[torch.Tensor]) -> Any:
    """Return a callback that reports every step to the trial, and stops the trainer when it ends.
    losses: is given those of a validation.
    """

    class Reports(base):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            if run.built:  # nothing is validated, so no plateau is seen
                configs = trainer.strategy.lr_scheduler_configs
                configs[:] = [c for c in configs if not c.reduce_on_plateau]

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, *_: Any
        ) -> None:
            loss = _loss_in(outputs)
            if loss is None:
                raise CalibrationError(
                    "The module's training_step returned no loss.",
                    "Return it, also with manual optimization.",
                )
            run.add(loss)
            if trainer.global_step > run.steps_taken and run.end_step():
                trainer.should_stop = True

        def on_validation_batch_end(
            self, trainer: Any, module: Any, outputs: Any, *_: Any
        ) -> None:
            loss = _loss_in(outputs)
            if loss is not None:
                losses.append(loss.detach().float().mean())

    return Reports()


def _loss_in(outputs: Any) -> torch.Tensor | None:
    """Return the loss in what a step returned, None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, torch.Tensor) else None


def _hold_out(module: Any, data: Sequence[Any]) -> tuple[Sequence[Any], Any]:
    """Return what `fit` takes, and the data for the score: those of the validation, else a part of
    the training data, which is taken out of it, or None.
    """
    if has_own(module, "validation_step"):
        if len(data) > 1:
            return data, data[1]
        if data and has_own(data[0], "val_dataloader"):
            return data, data[0]
    parts = _divided(data[0]) if data and module.automatic_optimization else None
    if parts is None:
        return data, None
    module.validation_step = module.training_step
    part, rest = parts
    return [rest, *data[1:]], part


def _divided(loader: Any) -> tuple[Any, Any] | None:
    """Return a loader of some rows and one of the rest, None if it cannot be made again or has too
    few.
    """
    if type(loader) is not DataLoader or loader.batch_size is None:
        return None
    data: Any = loader.dataset
    is_shuffled = type(loader.sampler) is RandomSampler
    if not is_shuffled and type(loader.sampler) is not SequentialSampler:
        return None
    rows = min(BATCHES * loader.batch_size, len(data) // PART)
    part, rest = divided(data, rows)
    return (
        (_like(loader, part, False), _like(loader, rest, is_shuffled)) if rows else None
    )


def _like(loader: Any, dataset: Any, shuffle: bool) -> DataLoader[Any]:
    names = ("batch_size", "num_workers", "collate_fn", "worker_init_fn", "generator")
    settings = {name: getattr(loader, name) for name in names}
    settings["drop_last"] = loader.drop_last and shuffle
    return DataLoader(dataset, shuffle=shuffle, **settings)


# --- the module's optimizer -----------------------------------------------------------------------


def _configure(module: Any, run: TrainerRuns) -> None:
    """Let a module's `configure_optimizers` return the trial's optimizer, or its own at the trial's
    rate.
    """
    configure = module.configure_optimizers
    if not has_own(module, "configure_optimizers"):
        module.configure_optimizers = lambda: run.trial.optimizer(
            module, **run.settings
        )
    elif run.settings:
        raise CalibrationError(
            f"settings= was given, but {type(module).__name__} configures its optimizer itself.",
            "Give them there.",
        )
    elif run.built:
        module.configure_optimizers = lambda: _at_trials_rate(module, configure, run)


def set_rate(module: Any, lr: float) -> None:
    """Set the rate from which a module configures its optimizer, as Lightning's finder does: an
    attribute of the module or of its `hparams`.

    Raises:
        OptimizerError: there is none.
    """
    as_attribute = [name for name in _RATE_NAMES if hasattr(module, name)]
    as_hyper = [name for name in _RATE_NAMES if name in module.hparams]
    if not as_attribute and not as_hyper:
        raise OptimizerError(
            f"{type(module).__name__} configures its optimizer at a rate that cannot be set.",
            "Let configure_optimizers take it from self.lr, or leave that method out.",
        )
    for name in as_attribute[:1]:
        setattr(module, name, lr)
    for name in as_hyper[:1]:
        module.hparams[name] = lr


def _at_trials_rate(module: Any, configure: Callable[[], Any], run: TrainerRuns) -> Any:
    """Return what a module configures at the trial's rate."""
    set_rate(module, 1.0)
    defaults = _only_optimizer(module, configure(), run.native).defaults
    settings = constructor_settings({**defaults, "lr": None}, run.native)
    like = run.trial.optimizer(module, **settings)
    set_rate(module, run.trial.lr or 0.0)
    configured = configure()
    opt = _only_optimizer(module, configured, run.native)
    if _multipliers(opt) != _multipliers(like):
        raise OptimizerError(
            f"{type(module).__name__} configures an optimizer that does not train at the trial's"
            " rates.",
            "Build ra.RankAwareOptimizer(self, ..., lr=self.lr) there, without tuned_at= and"
            " recipe=.",
        )
    run.like = like  # the trial's reference is weak
    run.trial._scheduled = weakref.ref(opt)
    return configured


def _only_optimizer(module: Any, configured: Any, native: type[Optimizer]) -> Any:
    """Return the one optimizer of a class that a module has configured.

    Raises:
        OptimizerError: there are several, or it is of another class.
    """
    optimizers = [*_optimizers_in(configured)]
    if len(optimizers) != 1 or not isinstance(optimizers[0], native):
        kinds = ", ".join(type(opt).__name__ for opt in optimizers) or "none"
        raise OptimizerError(
            f"{type(module).__name__} configures {kinds} and not one {native.__name__}.",
            f"Let configure_optimizers build one {native.__name__}, or give its class here.",
        )
    return optimizers[0]


def _optimizers_in(configured: Any) -> Iterator[Any]:
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _optimizers_in([*configured.values()])
    elif isinstance(configured, (list, tuple)):
        for each in configured:
            yield from _optimizers_in(each)


def _multipliers(opt: Any) -> dict[torch.Tensor, float]:
    """Return the multiplier of each parameter that trains, 1 in an optimizer without ranks."""
    groups = opt.rates.groups if isinstance(opt, RankAwareOptimizer) else []
    known = {p: group.multiplier for group in groups for p in group.params}
    params = [p for group in opt.param_groups for p in group["params"]]
    return {p: known.get(p, 1.0) for p in params if p.requires_grad}


# --- what Lightning does besides ------------------------------------------------------------------


@contextmanager
def _quiet(trainer: Any) -> Iterator[None]:
    """Silence what Lightning says of a run, below warnings."""
    logger = logging.getLogger(_part_of(trainer, "").__name__)
    level = logger.level
    logger.setLevel(max(logging.WARNING, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _interrupts_come_out() -> Iterator[None]:
    """Pass Ctrl-C to the caller. Lightning would exit the process and ignore further interrupts."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from end


# --- a pair that is built -------------------------------------------------------------------------


class BuiltPair:
    """Lightning's trainer and module, and what `fit` takes besides. Trials run on copies of the
    trainer.
    """

    is_by_reward, is_evaluated = False, True

    def __init__(self, trainer: Any, module: Any, *data: Any) -> None:
        self.trainer, self.data = trainer, data
        self.model = self.subject = module
        self.source = type(module).training_step
        self.folder: Path | None = Path(trainer.default_root_dir)
        refuse_with_optimizer(module)

    def snapshot(self) -> Snapshot:
        """Return the state to which every trial's is put back."""
        refuse_sharded(self.trainer.strategy)
        processes = self.trainer.world_size
        if processes > 1 and not (dist.is_available() and dist.is_initialized()):
            raise CalibrationError(
                f"Lightning would start {processes} processes in the first trial, each of which"
                " would calibrate by itself.",
                "Start the script by torchrun, and call torch.distributed.init_process_group"
                " first.",
            )
        nested = [d if isinstance(d, (list, tuple)) else [d] for d in self.data]
        return Snapshot([self.model], data=[each for part in nested for each in part])

    def steps(self) -> int:
        """Return the steps of the run, as Lightning counts them where it makes the optimizer."""
        module, planned = self.model, [math.inf]

        def plan() -> Any:
            planned.append(module.trainer.estimated_stepping_batches)
            raise _Planned

        module.configure_optimizers = plan
        with _quiet(self.trainer), suppress(_Planned):
            self._copy().fit(module, *self.data)
        if not 0 < planned[-1] < math.inf:
            raise CalibrationError(
                "The steps of the run are not known: it has neither max_steps nor data with a"
                " length.",
                "Set max_steps, or give steps= and target_steps=.",
            )
        return int(planned[-1])

    def run(self, trial: Trial, whole: int) -> Any:
        """Return the trainer's copy, the module and the data. whole: the steps of the run."""
        return self._copy(), self.model, *self.data

    def _copy(self) -> Any:
        """Return a copy of the trainer, without its loggers, its validation, and its callbacks but
        those that accumulate gradients.
        """
        trainer, module = self.trainer, self.model
        shared = (*trainer.callbacks, *trainer.loggers, module)
        copied = copy.deepcopy(trainer, {id(each): each for each in shared})
        accumulates = _part_of(trainer, "callbacks").GradientAccumulationScheduler
        copied.callbacks = [c for c in trainer.callbacks if isinstance(c, accumulates)]
        silent = _part_of(trainer, "loggers.logger").DummyLogger()
        copied.loggers = [silent] if trainer.loggers else []
        copied.num_sanity_val_steps = 0
        copied.check_val_every_n_epoch, copied.val_check_interval = 2**62, 1.0
        module.configure_callbacks = list
        return copied


class _Planned(Exception):
    """Ends a run of Lightning before its first step."""
