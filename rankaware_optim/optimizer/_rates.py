"""The rates of an optimizer: every part of the user's groups, with its rate now and the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class RateGroup:
    """Parameters of one of the user's groups that train at one rate: lr = base_lr × multiplier.

    Args:
        role: "A" or "B" for LoRA's factors, "full" for whole weights, "other", or "frozen" in a
            report.
        rank: the LoRA rank, None for what is no factor.
        scaling: s, the factor of B·A, None for what is no factor.
        init: "A" if B started at zero, "B" if A did, else "other" or "unknown".
        multiplier: what multiplies the base rate.
        base_lr: the rate in the user's group, which a scheduler sets.
        lr: the rate of the next step.
        initial_lr: the rate from which the schedule starts, or `lr`.
        why: the reason for the rate in words.
        names: the parameters' names in the model.
        params: the parameters.
        family: the optimizer's kind of update there.
        user_group: the number of the user's group.
        is_given: whether the rate was given outright, by `rates`, `other_lr` or a recipe.
    """

    role: str
    rank: int | None
    scaling: float | None
    init: str | None
    multiplier: float
    base_lr: float
    lr: float
    initial_lr: float
    why: str
    names: tuple[str, ...]
    params: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)
    family: str = "sign-like"
    user_group: int = 0
    is_given: bool = False


class Rates(Mapping[str, RateGroup]):
    """The rates of an optimizer by parameter name: each name's `RateGroup`, as it is now.

    It follows the optimizer: a look after a scheduler's step gives the new rate.
    """

    def __init__(self, opt: Any) -> None:
        self._opt = opt

    @property
    def groups(self) -> tuple[RateGroup, ...]:
        """The parts of the user's groups, in the user's order."""
        groups = []
        splits = self._opt._rankaware.parts.shown(self._opt)
        for number, split in enumerate(splits):
            for part in split.parts:
                base = float(split.base_of(part))
                start = float(split.group.get("initial_lr", base))
                at = part.assigned
                groups.append(
                    RateGroup(
                        role=at.role,
                        rank=at.rank,
                        scaling=at.scaling,
                        init=at.init,
                        multiplier=part.multiplier,
                        base_lr=base,
                        lr=base * part.multiplier,
                        initial_lr=start * part.multiplier,
                        why=at.why,
                        names=tuple(split.members[i].name for i in part.at),
                        params=tuple(split.params_of(part)),
                        family=at.family,
                        user_group=number,
                        is_given=at.lr is not None,
                    )
                )
        return tuple(groups)

    def __getitem__(self, name: str) -> RateGroup:
        return self._by_name()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name())

    def __len__(self) -> int:
        return len(self._by_name())

    def __repr__(self) -> str:
        lines = [f"Rates of {len(self)} parameters"]
        for group in self.groups:
            kind = (
                group.role
                if group.rank is None
                else f"{group.role} of rank {group.rank}"
            )
            rate = f"{group.base_lr:.3g} × {group.multiplier:.3g}"
            lines.append(f"  {kind}, {len(group.names)} tensors, lr {rate}")
        return "\n".join(lines)

    def _by_name(self) -> dict[str, RateGroup]:
        return {name: group for group in self.groups for name in group.names}
