"""Split the user's parameter groups into parts that train at different learning rates.

Between steps, `param_groups` contains the user's groups with their base learning rates,
so schedulers and frameworks work as usual. At the beginning of a step, the function
`show_parts` replaces each group with its parts. Each part is a parameter group whose
learning rate is the base learning rate times a multiplier. At the end of the step, the
function `hide_parts` restores the user's groups.
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
    """The parameters of one parameter group that train at the same learning rate.

    Args:
        assigned: the role, rank and learning rate that these parameters share.
        positions: the positions of these parameters in the user's group.
        multiplier: the learning rate divided by the base learning rate.
        group: the parameter group that the native optimizer sees during a step. Between
            steps it contains no parameters, because frameworks replace parameters and
            expect the memory of the old ones to be freed.
        given_at: the base learning rate at which an explicit learning rate applies unchanged.
        step_lr: the learning rate at the beginning of the last step.
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
        """Convert an explicit learning rate to a multiplier, and check the resulting
        learning rate.

        After this conversion, a scheduler changes an explicit learning rate by the same
        factor as all other learning rates, even during a warm-up that starts at 0.

        Args:
            base: the base learning rate, a number or a tensor.
            given_at: the base learning rate at which an explicit one applies, by default `base`.

        Raises:
            OptimizerError: base × multiplier, in the dtype of `base`, is 0 or infinite.
        """
        at = float(base if given_at is None else given_at)
        if self.assigned.given is not None and at:
            self.multiplier, self.given_at = self.assigned.given / at, at
        multiplier = self.multiplier
        lr = float(base * multiplier)
        if float(base) and not 0 < lr < math.inf:
            raise OptimizerError(
                f"The base learning rate {base!r} times the multiplier {multiplier:.3g} of a"
                f" parameter is {lr}, but a learning rate must be positive and finite.",
                "Pass a different lr. If lr is a tensor, use the dtype float32.",
            )


@dataclass
class SplitGroup:
    """One of the user's parameter groups, together with the parts into which it is
    split.

    Args:
        group: the dict that belongs to the user, and that schedulers write to.
        names: the names of its parameters in the model.
        shapes: the shapes of the parameters when they were last checked.
        snapshot: a copy of the user's options when they and the parts last agreed. Until the
            optimizer is built, it also holds the parameters.
        parts: its parts, in the order in which the group first lists a parameter of each.
        ids: the `id()` of each parameter when they were last checked.
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
        """Return the names of the parameters that belong to a part."""
        return [self.names[i] for i in part.positions]

    def params_of(self, part: Part) -> list[torch.Tensor]:
        """Return the parameters that belong to a part.

        If a framework flattened or emptied the group, the positions of the part are no
        longer valid, and all remaining parameters of the group are returned.
        """
        params = self.group["params"]
        if len(params) != len(self.names):
            return list(params)
        return [params[i] for i in part.positions]

    def value_for(self, part: Part, value: Any) -> Any:
        """Return the value of a group option, such as `weight_decay`, for one part of
        the group.

        If the value is a tensor, the first part gets the tensor itself and all other
        parts get copies. An optimizer may count its steps in such a tensor. If the
        parts shared the tensor, it would be increased once for each part.
        """
        if torch.is_tensor(value) and part is not self.parts[0]:
            return value.clone()
        return value

    def copy_to_parts(self) -> None:
        """Copy the parameters and all changed options from the user's group to its
        parts.

        Raises:
            OptimizerError: the group no longer contains the same parameters as at the
                last step.
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
        """Copy options from the user's group to its parts.

        If the user removed an option from the group, it is also removed from the parts.
        The learning rate is not copied, because `show_parts` sets it.
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
        """Raise an error if the parameters of a group with several parts have changed.

        The parts store the positions of their parameters, which would then refer to the
        wrong parameters. New tensors with the same shapes in the same order are
        accepted, because accelerate replaces parameters in this way under FSDP2.
        """
        are_new = len(params) == len(self.names) and set(ids) != set(self.ids)
        if are_new and all(map(_may_have_shape, params, self.shapes)):
            self.shapes = shapes_of(params)
            return
        if not params or len(self.parts) == 1:
            return
        name = self.names[0]
        before = len(self.names)
        now = len(params)
        if now == before:
            raise OptimizerError(
                f"The parameters of a group ({name} and others) have changed their order or"
                " shapes, so it is unknown which learning rate each of them needs.",
                "Create the optimizer again with the model's current parameters.",
            )
        raise OptimizerError(
            f"A parameter group had {before} parameters ({name} and others), but now it has {now},"
            " so it is unknown which learning rate each of them needs.",
            "Create the optimizer again with the model's current parameters. To add parameters,"
            " call add_param_group. If a framework flattens the groups, pass a separate group for"
            " each rank and role, as listed in opt.rates.groups.",
        )

    def copy_from_parts(self) -> None:
        """Copy the options of the first part back to the user's group after a step.

        The step of the native optimizer may have changed these options. This function
        also removes the parameters from all parts.
        """
        for part in self.parts:
            part.group["params"] = ()
        first = self.parts[0]
        kept = {key: self.group[key] for key in ("params", "lr")}
        # A class that changes the learning rate during a step writes a new object into the part.
        # Comparing identities finds this even if the new value is equal to the old one.
        if first.group["lr"] is not first.step_lr:
            kept["lr"] = first.group["lr"] / first.multiplier
        # All values are written in one call, because a signal handler could interrupt two calls
        # and save a state that is half old and half new.
        self.group.update({**first.group, **kept})
        self.take_snapshot()

    def take_snapshot(self) -> None:
        """Save a snapshot of the current options of the user's group.

        The snapshot does not contain the parameters, because Python could not free a
        parameter as long as the snapshot refers to it.
        """
        self.snapshot = {**self.group, "params": None}


def _may_have_shape(param: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter has a given shape, or could have had it before
    sharding.

    The original shape of a parameter is unknown if this process holds only a flat or
    empty shard of it. The function then returns True.
    """
    is_whole = param.dim() == len(shape) and param.numel() > 0
    return not is_whole or tuple(param.shape) == shape


def shapes_of(params: Iterable[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in params]


def same_value(a: object, b: object) -> bool:
    """Return whether two options are the same object or equal non-tensor values."""
    if a is b:
        return True
    is_plain = type(a) is type(b) and not torch.is_tensor(a)
    return is_plain and bool(a == b)


def peak_lr(group: Group) -> float:
    """Return the highest learning rate of a group's schedule, as far as it is known.

    OneCycleLR stores the highest learning rate in `max_lr`, because it starts at a
    fraction of that value. For all other schedules, the result is the initial learning
    rate.
    """
    peak: Any = group.get("max_lr") or group.get("initial_lr", group["lr"])
    return float(peak)


# --- an optimizer's groups, outside a step and inside one -----------------------------------------


@dataclass
class WrapperState:
    """The state that a wrapped optimizer has in addition to the state of its native
    class.

    If the optimizer is copied or pickled, its `WrapperState` is copied too.

    Args:
        assigner: assigns the learning rates of the model's parameters.
        survey: the survey of the model, including LoRA matrices that do not train yet.
        init: the user's `init` argument.
        notes: sentences for the report.
        splits: the user's groups together with their parts.
        model: a function that returns the model as long as it exists, or None in a
            copy.
        user_groups: the list `param_groups` when the last step began.
        active_splits: the split groups that belong to `user_groups`.
        in_step: whether `param_groups` currently contains the parts.
        swaps: how many times parts have been shown or hidden.
        unchecked: whether the next step must check that the parameters get gradients.
        trained_count: how many parameters required gradients when they were last
            counted.
        steps: the number of steps so far. Counting stops when epsilon has been checked.
        end_watch: a function that ends the watch for evaluations in train mode, or None
            if there is no watch.
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
        """Return the optimizer's model, or None if the model was deleted or the
        optimizer is a copy.
        """
        return None if self.model is None else self.model()

    def splits_of(self, groups: Sequence[Group]) -> list[SplitGroup]:
        """Return the `SplitGroup` object of each given group.

        Groups are compared as Python objects instead of by their position, because
        DeepSpeed's ZeRO passes only one group at a time to the optimizer. If a
        framework replaced all groups with new dicts, the function identifies the groups
        by their position.

        Raises:
            OptimizerError: the user appended a group to `param_groups` directly.
        """
        known = {id(split.group): split for split in self.splits}
        if all(id(group) in known for group in groups):
            return [known[id(group)] for group in groups]
        if len(groups) != len(self.splits):
            raise OptimizerError(
                "A parameter group was appended to param_groups directly, so it has no learning"
                " rate for each rank.",
                "Remove the group from param_groups, and call opt.add_param_group(group) instead.",
            )
        for split, group in zip(self.splits, groups, strict=True):
            split.group = group
        return self.splits


class RankAware(Protocol):
    """The type of a `RankAwareOptimizer` instance, for type annotations in modules that
    cannot import the class.
    """

    param_groups: list[Group]
    _rankaware: WrapperState


def read_outside_a_step(opt: RankAware, read: Callable[[Any], _T]) -> _T:
    """Call `read` with an optimizer whose `param_groups` contain the user's groups.

    A signal handler or another thread may call this function while a step is running.
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
    """Return the `SplitGroup` objects of an optimizer."""
    wrapper = opt._rankaware
    return read_outside_a_step(opt, lambda o: wrapper.splits_of(o.param_groups))


def with_parts_shown(opt: RankAware, act: Callable[[], _T]) -> _T:
    """Call `act` while `param_groups` contains the parts, and return its result."""
    try:
        try:
            show_parts(opt)
            return act()
        finally:
            hide_parts(opt)
    finally:
        # Ctrl-C may have interrupted `hide_parts` itself. Without this second call, every later
        # step would train at the base learning rates.
        if opt._rankaware.in_step:
            hide_parts(opt)


# torch.compile(opt.step) leaves out this function and `hide_parts`. With a learning rate in a
# tensor, each would become a graph of its own.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def show_parts(opt: RankAware) -> None:
    """Replace the user's groups with their parts, and set the learning rate of each
    part.
    """
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
    """Restore the user's groups, including the values that the native step changed.

    If this function was interrupted, it is safe to call it again.
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
    """Assign a learning rate to every parameter, and split each group into parts.

    All parameters of a part train at the same learning rate. The function does not pass
    the parts to the native optimizer yet.

    Args:
        groups: the user's groups, to which this function adds the parts.
        assigner: decides the learning rates of the model's parameters.
        survey: the model's survey, including LoRA matrices that do not train yet.
        state: the state of an existing optimizer, or None for a new one. Some classes
            record in their state which parameters Muon trains.
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
    """Assign learning rates to the parameters of a group, and collect parameters with
    equal assignments.

    The result is a dictionary from `Assigned` objects to the positions of the
    parameters in the group. If the group is empty, the result contains a single entry
    with an empty list of positions.
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
    """Return whether an optimizer that combines Muon and Adam uses Muon for a
    parameter.

    Moonlight's optimizer stores the choice between Muon and Adam in the state of the
    parameter. Other optimizers choose by the shape of the parameter. Return None if the
    optimizer is not known to combine Muon and Adam.
    """
    mark: bool | None = state.get(param, {}).get("use_muon")
    if mark is not None:
        return mark
    known = known_optimizer(assigner.optimizer or "")[1]
    return False if goes_to_adam(known, settings, param.shape) else None


def take_built_groups(opt: Optimizer, splits: Iterable[SplitGroup]) -> None:
    """Assign each parameter group that the native class has created to its part.

    Raises:
        OptimizerError: the class moved parameters to other groups.
    """
    parts = [part for split in splits for part in split.parts]
    built = opt.param_groups[-len(parts) :]
    given = [list(map(id, part.group["params"])) for part in parts]
    if [list(map(id, group["params"])) for group in built] != given:
        name = type(opt).__name__
        raise OptimizerError(
            f"{name} rearranges its groups of parameters when it is created, so parameters would"
            " get the wrong learning rates.",
            "Create the optimizer first, and then wrap it:"
            f" RankAwareOptimizer({name}(model.parameters(), ...), model=model).",
        )
    for part, group in zip(parts, built, strict=True):
        part.group = group


def fill_user_groups(splits: Sequence[SplitGroup]) -> None:
    """If the native class added options to the parts of a group, copy these options to
    the user's group.

    Raises:
        OptimizerError: a learning rate is impossible. The user's groups have not been
            changed.
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
