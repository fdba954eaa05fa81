"""Checkpoints: convert an optimizer state to one that torch can load, or raise. torch itself
compares nothing.

State is matched by parameter name if both sides have names, else by position. Ranks and shapes are
compared before torch writes memory. Rates in a checkpoint are base rates. Those of format 1 were
multiplied and are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from .._checks import is_number, is_positive
from .._warn import warn
from ..errors import CheckpointError
from ..inspection import canonical_name
from ._param_groups import (
    GROUP_FORMAT,
    TAGS,
    Group,
    Groups,
    at_base_rate,
    base_of,
    multiply_for_native,
    named_params,
    params_in,
    settings_in,
    shrinks_by_decay,
    without,
)

OnRankChange = Literal["raise", "reset"]
State = Mapping[Any, Any]
Shape = tuple[int, ...]
Order = Sequence[Sequence[str]]
_CURE = "Give the result of optimizer.state_dict()."


def check_on_rank_change(value: object) -> None:
    """Raise if the value of on_rank_change is unknown."""
    known = get_args(OnRankChange)
    if value not in known:
        raise CheckpointError(
            f"on_rank_change is {value!r}.",
            f"Choose one of {', '.join(map(repr, known))}.",
        )


class Reset(NamedTuple):
    """A parameter whose moments were dropped, since the checkpoint has another rank."""

    name: str
    saved_rank: int
    rank: int


class _Slot(NamedTuple):
    """One parameter of a checkpoint: its key in `state`, and its group."""

    key: Any
    group: Group


_Slots = dict[str, _Slot]  # by the names of this optimizer's parameters


def fit_checkpoint(
    param_groups: Groups,
    state_dict: dict[str, Any],
    on_rank_change: OnRankChange,
    order: Order,
    model_order: Callable[[], Sequence[str]],
) -> tuple[dict[str, Any], tuple[Reset, ...]]:
    """Return the state_dict to load, with the layout of our groups, and the parameters whose rank
    changed.

    Nothing is changed in place.

    Args:
        param_groups: this optimizer's groups.
        state_dict: the checkpoint.
        on_rank_change: as for `RankAwareOptimizer`.
        order: the parameters' names by user group.
        model_order: returns the names of all of the model's parameters, empty if the model is gone.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    flat = any(map(_is_flat, param_groups))
    groups, state = _contents(state_dict, flat)
    _refuse_strange_groups(param_groups, groups)
    _warn_of_several_rates(groups)
    if flat:
        return {
            **state_dict,
            "param_groups": _flat_groups(param_groups, groups, state),
        }, ()
    _check_user_groups(param_groups, groups)
    slots = _by_name(param_groups, groups)
    if slots is None:
        slots = _by_sizes(param_groups, groups, order)
    if slots is None:
        slots = _by_position(param_groups, groups, state, order, model_order)
    shapes, new_state = _written_shapes(groups), _state_of_none(groups, state)
    new_groups: list[Group] = []
    reset: list[Reset] = []
    changed_law, numbers = False, count()
    for group in param_groups:
        keys = []
        for name, param in named_params([group]):
            keys.append(next(numbers))
            key, theirs = slots[name]
            moments = state.get(key)
            rank = _changed_rank(name, param, group, theirs, moments, shapes.get(name))
            if rank is None:
                changed_law |= _law_differs(group, theirs)
                if moments is not None:
                    new_state[keys[-1]] = {
                        k: _laid_out(v, param) for k, v in moments.items()
                    }
            elif on_rank_change == "reset":
                reset.append(Reset(name, rank, group["lora_rank"]))
            else:
                raise CheckpointError(
                    f"The checkpoint's {name} has rank {rank}, the model's has rank"
                    f" {group['lora_rank']}.",
                    "Load it into a model of the same rank, or build the optimizer with"
                    " on_rank_change='reset'.",
                )
        new_groups.append(_merged(group, _source(group, slots), keys))
    _warn_of_changes(param_groups, groups, changed_law)
    return {**state_dict, "state": new_state, "param_groups": new_groups}, tuple(reset)


def _state_of_none(groups: Groups, state: State) -> dict[Any, Any]:
    """Return the state that is not of a parameter, which some optimizers keep."""
    keys = set(params_in(groups))
    return {k: v for k, v in state.items() if not isinstance(k, int) and k not in keys}


def _is_flat(group: Group) -> bool:
    """Return whether a framework (DeepSpeed's ZeRO) replaced a group's parameters by one flat
    share.
    """
    return len(group["params"]) != len(group.get("param_names", ()))


# --- the checkpoint's groups ----------------------------------------------------------------------


def _contents(state_dict: State, flat: bool) -> tuple[Groups, State]:
    """Return the checkpoint's groups at base rates, and its state. flat: ours hold flat shares."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not groups or not isinstance(state, Mapping):
        raise CheckpointError(
            "This is not an optimizer checkpoint: it lacks param_groups or state.",
            _CURE,
        )
    newest = max(int(group.get("rankaware_format", 0)) for group in groups)
    if newest > GROUP_FORMAT:
        raise CheckpointError(
            f"The checkpoint has format {newest}, this package reads up to {GROUP_FORMAT}.",
            "Update rankaware-optim.",
        )
    for group in groups:
        _check_rates(group)
    _check_lists(groups, flat)
    return [_at_base_rate(group) for group in groups], state


def _check_lists(groups: Groups, flat: bool) -> None:
    """Raise if parameters or names are listed twice, or their numbers differ in a group."""
    for group in groups:
        names = [] if flat or _by_key([group]) else _names_in([group])
        if names and len(names) != len(group["params"]):
            raise CheckpointError(
                f"A group of the checkpoint has {len(group['params'])} parameters and {len(names)}"
                " names.",
                _CURE,
            )
    for listed in (params_in(groups), [] if _by_key(groups) else _names_in(groups)):
        if len(set(listed)) != len(listed):
            raise CheckpointError(
                "The checkpoint's groups list a parameter twice.", _CURE
            )


def _check_rates(group: Group) -> None:
    """Raise if a rate or multiplier would be misread without an error."""
    for key in ("lr", "initial_lr", "rank_multiplier", "lr_multiplier", "pinned_lr"):
        value = group.get(key, 1.0)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        unpinned = key == "pinned_lr" and value is None
        at_start = (
            key.endswith("lr") and is_number(value) and value == 0
        )  # of a warm-up
        if not (is_positive(value) or unpinned or at_start):
            raise CheckpointError(
                f"A group of the checkpoint has {key}={group[key]!r}.", _CURE
            )


def _by_key(groups: Iterable[Group]) -> bool:
    """Return whether names are the keys of the state, as in torch.distributed.checkpoint."""
    return all(isinstance(key, str) for key in params_in(groups))


def _names_in(groups: Iterable[Group]) -> list[str]:
    return [name for group in groups for name in group.get("param_names") or ()]


def _at_base_rate(group: Group) -> Group:
    """Return a saved group at its base rate. Format 1 and groups for native optimizers hold
    multiplied rates.
    """
    if group.get("rankaware_format") == 1:
        multiplier = group.get("lr_multiplier", 1.0)
        group = {**group, "rank_multiplier": multiplier, "rank_multiplied": True}
    return at_base_rate(without(group, ("lr_multiplier",)))


def _refuse_strange_groups(param_groups: Groups, groups: Groups) -> None:
    """Raise if groups of ours have no names, or groups of the checkpoint no rates."""
    if any(
        "param_names" not in group or "user_group" not in group
        for group in param_groups
    ):
        raise CheckpointError(
            "A group was added to param_groups directly, so this optimizer does not know its"
            " parameters.",
            "Add it by add_param_group.",
        )
    if any("lr" not in group for group in groups):
        raise CheckpointError(
            "The checkpoint's groups are split differently from this optimizer's, and"
            " torch.distributed.checkpoint loads the settings of a group into only one of its"
            " parts.",
            "Load a plain optimizer's checkpoint by load_state_dict, or build this one as the saved"
            " one was.",
        )


def _check_user_groups(param_groups: Groups, groups: Groups) -> None:
    """Raise, as torch does, if the checkpoint has another number of user groups."""
    ours = len({group["user_group"] for group in param_groups})
    theirs = len(
        {group.get("user_group", number) for number, group in enumerate(groups)}
    )
    if ours != theirs and any("user_group" in group for group in groups):
        raise CheckpointError(
            f"The checkpoint's optimizer was built from {theirs} groups, this one from {ours}.",
            "Build it from the same groups, whose rates and decays are in the checkpoint.",
        )


def _warn_of_several_rates(groups: Groups) -> None:
    """Warn if parts of a user's group have several base rates: with full_state_dict=True all but
    one keep their old rate.
    """
    bases: dict[Any, Any] = {}
    for group in groups if _by_key(groups) else ():
        base = float(group["lr"])
        if bases.setdefault(group.get("user_group"), base) != base:
            warn(
                "torch.distributed.checkpoint loaded several base rates into the parts of one"
                " group: it loads a saved group's settings into only one of them. Set group['lr']"
                " of all of them to the saved rate."
            )
            return


def _flat_groups(param_groups: Groups, groups: Groups, state: State) -> Groups:
    """Return the groups to load where ours hold flat shares.

    A flat share cannot be matched by name or resized, so the checkpoint must be split in the same
    way.
    """
    if len(param_groups) != len(groups) or not all(
        _split_alike(*both, state) for both in zip(param_groups, groups, strict=True)
    ):
        raise CheckpointError(
            "A framework has flattened this optimizer's parameters, and the checkpoint's groups are"
            " split differently.",
            "Load it with the ranks, the law and the number of processes with which it was saved.",
        )
    _warn_of_changes(param_groups, groups, any(map(_law_differs, param_groups, groups)))
    return [
        _merged(group, theirs, theirs["params"])
        for group, theirs in zip(param_groups, groups, strict=True)
    ]


def _split_alike(group: Group, theirs: Group, state: State) -> bool:
    for key in ("param_names", "lora_rank"):
        if group.get(key) != theirs.get(key):
            return False
    if len(group["params"]) != len(theirs["params"]):
        return False
    for param, key in zip(group["params"], theirs["params"], strict=True):
        if any(value.shape != param.shape for value in _shaped(state.get(key), param)):
            return False
    return True


# --- which of its parameters is which of ours -----------------------------------------------------


def _slots_of(groups: Iterable[Group]) -> list[_Slot]:
    return [_Slot(key, group) for group in groups for key in group["params"]]


def _by_name(param_groups: Groups, groups: Groups) -> _Slots | None:
    """Find our parameters in the checkpoint by name; None if it has no names, or those of another
    model.

    torch.distributed.checkpoint uses names as keys. It orders them like the optimizer's parameters,
    but leaves `param_names` in the saved order. So the keys are used first.
    """
    slots = _slots_of(groups)
    names = _names_in(groups)
    if _by_key(groups):
        names = [canonical_name(slot.key) for slot in slots]
    by_name = dict(zip(names, slots, strict=False))
    ours = _names_in(param_groups)
    if len(by_name) < len(slots) or by_name.keys().isdisjoint(ours):
        return None
    missing = [name for name in ours if name not in by_name]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of this optimizer's parameters, such as"
            f" {missing[0]}.",
            "Load it into the model it was saved from.",
        )
    return by_name


def _by_sizes(param_groups: Groups, groups: Groups, order: Order) -> _Slots | None:
    """Find our parameters in groups of the same sizes as ours or the user's, whose order torch
    assumes to be the same; None if the sizes differ.
    """
    sizes = _sizes(group["params"] for group in groups)
    for names in ([group["param_names"] for group in param_groups], order):
        if sizes == _sizes(names):
            return dict(zip(chain(*names), _slots_of(groups), strict=True))
    return None


def _by_position(
    param_groups: Groups,
    groups: Groups,
    state: State,
    order: Order,
    model_order: Callable[[], Sequence[str]],
) -> _Slots:
    """Find our parameters in a checkpoint without names, by the order in which it was saved.

    It is that of the user's groups or the model's, whichever the moments fit. If these disagree and
    both fit, no one knows.
    """
    slots, params = _slots_of(groups), dict(named_params(param_groups))
    ways = _ways(slots, order, model_order(), params)
    if not ways:
        raise CheckpointError(
            f"The checkpoint has {len(slots)} parameters without matching names, this optimizer has"
            f" {len(params)}.",
            "Load it into the model it was saved from, with the same parameters in the same order.",
        )
    differing = _differing(ways, state)
    if differing:
        ways = [way for way in ways if _fits_all(way, params, state)]
    if not ways or (differing and _differing(ways, state)):
        raise CheckpointError(
            f"The checkpoint has {len(slots)} parameters without names, in the model's order or in"
            f" that of this optimizer's groups, and the two disagree, such as on {differing[0]}.",
            "Build the plain optimizer from model.named_parameters(), or both from the same"
            " groups.",
        )
    return ways[0]


def _ways(
    slots: list[_Slot], order: Order, all_names: Sequence[str], ours: Mapping[str, Any]
) -> list[_Slots]:
    """Return the names of parameters in the orders in which a checkpoint of this length may be."""
    orders = (
        list(chain(*order)),
        all_names,
        [name for name in all_names if name in ours],
    )
    ways = [
        dict(zip(names, slots, strict=True))
        for names in orders
        if len(names) == len(slots)
    ]
    return [way for way in ways if way.keys() >= ours.keys()]


def _sizes(cut: Iterable[Sequence[Any]]) -> list[int]:
    """Return the sizes of groups, without empty ones."""
    return [len(listed) for listed in cut if len(listed)]


def _differing(ways: Sequence[_Slots], state: State) -> list[str]:
    """Return the parameters to which the ways of matching give different state or settings."""
    differing = []
    for name, slot in ways[0].items():
        if not all(_same(way.get(name), slot, state) for way in ways):
            differing.append(name)
    return differing


def _same(one: _Slot | None, other: _Slot, state: State) -> bool:
    if one is None or one.group is not other.group:
        return False
    return one.key == other.key or not (state.get(one.key) or state.get(other.key))


def _fits_all(way: _Slots, params: Mapping[str, torch.Tensor], state: State) -> bool:
    """Return whether every parameter's state has shapes that can belong to it."""
    for name, param in params.items():
        moments = state.get(way[name].key) or {}
        shapes = [tuple(value.shape) for value in _shaped(moments, param)]
        has_shape = any(
            isinstance(value, torch.Tensor) and value.dim()
            for value in moments.values()
        )
        if has_shape and (not shapes or not _fit(shapes, tuple(param.shape))):
            return False
    return True


# --- settings and rates ---------------------------------------------------------------------------


def _source(group: Group, slots: _Slots) -> Group:
    """Return the saved group whose settings one of ours gets. If there are several, their settings
    must agree.
    """
    sources = [slots[name].group for name in group["param_names"]]
    settings = settings_in(sources[0])
    for source in sources:
        if source is sources[0]:
            continue
        theirs = settings_in(source)
        differing = [key for key, value in settings.items() if theirs.get(key) != value]
        if differing:
            raise CheckpointError(
                f"Parameters of one group here, such as {group['param_names'][0]}, come from saved"
                f" groups of different {differing[0]}.",
                "Build the optimizer from the same groups as the saved one.",
            )
    return sources[0]


def _merged(group: Group, theirs: Group, keys: list[int]) -> Group:
    """Return our group with the saved group's settings and base rate, and our own tags."""
    merged = settings_in(theirs) | {key: group[key] for key in TAGS if key in group}
    if group["pinned_lr"] is not None:
        merged["rank_multiplier"] = _pinned_multiplier(group, theirs)
    elif _init_was_known(group, theirs):
        # Trained weights no longer show the init that gave the saved multiplier.
        merged["lora_init"] = theirs["lora_init"]
        merged["rank_multiplier"] = theirs["rank_multiplier"]
    recipe = theirs.get("rankaware_recipe") or group.get("rankaware_recipe", "")
    merged["rankaware_recipe"] = recipe  # with its base rate
    return {**merged, "params": keys, "param_names": list(group["param_names"])}


def _pinned_multiplier(group: Group, theirs: Group) -> float:
    """Return the ratio of a pinned rate to the checkpoint's base rate.

    If the checkpoint's rate was pinned too, its base may have been scheduled since, so its ratio is
    used.
    """
    pinned, saved = group["pinned_lr"], theirs.get("pinned_lr")
    if saved is not None and "rank_multiplier" in theirs:
        return float(theirs["rank_multiplier"] * (pinned / saved))
    # OneCycleLR starts at a fraction of the rate
    base = float(theirs.get("max_lr", base_of(theirs)))
    return float(pinned / base if base else group["rank_multiplier"])


def _law_differs(group: Group, theirs: Group) -> bool:
    if group["pinned_lr"] is not None or _init_was_known(group, theirs):
        return False
    ratio = (
        theirs.get("rank_multiplier", group["rank_multiplier"])
        / group["rank_multiplier"]
    )
    return bool(abs(ratio - 1.0) > 1e-9)


def _init_was_known(group: Group, theirs: Group) -> bool:
    """Return whether the checkpoint has an init that trained weights no longer show."""
    return theirs.get("lora_init") in ("A", "B") and group.get("lora_init") in (
        "other",
        "unknown",
    )


def _warn_of_changes(ours: Groups, theirs: Groups, changed_law: bool) -> None:
    """Warn once if the checkpoint's recipe, or else its law, differs from this optimizer's."""
    (now, name), (before, saved_name) = _recipe_of(ours), _recipe_of(theirs)
    if now and before and now != before:
        warn(
            f"The checkpoint was made with the recipe {saved_name!r} ({before}), this optimizer"
            f" with {name!r} ({now}): the checkpoint's base rate is kept. Build the optimizer with"
            " the checkpoint's recipe, or start with a new state to use the new recipe's rate."
        )
    elif changed_law:
        warn(
            "The checkpoint was made with another law or reference at the same rank: its base rate"
            " is kept, and this optimizer's law multiplies it. For the same rates, build the"
            " optimizer as the saved one was."
        )


def _recipe_of(groups: Groups) -> tuple[str, str]:
    """Return hash and name of the groups' recipe, from their tag "hash name"; empty strings without
    a recipe.
    """
    tags = [
        str(group["rankaware_recipe"])
        for group in groups
        if group.get("rankaware_recipe")
    ]
    digest, _, name = "".join(tags[:1]).partition(" ")
    return digest, name


# --- one parameter's state ------------------------------------------------------------------------


def _changed_rank(
    name: str,
    param: torch.Tensor,
    group: Group,
    theirs: Group,
    moments: State | None,
    saved_shape: Shape | None,
) -> int | None:
    """Return the rank of a parameter in the checkpoint, None if it is ours. Raise if anything else
    differs.
    """
    rank, shape = group.get("lora_rank"), tuple(param.shape)
    tensors = _shaped(moments, param)
    shapes = [tuple(value.shape) for value in tensors]
    # where the checkpoint stores the parameter's shape, state may have any
    stored = saved_shape is not None and len(saved_shape) == len(shape)
    fits = saved_shape == shape if stored else _fit(shapes, shape)
    saved_rank = theirs.get("lora_rank")
    if "lora_rank" not in theirs and not fits:
        saved_rank = _rank_in(shapes, shape, group.get("lora_role"))
    if fits and saved_rank in (None, rank):
        return None
    if saved_rank is not None and rank is not None and saved_rank != rank:
        return int(saved_rank)
    raise CheckpointError(
        f"The checkpoint's {name} has shape {saved_shape or shapes[0]}, the parameter {shape}.",
        "Load it into the model it was saved from, or start with a new optimizer state.",
    )


def _written_shapes(groups: Groups) -> dict[str, Shape]:
    """Return the shapes stored in our checkpoint by parameter name. A plain checkpoint has none."""
    written: dict[str, Shape] = {}
    for group in groups:
        names, texts = (
            group.get("param_names") or [],
            str(group.get("param_shapes", "")).split(" "),
        )
        if len(names) == len(texts):
            for name, text in zip(names, texts, strict=True):
                written[name] = tuple(map(int, filter(None, text.split("x"))))
    return written


def _shaped(moments: State | None, param: torch.Tensor) -> list[torch.Tensor]:
    """Return state tensors with the parameter's number of dimensions, such as moments."""
    return [
        value
        for value in (moments or {}).values()
        if isinstance(value, torch.Tensor) and value.dim() == param.dim() > 0
    ]


def _rank_in(saved: Sequence[Shape], shape: Shape, role: str | None) -> int | None:
    """Return the rank of a plain checkpoint's moments, from the axis that differs; None if it is
    ambiguous.
    """
    if role not in ("A", "B") or len(shape) < 2:
        return None
    axis = 0 if role == "A" else 1
    for sizes in saved:
        if sizes[:axis] + sizes[axis + 1 :] == shape[:axis] + shape[axis + 1 :]:
            return sizes[axis]
    return None


def _fit(saved: Sequence[Shape], shape: Shape) -> bool:
    """Return whether state of these shapes can belong to a parameter of this shape.

    There are none, or one has its shape, or they are factored statistics. These have size 1 along
    reduced axes, and together cover every axis.
    """
    if not saved or shape in saved:
        return True
    for axis, size in enumerate(shape):
        sizes = {other[axis] for other in saved}
        if size not in sizes or not sizes <= {1, size}:
            return False
    return True


def _laid_out(value: Any, param: torch.Tensor) -> Any:
    """Return `value` with the parameter's memory layout, which fused kernels assume."""
    plain = (torch.Tensor, nn.Parameter)
    if type(value) not in plain or value.layout != torch.strided:
        return value
    like = param if type(param) in plain and param.shape == value.shape else value
    if value.is_contiguous() and like.is_contiguous():  # the usual case
        return value
    if value.stride() == torch.empty_like(like, device="meta").stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


# --- for a plain optimizer ------------------------------------------------------------------------


def to_plain_state_dict(
    opt: Any, names: Sequence[str] | None = None, *, own_groups: bool = False
) -> dict[str, Any]:
    """Return a state_dict for a native optimizer, whose step does not multiply rates.

    By default it has the same groups, with the rates that are trained at: base rate × multiplier.
    Load it into a native optimizer built from `rank_aware_param_groups`. The groups keep their
    multipliers and that they are multiplied, so that a later load into a `RankAwareOptimizer` gives
    the base rates.

    Args:
        opt: a `RankAwareOptimizer`.
        names: all parameter names in the order of a native optimizer with one group, such as those
            of model.named_parameters(). It implies own_groups.
        own_groups: whether to use the user's groups at their base rates. The law is then not
            applied.

    Raises:
        CheckpointError: `names` or own_groups are given for an optimizer whose groups were cleared.
    """
    state = opt.state_dict()
    if names is not None:
        return _regrouped(state, [names])
    if own_groups:
        return _regrouped(state, opt._rankaware.order)
    keep = not opt._rankaware.scale_weight_decay
    groups: list[Group] = []
    for group in state["param_groups"]:
        groups.append({"rank_multiplier": 1.0, **group})
        multiply_for_native(groups[-1], keep and shrinks_by_decay(opt, group))
    return {**state, "param_groups": groups}


def _regrouped(state: dict[str, Any], order: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return a state with groups of the parameters named in `order`, at their base rates."""
    if not state["param_groups"]:
        raise CheckpointError(
            "This optimizer's param_groups are empty, so the settings of your groups are lost.",
            "Call to_plain_state_dict before they are cleared.",
        )
    places = {}
    for group in state["param_groups"]:
        for name, key in named_params([group]):
            places[name] = group, key
    groups: list[Group] = []
    moments, first = {}, 0
    for names in order:
        owner = state["param_groups"][0]  # an empty group needs some settings
        owner = next((places[name][0] for name in names if name in places), owner)
        numbers = list(range(first, first + len(names)))
        groups.append({**settings_in(owner), "params": numbers})
        for number, name in zip(numbers, names, strict=True):
            if name in places and places[name][1] in state["state"]:
                moments[number] = state["state"][places[name][1]]
        first += len(names)
    return {**state, "state": moments, "param_groups": groups}
