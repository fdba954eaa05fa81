"""`RankAwareOptimizer`: any torch optimizer, with a rate for every parameter from a base rate and a
law.

The object is an instance of a cached, direct subclass of the user's optimizer class, so that
schedulers, scalers, trainers and checkpoints accept it. Its groups are the user's, at base rates.
Their parts, at multiplied rates, are in place inside the native class's methods only.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial, wraps
from inspect import getattr_static, isfunction, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from .._checks import plain_lr
from .._near_misses import explain_near_misses
from .._rate import Rate
from .._types import Init, Method
from ..errors import CheckpointError, OptimizerError
from ..inspection import ReferenceLike, as_one_model
from ..laws import Law
from ..recipe import Recipe
from ._arguments import (
    MULTIPLIED,
    Native,
    building,
    read_optimizer,
    refuse_other_rates,
)
from ._parts import (
    Hidden,
    adopt,
    enter,
    in_parts,
    leave,
    outside_a_step,
    peak_of,
    present,
    splits_of,
)
from ._prepare import prepare, prepare_later
from ._rates import Rates, Report, make_report, warn_of_unmoved
from ._source import read_source
from ._state_dict import (
    read_checkpoint,
    restored,
    warn_of_rates,
    warn_of_train_mode,
    with_parts,
)
from ._unmoved import check_parameters


class _Meta(type):
    """Makes isinstance(opt, RankAwareOptimizer) true for instances that derive only from the native
    class.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return hasattr(type(instance), "_rankaware_native")


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

    `param_groups` are your groups as they were given. group["lr"] is the base rate, which you, a
    scheduler or a trainer set. `step` trains each parameter at it times a multiplier, which `rates`
    shows. The object is an instance of the given optimizer class, and `state_dict` has its layout.

    Args:
        params: a model, parameters or groups with `model=`, or an existing optimizer. Of a model
            the parameters that train are used, and the LoRA matrices of inactive adapters, which
            train once PEFT's `set_adapter` activates them.
        optimizer: a torch optimizer class, or its name, such as "adamw" or "torch_optimizer:Lamb".
        model: the model that holds the adapters, if it is not `params`, or a list of several, as
            [unet, text_encoder]. Only weak references are kept.
        lr: the base rate, per step, tuned at `tuned_at`. By default the optimizer's own default,
            with a warning, since nobody tuned it.
        tuned_at: the configuration at which `lr` was tuned: a `Reference`, a text such as
            "r=16,alpha=32", an adapter's folder or file, or a `LoraConfig`. By default the model's
            most common configuration.
        law: a law or its name, by default "falling".
        recipe: a calibrated recipe or its path. It replaces `lr`, `tuned_at`
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
        steps: training steps of this run. With a recipe other steps than its own widen its band
            and margin.
        **settings: the optimizer's own arguments, such as those of a recipe, `**recipe.settings`.

    Raises:
        InspectionError: the adapters cannot be read. As with the errors below, nothing was changed.
        InvalidReferenceError: `tuned_at` is impossible.
        LawError: the law is unknown or cannot be used.
        OptimizerError: the optimizer cannot be built or wrapped with these arguments.
        RecipeError: the recipe cannot be read, or has no rate for this model.
    """

    _rankaware: Hidden
    _rankaware_native: Native

    @explain_near_misses
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
        # What was given is read and refused first. Then rates are assigned and groups split. The
        # optimizer is built, or a built one changed, last: what fails has changed nothing.
        params = as_one_model(params)
        ours = signature(cls.__new__).parameters
        holder = params if model is None else as_one_model(model)
        wrapped = read_optimizer(params, optimizer, lr, settings, ours)
        source = read_source(
            recipe, law, tuned_at, plain_lr(lr), batch, steps, rates or {}, other_lr
        )
        given = params if wrapped.built is None else params.param_groups
        hidden = prepare(given, holder, wrapped, source, method, init)
        return cls._build(wrapped.built, hidden)  # type: ignore[no-any-return]

    @staticmethod
    def _build(opt: Any, hidden: Hidden) -> Any:
        """Build the optimizer on the parts, whose groups the native class sets up, or take over one
        that is built, with its state. A built one is changed once nothing can fail any more.
        """
        native: Any = hidden.assigner.optimizer
        splits = hidden.splits
        lr = hidden.assigner.source.lr
        if opt is None:
            opt = _blank(native)
            groups = [dict(part.group) for split in splits for part in split.parts]
            with building(native):
                native.__init__(opt, groups, **{"lr": lr, **hidden.assigner.settings})
            refuse_other_rates(opt)
            adopt(opt, splits)
            present(splits)
            opt.param_groups = [split.group for split in splits]
        else:
            present(splits)
            if lr is not None:
                opt.defaults["lr"] = lr
            opt.__class__ = _subclass(native)
            opt._patch_step_function()  # torch hooks `step` by class
        opt._rankaware = hidden
        _LIVE.add(opt)
        model = hidden.model and hidden.model()
        if model is not None and "train_mode" in opt.param_groups[0]:
            hidden.unwatch = _watched(opt, model)
        return opt

    @property
    def rates(self) -> Rates:
        """The rate of every parameter by its name, and of every part of the groups."""
        return Rates(self)

    def report(self) -> Report:
        """Return a table of the groups with their current rates, the reasons for them, and what to
        check. `rates` has them by parameter.
        """
        return make_report(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters get their rates as at construction.

        Args:
            param_group: the group, as for torch.
        """
        native = type(self)._rankaware_native
        inner = getattr(self, "optimizer", None)
        # Lightning and Fabric derive a class from ours
        if isinstance(inner, RankAwareOptimizer):
            inner.add_param_group(param_group)
            return
        # inside __init__, whose groups are split already
        if "_rankaware" not in vars(self):
            native.add_param_group(self, param_group)
            return
        hidden = self._rankaware
        model = hidden.model and hidden.model()
        if model is None:
            raise OptimizerError(
                "This optimizer is a copy, or its model is gone, so a new group has no rate.",
                "Wrap again with model=.",
            )
        survey, split = prepare_later(hidden, self, model, param_group)

        def add() -> None:
            with building(native):
                for part in split.parts:
                    native.add_param_group(self, part.group)
                adopt(self, [split])
                present([split])

        in_parts(self, add)  # the native check for duplicates sees all parts
        self.param_groups.append(split.group)
        hidden.splits.append(split)
        hidden.survey, hidden.unchecked = survey, True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, which has the native layout. Names, shapes and rates are compared,
        which torch does not do.

        Rates in it are base rates, also those of a plain optimizer, and train on as natively. A
        warning is given where they differ from those of this optimizer, whose multipliers are kept.
        Explicit rates (`rates`, `other_lr`) do not follow the base rate.

        Args:
            state_dict: the result of an optimizer's state_dict().

        Raises:
            CheckpointError: the checkpoint does not fit. Nothing was loaded.
        """
        native = type(self)._rankaware_native
        hidden = self._rankaware
        before = dict(vars(self))
        try:
            splits = hidden.of(self.param_groups)
            state, values = read_checkpoint(splits, state_dict, native)
            built = [peak_of(group) for group in self.param_groups]
            native.load_state_dict(self, state)
            splits = list(map(restored, splits, self.param_groups, values))
            warn_of_rates(built, self.param_groups)
        except BaseException as error:
            vars(self).clear()
            vars(self).update(before)
            ours = isinstance(error, (CheckpointError, Warning))
            if ours or not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"The checkpoint cannot be loaded: {error!r}.",
                "Give the state_dict() of the same optimizer class, whose groups have the same"
                " parameters in the same order, frozen ones included.",
            ) from error
        hidden.splits, hidden.unchecked = splits, True

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the native layout, with base rates, also during a step: in a signal
        handler, or in another thread.
        """
        warn_of_train_mode(self)
        native = type(self)._rankaware_native
        state = outside_a_step(self, native.state_dict)
        return with_parts(state, splits_of(self), native)

    def __getstate__(self) -> dict[str, Any]:
        state = outside_a_step(self, type(self)._rankaware_native.__getstate__)
        hidden = replace(  # in no step, and without a model
            self._rankaware,
            model=None,
            users=[],
            active=[],
            stepping=False,
            unwatch=None,
        )
        return {**state, "_rankaware": hidden}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._rankaware_native,), self.__getstate__()

    def __repr__(self) -> str:
        return f"RankAwareOptimizer({type(self).__name__}): {self.rates!r}"


# --- groups for an optimizer without the wrapper --------------------------------------------------


class _Unbuilt(RankAwareOptimizer):
    """Gives the split groups, and builds no optimizer on them."""

    @staticmethod
    def _build(opt: Any, hidden: Hidden) -> Any:
        native: Any = hidden.assigner.optimizer
        with building(native):  # no class refuses an unknown argument here
            signature(native).bind_partial(**hidden.assigner.settings)
        return hidden


def rank_aware_param_groups(
    params: Any, *, named: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Return parameter groups with their rates, for any torch optimizer without the wrapper.

    group["lr"] is the user group's lr, or the base rate, times group["rank_multiplier"]. The
    optimizer's step does not multiply again. A scheduler that sets rates to absolute values
    therefore removes the multipliers.

    Args:
        params: a model (its trainable parameters), or parameters or groups with `model=`.
        named: whether groups contain parameter names. ZeroRedundancyOptimizer needs False.
        **options: the other arguments of `RankAwareOptimizer`. `optimizer` is the class that gets
            the groups, by default AdamW. It decides the form of the law, as do Muon's
            adjust_lr_fn and Adafactor's scale_parameter.

    Raises:
        RankAwareError: as for `RankAwareOptimizer`.

    >>> pair, linear = torch.nn.Module(), torch.nn.Linear
    >>> pair.lora_A, pair.lora_B = linear(64, 8, bias=False), linear(8, 64, bias=False)
    >>> pair.r, pair.scaling = 8, 1.0
    >>> _ = torch.nn.init.zeros_(pair.lora_B.weight)
    >>> groups = rank_aware_param_groups(pair, lr=1e-3, tuned_at="r=32,alpha=32")
    >>> [round(group["lr"], 5) for group in groups]
    [0.00222, 0.00222]
    """
    model = as_one_model(params)
    if isinstance(model, nn.Module):
        params = [param for param in model.parameters() if param.requires_grad]
        options.setdefault("model", model)
    hidden: Any = _Unbuilt(params, **{"optimizer": AdamW, **options})
    groups = []
    for split in hidden.splits:
        for part in split.parts:
            group = dict(part.group)
            lr = group.get("lr", hidden.assigner.source.lr)
            part.settle(lr)
            group.pop("initial_lr", None)  # a scheduler sets it
            if named:
                names = split.names_of(part)
                group["params"] = list(zip(names, group["params"], strict=True))
            group |= {"lr": lr * part.multiplier, MULTIPLIED: part.multiplier}
            groups.append(group)
    return groups


# --- building -------------------------------------------------------------------------------------

# optimizers that were built, not copied
_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


@cache
def _subclass(native: Any) -> Any:
    """Return the rank-aware subclass of `native`, with its name and module. It is made once."""

    @wraps(native.__init__)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OptimizerError(
            f"The class of a RankAwareOptimizer cannot be called, since a new {native.__name__}"
            " would have no rates.",
            f"Build RankAwareOptimizer(model, {native.__name__}, ...), or a plain"
            f" {native.__name__}.",
        )

    namespace: dict[str, Any] = {
        "__module__": native.__module__,
        "__qualname__": native.__qualname__,
        "__doc__": native.__doc__,
        "__init__": refuse,
        "_rankaware_native": native,
    }
    for name, value in vars(RankAwareOptimizer).items():
        if isfunction(value) or isinstance(value, property):
            namespace[name] = value
    for name in {*dir(native)} - _OUTSIDE:
        method = getattr_static(native, name)  # a static one is no function
        if isfunction(method) and not name.startswith("_"):
            namespace.setdefault(name, _with_parts(method, name))
    return type(native)(native.__name__, (native,), namespace)


def _blank(native: Any) -> Any:
    """Return an instance without state, for copy and pickle."""
    kind = _subclass(native)
    return kind.__new__(kind)


# --- the native methods ---------------------------------------------------------------------------

# Those of torch's base class that see the user's groups.
_OUTSIDE = {*vars(Optimizer)} - {"step"}


def _with_parts(native: Any, name: str) -> Callable[..., Any]:
    """Return a native method that sees the parts. It is called without torch's hooks, which wrap
    this function.
    """
    method = native.__wrapped__ if getattr(native, "hooked", False) else native

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = getattr(self, "_rankaware", None)
        # in __init__, or called by a native method
        if hidden is None or hidden.stepping:
            return method(self, *args, **kwargs)
        if name == "step":
            # a closure makes gradients of its own, which are checked after it
            if next(iter(args), kwargs.get("closure")) is None:
                _check(self)
            warn_of_unmoved(self)

        def act() -> Any:
            if not args and not kwargs:
                return method(self)
            seen = partial(_seen_inside, self, (*args, *kwargs.values()))
            inside = {key: seen(value) for key, value in kwargs.items()}
            return method(self, *map(seen, args), **inside)

        # who calls it knows of the two modes
        if name == "eval" and hidden.unwatch:
            hidden.unwatch()
        return in_parts(self, act)

    return run


def _seen_inside(opt: Any, given: Sequence[Any], value: Any) -> Any:
    """Return a method's argument as it is seen inside: a closure runs outside, and one of the
    user's groups is the part of it that holds a parameter given beside it.
    """
    if callable(value) and not isinstance(value, (type, nn.Module)):
        return _outside(opt, value)
    params = {id(each) for each in given if torch.is_tensor(each)}
    for split in opt._rankaware.active:
        for part in split.parts if split.group is value else ():
            if not params.isdisjoint(map(id, part.group["params"])):
                return part.group
    return value


def _outside(opt: Any, closure: Callable[..., Any]) -> Callable[..., Any]:
    """Return the closure, run with the user's groups, which it may change. Lightning runs a whole
    training step in it.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leave(opt)
        try:
            loss = closure(*args, **kwargs)
            _check(opt)
            return loss
        finally:
            enter(opt)

    return run


def _check(opt: Any) -> None:
    """Check the parameters once there are gradients, and again after some were frozen or thawed:
    another adapter may have been activated.
    """
    hidden = opt._rankaware
    if torch.compiler.is_compiling():
        return
    training = sum(
        p.requires_grad for group in opt.param_groups for p in group["params"]
    )
    if training != hidden.training:
        hidden.training, hidden.unchecked = training, True
    if hidden.unchecked:
        others = [other for other in _LIVE if other is not opt]
        model = hidden.model and hidden.model()
        hidden.unchecked = check_parameters(opt, model, others)


# --- evaluation in train mode ---------------------------------------------------------------------


def _watched(opt: Any, model: nn.Module) -> Any:
    """Watch the first module that trains for an evaluation in train mode, while the optimizer
    lives. Return what ends it.
    """
    for module in model.modules():
        if any(param.requires_grad for param in module.parameters(recurse=False)):
            handle = module.register_forward_pre_hook(_warn_of_evaluation)
            return weakref.finalize(opt, handle.remove)
    return None


def _warn_of_evaluation(module: nn.Module, _: Any) -> None:
    """Warn of a forward in the model's eval mode without gradients. Pickle finds it by its name."""
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for opt in _LIVE:
        if any(map(opt.state.get, module.parameters())):
            warn_of_train_mode(opt)
