"""The parts of the user's groups: what the native optimizer sees inside a step.

Outside a step an optimizer shows the user's groups, as they were given. `enter` puts their parts in
place, each at the user's rate × its multiplier, and `leave` puts the groups back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import mul
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Survey
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
    given_at: the base rate at which a given rate is trained at. rate: that of the last step.
    """

    assigned: Assigned
    at: list[int]
    multiplier: float = 1.0
    group: Group = field(default_factory=dict)
    base: Any = None
    given_at: float | None = None
    rate: Any = None

    def settle(self, base: Any, given_at: Any = None) -> None:
        """Stand at a base rate. A given rate becomes a ratio to `given_at`, by default to the base
        rate, so that a schedule, a warm-up and a 0 apply.

        Raises:
            OptimizerError: base rate × multiplier, in the base rate's dtype, is 0 or infinite.
        """
        at = float(base if given_at is None else given_at)
        if self.assigned.lr is not None and at:
            self.multiplier, self.given_at = self.assigned.lr / at, at
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
    pytorch_optimizer's. ids: those of its parameters when they were last seen. seen: its options
    likewise.
    """

    group: Group
    members: list[Member]
    parts: list[Part]
    lists: Collection[str] = ()
    ids: list[int] = field(default_factory=list)
    seen: Group = field(default_factory=dict)

    def params_of(self, part: Part) -> list[Any]:
        """Return the parameters of a part: all of a group that was flattened, or emptied."""
        params = self.group["params"]
        if len(params) != len(self.members):
            return list(params)
        return [params[i] for i in part.at]

    def base_of(self, part: Part) -> Any:
        """Return the base rate of a part, which follows a rate that was written since."""
        lr = self.group["lr"]
        return part.base if same(lr, self.seen["lr"]) else lr

    def of_part(self, part: Part, key: str, value: Any) -> Any:
        """Return an option as a part has it. What a native step counts in a tensor in place is
        counted once a part.
        """
        if key in self.lists:
            return [value[i] for i in part.at]
        if torch.is_tensor(value) and part is not self.parts[0] and key != "lr":
            return value.clone()
        return value

    def follow(self) -> None:
        """Bring the parts to what the user's group holds now.

        Raises:
            OptimizerError: the parameters are not those of before.
        """
        ids = list(map(id, self.group["params"]))
        if ids != self.ids:
            self._follow_params(ids)
        self.follow_options()
        lr = self.group["lr"]
        if not same(lr, self.seen["lr"]):
            for part in self.parts:
                part.base = lr
        self.see()

    def follow_options(self) -> None:
        """Copy the options that were written since, and drop those that are gone. They are compared
        by value too, since pickle keeps no identity.
        """
        for key, value in self.group.items():
            if key not in _HELD and not same(value, self.seen.get(key, _NOTHING)):
                for part in self.parts:
                    part.group[key] = self.of_part(part, key, value)
        for key in self.parts[0].group.keys() - self.group.keys():
            for part in self.parts:
                part.group.pop(key, None)

    def _follow_params(self, ids: list[int]) -> None:
        """Follow parameters that were put into another order, replaced, flattened or taken away.
        Those of one part train at its rate, whatever they are.
        """
        params, members = self.group["params"], self.members
        if params and len(self.parts) > 1:
            if sorted(ids) == sorted(self.ids) or len(params) != len(members):
                raise OptimizerError(
                    f"A group of {len(members)} parameters has {len(params)}, or in another order,"
                    " by hand or since something flattened it, and its parts have several rates.",
                    "Add parameters by add_param_group. Where a framework flattens groups, give it"
                    " groups of one rank and role each: those of opt.rates.groups.",
                )
            pairs = zip(members, params, strict=True)
            self.members = [member.replaced(param) for member, param in pairs]
        self.ids = ids

    def show(self) -> None:
        """Show the user what the native step wrote into the first part, and take the parameters out
        of the parts.
        """
        for part in self.parts:
            part.group["params"] = ()
            if part.group["lr"] is not part.rate:  # written by the optimizer
                part.base = part.group["lr"] / part.multiplier
        for key, value in self.parts[0].group.items():
            if key not in _HELD and key not in self.lists:
                self.group[key] = value
        self.group["lr"] = self.parts[0].base
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

    def shown(self, opt: Any) -> list[SplitGroup]:
        """Return the split groups of an optimizer, also while it steps in another thread."""
        turns, users = self.turns, opt.param_groups
        is_inside = self.stepping or self.turns != turns
        return self.of(self.users if is_inside else users)

    def copy(self) -> list[SplitGroup]:
        """Return copies of the split groups, to go back to."""
        copies = []
        for split in self.splits:
            parts = [replace(part, group=dict(part.group)) for part in split.parts]
            copies.append(replace(split, parts=parts))
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
            known[id(user)] = _by_hand(user, len(self.splits))
            self.splits.append(known[id(user)])
        return [known[id(user)] for user in users]


def _by_hand(user: Group, number: int) -> SplitGroup:
    """Return a group that was appended by hand as one part."""
    params = user["params"]
    members = [
        Member(f"group{number}.unnamed.{i}", tuple(p.shape))
        for i, p in enumerate(params)
    ]
    part = Part(_BY_HAND, list(range(len(params))), base=user["lr"])
    return SplitGroup(user, members, [part], seen={"lr": user["lr"]})


# --- splitting ------------------------------------------------------------------------------------


def split(
    groups: Iterable[UserGroup],
    assigner: Assigner,
    survey: Survey,
    state: State | None = None,
) -> list[SplitGroup]:
    """Assign a rate to every parameter, and split each user's group into parts of one rate, in the
    user's order. The groups of the parts are still to be set up by the native class.

    Args:
        groups: the user's groups.
        assigner: that of the model.
        survey: the model's, with the factors that do not train yet.
        state: the state of a built optimizer. Some mark there which parameters Muon gets.
    """
    factors = {f.name: f for f in survey.factors}
    splits = []
    for user in groups:
        params = [param for _, param in user.named]
        positions: dict[Assigned, list[int]] = {}
        rules: dict[Any, Rule] = {}
        for position, (name, param) in enumerate(user.named):
            rule = _rule_of(param, user.options, assigner, state, rules)
            assigned = assigner.assign(
                name,
                factors.get(name),
                rule,
                # all groups of one that is built have a rate, which is not the user's own
                own_lr=state is None and "lr" in user.options,
                trains=param.requires_grad,
            )
            positions.setdefault(assigned, []).append(position)
        members = [Member(name, tuple(param.shape)) for name, param in user.named]
        one = SplitGroup(user.given, members, [], _lists(user, assigner))
        one.seen = {**user.options, "params": params}
        for assigned, at in (positions or {Assigned(): []}).items():
            part = Part(assigned, at, assigned.multiplier)
            one.parts.append(part)
            part.group = {k: one.of_part(part, k, v) for k, v in user.options.items()}
            part.group["params"] = [params[i] for i in at]
        splits.append(one)
    _warn_of_extremes(splits)
    return splits


def _rule_of(
    param: torch.Tensor,
    options: Group,
    assigner: Assigner,
    state: State | None,
    rules: dict[Any, Rule],
) -> Rule:
    """Return the rule of a parameter. Some optimizers decide its family by its shape, or by marks
    in its state. rules: those of its group that are known, to which it is added.
    """
    own = (state or {}).get(param, {})
    switches = {switch.setting for switch in assigner.known.switches}
    marks = {key: own[key] for key in sorted(switches & own.keys())}
    settings = {**options, **marks}
    to_adam = assigner.goes_to_adam(settings, param.shape)
    key = (to_adam, *marks.items())
    if key not in rules:
        rules[key] = assigner.rule(settings, to_adam)
    return rules[key]


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


def _warn_of_extremes(splits: Iterable[SplitGroup]) -> None:
    """Warn of the first multiplier that nobody can have meant."""
    for split in splits:
        for part in split.parts:
            caution = caution_of(part.multiplier)
            if caution and part.assigned.lr is None:
                warn(f"{split.members[part.at[0]].name}: {caution}")
                return


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
        listed = {key: split.seen[key] for key in ("params", *split.lists)}
        split.group.update({**split.parts[0].group, **listed})
        split.ids = list(map(id, listed["params"]))
        for part in split.parts:
            part.group["params"] = ()
            part.base = split.group["lr"]  # torchao makes a tensor of each rate
        split.see()


# --- inside a step --------------------------------------------------------------------------------


# compiled, both would be graphs of their own with tensor rates
@torch.compiler.disable  # type: ignore[untyped-decorator]
def enter(opt: Any) -> None:
    """Put the parts in place of the user's groups, at their rates."""
    hidden, users = opt._rankaware.parts, opt.param_groups
    splits = hidden.of(users)
    for split in splits:
        split.follow()
    for split in splits:
        for part in split.parts:
            part.group["params"] = split.params_of(part)
    parts = list(chain.from_iterable(split.parts for split in splits))
    for part, rate in zip(parts, _rates(parts), strict=True):
        part.rate = part.group["lr"] = rate
    # the order matters to who saves from another thread
    hidden.users, hidden.active = users, splits
    hidden.turns += 1
    hidden.stepping = True
    opt.param_groups = [part.group for part in parts]


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
