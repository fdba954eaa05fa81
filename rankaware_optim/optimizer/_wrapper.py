"""`RankAwareOptimizer`: any torch optimizer, with a rate for every group from a base rate and a
law.

The object is an instance of a cached, direct subclass of the user's optimizer class, so that
schedulers, scalers, trainers and checkpoints accept it. Its groups hold the base rate, which a
scheduler may set. `step` multiplies it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import plain_lr
from .._optimizers import known_optimizer
from .._rate import Rate
from .._types import Init, Method, Survey
from .._warn import warn
from ..errors import CheckpointError, OptimizerError
from ..inspection import ReferenceLike, pairs_of, survey_of, walk
from ..laws import Law, law_words
from ..recipe import Recipe
from ._param_groups import (
    TAGS,
    PlannedGroup,
    UserGroup,
    base_of,
    model_of,
    multiply_for_native,
    own_settings,
    set_rate,
    shrinks_by_decay,
    split,
    user_groups,
)
from ._plan import Plan, PlanOptions, make_plan
from ._rehearsal import check_loadable
from ._report import Report, make_report
from ._state_dict import OnRankChange, Reset, check_on_rank_change, fit_checkpoint
from ._validate import (
    applied_settings,
    check_base_lr,
    from_recipe,
    native_class,
    refuse_groups,
    refuse_inside_zero,
    refuse_rateless,
    refuse_settings,
    run_of,
)

T = TypeVar("T")


@dataclass(frozen=True)
class _Wrap:
    """The state of a wrapped optimizer besides torch's. Copy and pickle keep it.

    order: names by user group, in the given order. survey: of the model before training, since a
    trained pair does not show its init. reset: the parameters whose rank the last checkpoint
    changed.
    """

    plan: Plan
    init: Init | None
    on_rank_change: OnRankChange
    scale_weight_decay: bool
    order: tuple[tuple[str, ...], ...]
    survey: Survey
    reset: tuple[Reset, ...] = ()


class _Meta(type):
    """Makes isinstance(opt, RankAwareOptimizer) true for instances that derive only from the native
    class.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return hasattr(type(instance), "_rankaware_native")

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or hasattr(subclass, "_rankaware_native")


if TYPE_CHECKING:

    class _Base(Optimizer):
        """Accepts any arguments, so that type checkers that read `__init__` and `__new__` use only
        `__new__`.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

else:
    _Base = Optimizer


class RankAwareOptimizer(_Base, metaclass=_Meta):
    """Wrap a torch optimizer so that every LoRA factor gets the rate that a scaling law gives it at
    its rank::

        RankAwareOptimizer(model, torch.optim.AdamW, lr=2e-4, tuned_at=Reference(rank=16, alpha=32), weight_decay=0.01)
        RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=2e-4)
        RankAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-4), model=model)  # returns the same object

    group["lr"] is the base rate, which you, a scheduler or a trainer set. `step` trains at
    group["lr"] × group["rank_multiplier"]. Your groups may be split. They are never merged and keep
    their order. The object is an instance of the given optimizer class.

    Args:
        params: a model (its trainable parameters), parameters or groups with `model=`, or a built
            optimizer.
        optimizer: a torch optimizer class, or its name, such as "adamw" or "torch_optimizer:Lamb".
        model: the model that holds the adapters, if it is not `params`. Only a weak reference is
            kept.
        lr: the base rate, per step, tuned at `tuned_at`. By default the optimizer's own default.
        tuned_at: the configuration at which `lr` was tuned: a `Reference`, a text such as
            "r=16,alpha=32", an adapter's folder or file, or a `LoraConfig`. By default the model's
            most common configuration.
        law: a law or its name, by default "falling". A rate that this default moves keeps a
            distance, × 0.9, since too high costs more than too low. Another law is used as it is.
        recipe: a calibrated recipe, its path or its adapter's folder. It replaces `lr`, `tuned_at`
            and `law`. A warning is given if the optimizer, its settings, batch, steps or warm-up
            differ from the recipe's.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: the adapters' init if it cannot be read: "A" (B starts at zero, as in PEFT) or "B" (A
            starts at zero).
        rates: rates by name pattern, such as {"*classifier*": 1e-3}, for any parameter.
        other_lr: the rate of every parameter that is not a factor, by default the base rate. With a
            recipe the default is the rate of the recipe's trials, else its rate for full
            finetuning. It must be given if there is neither.
        per_layer_width: whether the law uses each layer's fan-in instead of one width for the
            model.
        batch: examples or tokens per step of this run. If `tuned_at` has a batch too, the law's
            rule moves every rate.
        strict: whether to refuse an optimizer without a derived law. Otherwise an unknown one is
            scaled like Adam.
        scale_weight_decay: whether the multiplier also scales a decoupled weight decay, lr ×
            weight_decay.
        on_rank_change: what to do when a checkpoint of another rank is loaded: "raise", or "reset"
            the moments of changed factors.
        native_type: whether to return an instance of the native class, for frameworks that test the
            exact type (DeepSpeed). Its step does not multiply, so the groups' rates are multiplied
            once. Its checkpoints and groups added later are handled by torch alone.
        steps: training steps of this run. With a recipe they move every rate by its horizon.
        warmup_share: share of the steps with a rising rate, compared with the recipe's.
        apply_settings: whether to use the recipe's optimizer settings (weight decay, betas) where
            none are given.
        **settings: the optimizer's own arguments.

    Raises:
        InspectionError: the adapters cannot be read. As with the errors below, nothing was changed.
        InvalidReferenceError: `tuned_at` is impossible.
        LawError: the law is unknown or cannot be used.
        OptimizerError: the optimizer cannot be built or wrapped with these arguments.
        RecipeError: the recipe cannot be read, or has no rate for this model.
    """

    _rankaware: _Wrap
    _rankaware_native: type[Optimizer]
    _rankaware_model: weakref.ref[nn.Module]
    _rankaware_step: Callable[..., Any]
    _rankaware_stepping: bool  # inside a step; the native step may call self.step
    _rankaware_held: Held  # what a step in progress has put in place; a new list after each
    _rankaware_unchecked: (
        bool  # whether its parameters must be checked, after it was built, loaded or extended
    )
    _rankaware_watched: int  # the number of a group of adapters
    _rankaware_idle: bool  # its first parameter had no gradient at the last step

    def __new__(
        cls,
        params: Any,
        optimizer: type[Optimizer] | str | None = None,
        *,
        model: nn.Module | None = None,
        lr: float | Rate | torch.Tensor | None = None,
        tuned_at: ReferenceLike | None = None,
        law: str | Law | None = None,
        recipe: Recipe | str | os.PathLike[str] | None = None,
        method: Method = "lora",
        init: Init | None = None,
        rates: Mapping[str, float | Rate] | None = None,
        other_lr: float | Rate | None = None,
        per_layer_width: bool = False,
        batch: float | None = None,
        strict: bool = False,
        scale_weight_decay: bool = True,
        on_rank_change: OnRankChange = "raise",
        native_type: bool = False,
        steps: int | None = None,
        warmup_share: float | None = None,
        apply_settings: bool = False,
        **settings: Any,
    ) -> RankAwareOptimizer:
        built = params if isinstance(params, Optimizer) else None
        model = model_of(params, model)
        native = native_class(built, optimizer)
        refuse_inside_zero()
        check_on_rank_change(on_rank_change)
        refuse_settings(built, lr, settings)
        loaded, lr, reference, law = from_recipe(recipe, plain_lr(lr), tuned_at, law)
        if apply_settings:
            settings = {**applied_settings(loaded, native, built), **settings}
        options = PlanOptions(
            law, reference, dict(rates or {}), other_lr, per_layer_width, batch, strict
        )
        walked = walk(model)
        survey = survey_of(walked, method=method, init=init)
        lr = lr if loaded is None else loaded.base_lr(survey)
        given = settings if built is None else built.defaults
        own = user_groups(params if built is None else built.param_groups, model, walked)
        check_base_lr(native, built, lr, own if reference is not None else ())
        if (
            built is not None and lr is not None
        ):  # a recipe's rate replaces those with which it was built
            own = [group.without("lr") for group in own]
        run = run_of(
            loaded, native, given, own, survey, batch=batch, steps=steps, warmup_share=warmup_share
        )
        plan = make_plan(survey, options, native, given, loaded, run)
        also = _frozen(own)
        survey = survey_of(walked, method=method, init=init, also=also) if also else survey
        planned = split(own, plan, survey)
        refuse_groups(native, own)
        opt: RankAwareOptimizer = (
            _construct(native, planned, lr, settings)
            if built is None
            else _regroup(built, native, planned, lr)
        )
        if native_type:
            for group in opt.param_groups:
                multiply_for_native(group, not scale_weight_decay and shrinks_by_decay(opt, group))
            opt.__class__ = native  # type: ignore[assignment]
            return opt
        order = tuple(group.names for group in own)
        opt._rankaware = _Wrap(plan, init, on_rank_change, scale_weight_decay, order, survey)
        opt._rankaware_model = weakref.ref(model)
        adapters = [
            i for i, group in enumerate(opt.param_groups) if group["lora_role"] in ("A", "B")
        ]
        opt._rankaware_watched = adapters[0] if adapters else 0
        _LIVE.add(opt)
        return opt

    def report(self, *, per_module: bool = False) -> Report:
        """Return a table of the groups with their current rates, the reasons for them, and what to
        check.

        Args:
            per_module: whether to list every tensor instead of every group.
        """
        wrap = self._rankaware
        title = f"RankAwareOptimizer({type(self).__name__}), law {law_words(wrap.plan.law)}"
        return make_report(self.param_groups, wrap.plan, title, wrap.survey, wrap.reset, per_module)

    def expand(self, values: Sequence[T]) -> list[T]:
        """Repeat values for the groups that were split, for schedulers that take a list.

        Args:
            values: one value for each of the user's groups.

        Returns:
            One value for each group of this optimizer.

        >>> model = torch.nn.Module()
        >>> model.lora_A, model.lora_B = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(8, 64, bias=False)
        >>> model.r, model.scaling, _ = 8, 1.0, torch.nn.init.zeros_(model.lora_B.weight)
        >>> RankAwareOptimizer(model, "adamw", lr=1e-3).expand([2e-3])
        [0.002, 0.002]
        """
        if len(values) != len(self._rankaware.order):
            raise OptimizerError(
                f"{len(values)} values were given for {len(self._rankaware.order)} user groups.",
                "Give one for each group from which the optimizer was built.",
            )
        return [values[group["user_group"]] for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which is split and scaled like those at construction. Names are taken from
        the model.

        Args:
            param_group: the group, as for torch.
        """
        native, inner = type(self)._rankaware_native, getattr(self, "optimizer", None)
        if isinstance(
            inner, RankAwareOptimizer
        ):  # Lightning and Fabric derive a class of theirs from ours
            inner.add_param_group(param_group)
            return
        if "_rankaware" not in self.__dict__:  # inside __init__, whose groups are planned already
            native.add_param_group(self, param_group)
            return
        model = _held_model(self)
        if model is None and "rankaware_format" in param_group:
            tags = {key: param_group[key] for key in TAGS if key in param_group}
            native.add_param_group(self, {**own_settings(param_group), **tags})
            return
        if model is None:
            raise OptimizerError(
                "This optimizer is a copy, or its model is gone, so a new group has no rate.",
                "Wrap again with model=, or add groups made by rank_aware_param_groups.",
            )
        wrap, walked = self._rankaware, walk(model)
        own = user_groups([param_group], model, walked, first=len(wrap.order), outside=True)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        refuse_groups(native, own, held)
        survey = survey_of(
            walked, method=wrap.plan.method, init=wrap.init, also=_frozen(own) | held
        )
        made = []
        for planned in split(own, wrap.plan, survey, first=len(wrap.order)):
            made.append(
                {
                    "lr": self.defaults.get("lr"),
                    **planned.as_dict(named="param_names" in self.param_groups[0]),
                }
            )
            set_rate(made[-1])
        for group in made:
            native.add_param_group(self, group)
        known = {f.name for f in wrap.survey.factors}
        added = (f for f in survey.factors if f.name not in known)
        order = (*wrap.order, *(group.names for group in own))
        self._rankaware = replace(
            wrap, order=order, survey=replace(survey, factors=(*wrap.survey.factors, *added))
        )
        self._rankaware_unchecked = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint by parameter name. Ranks and shapes are compared, which torch does not
        do.

        Rates in it are base rates, also those of a plain optimizer. The multipliers of this
        optimizer are kept. A warning is given if the checkpoint's differ. Explicit rates (`rates`,
        `other_lr`) do not follow the base rate. Another rank is treated as `on_rank_change` says.

        Args:
            state_dict: the result of an optimizer's state_dict().

        Raises:
            CheckpointError: the checkpoint does not fit. Nothing was loaded.
        """
        wrap, model, native, before = (
            self._rankaware,
            _held_model(self),
            type(self)._rankaware_native,
            dict(vars(self)),
        )
        default = [
            base_of(group) == self.defaults.get("lr") for group in self.param_groups
        ]  # those without own lr

        def model_order() -> list[str]:
            return [] if model is None else [name for name, _ in walk(model).parameters]

        try:
            fitted, reset = fit_checkpoint(
                self.param_groups, state_dict, wrap.on_rank_change, wrap.order, model_order
            )
            check_loadable(native, self.defaults, self.param_groups, fitted)
            native.load_state_dict(self, fitted)
        except BaseException as error:
            vars(self).clear()
            vars(self).update(before)
            if isinstance(error, (CheckpointError, Warning)) or not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"The checkpoint cannot be loaded: {error!r}.",
                "Give the result of optimizer.state_dict() of the same optimizer class.",
            ) from error
        self._rankaware = replace(wrap, reset=reset)
        self._rankaware_unchecked = True
        base = next(
            (
                base_of(group)
                for group, takes in zip(self.param_groups, default, strict=True)
                if takes
            ),
            None,
        )
        if base is not None and float(base) > 0:
            self.defaults["lr"] = base.clone() if isinstance(base, torch.Tensor) else base

    def state_dict(self) -> dict[str, Any]:
        """Return the state with base rates, also during a step: in a signal handler, or in another
        thread.
        """
        return _at_base_rates(self, lambda: type(self)._rankaware_native.state_dict(self))

    def __getstate__(self) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            state = type(self)._rankaware_native.__getstate__(self)
            groups = [dict(group) for group in state["param_groups"]]
            return {**state, "param_groups": groups, "_rankaware": self._rankaware}

        return _at_base_rates(self, read)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._rankaware_native,), self.__getstate__()

    def __repr__(self) -> str:
        return f"RankAware{type(self)._rankaware_native.__repr__(self)}"


def recipe_of(opt: Any) -> Recipe | None:
    """Return the recipe of an optimizer, also inside the wrappers of frameworks; None if it has
    none.
    """
    while not isinstance(opt, RankAwareOptimizer) and hasattr(opt, "optimizer"):
        opt = opt.optimizer
    return opt._rankaware.plan.recipe if isinstance(opt, RankAwareOptimizer) else None


_STATE = ("state_dict", "load_state_dict", "__getstate__", "__reduce_ex__")
_OVERRIDES = ("add_param_group", *_STATE, "__repr__", "report", "expand")
_SUBCLASSES: dict[type, Any] = {}
_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that were built, not copied


def _subclass(native: type[Optimizer]) -> Any:
    """Return the rank-aware subclass of `native`, with its name and module. It is made once."""
    if native not in _SUBCLASSES:
        namespace: dict[str, Any] = {name: RankAwareOptimizer.__dict__[name] for name in _OVERRIDES}
        namespace |= {
            "__module__": native.__module__,
            "__qualname__": native.__qualname__,
            "__doc__": native.__doc__,
        }
        steps = ("step", *known_optimizer(native)[1].steps)
        namespace |= {
            "_rankaware_native": native,
            "__init__": _refusing(native),
            **{name: _step_of(getattr(native, name)) for name in steps},
        }
        namespace |= {
            "_rankaware_stepping": False,
            "_rankaware_unchecked": True,
            "_rankaware_idle": False,
        }
        namespace |= {"_rankaware_watched": 0, "_rankaware_held": []}
        _SUBCLASSES[native] = type(native)(native.__name__, (native,), namespace)  # type: ignore[misc]
    return _SUBCLASSES[native]


def _refusing(native: type[Optimizer]) -> Callable[..., None]:
    """Return an `__init__` that raises for `type(opt)(...)`, since the new optimizer would have no
    plan.
    """

    @wraps(native.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_inside_zero()
        raise OptimizerError(
            f"The class of a RankAwareOptimizer cannot be called, since a new {native.__name__}"
            " would have no rates.",
            f"Build RankAwareOptimizer(model, {native.__name__}, ...), or a plain"
            f" {native.__name__}.",
        )

    return __init__


def _blank(native: type[Optimizer]) -> Any:
    """Return an instance without state, for copy and pickle."""
    made = _subclass(native)
    return made.__new__(made)


def _held_model(opt: Optimizer) -> nn.Module | None:
    """Return the model; None if it is gone or the optimizer is a copy."""
    found: nn.Module | None = vars(opt).get("_rankaware_model", lambda: None)()
    return found


def _frozen(groups: Iterable[UserGroup]) -> set[int]:
    """Return the ids of frozen parameters that the user listed, since they get a rate if they train
    later.
    """
    return {id(p) for group in groups for _, p in group.named if not p.requires_grad}


def _construct(
    native: type[Optimizer], planned: list[PlannedGroup], lr: Any, settings: Mapping[str, Any]
) -> Any:
    """Build the optimizer. Groups are split before the native __init__, which may copy them, and
    scaled after it.
    """
    opt = _blank(native)
    given = settings if lr is None else {"lr": lr, **settings}
    native.__init__(opt, [group.as_dict() for group in planned], **given)
    refuse_rateless(opt)
    placed = {tuple(id(p) for _, p in part.named): part for part in planned}
    parts = [placed.pop(tuple(map(id, group["params"])), None) for group in opt.param_groups]
    for group, part in zip(opt.param_groups, parts, strict=True):
        if placed or part is None or group.get("rank_multiplier") != part.assignment.multiplier:
            raise OptimizerError(
                f"{native.__name__} rearranges its groups when it is built, so rates would go to"
                " the wrong groups.",
                f"Build it, then wrap it: RankAwareOptimizer({native.__name__}(model.parameters(),"
                " ...), model=model).",
            )
        set_rate(group)
    return opt


def _regroup(
    built: Optimizer, native: type[Optimizer], planned: list[PlannedGroup], lr: Any
) -> Any:
    """Replace the groups of a built optimizer in place, and its class. Per-parameter state is kept."""
    given = {} if lr is None else {"lr": lr}
    groups = [
        {**part.as_dict(named=False), "param_names": [name for name, _ in part.named], **given}
        for part in planned
    ]
    for group in groups:
        set_rate(group)
    built.defaults.update(given)
    built.param_groups[:] = groups
    built.__class__ = _subclass(native)
    built._patch_step_function()  # torch hooks `step` by class
    return built


# --- the step -------------------------------------------------------------------------------------

Held = list[
    tuple[dict[str, Any], Any, Any, Any]
]  # group, its base rate, its multiplied rate, its weight decay


def _step_of(native: Any) -> Callable[..., Any]:
    """Return a native step at multiplied rates. It is called without torch's hooks, which wrap this
    function.
    """
    stepped = native.__wrapped__ if getattr(native, "hooked", False) else native

    @wraps(stepped)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rankaware_stepping:  # the native step calls self.step
            return stepped(self, *args, **kwargs)
        closure = args[0] if args else kwargs.get("closure")
        if closure is None:
            _check(self)
        else:
            at_base = _closure_at_base_rates(self, closure)
            args, kwargs = (
                ((at_base, *args[1:]), kwargs) if args else ((), {**kwargs, "closure": at_base})
            )
        self._rankaware_stepping = True
        try:
            _multiply(self)
            return stepped(self, *args, **kwargs)
        finally:
            _put_back(self)
            self._rankaware_stepping = False

    return step


@torch.compiler.disable  # type: ignore[untyped-decorator]  # with tensor rates it would be a separate graph
def _multiply(opt: Any) -> None:
    """Set every group's rate to base rate × multiplier."""
    groups, keep_decay = opt.param_groups, not opt._rankaware.scale_weight_decay
    bases = [group["lr"] for group in groups]
    multipliers = [group.get("rank_multiplier", 1.0) for group in groups]
    rates: Sequence[Any]
    if bases and all(isinstance(base, torch.Tensor) for base in bases):
        rates = torch._foreach_mul(bases, multipliers)  # one call for all groups
    else:
        rates = [base * multiplier for base, multiplier in zip(bases, multipliers, strict=True)]
    decays = [group.get("weight_decay") for group in groups]
    opt._rankaware_held = list(
        zip(groups, bases, rates, decays, strict=True)
    )  # before a rate changes, for a save
    for group, rate, multiplier in zip(groups, rates, multipliers, strict=True):
        group["lr"] = rate
        if keep_decay and shrinks_by_decay(opt, group):
            group["weight_decay"] = group["weight_decay"] / multiplier


def _put_back(opt: Any) -> None:
    """Restore the base rates. A rate that the optimizer wrote itself is kept, divided by the
    multiplier.
    """
    for group, base, rate, decay in opt._rankaware_held:
        now = group["lr"]
        group["lr"] = base if now is rate else now / group.get("rank_multiplier", 1.0)
        if decay is not None:
            group["weight_decay"] = decay
    opt._rankaware_held = []


def _at_base_rates(opt: Any, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return read(), whose groups are copies, with base rates. It is read again if a step began or
    ended meanwhile.
    """
    while True:
        held = opt._rankaware_held
        made = read()
        if opt._rankaware_held is held:
            break
    for group, (_, base, _, decay) in zip(made["param_groups"], held, strict=False):
        group["lr"] = base
        if decay is not None:
            group["weight_decay"] = decay
    return made


def _closure_at_base_rates(opt: Any, closure: Callable[..., Any]) -> Callable[..., Any]:
    """Return the closure, run at base rates, which it may change. Lightning runs a whole training
    step in it.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        _put_back(opt)
        opt._rankaware_stepping = False
        try:
            loss = closure(*args, **kwargs)
            _check(opt)
            return loss
        finally:
            opt._rankaware_stepping = True
            _multiply(opt)

    return run


def _check(opt: Any) -> None:
    """Check the parameters when there are new ones, and when the watched one stops getting
    gradients.
    """
    if torch.compiler.is_compiling():
        return
    watched = opt.param_groups[opt._rankaware_watched :][:1]  # none, if the user cleared the groups
    idle = all(param.grad is None for group in watched for param in group["params"][:1])
    if opt._rankaware_unchecked or (idle and not opt._rankaware_idle):
        _check_parameters(opt)
    opt._rankaware_idle = idle


def _check_parameters(opt: Any) -> None:
    """Check that the parameters held here get the gradients of the model, so that training does not
    fail silently.

    fully_shard and a re-created adapter replace the tensors under the names held here. Activating
    another adapter leaves those held here without gradients. A dry step without rates, as
    torch.distributed.checkpoint makes, is not checked, nor is one without any gradient, nor are
    parameters that another RankAwareOptimizer holds.
    """
    model = _held_model(opt)
    if not any(float(group["lr"]) for group in opt.param_groups):
        return
    held = {id(p): p for group in opt.param_groups for p in group["params"]}
    if model is None or all(p.grad is not None for p in held.values()):
        opt._rankaware_unchecked = False
        return
    walked = walk(model)
    graded = {name: p for name, p in walked.parameters if p.grad is not None}
    if not graded:
        return
    opt._rankaware_unchecked = False
    elsewhere = {
        id(p)
        for other in _LIVE
        if other is not opt
        for group in other.param_groups
        for p in group["params"]
    }
    lost = {name: p for name, p in graded.items() if id(p) not in held.keys() | elsewhere}
    named = [
        pair
        for g in opt.param_groups
        for pair in zip(g.get("param_names", ()), g["params"], strict=False)
    ]
    replaced = [name for name, p in named if name in lost and p.grad is None]
    pairs = (
        {id(half.tensor) for pair in pairs_of(walked.modules) for half in (pair.a, pair.b)}
        if lost
        else set()
    )
    adapters = [name for name, p in lost.items() if id(p) in pairs]
    idle = not any(p.grad is not None for p in held.values())
    gone = held.keys().isdisjoint(id(p) for _, p in walked.parameters)  # FSDP1 flattens them
    if replaced or (idle and (adapters or (lost and gone))):
        name = next(iter(replaced or adapters or lost))
        raise OptimizerError(
            f"The model's {name} has a gradient and is not held by this optimizer, "
            + (
                "whose tensor of that name has none"
                if replaced
                else "none of whose parameters has one"
            )
            + ": the model's parameters were replaced, or another adapter was activated, after it"
            " was built.",
            "Shard or wrap the model first (fully_shard, FSDP), with its adapters, then build the"
            " optimizer.",
        )
    factors = [p for g in opt.param_groups if g.get("lora_role") in ("A", "B") for p in g["params"]]
    if adapters and factors and all(p.grad is None for p in factors):
        warn(
            f"None of this optimizer's adapters has a gradient, but {adapters[0]}, which it does"
            " not hold, has one and does not train. Build the optimizer after the adapter was"
            " added and activated."
        )
