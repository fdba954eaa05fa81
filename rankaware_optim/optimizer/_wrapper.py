"""Wrap a torch optimizer so that each parameter trains at the learning rate for its
rank.

The class of a wrapped optimizer is a direct subclass of the user's optimizer class.
Schedulers, gradient scalers, trainers and checkpoints therefore work with it as usual.
The `param_groups` of a wrapped optimizer are the user's groups with their base learning
rates. While a method of the native class runs, the groups are replaced with their parts
(see `_parts.py`).
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
from ..inspection import ReferenceLike, as_one_model, as_reference
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
    Group,
    RankAware,
    WrapperState,
    fill_user_groups,
    hide_parts,
    peak_lr,
    read_outside_a_step,
    show_parts,
    split_groups,
    take_built_groups,
    with_parts_shown,
)
from ._prepare import prepare, prepare_later
from ._rates import Rates, Report, make_report, warn_of_unmoved
from ._source import read_source
from ._state_dict import (
    read_checkpoint,
    restored,
    warn_of_rates,
    warn_of_train_mode,
    with_rank_parts,
)
from ._unmoved import check_parameters


class _Meta(type):
    """Make `isinstance(opt, RankAwareOptimizer)` true for every wrapped optimizer.

    The usual check of `isinstance` would fail, because a wrapped optimizer inherits
    only from the native class.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return hasattr(type(instance), "_rankaware_native")


if TYPE_CHECKING:

    class _Base(Optimizer):
        """Let type checkers accept any arguments of `__init__`.

        Type checkers read both `__init__` and `__new__`. With this definition of
        `__init__`, type checkers use the signature of `__new__`.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

else:
    _Base = Optimizer


class RankAwareOptimizer(_Base, metaclass=_Meta):
    """Wrap a torch optimizer so that every LoRA matrix trains at the learning rate for
    its rank::

        RankAwareOptimizer(model, torch.optim.AdamW, lr=2e-4, tuned_at="r=16,alpha=32")
        RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=2e-4)

        adamw = torch.optim.AdamW(model.parameters(), lr=2e-4)
        RankAwareOptimizer(adamw, model=model)  # returns the same object

    The wrapped optimizer keeps your parameter groups in `param_groups`. group["lr"] is
    the base learning rate, and a scheduler, a trainer or your code can change it at any
    time. `step` multiplies the base learning rate by a different number for each rank,
    which the scaling law computes. The `rates` property shows the resulting learning
    rates. The wrapped optimizer is an instance of the class that you passed, and
    `state_dict` returns the same format as in that class.

    Args:
        params: a model, parameters or groups together with `model=`, or an existing
            optimizer. If you pass a model, the optimizer gets its trainable parameters
            and the LoRA matrices of inactive adapters, which train once PEFT's
            `set_adapter` activates them.
        optimizer: a torch optimizer class, or its name, such as "adamw" or "torch_optimizer:Lamb".
        model: the model that contains the adapters, if it is not `params`, or a list of
            several models, such as [unet, text_encoder]. The optimizer only stores weak
            references to models.
        lr: the base learning rate per step, as tuned at `tuned_at`. The default is the
            default of the optimizer's class, with a warning, because nobody tuned it
            for this model.
        tuned_at: the configuration that `lr` was tuned for: a `Reference`, a string
            such as "r=16,alpha=32", the folder or file of an adapter, or a
            `LoraConfig`. If `lr` is a `Rate` (as returned by `suggest_lr`), the default
            is its configuration. Otherwise the default is the model's most common
            configuration.
        law: a scaling law or its name. The default is "falling".
        recipe: a calibrated recipe or its path. It replaces `lr`, `tuned_at` and `law`.
            A warning is printed if the optimizer, its settings, the batch or the steps
            differ from the recipe's.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: the LoRA matrix that was initialized at random, if this cannot be read
            from the model: "A" (B started at zero, as in PEFT) or "B" (A started at
            zero).
        rates: explicit learning rates for any parameters, by name pattern, such as
            {"*classifier*": 1e-3}.
        other_lr: the learning rate of every parameter that is not a LoRA matrix. The
            default is the base learning rate. With a recipe, the default is the
            learning rate that the recipe's trials used for these parameters, or
            otherwise the recipe's learning rate for full finetuning. If the recipe has
            neither, `other_lr` is required.
        batch: examples or tokens per step of this run. If `tuned_at` has a batch too,
            every learning rate is adjusted for the difference by the law's batch rule.
            The adjustment is limited to a factor of 4 in the batch.
        steps: the training steps of this run, which only matter with a recipe. If the
            recipe's trials had a different number of steps, the learning rate is lower
            and its interval wider.
        **settings: the arguments of the optimizer class, for example
            `**recipe.settings`.

    Raises:
        InspectionError: the adapters cannot be read. After this and all other errors, the model and
            the optimizer are unchanged.
        InvalidReferenceError: `tuned_at` is impossible.
        LawError: the law is unknown or cannot be used.
        OptimizerError: the optimizer cannot be built or wrapped with these arguments.
        RecipeError: the recipe cannot be read, or has no learning rate for this model.
    """

    _rankaware: WrapperState
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
        # The order matters: first all arguments are read and checked, then learning rates
        # are assigned and groups are divided. Only then is the optimizer built, or an
        # existing one changed. An error before that leaves everything as it was.
        params = as_one_model(params)
        ours = signature(cls.__new__).parameters
        holder = params if model is None else as_one_model(model)
        wrapped = read_optimizer(params, optimizer, lr, settings, ours)
        chosen = lr if wrapped.built is None else params.param_groups[0].get("lr")
        tuned_at = _reference_of(chosen, tuned_at)
        # Groups contain plain numbers, because checkpoints copy the values of groups.
        lr = plain_lr(lr)
        source = read_source(
            recipe, law, tuned_at, lr, batch, steps, rates or {}, other_lr
        )
        given = params if wrapped.built is None else params.param_groups
        wrapper = prepare(given, holder, wrapped, source, method, init)
        return cls._build(wrapped.built, wrapper)  # type: ignore[no-any-return]

    @staticmethod
    def _build(opt: Any, wrapper: WrapperState) -> Any:
        """Create a wrapped optimizer, or convert an existing optimizer to a wrapped
        optimizer.

        A new optimizer is created with the parts instead of the user's groups, because
        the constructors of some classes store information about the groups. An existing
        optimizer is not changed until all checks have passed.
        """
        native: Any = wrapper.assigner.optimizer
        splits = wrapper.splits
        lr = wrapper.assigner.source.lr
        if opt is None:
            opt = _blank(native)
            groups = [dict(part.group) for split in splits for part in split.parts]
            with building(native):
                native.__init__(opt, groups, **{"lr": lr, **wrapper.assigner.settings})
            refuse_other_rates(opt)
            take_built_groups(opt, splits)
            fill_user_groups(splits)
            opt.param_groups = [split.group for split in splits]
        else:
            fill_user_groups(splits)
            lr = opt.defaults.get("lr") if lr is None else lr
            if lr is not None:
                opt.defaults["lr"] = plain_lr(lr)
            opt.__class__ = _subclass(native)
            # torch adds its step hooks once per class, when an instance is built. Setting
            # `__class__` builds nothing, so we have to ask for it.
            opt._patch_step_function()
        opt._rankaware = wrapper
        _LIVE.add(opt)
        model = wrapper.live_model()
        if model is not None and "train_mode" in opt.param_groups[0]:
            wrapper.end_watch = _watch_evaluations(opt, model)
        return opt

    @property
    def rates(self) -> Rates:
        """The learning rates of all parameters by name, and the groups of parameters
        with the same learning rate.
        """
        return Rates(self)

    def report(self) -> Report:
        """Return a table of the current learning rates, with reasons and warnings about
        likely mistakes.

        Each row of the table describes a group of parameters with the same learning
        rate. The `rates` property contains the learning rate of every parameter.
        """
        return make_report(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group and assign learning rates to its parameters.

        The added group gets its learning rates in the same way as the groups that
        existed when the optimizer was created.

        Args:
            param_group: the group, in the same format as for a torch optimizer.

        Raises:
            OptimizerError: the group cannot be added. The optimizer is unchanged.
        """
        native = type(self)._rankaware_native
        inner = getattr(self, "optimizer", None)
        # Lightning and Fabric derive a class from ours, and keep our instance as `optimizer`.
        if isinstance(inner, RankAwareOptimizer):
            inner.add_param_group(param_group)
            return
        # The native __init__ adds groups too. Those are parts already.
        if "_rankaware" not in vars(self):
            native.add_param_group(self, param_group)
            return
        wrapper = self._rankaware
        model = wrapper.live_model()
        if model is None:
            raise OptimizerError(
                "add_param_group cannot read the ranks of the new parameters, because this"
                " optimizer was copied or unpickled, or its model was deleted.",
                "Call RankAwareOptimizer(...) again with model=, and include the new parameters.",
            )
        survey, split = prepare_later(wrapper, self, model, param_group)

        def add() -> None:
            with building(native):
                for part in split.parts:
                    native.add_param_group(self, part.group)
                take_built_groups(self, [split])
                fill_user_groups([split])

        # torch's own check for duplicates has to see the parts of all groups.
        with_parts_shown(self, add)
        wrapper.splits.append(split)
        self.param_groups.append(split.group)
        wrapper.survey, wrapper.unchecked = survey, True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of a wrapped optimizer, or of a plain optimizer of the same
        class.

        Unlike torch, this method checks that the names and shapes of the parameters are
        the same.

        As in torch, the base learning rates in the checkpoint replace the base learning
        rates of this optimizer. A warning is printed if a base learning rate changes.
        The multipliers and the explicit learning rates (`rates`, `other_lr`) do not
        change.

        Args:
            state_dict: the result of an optimizer's state_dict().

        Raises:
            CheckpointError: the checkpoint does not fit. Nothing was loaded.
        """
        native = type(self)._rankaware_native
        wrapper = self._rankaware
        # The native class replaces `state` and `param_groups` by new objects, so the old ones can
        # be put back if a check fails later.
        before = dict(vars(self))
        try:
            splits = wrapper.splits_of(self.param_groups)
            state, values = read_checkpoint(splits, state_dict, native)
            peaks = [peak_lr(group) for group in self.param_groups]
            native.load_state_dict(self, state)
            splits = list(map(restored, splits, self.param_groups, values))
            warn_of_rates(peaks, self.param_groups)
        except BaseException as error:
            vars(self).clear()
            vars(self).update(before)
            ours = isinstance(error, (CheckpointError, Warning))
            if ours or not isinstance(error, Exception):
                raise
            name = native.__name__
            raise CheckpointError(
                f"The optimizer class {name} could not load the checkpoint. It raised {error!r}.",
                "Pass the state_dict() of an optimizer of the same class that has the same"
                " parameters in the same order, including frozen parameters.",
            ) from error
        wrapper.splits, wrapper.unchecked = splits, True

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state in the format of the native class, with base
        learning rates.

        This method can safely be called by a signal handler or by another thread during
        a step.
        """
        warn_of_train_mode(self)
        native = type(self)._rankaware_native
        state = read_outside_a_step(self, native.state_dict)
        return with_rank_parts(state, split_groups(self), native)

    def __getstate__(self) -> dict[str, Any]:
        state = read_outside_a_step(self, type(self)._rankaware_native.__getstate__)
        # A copy is in no step, and belongs to no model.
        wrapper = replace(
            self._rankaware,
            model=None,
            user_groups=[],
            active_splits=[],
            in_step=False,
            end_watch=None,
        )
        return {**state, "_rankaware": wrapper}

    # Without this, pickle would look for the subclass under the name of the native class.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._rankaware_native,), self.__getstate__()

    def __repr__(self) -> str:
        return f"RankAwareOptimizer({type(self).__name__}): {self.rates!r}"


def _reference_of(lr: object, tuned_at: ReferenceLike | None) -> ReferenceLike | None:
    """Return the configuration that a learning rate was tuned for.

    If the learning rate is a `Rate` that records its configuration, return that
    configuration. Otherwise, return `tuned_at`.

    Raises:
        OptimizerError: `tuned_at` differs from the configuration of the `Rate`.
    """
    recorded = lr.reference if isinstance(lr, Rate) else None
    if recorded is None or tuned_at is None:
        return recorded if tuned_at is None else tuned_at
    given = as_reference(tuned_at)
    same = ("method", "rank", "scaling", "init")
    if any(getattr(given, name) != getattr(recorded, name) for name in same):
        raise OptimizerError(
            f"tuned_at= describes {given}, but the learning rate in lr= was tuned at {recorded}.",
            "Remove tuned_at=, because the learning rate already records its configuration. Or"
            f" pass the learning rate that you tuned at {given} as a plain number: lr=float(...).",
        )
    return given


# --- groups for an optimizer without the wrapper --------------------------------------------------


class _Unbuilt(RankAwareOptimizer):
    """Return the split groups without creating an optimizer for them."""

    @staticmethod
    def _build(opt: Any, wrapper: WrapperState) -> Any:
        native: Any = wrapper.assigner.optimizer
        with building(native):  # No class gets a chance to refuse an unknown argument.
            signature(native).bind_partial(**wrapper.assigner.settings)
        return wrapper


def rank_aware_param_groups(
    params: Any, *, named: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Return parameter groups for a plain torch optimizer, with a separate learning
    rate for each rank.

    In the returned groups, group["lr"] is already multiplied by
    group["rank_multiplier"]. Do not use a scheduler that sets absolute learning rates,
    such as OneCycleLR, because it would overwrite the multiplied learning rates.

    Args:
        params: a model, whose trainable parameters are used, or parameters or groups
            together with `model=`.
        named: whether the groups contain parameter names. Set it to False for
            ZeroRedundancyOptimizer.
        **options: the other arguments of `RankAwareOptimizer`. `optimizer` is the class that will
            get the groups, by default AdamW. The form of the law depends on it and on some of its
            settings, such as Muon's adjust_lr_fn and Adafactor's scale_parameter.

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
        # Adapters that rest are left out: DeepSpeed removes groups that do not train.
        params = [param for param in model.parameters() if param.requires_grad]
        options.setdefault("model", model)
    wrapper: Any = _Unbuilt(params, **{"optimizer": AdamW, **options})
    groups = []
    for split in wrapper.splits:
        for part in split.parts:
            group = dict(part.group)
            lr = group.get("lr", wrapper.assigner.source.lr)
            part.fix_multiplier(lr)
            group.pop("initial_lr", None)  # A scheduler sets it again.
            if named:
                names = split.names_of(part)
                group["params"] = list(zip(names, group["params"], strict=True))
            group |= {"lr": lr * part.multiplier, MULTIPLIED: part.multiplier}
            groups.append(group)
    return groups


# --- building -------------------------------------------------------------------------------------

# The optimizers of this process that were built. Copies are not among them.
_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


@cache
def _subclass(native: Any) -> Any:
    """Return a rank-aware subclass of `native` that has the same name and module.

    The methods of `RankAwareOptimizer` are copied to the subclass, which does not
    inherit from `RankAwareOptimizer`. The reason is that Python only lets us change the
    `__class__` of an existing optimizer to a direct subclass of its class. For each
    native class, the subclass is created only once.
    """

    @wraps(native.__init__)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        name = native.__name__
        raise OptimizerError(
            "The class of a wrapped optimizer cannot create new optimizers, because they would use"
            " the same learning rate for all ranks.",
            f"Call RankAwareOptimizer(model, {name}, ...) instead, or create a plain {name}.",
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
        method = getattr_static(
            native, name
        )  # so that static methods are no functions here
        if isfunction(method) and not name.startswith("_"):
            namespace.setdefault(name, _wrapped_method(method, name))
    return type(native)(native.__name__, (native,), namespace)


def _blank(native: Any) -> Any:
    """Create an empty wrapped optimizer, to which copy and pickle then add the state."""
    kind = _subclass(native)
    return kind.__new__(kind)


# --- the native methods ---------------------------------------------------------------------------

# The methods of torch's base class, which see the user's groups. All others see the parts.
_OUTSIDE = {*vars(Optimizer)} - {"step"}


def _wrapped_method(native: Any, name: str) -> Callable[..., Any]:
    """Return a version of a native method that runs while `param_groups` contains the
    parts.

    The function removes torch's hooks from the native method. torch also adds them to
    the returned method, so they would otherwise run twice.
    """
    method = native.__wrapped__ if getattr(native, "hooked", False) else native

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper = getattr(self, "_rankaware", None)
        # The native __init__, or another native method, calls this one.
        if wrapper is None or wrapper.in_step:
            return method(self, *args, **kwargs)
        if name == "step":
            # A closure computes new gradients. They are checked after it, see `_outside`.
            if next(iter(args), kwargs.get("closure")) is None:
                _check_gradients(self)
            warn_of_unmoved(self)

        def act() -> Any:
            if not args and not kwargs:
                return method(self)
            inside = partial(_argument_inside, self, (*args, *kwargs.values()))
            named = {key: inside(value) for key, value in kwargs.items()}
            return method(self, *map(inside, args), **named)

        # Whoever calls eval() once knows of the two modes.
        if name == "eval" and wrapper.end_watch:
            wrapper.end_watch()
        return with_parts_shown(self, act)

    return run


def _argument_inside(opt: RankAware, given: Sequence[object], value: Any) -> Any:
    """Convert an argument so that the native method can use it during a step.

    If the argument is a closure, it is wrapped, so that `param_groups` contains the
    user's groups while the closure runs. If the argument is one of the user's groups,
    it is replaced with the part that contains the parameter in the other arguments.
    """
    if callable(value) and not isinstance(value, (type, nn.Module)):
        return _outside(opt, value)
    params = {id(each) for each in given if torch.is_tensor(each)}
    for split in opt._rankaware.active_splits:
        for part in split.parts if split.group is value else ():
            if not params.isdisjoint(map(id, part.group["params"])):
                return part.group
    return value


def _outside(opt: RankAware, closure: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a closure so that `param_groups` contains the user's groups while the
    closure runs.

    Lightning needs this, because it runs the whole training step in a closure, which
    may also change the groups.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        hide_parts(opt)
        try:
            loss = closure(*args, **kwargs)
            _check_gradients(opt)
            return loss
        finally:
            show_parts(opt)

    return run


def _check_gradients(opt: RankAware) -> None:
    """Check that the optimizer contains the parameters that have gradients.

    The check runs at the first step, and again after parameters were frozen or
    unfrozen, because the user may have activated a different adapter.
    """
    if torch.compiler.is_compiling():
        return
    wrapper = opt._rankaware
    count = _count_trained(opt.param_groups)
    if count != wrapper.trained_count:
        wrapper.trained_count, wrapper.unchecked = count, True
    if wrapper.unchecked:
        others = [other for other in _LIVE if other is not opt]
        wrapper.unchecked = check_parameters(opt, wrapper.live_model(), others)


def _count_trained(groups: Sequence[Group]) -> int:
    count = 0
    for group in groups:
        count += sum(param.requires_grad for param in group["params"])
    return count


# --- evaluation in train mode ---------------------------------------------------------------------


def _watch_evaluations(opt: Optimizer, model: nn.Module) -> Callable[[], object] | None:
    """Warn if the model is evaluated while a schedule-free optimizer is in train mode.

    The function adds a hook to the first module that has trainable parameters, and
    returns a function that removes the hook. When the optimizer is deleted, the hook is
    removed too.
    """
    for module in model.modules():
        if any(param.requires_grad for param in module.parameters(recurse=False)):
            handle = module.register_forward_pre_hook(_warn_of_evaluation)
            return weakref.finalize(opt, handle.remove)
    return None


def _warn_of_evaluation(module: nn.Module, _: object) -> None:
    """Warn if a module runs in eval mode while gradients are disabled.

    This function is defined at module level, because pickle can only find such
    functions by name.
    """
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for opt in _LIVE:
        if any(map(opt.state.get, module.parameters())):
            warn_of_train_mode(opt)
