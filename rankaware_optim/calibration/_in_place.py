"""Calibration of a model that is loaded once. Adapters are replaced in place, and the model is
restored at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import plain
from ..errors import CalibrationError, InspectionError
from ..inspection import Adapters, ScalingRule, Walk, pairs_of, walk
from ..recipe import Recipe
from ._api import calibrate
from ._liveness import Interrupts
from ._schedule import check_argument
from ._snapshot import ModelState
from ._trial import Trial, seeded

StepFunction = Callable[[nn.Module, int], Any]
FullTrains = Sequence[str] | Callable[[str, nn.Parameter], bool]
_SHARDED = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


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
        scaling_rule: how the scaling s follows the rank: "fixed" keeps s, so that
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
    lora = [*filter(None, ranks)]
    adapters = None
    if lora or any(pair.trains for pair in pairs_of(walked.modules)):
        adapters = Adapters(
            walked, lora, init=init, variance=variance, rule=scaling_rule
        )
    whole: list[nn.Parameter] = []
    if None in ranks or options.get("full_trials"):
        whole = _whole(walked, adapters, full_trains)

    @wraps(step)  # the user's part of the loop, by which a stored study identifies it
    def run(trial: Trial) -> Generator[Any, None, Any]:
        state.put_back()
        state.drop_gradients()
        _prepare(walked, adapters, whole, trial)
        opt: Any = trial.optimizer(model, **(settings or {}))
        scheduler = schedule(opt) if schedule else None
        _set_mode(opt, "train")
        for i in range(trial.steps):
            interrupts.listen()
            loss = _gradients(model, step, i)
            opt.step()
            opt.zero_grad()
            if scheduler is not None:
                scheduler.step()
            yield loss
        _set_mode(opt, "eval")
        state.check_frozen()
        if score is None:
            return None
        with torch.no_grad():
            value = score(model)
        if value is None:
            raise CalibrationError(
                "score returned None.", "Return the number to minimise."
            )
        return value

    with Interrupts() as interrupts, seeded(0):
        state = ModelState(
            walked,
            changing=whole,
            unchanged=adapters.factors if adapters else (),
            also=adapters.declarations if adapters else (),
        )
        try:
            with interrupts.let_in():
                return calibrate(run, optimizer, ranks=ranks, steps=steps, **options)
        finally:
            state.put_back()


# --- a trial --------------------------------------------------------------------------------------


def _prepare(
    walked: Walk, adapters: Adapters | None, whole: Sequence[nn.Parameter], trial: Trial
) -> None:
    """Make new adapters at the trial's rank. For full finetuning, disable them and train the whole
    weights.
    """
    for _, module in walked.modules:
        # loralib's eval() would write into the base weight.
        if vars(module).get("merge_weights") is True:
            vars(module)["merge_weights"] = False
    if adapters is None:
        return
    factors = adapters.remake(trial.rank or adapters.rank, trial.seed)
    if trial.rank is None:
        adapters.disable(factors)
        for param in whole:
            param.requires_grad_(True)


def _gradients(model: nn.Module, step: StepFunction, i: int) -> Any:
    loss = step(model, i)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        if loss.numel() == 1:
            loss.backward()
        return loss.detach()
    if i == 0 and all(param.grad is None for param in model.parameters()):
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
    chosen: Sequence[tuple[str, Any]] = adapters.base_weights if adapters else []
    if trains is not None:
        chosen = _chosen(walked, adapters.factors if adapters else [], trains)
    for name, param in chosen:
        is_whole = isinstance(param, nn.Parameter) and param.is_floating_point()
        if not is_whole or param.is_inference():
            raise CalibrationError(
                f"The weight of {name} cannot be trained whole: it is quantised, or was not found.",
                "Leave None out of ranks=, or name the parameters that full finetuning trains by"
                " full_trains=.",
            )
    return [param for _, param in chosen]


def _chosen(
    walked: Walk, factors: Sequence[torch.Tensor], trains: FullTrains
) -> list[tuple[str, nn.Parameter]]:
    def matches(name: str, param: nn.Parameter) -> bool:
        if callable(trains):
            return trains(name, param)
        return any(fnmatchcase(name, pattern) for pattern in trains)

    is_factor = set(map(id, factors))
    others = [pair for pair in walked.parameters if id(pair[1]) not in is_factor]
    chosen = [pair for pair in others if matches(*pair)]
    if not chosen:
        raise CalibrationError(
            f"full_trains={trains!r} chooses no parameter.",
            "See model.named_parameters().",
        )
    return chosen


# --- checks ---------------------------------------------------------------------------------------


def _checked(
    model: Any, step: Any, ranks: Any, init: Any, variance: Any, rule: Any
) -> Walk:
    if not isinstance(model, nn.Module) or not callable(step):
        raise CalibrationError(
            f"calibrate_in_place got a {type(model).__name__} and a {type(step).__name__}.",
            "Give the model, then step(model, i).",
        )
    check_argument("ranks", ranks)
    for what, value, values in (
        ("init", init, ("A", "B", None)),
        ("variance", variance, ("mua", "peft", None)),
        ("scaling_rule", rule, ("fixed", "alpha", "rslora")),
    ):
        if value not in values:
            raise CalibrationError(
                f"{what} is {value!r}.", f"Known are {', '.join(map(repr, values))}."
            )
    walked = walk(model)
    sharded = next(_sharded(walked), None)
    if sharded is not None:
        raise InspectionError(
            f"The model is sharded or wrapped ({sharded}), so its adapters cannot be replaced in"
            " place.",
            "Calibrate before sharding or wrapping it, or with ra.calibrate, which builds the model"
            " in each trial.",
        )
    return walked


def _sharded(walked: Walk) -> Iterator[str]:
    """Yield the wrappers and parameters that show that a model is sharded or wrapped."""
    for _, module in walked.modules:
        if not _SHARDED.isdisjoint(kind.__name__ for kind in type(module).__mro__):
            yield type(module).__name__
    for name, param in walked.parameters:
        if hasattr(param, "full_tensor") or hasattr(param, "ds_id"):
            yield name
