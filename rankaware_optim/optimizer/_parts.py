"""The parts of the user's groups: what the native optimizer sees inside a step.

Outside a step an optimizer shows the user's groups, as they were given. `enter` puts their parts in
place, each at the user's rate × its multiplier, and `leave` puts the groups back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

Group = dict[str, Any]
State = Mapping[Any, Any]
_NOTHING = object()
_LISTS = ("params", "param_names")  # entries with a value for each parameter


@dataclass
class Part:
    """Those parameters of a user's group that train at one rate.

    at: their positions in the user's group. group: what the native step sees. Between steps it
    holds no parameters, since frameworks replace them. given_at: the base rate at which a given
    rate is trained at. rate: that of the last step.
    """

    assigned: Assigned
    at: list[int]
    multiplier: float = 1.0
    group: Group = field(default_factory=dict)
    given_at: float | None = None
    rate: Any = None

    def settle(self, base: Any, given_at: float | None = None) -> None:
        """Check the rate at a base rate. A given rate becomes a ratio to `given_at`, by default to
        the base rate, so that a schedule, a warm-up and a 0 apply.

        Raises:
            OptimizerError: base rate × multiplier, in the base rate's dtype, is 0 or infinite.
        """
        at = float(base if given_at is None else given_at)
        if self.assigned.given is not None and at:
            self.multiplier, self.given_at = self.assigned.given / at, at
        rate = float(base * self.multiplier)
        if float(base) and not 0 < rate < math.inf:
            raise OptimizerError(
                f"The base rate {base!r} times the multiplier {self.multiplier:.3g} of a group is"
                f" {rate}.",
                "Give a rate whose product is a positive finite number. A tensor should be"
                " float32.",
            )


@dataclass
class SplitGroup:
    """A user's group and its parts.

    group: the dict that was given. names: of its parameters in the model. shapes, ids: theirs when
    they were last seen. seen: the options that it had then, at first with the parameters.
    """

    group: Group
    names: list[str]
    shapes: list[tuple[int, ...]]
    seen: Group
    parts: list[Part] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def names_of(self, part: Part) -> list[str]:
        """Return the names of a part's parameters."""
        return [self.names[i] for i in part.at]

    def params_of(self, part: Part) -> list[Any]:
        """Return the parameters of a part: all of a group that was flattened, or emptied."""
        params = self.group["params"]
        if len(params) != len(self.names):
            return list(params)
        return [params[i] for i in part.at]

    def of_part(self, part: Part, value: Any) -> Any:
        """Return an option as a part has it. What a native step counts in a tensor in place is
        counted once a part.
        """
        if torch.is_tensor(value) and part is not self.parts[0]:
            return value.clone()
        return value

    def follow(self) -> None:
        """Bring the parts to what the user's group holds now, and give them its parameters.

        Raises:
            OptimizerError: the parameters are not those of before.
        """
        params = self.group["params"]
        seen = self.seen
        ids = list(map(id, params))
        if ids != self.ids:
            self._check_params(params, ids)
            self.ids = ids
        keys = [k for k, v in self.group.items() if v is not seen.get(k, _NOTHING)]
        if len(keys) > 1 or len(seen) != len(self.group):  # not `params` alone
            self.follow_options(keys)
            self.see()
        for part in self.parts:
            part.group["params"] = self.params_of(part)

    def follow_options(self, keys: Iterable[str]) -> None:
        """Copy the options that were written since, and drop those that are gone. They are compared
        by value, since pickle keeps no identity. A step sets the rate.
        """
        for key in keys:
            value = self.group[key]
            if key in (*_LISTS, "lr") or same(value, self.seen.get(key, _NOTHING)):
                continue
            for part in self.parts:
                part.group[key] = self.of_part(part, value)
        for key in self.parts[0].group.keys() - self.group.keys():
            for part in self.parts:
                part.group.pop(key, None)

    def _check_params(self, params: Sequence[Any], ids: list[int]) -> None:
        """Raise if parameters are in another order than before, or others than in their shapes.
        Those of one part train at its rate, whatever they are.
        """
        fits = len(params) == len(self.names) and sorted(ids) != sorted(self.ids)
        for param, shape in zip(params, self.shapes, strict=False):
            # a sharded one may be empty or flat here
            is_whole = param.dim() == len(shape) and param.numel()
            fits = fits and (not is_whole or tuple(param.shape) == shape)
        if fits:
            self.shapes = shapes_of(params)
        elif params and len(self.parts) > 1:
            raise OptimizerError(
                f"The {len(self.names)} parameters of a group, {self.names[0]} and others, which"
                f" have several rates, are {len(params)} now, or in another order, or were replaced"
                " by others.",
                "Build the optimizer again for those that are there now; add some by"
                " add_param_group. Where a framework flattens groups, give it groups of one rank"
                " and role each: those of opt.rates.groups.",
            )

    def show(self) -> None:
        """Show the user what the native step wrote into the first part, and take the parameters out
        of the parts.
        """
        for part in self.parts:
            part.group["params"] = ()
        first = self.parts[0]
        kept = {key: self.group[key] for key in ("params", "lr")}
        if first.group["lr"] is not first.rate:  # written by the optimizer
            kept["lr"] = first.group["lr"] / first.multiplier
        # at once: a signal's handler may save between two writes
        self.group.update({**first.group, **kept})
        self.see()

    def see(self) -> None:
        """Note the options that the user's group holds now. Its parameters are not kept alive."""
        self.seen = {**self.group, "params": None}


def outside_a_step(opt: Any, take: Callable[[Any], Any]) -> Any:
    """Return what is taken of an optimizer with the user's groups, also while it steps: in a
    signal's handler, or in another thread.
    """
    hidden = opt._rankaware
    turns = hidden.turns
    if not hidden.stepping:
        taken = take(opt)
        if hidden.turns == turns:
            return taken
    shown = object.__new__(type(opt))
    vars(shown).update(vars(opt), param_groups=hidden.users)
    return take(shown)


def splits_of(opt: Any) -> list[SplitGroup]:
    """Return the split groups of an optimizer."""
    of = opt._rankaware.of
    return outside_a_step(opt, lambda shown: of(shown.param_groups))  # type: ignore[no-any-return]


def shapes_of(params: Iterable[Any]) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in params]


def same(a: Any, b: Any) -> bool:
    """Return whether two options are the same object, or equal plain values."""
    is_plain = type(a) is type(b) and not torch.is_tensor(a)
    return a is b or (is_plain and bool(a == b))


def peak_of(group: Group) -> float:
    """Return the rate from which a group's schedule starts. OneCycleLR starts at a fraction."""
    peak: Any = group.get("max_lr") or group.get("initial_lr", group["lr"])
    return float(peak)


@dataclass
class Hidden:
    """What a wrapped optimizer has besides torch's. Copy and pickle keep it.

    survey: of the model, with the factors that do not train yet. init: as given. notes: for the
    report. model: gives the model while it lives; none in a copy. users, active: its list of groups
    when a step last began, and their split groups. stepping: whether the parts are in place. turns:
    how often a step began or ended. unchecked: whether there are parameters that no step has
    checked. training: how many parameters trained when a step last looked. steps: their number, as
    far as they are looked at. unwatch: ends the watch for evaluations in train mode.
    """

    assigner: Assigner
    survey: Survey
    init: Init | None
    notes: tuple[str, ...]
    splits: list[SplitGroup]
    model: Callable[[], nn.Module | None] | None = None
    users: list[Group] = field(default_factory=list)
    active: list[SplitGroup] = field(default_factory=list)
    stepping: bool = False
    turns: int = 0
    unchecked: bool = True
    training: int = 0
    steps: int = 0
    unwatch: Any = None

    def of(self, users: Sequence[Group]) -> list[SplitGroup]:
        """Return the split groups of some of the user's groups.

        They are known by identity: DeepSpeed's ZeRO puts one at a time in place. Groups that were
        all replaced are known by their places.

        Raises:
            OptimizerError: one was appended by hand.
        """
        known = {id(split.group): split for split in self.splits}
        if all(id(user) in known for user in users):
            return [known[id(user)] for user in users]
        if len(users) != len(self.splits):
            raise OptimizerError(
                "A group was put into param_groups by hand, so it has no rate.",
                "Add it by add_param_group.",
            )
        for split, user in zip(self.splits, users, strict=True):
            split.group = user
        return self.splits


# --- splitting ------------------------------------------------------------------------------------


def split(
    groups: Iterable[SplitGroup],
    assigner: Assigner,
    survey: Survey,
    state: State | None = None,
) -> None:
    """Assign a rate to every parameter, and split each group into parts of one rate, in the user's
    order. The groups of the parts are still to be set up by the native class.

    Args:
        groups: the user's groups.
        assigner: that of the model.
        survey: the model's, with the factors that do not train yet.
        state: the state of a built optimizer. Some mark there which parameters Muon gets.
    """
    factors = {f.name: f for f in survey.factors}
    for group in groups:
        positions = _positions(group, assigner, factors, state)
        params = group.seen["params"]
        options = [key for key in group.seen if key not in _LISTS]
        for assigned, at in positions.items():
            part = Part(assigned, at, assigned.multiplier)
            group.parts.append(part)
            part.group = {k: group.of_part(part, group.seen[k]) for k in options}
            part.group["params"] = [params[i] for i in at]
            caution = caution_of(part.multiplier)
            if caution and assigned.given is None:  # nobody can have meant it
                warn(caution)


def _positions(
    group: SplitGroup,
    assigner: Assigner,
    factors: Mapping[str, Factor],
    state: State | None,
) -> dict[Assigned, list[int]]:
    """Return the positions in a user's group of what is assigned alike."""
    # all groups of one that is built have a rate, which is not the user's own
    own_lr = state is None and "lr" in group.seen
    known = known_optimizer(assigner.optimizer or "")[1]
    settings = {**assigner.settings, **group.seen}
    params = settings.pop("params")
    assigners: dict[Any, Assigner] = {}
    positions: dict[Assigned, list[int]] = {}
    for position, param in enumerate(params):
        # some Muons hand a parameter to their Adam by its shape, Moonlight's by a mark
        is_muon = (state or {}).get(param, {}).get("use_muon")
        if is_muon is None and goes_to_adam(known, settings, param.shape):
            is_muon = False
        if is_muon not in assigners:
            own = {} if is_muon is None else {"use_muon": is_muon}
            assigners[is_muon] = assigner.of_group({**settings, **own})
        name = group.names[position]
        assigned = assigners[is_muon].assign(
            name,
            factors.get(name),
            own_lr=own_lr,
            trains=param.requires_grad,
        )
        positions.setdefault(assigned, []).append(position)
    return positions or {Assigned(): []}


def adopt(opt: Optimizer, splits: Iterable[SplitGroup]) -> None:
    """Take the last groups that the native class has set up as those of the parts.

    Raises:
        OptimizerError: the class has put parameters into other groups.
    """
    parts = [part for split in splits for part in split.parts]
    built = opt.param_groups[-len(parts) :]
    given = [list(map(id, part.group["params"])) for part in parts]
    if [list(map(id, group["params"])) for group in built] != given:
        name = type(opt).__name__
        raise OptimizerError(
            f"{name} rearranges its groups when it is built, so rates would go to the wrong"
            " groups.",
            f"Build it, then wrap it: RankAwareOptimizer({name}(model.parameters(), ...),"
            " model=model).",
        )
    for part, group in zip(parts, built, strict=True):
        part.group = group


def present(splits: Sequence[SplitGroup]) -> None:
    """Make the user's groups out of their parts.

    Raises:
        OptimizerError: a rate is impossible. The user's groups are as they were.
    """
    for split in splits:
        for part in split.parts:
            part.settle(part.group["lr"])
    for split in splits:
        first = split.parts[0]
        first.rate = first.group["lr"]  # no step has written it
        split.group.update(split.seen, lr=first.rate)
        split.ids = list(map(id, split.group["params"]))
        split.show()


# --- inside a step --------------------------------------------------------------------------------


def in_parts(opt: Any, act: Callable[[], Any]) -> Any:
    """Return the result of `act`, which sees the parts in place of the user's groups.

    A Ctrl-C may fall into `leave` itself. The groups would then stay half changed, and all later
    steps would train at base rates. Therefore `leave` runs again, from the start.
    """
    try:
        try:
            enter(opt)
            return act()
        finally:
            leave(opt)
    finally:
        if opt._rankaware.stepping:
            leave(opt)


# compiled, both would be graphs of their own with tensor rates
@torch.compiler.disable  # type: ignore[untyped-decorator]
def enter(opt: Any) -> None:
    """Put the parts in place of the user's groups, at their rates."""
    hidden = opt._rankaware
    users = opt.param_groups
    splits = hidden.of(users)
    inside = []
    for split in splits:
        split.follow()
        lr = split.group["lr"]
        for part in split.parts:
            part.rate = part.group["lr"] = lr * part.multiplier
            inside.append(part.group)
    # the order matters to who saves from another thread
    hidden.users, hidden.active = users, splits
    hidden.turns += 1
    hidden.stepping = True
    opt.param_groups = inside


@torch.compiler.disable  # type: ignore[untyped-decorator]
def leave(opt: Any) -> None:
    """Put the user's groups back, with what the native step wrote. It may run twice."""
    hidden = opt._rankaware
    if not hidden.stepping:
        return
    opt.param_groups = hidden.users
    for split in hidden.active:
        split.show()
    hidden.stepping = False
    hidden.turns += 1
