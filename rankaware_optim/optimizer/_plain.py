"""The state of a RankAwareOptimizer for a plain torch optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._param_groups import TAGS, multiply_for_native, shrinks_by_decay


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
    """
    state = opt.state_dict()
    if names is None and not own_groups:
        keep = not opt._rankaware.scale_weight_decay
        groups = [
            _native(group, keep and shrinks_by_decay(opt, group)) for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}
    named = [
        (g, zip(g.get("param_names", ()), g["params"], strict=False)) for g in state["param_groups"]
    ]
    place = {name: (group, key) for group, pairs in named for name, key in pairs}
    groups, made, count = [], {}, 0
    for own in opt._rankaware.order if names is None else (tuple(names),):
        present = [n for n in own if n in place]
        group = (
            place[present[0]][0] if present else state["param_groups"][0]
        )  # an empty group needs some settings
        base = {k: v for k, v in group.items() if k not in (*TAGS, "params", "param_names")}
        groups.append({**base, "params": list(range(count, count + len(own)))})
        for number, name in enumerate(own, count):
            if name in place and place[name][1] in state["state"]:
                made[number] = state["state"][place[name][1]]
        count += len(own)
    return {**state, "state": made, "param_groups": groups}


def _native(group: dict[str, Any], keep_decay: bool) -> dict[str, Any]:
    """Return a group at the rates that are trained at."""
    made = {"rank_multiplier": 1.0, **group}
    multiply_for_native(made, keep_decay)
    return made
