"""`Trial`: the object that `calibrate` passes to the user's training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..optimizer import RankAwareOptimizer

if TYPE_CHECKING:
    from ._runner import TrialRunner


class Trial:
    """One run of the user's `train`, passed to it by `calibrate`.

    Attributes:
        rank: the LoRA rank of the model to build, or None for full finetuning.
        seed: the random seed of the run.
        number: the trial's number, from 0.
    """

    def __init__(self, runner: TrialRunner) -> None:
        self.rank, self.seed = runner.setting
        self.number = runner.number
        self._runner = runner

    @property
    def steps(self) -> int:
        """The number of optimizer steps of this run. Its warm-up and decay should span them."""
        self._runner.steps_were_read = True
        return self._runner.steps

    @property
    def lr(self) -> float | None:
        """The base learning rate that this trial tries, or None before `optimizer` was called.

        Like `Recipe.lr` it belongs to the reference configuration. Each LoRA matrix trains at the
        base learning rate times its multiplier.
        """
        return self._runner.lr

    def optimizer(self, params: Any, /, **settings: Any) -> RankAwareOptimizer:
        """Build the optimizer of this trial, at the learning rate that the trial tries.

        Args:
            params: the model, or a list of several models such as [unet, text_encoder], or
                parameters or parameter groups together with `model=`.
            **settings: settings of the optimizer, which the recipe records, and arguments of
                `RankAwareOptimizer` such as `rates` and `other_lr`. Arguments that set the learning
                rate are errors, because the trial sets it.

        Raises:
            CalibrationError: the model has another rank than `trial.rank`; the model or the
                settings differ from those of earlier trials; or an argument or a parameter group
                sets its own learning rate.
        """
        return self._runner.build_optimizer(params, settings)
