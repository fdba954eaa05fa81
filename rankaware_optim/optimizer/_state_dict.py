"""Checkpoints: convert an optimizer state to one that torch can load, or raise. torch itself
compares nothing.

State is matched by parameter name if both sides have names, else by position. Ranks and shapes are
compared before torch writes memory. Rates in a checkpoint are base rates. Those of format 1 were
multiplied and are divided.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .._checks import is_number, is_positive
from .._warn import warn
from ..errors import CheckpointError
from ..inspection import canonical_name
from ._param_groups import (
    GROUP_FORMAT,
    TAGS,
    at_base_rate,
    base_of,
    multiply_for_native,
    named_params,
    settings_in,
    shrinks_by_decay,
    without,
)

OnRankChange = Literal["raise", "reset"]
Group = dict[str, Any]
_CURE = "Give the result of optimizer.state_dict()."


def check_on_rank_change(value: object) -> None:
    """Raise if the value of on_rank_change is unknown."""
    known = OnRankChange.__args__  # type: ignore[attr-defined]
    if value not in known:
        raise CheckpointError(
            f"on_rank_change is {value!r}.", f"Choose one of {', '.join(map(repr, known))}."
        )


class Reset(NamedTuple):
    """A parameter whose moments were dropped, since the checkpoint has another rank."""

    name: str
    saved_rank: int
    rank: int


class _Saved(NamedTuple):
    """One parameter of a checkpoint: its key in `state`, and the number of its group."""

    key: Any
    group: int


class _Match(NamedTuple):
    """One parameter with the checkpoint's group, state and, if stored, shape of it."""

    name: str
    param: torch.Tensor
    group: Group
    theirs: Group
    state: Mapping[str, Any] | None
    shape: tuple[int, ...] | None


def fit_checkpoint(
    param_groups: list[Group],
    state_dict: dict[str, Any],
    on_rank_change: OnRankChange,
    order: Sequence[Sequence[str]],
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
    flat = any(len(group["params"]) != len(group.get("param_names", ())) for group in param_groups)
    groups, state = _contents(state_dict, flat)
    if any("param_names" not in group or "user_group" not in group for group in param_groups):
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
    bases: dict[Any, set[float]] = defaultdict(set)
    for group in groups if _by_key(groups) else ():
        bases[group.get("user_group")].add(float(group["lr"]))
    if any(
        len(rates) > 1 for rates in bases.values()
    ):  # full_state_dict=True: the other parts keep their old rates
        warn(
            "torch.distributed.checkpoint loaded several base rates into the parts of one group: it"
            " loads a saved group's settings into only one of them. Set group['lr'] of all of them"
            " to the saved rate."
        )
    if flat:
        return {**state_dict, "param_groups": _flat_groups(param_groups, groups, state)}, ()
    _check_user_groups(param_groups, groups)
    saved = _by_name(param_groups, groups)
    if saved is None:
        saved = _by_position(param_groups, groups, state, order, model_order)
    shapes = _written_shapes(groups)
    of_parameters = {key for group in groups for key in group["params"]}
    new_state: dict[Any, Any] = {
        k: v for k, v in state.items() if not isinstance(k, int) and k not in of_parameters
    }
    new_groups: list[Group] = []
    reset: list[Reset] = []
    changed_law, numbers = False, count()
    for group in param_groups:
        theirs = _source(
            group,
            [groups[number] for number in {saved[name].group: 0 for name in group["param_names"]}],
        )
        keys = []
        for name, param in zip(group["param_names"], group["params"], strict=True):
            source = groups[saved[name].group]
            match = _Match(name, param, group, source, state.get(saved[name].key), shapes.get(name))
            own, note = _param_state(match, on_rank_change)
            keys.append(next(numbers))
            if own is not None:
                new_state[keys[-1]] = {k: _laid_out(v, param) for k, v in own.items()}
            if note is not None:
                reset.append(note)
            changed_law |= note is None and _law_differs(group, source)
        new_groups.append(_merged(group, theirs, keys))
    _say_changes(param_groups, groups, changed_law)
    return {**state_dict, "state": new_state, "param_groups": new_groups}, tuple(reset)


def _contents(state_dict: Mapping[str, Any], flat: bool) -> tuple[list[Group], Mapping[Any, Any]]:
    """Return the checkpoint's groups at base rates, and its state. flat: groups hold one flat share
    (ZeRO).
    """
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not groups or not isinstance(state, Mapping):
        raise CheckpointError(
            "This is not an optimizer checkpoint: it lacks param_groups or state.", _CURE
        )
    newest = max(int(g.get("rankaware_format", 0)) for g in groups)
    if newest > GROUP_FORMAT:
        raise CheckpointError(
            f"The checkpoint has format {newest}, this package reads up to {GROUP_FORMAT}.",
            "Update rankaware-optim.",
        )
    for group in groups:
        _check_group(group, flat)
    keys = [key for group in groups for key in group["params"]]
    names = (
        []
        if _by_key(groups)
        else [name for group in groups for name in group.get("param_names") or ()]
    )
    if len(set(keys)) != len(keys) or len(set(names)) != len(names):
        raise CheckpointError("The checkpoint's groups list a parameter twice.", _CURE)
    return [_at_base_rate(group) for group in groups], state


def _check_group(group: Group, flat: bool) -> None:
    """Raise if a group would be misread without an error."""
    for key in ("lr", "initial_lr", "rank_multiplier", "lr_multiplier", "pinned_lr"):
        value = group.get(key, 1.0)
        if key == "pinned_lr" and value is None:
            continue
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not is_positive(value) and not (
            key.endswith("lr") and is_number(value) and value == 0
        ):  # a warmup's start
            raise CheckpointError(f"A group of the checkpoint has {key}={group[key]!r}.", _CURE)
    names = group.get("param_names")
    if names and not flat and not _by_key([group]) and len(names) != len(group["params"]):
        raise CheckpointError(
            f"A group of the checkpoint has {len(group['params'])} parameters and {len(names)}"
            " names.",
            _CURE,
        )


def _by_key(groups: Iterable[Group]) -> bool:
    """Return whether names are the keys of the state, as in torch.distributed.checkpoint."""
    return all(isinstance(key, str) for group in groups for key in group["params"])


def _at_base_rate(group: Group) -> Group:
    """Return a saved group at its base rate. Format 1 and groups for native optimizers hold
    multiplied rates.
    """
    if group.get("rankaware_format") == 1:
        multiplier = group.get("lr_multiplier", 1.0)
        group = {**group, "rank_multiplier": multiplier, "rank_multiplied": True}
    return at_base_rate(without(group, ("lr_multiplier",)))


def _check_user_groups(param_groups: list[Group], groups: Sequence[Group]) -> None:
    """Raise, as torch does, if the checkpoint has another number of user groups."""
    ours = len({group["user_group"] for group in param_groups})
    theirs = len({group.get("user_group", number) for number, group in enumerate(groups)})
    if ours != theirs and any("user_group" in group for group in groups):
        raise CheckpointError(
            f"The checkpoint's optimizer was built from {theirs} groups, this one from {ours}.",
            "Build it from the same groups, whose rates and decays are in the checkpoint.",
        )


def _flat_groups(
    param_groups: list[Group], groups: list[Group], state: Mapping[Any, Any]
) -> list[Group]:
    """Return the groups to load if a framework (DeepSpeed's ZeRO) replaced a group's parameters by
    one flat share.

    A flat share cannot be matched by name or resized, so the checkpoint must be split in the same
    way.
    """
    alike = len(param_groups) == len(groups)
    for own, other in zip(param_groups, groups, strict=False):
        alike &= all(own.get(key) == other.get(key) for key in ("param_names", "lora_rank"))
        alike &= len(own["params"]) == len(other["params"])
        for param, key in zip(own["params"], other["params"], strict=False):
            alike &= all(
                value.shape == param.shape for value in _shaped(state.get(key), param).values()
            )
    if not alike:
        raise CheckpointError(
            "A framework has flattened this optimizer's parameters, and the checkpoint's groups are"
            " split differently.",
            "Load it with the ranks, the law and the number of processes with which it was saved.",
        )
    _say_changes(param_groups, groups, any(map(_law_differs, param_groups, groups)))
    both = zip(param_groups, groups, strict=True)
    return [_merged(own, other, other["params"]) for own, other in both]


def _by_name(param_groups: list[Group], groups: Sequence[Group]) -> dict[str, _Saved] | None:
    """Find our parameters in the checkpoint by name; None if it has no names, or those of another
    model.

    torch.distributed.checkpoint uses names as keys. It orders them like the optimizer's parameters,
    but leaves `param_names` in the saved order. So the keys are used first.
    """
    flat = [_Saved(key, i) for i, group in enumerate(groups) for key in group["params"]]
    ours = [name for group in param_groups for name in group["param_names"]]
    if _by_key(groups):
        names = [canonical_name(saved.key) for saved in flat]
    else:
        names = [name for group in groups for name in group.get("param_names") or ()]
    found = dict(zip(names, flat, strict=False))
    if len(found) < len(flat) or found.keys().isdisjoint(ours):
        return None
    missing = [name for name in ours if name not in found]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of this optimizer's parameters, such as"
            f" {missing[0]}.",
            "Load it into the model it was saved from.",
        )
    return found


def _by_position(
    param_groups: list[Group],
    groups: Sequence[Group],
    state: Mapping[Any, Any],
    order: Sequence[Sequence[str]],
    model_order: Callable[[], Sequence[str]],
) -> dict[str, _Saved]:
    """Find our parameters in a checkpoint without names, by the order in which it was saved.

    Groups of the same sizes as ours or the user's have the same order, as torch assumes. Otherwise
    it is that of the user's groups or the model's, whichever the moments fit. If these disagree and
    both fit, no one knows.
    """
    flat = [_Saved(key, i) for i, group in enumerate(groups) for key in group["params"]]
    held = {
        name: p
        for group in param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    sizes = _sizes(group["params"] for group in groups)
    for cut in ([group["param_names"] for group in param_groups], order):
        if sizes == _sizes(cut):
            return dict(zip((name for names in cut for name in names), flat, strict=True))
    all_names = model_order()
    orders = (
        [name for names in order for name in names],
        all_names,
        [name for name in all_names if name in held],
    )
    found = [dict(zip(names, flat, strict=True)) for names in orders if len(names) == len(flat)]
    found = [saved for saved in found if saved.keys() >= held.keys()]
    if not found:
        raise CheckpointError(
            f"The checkpoint has {len(flat)} parameters without matching names, this optimizer has"
            f" {len(held)}.",
            "Load it into the model it was saved from, with the same parameters in the same order.",
        )
    differing = _differing(found, state)
    if not differing:
        return found[0]
    fitting = [
        saved
        for saved in found
        if all(_fits(state.get(saved[name].key), p) for name, p in held.items())
    ]
    if not fitting or _differing(fitting, state):
        raise CheckpointError(
            f"The checkpoint has {len(flat)} parameters without names, in the model's order or in"
            f" that of this optimizer's groups, and the two disagree, such as on {differing[0]}.",
            "Build the plain optimizer from model.named_parameters(), or both from the same"
            " groups.",
        )
    return fitting[0]


def _sizes(cut: Iterable[Sequence[Any]]) -> list[int]:
    """Return the sizes of groups, without empty ones."""
    return [len(listed) for listed in cut if len(listed)]


def _differing(found: Sequence[dict[str, _Saved]], state: Mapping[Any, Any]) -> list[str]:
    """Return the parameters to which the ways of matching give different state or settings."""
    first = found[0]
    same = {
        name for name in first if all(_same(saved.get(name), first[name], state) for saved in found)
    }
    return [name for name in first if name not in same]


def _same(one: _Saved | None, other: _Saved, state: Mapping[Any, Any]) -> bool:
    if one is None or one.group != other.group:
        return False
    return one.key == other.key or not (state.get(one.key) or state.get(other.key))


def _fits(state: Mapping[str, Any] | None, param: torch.Tensor) -> bool:
    """Return whether a parameter's state has shapes that can belong to it."""
    if not any(isinstance(value, torch.Tensor) and value.dim() for value in (state or {}).values()):
        return True
    shapes = [tuple(value.shape) for value in _shaped(state, param).values()]
    return bool(shapes) and _fit(shapes, tuple(param.shape))


def _source(group: Group, sources: Sequence[Group]) -> Group:
    """Return the saved group whose settings one of ours gets. If there are several, their settings
    must agree.
    """
    settings = [
        {k: v for k, v in source.items() if k not in (*TAGS, *_LISTS)} for source in sources
    ]
    differing = [
        key for key in settings[0] if any(other.get(key) != settings[0][key] for other in settings)
    ]
    if differing:
        raise CheckpointError(
            f"Parameters of one group here, such as {group['param_names'][0]}, come from saved"
            f" groups of different {differing[0]}.",
            "Build the optimizer from the same groups as the saved one.",
        )
    return sources[0]


_LISTS = ("params", "param_names")


def _merged(group: Group, theirs: Group, keys: list[int]) -> Group:
    """Return our group with the saved group's settings and base rate, and our own tags."""
    tags = {key: group[key] for key in TAGS if key in group}
    if group["pinned_lr"] is not None:
        tags["rank_multiplier"] = _pinned_multiplier(group, theirs)
    elif _init_was_known(group, theirs):
        # Trained weights no longer show the init that gave the saved multiplier.
        tags |= {"lora_init": theirs["lora_init"], "rank_multiplier": theirs["rank_multiplier"]}
    tags["rankaware_recipe"] = theirs.get("rankaware_recipe") or tags.get(
        "rankaware_recipe", ""
    )  # with its base rate
    settings = {key: value for key, value in theirs.items() if key not in (*TAGS, *_LISTS)}
    return {**settings, **tags, "params": keys, "param_names": list(group["param_names"])}


def _pinned_multiplier(group: Group, theirs: Group) -> float:
    """Return the ratio of a pinned rate to the checkpoint's base rate.

    If the checkpoint's rate was pinned too, its base may have been scheduled since, so its ratio is
    used.
    """
    pinned, saved = group["pinned_lr"], theirs.get("pinned_lr")
    if saved is not None and "rank_multiplier" in theirs:
        return float(theirs["rank_multiplier"] * (pinned / saved))
    base = float(
        theirs.get("max_lr", base_of(theirs))
    )  # OneCycleLR starts at a fraction of the rate
    return float(pinned / base if base else group["rank_multiplier"])


def _law_differs(group: Group, theirs: Group) -> bool:
    if group["pinned_lr"] is not None:
        return False
    ratio = theirs.get("rank_multiplier", group["rank_multiplier"]) / group["rank_multiplier"]
    return abs(ratio - 1.0) > 1e-9 and not _init_was_known(group, theirs)


def _init_was_known(group: Group, theirs: Group) -> bool:
    """Return whether the checkpoint has an init that trained weights no longer show."""
    return theirs.get("lora_init") in ("A", "B") and group.get("lora_init") in ("other", "unknown")


def _say_changes(ours: Sequence[Group], theirs: Sequence[Group], changed_law: bool) -> None:
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


def _recipe_of(groups: Sequence[Group]) -> tuple[str, str]:
    """Return hash and name of the groups' recipe, from their tag "hash name"; empty strings without
    a recipe.
    """
    hashed, _, name = next(
        (str(g["rankaware_recipe"]) for g in groups if g.get("rankaware_recipe")), ""
    ).partition(" ")
    return hashed, name


# --- one parameter's state ------------------------------------------------------------------------


def _param_state(
    match: _Match, on_rank_change: OnRankChange
) -> tuple[Mapping[str, Any] | None, Reset | None]:
    """Return the state to load for one parameter, or that its moments are dropped since its rank
    changed.
    """
    name, param, state = match.name, match.param, match.state
    rank, role, own = match.group.get("lora_rank"), match.group.get("lora_role"), tuple(param.shape)
    tensors = _shaped(state, param)
    if match.shape is None or len(match.shape) != len(own):
        fits = not tensors or _fit([tuple(v.shape) for v in tensors.values()], own)
    else:  # the checkpoint stores the parameter's shape, so its state may have any shape
        fits = match.shape == own
    saved_rank = match.theirs.get("lora_rank", None if fits else _rank_in(tensors, param, role))
    if fits and (saved_rank is None or saved_rank == rank):
        return state, None
    if saved_rank is None or rank is None or saved_rank == rank:
        shape = match.shape or tuple(next(iter(tensors.values())).shape)
        raise CheckpointError(
            f"The checkpoint's {name} has shape {shape}, the parameter {own}.",
            "Load it into the model it was saved from, or start with a new optimizer state.",
        )
    if on_rank_change == "raise":
        raise CheckpointError(
            f"The checkpoint's {name} has rank {saved_rank}, the model's has rank {rank}.",
            "Load it into a model of the same rank, or build the optimizer with"
            " on_rank_change='reset'.",
        )
    return None, Reset(name, saved_rank, rank)


def _written_shapes(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """Return the shapes stored in our checkpoint by parameter name. A plain checkpoint has none."""
    written: dict[str, tuple[int, ...]] = {}
    for group in groups:
        names, texts = group.get("param_names") or [], str(group.get("param_shapes", "")).split(" ")
        if len(names) == len(texts):
            written |= {
                n: tuple(map(int, filter(None, t.split("x"))))
                for n, t in zip(names, texts, strict=True)
            }
    return written


def _shaped(state: Mapping[str, Any] | None, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return state tensors with the parameter's number of dimensions, such as moments."""
    return {
        k: v
        for k, v in (state or {}).items()
        if isinstance(v, torch.Tensor) and v.dim() == param.dim() > 0
    }


def _rank_in(
    tensors: Mapping[str, torch.Tensor], param: torch.Tensor, role: str | None
) -> int | None:
    """Return the rank of a plain checkpoint's moments, from the axis that differs; None if it is
    ambiguous.
    """
    if role not in ("A", "B") or param.dim() < 2:
        return None
    axis = 0 if role == "A" else 1
    for value in tensors.values():
        others = [
            sizes for i, sizes in enumerate(zip(value.shape, param.shape, strict=True)) if i != axis
        ]
        if all(saved == own for saved, own in others):
            return int(value.shape[axis])
    return None


def _fit(saved: list[tuple[int, ...]], own: tuple[int, ...]) -> bool:
    """Return whether state of these shapes can belong to a parameter of shape `own`.

    One tensor has its shape, or they are factored statistics. These have size 1 along reduced axes,
    and together cover every axis.
    """
    if own in saved:
        return True
    reduced = all(s in (n, 1) for shape in saved for s, n in zip(shape, own, strict=True))
    return reduced and all(any(shape[axis] == n for shape in saved) for axis, n in enumerate(own))


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
