"""Checkpoints: bring an optimizer's state into the layout of our groups, or raise. torch itself
compares nothing.

State is matched by parameter name. A state without names is matched by position in the groups that
the optimizer was given, as torch does. Ranks and shapes are compared before torch writes memory.
Rates in a checkpoint are base rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

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
    Shape,
    State,
    at_base_rate,
    base_of,
    check_product,
    multiply_for_native,
    named_params,
    params_in,
    settings_in,
)

Order = Sequence[Sequence[str]]
_CURE = "Give the result of optimizer.state_dict()."
_OTHER_MODEL = (
    "Load it into a model of the same ranks and shapes, or start with a new state."
)
_OTHER_ORDER = (
    "The checkpoint has no names, so its parameters are taken in their order: give this optimizer"
    " the groups of the saved one in the same order, and a model of the same ranks and shapes."
)
_RATES = ("lr", "initial_lr", "rank_multiplier", "pinned_lr")


class _Slot(NamedTuple):
    """One parameter of a checkpoint: its key in `state`, and its group."""

    key: Any
    group: Group


def fit_checkpoint(
    param_groups: Groups, state_dict: dict[str, Any], order: Order
) -> dict[str, Any]:
    """Return the state_dict to load, with the layout of our groups. Nothing is changed in place.

    Args:
        param_groups: this optimizer's groups.
        state_dict: the checkpoint.
        order: the parameters' names by user group, in the order that was given.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    if any(not {"param_names", "user_group"} <= group.keys() for group in param_groups):
        raise CheckpointError(
            "A group was added to param_groups directly, so this optimizer does not know its"
            " parameters.",
            "Add it by add_param_group.",
        )
    groups, state = _read(state_dict)
    # a framework (DeepSpeed's ZeRO) replaced a group's parameters by one flat share
    if any(len(g["params"]) != len(g["param_names"]) for g in param_groups):
        sources, keys = _flat(param_groups, groups, state)
        moments = dict(state)
    else:
        slots = _slots(param_groups, groups, order)
        sources = [_sources(group, slots) for group in param_groups]
        keys, moments = _moments(param_groups, groups, slots, state)
    fitted = []
    for group, theirs, numbers in zip(param_groups, sources, keys, strict=True):
        fitted.append({**_merged(group, theirs[0]), "params": numbers})
        check_product(fitted[-1], CheckpointError)
    _warn_of_changes(param_groups, groups, fitted, sources)
    return {**state_dict, "state": moments, "param_groups": fitted}


def _read(state_dict: State) -> tuple[list[Group], State]:
    """Return a checkpoint's groups, at base rates, and its state. Raise if it is none, has another
    format, or has a rate that would be misread without an error.
    """
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not groups or not isinstance(state, Mapping):
        raise CheckpointError(
            "This is not an optimizer checkpoint: it lacks param_groups or state.",
            _CURE,
        )
    for group in groups:
        if group.get("rankaware_format", GROUP_FORMAT) != GROUP_FORMAT:
            raise CheckpointError(
                f"The checkpoint has format {group['rankaware_format']}, this package reads"
                f" {GROUP_FORMAT}.",
                "Update rankaware-optim.",
            )
        if "lr" not in group:
            raise CheckpointError(
                "The checkpoint's groups are split differently from this optimizer's, and"
                " torch.distributed.checkpoint loads the settings of a group into only one of its"
                " parts.",
                "Load a plain optimizer's checkpoint by load_state_dict, or build this one as the"
                " saved one was.",
            )
        for key in _RATES:
            if not _is_usable(key, group.get(key, 1.0)):
                raise CheckpointError(
                    f"A group of the checkpoint has {key}={group[key]!r}.", _CURE
                )
    numbers = {str(key) for key in params_in(groups) if isinstance(key, int)}
    if numbers & state.keys():
        raise CheckpointError(
            "The checkpoint's state has its parameters' numbers as text, as JSON writes them, so no"
            " parameter would find its moments.",
            "Save it with torch.save, or turn the keys of its state into ints.",
        )
    return list(map(at_base_rate, groups)), state


def _is_usable(key: str, value: Any) -> bool:
    """Return whether a saved rate or multiplier is positive, or the 0 of a warm-up, or none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if key == "pinned_lr" and value is None:
        return True
    is_zero = is_number(value) and value == 0
    return is_positive(value) or (is_zero and key in ("lr", "initial_lr"))


# --- which of its parameters is which of ours -----------------------------------------------------


def _slots(param_groups: Groups, groups: Groups, order: Order) -> dict[str, _Slot]:
    """Return the checkpoint's parameters by our names."""
    slots = [_Slot(key, group) for group in groups for key in group["params"]]
    names = _names_of(groups, order)
    if len(names) != len(slots):
        raise CheckpointError(
            f"The checkpoint has {len(slots)} parameters and {len(names)} names.", _CURE
        )
    by_name = dict(zip(names, slots, strict=True))
    if len(by_name) < len(slots) or len(set(params_in(groups))) < len(slots):
        raise CheckpointError("The checkpoint's groups list a parameter twice.", _CURE)
    missing = [n for n, _ in named_params(param_groups) if n not in by_name]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of this optimizer's parameters, such as"
            f" {missing[0]}.",
            "Load it into the model it was saved from.",
        )
    _check_user_groups(param_groups, groups)
    return by_name


def _check_user_groups(param_groups: Groups, groups: Groups) -> None:
    """Raise, as torch does, if a checkpoint of ours was built from another number of groups."""
    ours = {group["user_group"] for group in param_groups}
    theirs = {group.get("user_group") for group in groups} - {None}
    if theirs and len(theirs) != len(ours):
        raise CheckpointError(
            f"The checkpoint's optimizer was built from {len(theirs)} groups, this one from"
            f" {len(ours)}.",
            "Build it from the same groups, whose rates and decays are in the checkpoint.",
        )


def _names_of(groups: Groups, order: Order) -> list[str]:
    """Return the names of a checkpoint's parameters. One that has none has those at its places in
    the groups that were given.
    """
    names = _own_names(groups)
    if names:
        return names
    given = [len(each) for each in order if each]
    saved = [len(group["params"]) for group in groups if group["params"]]
    if given != saved:
        raise CheckpointError(
            f"The checkpoint has no names, and groups of {saved} parameters, where this optimizer"
            f" was given groups of {given}.",
            "Give this optimizer the groups of the saved one, in the same order, frozen parameters"
            " included, or save one that was built from model.named_parameters().",
        )
    return list(chain(*order))


def _own_names(groups: Groups) -> list[str]:
    """Return the names that a checkpoint has of its parameters. A plain one may have none."""
    names: list[str] = []
    for group in groups:
        # torch.distributed.checkpoint has names as keys, in the optimizer's order, and leaves
        # `param_names` in the saved order
        own = group["params"] if _by_key(group) else group.get("param_names") or ()
        names += map(canonical_name, own)
    return names


def _by_key(group: Group) -> bool:
    return all(isinstance(key, str) for key in group["params"])


# --- the groups to load ---------------------------------------------------------------------------


def _moments(
    param_groups: Groups, groups: Groups, slots: dict[str, _Slot], state: State
) -> tuple[list[list[Any]], dict[Any, Any]]:
    """Return the parameters' keys by group, and the checkpoint's state under them."""
    keys: list[list[Any]] = []
    shapes, numbers = _written_shapes(groups), count()
    cure = _OTHER_MODEL if _own_names(groups) else _OTHER_ORDER
    # some optimizers keep state of no parameter
    others = state.keys() - set(params_in(groups))
    moments = {key: state[key] for key in others if not isinstance(key, int)}
    for group in param_groups:
        keys.append([])
        for name, param in named_params([group]):
            key, theirs = slots[name]
            saved, number = state.get(key), next(numbers)
            rank, their_rank = group.get("lora_rank"), theirs.get("lora_rank")
            if "lora_rank" in theirs and their_rank != rank:
                raise CheckpointError(
                    f"The checkpoint's {name} has rank {their_rank}, the model's has rank {rank}.",
                    _OTHER_MODEL,
                )
            own = _shapes_in(saved, param)
            # where the checkpoint stores the parameter's shape, state may have any
            fitting = [shapes[name]] if name in shapes else own
            _check_shape(name, param, fitting, cure)
            keys[-1].append(number)
            if saved is not None:
                moments[number] = {k: _laid_out(v, param) for k, v in saved.items()}
    return keys, moments


def _flat(
    param_groups: Groups, groups: Groups, state: State
) -> tuple[list[list[Group]], list[list[Any]]]:
    """Return the saved group and the keys of each of ours where ours hold flat shares. These have
    no names, so the checkpoint must be split in the same way.
    """
    alike = len(param_groups) == len(groups)
    for group, theirs in zip(param_groups, groups, strict=False):
        for key in ("param_names", "lora_rank"):
            alike &= group.get(key) == theirs.get(key)
        alike &= len(group["params"]) == len(theirs["params"])
        for param, key in zip(group["params"], theirs["params"], strict=False):
            shapes = _shapes_in(state.get(key), param)
            alike &= all(shape == tuple(param.shape) for shape in shapes)
    if not alike:
        raise CheckpointError(
            "A framework has flattened this optimizer's parameters, and the checkpoint's groups are"
            " split differently.",
            "Load it with the ranks, the law and the number of processes with which it was saved.",
        )
    return [[group] for group in groups], [group["params"] for group in groups]


def _sources(group: Group, slots: dict[str, _Slot]) -> list[Group]:
    """Return the saved groups whose parameters one of ours has. Their settings must agree."""
    by_id = {id(slots[name].group): slots[name].group for name in group["param_names"]}
    sources = list(by_id.values())
    first = settings_in(sources[0])
    for source in sources[1:]:
        theirs = settings_in(source)
        for key, value in first.items():
            if theirs.get(key) != value:
                raise CheckpointError(
                    f"Parameters of one group here, such as {group['param_names'][0]}, come from"
                    f" saved groups of different {key}.",
                    "Build the optimizer from the same groups as the saved one.",
                )
    return sources


def _merged(group: Group, theirs: Group) -> Group:
    """Return our group with the saved group's settings and base rate, and our own tags."""
    tags = {key: group[key] for key in TAGS if key in group}
    pinned, saved = group["pinned_lr"], theirs.get("pinned_lr")
    # OneCycleLR starts at a fraction of the rate
    peak = theirs.get("max_lr")
    base = float(base_of(theirs) if peak is None else peak)
    if pinned is None:
        unread = group.get("lora_init") in ("other", "unknown")
        if unread and theirs.get("lora_init") in ("A", "B"):
            # trained weights no longer show the init that gave the saved multiplier
            tags["lora_init"] = theirs["lora_init"]
            tags["rank_multiplier"] = theirs["rank_multiplier"]
    elif saved is not None:
        # its base may have been scheduled since, so its ratio is kept
        tags["rank_multiplier"] = theirs["rank_multiplier"] * (pinned / saved)
    elif base:
        tags["rank_multiplier"] = pinned / base
    if theirs.get("rankaware_recipe"):  # the recipe that the base rate is of
        tags["rankaware_recipe"] = theirs["rankaware_recipe"]
    return {**settings_in(theirs), **tags, "param_names": list(group["param_names"])}


# --- one parameter's state ------------------------------------------------------------------------


def _check_shape(
    name: str, param: torch.Tensor, saved: Sequence[Shape], cure: str
) -> None:
    """Raise if state of these shapes cannot belong to a parameter.

    It can if there are none, if one has its shape, or if they are factored statistics. These have
    size 1 along reduced axes, and together cover every axis.
    """
    shape = tuple(param.shape)
    fits = not saved or shape in saved
    if not fits and len(saved[0]) == len(shape):
        by_axis = [set(sizes) for sizes in zip(*saved, strict=True)]
        fits = all(
            size in sizes <= {1, size}
            for size, sizes in zip(shape, by_axis, strict=True)
        )
    if not fits:
        raise CheckpointError(
            f"The checkpoint's {name} has shape {saved[0]}, the parameter {shape}.",
            cure,
        )


def _written_shapes(groups: Groups) -> dict[str, Shape]:
    """Return the shapes that our checkpoint stores, by parameter name. A plain one has none."""
    written: dict[str, Shape] = {}
    for group in groups:
        names = group.get("param_names") or []
        texts = str(group.get("param_shapes", "")).split(" ")
        if "param_shapes" in group and len(names) == len(texts):
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


# --- what is said of a checkpoint that fits -------------------------------------------------------


def _warn_of_changes(
    ours: Groups, theirs: Groups, fitted: Groups, sources: Sequence[Groups]
) -> None:
    """Warn once if the checkpoint was made with another recipe or law, if a scheduler's state from
    there does not fit, or if torch.distributed.checkpoint lost a rate.

    sources: the saved groups that each of `fitted` was made from.
    """
    (now, name), (before, saved_name) = _recipe_of(ours), _recipe_of(theirs)
    another_recipe = "" not in (now, before) and now != before
    another_law = any(map(_is_of_another_law, fitted, sources))
    bases = {(g.get("user_group"), float(g["lr"])) for g in filter(_by_key, theirs)}
    rows = [
        (
            another_recipe,
            f"The checkpoint was made with the recipe {saved_name!r} ({before}), this optimizer"
            f" with {name!r} ({now}): the checkpoint's base rate is kept. Build the optimizer with"
            " the checkpoint's recipe, or start with a new state to use the new recipe's rate.",
        ),
        (
            another_law and not another_recipe,
            "The checkpoint was made with another law or reference at the same rank: its base rate"
            " is kept, and this optimizer's law multiplies it. For the same rates, build the"
            " optimizer as the saved one was.",
        ),
        (
            len(ours) != len(theirs) and "initial_lr" in set(chain(*theirs)),
            f"The checkpoint has {len(theirs)} parameter groups, this optimizer has {len(ours)}, so"
            " a scheduler's state from there does not fit. Before you load it, let its lists have a"
            ' value for each group here: state["base_lrs"] = opt.expand(state["base_lrs"]), and'
            " _last_lr and lr_lambdas likewise.",
        ),
        (
            # with full_state_dict=True all parts but one keep their old rate
            len(bases) > len({user for user, _ in bases}),
            "torch.distributed.checkpoint loaded several base rates into the parts of one group: it"
            " loads a saved group's settings into only one of them. Set group['lr'] of all of them"
            " to the saved rate.",
        ),
    ]
    words = " ".join(sentence for applies, sentence in rows if applies)
    if words:
        warn(words)


def _is_of_another_law(fitted: Group, sources: Groups) -> bool:
    ours = fitted["rank_multiplier"]
    ratios = [source.get("rank_multiplier", ours) / ours for source in sources]
    return fitted["pinned_lr"] is None and any(abs(r - 1.0) > 1e-9 for r in ratios)


def _recipe_of(groups: Groups) -> tuple[str, str]:
    """Return hash and name of the groups' recipe, from their tag "hash name"; empty strings without
    a recipe.
    """
    tags = (group.get("rankaware_recipe") for group in groups)
    digest, _, name = str(next(filter(None, tags), "")).partition(" ")
    return digest, name


# --- for a plain optimizer ------------------------------------------------------------------------


def to_plain_state_dict(opt: Any) -> dict[str, Any]:
    """Return a state_dict for a native optimizer, whose step does not multiply rates.

    It has the same groups, with the rates that are trained at: base rate × multiplier. Load it into
    a native optimizer built from `rank_aware_param_groups`. The groups keep their multipliers and
    that they are multiplied, so that a later load into a `RankAwareOptimizer` gives the base rates.

    Args:
        opt: a `RankAwareOptimizer`.
    """
    state = opt.state_dict()
    groups: list[Group] = []
    for group in state["param_groups"]:
        groups.append({"rank_multiplier": 1.0, **group})
        multiply_for_native(groups[-1])
    return {**state, "param_groups": groups}
