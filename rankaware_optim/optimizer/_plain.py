"""To a plain optimizer: the state of ours, and of a scheduler on it, for the user's own groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ._param_groups import TAGS


def to_plain_state_dict(opt: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The state for a plain optimizer with the user's own groups: rates divided by their multipliers, no tags.

    Parameters come in the order they were given in, so `native.load_state_dict` takes it where the native optimizer
    was built from the same parameters. names: all names in another order, such as that of model.named_parameters().
    """
    state = opt.state_dict()
    position = {
        n: (g, key) for g in state["param_groups"] for n, key in zip(g["param_names"], g["params"], strict=True)
    }
    order = opt._rankaware.order if names is None else (tuple(names),)
    groups, made, count = [], {}, 0
    for own in order:
        present = [n for n in own if n in position]
        if not present:
            continue
        group = position[present[0]][0]
        base = {k: v for k, v in group.items() if k not in (*TAGS, "params", "param_names")}
        for key in ("lr", "initial_lr"):
            if key in base:
                base[key] = base[key] / group["lr_multiplier"]
        groups.append({**base, "params": list(range(count, count + len(own)))})
        for offset, name in enumerate(own):
            if name in position and position[name][1] in state["state"]:
                made[count + offset] = state["state"][position[name][1]]
        count += len(own)
    return {**state, "state": made, "param_groups": groups}


_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")  # one rate a group
_FUNCTIONS = ("lr_lambdas",)  # one function a group


def convert_scheduler_state(
    state: Mapping[str, Any], opt: Any, *, to: Literal["rank-aware", "plain"] = "rank-aware"
) -> dict[str, Any]:
    """A scheduler's state for the other side: one rate a user group becomes one a group of ours, or back.

    to="rank-aware" takes the state of a scheduler on a plain optimizer, to="plain" one of a scheduler on `opt`.
    """
    sources = [(group["user_group"], group["lr_multiplier"]) for group in opt.param_groups]
    firsts = {user: i for i, (user, _) in reversed(list(enumerate(sources)))}

    def rates(values: Sequence[Any], scale: bool) -> list[Any]:
        if to == "plain":
            own = [(values[firsts[user]], sources[firsts[user]][1]) for user in sorted(firsts)]
            return [value / multiplier if scale else value for value, multiplier in own]
        return [values[user] * multiplier if scale else values[user] for user, multiplier in sources]

    expected = len(sources) if to == "plain" else len(firsts)
    made = dict(state)
    for key, value in state.items():
        if key == "_schedulers":
            made[key] = [convert_scheduler_state(inner, opt, to=to) for inner in value]
        elif isinstance(value, (list, tuple)) and len(value) == expected and key in (*_RATES, *_FUNCTIONS):
            made[key] = rates(value, scale=key in _RATES)
    return made
