"""The native optimizer class with its groups written by hand, with which every optimizer of ours is compared."""

from __future__ import annotations

import inspect
import io
import random
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

from rankaware_optim import RankAwareOptimizer, Reference

from ...helpers import optimizers
from ...helpers.models import batches, mlp, trained

LR = 1e-3
AT_16 = Reference(rank=16, alpha=16)
RANKS = (4, 8, 4)


@dataclass(frozen=True)
class Case:
    """An optimizer class, its settings, and what it requires of the groups and the training loop.

    groups: "all" passes all trainable parameters at once, and "matrices" only the LoRA matrices.
    "muon" passes the LoRA matrices and the other parameters as two groups, distinguished by
    `use_muon`. closure: whether the step needs a closure. graph: whether gradients keep their
    graph. sparse: whether gradients are made sparse.
    """

    kind: type[Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    groups: str = "all"
    closure: bool = False
    graph: bool = False
    sparse: bool = False
    width: int = 16

    def model(self) -> nn.Module:
        return mlp(RANKS, width=self.width, head=self.groups != "matrices", seed=3)

    @property
    def rate(self) -> dict[str, float]:
        return {"lr": LR} if "lr" in inspect.signature(self.kind).parameters else {}

    def own(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the parameter groups that a user would pass."""
        if self.groups != "muon":
            return [{"params": trained(model)}]
        head = {id(p) for p in model.get_submodule("head").parameters()}
        parted: dict[bool, list[Any]] = {True: [], False: []}
        for param in trained(model):
            parted[id(param) not in head].append(param)
        return [{"params": params, "use_muon": is_} for is_, params in parted.items()]


def by_class(case: Case, model: nn.Module, **options: Any) -> Any:
    params = model if case.groups != "muon" else case.own(model)
    options |= case.rate | case.settings
    return RankAwareOptimizer(params, case.kind, model=model, tuned_at=AT_16, **options)


def by_instance(case: Case, model: nn.Module) -> Any:
    built = case.kind(case.own(model), **case.rate, **case.settings)
    return RankAwareOptimizer(built, model=model, tuned_at=AT_16)


def native(case: Case, model: nn.Module) -> Any:
    """Return the native class with its groups written out, at learning rates multiplied by the scaling law."""
    cut = parts(case, model)
    opt = case.kind([group for _, group in cut], **case.rate, **case.settings)
    for group, (rank, _) in zip(opt.param_groups, cut, strict=True):
        group["lr"] = group["lr"] * multiplier(rank, case)
    return opt


def parts(case: Case, model: nn.Module) -> list[tuple[int | None, dict[str, Any]]]:
    """Split each of the user's groups by role and rank.

    Return each part with its rank, which is None for parameters outside of LoRA.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    parts = []
    for own in case.own(model):
        cut: dict[Any, list[nn.Parameter]] = {}
        for param in own["params"]:
            layer, role = names[id(param)].split(".")
            rank = getattr(model.get_submodule(layer), "r", None)
            cut.setdefault((rank, role if rank else "other"), []).append(param)
        parts += [
            (rank, {**own, "params": params}) for (rank, _), params in cut.items()
        ]
    return parts


def multiplier(rank: int | None, case: Case = Case(torch.optim.AdamW)) -> float:
    return optimizers.multiplier(rank, case.kind, case.settings, case.width)


# --- training and saving --------------------------------------------------------------------------------------------


def run(case: Case, model: nn.Module, opt: Any, first: int = 0, last: int = 8) -> None:
    """Run steps `first` to `last` of one task.

    An optimizer that has a training and an evaluation mode is in its training mode during the
    steps, and in its evaluation mode afterwards.
    """
    torch.manual_seed(first)
    random.seed(first)
    numpy.random.seed(first)
    _mode(opt, "train")
    for x in list(batches(last, width=case.width))[first:]:
        loss = _closure(case, model, opt, x)
        loss()
        opt.step(*[loss] * case.closure)
    _mode(opt, "eval")


def _closure(case: Case, model: nn.Module, opt: Any, x: torch.Tensor) -> Any:
    @torch.enable_grad()
    def closure() -> torch.Tensor:
        opt.zero_grad()
        out = model(x)
        loss = (out - x[:, : out.shape[1]].sin()).square().mean()
        loss.backward(create_graph=case.graph)
        for p in model.parameters() if case.sparse else ():
            if p.grad is not None:
                p.grad = p.grad.to_sparse()
        return loss.detach()

    return closure


def _mode(opt: Any, name: str) -> None:
    if hasattr(opt, name):
        getattr(opt, name)()


def through_file(opt: Any, *, safely: bool) -> Any:
    """Return the optimizer's state after saving and loading it with torch."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=safely)
