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
from inspect import isfunction, signature
from itertools import compress, groupby
from operator import mul
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import is_number, plain_lr
from .._optimizers import in_force
from .._rate import Rate
from .._types import Init, Method, Survey
from .._warn import warn
from ..errors import CheckpointError, OptimizerError
from ..inspection import ReferenceLike, survey_of, walk
from ..laws import Law
from ..recipe import Recipe
from ._param_groups import (
    Group,
    Models,
    Native,
    UserGroup,
    base_of,
    model_of,
    named_params,
    params_in,
    rated,
    refuse_outside,
    set_rate,
    split,
    together,
    user_groups,
)
from ._plan import Plan, PlanOptions, Settings, make_plan
from ._report import Report, make_report, origin
from ._state_dict import fit_checkpoint
from ._unmoved import (
    EPSILON_AT,
    Trained,
    epsilon,
    highest_rate,
    rounding,
    trained_by,
)
from ._validate import (
    check_base_lr,
    check_parameters,
    read_recipe,
    read_source,
    refuse_groups,
    refuse_inside_zero,
    refuse_rateless,
    settings_of_built,
    use_recipe,
)

T = TypeVar("T")


@dataclass(frozen=True)
class _Wrap:
    """The state of a wrapped optimizer besides torch's. Copy and pickle keep it.

    survey: with the factors that do not train yet. order: names by user group, in the given order.
    """

    plan: Plan
    survey: Survey
    init: Init | None
    order: tuple[tuple[str, ...], ...]


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

        RankAwareOptimizer(model, torch.optim.AdamW, lr=2e-4, tuned_at="r=16,alpha=32")
        RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=2e-4)

        adamw = torch.optim.AdamW(model.parameters(), lr=2e-4)
        RankAwareOptimizer(adamw, model=model)  # returns the same object

    group["lr"] is the base rate, which you, a scheduler or a trainer set. `step` trains at
    group["lr"] × group["rank_multiplier"]. Your groups may be split. They are never merged and keep
    their order. The object is an instance of the given optimizer class.

    Args:
        params: a model (its trainable parameters), parameters or groups with `model=`, or a built
            optimizer.
        optimizer: a torch optimizer class, or its name, such as "adamw" or "torch_optimizer:Lamb".
        model: the model that holds the adapters, if it is not `params`, or a list of several, as
            [unet, text_encoder]. Only weak references are kept.
        lr: the base rate, per step, tuned at `tuned_at`. By default the optimizer's own default,
            with a warning, since nobody tuned it.
        tuned_at: the configuration at which `lr` was tuned: a `Reference`, a text such as
            "r=16,alpha=32", a dict such as {"r": 16, "lora_alpha": 32}, an adapter's folder or
            file, or a `LoraConfig`. By default the model's most common configuration.
        law: a law or its name, by default "falling".
        recipe: a calibrated recipe, its path or its adapter's folder. It replaces `lr`, `tuned_at`
            and `law`. A warning is given if the optimizer, its settings, batch or steps differ from
            the recipe's.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: the adapters' init if it cannot be read: "A" (B starts at zero, as in PEFT) or "B" (A
            starts at zero).
        rates: rates by name pattern, such as {"*classifier*": 1e-3}, for any parameter.
        other_lr: the rate of every parameter that is not a factor, by default the base rate. With a
            recipe the default is the rate of the recipe's trials, else its rate for full
            finetuning. It must be given if there is neither.
        batch: examples or tokens per step of this run. If `tuned_at` has a batch too, the law's
            rule moves every rate, as for 4 times the batch at most.
        steps: training steps of this run. With a recipe they move every rate by its horizon.
        **settings: the optimizer's own arguments, such as those of a recipe, `**recipe.settings`.

    Raises:
        InspectionError: the adapters cannot be read. As with the errors below, nothing was changed.
        InvalidReferenceError: `tuned_at` is impossible.
        LawError: the law is unknown or cannot be used.
        OptimizerError: the optimizer cannot be built or wrapped with these arguments.
        RecipeError: the recipe cannot be read, or has no rate for this model.
    """

    _rankaware: _Wrap
    _rankaware_native: Native
    _rankaware_stepping = False  # inside a step; the native step may call self.step
    # a step in progress has put in place: group, base rate, multiplied rate;
    # it is a new list after each
    _rankaware_held: Sequence[Any] = ()
    _rankaware_bases: Sequence[Any] = ()  # the groups' base rates at the last step
    _rankaware_unchecked = True  # new parameters since these were checked
    _rankaware_watched = 0  # the number of a group of adapters
    _rankaware_steps = 0  # since it was built or copied, up to `EPSILON_AT`
    _rankaware_idle = False  # its first parameter had no gradient at the last step

    def __new__(  # noqa: PLR0913
        cls,
        params: Any,
        optimizer: type[Optimizer] | str | None = None,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        lr: float | Rate | torch.Tensor | None = None,
        tuned_at: ReferenceLike | None = None,
        law: str | Law | None = None,
        recipe: Recipe | str | os.PathLike[str] | None = None,
        method: Method = "lora",
        init: Init | None = None,
        rates: Mapping[str, float | Rate] | None = None,
        other_lr: float | Rate | None = None,
        batch: float | None = None,
        steps: int | None = None,
        **settings: Any,
    ) -> RankAwareOptimizer:
        refuse_inside_zero()
        params, ours = together(params), signature(cls.__new__).parameters
        model = model_of(params, model)
        source = read_source(params, optimizer, lr, settings, ours)
        horizon = {"batch": batch, "steps": steps}
        loaded, law, at = read_recipe(recipe, steps, law, tuned_at, lr)
        options = PlanOptions(law, at, dict(rates or {}), other_lr, batch)
        walked = walk(model)
        groups = user_groups(source.params, model, walked)
        refuse_outside(groups, walked, options, built=source.built is not None)
        native, built = source.native, source.built
        base = source.settings if built is None else settings_of_built(built)
        refuse_groups(native, groups, in_force(native, base))
        trained = survey = survey_of(walked, method=method, init=init)
        if frozen := _frozen(groups):
            survey = survey_of(walked, method=method, init=init, also=frozen)
        use, lr = None, plain_lr(lr)
        if loaded is not None:
            use = use_recipe(loaded, trained, source, groups, horizon)
            lr = use.lr
        check_base_lr(source, lr, groups, options)
        each = [group.options for group in groups]
        plan = make_plan(
            trained,
            options,
            native,
            source.settings,
            use,
            each,
            are_several=isinstance(model, Models),
        )
        state = None if built is None else built.state
        parts = split(groups, plan, survey, state=state)
        if built is None:
            opt = _construct(native, parts, lr, settings)
        else:
            opt = _regroup(built, parts, lr)
        opt._rankaware = _Wrap(plan, survey, init, tuple(g.names for g in groups))
        opt._rankaware_model = _weakly(model)
        roles = [group["lora_role"] in ("A", "B") for group in opt.param_groups]
        _note_bases(opt)
        opt._rankaware_watched = roles.index(True) if any(roles) else 0
        _LIVE.add(opt)
        return opt  # type: ignore[no-any-return]

    def report(self, *, per_module: bool = False) -> Report:
        """Return a table of the groups with their current rates, the reasons for them, and what to
        check.

        Args:
            per_module: whether to list every tensor instead of every group.
        """
        wrap = self._rankaware
        title = f"RankAwareOptimizer({type(self).__name__}), {origin(wrap.plan)}"
        trained = _trained(self)
        unmoved = rounding(trained), epsilon(trained)
        return make_report(
            self.param_groups, wrap.plan, wrap.survey, title, per_module, unmoved
        )

    def expand(self, values: Sequence[T]) -> list[T]:
        """Repeat values for the groups that were split, for schedulers that take a list.

        Args:
            values: one value for each of the user's groups.

        Returns:
            One value for each group of this optimizer.

        >>> model, linear = torch.nn.Module(), torch.nn.Linear
        >>> model.lora_A, model.lora_B = linear(64, 8, bias=False), linear(8, 64, bias=False)
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
        # Lightning and Fabric derive a class from ours
        if isinstance(inner, RankAwareOptimizer):
            inner.add_param_group(param_group)
            return
        # inside __init__, whose groups are planned already
        if "_rankaware" not in vars(self):
            native.add_param_group(self, param_group)
            return
        model, wrap = _model_of(self), self._rankaware
        if model is None:
            raise OptimizerError(
                "This optimizer is a copy, or its model is gone, so a new group has no rate.",
                "Wrap again with model=.",
            )
        walked, first = walk(model), len(wrap.order)
        groups = user_groups([param_group], model, walked, first=first, outside=True)
        present = set(map(id, params_in(self.param_groups)))
        lr = self.defaults.get("lr")
        if lr is None and any("lr" not in group.options for group in groups):
            raise OptimizerError(
                f"{native.__name__} has no default rate for a later group.",
                "Give lr in the group.",
            )
        base = in_force(native, settings_of_built(self))
        refuse_groups(native, groups, base, present)
        also, plan = _frozen(groups) | present, wrap.plan
        found = survey_of(walked, method=plan.method, init=wrap.init, also=also)
        named = all("param_names" in group for group in self.param_groups)
        parts = [rated(part, lr, named) for part in split(groups, plan, found, first)]
        for part in parts:
            native.add_param_group(self, part)
        # those of before stay as they were, since trained weights do not show their init
        factors = {f.name: f for f in (*found.factors, *wrap.survey.factors)}
        survey = replace(wrap.survey, factors=tuple(factors.values()))
        order = (*wrap.order, *(group.names for group in groups))
        self._rankaware = replace(wrap, survey=survey, order=order)
        self._rankaware_unchecked = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint by parameter name. Ranks and shapes are compared, which torch does not
        do.

        Rates in it are base rates, also those of a plain optimizer. The multipliers of this
        optimizer are kept. A warning is given if the checkpoint's differ. Explicit rates (`rates`,
        `other_lr`) do not follow the base rate.

        Args:
            state_dict: the result of an optimizer's state_dict().

        Raises:
            CheckpointError: the checkpoint does not fit. Nothing was loaded.
        """
        native, wrap = type(self)._rankaware_native, self._rankaware
        before, default = dict(vars(self)), self.defaults.get("lr")
        by_default = [base_of(group) == default for group in self.param_groups]
        try:
            fitted = fit_checkpoint(self.param_groups, state_dict, wrap.order)
            native.load_state_dict(self, fitted)
        except BaseException as error:
            vars(self).clear()
            vars(self).update(before)
            ours = isinstance(error, (CheckpointError, Warning))
            if ours or not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"The checkpoint cannot be loaded: {error!r}.",
                "Give the result of optimizer.state_dict() of the same optimizer class.",
            ) from error
        self._rankaware_unchecked = True
        _note_bases(self)
        for group in list(compress(self.param_groups, by_default))[:1]:
            base = base_of(group)
            if float(base) > 0:
                tensor = isinstance(base, torch.Tensor)
                self.defaults["lr"] = base.clone() if tensor else base

    def state_dict(self) -> dict[str, Any]:
        """Return the state with base rates, also during a step: in a signal handler, or in another
        thread.
        """
        return _at_base_rates(
            self, lambda: type(self)._rankaware_native.state_dict(self)
        )

    def __getstate__(self) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            state = type(self)._rankaware_native.__getstate__(self)
            groups = [dict(group) for group in state["param_groups"]]
            return {**state, "param_groups": groups, "_rankaware": self._rankaware}

        return _at_base_rates(self, read)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._rankaware_native,), self.__getstate__()

    def __repr__(self) -> str:
        lines = [
            f"RankAwareOptimizer({type(self).__name__}) of {len(self.param_groups)} groups"
        ]
        for number, group in enumerate(self.param_groups):
            role, rank = group.get("lora_role", "other"), group.get("lora_rank")
            kind = role if rank is None else f"{role} of rank {rank}"
            rate = f"{float(group['lr']):.3g} × {group.get('rank_multiplier', 1.0):.3g}"
            lines.append(
                f"  {number}: {kind}, {len(group['params'])} tensors, lr {rate}"
            )
        return "\n".join(lines)


# --- building -------------------------------------------------------------------------------------

# Methods that move parameters: all, one (from a hook in the backward pass), or a part of them.
_STEPS = (
    "step",
    "step_parameter",
    "update_step",
    "third_step",
    "step_subgroup",
    "rollback_subgroup",
    "group_step",
)
_SUBCLASSES: dict[type, Any] = {}
# optimizers that were built, not copied
_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def _subclass(native: Native) -> Any:
    """Return the rank-aware subclass of `native`, with its name and module. It is made once."""
    if native in _SUBCLASSES:
        return _SUBCLASSES[native]
    namespace: dict[str, Any] = {
        "__module__": native.__module__,
        "__qualname__": native.__qualname__,
        "__doc__": native.__doc__,
        "__init__": _refusing(native),
        "_rankaware_native": native,
    }
    for name, value in vars(RankAwareOptimizer).items():
        if isfunction(value) or name.startswith("_rankaware"):
            namespace[name] = value
    for name in _STEPS:
        method = getattr(native, name, None)
        if callable(method):
            namespace[name] = _step_of(method, of_all=name == "step")
    _SUBCLASSES[native] = type(native)(native.__name__, (native,), namespace)  # type: ignore[misc]
    return _SUBCLASSES[native]


def _refusing(native: Native) -> Callable[..., None]:
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


def _blank(native: Native) -> Any:
    """Return an instance without state, for copy and pickle."""
    kind = _subclass(native)
    return kind.__new__(kind)


def _model_of(opt: Any) -> nn.Module | None:
    """Return the model; None if it is gone or the optimizer is a copy."""
    model: nn.Module | None = vars(opt).get("_rankaware_model", lambda: None)()
    return model


def _frozen(groups: Iterable[UserGroup]) -> set[int]:
    """Return the ids of frozen parameters that the user listed, since they get a rate if they train
    later.
    """
    return {id(p) for group in groups for _, p in group.named if not p.requires_grad}


def _construct(native: Native, parts: list[Group], lr: Any, settings: Settings) -> Any:
    """Build the optimizer. Groups are split before the native __init__, which may copy them, and
    scaled after it.
    """
    opt = _blank(native)
    planned, built = {}, {}
    for part in parts:
        planned[tuple(id(p) for _, p in part["params"])] = part["rank_multiplier"]
    native.__init__(opt, parts, **(settings if lr is None else {"lr": lr, **settings}))
    refuse_rateless(opt)
    for group in opt.param_groups:
        built[tuple(map(id, group["params"]))] = group.get("rank_multiplier")
    if built != planned:
        raise OptimizerError(
            f"{native.__name__} rearranges its groups when it is built, so rates would go to the"
            " wrong groups.",
            f"Build it, then wrap it: RankAwareOptimizer({native.__name__}(model.parameters(),"
            " ...), model=model).",
        )
    for group in opt.param_groups:
        set_rate(group)
    return opt


def _regroup(built: Optimizer, parts: list[Group], lr: Any) -> Any:
    """Replace the groups of a built optimizer in place, and its class. Its state is kept."""
    groups = []
    for part in parts:
        names = [name for name, _ in part["params"]]
        groups.append({**rated(part, lr, False), "param_names": names})
    if lr is not None:
        built.defaults["lr"] = lr
    built.param_groups[:] = groups
    built.__class__ = _subclass(type(built))
    built._patch_step_function()  # torch hooks `step` by class
    return built


def _weakly(model: nn.Module) -> Callable[[], nn.Module | None]:
    """Return what gives the model back while it lives, and several only while all of them do."""
    if not isinstance(model, Models):
        return weakref.ref(model)
    references = list(map(weakref.ref, model))

    def again() -> nn.Module | None:
        models = [reference() for reference in references]
        return None if None in models else together(models)

    return again


# --- the step -------------------------------------------------------------------------------------


def _step_of(native: Any, of_all: bool) -> Callable[..., Any]:
    """Return a native step at multiplied rates. It is called without torch's hooks, which wrap this
    function.

    of_all: whether it steps all parameters and may take a closure.
    """
    stepped = native.__wrapped__ if getattr(native, "hooked", False) else native

    @wraps(stepped)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rankaware_stepping:  # the native step calls self.step
            return stepped(self, *args, **kwargs)
        closure = None
        if of_all:
            closure = args[0] if args else kwargs.get("closure")
        if closure is not None and args:
            args = (_closure_at_base_rates(self, closure), *args[1:])
        elif closure is not None:
            kwargs = {**kwargs, "closure": _closure_at_base_rates(self, closure)}
        elif of_all:
            _check(self)
        self._rankaware_stepping = True
        try:
            _multiply(self)
            return stepped(self, *args, **kwargs)
        finally:
            _put_back(self)
            self._rankaware_stepping = False

    return step


# compiled, it would be a graph of its own with tensor rates
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _multiply(opt: Any) -> None:
    """Set every group's rate to base rate × multiplier."""
    if opt._rankaware_steps < EPSILON_AT:
        _warn_of_unmoved(opt)
    groups = opt.param_groups
    bases = [group["lr"] for group in groups]
    if bases != opt._rankaware_bases:
        bases = _followed(groups, opt._rankaware_bases)
    multipliers = [group.get("rank_multiplier", 1.0) for group in groups]
    rates: Sequence[Any]
    if bases and all(isinstance(base, torch.Tensor) for base in bases):
        rates = torch._foreach_mul(bases, multipliers)  # one call for all groups
    else:
        rates = list(map(mul, bases, multipliers))
    # before a rate changes, for a save
    opt._rankaware_held = list(zip(groups, bases, rates, strict=True))
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _warn_of_unmoved(opt: Any) -> None:
    """Warn of weights that do not move at the first step, and later of Adam's epsilon."""
    opt._rankaware_steps += 1
    text = ""
    if opt._rankaware_steps == 1:
        text = rounding(_trained(opt, opt._rankaware_bases))
    elif opt._rankaware_steps == EPSILON_AT:
        text = epsilon(_trained(opt))
    if text:
        warn(text)


def _trained(opt: Any, before: Sequence[Any] = ()) -> list[Trained]:
    """Return the sign-like groups at their highest rates. before: base rates, at a first step."""
    trained = []
    none_trains = not any(float(group["lr"]) for group in opt.param_groups)
    for number, group in enumerate(opt.param_groups):
        if group.get("rank_family") != "sign-like":
            continue
        # a rate of 0 freezes a group beside others, and begins a warm-up of all
        trains = none_trains or float(group["lr"]) > 0
        base = highest_rate(group, before[number : number + 1] if trains else ())
        rate = base * group.get("rank_multiplier", 1.0)
        trained.append(trained_by(opt, group, dict(named_params([group])), rate))
    return trained


def _followed(groups: list[Group], before: Sequence[Any]) -> list[Any]:
    """Return the groups' base rates, after a rate that was written by hand to one part of a user's
    group. Where it is the first part, the others follow, since that is where a plain optimizer has
    the whole group. Where it is another, a warning says how to write it.

    With a scheduler, which writes every group's rate, nothing follows.

    Args:
        groups: the optimizer's groups.
        before: their base rates at the last step.
    """
    rates = [group["lr"] for group in groups]
    if len(before) != len(groups) or "initial_lr" in groups[0]:
        return rates
    parts = groupby(range(len(groups)), lambda i: groups[i].get("user_group", -1))
    for number, (first, *others) in parts:
        end = first + len(others) + 1
        now, was = rates[first:end], before[first:end]
        if _are_alike(now) or not _are_alike(was):
            continue
        if now[1:] == was[1:] and is_number(now[0]):
            for i in others:
                rates[i] = groups[i]["lr"] = now[0]
            continue
        warn(
            f"A rate was written to a part of user group {number}, which is split by rank into the"
            f" groups {first} to {end - 1} of this optimizer. The other parts keep theirs. To"
            f" write it to all: for g in opt.param_groups: if g['user_group'] == {number}:"
            " g['lr'] = ..."
        )
    return rates


def _are_alike(rates: Sequence[Any]) -> bool:
    return all(rate == rates[0] for rate in rates)


def _note_bases(opt: Any) -> None:
    """Note the base rates, so that a later step sees which of them were written by hand."""
    opt._rankaware_bases = [group["lr"] for group in opt.param_groups]


def _put_back(opt: Any) -> None:
    """Restore the base rates. A rate that the optimizer wrote itself is kept, divided by the
    multiplier.
    """
    for group, base, rate in opt._rankaware_held:
        now = group["lr"]
        group["lr"] = base if now is rate else now / group.get("rank_multiplier", 1.0)
    if opt._rankaware_held:
        _note_bases(opt)
    opt._rankaware_held = []


def _at_base_rates(opt: Any, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return read(), whose groups are copies, with base rates. It is read again if a step began or
    ended meanwhile.
    """
    while True:
        held = opt._rankaware_held
        state = read()
        if opt._rankaware_held is held:
            break
    for group, (_, base, _) in zip(state["param_groups"], held, strict=False):
        group["lr"] = base
    return state


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
    watched = opt.param_groups[opt._rankaware_watched :][
        :1
    ]  # none, if the user cleared the groups
    idle = all(param.grad is None for group in watched for param in group["params"][:1])
    if opt._rankaware_unchecked or (idle and not opt._rankaware_idle):
        check_parameters(
            opt, _model_of(opt), [other for other in _LIVE if other is not opt]
        )
    opt._rankaware_idle = idle
