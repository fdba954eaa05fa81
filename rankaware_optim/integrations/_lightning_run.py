"""A trial that Lightning's `Trainer` runs, and the optimizer of its module.

Importing this module does not import Lightning. Its functions do.
"""

from __future__ import annotations

import logging
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from ..errors import CalibrationError, OptimizerError
from ..optimizer import RankAwareOptimizer
from ..recipe import constructor_settings
from ._held_out import BATCHES, SHARE, divided

if TYPE_CHECKING:
    from ._trainer_run import TrainerRun

_RATE_NAMES = ("lr", "learning_rate")


def is_pair(value: Any) -> bool:
    """Return whether a value is (Lightning's trainer, a module, and what its `fit` takes)."""
    is_tuple = isinstance(value, tuple) and len(value) >= 2
    return is_tuple and hasattr(value[0], "fit_loop")


def package_of(module: Any) -> tuple[Any, str]:
    """Return the class LightningModule from which a module derives, and the package that has it.

    Raises:
        CalibrationError: it derives from none.
    """
    for kind in type(module).__mro__:
        if kind.__name__ == "LightningModule":
            return kind, kind.__module__.rpartition(".core")[0]
    raise CalibrationError(
        f"A {type(module).__name__} stands in the place of Lightning's module.",
        "Give (trainer, module, loaders or datamodule).",
    )


def run_pair(trainer: Any, module: Any, data: Sequence[Any], run: TrainerRun) -> Any:
    """Run the trial by `trainer.fit` and return its score, or None if there is none."""
    _, package = package_of(module)
    callbacks = import_module(f"{package}.callbacks")
    _configure(module, run)
    loop = trainer.fit_loop
    limit = loop.epoch_loop.max_steps
    loop.epoch_loop.max_steps = run.steps_of(limit if limit >= 0 else None)
    loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, None, None
    no_checkpoints = [
        c for c in trainer.callbacks if not isinstance(c, callbacks.Checkpoint)
    ]
    losses: list[torch.Tensor] = []
    trainer.callbacks = [*no_checkpoints, _reports(callbacks.Callback, run, losses)]
    trained, part = _hold_out(module, data) if run.metric is None else (data, None)

    def validated(part: Any) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for of_loader in trainer.validate(module, part, verbose=False):
            metrics |= of_loader
        return metrics

    def loss() -> Any:
        if part is None:
            return None
        trainer.limit_val_batches = BATCHES
        if part is not _validation_data(module, data):
            module.validation_step = module.training_step
        losses.clear()
        return _loss_of(validated(part), losses)

    with _interrupts_come_out():
        trainer.fit(module, *trained)
        return run.score(trainer, lambda: validated((*data, *data)[1]), loss)


def _reports(base: Any, run: TrainerRun, losses: list[torch.Tensor]) -> Any:
    """Return a callback that reports every step, and stops the trainer when the trial ends. losses:
    is given those of a validation.
    """

    class Reports(base):
        """Reports to the trial."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            if run.built:  # nothing is validated, so no plateau is seen
                configs = trainer.strategy.lr_scheduler_configs
                configs[:] = [c for c in configs if not c.reduce_on_plateau]

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, *args: Any
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
            self, trainer: Any, module: Any, outputs: Any, *args: Any
        ) -> None:
            loss = _loss_in(outputs)
            if loss is not None:
                losses.append(loss.detach().float().mean())

    return Reports()


def _loss_of(metrics: Mapping[str, Any], losses: Sequence[torch.Tensor]) -> Any:
    """Return the loss of a validation: the mean of those that its steps returned, else the one that
    it logged, None if there is none.
    """
    if losses:
        return float(torch.stack([*losses]).mean())
    named = [name for name in metrics if "loss" in name.lower()]
    return metrics[named[0]] if len(named) == 1 else None


def _loss_in(outputs: Any) -> torch.Tensor | None:
    """Return the loss in what a step returned, None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, torch.Tensor) else None


# --- data held out --------------------------------------------------------------------------------


def _validation_data(module: Any, data: Sequence[Any]) -> Any:
    """Return the loaders or the datamodule that `trainer.validate` takes, or None."""
    base, _ = package_of(module)
    if type(module).validation_step is base.validation_step:
        return None
    if len(data) > 1:
        return data[1]
    # a datamodule
    return data[0] if data and _overrides(data[0], "val_dataloader") else None


def _overrides(data: Any, method: str) -> bool:
    """Return whether a datamodule has a method of its own."""
    own = getattr(type(data), method, None)
    bases = [k for k in type(data).__mro__ if k.__name__ == "LightningDataModule"]
    return bool(bases) and own is not getattr(bases[0], method, None)


def _hold_out(module: Any, data: Sequence[Any]) -> tuple[Sequence[Any], Any]:
    """Return what `fit` takes, and the data for the score: those of the validation, else a part of
    the training data, which is taken out of it, or None.
    """
    given = _validation_data(module, data)
    if given is not None:
        return data, given
    loader: Any = data[0] if data else None
    if not module.automatic_optimization or not _is_divisible(loader):
        return data, None
    rows = min(BATCHES * loader.batch_size, len(loader.dataset) // SHARE)
    if not rows:
        return data, None
    part, rest = divided(loader.dataset, rows)
    is_shuffled = isinstance(loader.sampler, RandomSampler)
    return [_like(loader, rest, is_shuffled), *data[1:]], _like(loader, part, False)


def _is_divisible(loader: Any) -> bool:
    """Return whether a loader can be made again for a part of its data."""
    return (
        type(loader) is DataLoader
        and loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
    )


def _like(loader: Any, dataset: Any, shuffle: bool) -> DataLoader[Any]:
    names = ("batch_size", "num_workers", "collate_fn", "pin_memory", "timeout")
    more = ("worker_init_fn", "generator", "prefetch_factor", "persistent_workers")
    settings = {name: getattr(loader, name) for name in (*names, *more)}
    settings["drop_last"] = loader.drop_last and shuffle
    return DataLoader(dataset, shuffle=shuffle, **settings)


# --- the module's optimizer -----------------------------------------------------------------------


def _configure(module: Any, run: TrainerRun) -> None:
    """Let a module's `configure_optimizers` return the trial's optimizer, or its own at the trial's
    rate.
    """
    if not configures(module):
        module.configure_optimizers = lambda: run.trial.optimizer(
            module, **run.settings
        )
        return
    if run.settings:
        raise CalibrationError(
            f"settings= was given, but {type(module).__name__} configures its optimizer itself.",
            "Give them there.",
        )
    if run.built:
        rate_name(module)
        configure = module.configure_optimizers
        module.configure_optimizers = lambda: _at_trials_rate(module, configure, run)


def configures(module: Any) -> bool:
    """Return whether a module configures its optimizer itself."""
    base, _ = package_of(module)
    return type(module).configure_optimizers is not base.configure_optimizers


def rate_name(module: Any) -> str:
    """Return the name of the attribute from which a module's `configure_optimizers` takes its rate,
    as for Lightning's finder: of the module or of its `hparams`.

    Raises:
        OptimizerError: there is none.
    """
    for name in _RATE_NAMES:
        if hasattr(module, name) or name in module.hparams:
            return name
    raise OptimizerError(
        f"{type(module).__name__} configures its optimizer at a rate that cannot be set.",
        "Let configure_optimizers take it from self.lr, or leave that method out.",
    )


def set_rate(module: Any, lr: float) -> None:
    """Set the rate from which a module configures its optimizer."""
    name = rate_name(module)
    if hasattr(module, name):
        setattr(module, name, lr)
    if name in module.hparams:
        module.hparams[name] = lr


def own_optimizer(module: Any, configured: Any, native: type[Optimizer]) -> Any:
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


def _at_trials_rate(module: Any, configure: Callable[[], Any], run: TrainerRun) -> Any:
    """Return what a module configures at the trial's rate."""
    name = rate_name(module)
    if getattr(module, name, module.hparams.get(name)) is None:
        set_rate(module, 1.0)
    defaults = own_optimizer(module, configure(), run.native).defaults
    settings = constructor_settings({**defaults, "lr": None}, run.native)
    run.like = run.trial.optimizer(module, **settings)
    assert run.trial.lr is not None
    set_rate(module, run.trial.lr)
    configured = configure()
    opt = own_optimizer(module, configured, run.native)
    if multipliers(opt) != multipliers(run.like):
        raise OptimizerError(
            f"{type(module).__name__} configures an optimizer that does not train at the trial's"
            " rates.",
            "Build ra.RankAwareOptimizer(self, ..., lr=self.lr) there, without tuned_at= and"
            " recipe=.",
        )
    run.trial._scheduled = weakref.ref(opt)
    return configured


def multipliers(opt: Any) -> dict[torch.Tensor, float]:
    """Return the multiplier of each parameter that trains, 1 in an optimizer without ranks."""
    groups = opt.rates.groups if isinstance(opt, RankAwareOptimizer) else []
    known = {p: group.multiplier for group in groups for p in group.params}
    params = [p for group in opt.param_groups for p in group["params"]]
    return {p: known.get(p, 1.0) for p in params if p.requires_grad}


# --- what Lightning does besides ------------------------------------------------------------------


@contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Silence what Lightning says of a run, below warnings."""
    _, package = package_of(module)
    logger = logging.getLogger(package)
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
