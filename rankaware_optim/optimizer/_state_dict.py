"""Checkpoints: convert an optimizer state to one that torch can load, or raise. torch itself
compares nothing.

State is matched by parameter name if both sides have names, else by position. Ranks and shapes are
compared before torch writes memory. Rates in a checkpoint are base rates. Those of format 1 were
multiplied and are divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count, islice
from operator import itemgetter
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from .._checks import is_number, is_positive
from .._warn import warn
from ..errors import CheckpointError
from ..inspection import canonical_name, walk
from ._param_groups import (
    GROUP_FORMAT,
    TAGS,
    Group,
    Groups,
    Shape,
    State,
    at_base_rate,
    base_of,
    multiply_for_native,
    named_params,
    params_in,
    settings_in,
    without,
)

OnRankChange = Literal["raise", "reset"]
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
    model: nn.Module | None,
) -> tuple[dict[str, Any], tuple[Reset, ...]]:
    """Return the state_dict to load, with the layout of our groups, and the parameters whose rank
    changed.

    Nothing is changed in place.

    Args:
        param_groups: this optimizer's groups.
        state_dict: the checkpoint.
        on_rank_change: as for `RankAwareOptimizer`.
        order: the parameters' names by user group.
        model: the model, None if it is gone.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    # a framework (DeepSpeed's ZeRO) replaced a group's parameters by one flat share
    flat = any(len(g["params"]) != len(g.get("param_names", ())) for g in param_groups)
    groups, state = _contents(state_dict, flat)
    _check_groups(param_groups, groups)
    if flat:
        groups = _flat_groups(param_groups, groups, state)
        return {**state_dict, "param_groups": groups}, ()
    _check_user_groups(param_groups, groups)
    slots = _by_name(param_groups, groups)
    if slots is None:
        slots = _by_position(param_groups, groups, state, order, model)
    shapes = _written_shapes(state_dict["param_groups"])
    new_state = _state_of_none(groups, state)
    new_groups: list[Group] = []
    reset: list[Reset] = []
    changed_law, numbers = False, count()
    for group in param_groups:
        keys = list(islice(numbers, len(group["params"])))
        new_groups.append(_merged(group, _source(group, slots), keys))
        for number, (name, param) in zip(keys, named_params([group]), strict=True):
            key, theirs = slots[name]
            moments = state.get(key)
            rank = _changed_rank(name, param, group, theirs, moments, shapes.get(name))
            if rank is None:
                changed_law |= _law_differs(new_groups[-1], theirs)
                if moments is not None:
                    new_state[number] = {
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
    _warn_of_changes(param_groups, groups, changed_law)
    _warn_of_schedulers(param_groups, groups)
    return {**state_dict, "state": new_state, "param_groups": new_groups}, tuple(reset)


def _state_of_none(groups: Groups, state: State) -> dict[Any, Any]:
    """Return the state that is not of a parameter, which some optimizers keep."""
    keys = set(params_in(groups))
    return {k: v for k, v in state.items() if not isinstance(k, int) and k not in keys}


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
    groups = [_read(group, flat) for group in groups]
    _check_lists(groups, flat)
    return groups, state


def _check_lists(groups: Groups, flat: bool) -> None:
    """Raise if parameters or names are listed twice, or their numbers differ in a group."""
    for group in groups:
        names = group.get("param_names")
        if names and not flat and len(names) != len(group["params"]):
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


def _read(group: Group, flat: bool) -> Group:
    """Return a saved group at its base rate. Format 1 and groups for native optimizers hold
    multiplied rates.

    torch.distributed.checkpoint uses names as keys. It orders them like the optimizer's parameters,
    but leaves `param_names` in the saved order. So the keys replace these.
    """
    if group.get("rankaware_format") == 1:
        multiplier = group.get("lr_multiplier", 1.0)
        group = {**group, "rank_multiplier": multiplier, "rank_multiplied": True}
    if _by_key([group]) and not flat:
        group = {**group, "param_names": list(map(canonical_name, group["params"]))}
    return at_base_rate(without(group, ("lr_multiplier",)))


def _check_groups(param_groups: Groups, groups: Groups) -> None:
    """Raise if groups of ours have no names, or groups of the checkpoint no rates. Warn if parts of
    a user's group have several base rates.
    """
    if any(not {"param_names", "user_group"} <= group.keys() for group in param_groups):
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
    bases: dict[Any, Any] = {}
    for group in groups if _by_key(groups) else ():
        base = float(group["lr"])
        # with full_state_dict=True all parts but one keep their old rate
        if bases.setdefault(group.get("user_group"), base) != base:
            warn(
                "torch.distributed.checkpoint loaded several base rates into the parts of one"
                " group: it loads a saved group's settings into only one of them. Set group['lr']"
                " of all of them to the saved rate."
            )
            return


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
    merged = [
        _merged(group, theirs, theirs["params"])
        for group, theirs in zip(param_groups, groups, strict=True)
    ]
    _warn_of_changes(param_groups, groups, any(map(_law_differs, merged, groups)))
    return merged


def _split_alike(group: Group, theirs: Group, state: State) -> bool:
    for key in ("param_names", "lora_rank"):
        if group.get(key) != theirs.get(key):
            return False
    if len(group["params"]) != len(theirs["params"]):
        return False
    for param, key in zip(group["params"], theirs["params"], strict=True):
        if set(_shapes_in(state.get(key), param)) - {tuple(param.shape)}:
            return False
    return True


# --- which of its parameters is which of ours -----------------------------------------------------


def _slots_of(groups: Iterable[Group]) -> list[_Slot]:
    return [_Slot(key, group) for group in groups for key in group["params"]]


def _by_name(param_groups: Groups, groups: Groups) -> _Slots | None:
    """Find our parameters in the checkpoint by name; None if it has no names, or those of another
    model.
    """
    slots, ours = _slots_of(groups), _names_in(param_groups)
    by_name = dict(zip(_names_in(groups), slots, strict=False))
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


def _by_position(
    param_groups: Groups,
    groups: Groups,
    state: State,
    order: Order,
    model: nn.Module | None,
) -> _Slots:
    """Find our parameters in a checkpoint without names, by the order in which it was saved.

    If the orders in which that may be disagree, it is the one that the moments fit. If several do,
    no one knows.
    """
    params, number = dict(named_params(param_groups)), len(params_in(groups))
    ways = _ways(param_groups, groups, order, model)
    if not ways:
        raise CheckpointError(
            f"The checkpoint has {number} parameters without matching names, this optimizer has"
            f" {len(params)}.",
            "Load it into the model it was saved from, with the same parameters in the same order.",
        )
    differing = _differing(ways, params, state)
    if differing:
        ways = [way for way in ways if _fits_all(way, params, state)]
    if not ways or _differing(ways, params, state):
        raise CheckpointError(
            f"The checkpoint has {number} parameters without names, in the model's order or in"
            f" that of this optimizer's groups, and the two disagree, such as on {differing[0]}.",
            "Build the plain optimizer from model.named_parameters(), or both from the same"
            " groups.",
        )
    return ways[0]


def _ways(
    param_groups: Groups, groups: Groups, order: Order, model: nn.Module | None
) -> list[_Slots]:
    """Return the ways in which our parameters may be those of a checkpoint without names.

    As torch, take groups of the same sizes as ours or the user's to be in the same order. Else it
    is the order of the user's groups or of the model.
    """
    slots, ours = _slots_of(groups), set(_names_in(param_groups))
    sizes = _sizes(map(itemgetter("params"), groups))
    for layout in ([group["param_names"] for group in param_groups], order):
        if _sizes(layout) == sizes:
            return [dict(zip(chain(*layout), slots, strict=True))]
    of_model = [] if model is None else list(dict(walk(model).parameters))
    ways = []
    for names in (list(chain(*order)), of_model, [n for n in of_model if n in ours]):
        if len(names) == len(slots) and ours.issubset(names):
            ways.append(dict(zip(names, slots, strict=True)))
    return ways


def _sizes(layout: Iterable[Sequence[Any]]) -> list[int]:
    """Return the sizes of groups, without empty ones."""
    return list(filter(None, map(len, layout)))


def _differing(ways: Iterable[_Slots], names: Iterable[str], state: State) -> list[str]:
    """Return the parameters to which the ways of matching give different state or settings."""
    differing = []
    for name in names:
        slots = [way[name] for way in ways]
        if len({(key if state.get(key) else None, id(g)) for key, g in slots}) > 1:
            differing.append(name)
    return differing


def _fits_all(way: _Slots, params: Mapping[str, torch.Tensor], state: State) -> bool:
    """Return whether every parameter's state has shapes that can belong to it."""
    for name, param in params.items():
        moments = state.get(way[name].key) or {}
        shapes = _shapes_in(moments, param)
        tensors = filter(torch.is_tensor, moments.values())
        has_shape = any(tensor.dim() for tensor in tensors)
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
        theirs = settings_in(source)
        for key, value in settings.items():
            if source is not sources[0] and theirs.get(key) != value:
                raise CheckpointError(
                    f"Parameters of one group here, such as {group['param_names'][0]}, come from"
                    f" saved groups of different {key}.",
                    "Build the optimizer from the same groups as the saved one.",
                )
    return sources[0]


def _merged(group: Group, theirs: Group, keys: list[Any]) -> Group:
    """Return our group with the saved group's settings and base rate, and our own tags."""
    merged = settings_in(theirs) | {key: group[key] for key in TAGS if key in group}
    pinned, saved = group["pinned_lr"], theirs.get("pinned_lr")
    if pinned is None:
        unread = group.get("lora_init") in ("other", "unknown")
        if unread and theirs.get("lora_init") in ("A", "B"):
            # trained weights no longer show the init that gave the saved multiplier
            merged["lora_init"] = theirs["lora_init"]
            merged["rank_multiplier"] = theirs["rank_multiplier"]
    elif saved is not None and "rank_multiplier" in theirs:
        # a pinned rate's base may have been scheduled since, so its ratio is kept
        merged["rank_multiplier"] = theirs["rank_multiplier"] * (pinned / saved)
    else:
        # OneCycleLR starts at a fraction of the rate
        base = float(theirs.get("max_lr", base_of(theirs)))
        if base:
            merged["rank_multiplier"] = pinned / base
    recipe = theirs.get("rankaware_recipe") or group.get("rankaware_recipe", "")
    merged["rankaware_recipe"] = recipe  # with its base rate
    return {**merged, "params": keys, "param_names": list(group["param_names"])}


def _law_differs(merged: Group, theirs: Group) -> bool:
    ours = merged["rank_multiplier"]
    ratio = theirs.get("rank_multiplier", ours) / ours
    return merged["pinned_lr"] is None and bool(abs(ratio - 1.0) > 1e-9)


def _warn_of_schedulers(ours: Groups, theirs: Groups) -> None:
    """Warn if a scheduler was in use and the number of groups was another, for then its own state
    has lists of another length.
    """
    if len(ours) != len(theirs) and any("initial_lr" in group for group in theirs):
        warn(
            f"The checkpoint has {len(theirs)} parameter groups, this optimizer has {len(ours)}, so"
            " a scheduler's state from there does not fit. Before you load it, let its lists have a"
            ' value for each group here: state["base_lrs"] = opt.expand(state["base_lrs"]), and'
            " _last_lr and lr_lambdas likewise."
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
    tags = (group.get("rankaware_recipe") for group in groups)
    digest, _, name = str(next(filter(None, tags), "")).partition(" ")
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
    shapes = _shapes_in(moments, param)
    # where the checkpoint stores the parameter's shape, state may have any
    if saved_shape is not None and len(saved_shape) == len(shape):
        shapes = [saved_shape]
    fits = _fit(shapes, shape)
    saved_rank = theirs.get("lora_rank")
    if "lora_rank" not in theirs and not fits:
        saved_rank = _rank_in(shapes, shape, group.get("lora_role"))
    if fits and saved_rank in (None, rank):
        return None
    if rank is not None and saved_rank not in (None, rank):
        return int(saved_rank)
    raise CheckpointError(
        f"The checkpoint's {name} has shape {saved_shape or shapes[0]}, the parameter {shape}.",
        "Load it into the model it was saved from, or start with a new optimizer state.",
    )


def _written_shapes(groups: Groups) -> dict[str, Shape]:
    """Return the shapes stored in our checkpoint by parameter name. A plain checkpoint has none."""
    written: dict[str, Shape] = {}
    for group in groups:
        names = group.get("param_names") or []
        texts = str(group.get("param_shapes", "")).split(" ")
        if len(names) == len(texts):
            for name, text in zip(names, texts, strict=True):
                written[name] = tuple(map(int, filter(None, text.split("x"))))
    return written


def _shapes_in(moments: State | None, param: torch.Tensor) -> list[Shape]:
    """Return the shapes of state tensors with the parameter's number of dimensions, such as
    moments.
    """
    return [
        tuple(value.shape)
        for value in filter(torch.is_tensor, (moments or {}).values())
        if value.dim() == param.dim() > 0
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
    state, wrap = opt.state_dict(), opt._rankaware
    if own_groups or names is not None:
        return _regrouped(state, wrap.order if names is None else [names])
    groups: list[Group] = []
    for group in state["param_groups"]:
        groups.append({"rank_multiplier": 1.0, **group})
        multiply_for_native(groups[-1], None if wrap.scale_weight_decay else opt)
    return {**state, "param_groups": groups}


def _regrouped(state: State, order: Order) -> dict[str, Any]:
    """Return a state with groups of the parameters named in `order`, at their base rates."""
    parts = state["param_groups"]
    if not parts:
        raise CheckpointError(
            "This optimizer's param_groups are empty, so the settings of your groups are lost.",
            "Call to_plain_state_dict before they are cleared.",
        )
    slots = {name: _Slot(key, g) for g in parts for name, key in named_params([g])}
    groups: list[Group] = []
    moments, numbers = {}, count()
    for names in order:
        owners = [slots[name].group for name in names if name in slots]
        owners.append(parts[0])  # an empty group needs some settings
        keys = list(islice(numbers, len(names)))
        groups.append({**settings_in(owners[0]), "params": keys})
        for number, name in zip(keys, names, strict=True):
            if name in slots and slots[name].key in state["state"]:
                moments[number] = state["state"][slots[name].key]
    return {**state, "state": moments, "param_groups": groups}
