"""Training with groups that were split by hand, with which training by our optimizer is compared.

`ByHand` is what a person would write who knows every parameter's multiplier. It has two plain
optimizers: one with the user's groups, to which schedulers and loops write and which never steps,
and one with the split groups, which steps.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rankaware_optim import RankAwareOptimizer, Reference

from .models import mlp, trained
from .optimizers import multiplier

LR, STEPS = 1e-2, 12
AT_16 = Reference(rank=16, alpha=16)
RANKS = (4, 8)
AdamW = torch.optim.AdamW
Groups = Callable[[nn.Module], Any]


def one(model: nn.Module) -> Any:
    """Return all parameters that train, as one group."""
    return trained(model)


def two(model: nn.Module) -> Any:
    """Return the LoRA matrices as one group, and the head as another group with its own learning
    rate.
    """
    factors = [*trained(model.layer0), *trained(model.layer1)]
    return [{"params": factors}, {"params": trained(model.head), "lr": LR / 5}]


def three(model: nn.Module) -> Any:
    """Return one group for each layer, the first with its own learning rate and weight decay."""
    first = {"params": trained(model.layer0), "lr": 2 * LR, "weight_decay": 0.1}
    return [first, {"params": trained(model.layer1)}, {"params": trained(model.head)}]


class ByHand:
    """A run with groups that were split by hand, where `opt` has the user's groups."""

    def __init__(
        self, model: nn.Module, groups: Groups, kind: Any, given: Any, pinned: float
    ) -> None:
        self.model, self.kind, self.pinned = model, kind, pinned
        self.opt = kind(groups(model), **given)
        # for each split group: the number of the user's group, and the multiplier
        self.owner: list[tuple[int, float]] = []
        self.real = kind(list(self.split()), **given)
        self.seen = [dict(group) for group in self.opt.param_groups]

    def multiplier(self, param: torch.Tensor) -> tuple[float, Any]:
        """Return a parameter's multiplier, and the rank and role by which its group is split
        further.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        layer, _, half = names[id(param)].partition(".")
        rank = getattr(self.model.get_submodule(layer), "r", None)
        if rank is None and self.pinned:
            return self.pinned / LR, None
        return multiplier(rank, self.kind), (rank, half if rank else "")

    def split(self, first: int = 0) -> Iterator[dict[str, Any]]:
        for number, group in enumerate(self.opt.param_groups[first:], first):
            parts: dict[Any, list[Any]] = {}
            for param in group["params"]:
                parts.setdefault(self.multiplier(param), []).append(param)
            for (by, _), params in parts.items():
                self.owner.append((number, by))
                yield {**group, "params": params}

    def step(self, closure: Any = None) -> Any:
        self.copy_writes()
        return self.real.step(*([] if closure is None else [closure]))

    def copy_writes(self) -> None:
        """Copy values that were written to the user's groups into the split groups."""
        for (number, by), part in zip(self.owner, self.real.param_groups, strict=True):
            given, seen = self.opt.param_groups[number], self.seen[number]
            for key, value in given.items():
                if key not in ("params", "initial_lr") and value is not seen.get(key):
                    part[key] = value
            part["lr"] = given["lr"] * by
        self.seen = [dict(group) for group in self.opt.param_groups]

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.opt.add_param_group(group)
        self.seen.append(dict(self.opt.param_groups[-1]))
        for part in self.split(len(self.opt.param_groups) - 1):
            self.real.add_param_group(part)

    def call(self, name: str) -> None:
        getattr(self.real, name)()

    def resume(self, again: Callable[[Any], None] = lambda opt: None) -> None:
        """Change nothing, because a resumed run must continue as if it had never stopped."""

    copied = pickled = resume


class Ours:
    """A run with the optimizer under test, with the same methods as `ByHand`."""

    def __init__(
        self, model: nn.Module, groups: Groups, kind: Any, given: Any, pinned: float
    ) -> None:
        more = {"other_lr": pinned} if pinned else {}

        def build(model: nn.Module) -> Any:
            return RankAwareOptimizer(
                groups(model), kind, model=model, tuned_at=AT_16, **more, **given
            )

        self.model, self.build, self.opt = model, build, build(model)

    def step(self, closure: Any = None) -> Any:
        return self.opt.step(*([] if closure is None else [closure]))

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.opt.add_param_group(group)

    def call(self, name: str) -> None:
        getattr(self.opt, name)()

    def resume(self, again: Callable[[Any], None] = lambda opt: None) -> None:
        """Continue with another model and optimizer, whose states come from a file that is read
        without unpickling.
        """
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        weights = self.model.state_dict()
        self.model = mlp(RANKS, seed=1)
        self.opt = self.build(self.model)
        self.model.load_state_dict(weights)
        again(self.opt)
        self.opt.load_state_dict(torch.load(file, weights_only=True))

    def copied(self) -> None:
        self.model, self.opt = copy.deepcopy((self.model, self.opt))

    def pickled(self) -> None:
        self.model, self.opt = pickle.loads(pickle.dumps((self.model, self.opt)))


class Run:
    """One training run of `ByHand` or `Ours`, whose `log` has all parameters after each step."""

    def __init__(self, side: Any, groups: Groups, kind: Any, **given: Any) -> None:
        pinned = given.pop("pinned", 0.0)
        model = mlp(RANKS)
        self.side = side(model, groups, kind, {"lr": LR, **given}, pinned)
        self.count, self.log = 0, list[list[torch.Tensor]]()

    @property
    def opt(self) -> Any:
        """The optimizer to which schedulers and loops write."""
        return self.side.opt

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.opt.param_groups

    @property
    def is_ours(self) -> bool:
        return isinstance(self.side, Ours)

    def loss(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.count)
        x = torch.randn(8, 16, generator=generator)
        y = self.side.model(x)
        return (y - x[:, : y.shape[1]].sin()).square().mean()

    def backward(self) -> torch.Tensor:
        self.side.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, steps: int = STEPS, after: Any = None, step: Any = None) -> None:
        for _ in range(steps):
            self.backward()
            (step or self.side.step)()
            self.count += 1
            self.note()
            if after is not None:
                after()

    def note(self) -> None:
        params = self.side.model.parameters()
        self.log.append([param.detach().clone() for param in params])


def first_difference(log: list[Any], other: list[Any]) -> int | None:
    """Return the number of the first step after which two runs differ in any bit, or None if they
    never differ.
    """
    assert len(log) == len(other)
    for number, (ours, theirs) in enumerate(zip(log, other, strict=True)):
        if not all(map(torch.equal, ours, theirs)):
            return number
    return None
