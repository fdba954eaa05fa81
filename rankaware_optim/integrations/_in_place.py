"""Models that are built already, and how a trial trains each of them: a trainer of transformers or
TRL, Lightning's trainer and module, or a loop of one's own.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import Trial
from ..errors import CalibrationError
from ..inspection import as_one_model
from ._held_out import BATCHES, is_sized
from ._lightning_run import package_of, quiet
from ._snapshot import Snapshot, cannot_be_put_back, refuse_sharded

_NO_END = (
    "The steps of the run are not known: it has neither max_steps nor data with a length.",
    "Set max_steps, or give steps= and target_steps=.",
)


class Loop:
    """A loop of one's own that trains a model that is built.

    Args:
        train: the function of the trial.
        model: the model, or a list of several.
    """

    folder: Path | None = None
    evaluation = ""
    is_by_reward = False

    def __init__(self, train: Any, model: Any) -> None:
        self.train = train
        self.source = train
        self.model = as_one_model(model)
        if not isinstance(self.model, nn.Module):
            raise CalibrationError(
                f"model={type(model).__name__} is no model.",
                "Give the model that train trains, or a list of several.",
            )
        self.models: list[nn.Module] = [self.model]

    def snapshot(self) -> Snapshot:
        """Return the state to which every trial's is put back."""
        refuse_sharded(self.models)
        return Snapshot(self.models)

    def steps(self) -> int | None:
        """Return the steps of the run, None if they are the caller's own argument."""
        return None

    def check_data(self) -> None:
        """Do nothing: the loop's data are its own."""

    def around(self) -> AbstractContextManager[Any]:
        """Return a context for all trials."""
        return nullcontext()

    def run(self, trial: Trial, whole: int) -> Any:
        """Return what runs a trial: a generator, or a trainer. whole: the steps of the run."""
        return self.train(trial)


class BuiltTrainer:
    """A trainer of transformers or TRL that is not trained yet.

    A trial is a run of the trainer itself with arguments and callbacks of its own, and leaves no
    trace in what sees the real run: trackers, checkpoints, early stopping, the hub.
    """

    def __init__(self, trainer: Any, by_reward: bool) -> None:
        self.trainer = trainer
        self.source = type(trainer).train
        self.is_by_reward = by_reward
        self.folder: Path | None = Path(trainer.args.output_dir)
        self.evaluation = "" if by_reward else f"{BATCHES} batches"
        wrapped = getattr(trainer, "model_wrapped", None)
        others = (wrapped, getattr(trainer, "ref_model", None))
        self.model = trainer.model
        self.models = [m for m in (self.model, *others) if isinstance(m, nn.Module)]
        if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs:
            raise CalibrationError(
                "The trainer already has an optimizer: it was trained, or attach was called on it,"
                " or it was given one.",
                "Build it again without one, calibrate, and then attach.",
            )

    def snapshot(self) -> Snapshot:
        """Return the state to which every trial's is put back."""
        trainer = self.trainer
        for name in ("fsdp", "deepspeed"):
            if getattr(trainer, f"is_{name}_enabled", False):
                raise CalibrationError(
                    f"The trainer shards its model by {name}, so a trial cannot be put back.",
                    "Give calibrate a function of the trial that builds a trainer, or take"
                    " ra.suggest_lr's rate.",
                )
        refuse_sharded(self.models)
        accelerator = trainer.accelerator
        shared = ("gradient_state", "scaler")
        objects = [
            trainer,
            accelerator,
            *(getattr(accelerator, name, None) for name in shared),
        ]
        data = [trainer.train_dataset, trainer.data_collator]
        return Snapshot(self.models, objects, [*data, *_several(trainer.eval_dataset)])

    def check_data(self) -> None:
        """Raise a `CalibrationError` if trials would use up the training data."""
        refuse_iterator(self.trainer.train_dataset)

    def steps(self) -> int:
        """Return the steps of the run, as the trainer counts them."""
        args = self.trainer.args
        epochs = float(args.num_train_epochs)
        if args.max_steps > 0:
            return int(args.max_steps)
        loader = self.trainer.get_train_dataloader()
        try:
            batches = len(loader)
        except TypeError as error:
            raise CalibrationError(*_NO_END) from error
        each: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        return math.ceil(epochs * each)

    def around(self) -> AbstractContextManager[Any]:
        """Return a context for all trials: that of a folder in which they may write."""
        self._scratch = tempfile.TemporaryDirectory()
        return self._scratch

    def run(self, trial: Trial, whole: int) -> Any:
        """Return the trainer, as it runs a trial. whole: the steps of the run."""
        from transformers import TrainerControl, TrainerState
        from transformers.trainer_callback import DefaultFlowCallback

        trainer, folder = self.trainer, self._scratch.name
        trainer.args = _arguments(trainer.args, trial.steps, whole, folder)
        trainer.callback_handler = copy.copy(trainer.callback_handler)
        trainer.callback_handler.callbacks = [DefaultFlowCallback()]
        trainer.state, trainer.control = TrainerState(), TrainerControl()
        return trainer


def _arguments(args: Any, steps: int, whole: int, folder: str) -> Any:
    """Return a copy of a trainer's arguments for a trial: its steps, and no evaluation, checkpoint,
    log or push.
    """
    args = copy.copy(args)
    args.max_steps, args.output_dir = steps, folder
    if args.warmup_steps and args.warmup_steps >= 1:
        args.warmup_steps = _scaled(args.warmup_steps, steps, whole)
    settings = getattr(args, "lr_scheduler_kwargs", None)
    if isinstance(settings, dict):  # such as num_decay_steps
        args.lr_scheduler_kwargs = {
            name: _scaled(value, steps, whole) if _is_count(name, value) else value
            for name, value in settings.items()
        }
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(args, name, type(getattr(args, name))("no"))
    for name in ("load_best_model_at_end", "push_to_hub", "eval_on_start"):
        setattr(args, name, False)
    if hasattr(args, "log_completions"):
        args.log_completions = False
    args.report_to, args.disable_tqdm = [], True
    return args


def _scaled(count: float, steps: int, whole: int) -> int:
    return max(1, round(count * steps / whole))


def _is_count(name: str, value: Any) -> bool:
    return name.startswith("num_") and name.endswith("_steps") and value is not None


def _several(data: Any) -> list[Any]:
    return [*data.values()] if isinstance(data, dict) else [data]


def refuse_iterator(data: Any) -> None:
    """Raise a `CalibrationError` for a stream that can be read once: a trial would use it up."""
    if is_sized(data) or not hasattr(data, "__iter__"):
        return
    first = data if hasattr(data, "__next__") else iter(data)
    if first is data or iter(data) is first:
        raise CalibrationError(
            f"The training data, a {type(data).__name__}, are an iterator that can be read once,"
            " and the trials would use it up.",
            "Give data that begin again at each iter(), such as a class with a generator __iter__.",
        )


class BuiltPair:
    """Lightning's trainer and module, and what `fit` takes besides. Trials run on copies of the
    trainer.

    Args:
        trainer, module, data: what the tuple holds.
    """

    is_by_reward = False
    evaluation = f"{BATCHES} batches"

    def __init__(self, trainer: Any, module: Any, data: Sequence[Any]) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        package_of(module)
        self.source = type(module).training_step
        self.folder: Path | None = Path(trainer.default_root_dir)
        self.model: nn.Module = module
        self.models = [module]
        if "configure_optimizers" in vars(module):
            raise CalibrationError(
                "The module already has an optimizer: attach was called on it.",
                "Calibrate first, and then attach.",
            )
        _refuse_processes(trainer)

    @cached_property
    def loaders(self) -> list[Any]:
        """The loaders and datamodules."""
        nested = [d if isinstance(d, (list, tuple)) else [d] for d in self.data]
        return [loader for each in nested for loader in each if loader is not None]

    def snapshot(self) -> Snapshot:
        """Return the state to which every trial's is put back."""
        kind = type(self.trainer.strategy).__name__
        if kind in _SHARDING:
            raise cannot_be_put_back(f"{kind} shards it")
        refuse_sharded(self.models)
        return Snapshot(self.models, data=self.loaders)

    def check_data(self) -> None:
        """Raise a `CalibrationError` if trials would use up the training data."""
        for loader in self.loaders:
            refuse_iterator(getattr(loader, "dataset", loader))

    def steps(self) -> int:
        """Return the steps of the run, as Lightning counts them where it makes the optimizer."""
        module, planned = self.module, []

        def plan() -> Any:
            planned.append(module.trainer.estimated_stepping_batches)
            raise _Planned

        module.configure_optimizers = plan
        with quiet(module), suppress(_Planned):
            self._copy().fit(module, *self.data)
        if not planned or not 0 < planned[0] < math.inf:
            raise CalibrationError(*_NO_END)
        return int(planned[0])

    def _copy(self) -> Any:
        """Return a copy of the trainer, without its loggers, its validation, and its callbacks but
        those that accumulate gradients.
        """
        trainer, module = self.trainer, self.module
        _, package = package_of(module)
        callbacks = import_module(f"{package}.callbacks")
        shared = (*trainer.callbacks, *trainer.loggers, module)
        copied = copy.deepcopy(trainer, {id(each): each for each in shared})
        accumulates = callbacks.GradientAccumulationScheduler
        copied.callbacks = [c for c in trainer.callbacks if isinstance(c, accumulates)]
        loggers = import_module(f"{package}.loggers.logger")
        copied.loggers = [loggers.DummyLogger()] if trainer.loggers else []
        copied.num_sanity_val_steps = 0
        copied.check_val_every_n_epoch, copied.val_check_interval = 2**62, 1.0
        module.configure_callbacks = list
        return copied

    def around(self) -> AbstractContextManager[Any]:
        """Return a context for all trials."""
        return quiet(self.module)

    def run(self, trial: Trial, whole: int) -> Any:
        """Return the trainer's copy, the module and the data. whole: the steps of the run."""
        trainer = self._copy()
        trainer.fit_loop.epoch_loop.max_steps = -1  # the trial's
        return trainer, self.module, *self.data


_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class _Planned(Exception):
    """Ends a run of Lightning before its first step."""


def _refuse_processes(trainer: Any) -> None:
    """Raise a `CalibrationError` where Lightning starts the processes itself, and those would not
    agree on a rate.
    """
    from torch import distributed as dist

    known = dist.is_available() and dist.is_initialized()
    if trainer.world_size > 1 and not known:
        raise CalibrationError(
            f"Lightning would start {trainer.world_size} processes in the first trial, each of"
            " which would calibrate by itself.",
            "Start the script by torchrun, and call torch.distributed.init_process_group first.",
        )
