"""Calibration of a model that is loaded once. Adapters are replaced in place, and the model is
restored at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ..._checks import plain
from ...errors import CalibrationError, InspectionError
from ...inspection import Adapters, ScalingRule, Walk, pairs_of, walk
from ...recipe import Recipe
from .._api import calibrate
from .._arguments import check_argument
from .._signals import Interrupts
from .._trial import Trial, seeded
from ._snapshot import ModelState

StepFunction = Callable[[nn.Module, int], Any]
FullTrains = Sequence[str] | Callable[[str, nn.Parameter], bool]
_SHARDED = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def calibrate_in_place(
    model: nn.Module,
    step: StepFunction,
    optimizer: type[Optimizer] | str,
    *,
    ranks: Sequence[int | None],
    steps: int,
    init: Literal["A", "B"] | None = None,
    variance: Literal["mua", "peft"] | None = None,
    scaling_rule: ScalingRule = "fixed",
    settings: Mapping[str, Any] | None = None,
    schedule: Callable[..., Any] | None = None,
    score: Callable[[nn.Module], Any] | None = None,
    full_trains: FullTrains | None = None,
    **options: Any,
) -> Recipe:
    """Calibrate one model that stays loaded. Its adapters are replaced by new ones at every trial's
    rank::

        def step(model, i):
            x, y = batch(i)
            return F.cross_entropy(model(x), y)

        recipe = ra.calibrate_in_place(model, step, torch.optim.AdamW, ranks=(4, 64), steps=200)

    Each trial starts from the original model with new adapters, a new optimizer, no gradients, and
    the global random state of the trial's seed. The original adapters may be trained already. They
    are kept outside the model. When the call ends, by success, an error or Ctrl-C, the model is
    restored bit for bit: parameters (the same objects), gradients, buffers, modes, requires_grad,
    hooks, attributes and PEFT's configuration. The global random state is restored too.

    Memory: frozen weights are not copied. Buffers, the weights of `full_trains`, and other
    parameters that train (heads, norms) are copied once. The original adapters are kept in addition
    to the trial's.

    A run that is out of memory is pruned, and its memory is released. A run that diverges is
    recorded as diverged.

    Args:
        model: a model with trainable LoRA pairs, or without any for ranks=(None,). Its train or
            eval mode is kept.
        step: `step(model, i)` is called for i = 0, 1, … in every trial. The same i must use the
            same batch. It returns the loss. If this is a tensor with a graph, its gradient is
            taken. Otherwise the step must have computed the gradients itself (in parts, scaled,
            clipped). It must not change frozen weights.
        optimizer: as in `calibrate`.
        ranks: as in `calibrate`.
        steps: as in `calibrate`.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero) for every pair. By
            default each pair's own.
        variance: variance of the drawn factor, as in `initialize`. By default that of the adapter's
            library, which is "peft" for Init[A] and 1/r for Init[B].
        scaling_rule: how the effective multiplier s follows the rank: "fixed" keeps s, so that
            alpha follows the rank. "alpha" keeps alpha with s = alpha / r. "rslora" keeps alpha
            with s = alpha / √r.
        settings: the optimizer's arguments, and those of `RankAwareOptimizer` such as rates=.
        schedule: returns a scheduler for the optimizer, whose warm-up and decay span `steps`, not
            target_steps=. Its step() is called after every step.
        score: returns the number to minimise for the trained model. By default it is the mean of
            the last tenth of the losses.
        full_trains: what full finetuning (None among ranks, or full_trials=) trains: patterns of
            parameter names, or a predicate of name and parameter. By default the weights that the
            adapters adapt. Heads and norms that train with the adapters train in any case.
        **options: other arguments of `calibrate`: name, trials, budget, full_trials, seeds,
            storage, batch, warmup, …

    Returns:
        The recipe.

    Raises:
        InspectionError: the model is sharded or wrapped (FSDP, DeepSpeed, DDP), its adapters are
            merged or are not pairs, or they cannot be made at one of the ranks. Nothing was
            changed.
        CalibrationError: as in `calibrate`. The model is restored.
        CalibrationInterrupted: Ctrl-C. The model is restored. A second Ctrl-C waits until that is
            done.
    """
    if options.get("executor") is not None:
        raise CalibrationError(
            "calibrate_in_place trains the model of this process, but executor= uses other"
            " processes.",
            "Leave it out, or build the model in each trial with ra.calibrate.",
        )
    ranks = plain(ranks)
    walked = _checked(model, step, ranks, init, variance, scaling_rule)
    lora = [rank for rank in ranks if rank is not None]
    adapters = None
    if lora or any(pair.trains for pair in pairs_of(walked.modules)):
        adapters = Adapters(walked, lora, init=init, variance=variance, rule=scaling_rule)
    tries_full = None in ranks or bool(options.get("full_trials"))
    whole = _whole(walked, adapters, full_trains) if tries_full else []
    factors, also = (adapters.factors, adapters.declarations) if adapters else ([], [])
    with Interrupts() as interrupts, seeded(0):
        found = ModelState(walked, changing=whole, unchanged=factors, also=also)
        run = _InPlace(
            model, step, walked, adapters, whole, found, interrupts, settings or {}, schedule, score
        )
        try:
            with interrupts.let_in():
                return calibrate(run, optimizer, ranks=ranks, steps=steps, **options)
        finally:
            found.put_back()


@dataclass(frozen=True)
class _InPlace:
    """The state that all trials share."""

    model: nn.Module
    step: StepFunction
    walked: Walk
    adapters: Adapters | None
    whole: list[nn.Parameter]
    found: ModelState
    interrupts: Interrupts
    settings: Mapping[str, Any]
    schedule: Callable[..., Any] | None
    score: Callable[[nn.Module], Any] | None

    @property
    def __wrapped__(self) -> StepFunction:
        """The user's part of the loop, by which a stored study identifies it."""
        return self.step

    def __call__(self, trial: Trial) -> Generator[Any, None, Any]:
        """Run one trial, from the original model."""
        self.found.put_back()
        self.found.drop_gradients()
        self._prepare(trial)
        opt = trial.optimizer(self.model, **self.settings)
        scheduler = self.schedule(opt) if self.schedule else None
        _set_mode(opt, "train")
        for i in range(trial.steps):
            self.interrupts.listen()
            loss = self._gradients(i)
            opt.step()
            opt.zero_grad()
            if scheduler is not None:
                scheduler.step()
            yield loss
        _set_mode(opt, "eval")
        self.found.check_frozen()
        if self.score is None:
            return None
        with torch.no_grad():
            value = self.score(self.model)
        if value is None:
            raise CalibrationError("score returned None.", "Return the number to minimise.")
        return value

    def _prepare(self, trial: Trial) -> None:
        """Make new adapters at the trial's rank. For full finetuning, disable them and train the
        whole weights.
        """
        for _, module in self.walked.modules:
            if (
                vars(module).get("merge_weights") is True
            ):  # loralib's eval() would write into the base weight
                vars(module)["merge_weights"] = False
        if self.adapters is None:
            return
        factors = self.adapters.remake(trial.rank or self.adapters.rank, trial.seed)
        if trial.rank is not None:
            return
        self.adapters.disable(factors)
        for param in self.whole:
            param.requires_grad_(True)

    def _gradients(self, i: int) -> Any:
        loss = self.step(self.model, i)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            if loss.numel() == 1:
                loss.backward()
            return loss.detach()
        if i == 0 and all(param.grad is None for param in self.model.parameters()):
            what = "tensor" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise CalibrationError(
                f"step returned a {what} without a graph, and left no gradient.",
                "Return the loss of the model with its graph, or call backward() in the step.",
            )
        return loss


def _set_mode(opt: Any, mode: str) -> None:
    """Set the mode of a schedule-free optimizer, which moves the weights between its modes."""
    if callable(getattr(opt, mode, None)):
        getattr(opt, mode)()


# --- what trains ----------------------------------------------------------------------------------


def _whole(
    walked: Walk, adapters: Adapters | None, trains: FullTrains | None
) -> list[nn.Parameter]:
    """Return the parameters that full finetuning trains."""
    chosen: list[tuple[str, Any]]
    if trains is None:
        chosen = adapters.base_weights if adapters else []
    else:
        patterns = () if callable(trains) else tuple(trains)
        is_chosen = (
            trains
            if callable(trains)
            else lambda name, _: any(fnmatchcase(name, p) for p in patterns)
        )
        factors = {id(factor) for factor in adapters.factors} if adapters else set()
        chosen = [(n, p) for n, p in walked.parameters if is_chosen(n, p) and id(p) not in factors]
        if not chosen:
            raise CalibrationError(
                f"full_trains={trains!r} chooses no parameter.", "See model.named_parameters()."
            )
    for name, param in chosen:
        if (
            not isinstance(param, nn.Parameter)
            or not param.is_floating_point()
            or param.is_inference()
        ):
            raise CalibrationError(
                f"The weight of {name} cannot be trained whole: it is quantised, or was not found.",
                "Leave None out of ranks=, or name the parameters that full finetuning trains by"
                " full_trains=.",
            )
    return [param for _, param in chosen]


# --- checks ---------------------------------------------------------------------------------------


def _checked(model: Any, step: Any, ranks: Any, init: Any, variance: Any, rule: Any) -> Walk:
    if not isinstance(model, nn.Module) or not callable(step):
        raise CalibrationError(
            f"calibrate_in_place got a {type(model).__name__} and a {type(step).__name__}.",
            "Give the model, then step(model, i).",
        )
    check_argument("ranks", ranks)
    for what, value, known in (
        ("init", init, ("A", "B", None)),
        ("variance", variance, ("mua", "peft", None)),
        ("scaling_rule", rule, ("fixed", "alpha", "rslora")),
    ):
        if value not in known:
            raise CalibrationError(
                f"{what} is {value!r}.", f"Known are {', '.join(map(repr, known))}."
            )
    walked = walk(model)
    wrapped = (
        type(m).__name__
        for _, m in walked.modules
        if any(c.__name__ in _SHARDED for c in type(m).__mro__)
    )
    split = (
        name for name, p in walked.parameters if hasattr(p, "full_tensor") or hasattr(p, "ds_id")
    )
    found = next(wrapped, None) or next(split, None)
    if found is not None:
        raise InspectionError(
            f"The model is sharded or wrapped ({found}), so its adapters cannot be replaced in"
            " place.",
            "Calibrate before sharding or wrapping it, or with ra.calibrate, which builds the model"
            " in each trial.",
        )
    return walked
