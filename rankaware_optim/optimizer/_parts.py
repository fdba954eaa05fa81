"""The parts of the user's groups: what the native optimizer sees inside a step.

Outside a step an optimizer shows the user's groups, as they were given. `enter` puts their parts in
place, each at the user's rate × its multiplier, and `leave` puts the groups back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import is_, is_not, mul
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Factor
from .._warn import warn
from ..errors import OptimizerError
from ..laws import caution_of
from ._assign import Assigned, Assigner, Rule
from ._user_groups import Group, UserGroup

State = Mapping[Any, Any]
_HELD = ("params", "lr")  # set at every step
_NOTHING = object()
_BY_HAND = Assigned(why="put into param_groups by hand: its own rate")


@dataclass
class Part:
    """Those parameters of a user's group that train at one rate.

    at: their positions in the user's group. group: what the native step sees. Between steps it
    holds no parameters, since frameworks replace them. base: the base rate at which it stands.
    rate: the rate of the last step.
    """

    assigned: Assigned
    at: list[int]
    group: Group
    multiplier: float = 1.0
    base: Any = None
    rate: Any = None

    def settle(self, base: Any) -> None:
        """Stand at a base rate. A rate of its own becomes a ratio to it, so that a schedule, a
        warm-up and a 0 apply.

        Raises:
            OptimizerError: base rate × multiplier, in the base rate's dtype, is 0 or infinite.
        """
        if self.assigned.lr is not None and float(base):
            self.multiplier = self.assigned.lr / float(base)
        rate = float(base * self.multiplier)
        if float(base) and not 0 < rate < math.inf:
            raise OptimizerError(
                f"The base rate {base!r} times the multiplier {self.multiplier:.3g} of a group is"
                f" {rate}.",
                "Give a rate whose product is a positive finite number. A tensor should be"
                " float32.",
            )
        self.base = base


class Member(NamedTuple):
    """A parameter of a user's group: its name, and its shape when it was last seen."""

    name: str
    shape: tuple[int, ...]

    def replaced(self, param: torch.Tensor) -> Member:
        """Return the member with another tensor, which must have its shape. A sharded one may be
        empty or flat here.
        """
        here = tuple(param.shape)
        if len(here) == len(self.shape) and param.numel() and here != self.shape:
            raise OptimizerError(
                f"The parameter {self.name} had shape {self.shape} and has {here}: the parameters"
                " of a group were put into another order, or replaced.",
                "Build the optimizer again, for the parameters that are there now.",
            )
        return self._replace(shape=here)


@dataclass
class SplitGroup:
    """A user's group and its parts.

    lists: the options that have a value for each parameter, as some of PEFT's and of
    pytorch_optimizer's. ids: those of its parameters when they were last seen. lr, seen: its rate
    and options likewise. before: the first part's options when the step began.
    """

    group: Group
    members: list[Member]
    parts: list[Part]
    lists: Collection[str] = ()
    ids: list[int] = field(default_factory=list)
    lr: Any = None
    seen: Group = field(default_factory=dict)
    before: Sequence[Any] = ()

    def of_part(self, part: Part, key: str, value: Any) -> Any:
        """Return an option as a part has it. What a native step counts in a tensor in place is
        counted once a part.
        """
        if key in self.lists:
            return [value[i] for i in part.at]
        if torch.is_tensor(value) and part is not self.parts[0] and key != "lr":
            return value.clone()
        return value

    def base_of(self, part: Part) -> Any:
        """Return the base rate of a part, which follows a rate that was written since."""
        lr = self.group["lr"]
        return part.base if same(lr, self.lr) else lr

    def follow(self) -> None:
        """Bring the parts to what the user's group holds now.

        Raises:
            OptimizerError: the parameters are not those of before.
        """
        params = self.group["params"]
        ids = list(map(id, params))
        if ids != self.ids:
            self._follow_params(params, ids)
        written = map(is_not, self.group.values(), self.seen.values())
        if len(self.group) == len(self.seen) and sum(written) == 1:  # `params` alone
            return
        self.follow_options()
        lr = self.group["lr"]
        if not same(lr, self.lr):
            for part in self.parts:
                part.base = lr
        self.lr = lr
        self.see()

    def follow_options(self, *, always: bool = False) -> None:
        """Copy the options that were written since. They are compared with the first part's, which
        the user was shown, by value too: pickle keeps no identity. always: copy all.
        """
        first = self.parts[0].group
        for key, value in self.group.items():
            if key in _HELD or (value is self.seen.get(key, _NOTHING) and not always):
                continue
            shown = self.of_part(self.parts[0], key, value)
            if always or not same(shown, first.get(key, _NOTHING)):
                for part in self.parts:
                    part.group[key] = self.of_part(part, key, value)
        if len(first) == len(self.group):
            return
        for key in first.keys() - self.group.keys():
            for part in self.parts:
                part.group.pop(key, None)

    def _follow_params(self, params: Sequence[Any], ids: list[int]) -> None:
        """Follow parameters that were put into another order, replaced, flattened or taken away."""
        count, members = len(params), self.members
        if sorted(ids) == sorted(self.ids):
            if len(self.parts) > 1:
                raise OptimizerError(
                    f"The {count} parameters of a group were put into another order, and its parts"
                    " have several rates.",
                    "Leave their order, or build the optimizer again.",
                )
            by_id = dict(zip(self.ids, members, strict=True))
            self.members = [by_id[each] for each in ids]
        elif count == len(members):
            for i, param in enumerate(params):
                members[i] = members[i].replaced(param)
        elif count and (len(self.parts) > 1 or count > len(members)):
            raise OptimizerError(
                f"A group of {len(members)} parameters has {count}: something flattened it, or"
                " changed it by hand, and its parts have several rates.",
                "Add parameters by add_param_group. Where a framework flattens groups, give it"
                " groups of one rank and role each: those of opt.rates.groups.",
            )
        self.ids = ids

    def fill(self, params: Sequence[Any]) -> None:
        """Give the parts their parameters."""
        if len(params) != len(self.members):  # flattened, or none
            for part in self.parts:
                part.group["params"] = list(params)
            return
        for part in self.parts:
            part.group["params"] = [params[i] for i in part.at]

    def show(self) -> None:
        """Show the user what the native step wrote into the first part, and take the parameters out
        of the parts.
        """
        user, first, before = self.group, self.parts[0], self.before
        as_before = len(first.group) == len(before)
        as_before &= all(map(is_, first.group.values(), before))
        self.before = ()
        for part in self.parts:
            group = part.group
            group["params"] = ()
            if group["lr"] is not part.rate:  # written by the optimizer
                part.base = group["lr"] / part.multiplier
        if as_before:
            return
        if not same(first.base, self.lr):
            self.lr = user["lr"] = first.base
        for key, value in first.group.items():
            if key not in _HELD and key not in self.lists:
                user[key] = value
        self.see()

    def see(self) -> None:
        """Note the options that the user's group holds now. Its parameters are not kept alive."""
        self.seen = {**self.group, "params": None}


def same(a: Any, b: Any) -> bool:
    """Return whether two options are the same object, or equal plain values."""
    return a is b or (type(a) is type(b) and _is_plain(a) and bool(a == b))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


@dataclass
class Parts:
    """The split groups of an optimizer.

    users, active: its list of groups when a step last began, and their split groups. stepping:
    whether the parts are in place. turns: how often a step began or ended.
    """

    splits: list[SplitGroup]
    users: list[Group] = field(default_factory=list)
    active: list[SplitGroup] = field(default_factory=list)
    stepping: bool = False
    turns: int = 0

    def shown(self, opt: Any) -> list[Group]:
        """Return the user's groups of an optimizer, also inside a step."""
        groups: list[Group] = self.users if self.stepping else opt.param_groups
        return groups

    def copy(self) -> list[SplitGroup]:
        """Return copies of the split groups, to go back to."""
        copies = []
        for split in self.splits:
            parts = [replace(part, group=dict(part.group)) for part in split.parts]
            copies.append(replace(split, parts=parts, members=list(split.members)))
        return copies

    def of(self, users: Sequence[Group]) -> list[SplitGroup]:
        """Return the split groups of some of the user's groups.

        They are known by identity: DeepSpeed's ZeRO puts one at a time in place. Groups that were
        all replaced are known by their places, and one that was appended by hand is one part.
        """
        known = {id(split.group): split for split in self.splits}
        strange = [user for user in users if id(user) not in known]
        if strange and len(users) == len(self.splits):
            for split, user in zip(self.splits, users, strict=True):
                split.group = user
            return self.splits
        for user in strange:
            number, params = len(self.splits), user["params"]
            members = [
                Member(f"group{number}.unnamed.{i}", tuple(p.shape))
                for i, p in enumerate(params)
            ]
            part = Part(_BY_HAND, list(range(len(members))), {**user, "params": []})
            part.base = user["lr"]
            known[id(user)] = SplitGroup(user, members, [part], lr=user["lr"])
            self.splits.append(known[id(user)])
        return [known[id(user)] for user in users]


# --- splitting ------------------------------------------------------------------------------------


def split(
    groups: Iterable[UserGroup],
    assigner: Assigner,
    factors: Mapping[str, Factor],
    state: State | None = None,
) -> list[SplitGroup]:
    """Assign a rate to every parameter, and split each user's group into parts of one rate, in the
    user's order. The groups of the parts are still to be set up by the native class.

    Args:
        groups: the user's groups.
        assigner: that of the model.
        factors: the model's, by name, with those that do not train yet.
        state: the state of a built optimizer. Some mark there which parameters Muon gets.
    """
    splits = []
    for group in groups:
        positions: dict[Assigned, list[int]] = {}
        assigned = _assigned(group, assigner, factors, state)
        for position, each in enumerate(assigned):
            positions.setdefault(each, []).append(position)
        members = [Member(name, tuple(param.shape)) for name, param in group.named]
        lists = _lists(group, assigner)
        one = SplitGroup(group.given, members, [], lists, seen=group.options)
        for each, at in (positions or {Assigned(): []}).items():
            part = Part(each, at, {}, each.multiplier)
            one.parts.append(part)
            options = {k: one.of_part(part, k, v) for k, v in group.options.items()}
            part.group = {"params": [group.named[i][1] for i in at], **options}
        splits.append(one)
    _warn_of_extremes(splits)
    return splits


def _lists(group: UserGroup, assigner: Assigner) -> set[str]:
    """Return the options with a value for each parameter. Adam's two betas in a list are none."""
    defaults = defaults_of(assigner.optimizer)
    return {
        key
        for key, value in group.options.items()
        if isinstance(value, list)
        and len(value) == len(group.named) > 1
        and not isinstance(defaults.get(key), (list, tuple))
    }


def _assigned(
    group: UserGroup,
    assigner: Assigner,
    factors: Mapping[str, Factor],
    state: State | None,
) -> Iterator[Assigned]:
    """Yield what is assigned to each parameter. Some optimizers decide its family by its state. All
    groups of one that is built have a rate, which is not the user's own.
    """
    switches = sorted({switch.setting for switch in assigner.known.switches})
    own_lr = state is None and "lr" in group.options
    rules: dict[Any, Rule] = {}
    for name, param in group.named:
        moments = (state or {}).get(param, {})
        marks = tuple((key, moments[key]) for key in switches if key in moments)
        settings = {**group.options, **dict(marks)}
        to_adam = assigner.goes_to_adam(settings, param.shape)
        if (to_adam, marks) not in rules:
            rules[to_adam, marks] = assigner.rule(settings, to_adam)
        yield assigner.assign(
            name,
            factors.get(name),
            rules[to_adam, marks],
            own_lr=own_lr,
            trains=param.requires_grad,
        )


def _warn_of_extremes(splits: Iterable[SplitGroup]) -> None:
    """Warn of the first multiplier that nobody can have meant."""
    for split in splits:
        for part in split.parts:
            caution = caution_of(part.multiplier)
            if caution and part.assigned.lr is None:
                warn(f"{split.members[part.at[0]].name}: {caution}")
                return


# --- inside a step --------------------------------------------------------------------------------


# compiled, both would be graphs of their own with tensor rates
@torch.compiler.disable  # type: ignore[untyped-decorator]
def enter(opt: Any) -> None:
    """Put the parts in place of the user's groups, at their rates."""
    parts, users = opt._rankaware.parts, opt.param_groups
    splits = parts.of(users)
    for split in splits:
        split.follow()
    for split in splits:
        split.fill(split.group["params"])
    each = list(chain.from_iterable(split.parts for split in splits))
    for part, rate in zip(each, _rates(each), strict=True):
        part.rate = part.group["lr"] = rate
    # the order matters to who saves from another thread
    for split in splits:
        split.before = list(split.parts[0].group.values())
    parts.users, parts.active = users, splits
    parts.turns += 1
    parts.stepping = True
    opt.param_groups = [part.group for part in each]


def _rates(parts: Sequence[Part]) -> Sequence[Any]:
    """Return base rate × multiplier of parts."""
    bases, multipliers = [p.base for p in parts], [p.multiplier for p in parts]
    if bases and all(isinstance(base, torch.Tensor) for base in bases):
        return torch._foreach_mul(bases, multipliers)  # one call for all
    return list(map(mul, bases, multipliers))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def leave(opt: Any) -> None:
    """Put the user's groups back, with what the native step wrote."""
    parts = opt._rankaware.parts
    if not parts.stepping:
        return
    opt.param_groups = parts.users
    for split in parts.active:
        split.show()
    parts.stepping = False
    parts.turns += 1


def adopt(opt: Optimizer, splits: Iterable[SplitGroup]) -> None:
    """Take the groups that the native class has set up as those of the parts, and show the user's.

    Raises:
        OptimizerError: the class has put parameters into other groups, or a rate is impossible.
            The user's groups are as they were.
    """
    splits, built = list(splits), dict[Any, list[Group]]()
    for group in opt.param_groups:
        built.setdefault(tuple(map(id, group["params"])), []).append(group)
    for split in splits:
        for part in split.parts:
            key = tuple(map(id, part.group["params"]))
            if not built.get(key):
                name = type(opt).__name__
                raise OptimizerError(
                    f"{name} rearranges its groups when it is built, so rates would go to the"
                    " wrong groups.",
                    f"Build it, then wrap it: RankAwareOptimizer({name}(model.parameters(),"
                    " ...), model=model).",
                )
            part.group = built[key].pop(0)
            part.settle(part.group["lr"])
    for split in splits:
        present(split)


def present(split: SplitGroup) -> None:
    """Make the user's group out of its parts."""
    params: list[Any] = [None] * len(split.members)
    for part in split.parts:
        for i, param in zip(part.at, part.group["params"], strict=True):
            params[i] = param
        part.group["params"] = []
    user, first = split.group, split.parts[0].group
    lists = {key: split.seen[key] for key in split.lists}
    user.update({**first, **lists, "params": params})
    split.ids, split.lr = list(map(id, params)), user["lr"]
    for part in split.parts:  # torchao makes a tensor of each rate
        part.base = split.lr
    split.see()
