"""The parts of the user's groups, which the native optimizer trains in their place during a step.

Outside a step, `param_groups` holds the user's groups at their base learning rates. `show_parts`
replaces them by their parts: one group for each learning rate, which is the base learning rate
times the part's multiplier. `hide_parts` puts the user's groups back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from .._optimizers import goes_to_adam, known_optimizer
from .._types import Factor, Init
from .._warn import warn
from ..errors import OptimizerError
from ..inspection import Survey
from ..laws import caution_of
from ._assign import Assigned, Assigner

_T = TypeVar("_T")
Group = dict[str, Any]
State = Mapping[Any, Any]
_MISSING = object()
# The entries of a group that have a value for each parameter.
_LISTS = ("params", "param_names")


@dataclass
class Part:
    """The parameters of a user's group that train at one learning rate.

    Args:
        assigned: the role, rank and learning rate of these parameters.
        positions: where they are in the user's group.
        multiplier: the learning rate divided by the base learning rate.
        group: the parameter group that the native optimizer sees during a step. Between steps it
            holds no parameters, because frameworks replace them and expect the old ones to be
            freed.
        given_at: the base learning rate at which an explicit learning rate applies unchanged.
        step_lr: the learning rate with which the last step began.
    """

    assigned: Assigned
    positions: list[int]
    multiplier: float = 1.0
    group: Group = field(default_factory=dict)
    given_at: float | None = None
    step_lr: float | torch.Tensor | None = None

    def fix_multiplier(
        self, base: float | torch.Tensor, given_at: float | None = None
    ) -> None:
        """Turn an explicit learning rate into a multiplier, and check the learning rate.

        A schedule, a warm-up and a rate of 0 then apply to an explicit learning rate too.

        Args:
            base: the base learning rate, a number or a tensor.
            given_at: the base learning rate at which an explicit one applies, by default `base`.

        Raises:
            OptimizerError: base × multiplier, in the dtype of `base`, is 0 or infinite.
        """
        at = float(base if given_at is None else given_at)
        if self.assigned.given is not None and at:
            self.multiplier, self.given_at = self.assigned.given / at, at
        lr = float(base * self.multiplier)
        if float(base) and not 0 < lr < math.inf:
            raise OptimizerError(
                f"The base learning rate {base!r} times the multiplier {self.multiplier:.3g} of a"
                f" group is {lr}.",
                "Set a base learning rate for which the product is positive and finite. If it is a"
                " tensor, use float32.",
            )


@dataclass
class SplitGroup:
    """A user's group and its parts.

    Args:
        group: the dict that the user holds, and that schedulers write to.
        names: the names of its parameters in the model.
        shapes: the shapes of its parameters when a step last looked.
        snapshot: a copy of the user's options when they and the parts last agreed. Until the
            optimizer is built, it also holds the parameters.
        parts: its parts, in the order in which the group first lists a parameter of each.
        ids: the identities of its parameters when a step last looked.
    """

    # The options of a group take part in a cycle, once per step:
    #   1. Between steps the user, a scheduler or a framework writes to `group`.
    #   2. `copy_to_parts` compares `group` with `snapshot`, and copies changes to each part.
    #   3. The parts get the parameters and their learning rates, and the native step runs on them.
    #      It may write to a part: a counter, or a learning rate of its own.
    #   4. `copy_from_parts` copies the first part back to `group`, and takes a new snapshot.
    # Without a snapshot, step 2 would overwrite values that the native class keeps for each part.

    group: Group
    names: list[str]
    shapes: list[tuple[int, ...]]
    snapshot: Group
    parts: list[Part] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def names_of(self, part: Part) -> list[str]:
        """Return the names of a part's parameters."""
        return [self.names[i] for i in part.positions]

    def params_of(self, part: Part) -> list[torch.Tensor]:
        """Return the parameters of a part. A group that was flattened or emptied has no positions
        any more, so all of its parameters are returned.
        """
        params = self.group["params"]
        if len(params) != len(self.names):
            return list(params)
        return [params[i] for i in part.positions]

    def value_for(self, part: Part, value: Any) -> Any:
        """Return an option's value for a part. All parts but the first get a copy of a tensor,
        because a native step that counts in it would otherwise count once for each part.
        """
        if torch.is_tensor(value) and part is not self.parts[0]:
            return value.clone()
        return value

    def copy_to_parts(self) -> None:
        """Copy the options that changed in the user's group to its parts, and put its parameters
        into them.

        Raises:
            OptimizerError: the group lists other parameters than at the last step.
        """
        params = self.group["params"]
        ids = list(map(id, params))
        if ids != self.ids:
            self._check_params(params, ids)
            self.ids = ids
        changed = []
        for key, value in self.group.items():
            if value is not self.snapshot.get(key, _MISSING):
                changed.append(key)
        # `params` always counts as changed, since the snapshot does not keep it.
        if len(changed) > 1 or len(self.snapshot) != len(self.group):
            self.copy_options(changed)
            self.take_snapshot()
        for part in self.parts:
            part.group["params"] = self.params_of(part)

    def copy_options(self, keys: Iterable[str]) -> None:
        """Copy options of the user's group to the parts, and remove from the parts those that the
        group no longer has. The learning rate is left out: `show_parts` sets it.
        """
        for key in keys:
            value = self.group[key]
            # Compared by value as well, because unpickled options are other objects.
            is_old = same_value(value, self.snapshot.get(key, _MISSING))
            if key in (*_LISTS, "lr") or is_old:
                continue
            for part in self.parts:
                part.group[key] = self.value_for(part, value)
        for key in self.parts[0].group.keys() - self.group.keys():
            for part in self.parts:
                part.group.pop(key, None)

    def _check_params(self, params: Sequence[torch.Tensor], ids: list[int]) -> None:
        """Raise an error if a group of several learning rates has other parameters than before,
        because the positions of its parts would be wrong.

        New tensors of the same shapes in the same places are accepted: accelerate replaces them so
        under FSDP2.
        """
        are_new = len(params) == len(self.names) and set(ids) != set(self.ids)
        if are_new and all(map(_may_have_shape, params, self.shapes)):
            self.shapes = shapes_of(params)
            return
        if not params or len(self.parts) == 1:
            return
        raise OptimizerError(
            f"The {len(self.names)} parameters of a group, {self.names[0]} and others, which"
            f" train at several learning rates, changed: there are {len(params)} now, or their"
            " order or their shapes are different.",
            "Build the optimizer again for the parameters that the model has now. To add"
            " parameters, call add_param_group. For a framework that flattens groups, pass one"
            " group for each rank and role, as opt.rates.groups lists them.",
        )

    def copy_from_parts(self) -> None:
        """Copy the values that the native step wrote from the first part to the user's group, and
        take the parameters out of the parts.
        """
        for part in self.parts:
            part.group["params"] = ()
        first = self.parts[0]
        kept = {key: self.group[key] for key in ("params", "lr")}
        # Compared by identity: a class that sets a learning rate of its own writes a new object.
        if first.group["lr"] is not first.step_lr:
            kept["lr"] = first.group["lr"] / first.multiplier
        # One call, because a signal's handler may save the state between two writes.
        self.group.update({**first.group, **kept})
        self.take_snapshot()

    def take_snapshot(self) -> None:
        """Note the options that the user's group holds now. Its parameters are not kept alive."""
        self.snapshot = {**self.group, "params": None}


def _may_have_shape(param: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter has this shape. A shard may be flat or empty, and can have any."""
    is_whole = param.dim() == len(shape) and param.numel() > 0
    return not is_whole or tuple(param.shape) == shape


def shapes_of(params: Iterable[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in params]


def same_value(a: object, b: object) -> bool:
    """Return whether two options are the same object, or equal plain values."""
    if a is b:
        return True
    is_plain = type(a) is type(b) and not torch.is_tensor(a)
    return is_plain and bool(a == b)


def peak_lr(group: Group) -> float:
    """Return the learning rate from which a group's schedule starts. OneCycleLR starts at a
    fraction of it.
    """
    peak: Any = group.get("max_lr") or group.get("initial_lr", group["lr"])
    return float(peak)


# --- an optimizer's groups, outside a step and inside one -----------------------------------------


@dataclass
class WrapperState:
    """The attributes of a wrapped optimizer that the native class does not have. Copies and pickles
    keep them.

    Args:
        assigner: assigns the learning rates of the model's parameters.
        survey: the survey of the model, including LoRA matrices that do not train yet.
        init: the argument `init`.
        notes: sentences for the report.
        splits: the user's groups with their parts.
        model: returns the model while it lives. None in a copy.
        user_groups: the list `param_groups` when the last step began.
        active_splits: the split groups of that list.
        in_step: whether `param_groups` shows the parts.
        swaps: how often parts were shown or hidden.
        unchecked: whether some parameters have not yet been checked for gradients.
        trained_count: how many parameters required gradients when a step last looked.
        steps: the number of steps, up to the step at which epsilon is examined.
        end_watch: ends the watch for evaluations in train mode, None if there is no watch.
    """

    assigner: Assigner
    survey: Survey
    init: Init | None
    notes: tuple[str, ...]
    splits: list[SplitGroup]
    model: Callable[[], nn.Module | None] | None = None
    user_groups: list[Group] = field(default_factory=list)
    active_splits: list[SplitGroup] = field(default_factory=list)
    in_step: bool = False
    swaps: int = 0
    unchecked: bool = True
    trained_count: int = 0
    steps: int = 0
    end_watch: Callable[[], object] | None = None

    def live_model(self) -> nn.Module | None:
        """Return the model; None if it is gone, or if this is a copy."""
        return None if self.model is None else self.model()

    def splits_of(self, groups: Sequence[Group]) -> list[SplitGroup]:
        """Return the split groups of some of the user's groups.

        They are recognised by identity, because DeepSpeed's ZeRO shows one group at a time. If all
        groups were replaced by other dicts, they are recognised by position.

        Raises:
            OptimizerError: the user appended a group to `param_groups`.
        """
        known = {id(split.group): split for split in self.splits}
        if all(id(group) in known for group in groups):
            return [known[id(group)] for group in groups]
        if len(groups) != len(self.splits):
            raise OptimizerError(
                "A group was added to param_groups by hand, so its learning rates were not"
                " converted to its ranks.",
                "Call add_param_group instead.",
            )
        for split, group in zip(self.splits, groups, strict=True):
            split.group = group
        return self.splits


class RankAware(Protocol):
    """An instance of `RankAwareOptimizer`, for annotations in modules that it imports."""

    param_groups: list[Group]
    _rankaware: WrapperState


def read_outside_a_step(opt: RankAware, read: Callable[[Any], _T]) -> _T:
    """Call `read` with an optimizer that shows the user's groups, and return the result. A step may
    be running, because the caller may be a signal's handler or another thread.
    """
    # The optimizer may enter or leave a step at any moment here. `show_parts` sets `in_step`, then
    # counts the swap, then changes `param_groups`. `hide_parts` does the same in reverse order. So
    # if parts could be seen at any time during `read`, either `in_step` was true before it, or
    # `swaps` has another value after it. In both cases a copy that shows the user's groups is read.
    wrapper = opt._rankaware
    swaps = wrapper.swaps
    if not wrapper.in_step:
        result = read(opt)
        if wrapper.swaps == swaps:
            return result
    outside = object.__new__(type(opt))
    vars(outside).update(vars(opt), param_groups=wrapper.user_groups)
    return read(outside)


def split_groups(opt: RankAware) -> list[SplitGroup]:
    """Return an optimizer's groups with their parts."""
    wrapper = opt._rankaware
    return read_outside_a_step(opt, lambda o: wrapper.splits_of(o.param_groups))


def with_parts_shown(opt: RankAware, act: Callable[[], _T]) -> _T:
    """Return the result of `act`, which sees the parts in `param_groups`."""
    try:
        try:
            show_parts(opt)
            return act()
        finally:
            hide_parts(opt)
    finally:
        # Ctrl-C may have interrupted `hide_parts`. All later steps would then train at base rates.
        if opt._rankaware.in_step:
            hide_parts(opt)


# torch.compile(opt.step) leaves out this function and `hide_parts`. With a learning rate in a
# tensor, each would become a graph of its own.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def show_parts(opt: RankAware) -> None:
    """Replace the user's groups by their parts, at the parts' learning rates."""
    wrapper = opt._rankaware
    groups = opt.param_groups
    splits = wrapper.splits_of(groups)
    inside = []
    for split in splits:
        split.copy_to_parts()
        lr = split.group["lr"]
        for part in split.parts:
            part.step_lr = part.group["lr"] = lr * part.multiplier
            inside.append(part.group)
    wrapper.user_groups, wrapper.active_splits = groups, splits
    # `read_outside_a_step` relies on the order of these three lines.
    wrapper.in_step = True
    wrapper.swaps += 1
    opt.param_groups = inside


@torch.compiler.disable  # type: ignore[untyped-decorator]
def hide_parts(opt: RankAware) -> None:
    """Put the user's groups back, with the values that the native step wrote. It may be called
    again after an interrupt, and then does the same once more.
    """
    wrapper = opt._rankaware
    if not wrapper.in_step:
        return
    opt.param_groups = wrapper.user_groups
    for split in wrapper.active_splits:
        split.copy_from_parts()
    wrapper.swaps += 1
    wrapper.in_step = False


# --- splitting ------------------------------------------------------------------------------------


def split_into_parts(
    groups: Iterable[SplitGroup],
    assigner: Assigner,
    survey: Survey,
    state: State | None = None,
) -> None:
    """Assign a learning rate to every parameter, and split each group into parts of one learning
    rate. The native class has not seen the groups of the parts yet.

    Args:
        groups: the user's groups. Their parts are added to them.
        assigner: the model's assigner.
        survey: the model's survey, including LoRA matrices that do not train yet.
        state: the state of an existing optimizer, None for a new one. Some classes mark there which
            parameters are trained by Muon.
    """
    factors = {f.name: f for f in survey.factors}
    for split in groups:
        positions = _positions(split, assigner, factors, state)
        for assigned, of_part in positions.items():
            _add_part(split, assigned, of_part)
            # A multiplier out of all range is a mistake, such as an alpha of 1e-12.
            caution = caution_of(assigned.multiplier)
            if caution and assigned.given is None:
                warn(caution)


def _add_part(split: SplitGroup, assigned: Assigned, positions: list[int]) -> None:
    part = Part(assigned, positions, assigned.multiplier)
    split.parts.append(part)
    for key, value in split.snapshot.items():
        if key not in _LISTS:
            part.group[key] = split.value_for(part, value)
    params = split.snapshot["params"]
    part.group["params"] = [params[i] for i in positions]


def _positions(
    split: SplitGroup,
    assigner: Assigner,
    factors: Mapping[str, Factor],
    state: State | None,
) -> dict[Assigned, list[int]]:
    """Return the positions in a group of the parameters that are assigned alike. A group without
    parameters has one part as well, without positions.
    """
    # All groups of an existing optimizer have a learning rate, which may be its default.
    own_lr = state is None and "lr" in split.snapshot
    settings = {**assigner.settings, **split.snapshot}
    params = settings.pop("params")
    assigners: dict[bool | None, Assigner] = {}
    positions: dict[Assigned, list[int]] = {}
    for position, (name, param) in enumerate(zip(split.names, params, strict=True)):
        is_muon = _trained_by_muon(param, assigner, settings, state or {})
        if is_muon not in assigners:
            marked = {} if is_muon is None else {"use_muon": is_muon}
            assigners[is_muon] = assigner.of_group({**settings, **marked})
        assigned = assigners[is_muon].assign(
            name, factors.get(name), own_lr=own_lr, trains=param.requires_grad
        )
        positions.setdefault(assigned, []).append(position)
    return positions or {Assigned(): []}


def _trained_by_muon(
    param: torch.Tensor, assigner: Assigner, settings: Group, state: State
) -> bool | None:
    """Return whether a class that holds a Muon and an Adam trains a parameter by Muon; None if it
    does not say. Moonlight's class marks the parameter in its state, others decide by the shape.
    """
    mark: bool | None = state.get(param, {}).get("use_muon")
    if mark is not None:
        return mark
    known = known_optimizer(assigner.optimizer or "")[1]
    return False if goes_to_adam(known, settings, param.shape) else None


def take_built_groups(opt: Optimizer, splits: Iterable[SplitGroup]) -> None:
    """Make the last groups that the native class built the groups of the parts.

    Raises:
        OptimizerError: the class moved parameters to other groups.
    """
    parts = [part for split in splits for part in split.parts]
    built = opt.param_groups[-len(parts) :]
    given = [list(map(id, part.group["params"])) for part in parts]
    if [list(map(id, group["params"])) for group in built] != given:
        name = type(opt).__name__
        raise OptimizerError(
            f"{name} rearranges its groups when it is built, so learning rates would go to the"
            " wrong parameters.",
            f"Build it, then wrap it: RankAwareOptimizer({name}(model.parameters(), ...),"
            " model=model).",
        )
    for part, group in zip(parts, built, strict=True):
        part.group = group


def fill_user_groups(splits: Sequence[SplitGroup]) -> None:
    """Copy the options that the native class added to the parts into the user's groups.

    Raises:
        OptimizerError: a learning rate is impossible. The user's groups were not changed.
    """
    for split in splits:
        for part in split.parts:
            part.fix_multiplier(part.group["lr"])
    for split in splits:
        first = split.parts[0]
        first.step_lr = first.group["lr"]  # No step has changed it.
        split.group.update(split.snapshot, lr=first.step_lr)
        split.ids = list(map(id, split.group["params"]))
        split.copy_from_parts()
