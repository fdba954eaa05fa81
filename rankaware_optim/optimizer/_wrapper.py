"""`RankAwareOptimizer`: any torch optimizer, with a rate for every group from a base rate and a law.

The object is an instance of a cached, direct subclass of the user's own optimizer class, so schedulers, scalers,
trainers and checkpoints see what they know. `step` is never overridden.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import check_lr, plain_lr
from .._rate import Rate
from .._types import Init, Method, Reference, Survey
from ..errors import OptimizerError, RankAwareWarning
from ..inspection import survey_of, walk
from ..laws import Law, law_words
from ..recipe import Recipe
from ._param_groups import PlannedGroup, UserGroup, model_of, scale_lr, split, user_groups
from ._plan import Plan, PlanOptions, make_plan
from ._report import Report, make_report
from ._schedulers import attached_schedulers, check_scheduler
from ._state_dict import Carried, OnLawChange, OnRankChange, Policy, fit_checkpoint
from ._validate import check_base_lr, from_recipe, native_class, refuse_groups, refuse_rateless, refuse_settings


@dataclass(frozen=True)
class _Wrap:
    """What a wrapped optimizer knows beside torch's own: kept by copy and pickle.

    order: names by user group, in the order they were given. survey: as inspected before training, since a trained
    pair does not show its init. carried: what the last checkpoint of another rank left.
    """

    plan: Plan
    init: Init | None
    policy: Policy
    scale_weight_decay: bool
    order: tuple[tuple[str, ...], ...]
    survey: Survey
    carried: tuple[Carried, ...] = ()


class _Meta(type):
    """Lets isinstance(opt, RankAwareOptimizer) be true of instances that derive from the native class alone."""

    def __instancecheck__(cls, instance: object) -> bool:
        return hasattr(type(instance), "_rankaware_native")

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or hasattr(subclass, "_rankaware_native")


if TYPE_CHECKING:

    class _Base(Optimizer):
        """Takes any arguments, so that checkers which read `__init__` beside `__new__` go by `__new__` alone."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
else:
    _Base = Optimizer


class RankAwareOptimizer(_Base, metaclass=_Meta):
    """Wrap a torch optimizer so that every LoRA factor, at whatever rank, gets the rate its law gives it.

        RankAwareOptimizer(model, torch.optim.AdamW, lr=2e-4, tuned_at=Reference(rank=16, alpha=32), weight_decay=0.01)
        RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=2e-4)
        RankAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-4), model=model)      # the same object back

    group["lr"] = base rate × group["lr_multiplier"]; a user's own groups are split, never merged, and their rates
    multiplied. The object is an instance of the optimizer class given.

    Args:
        params: a model (its trainable parameters), parameters or groups with `model=`, or a built optimizer.
        optimizer: a torch optimizer class, or its name: "adamw", "torch_optimizer:Lamb".
        model: the model that holds the adapters, where `params` is not it. It is held weakly.
        lr: the base rate, per step, tuned at `tuned_at`; by default the optimizer's own default.
        tuned_at: the configuration `lr` was tuned at; by default the model's own most common one.
        law: a law or its name; default "falling".
        recipe: a calibrated recipe or its path, in place of `lr`, `tuned_at` and `law`.
        method: "full" for full finetuning of a model without adapters.
        init: names the adapters' init where it cannot be read ("A", "B").
        rates: rates by name pattern, as {"*classifier*": 1e-3}, for any parameter.
        other_lr: the rate of every parameter that is no factor; by default the base rate.
        per_layer_width: give the law each layer's own fan-in rather than one width for the model.
        across_inits: let the law carry the rate from the reference's init to another.
        batch: this run's examples or tokens a step; where `tuned_at` names one too, the law's rule moves every rate.
        strict: refuse an optimizer of a family that no law is derived for, rather than scale it as Adam's kind.
        scale_weight_decay: a decoupled decay is lr × weight_decay, so a multiplier scales it; False keeps the product.
        on_rank_change: where a checkpoint of another rank is loaded: "raise", "reset" the moments of changed factors,
            or "resize" them along the rank; the rates are derived anew.
        on_law_change: where a checkpoint of another law is loaded at equal rank: "keep" its rates, or "rederive".
        native_type: give an instance of the class itself, for frameworks that test the exact type (DeepSpeed); its
            groups are scaled, checkpoints and later groups are torch's own affair.
        **settings: the optimizer's own arguments.

    Raises:
        InspectionError, InvalidReferenceError, LawError, OptimizerError, RecipeError: before anything was changed.
    """

    _rankaware: _Wrap
    _rankaware_native: type[Optimizer]
    _rankaware_model: weakref.ref[nn.Module]

    def __new__(
        cls,
        params: Any,
        optimizer: type[Optimizer] | str | None = None,
        *,
        model: nn.Module | None = None,
        lr: float | Rate | torch.Tensor | None = None,
        tuned_at: Reference | None = None,
        law: str | Law | None = None,
        recipe: Recipe | str | os.PathLike[str] | None = None,
        method: Method = "lora",
        init: Init | None = None,
        rates: Mapping[str, float | Rate] | None = None,
        other_lr: float | Rate | None = None,
        per_layer_width: bool = False,
        across_inits: bool = False,
        batch: float | None = None,
        strict: bool = False,
        scale_weight_decay: bool = True,
        on_rank_change: OnRankChange = "raise",
        on_law_change: OnLawChange = "keep",
        native_type: bool = False,
        **settings: Any,
    ) -> RankAwareOptimizer:
        built = params if isinstance(params, Optimizer) else None
        model = model_of(params, model)
        native = native_class(built, optimizer)
        policy = Policy(on_rank_change, on_law_change)
        refuse_settings(built, lr, settings)
        loaded, lr, tuned_at, law = from_recipe(recipe, plain_lr(lr), tuned_at, law)
        options = PlanOptions(law, tuned_at, dict(rates or {}), other_lr, per_layer_width, across_inits, batch, strict)
        walked = walk(model)
        survey = survey_of(walked, method=method, init=init)
        given = settings if built is None else built.defaults
        plan = make_plan(survey, options, native, given, loaded)
        check_base_lr(native, built, lr)
        own = user_groups(params if built is None else built.param_groups, model, walked)
        also = _frozen(own)
        survey = survey_of(walked, method=method, init=init, also=also) if also else survey
        planned = split(own, plan, survey)
        refuse_groups(native, own)
        opt: RankAwareOptimizer = (
            _construct(native, planned, lr, settings) if built is None else _regroup(built, native, planned, lr)
        )
        for group, part in zip(opt.param_groups, planned, strict=True):
            scale_lr(group, part.assignment, scale_weight_decay=scale_weight_decay)
        if native_type:
            opt.__class__ = native  # type: ignore[assignment]
            return opt
        order = tuple(group.names for group in own)
        opt._rankaware = _Wrap(plan, init, policy, scale_weight_decay, order, survey)
        opt._rankaware_model = weakref.ref(model)
        if hasattr(opt, "_optimizer_step_pre_hooks"):
            opt.register_step_pre_hook(_FirstStep())
        return opt

    def report(self, *, per_module: bool = False) -> Report:
        """Per group, or with per_module per tensor: what it is, its present rate, why, and what to check."""
        wrap = self._rankaware
        title = f"RankAwareOptimizer({type(self).__name__}), law {law_words(wrap.plan.law)}"
        return make_report(self.param_groups, wrap.plan, title, wrap.survey, wrap.carried, per_module)

    def scaled(self, value: float | Sequence[float]) -> list[float]:
        """`value` for every group, times its multiplier: what a scheduler with an absolute limit should be given.

        A sequence holds one value for each of the user's own groups.
        """
        groups, value = self.param_groups, plain_lr(value)
        if isinstance(value, (int, float)):
            return [value * group["lr_multiplier"] for group in groups]
        if len(value) != len(self._rankaware.order):
            raise OptimizerError(
                f"{len(value)} values were given for {len(self._rankaware.order)} groups of the user's own.",
                "Give one number, or one for each group the optimizer was built from.",
            )
        return [value[group["user_group"]] * group["lr_multiplier"] for group in groups]

    def set_base_lr(self, lr: float | Rate, scheduler: Any = None) -> None:
        """Move the base rate; every group keeps its multiplier, those with a rate of their own keep that.

        A scheduler holds base rates of its own: give it, and they are moved too.
        """
        lr = check_lr(lr)
        if scheduler is None and attached_schedulers(self):
            raise OptimizerError(
                "A scheduler is attached and would restore its own base rates.", "Pass it: set_base_lr(lr, scheduler)."
            )
        pinned = self._rankaware.plan
        base = self.defaults.get("lr", pinned.base_of(self.param_groups))  # some optimizers have no default
        if base is None:
            raise OptimizerError("Every group has a rate of its own.", "Set theirs: there is no base rate to move.")
        ratio = lr / float(base)
        moved = [not pinned.has_own_rate(group) for group in self.param_groups]
        for group, move in zip(self.param_groups, moved, strict=True):
            for key in ("lr", "initial_lr") if move else ():
                if key in group:
                    group[key] = group[key] * ratio
        _note_base(self, lr)
        for part in () if scheduler is None else (scheduler, *getattr(scheduler, "_schedulers", ())):
            if hasattr(part, "base_lrs"):
                part.base_lrs = [b * ratio if move else b for b, move in zip(part.base_lrs, moved, strict=True)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the user's group, split and scaled like those at construction; names are filled in from the model."""
        native = type(self)._rankaware_native
        if "lr_multiplier" in param_group or "_rankaware" not in self.__dict__:  # planned, or inside __init__
            native.add_param_group(self, param_group)
            return
        model = _held_model(self)
        if model is None:
            raise OptimizerError(
                "This optimizer, a copy or one that outlived it, does not hold its model, so a new group has no rate.",
                "Wrap again with model=, or add groups made by rank_aware_param_groups.",
            )
        wrap, walked = self._rankaware, walk(model)
        own = user_groups([param_group], model, walked)
        refuse_groups(native, own, held={id(p) for group in self.param_groups for p in group["params"]})
        survey = survey_of(walked, method=wrap.plan.method, init=wrap.init, also=_frozen(own))
        for planned in split(own, wrap.plan, survey, first=len(wrap.order)):
            native.add_param_group(self, planned.as_dict(named="param_names" in self.param_groups[0]))
            scale_lr(self.param_groups[-1], planned.assignment, scale_weight_decay=wrap.scale_weight_decay)
        known = {f.name for f in wrap.survey.factors}
        added = (f for f in survey.factors if f.name not in known)
        order = (*wrap.order, *(group.names for group in own))
        self._rankaware = replace(wrap, order=order, survey=replace(survey, factors=(*wrap.survey.factors, *added)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint by parameter name, after comparing ranks and shapes; torch itself compares none of these.

        A plain optimizer's checkpoint is adopted and its rates multiplied. Another rank or law is treated as
        `on_rank_change` and `on_law_change` say.

        Raises:
            CheckpointError: the checkpoint does not fit; nothing was loaded.
        """
        wrap, model = self._rankaware, _held_model(self)
        orders = [[name for group in wrap.order for name in group]]
        if model is not None:
            orders.append([name for name, _ in walk(model).parameters])
        groups, fitted, carried = fit_checkpoint(self.param_groups, state_dict, wrap.policy, orders)
        if len(groups) != len(self.param_groups):
            self.param_groups[:] = groups
        type(self)._rankaware_native.load_state_dict(self, fitted)
        self._rankaware = replace(wrap, carried=carried)
        base = wrap.plan.base_of(self.param_groups)
        if base is not None:
            _note_base(self, base)

    def __getstate__(self) -> dict[str, Any]:
        return {**type(self)._rankaware_native.__getstate__(self), "_rankaware": self._rankaware}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._rankaware_native,), self.__getstate__()

    def __repr__(self) -> str:
        return f"RankAware{type(self)._rankaware_native.__repr__(self)}"


_OVERRIDES = ("add_param_group", "load_state_dict", "__getstate__", "__reduce_ex__", "__repr__")
_ADDITIONS = ("report", "scaled", "set_base_lr")
_SUBCLASSES: dict[type, Any] = {}


def _subclass(native: type[Optimizer]) -> Any:
    """The rank-aware subclass of `native`, made once: its own name and module, ours only what is listed above."""
    if native not in _SUBCLASSES:
        namespace: dict[str, Any] = {name: RankAwareOptimizer.__dict__[name] for name in (*_OVERRIDES, *_ADDITIONS)}
        namespace |= {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
        namespace |= {"_rankaware_native": native}
        _SUBCLASSES[native] = type(native)(native.__name__, (native,), namespace)  # type: ignore[misc]
    return _SUBCLASSES[native]


def _note_base(opt: Optimizer, lr: float) -> None:
    base = opt.defaults.get("lr")
    if base is not None:  # else it is read off the groups
        opt.defaults["lr"] = torch.full_like(base, lr) if isinstance(base, torch.Tensor) else lr


def _blank(native: type[Optimizer]) -> Any:
    """An instance without state, for copy and pickle to fill."""
    made = _subclass(native)
    return made.__new__(made)


def _held_model(opt: Optimizer) -> nn.Module | None:
    """The model, unless it is gone or the optimizer is a copy."""
    found: nn.Module | None = vars(opt).get("_rankaware_model", lambda: None)()
    return found


def _frozen(groups: Iterable[UserGroup]) -> set[int]:
    """Frozen parameters that the user listed, by id: thawed later, they are to have their own rate."""
    return {id(p) for group in groups for _, p in group.named if not p.requires_grad}


def _construct(native: type[Optimizer], planned: list[PlannedGroup], lr: Any, settings: Mapping[str, Any]) -> Any:
    """Groups are split before the native __init__, which may snapshot them; their rates are scaled after it."""
    opt = _blank(native)
    given = settings if lr is None else {"lr": lr, **settings}
    native.__init__(opt, [group.as_dict() for group in planned], **given)
    refuse_rateless(opt)
    return opt


def _regroup(built: Optimizer, native: type[Optimizer], planned: list[PlannedGroup], lr: Any) -> Any:
    """The same object, its groups replaced in place and its class swapped; per-parameter state stays as it is."""
    given = {} if lr is None else {"lr": lr}
    built.defaults.update(given)
    built.param_groups[:] = [
        {**group.as_dict(named=False), "param_names": [name for name, _ in group.named], **given} for group in planned
    ]
    built.__class__ = _subclass(native)
    return built


# --- the first step -------------------------------------------------------------------------------------------------


class _FirstStep:
    """A step pre-hook that looks once, at the first step, for two accidents that train wrongly in silence.

    It stays registered and only tests a flag: a hook cannot remove itself while another follows.
    """

    done = False

    def __call__(self, opt: Any, args: Any, kwargs: Any) -> None:
        self.done = self.done or _look_once(opt)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _look_once(opt: Any) -> bool:
    """Whether this was a step: torch.distributed.checkpoint makes a dry one, at no rate, to have state to fill."""
    _refuse_replaced(opt)
    if not any(float(group.get("lr", 1.0)) for group in opt.param_groups):
        return False
    ratios = len({group.get("lr_multiplier", 1.0) for group in opt.param_groups}) > 1
    for scheduler in attached_schedulers(opt) if ratios else ():  # it searches the heap
        for sentence in check_scheduler(opt, scheduler):
            warnings.warn(sentence, RankAwareWarning, stacklevel=5)
    return True


def _refuse_replaced(opt: Any) -> None:
    """fully_shard after the optimizer was built replaces the model's parameters: the old ones never get a gradient."""
    model = _held_model(opt)
    held = [p for group in opt.param_groups for p in group["params"]]
    if model is None or any(p.grad is not None for p in held):
        return
    ours = {id(p) for p in held}
    lost = [name for name, p in walk(model).parameters if p.grad is not None and id(p) not in ours]
    if lost:
        raise OptimizerError(
            f"No parameter of this optimizer has a gradient, while the model's {lost[0]} has: the model's parameters "
            "were replaced after the optimizer was built.",
            "Shard or wrap the model first (fully_shard, FSDP), then build the optimizer.",
        )
