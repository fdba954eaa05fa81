"""This module defines `Trial`, the object that `calibrate` passes to the user's training
function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..optimizer import RankAwareOptimizer

if TYPE_CHECKING:
    from ._runner import TrialRunner


class Trial:
    """Represents a single training run of a calibration.

    `calibrate` passes a trial to the user's training function, which builds its model and
    optimizer from it.

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
        """The number of optimizer steps of this trial.

        Plan the learning rate schedule of your training for this number of steps.
        """
        # The runner raises an error if the target run is longer and the loop never asked for
        # its length: its schedule may then have the length of the target run.
        self._runner.steps_were_read = True
        return self._runner.steps

    @property
    def lr(self) -> float | None:
        """The base learning rate that this trial tries, or None until `optimizer` is called.

        Like `Recipe.lr`, this learning rate applies to the reference configuration,
        which is the model of the first trial. Each LoRA matrix trains at the base
        learning rate times a factor from the scaling law.
        """
        return self._runner.lr

    def optimizer(self, params: Any, /, **settings: Any) -> RankAwareOptimizer:
        """Build an optimizer that trains the model at the learning rate of this trial.

        Args:
            params: the model, or a list of models such as [unet, text_encoder]. Parameters
                or parameter groups are possible too, together with `model=`.
            **settings: settings of the optimizer, which the recipe records, and arguments of
                `RankAwareOptimizer` such as `rates` and `other_lr`. Passing a base learning
                rate is an error, because the trial chooses it.

        Raises:
            CalibrationError: the rank of the model is not `trial.rank`; the model or the
                settings differ from earlier trials; or an argument or a parameter group
                sets a learning rate.
        """
        return self._runner.build_optimizer(params, settings)
