"""`RankAwareOptimizer`: any torch optimizer, with a rate for every group from a base rate and a law.

The object is an instance of a cached, direct subclass of the user's own optimizer class, so schedulers, scalers,
trainers and checkpoints see what they know. `step` is never overridden.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from .adapters import Init, Method, Reference
from .errors import CheckpointError, OptimizerError
from .groups import Assignment, Plan, PlannedGroup, check_lr, make_plan, scale_lr, split, user_groups
from .inspection import survey_of, walk
from .laws import Law
from .recipe import Recipe, resolve_recipe
from .report import Report, make_report

__all__ = ["RankAwareOptimizer", "get_optimizer_class"]


class _Meta(type):
    """Lets isinstance(opt, RankAwareOptimizer) be true of instances that derive from the native class alone."""

    def __instancecheck__(cls, instance: object) -> bool:
        return hasattr(type(instance), "_rankaware_native")

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or hasattr(subclass, "_rankaware_native")


class RankAwareOptimizer(Optimizer, metaclass=_Meta):
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
        law: a law or its name; default "mua".
        recipe: a calibrated recipe or its path, in place of `lr`, `tuned_at` and `law`.
        method: "full" for full finetuning of a model without adapters.
        init: names the adapters' init where it cannot be read ("A", "B").
        rates: rates by name pattern, as {"*classifier*": 1e-3}, for any parameter.
        other_lr: the rate of every parameter that is no factor; by default the base rate.
        per_layer_width: give the law each layer's own fan-in rather than one width for the model.
        across_inits: let the law carry the rate from the reference's init to another.
        **settings: the optimizer's own arguments.

    Raises:
        InspectionError, InvalidReferenceError, LawError, OptimizerError, RecipeError: before anything was changed.
    """

    _rankaware_plan: Plan

    def __new__(
        cls,
        params: Any,
        optimizer: type[Optimizer] | str | None = None,
        *,
        model: nn.Module | None = None,
        lr: float | torch.Tensor | None = None,
        tuned_at: Reference | None = None,
        law: str | Law | None = None,
        recipe: Recipe | str | os.PathLike[str] | None = None,
        method: Method = "lora",
        init: Init | None = None,
        rates: Mapping[str, float] | None = None,
        other_lr: float | None = None,
        per_layer_width: bool = False,
        across_inits: bool = False,
        **settings: Any,
    ) -> Any:
        built = params if isinstance(params, Optimizer) else None
        model = _model(params, model)
        native = _native_class(built, optimizer)
        if built is not None and (settings or lr is not None):
            _refuse_settings(settings)
        if recipe is not None:
            _refuse_beside_recipe(lr=lr, tuned_at=tuned_at, law=law)
        loaded = None if recipe is None else resolve_recipe(recipe)
        if loaded is not None:
            lr, tuned_at, law = loaded.lr, loaded.reference, loaded.law
        walked = walk(model)
        survey = survey_of(walked, method=method, init=init)
        plan = make_plan(
            survey,
            law="mua" if law is None else law,
            tuned_at=tuned_at,
            optimizer_class=native,
            settings=settings,
            rates=rates,
            other_lr=other_lr,
            per_layer_width=per_layer_width,
            across_inits=across_inits,
            notes=() if loaded is None else loaded.notes_for(survey, native),
        )
        base = _base_lr(native, built, lr)
        planned = split(user_groups(built.param_groups if built else params, model, walked), plan, survey)
        opt = _construct(native, planned, base, settings) if built is None else _regroup(built, native, planned, lr)
        opt._rankaware_plan = plan
        opt._rankaware_inspect = {"method": method, "init": init}
        opt._rankaware_model = weakref.ref(model)
        return opt

    def report(self) -> Report:
        """Per group: role, rank, scaling, init, count, multiplier, present rate, and why."""
        title = f"RankAwareOptimizer({type(self).__name__}), law {self._rankaware_plan.law!r}"
        return make_report(self.param_groups, self._rankaware_plan, title)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the user's group, split and scaled like those at construction; names are filled in from the model."""
        native = type(self)._rankaware_native  # type: ignore[attr-defined]
        model = self.__dict__.get("_rankaware_model", lambda: None)()
        if "lr_multiplier" in param_group or "_rankaware_plan" not in self.__dict__:  # planned, or inside __init__
            native.add_param_group(self, param_group)
            return
        if model is None:
            raise OptimizerError(
                "This optimizer, a copy or one that outlived it, does not hold its model, so a new group has no rate.",
                "Wrap again with model=, or add groups made by rank_aware_param_groups.",
            )
        walked = walk(model)
        survey = survey_of(walked, **self._rankaware_inspect)  # type: ignore[attr-defined]
        for planned in split(user_groups([param_group], model, walked), self._rankaware_plan, survey):
            native.add_param_group(self, planned.as_dict(named="param_names" in self.param_groups[0]))
            scale_lr(self.param_groups[-1], planned.assignment)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint by parameter name, after comparing ranks and shapes; torch itself compares none of these.

        Raises:
            CheckpointError: a saved rank or state tensor does not fit its parameter; nothing was loaded.
        """
        state_dict = _in_our_order(self.param_groups, state_dict)
        _check_checkpoint(self.param_groups, state_dict)
        type(self)._rankaware_native.load_state_dict(self, state_dict)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        native = type(self)._rankaware_native  # type: ignore[attr-defined]
        kept = {"_rankaware_plan": self._rankaware_plan, "_rankaware_inspect": self._rankaware_inspect}  # type: ignore[attr-defined]
        return {**native.__getstate__(self), **kept}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._rankaware_native,), self.__getstate__()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        native = type(self)._rankaware_native  # type: ignore[attr-defined]
        return f"RankAware{native.__repr__(self)}"


_OVERRIDES = ("report", "add_param_group", "load_state_dict", "__getstate__", "__reduce_ex__", "__repr__")


_SUBCLASSES: dict[type, Any] = {}


def _subclass(native: type[Optimizer]) -> Any:
    """The rank-aware subclass of `native`, made once: its own name and module, ours only what `_OVERRIDES` names."""
    if native not in _SUBCLASSES:
        namespace: dict[str, Any] = {name: RankAwareOptimizer.__dict__[name] for name in _OVERRIDES}
        namespace |= {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
        namespace |= {"_rankaware_native": native}
        _SUBCLASSES[native] = type(native)(native.__name__, (native,), namespace)  # type: ignore[misc]
    return _SUBCLASSES[native]


def _blank(native: type[Optimizer]) -> Any:
    """An instance without state, for copy and pickle to fill."""
    made = _subclass(native)
    return made.__new__(made)


def get_optimizer_class(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """A torch optimizer class, from itself, a name in torch.optim in any case, or "package:Class".

    >>> get_optimizer_class("adamw").__name__
    'AdamW'
    """
    found: Any = optimizer
    if isinstance(optimizer, str):
        package, _, name = optimizer.rpartition(":")
        found = _find_class(package or "torch.optim", name)
    if not isinstance(found, type) or not issubclass(found, Optimizer) or found in (Optimizer, RankAwareOptimizer):
        raise OptimizerError(f"{found!r} is not a torch optimizer class.", "Give a class such as torch.optim.AdamW.")
    return found


def _find_class(package: str, name: str) -> type[Optimizer]:
    try:
        module = import_module(package)
    except ImportError as error:
        raise OptimizerError(f"The package {package!r} cannot be imported: {error}.", "Install it.") from error
    members = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    classes = {key.lower(): value for key, value in members.items() if issubclass(value, Optimizer)}
    if name.lower() not in classes:
        known = ", ".join(sorted(value.__name__ for value in set(classes.values()) - {Optimizer}))
        raise OptimizerError(f"Unknown optimizer {name!r} in {package}.", f"Known are {known}; or say 'package:Class'.")
    return classes[name.lower()]


# --- construction ---------------------------------------------------------------------------------------------------


def _model(params: Any, model: nn.Module | None) -> nn.Module:
    found = params if isinstance(params, nn.Module) else model
    if not isinstance(found, nn.Module):
        raise OptimizerError(
            "Parameters alone do not say which of them are LoRA factors.",
            "Give the model: as the first argument, or as model= beside parameters or an optimizer.",
        )
    return found


def _native_class(built: Optimizer | None, optimizer: type[Optimizer] | str | None) -> type[Optimizer]:
    if built is None and optimizer is None:
        raise OptimizerError("No optimizer was named.", "Give a class, such as RankAwareOptimizer(model, AdamW, ...).")
    if built is not None and optimizer is not None:
        raise OptimizerError("Both a built optimizer and a class were given.", "Give one of the two.")
    native = type(built) if built is not None else get_optimizer_class(optimizer)  # type: ignore[arg-type]
    if hasattr(native, "_rankaware_native"):
        raise OptimizerError("This optimizer is rank-aware already.", "Use it as it is.")
    if built is not None and hasattr(built.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "A scheduler was built on this optimizer and holds its old groups.",
            "Wrap the optimizer first, then build the scheduler.",
        )
    if built is not None:
        _refuse_snapshots(built)
    if "LBFGS" in native.__name__:
        raise OptimizerError(
            f"{native.__name__} takes one parameter group only, so it cannot have a rate per rank.",
            "Use it unwrapped, or choose another optimizer.",
        )
    return native


def _refuse_snapshots(built: Optimizer) -> None:
    """AdaBound keeps its groups' rates in a list: groups added behind its back would never be stepped."""
    count = len(built.param_groups)
    for name, value in vars(built).items():
        if name != "param_groups" and isinstance(value, (list, tuple)) and len(value) == count:
            raise OptimizerError(
                f"{type(built).__name__} keeps {name} by group from when it was built, so it cannot be regrouped.",
                "Give the class and its settings instead of the instance.",
            )


def _refuse_beside_recipe(**given: object) -> None:
    for name in (name for name, value in given.items() if value is not None):
        raise OptimizerError(f"Both recipe= and {name}= were given.", "A recipe holds all three: give it alone.")


def _refuse_settings(settings: Mapping[str, Any]) -> NoReturn:
    name = next(iter(settings), "lr")
    raise OptimizerError(f"{name}= was given for an optimizer that is built already.", "Give it when building it.")


def _base_lr(native: type[Optimizer], built: Optimizer | None, lr: Any) -> Any:
    """The base rate: as given (a number or a tensor), checked; None leaves it to the optimizer's own default."""
    if lr is None and built is None:
        default = inspect.signature(native).parameters.get("lr")
        if default is not None and isinstance(default.default, (int, float)):
            return None
        raise OptimizerError(f"{native.__name__} has no default learning rate.", "Give lr=.")
    for group in built.param_groups if built is not None and lr is None else ({"lr": lr},):
        check_lr(group.get("lr"))
    return lr


def _construct(native: type[Optimizer], planned: list[PlannedGroup], lr: Any, settings: Mapping[str, Any]) -> Any:
    """Groups are split before the native __init__, which may snapshot them, and scaled after it."""
    opt = _blank(native)
    given = settings if lr is None else {"lr": lr, **settings}
    native.__init__(opt, [group.as_dict() for group in planned], **given)
    _scale(opt.param_groups, [group.assignment for group in planned])
    return opt


def _regroup(built: Optimizer, native: type[Optimizer], planned: list[PlannedGroup], lr: Any) -> Any:
    """The same object, its groups replaced in place and its class swapped; per-parameter state stays as it is."""
    groups = []
    for group in planned:
        made = {**group.as_dict(named=False), "param_names": [name for name, _ in group.named]}
        groups.append(made if lr is None else {**made, "lr": lr})
    if lr is not None:
        built.defaults["lr"] = lr
    _scale(groups, [group.assignment for group in planned])
    built.param_groups[:] = groups
    built.__class__ = _subclass(native)
    return built


def _scale(param_groups: Iterable[dict[str, Any]], assignments: Iterable[Assignment]) -> None:
    for group, assignment in zip(param_groups, assignments, strict=True):
        scale_lr(group, assignment)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _in_our_order(param_groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with its groups and their parameters in our order, where both sides name the same groups.

    torch matches by position alone, so groups of equal size in another order would trade their state.
    """
    saved = state_dict.get("param_groups")
    groups = [group for group in saved if group.get("param_names")] if isinstance(saved, list) else []
    key_of = {name: key for group in groups for name, key in zip(group["param_names"], group["params"], strict=True)}
    group_of = {frozenset(group["param_names"]): group for group in groups}
    ours: list[list[str]] = [group.get("param_names", []) for group in param_groups]
    wanted = [frozenset(names) for names in ours]
    if len(key_of) != sum(map(len, ours)) or len(wanted) != len(group_of) or set(wanted) != group_of.keys():
        return state_dict
    ordered = [
        {**group_of[key], "params": [key_of[name] for name in names], "param_names": list(names)}
        for key, names in zip(wanted, ours, strict=True)
    ]
    return {**state_dict, "param_groups": ordered}


def _check_checkpoint(param_groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    saved_groups, state = state_dict.get("param_groups"), state_dict.get("state", {})
    if not isinstance(saved_groups, list) or [len(g["params"]) for g in saved_groups] != [
        len(g["params"]) for g in param_groups
    ]:
        return  # torch refuses these itself, and says so
    for group, saved in zip(param_groups, saved_groups, strict=True):
        _check_rank(group, saved)
        names = group.get("param_names") or saved["params"]
        for param, key, name in zip(group["params"], saved["params"], names, strict=True):
            _check_shapes(param, state.get(key, {}), name)


def _check_rank(group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    ours, theirs = group.get("lora_rank"), saved.get("lora_rank", group.get("lora_rank"))
    if ours != theirs:
        raise CheckpointError(
            f"The checkpoint's group of {group['lora_role']} factors has rank {theirs}, the model's has rank {ours}.",
            "Load it into a model of the same rank, or start with a fresh optimizer state.",
        )


def _check_shapes(param: torch.Tensor, state: Mapping[str, Any], name: object) -> None:
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == param.dim() > 0}
    if tensors and not _fit([tuple(v.shape) for v in tensors.values()], tuple(param.shape)):
        key, value = next(iter(tensors.items()))
        raise CheckpointError(
            f"The checkpoint's {key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}.",
            "Load it into the model it was saved from, or start with a fresh optimizer state.",
        )


def _fit(saved: list[tuple[int, ...]], own: tuple[int, ...]) -> bool:
    """Whether state of these shapes can be a parameter's: one has its shape, or they are its factored statistics.

    Factored statistics have size 1 along the axes they were reduced over, and together cover every axis.
    """
    if own in saved:
        return True
    reduced = all(s in (n, 1) for shape in saved for s, n in zip(shape, own, strict=True))
    return reduced and all(any(shape[axis] == n for shape in saved) for axis, n in enumerate(own))
